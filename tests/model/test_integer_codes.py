"""Codes of quantised folders in tiles: the same weights, to what float16 leaves of scales and minima."""

import numpy as np
import pytest

from modelhub.core.backends import get_backend
from modelhub.core.quantized import tiles_of
from modelhub.hub.quantized_modules import Codes
from modelhub.quantizing.integer_codes import held

XP = get_backend("numpy")


def codes(low, high, group, zeros=None, rows=37, columns=256, order=None, dtype=np.float16):
    rng = np.random.default_rng(0)
    groups = (np.arange(columns) // group).astype(np.int32)
    q = rng.integers(low, high + 1, (rows, columns)).astype(np.int16)
    q[0, :2] = low, high
    scales = rng.uniform(1e-3, 1e-2, (rows, columns // group)).astype(dtype).astype(np.float32)
    if zeros is not None:
        zeros = rng.integers(zeros[0], zeros[1] + 1, scales.shape).astype(np.int16)
        zeros[0, 0], zeros[-1, -1] = zeros.min(), zeros.max()
    bits = 8 if high - low > 15 else 4
    lowest = low if low >= 0 else -(1 << bits - 1)
    return Codes(q, scales, zeros, groups if order is None else groups[order], bits, lowest)


@pytest.mark.parametrize(
    "low,high,group,zeros,asked,scheme",
    [
        (-8, 7, 32, None, None, "int4"),
        (-8, 7, 128, None, "int4", "int4"),
        (-8, 7, 256, None, "int8", "int8"),
        (0, 15, 128, (8, 8), None, "int4"),
        (0, 15, 128, (0, 15), None, "int4m"),
        (0, 15, 64, (0, 15), "int4", "int4m"),
        (0, 15, 64, (0, 15), "int8", "int8"),
        (-8, 7, 32, (-8, 7), None, "int4m"),
        (0, 3, 32, (0, 3), None, "int4m"),
        (-127, 127, 32, None, None, "int8"),
        (0, 255, 32, (128, 128), None, "int8"),
        (-8, 7, 16, None, None, "int8h"),
        (0, 15, 16, (0, 15), None, "int8h"),
        (0, 127, 32, (-100, 100), None, "int8m"),
    ],
)
def test_codes_are_held(low, high, group, zeros, asked, scheme):
    given = codes(low, high, group, zeros)
    found = held(given, asked)
    assert found.scheme == scheme
    weight = tiles_of(XP, found.arrays, scheme, given.codes.shape, "float32").values(XP)
    wanted = given.weight("float32")
    at = given.codes - (0 if given.zeros is None else given.zeros[:, given.groups])
    if high - low == 255:
        assert found.clipped == (at == -128).sum() > 0
        assert np.abs(weight - wanted)[at != -128].max() == 0
    elif scheme.endswith("m"):
        minima = (given.zeros[:, given.groups] - given.lowest) * given.scales[:, given.groups]
        assert (np.abs(weight - wanted) <= 2.0**-11 * np.abs(minima) + 1e-9).all()
    else:
        np.testing.assert_array_equal(weight, wanted)


@pytest.mark.parametrize(
    "given,asked",
    [
        (codes(-8, 7, 32, order=np.random.default_rng(1).permutation(256)), None),  # columns of a group apart
        (codes(-8, 7, 8), None),
        (codes(0, 255, 32, (0, 255)), None),
        (codes(-127, 127, 32), "int4"),
        (codes(-8, 7, 16), "int4"),
    ],
)
def test_codes_that_no_scheme_holds(given, asked):
    assert held(given, asked) is None


def test_scales_beyond_float16_are_not_held():
    given = codes(-8, 7, 32)
    for factor in (1e8, 1e-6):
        assert held(Codes(given.codes, given.scales * np.float32(factor), None, given.groups, 4, -8), None) is None
    assert held(Codes(given.codes, np.zeros_like(given.scales), None, given.groups, 4, -8), None) is not None
