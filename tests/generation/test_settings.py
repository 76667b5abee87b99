"""generation_config.json: every key that changes the text is done as transformers does it, or named."""

import json
import logging

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from modelhub import CausalLM
from modelhub.core.backends import installed
from modelhub.errors import ConfigError, InputError
from modelhub.generation import settings
from modelhub.generation.constraints import Constraints
from modelhub.generation.settings import ASKS_NOTHING, DONE, HARMLESS

PROMPT = "hello hell"
NEW = 20


def write_preset(folder, *, vocabulary=257, end=0, special=("<eos>",), **config):
    """A byte-level Llama of two layers whose greedy answers vary."""
    torch.manual_seed(0)
    names = [*special[:1], *sorted(pre_tokenizers.ByteLevel.alphabet()), *special[1:]]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    backend.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=None, eos_token_id=end, tie_word_embeddings=False, **config,
        )
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("presets") / "bytes"
    folder.mkdir()
    write_preset(folder)
    return folder


@pytest.fixture(scope="module")
def reference(preset):
    return transformers.AutoModelForCausalLM.from_pretrained(preset).eval()


@pytest.fixture(scope="module", params=installed())
def lm(request, preset):
    return CausalLM.from_preset(str(preset), backend=request.param, device="cpu")


@pytest.fixture(scope="module")
def ids(preset):
    return CausalLM.from_preset(str(preset), backend="numpy").tokenizer.encode(PROMPT)


def theirs(reference, ids, config, **arguments):
    """The new tokens of transformers' answer, without the token that ends it and the padding."""
    reference.generation_config = transformers.GenerationConfig(**{"eos_token_id": 0, "pad_token_id": 0} | config)
    with torch.no_grad():
        found = reference.generate(torch.tensor([ids]), **{"do_sample": False} | arguments)[0, len(ids) :].tolist()
    return found[: found.index(0)] if 0 in found else found


def ours(lm, config, prompt=PROMPT, **arguments):
    lm.generation_config = {"eos_token_id": 0} | json.loads(json.dumps(config))
    return lm.generate(prompt, logprobs=True, **arguments).token_ids


@pytest.fixture(scope="module")
def plain(reference, ids):
    """What is said without any key."""
    return theirs(reference, ids, {}, max_new_tokens=NEW)


def cases(plain, ids):
    """Keys, alone and together, that change what follows."""
    first, second, third = plain[:3]
    ends = {"eos_token_id": first}
    return [
        {"suppress_tokens": [first, third]},
        {"begin_suppress_tokens": [first]},
        {"bad_words_ids": [[first], [second, third]]},
        {"bad_words_ids": [[first, second]]},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2, "sequence_bias": [[[first], 9.0], [[second], 9.0]]},
        {"encoder_no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 3.0},
        {"sequence_bias": [[[first], -50.0]]},
        {"sequence_bias": [[[first, second], -50.0], [[ids[-1], third], 90.0]]},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "sequence_bias": [[[first, second], -9.0]]},
        {"min_new_tokens": 4, **ends},
        {"min_length": len(ids) + 3, **ends},
        {"exponential_decay_length_penalty": [2, 1.9]},
        {"exponential_decay_length_penalty": [1, 1.5], "repetition_penalty": 1.4},
        {"forced_eos_token_id": 65},
        {"forced_eos_token_id": [70, 66]},
        {"max_new_tokens": 3},
        {"max_length": len(ids) + 5},
        {"max_new_tokens": 3, "max_length": 4},
        {"remove_invalid_values": True, "renormalize_logits": True},
        {"num_beams": 3},
        {"num_beams": 4, "length_penalty": 0.2, "early_stopping": True, "eos_token_id": [0, second]},
        {"num_beams": 3, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[first]]},
        {"num_beams": 3, "renormalize_logits": True, "suppress_tokens": [first]},
        {"num_beams": 3, "forced_eos_token_id": 65},
    ]


def keys(case):
    return {"max_new_tokens": NEW} if not {"max_new_tokens", "max_length"} & set(case) else {}


def cut(tokens, case):
    """transformers gives the end token too."""
    ends = case.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def test_every_key_does_what_it_does_in_transformers(lm, reference, plain, ids):
    # The keys themselves are numpy's on all backends; what differs is how their logits get there and back.
    every = cases(plain, ids)
    for case in every if lm.backend == "numpy" else every[::5]:
        wanted = cut(theirs(reference, ids, case, **keys(case)), case)
        assert ours(lm, case, **keys(case)) == wanted, case


def test_the_keys_change_the_answer(reference, plain, ids):
    """Or the test above proves little."""
    same = [case for case in cases(plain, ids) if theirs(reference, ids, case, **keys(case)) == plain]
    assert same == [{"remove_invalid_values": True, "renormalize_logits": True}]


def test_a_prompt_of_one_token_begins_with_the_forced_token(lm, reference):
    case = {"forced_bos_token_id": 80, "begin_suppress_tokens": [3, 4, 5, 6]}
    wanted = theirs(reference, [72], case, max_new_tokens=5)
    assert wanted[0] == 80
    lm.generation_config = {"eos_token_id": 0} | case
    [found] = lm.generate([[72]], 5, logprobs=True)
    assert found.token_ids == wanted


def test_rows_of_a_batch_are_as_alone(lm, preset, plain, ids):
    """Lengths that count the prompt differ by row; what a row has said is its own."""
    prompts = ["hello hell", "a", "hello"]
    for case in (
        {"max_length": 12}, {"no_repeat_ngram_size": 2, "min_new_tokens": 3}, {"max_length": 14, "num_beams": 2},
        {"num_beams": 2, "forced_eos_token_id": 65, "stop_strings": ["A"]},
    ):  # fmt: skip
        lm.generation_config = {"eos_token_id": 0} | case
        together = [answer.token_ids for answer in lm.generate(prompts, logprobs=True)]
        assert together == [lm.generate(prompt, logprobs=True).token_ids for prompt in prompts], case


def test_cutoffs_keep_what_transformers_keeps(backend):
    """Of many draws with evenly spread numbers all that is kept comes, and nothing else does."""
    from transformers.generation import logits_process as processors

    from modelhub.generation.sampling import Sampler, sample

    logits = np.random.default_rng(0).normal(0, 3, (1, 40)).astype(np.float32)
    uniform = np.linspace(0, 0.999999, 4000, dtype=np.float32)
    for options, warpers in (
        ({"typical_p": 0.6}, [processors.TypicalLogitsWarper(0.6)]),
        ({"typical_p": 0.2}, [processors.TypicalLogitsWarper(0.2)]),
        ({"epsilon_cutoff": 0.03}, [processors.EpsilonLogitsWarper(0.03)]),
        ({"epsilon_cutoff": 0.9}, [processors.EpsilonLogitsWarper(0.9)]),
        ({"eta_cutoff": 0.02}, [processors.EtaLogitsWarper(0.02)]),
        ({"top_h": 0.5}, [processors.TopHLogitsWarper(0.5)]),
        ({"top_h": 0.01}, [processors.TopHLogitsWarper(0.01)]),
        (
            {"top_k": 20, "top_p": 0.97, "typical_p": 0.9, "epsilon_cutoff": 0.005, "top_h": 0.9},
            [
                processors.TopHLogitsWarper(0.9), processors.TopKLogitsWarper(20), processors.TopPLogitsWarper(0.97),
                processors.TypicalLogitsWarper(0.9), processors.EpsilonLogitsWarper(0.005),
            ],
        ),
    ):  # fmt: skip
        kept = torch.tensor(logits)
        for warper in warpers:
            kept = warper(None, kept)
        probabilities = torch.softmax(kept, -1)[0].numpy()
        sampler = Sampler(temperature=1.0, **options)
        values = (backend.array(np.repeat(logits, len(uniform), 0)), backend.array(uniform))
        tokens = backend.get(sample(backend, *values, backend.array(sampler.values()), sampler.features))
        found = np.bincount(tokens, minlength=40) / len(tokens)
        assert ((found > 0) <= (probabilities > 0)).all(), options
        np.testing.assert_allclose(found, probabilities, atol=2e-3)


def test_sampling_alone_is_sampling(lm):
    """do_sample with nothing else, as some presets have it."""
    greedy = ours(lm, {}, max_new_tokens=NEW)
    drawn = {tuple(ours(lm, {"do_sample": True}, max_new_tokens=NEW, seed=seed)) for seed in range(4)}
    assert len(drawn) == 4 and tuple(greedy) not in drawn
    assert ours(lm, {"do_sample": True}, max_new_tokens=NEW, temperature=0.0) == greedy
    assert ours(lm, {"do_sample": False, "temperature": 5.0, "typical_p": 0.1}, max_new_tokens=NEW) == greedy
    assert ours(lm, {"do_sample": True, "top_h": 0.0001}, max_new_tokens=NEW) == greedy
    assert ours(lm, {"do_sample": True, "epsilon_cutoff": 0.999}, max_new_tokens=NEW) == greedy


def test_arguments_win(lm, reference, plain, ids):
    assert ours(lm, {"max_new_tokens": 3, "max_length": 5}, max_new_tokens=NEW) == plain
    assert ours(lm, {"num_beams": 3}, max_new_tokens=NEW, num_beams=1) == plain
    assert ours(lm, {"num_beams": 3}, max_new_tokens=NEW, sampler="greedy") == plain
    assert ours(lm, {"repetition_penalty": 1.7}, max_new_tokens=NEW, repetition_penalty=1.0) == plain
    assert ours(lm, {"suppress_tokens": plain[:1]}, max_new_tokens=NEW, logit_bias={plain[0]: 0.0}) == plain
    lm.generation_config = {"num_beams": 3, "eos_token_id": 0}
    streamed = lm.generate(PROMPT, NEW, stream=True)  # one answer as it comes is no search
    assert "".join(streamed) == lm.tokenizer.decode(plain)
    # Beams that are asked for are searched on a preset that samples, as Gemma 3 and Llama 3 do.
    sampling = {"do_sample": True, "top_k": 64, "top_p": 0.95, "temperature": 0.6}
    assert ours(lm, sampling, max_new_tokens=NEW, num_beams=3) == theirs(
        reference, ids, {}, num_beams=3, max_new_tokens=NEW
    )
    for arguments in ({"temperature": 0.7}, {"top_k": 3}):
        with pytest.raises(
            InputError, match=f"num_beams cannot be combined with sampling: leave out {[*arguments][0]}"
        ):
            ours(lm, sampling, max_new_tokens=NEW, num_beams=3, **arguments)


def test_beams_end_at_stop_strings(lm, reference, preset):
    tokenizer = transformers.AutoTokenizer.from_pretrained(preset)
    ids = tokenizer(PROMPT).input_ids
    free = theirs(reference, ids, {"num_beams": 3}, max_new_tokens=NEW)
    lm.generation_config = {"eos_token_id": 0, "num_beams": 3}
    whole = lm.generate(PROMPT, NEW)
    stop = next(character for character in whole[1:] if character.isascii())
    with torch.no_grad():
        found = reference.generate(
            torch.tensor([ids]), num_beams=3, max_new_tokens=NEW, stop_strings=[stop], tokenizer=tokenizer
        )[0, len(ids) :].tolist()  # fmt: skip
    answer = lm.generate(PROMPT, NEW, stop=stop, logprobs=True)
    assert answer.token_ids == [token for token in found if token] and answer.token_ids != free
    assert stop not in answer.text


# --- every key there is -------------------------------------------------------------------------------------


def test_each_attribute_of_transformers_is_done_known_to_be_harmless_or_named(preset, caplog):
    attributes = {key for key in vars(transformers.GenerationConfig()) if not key.startswith("_")}
    assert not set(DONE) & HARMLESS and not (set(DONE) | HARMLESS) & set(ASKS_NOTHING)
    other = attributes - set(DONE) - HARMLESS
    lm = CausalLM.from_preset(str(preset), backend="numpy")
    for key in sorted(other):
        settings._say.cache_clear()
        caplog.clear()
        lm.generation_config = {"eos_token_id": 0, key: 77}
        with caplog.at_level(logging.WARNING, "modelhub"):
            lm.generate(PROMPT, 1)
            lm.generate(PROMPT, 1)
        [record] = caplog.records  # once
        assert f"{key}=77" in record.getMessage() and str(preset) in record.getMessage()
    # And what is done or harmless is an attribute of transformers, or of OpenAI's interface.
    assert (set(DONE) | HARMLESS | set(ASKS_NOTHING)) - attributes <= {"presence_penalty", "frequency_penalty"}


def test_defaults_of_transformers_are_not_warned_about(preset, caplog):
    defaults = transformers.GenerationConfig._get_default_generation_params()
    lm = CausalLM.from_preset(str(preset), backend="numpy")
    greedy = lm.generate(PROMPT, 5)
    lm.generation_config = defaults | {"max_length": 4096, "eos_token_id": 0, "_from_model_config": True}
    with caplog.at_level(logging.WARNING, "modelhub"):
        assert lm.generate(PROMPT, 5) == greedy
    assert not caplog.records


def test_each_done_key_reaches_the_settings():
    """A key that is listed as done and read by nobody would be wrong in silence."""
    values = {
        "max_length": 9, "max_new_tokens": 7, "min_length": 3, "min_new_tokens": 2, "stop_strings": ["x"],
        "do_sample": True, "num_beams": 2, "early_stopping": True, "length_penalty": 0.5, "temperature": 0.7,
        "top_k": 3, "top_p": 0.5, "min_p": 0.1, "top_h": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.1,
        "eta_cutoff": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.1,
        "encoder_repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2,
        "bad_words_ids": [[1]], "sequence_bias": [[[1], 2.0]], "suppress_tokens": [1], "begin_suppress_tokens": [1],
        "forced_bos_token_id": 1, "forced_eos_token_id": 1, "exponential_decay_length_penalty": [1, 1.1],
        "remove_invalid_values": True, "renormalize_logits": True,
    }  # fmt: skip
    assert set(DONE) - set(values) == {"eos_token_id"}  # CausalLM.stop_ids

    def found(config):
        return settings.settings(config, {}, stop_ids=frozenset({0}), vocabulary=10, max_new_tokens=64)

    for key, value in values.items():
        beside = {"do_sample": True} if key in (*settings._CUTS, *settings._RARE_CUTS) else {}
        assert found(beside | {key: value}) != found(beside), key


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be a whole number, 0 or more, found -1"),
        ({"suppress_tokens": 5}, "suppress_tokens must be a list of token ids"),
        ({"bad_words_ids": [5]}, "bad_words_ids must be a list of lists"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must be a list of lists"),
        ({"bad_words_ids": [[300]]}, "bad_words_ids has the token id 300; the vocabulary goes from 0 to 256"),
        ({"sequence_bias": {"1": 2}}, "sequence_bias must be a list of pairs"),
        ({"sequence_bias": [[[1, 900], 2.0]]}, "sequence_bias has the token id 900"),
        ({"forced_eos_token_id": -4}, "forced_eos_token_id has the token id -4"),
        ({"exponential_decay_length_penalty": 2}, "exponential_decay_length_penalty must be"),
        ({"num_beams": "3", "max_length": 0}, "max_length must be a whole number.*num_beams must be a whole number"),
        ({"stop_strings": [3]}, "stop_strings must be text"),
        ({"do_sample": 1}, "do_sample must be true or false"),
    ],
)
def test_values_that_make_no_sense(preset, config, says):
    lm = CausalLM.from_preset(str(preset), backend="numpy")
    lm.generation_config = config
    with pytest.raises(ConfigError, match=f"generation_config.json: .*{says}"):
        lm.generate(PROMPT, 2)


def test_constraints_are_asked_for_or_cost_nothing():
    assert not Constraints().active and not Constraints(frozenset({3})).active
    assert not Constraints(renormalize_logits=True).active
    assert Constraints(no_repeat_ngram_size=2).active and Constraints(min_new_tokens=1).active


# --- samplers as KerasHub names them --------------------------------------------------------------------------


def test_samplers_by_name(lm, plain, reference, ids):
    lm.generation_config = {"eos_token_id": 0, "do_sample": True, "top_k": 1, "temperature": 0.3}

    def tokens(sampler, **arguments):
        return lm.generate(PROMPT, NEW, sampler=sampler, logprobs=True, **arguments).token_ids

    assert tokens("greedy") == plain
    assert tokens("random", seed=3) == tokens(None, temperature=1.0, top_k=0, seed=3) != plain
    assert tokens("top_k", seed=3) == tokens(None, temperature=1.0, top_k=5, seed=3)
    assert tokens("top_k", top_k=2, seed=3) == tokens(None, temperature=1.0, top_k=2, seed=3)
    assert tokens("top_p", seed=3) == tokens(None, temperature=1.0, top_k=0, top_p=0.1, seed=3)
    assert tokens("beam") == theirs(reference, ids, {}, num_beams=5, max_new_tokens=NEW)
    assert tokens("beam", num_beams=2) == theirs(reference, ids, {}, num_beams=2, max_new_tokens=NEW)


@pytest.mark.slow
def test_each_sampler_of_kerashub_is_there_or_named(preset):
    samplers = pytest.importorskip("keras_hub.samplers")
    names = {name.removesuffix("Sampler") for name in dir(samplers) if name.endswith("Sampler")} - {""}
    names = {"top_k" if name == "TopK" else "top_p" if name == "TopP" else name.lower() for name in names}
    assert names >= set(settings.NAMED) and names <= set(settings.NAMED) | set(settings._ABSENT)
    lm = CausalLM.from_preset(str(preset), backend="numpy")
    for name in settings._ABSENT:
        with pytest.raises(InputError, match=f"sampler='{name}'.*is not there; there are 'greedy'"):
            lm.generate(PROMPT, 2, sampler=name)
    with pytest.raises(InputError, match="takes what is likeliest; leave out temperature"):
        lm.generate(PROMPT, 2, sampler="greedy", temperature=0.7)
    with pytest.raises(InputError, match="has no beams"):
        lm.generate(PROMPT, 2, sampler="top_k", num_beams=2)
    with pytest.raises(ConfigError, match="no sampler 'gready'; there are 'greedy', 'random'"):
        lm.generate(PROMPT, 2, sampler="gready")
