"""What a CausalLM reads and writes, to the character: spaces, special tokens, start tokens, ids without a token."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from modelhub import CausalLM, ImageClassifier
from modelhub.core.backends import installed
from modelhub.errors import InputError, NotFinite
from modelhub.processing.chat_template import ChatTemplate
from modelhub.training.examples import make_examples
from modelhub.training.records import read_records

PIECES = ["▁", *"aehinoprst", "▁i", "▁is", "▁P", "▁Pa", "▁Par", "▁Pari", "▁Paris", "P", "▁i", "▁it"]
MERGES = ["▁ i", "▁i s", "▁ P", "▁P a", "▁Pa r", "▁Par i", "▁Pari s", "▁i t"]


def llama(folder, tokenizer, names, says, prompt, **config):
    """A Llama that answers the prompt with the tokens `says`, and the folder it is in."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(names), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=False, **config,
        )
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    ids = list(prompt)
    for token in says:
        with torch.no_grad():
            state = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            model.lm_head.weight[names.index(token)] = 60 * state / state.norm()
        ids.append(names.index(token))
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """A tokenizer as Llama 2, Mistral and TinyLlama have it: a word begins with its space; the model says one."""
    folder = tmp_path_factory.mktemp("spaced")
    names = list(dict.fromkeys(["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], *PIECES]))
    backend = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)}, [tuple(merge.split()) for merge in MERGES], unk_token="<unk>",
            fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    llama(folder, backend, names, ["▁Paris", "▁is"], backend.encode("it is").ids, bos_token_id=1, eos_token_id=2)
    return folder


def test_the_space_before_the_first_new_word(spaced):
    """The whole is what transformers decodes of all ids, however the answer is put behind its prompt."""
    lm = CausalLM.from_preset(str(spaced), backend="numpy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(spaced)
    model = transformers.AutoModelForCausalLM.from_pretrained(spaced)
    ids = tokenizer("it is", return_tensors="pt").input_ids
    assert lm.tokenizer.encode("it is") == ids[0].tolist()
    whole = tokenizer.decode(model.generate(ids, max_new_tokens=2, do_sample=False)[0], skip_special_tokens=True)
    assert whole == "it is Paris is"
    assert "it is" + lm.generate("it is", 2) == whole
    assert lm.generate("it is", 2, echo=True) == whole
    assert "".join(lm.generate("it is", 2, echo=True, stream=True)) == whole
    assert list(lm.generate("it is", 2, stream=True)) == [" Paris", " is"]
    assert lm.generate(["it is"], 2, echo=True, num_beams=2) == [whole]
    assert lm.generate([ids[0].tolist()], 2, echo=True) == [whole]
    assert "it is" + lm.generate("it is", 8, stop="ris") == "it is Pa"
    # An answer in a chat is a text of its own, and so is one after nothing that is seen.
    assert lm.chat([{"role": "user", "content": "it is"}], 2) == "Paris is"
    assert lm.tokenizer.stream(after=[1]).push(lm.tokenizer.token_to_id("▁Paris")) == "Paris"


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """A byte-level model that says "ab<|end|>c", and whose embedding has rows that are no tokens."""
    folder = tmp_path_factory.mktemp("ends")
    names = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>"]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<|end|>"])
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"})
    )
    says = ["a", "b", "<|end|>", "none2", "c"]
    more = [*names, *(f"none{i}" for i in range(5))]
    llama(folder, backend, more, says, backend.encode("hello").ids, bos_token_id=None, eos_token_id=0)
    return folder


@pytest.fixture(params=installed(), scope="module")
def ending(request, ends):
    return CausalLM.from_preset(str(ends), backend=request.param, device="cpu")


def test_stop_strings_that_are_or_hold_special_tokens(ending, ends):
    tokenizer = transformers.AutoTokenizer.from_pretrained(ends)
    model = transformers.AutoModelForCausalLM.from_pretrained(ends)
    ids = tokenizer("hello", return_tensors="pt").input_ids
    assert ending.generate("hello", 5) == "abc"  # ids beyond the tokenizer are nothing, as special tokens are
    for stop, text in (("<|end|>", "ab"), ("b<|end|>", "a"), ("<|en", "ab"), ("bc", "abc"), (["x", "d|>"], "ab")):
        found = model.generate(ids, max_new_tokens=5, do_sample=False, stop_strings=stop, tokenizer=tokenizer)
        answer = ending.generate("hello", 5, stop=stop, logprobs=True)
        assert answer.token_ids == [t for t in found[0, 5:].tolist() if t] and answer.text == text, stop
        assert "".join(ending.generate("hello", 5, stop=stop, stream=True)) == text
        assert ending.generate("hello", 5, stop=stop, num_beams=2) == text
    # What might begin a stop is held back, special tokens in it are never shown.
    assert list(ending.generate("hello", 5, stop="<|end|>!", stream=True)) == ["a", "b", "c"]


def test_ids_beyond_the_tokenizer_do_not_break_an_answer(ending, ends):
    tokenizer = transformers.AutoTokenizer.from_pretrained(ends)
    answer = ending.generate("hello", 9, logprobs=True)
    assert max(answer.token_ids) >= len(ending.tokenizer)
    assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert "".join(ending.generate("hello", 9, stream=True)) == answer.text == ending.tokenizer.decode(answer.token_ids)
    assert ending.score([[5, 6, 260, 7]])[0].token_ids == [5, 6, 260, 7]


# --- the start token ------------------------------------------------------------------------------------------


def test_a_text_that_spells_the_start_token_gets_no_second_one(tiny_preset):
    """One rule in generate, score, evaluate and fit; the tokenizer itself does as transformers does."""
    lm = CausalLM.from_preset(str(tiny_preset), backend="torch", device="cpu")
    text, bos = "The river runs past the old mill", lm.tokenizer.bos_token
    ids = lm.tokenizer.encode(text)
    assert ids.count(lm.tokenizer.bos_token_id) == 1
    assert lm.tokenizer.encode(bos + text).count(lm.tokenizer.bos_token_id) == 2
    assert lm.tokenizer.encode(bos + text, "once") == lm.tokenizer.encode(text, "once") == ids
    assert lm.tokenizer.encode_offsets(bos + text, "once")[0] == ids
    assert lm.score(bos + text).token_ids == ids and lm.score(bos + text).logprobs == lm.score(text).logprobs
    assert lm.generate(bos + text, 5) == lm.generate(text, 5) and lm.last_run.prompt_tokens == len(ids)
    assert lm.generate([ids], 5) == [lm.generate(text, 5)]
    assert lm.evaluate([bos + text]) == lm.evaluate([text])
    losses = []
    for row in (text, bos + text):
        fresh = CausalLM.from_preset(str(tiny_preset), backend="torch", device="cpu")
        losses.append(fresh.fit([row], steps=2, verbose=False).steps[-1]["loss"])
    assert losses[0] == losses[1]


# --- logits that are no numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", installed())
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_never_decoded(tiny_preset, backend, value):
    lm = CausalLM.from_preset(str(tiny_preset), backend=backend, device="cpu")
    name = "model.layers.1.mlp.down_proj.weight"
    broken = lm.backbone.xp.get(lm.params[name]).copy()
    broken[3, 3] = value
    lm.params = lm.params | {name: lm.backbone.xp.array(broken)}
    says = r"row 0: the model's logits are not finite .*the weights hold such values.*download it again"
    for arguments in ({}, {"temperature": 1.0}, {"num_beams": 2}, {"sampler": lambda xp, logits, u: xp.argmax(logits)}):
        with pytest.raises(NotFinite, match=says):
            lm.generate("The river", 4, **arguments)
    with pytest.raises(NotFinite, match=says):
        list(lm.generate("The river", 4, stream=True))
    with pytest.raises(NotFinite, match=says):
        lm.score("The river runs")
    lm.generation_config = {"no_repeat_ngram_size": 2}
    for beams in (1, 2):
        with pytest.raises(NotFinite, match=says):
            lm.generate("The river", 4, num_beams=beams)
    lm.generation_config = {"remove_invalid_values": True}
    assert isinstance(lm.generate("The river", 4), str)


@pytest.mark.parametrize("backend", installed())
def test_evaluate_says_that_weights_are_no_numbers(tiny_preset, backend):
    lm = CausalLM.from_preset(str(tiny_preset), backend=backend, device="cpu")
    lm.params = {name: lm.backbone.xp.array(np.full(x.shape, np.nan, np.float32)) for name, x in lm.params.items()}
    with pytest.raises(NotFinite, match="the loss over this data is nan, .*weights that are NaN.*download it again"):
        lm.evaluate(["The river runs past the old mill."])
    clf = ImageClassifier.from_config(
        3, image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        backend=backend, device="cpu",
    )  # fmt: skip
    clf.params = {name: clf.backbone.xp.array(np.full(x.shape, np.nan, np.float32)) for name, x in clf.params.items()}
    with pytest.raises(NotFinite, match="the loss over this data is nan"):
        clf.evaluate((np.zeros((2, 8, 8, 3), np.uint8), [0, 1]))


def test_float16_is_named_where_it_may_be_the_reason(tiny_preset):
    lm = CausalLM.from_preset(str(tiny_preset), backend="torch", device="cpu", dtype="float16")
    name = "model.embed_tokens.weight"
    lm.params = lm.params | {name: lm.params[name] * 30000}
    with pytest.raises(NotFinite, match='too large for float16.*dtype="float32" or "bfloat16"'):
        lm.generate("The river", 4)


# --- what users do wrong, and what they may do ----------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(tiny_preset):
    return CausalLM.from_preset(str(tiny_preset), backend="numpy")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda lm: lm.generate("a", 2.5), "max_new_tokens must be 1 or more, a whole number; got 2.5"),
        (lambda lm: lm.generate("a", "5"), "max_new_tokens must be 1 or more, a whole number; got '5'"),
        (lambda lm: lm.generate("a", True), "max_new_tokens must be 1 or more"),
        (lambda lm: lm.generate("a", seed=-1), "seed must be a whole number, 0 or more, got -1"),
        (lambda lm: lm.generate("a", seed=0.5), "seed must be"),
        (lambda lm: lm.generate("a", temperature="0.5"), "temperature must be 0 .greedy. or more, got '0.5'"),
        (lambda lm: lm.generate("a", top_k=[3]), "top_k must be a whole number"),
        (lambda lm: lm.generate("a", stop=5), "stop must be a text, or a list of texts, got 5"),
        (lambda lm: lm.generate("a", stop=["x", None]), "stop must be a text"),
        (lambda lm: lm.generate("a", logit_bias={"a": 1.0}), "whole numbers to numbers, got {'a': 1.0}.*token_to_id"),
        (lambda lm: lm.generate("a", logit_bias=[3]), "logit_bias must be {token id: amount}, got"),
        (lambda lm: lm.generate("a", logprobs=3), "logprobs must be True or False, got 3: of each token that was chosen"),
        (lambda lm: lm.generate("a", stream="yes"), "stream must be True or False"),
        (lambda lm: lm.generate("a", num_return_sequences=1.5), "num_return_sequences must be 1 or more"),
        (lambda lm: lm.generate("a", num_beams=0), "num_beams must be a whole number from 1 to 1000"),
        (lambda lm: lm.generate(None), "the prompt is a NoneType; give a string"),
        (lambda lm: lm.generate({"a": 1}), "the prompt is a dict"),
        (lambda lm: lm.generate([2, 5]), r"prompt 0 is a int; .* token ids as a list of lists: \[\[2, 651\]\]"),
        (lambda lm: lm.generate([[2, 0.5]]), "prompt 0 is a list"),
        (lambda lm: lm.generate([[]]), "prompt 0 is empty; give at least one token"),
        (lambda lm: lm.generate([[2, 400]]), "token id 400 is outside the vocabulary"),
        (lambda lm: lm.score(None), "the text is a NoneType"),
        (lambda lm: lm.score([["a"]]), "text 0 is a list"),
        (lambda lm: lm.logits([[2], [3, 4]]), r"token ids must be integers of shape \(batch, time\): all rows of one"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_told(lm, call, says):
    with pytest.raises(InputError, match=says):
        call(lm)


def test_token_ids_are_prompts(lm):
    ids = lm.tokenizer.encode("The river")
    other = lm.tokenizer.encode("In the morning the")
    texts = lm.generate(["The river", "In the morning the"], 6)
    assert lm.generate([ids, other], 6) == texts
    assert lm.generate(np.array([ids, ids]), 6) == [texts[0]] * 2
    assert lm.generate([ids, "In the morning the"], 6) == texts
    assert lm.score([ids])[0].logprobs == lm.score("The river").logprobs
    called = lm.tokenizer("The river")
    assert called == {"input_ids": ids, "attention_mask": [1] * len(ids)}
    assert lm.tokenizer(["The river", "a"])["input_ids"] == [ids, lm.tokenizer.encode("a")]


def test_no_speed_of_a_few_tokens(lm):
    lm.generate("The river", 2)
    assert lm.last_run.tokens_per_second is None
    lm.generate("The river", 24)
    assert lm.last_run.new_tokens < 9 or lm.last_run.tokens_per_second > 0


# --- templates ------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for t in tools or [] %}{{ t.function | tojson }}{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "<eos>\n{% endfor %}{% if add_generation_prompt %}assistant: {% if not enable_thinking %}quick {% endif %}{% endif %}"
)
TALK = [{"role": "user", "content": "The river?"}, {"role": "assistant", "content": "It runs."}]
TOOL = {
    "type": "function",
    "function": {"name": "mill", "description": "", "parameters": {"type": "object", "properties": {}}},
}


def mill():
    """Starts it."""


@pytest.fixture(scope="module")
def talking(tiny_preset, tmp_path_factory):
    folder = shutil.copytree(tiny_preset, tmp_path_factory.mktemp("talking") / "preset")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


def test_template_options_and_tools_in_chat(talking):
    lm = CausalLM.from_preset(str(talking), backend="numpy")

    def read(**arguments):
        lm.chat(TALK[:1], 1, **arguments)
        return lm.last_run.prompt_tokens

    def count(text):
        return len(lm.tokenizer.encode(text, False))

    plain = "<bos>user: The river?<eos>\nassistant: "
    assert read() == count(plain + "quick ")
    assert read(template_options={"enable_thinking": True}) == count(plain)
    described = json.dumps(TOOL["function"] | {"description": "Starts it."})
    assert read(tools=[mill]) == count(plain.replace("<bos>", "<bos>" + described) + "quick ")
    with pytest.raises(InputError, match=r"belongs to .* template: write template_options={'enable_thinking': False}"):
        lm.chat(TALK[:1], 1, enable_thinking=False)
    lm.chat_template = ChatTemplate("{{ messages[0].content }}", special_tokens={})
    with pytest.raises(InputError, match="has no place for tools"):
        lm.chat(TALK[:1], 1, tools=[mill])
    with pytest.raises(TypeError, match="no enable_thinkin"):
        lm.chat(TALK[:1], 1, enable_thinkin=False)


def test_template_options_and_tools_in_training(talking):
    """What is learnt and what is measured is what chat would read."""
    lm = CausalLM.from_preset(str(talking), backend="torch", device="cpu")

    def tokens(row, template_options):
        render = partial(lm.chat_template.render, options=template_options)
        made = make_examples(read_records([row]), lm.tokenizer, 128, render=render)
        return lm.tokenizer.decode(made.examples[0].ids, skip_special_tokens=False)

    # The template asks one way and writes another without the option, so only with it is there an answer to learn.
    on = {"enable_thinking": True}
    assert tokens({"messages": TALK}, template_options=on) == "<bos>user: The river?<eos>\nassistant: It runs.<eos>\n"
    with_tools = tokens({"messages": TALK, "tools": [TOOL]}, template_options=on)
    assert with_tools.startswith("<bos>" + json.dumps(TOOL["function"]) + "user:")
    assert tokens({"messages": TALK, "tools": json.dumps([TOOL])}, template_options=on) == with_tools
    history = lm.fit([{"messages": TALK}], steps=1, template_options=on, verbose=False)
    measured = lm.evaluate([{"messages": TALK}], template_options=on)
    assert history.steps[0]["loss"] > 0 and measured["tokens"] > 0
