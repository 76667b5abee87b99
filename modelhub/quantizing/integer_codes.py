"""Between the integer codes of quantised Hugging Face folders and the tiles of core/quantized.py: no code is rounded.

| codes of a folder | scheme |
|---|---|
| 4 bits or fewer, no zero points, or all the same in their middle | int4 |
| 4 bits or fewer, zero points | int4m: the minimum is -zero * scale |
| less zero points -127 to 127; groups of 16 columns | int8; int8h |
| 7 bits or fewer, zero points | int8m |

Scales and minima are float16, so that theirs may be off by 2^-11 of each. Groups are 16, 32, 64, 96 ... columns.
"""

from dataclasses import dataclass

import numpy as np

from modelhub.core.quantized import GROUP, TILE, bits, empty_tiles, has_minima, tiled
from modelhub.hub.quantized_modules import Codes

_AT_ONCE = 1 << 20  # codes put in order at a time
_LEAST = 2.0**-11


@dataclass(frozen=True)
class Held:
    """Arrays of Tiles. clipped: how many codes were -128, which no scheme has and kernels have no room for: they are
    -127."""

    arrays: dict[str, np.ndarray]
    scheme: str
    clipped: int


def held(codes: Codes, asked: str | None) -> Held | None:
    """The codes in the order of tiles; None if the scheme that is asked for, or, with None, any of them, cannot hold
    them as they are."""
    size = codes.group_size
    if size is None or (size % GROUP and size != GROUP // 2):
        return None
    scheme = _chosen(codes, asked, size)
    if scheme is None:
        return None
    scales = codes.scales[:, codes.groups[:: min(size, GROUP)]]
    scales = scales.reshape(*_groups(codes), -1)
    # Where all groups have one zero point, or codes are of 8 bits, it is taken off them; else it makes the minima.
    minima = None
    zeros = None if codes.zeros is None else codes.zeros[:, codes.groups[:: min(size, GROUP)]]
    if has_minima(scheme) and zeros is not None:
        minima = (codes.lowest - zeros.astype(np.float32)) * scales[..., 0]
        zeros = np.full_like(zeros, codes.lowest)
    half_scales, half_minima = _half(scales), None if minima is None else _half(minima)
    if half_scales is None or (half_minima is None and minima is not None):
        return None
    return _arranged(codes.codes, zeros, scheme, half_scales, half_minima)


def _groups(codes: Codes) -> tuple[int, int]:
    return codes.codes.shape[0], codes.codes.shape[1] // GROUP


def _chosen(codes: Codes, asked: str | None, size: int) -> str | None:
    zeros = codes.zeros
    wide = "int8h" if size < GROUP else "int8"
    possible: list[str] = []
    if size % GROUP == 0 and codes.bits <= 4:
        zero = 0 if zeros is None else int(zeros[0, 0])
        low, high = codes.lowest - zero, codes.lowest - zero + (1 << codes.bits) - 1
        symmetric = low >= -8 and high <= 7 and (zeros is None or (zeros == zero).all())
        possible.append("int4" if symmetric else "int4m")
        if asked in (None, "int4", possible[0]):  # four bits of the file's own are what "int4" means
            return possible[0]
    signed = codes.codes if zeros is None else codes.codes - zeros[:, codes.groups]
    if signed.min() >= -128 and signed.max() <= 127:
        possible.append(wide)
    if size % GROUP == 0 and zeros is not None and codes.codes.max() - codes.lowest <= 127:
        possible.append("int8m")
    if asked == "int8" and wide in possible:
        asked = wide
    scheme = next(iter(possible), None) if asked is None else asked
    return scheme if scheme in possible else None


def _half(x: np.ndarray) -> np.ndarray | None:
    """In float16; None if one of them goes beyond, or below what float16 has with all its bits."""
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    error = np.abs(half.astype(np.float32) - x)
    return half if (error <= _LEAST * np.abs(x)).all() else None


def _arranged(
    codes: np.ndarray, zeros: np.ndarray | None, scheme: str, scales: np.ndarray, minima: np.ndarray | None
) -> Held:  # fmt: skip
    """zeros: (N, K / 32) or (N, K / 16), what is taken off the codes."""
    found, clipped = empty_tiles(scheme, codes.shape), 0
    rows = TILE * max(1, _AT_ONCE // (TILE * codes.shape[1]))
    for at in range(0, len(codes), rows):
        part = codes[at : at + rows]
        if zeros is not None:
            part = part - np.repeat(zeros[at : at + rows], codes.shape[1] // zeros.shape[1], axis=1)
        if bits(scheme) == 8:
            clipped += int((part == -128).sum())
            part = np.maximum(part, -127)
        part = part.astype(np.int8).reshape(len(part), -1, GROUP)
        less = None if minima is None else minima[at : at + rows]
        for name, x in tiled(part, scales[at : at + rows], less, scheme).items():
            found[name][at // TILE : at // TILE + len(x)] = x
    return Held(found, scheme, clipped)
