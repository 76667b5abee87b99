"""llama.cpp as the reader of the GGUF files that we write: its logits and its tokens are ours."""

import os
from pathlib import Path

import numpy as np
import pytest
from tiny_families import CONFIGS, KINDS, TEMPLATE, write_preset

from modelhub import CausalLM
from modelhub.conversion import convert
from modelhub.errors import DownloadError
from modelhub.hub.preset import resolve

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python (builds for some minutes)"
)

HARD = [
    "Hello world", "  two  spaces   three", "x" + " " * 40 + "y", " " * 70, "a\n\nb\n\n\n\n\tc\t\td", "\n" * 45,
    "emoji 🚀😶‍🌫️ 🦙🦙 ok", "1234567 3.14 2024-01-01 ３ Ⅷ", "漢字かな交じり文 한국어 ไทย हिन्दी", "don't I'M We'Ve 'told 'S",
    "naïve café \u00e9", "def f(x):\n    return x  # ▁ literal", "<0x0A> ...!!!??? \u200b\x7f", "In the morning, the\r\n mill",
]  # fmt: skip
SPELLED = ["<bos>hi<eos>", "<|turn|>user\nhey<|end|>\n<b>bold</b>", "<unk> <pad><|end|><|end|>", "a <b> b"]
TEXT = """
A library lends books, and it also keeps them. The first public libraries were rooms in which nobody spoke, and the
books were chained to the desks; a reader came to the book, not the book to the reader. That changed when paper became
cheap. Today a small town in Norway or Chile may lend tools, seeds, musical instruments and even people: for an hour one
can borrow somebody who has worked as a nurse, a sailor or a judge, and ask whatever one likes. The rules are simple.
1) Bring things back in 14 days. 2) If you cannot, call us. 3) Do not lend to others what was lent to you.
def fine(days): return max(0, days - 14) * 0.25
Shelves are sorted by use, not by name, and every Saturday at 9:30 somebody explains how a sewing machine is threaded.
What would you borrow first, and why? Write to us before the end of the month, and we shall print the best answers.
"""


def opened(path: Path, cells: int = 256):
    """llama.cpp with a float32 cache and logits of every position."""
    f32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(
        str(path), n_ctx=cells, n_batch=cells, n_threads=2, n_gpu_layers=0, logits_all=True, type_k=f32, type_v=f32,
        verbose=False,
    )  # fmt: skip


def logits(model, ids: list[int]) -> np.ndarray:
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


@pytest.mark.parametrize("name", CONFIGS)
def test_tiny_models_give_the_same_logits(tmp_path, name):
    folder = write_preset(tmp_path / name, CONFIGS[name], "gemma" if "gemma" in name else "llama-bpe")
    lm = CausalLM.from_preset(folder, backend="numpy")
    ids = [int(i) for i in np.random.default_rng(0).integers(4, 400, 48)]
    wanted = lm.logits([ids])[0]
    assert wanted.std() > 0.3
    for dtype, tolerance in (("float32", 0.005), ("float16", 0.02), ("bfloat16", 0.1)):
        found = logits(opened(convert(folder, tmp_path / f"{dtype}.gguf", dtype)), ids)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max(), dtype


def test_a_sliding_window_becomes_the_context(tmp_path, caplog):
    config = CONFIGS["mistral"] | {"sliding_window": 32}
    folder = write_preset(tmp_path / "mistral", config, "spaced")
    path = convert(folder, tmp_path / "mistral.gguf", "float32")
    assert "no sliding window" in caplog.text and "32 tokens" in caplog.text
    ids = list(range(100, 132))
    wanted = CausalLM.from_preset(folder, backend="numpy").logits([ids])[0]
    np.testing.assert_allclose(logits(opened(path), ids), wanted, atol=0.005 * np.abs(wanted).max())
    assert CausalLM.from_preset(path, backend="numpy").config.sliding_window == 32


def test_q8_0_is_near(tmp_path):
    folder = write_preset(tmp_path / "llama", CONFIGS["llama"], "llama-bpe")
    ids = list(range(100, 148))
    wanted = CausalLM.from_preset(folder, backend="numpy").logits([ids])[0]
    found = logits(opened(convert(folder, tmp_path / "q.gguf", "q8_0")), ids)
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens(tmp_path, kind):
    folder = write_preset(tmp_path / "preset", CONFIGS["llama"], kind)
    path = convert(folder, tmp_path / "a.gguf")
    ours, theirs = CausalLM.from_preset(folder, backend="numpy").tokenizer, opened(path)
    texts = HARD + SPELLED
    if kind == "spaced":  # llama.cpp puts a space before a space too, and behind added tokens
        texts = [text for text in HARD if text[0] != " " and "\n" not in text]
    for text in texts:
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == ours.encode(text), text
    assert theirs.metadata["tokenizer.chat_template"] == TEMPLATE
    assert (theirs.token_bos(), theirs.token_eos()) == (2, 1)
    assert theirs._model.token_eot() == ours.token_to_id("<|end|>")
    text = "In the morning the 🚀 ran past 365 mills."
    assert theirs.detokenize(ours.encode(text, add_special_tokens=False)).decode().lstrip() == text


def test_an_adapter_is_merged(tmp_path):
    folder = write_preset(tmp_path / "preset", CONFIGS["gemma3"])
    lm = CausalLM.from_preset(folder, backend="numpy")
    lm.enable_lora(rank=2, targets="all-linear")
    draw = np.random.default_rng(0)
    lm.params = {
        name: draw.normal(0, 0.1, x.shape).astype(np.float32) if "lora_B" in name else x
        for name, x in lm.params.items()
    }
    lm.save_adapter(tmp_path / "adapter")
    ids = list(range(100, 148))
    wanted = lm.logits([ids])[0]
    path = convert(folder, tmp_path / "merged.gguf", "float32", adapter=tmp_path / "adapter")
    found = logits(opened(path), ids)
    np.testing.assert_allclose(found, wanted, atol=0.005 * np.abs(wanted).max())
    assert np.abs(found - CausalLM.from_preset(folder, backend="numpy").logits([ids])[0]).max() > 0.1


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["smollm2_135m_instruct_q4", "gemma3_270m_q4"])
def test_real_models_choose_the_same_tokens(tmp_path, preset):
    try:
        resolve(preset)
    except DownloadError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{preset} is not here and cannot be downloaded: {error}")
    theirs = opened(convert(preset, tmp_path / "f16.gguf", "float16"))
    lm = CausalLM.from_preset(preset, backend="numpy", dtype="float32")
    for text in HARD + ["<|im_start|>user\nhey<|im_end|>\n", "<bos>hi<eos><start_of_turn>user\n<table><h1>x"]:
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == lm.tokenizer.encode(text), text
    ids = lm.tokenizer.encode(TEXT)[:200]
    assert len(ids) == 200
    same = logits(theirs, ids).argmax(-1) == lm.logits([ids])[0].argmax(-1)
    assert same.mean() >= 0.99
