"""The real SmolLM2-135M-Instruct on all backends, against transformers reading the same GGUF file."""

import os
from pathlib import Path

import pytest

from modelhub import CausalLM
from modelhub.core.backends import installed
from modelhub.errors import DownloadError
from modelhub.hub.preset import resolve

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
LONGER = [
    {"role": "system", "content": "You answer in full sentences."},
    {"role": "user", "content": "Explain how a bicycle stays upright."},
]
pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return resolve("smollm2_135m_instruct_q4").path
    except DownloadError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the real SmolLM2 is not here and cannot be downloaded: {error}")


@pytest.fixture(scope="module")
def theirs(path):
    """question -> greedy answer of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()

    def answer(messages: list, tokens: int) -> str:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        found = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
        return tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def test_the_answers_of_transformers_on_every_backend(path, theirs):
    short, long = theirs(QUESTION, 48), theirs(LONGER, 48)
    assert "Paris" in short
    for name in installed():
        lm = CausalLM.from_preset(str(path), backend=name, device="cpu")
        assert lm.chat(QUESTION, max_new_tokens=48) == short, name
        assert lm.chat(LONGER, max_new_tokens=48) == long, name
        assert lm.last_run.new_tokens == 48, name


def test_a_second_turn_computes_only_the_new_tokens(path):
    lm = CausalLM.from_preset(str(path), backend="numpy")
    answer = lm.chat(QUESTION)
    first = lm.last_run
    lm.chat([*QUESTION, {"role": "assistant", "content": answer}, {"role": "user", "content": "And of Italy?"}])
    assert lm.last_run.reused_tokens >= first.prompt_tokens + first.new_tokens - 1
    assert lm.last_run.prompt_tokens - lm.last_run.reused_tokens < 20
