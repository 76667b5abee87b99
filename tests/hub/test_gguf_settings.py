"""What ends an answer and how tokens are chosen, in GGUF metadata and out of it."""

import numpy as np
import pytest

from modelhub.hub.gguf_settings import end_tokens, read_origin, read_settings, write_origin, write_settings

TOKENS = ["<pad>", "<eos>", "<bos>", "a", "<|im_end|>", "</s>", "<|done|>", "<|over|>", "<|stop|>"]
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def metadata(types=None, **ids):
    found = {"tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": np.full(len(TOKENS), NORMAL, np.int32)}
    found["tokenizer.ggml.token_type"][[*(types or {})]] = [*(types or {}).values()]
    return found | {f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items()}


def test_what_a_file_states_comes_first_then_what_the_names_say():
    assert read_settings(metadata())["eos_token_id"] == [4, 1]
    assert read_settings(metadata(eos=1, eot=6, eom=7, bos=2, padding=0)) == {
        "bos_token_id": 2, "pad_token_id": 0, "eos_token_id": [1, 6, 7, 4],
    }  # fmt: skip
    assert read_settings(metadata(eos=99, eot="x"))["eos_token_id"] == [4, 1]
    assert read_settings({"general.architecture": "llama"}) == {}


def test_a_piece_of_html_ends_nothing():
    """Gemma's "</s>" is text; Llama 2's and Mistral's is a control token."""
    for kind, ends in ((NORMAL, [4, 1]), (USER_DEFINED, [4, 1]), (CONTROL, [4, 5, 1])):
        assert read_settings(metadata({5: kind}))["eos_token_id"] == ends


def test_an_answer_goes_on_behind_a_channel():
    names = {"<|return|>": 1, "<|call|>": 2, "<|end|>": 3}
    assert end_tokens(names.get, [None], ()) == [1, 2]
    assert end_tokens({"<|end|>": 3}.get, [7, 3], ()) == [7, 3]


@pytest.mark.parametrize("ends", [[1], [4], [1, 4], [1, 6], [6], [1, 6, 7], [1, 4, 6, 7], [6, 7, 8], [1, 6, 7, 8], []])
@pytest.mark.parametrize("turn", [None, 1, 6, 7])
def test_every_set_of_ends_comes_back(ends, turn):
    written, lost = write_settings({}, metadata(eos=1), ends, turn)
    found = read_settings(metadata(eos=1) | written).get("eos_token_id")
    assert set(found) == set(ends or [1, 4])
    assert ["<|stop|>" in text for text in lost] == [True] * (8 in ends)
    if turn in ends and turn != 1:
        assert written["tokenizer.ggml.eot_token_id"] == turn
    assert not any(written.get(f"tokenizer.ggml.{key}_token_id") == 1 for key in ("eot", "eom"))


def test_sampling_comes_back():
    asked = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    }
    written, lost = write_settings(asked, metadata(eos=1), [1, 4], None)
    sampling = {key.removeprefix("general.sampling."): x for key, x in written.items() if "sampling" in key}
    assert sampling == {
        "temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "penalty_repeat": 1.1, "penalty_last_n": -1,
    }  # fmt: skip
    as_stored = {key: float(np.float32(x)) if isinstance(x, float) else x for key, x in written.items()}
    assert not lost and read_settings(metadata(eos=1) | as_stored) == {"eos_token_id": [1, 4]} | asked
    # llama.cpp has defaults of its own for what is not asked for
    written, _ = write_settings({"do_sample": True}, metadata(eos=1), [1, 4], None)
    assert {key: x for key, x in written.items() if "sampling" in key} == {
        "general.sampling.temp": 1.0, "general.sampling.top_k": 0, "general.sampling.top_p": 1.0,
        "general.sampling.min_p": 0.0,
    }  # fmt: skip
    assert read_settings(metadata() | written) == {"eos_token_id": [4, 1], "do_sample": True, "temperature": 1.0}
    assert write_settings({"temperature": 0.7, "top_k": 5}, metadata(eos=1), [1, 4], None) == ({}, [])  # greedy


def test_a_temperature_of_nought_is_greedy():
    keys = {"general.sampling.temp": 0.0, "general.sampling.top_k": 40}
    assert read_settings(metadata() | keys) == {"eos_token_id": [4, 1], "do_sample": False}


def test_suppressed_tokens_come_back():
    written, lost = write_settings({"suppress_tokens": [3, 6]}, metadata(eos=1), [1, 4], None)
    assert not lost and read_settings(metadata(eos=1) | written)["suppress_tokens"] == [3, 6]


def test_what_has_no_key_is_named(caplog):
    asked = {
        "num_beams": 4, "no_repeat_ngram_size": 3, "max_new_tokens": 50, "transformers_version": "5", "top_p": 0.9,
        "length_penalty": 1.0, "bad_words_ids": [[7]], "early_stopping": False, "eos_token_id": 1,
    }  # fmt: skip
    _, lost = write_settings(asked, metadata(eos=1), [1, 4], None)
    assert lost == ["bad_words_ids=[[7]]", "max_new_tokens=50", "no_repeat_ngram_size=3", "num_beams=4"]
    keys = {
        "general.sampling.mirostat": 2,
        "general.sampling.penalty_last_n": 64,
        "general.sampling.penalty_repeat": 1.0,
    }
    assert read_settings(metadata() | keys) == {"eos_token_id": [4, 1]}
    assert "general.sampling.mirostat=2" in caplog.text and "penalty_last_n" not in caplog.text
    read_settings(metadata() | keys | {"general.sampling.penalty_repeat": 1.3})
    assert "general.sampling.penalty_last_n=64" in caplog.text


def test_where_a_model_comes_from_comes_back():
    for licence, base in (("gemma", "google/gemma-3-1b-it"), (None, "me/a"), ("mit", None), (None, None)):
        assert read_origin(write_origin(licence, base)) == (licence, base)
    other = {
        "general.license": 7,
        "general.base_model.count": 2,
        "general.base_model.0.repo_url": "https://huggingface.co/a/b",
    }
    assert read_origin(other) == (None, None)  # a merge of two has no base
    assert read_origin({"general.base_model.count": 1, "general.base_model.0.repo_url": "https://x.org/a/b"})[1] is None
