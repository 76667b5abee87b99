"""What is learnt, on byte-level BPE and SentencePiece tokenizers and many chat templates, against transformers."""

import io
import json
import random

import numpy as np
import pytest
import sentencepiece
from processing.test_chat_template import SPECIAL, TEMPLATES
from tiny_preset import LINES
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from modelhub.errors import DataError
from modelhub.processing.chat_template import ChatTemplate
from modelhub.processing.tokenizer import Tokenizer
from modelhub.training.examples import make_examples
from modelhub.training.records import read_records

MARKS = [
    "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "[INST]", "[/INST]",
]  # fmt: skip
DOLLY = {"instruction": "Name the river.", "context": "It is the Öder 😀.", "response": "The Öder 😀,\n\nof course. "}
PROMPT = "Instruction:\nName the river.\n\nContext:\nIt is the Öder 😀.\n\nResponse:\n"
CHAT = [
    {"role": "user", "content": "Where does the river run?"},
    {"role": "assistant", "content": "Past the mill 😀."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "Under the bridge."},
]


def byte_level(folder, add_bos=True, add_eos=False):
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [*LINES, "\n\n"] * 2,
        trainers.BpeTrainer(
            vocab_size=700, special_tokens=["<pad>", "<s>", "</s>", *MARKS], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    around = ("<s> " if add_bos else "") + "$A" + (" </s>" if add_eos else "")
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    return Tokenizer.from_folder(folder)


def sentence_piece(folder, dummy_prefix):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=420, model_type="bpe", byte_fallback=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="</s>", bos_piece="<s>",
        user_defined_symbols=[*MARKS, "\n"], add_dummy_prefix=dummy_prefix, remove_extra_whitespaces=False,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    bare = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False) | {"special": True}
    added = {bare.piece_to_id(mark): {"content": mark, **flags} for mark in ["<pad>", "<s>", "</s>", *MARKS]}
    config = {**SPECIAL, "added_tokens_decoder": added, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {
        "byte level": byte_level(tmp_path_factory.mktemp("byte_level")),
        "byte level, </s> after every text": byte_level(tmp_path_factory.mktemp("with_eos"), True, True),
        "byte level, bare": byte_level(tmp_path_factory.mktemp("bare"), False),
        "gemma": sentence_piece(tmp_path_factory.mktemp("gemma"), False),
        "llama": sentence_piece(tmp_path_factory.mktemp("llama"), True),
    }


@pytest.fixture(params=["byte level", "byte level, </s> after every text", "byte level, bare", "gemma", "llama"])
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


def make(row, tokenizer, sequence_length=1000, **options):
    made = make_examples(read_records([row]), tokenizer, sequence_length, **options)
    (example,) = made.examples
    assert example.ids.dtype == np.int32 and example.loss.dtype == bool and example.ids.shape == example.loss.shape
    assert not example.loss[0]
    return example


def render_of(source):
    return ChatTemplate(source, special_tokens=SPECIAL).render


def learnt(example, tokenizer):
    """The text of each run of tokens with loss; decoding alone takes a space away where there is a dummy prefix."""
    runs = np.split(np.arange(len(example.ids)), np.flatnonzero(np.diff(example.loss)) + 1)
    return [tokenizer.decode(example.ids[run], False) for run in runs if example.loss[run[0]]]


def prompt_of(example):
    return example.ids[: int(np.argmax(example.loss))].tolist()


def as_generated(tokenizer, prompt):
    ids = tokenizer.encode(prompt)
    return ids[:-1] if tokenizer.add_eos else ids


# --- instructions, prompts and texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "template", "prompt"),
    [
        (DOLLY, None, PROMPT),
        ({**DOLLY, "context": ""}, None, PROMPT.replace("Context:\nIt is the Öder 😀.\n\n", "")),
        ({"instruction": "a", "input": "b", "output": "c"}, None, "Instruction:\na\n\nContext:\nb\n\nResponse:\n"),
        (DOLLY, "{{Q}} {instruction} ({context})\n\n### A:\n{response}", "{Q} Name the river. (It is the Öder 😀.)\n\n### A:\n"),
        ({**DOLLY, "context": ""}, "{instruction}\n{response}", "Name the river.\n"),
        ({"instruction": "{x} {", "response": "}{response}"}, None, "Instruction:\n{x} {\n\nResponse:\n"),
        ({"prompt": "The capital of France is", "completion": " Paris"}, None, "The capital of France is"),
        ({"prompt": "Instruction: <s>", "completion": "Response:\nyes"}, None, "Instruction: <s>"),
    ],
)  # fmt: skip
def test_the_answer_and_its_end_are_learnt_after_the_prompt_of_generation(tokenizer, row, template, prompt):
    answer = row.get("response") or row.get("output") or row.get("completion")
    example = make(row, tokenizer, template=template)
    assert prompt_of(example) == as_generated(tokenizer, prompt)
    assert learnt(example, tokenizer) == [tokenizer.decode(tokenizer.encode(answer, False), False) + "</s>"]
    assert list(example.ids).count(tokenizer.eos_token_id) == 1
    every = make(row, tokenizer, template=template, loss_on="all")
    assert (every.ids == example.ids).all()
    assert every.loss[1:].all()


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Response: ", "Paris"),
        ("Response:\n\n", "Paris"),  # one token at the end, two before a word
        ("Response:\n", "\nParis"),
        ("Response:", "\n Paris"),
        ("Response ", " Paris"),
        ("e", "\u0301a"),
        ("Res", "ponse"),
        ("the river ru", "ns"),
        ("a  ", "  b  "),
        ("[INST] ", "x [/INST]"),
    ],
)
def test_tokens_never_reach_over_the_border(tokenizer, prompt, answer):
    example = make({"prompt": prompt, "completion": answer}, tokenizer)
    assert prompt_of(example) == as_generated(tokenizer, prompt)
    # A model with a dummy prefix begins an answer that stands alone with a space, which decoding takes away.
    assert learnt(example, tokenizer)[0].lstrip(" ") == (answer + "</s>").lstrip(" ")
    assert example.loss[len(prompt_of(example)) :].all()


def test_random_borders(tokenizer):
    draw = random.Random(0)
    rows = []
    for _ in range(150):
        text = "".join(draw.choices(["the", " ", "\n", "river", ".", "é", "😀", " mill", "\n\n", "[INST]", "x"], k=12))
        cut = draw.randrange(1, len(text))
        if text[cut:].strip():
            rows.append({"prompt": text[:cut], "completion": text[cut:]})
    made = make_examples(read_records(rows), tokenizer, 1000)
    assert len(made.examples) == len(rows)
    for row, example in zip(rows, made.examples, strict=True):
        prompt = as_generated(tokenizer, row["prompt"])
        assert example.ids[: len(prompt)].tolist() == prompt
        assert example.loss.tolist() == [False] * len(prompt) + [True] * (len(example.ids) - len(prompt))
        assert tokenizer.decode(example.ids[len(prompt) : -1], False).lstrip(" ") == row["completion"].lstrip(" ")


def test_texts_are_learnt_whole(tokenizer):
    for row in ("The river 😀", {"text": "The river 😀"}):
        example = make(row, tokenizer)
        assert example.ids.tolist() == as_generated(tokenizer, "The river 😀") + [tokenizer.eos_token_id]
        assert example.loss[1:].all()


def test_special_tokens_in_texts_are_not_doubled(tokenizer):
    example = make("<s>The river</s>", tokenizer)
    assert example.ids.tolist() == tokenizer.encode("<s>The river</s>", add_special_tokens=False)
    assert example.loss[1:].all()


def test_no_end_token(tokenizers, tmp_path):
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    bare = Tokenizer.from_folder(tmp_path)
    made = make_examples(read_records([DOLLY]), bare, 1000)
    assert learnt(made.examples[0], bare) == [DOLLY["response"]]
    assert "as the tokenizer has none" in str(made.notes)


# --- conversations ----------------------------------------------------------------------------------------------------

ANSWERS = ["Past the mill 😀.", "Under the bridge."]
ENDS = {
    "gemma": "{}<end_of_turn>", "gemma3": "{}<end_of_turn>", "llama2": " {} </s>", "llama3": "{}<|eot_id|>",
    "llama3.1": "{}<|eot_id|>", "smollm2": "{}<|im_end|>", "mistral-v1": "{}</s>", "mistral-nemo": "{}</s>",
    "qwen2.5": "{}<|im_end|>",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_every_answer_and_the_token_that_ends_it(tokenizer, name):
    render = render_of(TEMPLATES[name])
    made = make_examples(read_records([{"messages": CHAT}]), tokenizer, 1000, render=render)
    (example,) = made.examples
    found = learnt(example, tokenizer)
    if tokenizer._strips_space:
        found = [" " * (name == "llama2") + text for text in found]
    assert found == [ENDS[name].format(answer) for answer in ANSWERS]
    assert not made.notes
    text = render(CHAT, add_generation_prompt=False)
    assert tokenizer.decode(example.ids, False) == text
    assert example.ids.tolist().count(tokenizer.bos_token_id) == text.count("<s>")
    # GPT-2's rules read the "\n\n" that Llama 3 ends a prompt with as one token, before a word as two: see below.
    borders_differ = name.startswith("llama3") and tokenizer.token_to_id("Ċ") is not None
    assert (example.ids.tolist() == tokenizer.encode(text, add_special_tokens=False)) != borders_differ
    for turn in (1,) if borders_differ else (1, 3):  # what `chat` would give the model
        prompt = tokenizer.encode(render(CHAT[:turn], add_generation_prompt=True), add_special_tokens=False)
        assert example.ids[: len(prompt)].tolist() == prompt and example.loss[len(prompt)]
    every = make({"messages": CHAT}, tokenizer, render=render, loss_on="all")
    assert every.loss[1:].all() and (every.ids == example.ids).all()


def test_ids_and_mask_of_transformers(tmp_path):
    tokenizer = byte_level(tmp_path)
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    source = """{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
    draw = random.Random(0)
    for turns in (2, 4, 7):
        chat = [
            {"role": ["user", "assistant"][i % 2], "content": " ".join(draw.choices(" ".join(LINES[:5]).split(), k=9))}
            for i in range(turns)
        ]
        expected = reference.apply_chat_template(
            chat, chat_template=source, return_assistant_tokens_mask=True, return_dict=True
        )
        example = make({"messages": chat}, tokenizer, render=render_of(source))
        assert example.ids.tolist() == expected["input_ids"]
        assert example.loss.tolist() == [bool(x) for x in expected["assistant_masks"]]


def test_an_instruction_through_the_chat_template(tokenizer):
    example = make(DOLLY, tokenizer, render=render_of(TEMPLATES["smollm2"]), template="chat")
    text = tokenizer.decode(example.ids, False)
    assert "<|im_start|>user\nName the river.\n\nIt is the Öder 😀.<|im_end|>\n<|im_start|>assistant\n" in text
    assert learnt(example, tokenizer) == [DOLLY["response"] + "<|im_end|>"]
    prompted = make(
        {"prompt": "Hi", "completion": "Yes"}, tokenizer, render=render_of(TEMPLATES["gemma"]), template="chat"
    )
    assert learnt(prompted, tokenizer) == ["Yes<end_of_turn>"]


def test_a_template_that_rewrites_earlier_turns_leaves_the_last_answer(tokenizer):
    """Qwen 3 writes the last answer's thinking, and takes it out of those before."""
    records = read_records([{"messages": CHAT}, {"messages": CHAT[:2]}])
    made = make_examples(records, tokenizer, 1000, render=render_of(TEMPLATES["qwen3"]))
    assert [learnt(example, tokenizer) for example in made.examples] == [
        ["<think>\n\n</think>\n\nUnder the bridge.<|im_end|>"],
        ["<think>\n\n</think>\n\nPast the mill 😀.<|im_end|>"],
    ]
    assert list(made.notes.values()) == [1] and "only the last answer is learnt" in str(made.notes)


@pytest.mark.parametrize(
    ("source", "chat"),
    [
        (TEMPLATES["smollm2"].replace("assistant\n' }}", "assistant\n<think>\n' }}"), CHAT),
        (TEMPLATES["mistral-nemo"], [{"role": "system", "content": "s"}, *CHAT]),  # moves it to the last question
    ],
)
def test_a_template_that_asks_otherwise_than_it_writes_is_refused(tokenizer, source, chat):
    with pytest.raises(
        DataError, match=r"row 1: the chat template writes an answer otherwise.*it asks with '.*and writes '"
    ):
        make({"messages": chat}, tokenizer, render=render_of(source))


def test_a_template_without_end_token_is_told(tokenizer):
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    made = make_examples(read_records([{"messages": CHAT}]), tokenizer, 1000, render=render_of(source))
    assert "".join(learnt(made.examples[0], tokenizer)).startswith("Past the mill 😀.\n")
    assert "no special token" in str(made.notes)


def test_an_assistant_that_begins_is_not_learnt(tokenizer):
    chat = [{"role": "assistant", "content": "Welcome"}, *CHAT[:2]]
    assert learnt(make({"messages": chat}, tokenizer, render=render_of(TEMPLATES["smollm2"])), tokenizer) == [
        "Past the mill 😀.<|im_end|>"
    ]


def test_errors_of_conversations(tokenizer):
    with pytest.raises(DataError, match="row 1 needs a chat template, and the preset has none"):
        make({"messages": CHAT}, tokenizer)
    with pytest.raises(DataError, match="row 1 needs a chat template"):
        make(DOLLY, tokenizer, template="chat")
    with pytest.raises(DataError, match="row 1: the preset's chat template refuses: System role not supported"):
        make({"messages": [{"role": "system", "content": "s"}, *CHAT]}, tokenizer, render=render_of(TEMPLATES["gemma"]))


# --- cut and dropped --------------------------------------------------------------------------------------------------


def test_cut_and_dropped_are_counted(tokenizers):
    tokenizer = tokenizers["byte level"]
    rows = [
        {"prompt": "the river", "completion": " runs"},
        {"prompt": "the river", "completion": " runs past the old mill and under the bridge."},
        {"prompt": "the river runs past the old mill and under the bridge.", "completion": " yes"},
        {"prompt": "the river", "completion": " \n"},
    ]
    made = make_examples(read_records(rows), tokenizer, 8)
    assert [len(example.ids) < 8 for example in made.examples] == [True, False]
    whole = make(rows[1], tokenizer)
    assert made.examples[1].ids.tolist() == whole.ids[:8].tolist()
    assert made.cut == 1
    assert made.dropped == {"the answer begins after sequence_length=8": 1, "empty response": 1}
    chats = read_records([{"messages": CHAT[:1]}, {"messages": CHAT}])
    assert make_examples(chats, tokenizer, 999, render=render_of(TEMPLATES["gemma"])).dropped == {
        "no assistant turn": 1
    }


def test_nothing_left_to_learn_is_an_error(tokenizers):
    rows = read_records(
        [{"prompt": "the river runs past the mill", "completion": "yes"}, {"prompt": "a", "completion": ""}]
    )
    with pytest.raises(
        DataError, match=r"none of the 2 rows.*empty response \(1\), the answer begins after sequence_length=4 \(1\)"
    ):
        make_examples(rows, tokenizers["gemma"], 4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"template": "{instruction}"}, "must end with its only {response}"),
        ({"template": "{response}"}, "must have {instruction}"),
        ({"template": "{instruction} {response}!"}, "must end with its only {response}"),
        ({"template": "{instruction} {input} {response}"}, "unknown input"),
        ({"template": "{instruction.x} {response}"}, "unknown instruction.x"),
        ({"template": "{instruction {response}"}, "the template"),
        ({"template": "{instruction} {response}"}, "row 1 has a context and the template has no {context}"),
        ({"loss_on": "answer"}, "loss_on must be"),
        ({"sequence_length": 1}, "sequence_length must be 2 or more"),
    ],
)
def test_errors_of_options(tokenizers, options, says):
    with pytest.raises(DataError, match=says):
        make(DOLLY, tokenizers["gemma"], **options)
