"""The embedded preset: there without a network, alike everywhere, and quick to teach."""

import json

import numpy as np
import pytest

from modelhub import CausalLM
from modelhub.hub.resources import resource

PRESET = "gemma3_tiny"
PROMPT = "Once upon a time there was"


def test_the_same_text_on_every_backend(backend):
    lm = CausalLM.from_preset(PRESET, backend=backend.name, device="cpu", offline=True)
    reference = CausalLM.from_preset(PRESET, backend="numpy", offline=True)
    text = lm.generate(PROMPT, max_new_tokens=40)
    assert text == reference.generate(PROMPT, max_new_tokens=40)
    words = [word for word in text.split() if word.isalpha()]
    assert len(set(words)) > 10  # language, not one word again and again


def test_it_has_learnt_language():
    """Half the surprise per character of a model that knows no more than how often each token comes."""
    lm = CausalLM.from_preset(PRESET, backend="numpy")
    text = "The old woman went into the garden, and there she saw the most beautiful roses that she had ever seen."
    score = lm.score(text)
    assert -score.total / np.log(2) / len(text) < 2.2  # bits a character


def test_transformers_reads_it():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resource("presets") / PRESET
    lm = CausalLM.from_preset(PRESET, backend="numpy")
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs(PROMPT)["input_ids"]
    assert ids == lm.tokenizer.encode(PROMPT)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(lm.logits([ids]), wanted, atol=1e-3)


def test_all_of_it_is_small():
    assert sum(path.stat().st_size for path in (resource("presets") / PRESET).iterdir()) < 5_000_000


@pytest.mark.parametrize("backend", ["torch"])
def test_a_short_run_changes_what_it_says(backend):
    lm = CausalLM.from_preset(PRESET, backend=backend)
    lines = (resource("finetune") / "dolly_style.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    prompt = f"Instruction:\n{rows[-1]['instruction']}\n\nResponse:\n"
    before, loss = lm.generate(prompt, max_new_tokens=30), lm.evaluate(rows[-30:])["loss"]
    lm.preprocessor.sequence_length = 256
    lm.enable_lora(rank=8, targets="all-linear")
    lm.compile("adamw", learning_rate=5e-3)
    lm.fit(rows[:60], epochs=2, batch_size=4, verbose=False)
    assert lm.evaluate(rows[-30:])["loss"] < loss - 0.2
    assert lm.generate(prompt, max_new_tokens=30) != before
