"""Quantised GGUF files as quantised weights: repacked exactly, with native kernels and without, on every backend."""

import ctypes
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType
from gguf.quants import dequantize
from gguf_blocks import EXPONENTS, SCALE_BYTES, random_blocks
from tiny_families import SIZES, write_preset

from modelhub import CausalLM
from modelhub.conversion import convert
from modelhub.core import kernels, leaves
from modelhub.core.backends import get_backend, installed
from modelhub.core.quantized import tiles_of
from modelhub.errors import CheckpointError, ConfigError
from modelhub.families.naming import KEEP
from modelhub.hub.gguf import open_gguf
from modelhub.quantizing.quantizer import _NATIVE, EXACT, Quantizer, repack

XP = get_backend("numpy")
# Types whose scales are a product of two parts, which becomes one float16.
PRODUCTS = ("Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)


def blocks_of(kind, rows=37, width=512, **more):
    return random_blocks((rows, width), GGMLType[kind], exponents=EXPONENTS, **more)


@pytest.mark.parametrize("kind", EXACT)
def test_repacked_weights_are_what_gguf_py_reads(kind, no_kernels):
    blocks = blocks_of(kind)
    read = blocks.copy()
    if kind == "Q8_0":  # -128 is a code that no writer makes, and no kernel has: it becomes -127
        codes = read.reshape(37, -1, 34)[..., 2:]
        codes[codes == 128] = 129
    wanted = dequantize(read, GGMLType[kind])
    for scheme in {EXACT[kind], "int8" if EXACT[kind] == "int4" else EXACT[kind]}:
        arrays = repack(kind, blocks, scheme, wanted.shape)
        found = tiles_of(XP, arrays, scheme, wanted.shape, "float32").values(XP)
        if kind not in PRODUCTS:
            np.testing.assert_array_equal(found, wanted)
            continue
        minima = spread(arrays["minima"])[:37] if "minima" in arrays else 0.0
        rounding = 2.0**-11 * (np.abs(wanted - minima) + np.abs(minima)) + 128 * 2.0**-25
        assert (np.abs(found - wanted) <= 1.01 * rounding).all()


def spread(x):
    """(tiles, groups, 16) -> (rows, columns)."""
    return np.repeat(np.moveaxis(x.astype(np.float32), 2, 1).reshape(-1, x.shape[1]), 32, 1)


@pytest.mark.parametrize("kind", _NATIVE)
def test_kernels_and_numpy_repack_alike(kind, monkeypatch):
    if kernels.library() is None:
        pytest.skip(f"no native kernels: {kernels.problem()}")
    for rows in (1, 16, 37):
        blocks = blocks_of(kind, rows, seed=rows)
        native = repack(kind, blocks, EXACT[kind], (rows, 512))
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "library", lambda: None)
            plain = repack(kind, blocks, EXACT[kind], (rows, 512))
        assert native.keys() == plain.keys()
        for name, x in native.items():
            np.testing.assert_array_equal(x, plain[name], err_msg=name)
            assert x.dtype == plain[name].dtype


# Files, from the disk to logits. Llama's rows of q and k are in another order in GGUF files.


MODEL = SIZES | {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 320, "head_dim": 64, "num_attention_heads": 4,
    "num_hidden_layers": 2, "vocab_size": 509,
}  # fmt: skip
IDS = [[int(i) for i in np.random.default_rng(0).integers(4, 400, 24)]]
PATTERNS = {"*": "int4", "lm_head": "int8", "embed_tokens": None, "v_proj": "int8h"}
ASKED = {"keep": "keep", "int8": "int8", "int4": "int4", "patterns": PATTERNS}
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_preset(tmp_path_factory.mktemp("llama") / "preset", MODEL, "smollm")


@pytest.fixture(scope="module")
def files(folder):
    """The same model in several types; q4_k_m has Q4_K, Q6_K, Q5_0, Q8_0 and float32 in it."""
    return {dtype: convert(folder, folder.parent / f"{dtype}.gguf", dtype) for dtype in ("q4_k_m", "q8_0", "q4_0")}


def off(x, wanted):
    return float(np.linalg.norm(x - wanted) / np.linalg.norm(wanted))


def packed_of(lm):
    return {name: x for name, x in lm.params.items() if isinstance(x, leaves.Packed)}


def plain(lm, path):
    """The same model with the arrays that the leaves stand for."""
    found = CausalLM.from_preset(path, backend="numpy")
    found.params = {name: np.array(lm.backbone.xp.get(x), np.float32) for name, x in lm.params.items()}
    return found


def schemes(lm):
    return {name: x.scheme for name, x in packed_of(lm).items()}


@pytest.mark.parametrize("asked", ASKED)
def test_packed_models_compute_with_the_values_of_their_leaves(backend, files, asked, caplog):
    path = files["q4_k_m"]
    lm = CausalLM.from_preset(path, backend=backend.name, device="cpu", quantize=ASKED[asked])
    xp, packed = lm.backbone.xp, packed_of(lm)
    rng = np.random.default_rng(1)
    for name in (Q, "model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        x = rng.standard_normal((3, packed[name].shape[1])).astype(np.float32)
        wanted = x @ np.asarray(xp.get(packed[name]), np.float32).T
        assert off(xp.get(xp.linear(xp.put(x), packed[name])), wanted) < 1e-2
    wanted = plain(lm, path).logits(IDS)
    assert off(lm.logits(IDS), wanted) < 0.1  # 14 products, one after the other
    matrices = [x for name, x in lm.params.items() if name.endswith("proj.weight") or name == "lm_head.weight"]
    bits = {"int8": 8.5, "int8m": 9, "int8h": 9, "int4": 4.5, "int4m": 5}
    for x in matrices:
        rows = -(-x.shape[0] // 16) * 16
        assert leaves.nbytes(x) == rows * x.shape[1] * bits[x.scheme] / 8
    kept = plain(CausalLM.from_preset(path, backend="numpy", quantize="keep"), path).params
    floats = CausalLM.from_preset(path, backend="numpy").params
    assert off(kept[Q], floats[Q]) < 2.0**-10
    found, made = schemes(lm), "by rounding" in caplog.text
    if asked == "keep":
        assert set(found.values()) == {"int4m", "int8", "int8h"} and not made
        assert found[Q] == "int4m" and found["lm_head.weight"] == "int8h"
    elif asked == "patterns":
        assert "model.embed_tokens.weight" not in found and found["lm_head.weight"] == "int8"
        assert found["model.layers.0.self_attn.v_proj.weight"] == "int8h" and found[Q] == "int4m" and made
    else:
        assert set(found.values()) <= ({"int4", "int4m"} if asked == "int4" else {"int8"}) and made
    texts = lm.generate(["the cat", "a"], max_new_tokens=5)
    assert [isinstance(text, str) for text in texts] == [True, True]
    assert texts == lm.generate(["the cat", "a"], max_new_tokens=5)


def test_leaves_stay_packed_on_other_backends(files):
    lm = CausalLM.from_preset(files["q4_k_m"], backend="numpy", quantize="keep")
    before = {name: {n: np.array(x) for n, x in leaf.arrays.items()} for name, leaf in packed_of(lm).items()}
    size, wanted = sum(map(leaves.nbytes, lm.params.values())), lm.logits(IDS)
    for name in installed():
        lm.to(name, device="cpu")
        assert lm.backend == name and schemes(lm).keys() == before.keys()
        assert sum(map(leaves.nbytes, lm.params.values())) == size
        for key, leaf in packed_of(lm).items():
            for part, x in leaf.arrays.items():
                np.testing.assert_array_equal(lm.backbone.xp.get(x), before[key][part])
        assert off(lm.logits(IDS), wanted) < 1e-2


WITHOUT = """
import sys
import numpy as np
from modelhub import CausalLM
from modelhub.core import kernels
from modelhub.core.backends import installed

assert kernels.library() is None
ids = [list(range(5, 29))]
for name in installed():
    lm = CausalLM.from_preset(sys.argv[1], backend=name, device="cpu", quantize="keep")
    plain = CausalLM.from_preset(sys.argv[1], backend=name, device="cpu")
    xp, other = lm.backbone.xp, plain.backbone.xp
    plain.params = {key: other.put(np.array(xp.get(x), np.float32)) for key, x in lm.params.items()}
    found, wanted = lm.logits(ids), plain.logits(ids)
    print(name, np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
"""


def test_without_kernels_nothing_is_rounded(files):
    env = os.environ | {"MODELHUB_KERNELS": "off"}
    command = [sys.executable, "-c", WITHOUT, str(files["q4_k_m"])]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in lines] == list(installed())
    assert all(float(error) < 1e-5 for _, error in lines), lines


def test_four_bits_are_kept_in_eight(files, caplog):
    """int8 holds the codes of Q4_0: nothing is rounded, and nothing said."""
    lm = CausalLM.from_preset(files["q4_0"], backend="numpy", quantize={"q_proj": "int8"})
    floats = CausalLM.from_preset(files["q4_0"], backend="numpy")
    assert schemes(lm)[Q] == "int8" and "rounding" not in caplog.text
    np.testing.assert_array_equal(lm.backbone.xp.get(lm.params[Q]), floats.params[Q])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("int5", "quantize must be one of 'int8', 'int4', 'keep'.*got 'int5'"),
        ({"*": "q4_k_m"}, "quantize must be one of.*got .*q4_k_m"),
        ({}, "quantize is an empty dict"),
        ({"qproj": "int4"}, "'qproj' means no matrix of this model; there are .*q_proj"),
        ({"norm": "int4"}, "'norm' means no matrix of this model"),
    ],
)
def test_what_is_no_scheme_and_what_means_nothing(files, asked, message):
    with pytest.raises(ConfigError, match=message):
        CausalLM.from_preset(files["q8_0"], backend="numpy", quantize=asked)


def test_groups_that_do_not_divide(tmp_path, caplog):
    """24 columns are no whole groups: a pattern that means such a matrix is refused, "*" leaves it as it is."""
    folder = write_preset(tmp_path / "preset", MODEL | {"intermediate_size": 24}, "smollm")
    path = convert(folder, tmp_path / "a.gguf", "q8_0")
    with pytest.raises(
        ConfigError, match=r"rows of model.layers.0.mlp.down_proj.weight \(256, 24\) are not whole groups"
    ):
        CausalLM.from_preset(path, backend="numpy", quantize={"down_proj": "int8"})
    lm = CausalLM.from_preset(path, backend="numpy", quantize="int8")
    assert Q in packed_of(lm) and not any("down_proj" in name for name in packed_of(lm))
    assert "stay as they are: their rows are not whole groups of 32 columns (down_proj)" in caplog.text


def test_scales_beyond_float16_are_refused(tmp_path):
    blocks = random_blocks((64, 256), GGMLType.Q6_K)
    blocks[..., SCALE_BYTES[GGMLType.Q6_K]] = np.array([60000], np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("w", blocks, raw_dtype=GGMLType.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "a.gguf") as file, pytest.raises(CheckpointError, match=r"a.gguf: some scales of .*'w'"):
        Quantizer("keep", {"w.weight": (64, 256)}).from_file(XP, "w.weight", file, "w", KEEP, "float32")


# ggml's numbers of mixtures: what they are kept as, and what is said.
OTHERS = {"Q2_K": (10, {"int4m", "int8h"}), "Q3_K_M": (12, {"int8h", "int4m", "int8m"}), "IQ4_NL": (25, {"int8", "int8h", "int8m"}),
          "IQ4_XS": (30, {"int8", "int8h", "int8m"})}  # fmt: skip


@pytest.mark.parametrize("mixture", OTHERS)
def test_llama_cpps_other_types_are_kept_too(tmp_path, folder, mixture, caplog):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python")
    exact = convert(folder, tmp_path / "exact.gguf", "float32")
    params = llama_cpp.llama_model_quantize_default_params()
    (params.ftype, wanted), params.nthread = OTHERS[mixture], 1
    path = tmp_path / "a.gguf"
    assert llama_cpp.llama_model_quantize(bytes(exact), bytes(path), ctypes.byref(params)) == 0
    lm, floats = (CausalLM.from_preset(path, backend="numpy", quantize=asked) for asked in ("keep", None))
    assert set(schemes(lm).values()) <= wanted | {"int4", "int8"}
    rounded = "by rounding" in caplog.text
    assert rounded == (mixture == "Q2_K")
    for name, leaf in packed_of(lm).items():
        values = lm.backbone.xp.get(leaf)
        if not rounded or leaf.scheme != "int4m":
            assert off(values, floats.params[name]) < 2.0**-10, name
        else:
            assert off(values, floats.params[name]) < 0.08, name
