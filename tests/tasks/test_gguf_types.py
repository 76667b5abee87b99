"""Quantised GGUF files that we write, beside llama.cpp's own of the same weights: types, errors, logits."""

import ctypes
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType
from gguf.quants import dequantize
from tiny_families import CONFIGS, SIZES, write_preset

from modelhub import CausalLM, conversion
from modelhub.conversion import convert
from modelhub.conversion.gguf_blocks import ENCODED, encode
from modelhub.hub.gguf import BLOCKS, open_gguf

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python (builds for some minutes)"
)

FILE_TYPES = {"q8_0": 7, "q4_0": 2, "q4_1": 3, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
IDS = [int(i) for i in np.random.default_rng(0).integers(4, 400, 48)]
WHOLE = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 9, "head_dim": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
MODELS = {
    "whole blocks": SIZES | WHOLE | {"model_type": "llama"},
    "tied": CONFIGS["gemma3"] | WHOLE | {"query_pre_attn_scalar": 64},
    "blocks of 32": CONFIGS["llama"],
    "some of 32": SIZES | WHOLE | {"model_type": "llama", "intermediate_size": 320, "tie_word_embeddings": True},
}


def write_model(tmp_path: Path, config: dict[str, Any]) -> Path:
    return write_preset(tmp_path / "preset", config, "gemma" if "gemma" in config["model_type"] else "smollm")


def theirs_blocks(x: np.ndarray, kind: str) -> np.ndarray:
    base = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/libggml-base.*"))))
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    elements, nbytes = BLOCKS[kind]
    out = np.zeros((len(x), x.shape[1] // elements * nbytes), np.uint8)
    base.ggml_quantize_chunk(GGMLType[kind].value, x.ctypes.data, out.ctypes.data, 0, *x.shape, None)
    return out


def squared(blocks: np.ndarray, x: np.ndarray, kind: str) -> float:
    return float(np.square(dequantize(blocks, GGMLType[kind]).astype(np.float64) - x).sum())


rng = np.random.default_rng(0)
WEIGHTS = {
    "normal": rng.standard_normal((64, 512)),
    "long tails": rng.standard_t(3, (64, 512)),
    "uneven": rng.standard_normal((64, 512)) * np.exp(rng.standard_normal((64, 16)).repeat(32, 1)),
    "above 0": 1 + rng.random((64, 512)),
    "below 0": -1 - rng.random((64, 512)),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_blocks_are_nearer_than_llama_cpps(kind):
    for name, x in WEIGHTS.items():
        x = (0.02 * x).astype(np.float32)
        assert squared(encode(kind, x), x, kind) < squared(theirs_blocks(x, kind), x, kind), name


@pytest.mark.parametrize("kind", ENCODED)
def test_blocks_of_nothing_and_of_little(kind):
    x = np.zeros((3, 512), np.float32)
    x[1, :32], x[2, 5] = 1e-30, 0.5
    found = dequantize(encode(kind, x), GGMLType[kind])
    np.testing.assert_allclose(found, x, atol=0.5 * 2**-10)
    assert (found[:2] == 0).all()
    wide = np.where(np.arange(512) % 2, 60000, -60000).astype(np.float32)[None]
    np.testing.assert_allclose(dequantize(encode(kind, wide), GGMLType[kind]), wide, rtol=0.08)


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", MODELS)
def test_files_are_llama_cpps_mixtures_and_nearer(tmp_path, name, caplog):
    folder = write_model(tmp_path, MODELS[name])
    exact = convert(folder, tmp_path / "exact.gguf", "float32")
    with open_gguf(exact) as file:
        weights = {tensor: file.read(tensor) for tensor in file.tensors}
    for dtype, number in FILE_TYPES.items():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = number, 1
        theirs, ours = tmp_path / f"theirs-{dtype}.gguf", convert(folder, tmp_path / f"{dtype}.gguf", dtype)
        assert llama_cpp.llama_model_quantize(bytes(exact), bytes(theirs), ctypes.byref(params)) == 0
        assert types(ours) == types(theirs), dtype
        errors = []
        for path in (ours, theirs):
            with open_gguf(path) as file:
                assert file.metadata["general.file_type"] == number
                errors.append({n: np.square(file.read(n) - x).sum() for n, x in weights.items()})
        for tensor, error in errors[0].items():
            assert error <= errors[1][tensor] * (1 + 1e-6), (dtype, tensor)


@pytest.mark.parametrize("dtype", FILE_TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_reads_what_we_read(tmp_path, name, dtype):
    folder = write_model(tmp_path, MODELS[name] | {"num_hidden_layers": 2})
    path = convert(folder, tmp_path / "a.gguf", dtype)
    wanted = CausalLM.from_preset(path, backend="numpy").logits([IDS])[0]
    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, n_threads=1, n_gpu_layers=0, logits_all=True, type_k=f32, type_v=f32,
        verbose=False,
    )  # fmt: skip
    model.eval(IDS)
    found = np.array(model.scores[: len(IDS)])
    off = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert off < 0.08, off  # it rounds activations to 8 bits


def test_from_quantised_to_quantised_without_floats_between(tmp_path, monkeypatch, caplog):
    folder = write_model(tmp_path, MODELS["whole blocks"] | {"num_hidden_layers": 2})
    first = convert(folder, tmp_path / "first.gguf", "q6_k")
    loaded = []
    from_source = conversion.Backbone.from_source

    def spied(source, xp, options):
        loaded.append(from_source(source, xp, options))
        return loaded[-1]

    monkeypatch.setattr(conversion.Backbone, "from_source", spied)
    with caplog.at_level(logging.WARNING):
        second = convert(first, tmp_path / "second.gguf", "q4_k_m")
        floats = convert(first, tmp_path / "floats.gguf", "float32")
    assert not caplog.records
    kinds = [type(backbone.params["model.layers.0.self_attn.q_proj.weight"]).__name__ for backbone in loaded]
    assert kinds == ["Tiles", "ndarray"]
    direct = convert(floats, tmp_path / "direct.gguf", "q4_k_m")
    assert types(second) == types(direct)
    with open_gguf(floats) as exact, open_gguf(second) as file, open_gguf(direct) as other:
        for name in exact.tensors:
            x = exact.read(name)
            one, two = (np.square(f.read(name) - x).sum() for f in (file, other))
            assert one <= two * 1.01 + 2.0**-22 * np.square(x).sum(), name  # its scales are float16
    with open_gguf(first) as file, open_gguf(floats) as exact:
        for name in exact.tensors:
            np.testing.assert_array_equal(file.read(name), exact.read(name))
