"""Quantised GGUF files as quantised weights: repacked exactly, with native kernels and without, on every backend."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType
from gguf.quants import dequantize
from gguf_blocks import EXPONENTS, random_blocks

from modelhub.core import kernels
from modelhub.core.backends import get_backend
from modelhub.core.quantized import tiles_of
from modelhub.model.quantizing import _NATIVE, EXACT, repack

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
