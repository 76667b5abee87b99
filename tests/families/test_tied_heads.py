"""Heads that are, or are not, where config.json says: as transformers takes them."""

import json
import logging

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny_families import CONFIGS, write_preset

from modelhub import CausalLM
from modelhub.errors import CheckpointError

IDS = [[5, 6, 7, 8]]
KINDS = ("llama", "gemma3")


def edited(folder, tied, change):
    """The preset with tie_word_embeddings and other tensors."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": tied}))
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, {"format": "pt"})
    return folder


def theirs(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy(), model


@pytest.fixture(params=KINDS)
def untied(request, tmp_path):
    return write_preset(tmp_path / "untied", CONFIGS[request.param] | {"tie_word_embeddings": False})


def test_another_head_than_the_table_counts_and_is_saved_so(untied, tmp_path, caplog):
    edited(untied, True, lambda tensors: None)
    wanted, _ = theirs(untied)
    with caplog.at_level(logging.WARNING):
        lm = CausalLM.from_preset(untied, backend="numpy")
    assert "the files have another one, which is taken" in caplog.text
    np.testing.assert_allclose(lm.logits(IDS), wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
    lm.save_to_preset(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(CausalLM.from_preset(tmp_path / "saved", backend="numpy").logits(IDS), lm.logits(IDS))
    np.testing.assert_allclose(theirs(tmp_path / "saved")[0], wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_a_copy_of_the_table_is_no_head_of_its_own(untied):
    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    lm = CausalLM.from_preset(edited(untied, True, copy), backend="numpy")
    assert lm.config.tie_word_embeddings and "lm_head.weight" not in lm.params


def test_no_head_where_there_should_be_one_starts_at_random(untied, caplog):
    edited(untied, False, lambda tensors: tensors.pop("lm_head.weight"))
    with caplog.at_level(logging.WARNING):
        lm = CausalLM.from_preset(untied, backend="numpy")
    assert "no file has one: it starts at random" in caplog.text
    head, table = np.asarray(lm.params["lm_head.weight"]), np.asarray(lm.params["model.embed_tokens.weight"])
    _, model = theirs(untied)
    assert not np.array_equal(head, table) and 0.015 < head.std() < 0.025
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    with pytest.raises(CheckpointError, match="no file has one. If it is, write tie_word_embeddings=true"):
        CausalLM.from_preset(untied, backend="numpy", strict=True)
