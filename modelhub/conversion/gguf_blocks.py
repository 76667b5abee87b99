"""Rounding to the blocks of GGUF files, by least squared error.

Blocks: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml. There the K types are rounded by an error
in which large weights count more; here all count the same.
"""

from collections.abc import Callable

import numpy as np

from modelhub.core.quantized import best_range, best_scale, in_threads, nearest_codes
from modelhub.hub.gguf import BLOCKS

_AT_ONCE = 1 << 17  # elements rounded at a time: what is made of them on the way stays within the L2 cache


def encode(kind: str, rows: np.ndarray) -> np.ndarray:
    """Rows (N, K) float32 as blocks of a type of ENCODED: uint8 (N, bytes of a row). K: whole blocks.

    Scales are float16: what is beyond 65504 may become infinite.
    """
    elements, nbytes = BLOCKS[kind]
    x = np.ascontiguousarray(rows, np.float32).reshape(-1, elements)
    out = np.empty((len(x), nbytes), np.uint8)
    step = _AT_ONCE // elements

    def work(index: int) -> None:
        part = slice(index * step, (index + 1) * step)
        with np.errstate(over="ignore", invalid="ignore"):
            out[part] = np.concatenate(ENCODED[kind](x[part]), axis=1)

    in_threads(work, -(-len(x) // step))
    return out.reshape(len(rows), -1)


# Each function gives the fields of blocks (N, elements) in their order, uint8 (N, bytes).

Fields = list[np.ndarray]


def _q4_0(x: np.ndarray) -> Fields:
    scale, q = _symmetric(x, 8)
    return [_bytes(scale), _halves(q)]


def _q5_0(x: np.ndarray) -> Fields:
    scale, q = _symmetric(x, 16)
    return [_bytes(scale), _bits(q), _halves(q & 15)]


def _q4_1(x: np.ndarray) -> Fields:
    scale, minimum, q = _with_minimum(x, 15)
    return [_bytes(scale), _bytes(minimum), _halves(q)]


def _q5_1(x: np.ndarray) -> Fields:
    scale, minimum, q = _with_minimum(x, 31)
    return [_bytes(scale), _bytes(minimum), _bits(q), _halves(q & 15)]


def _symmetric(x: np.ndarray, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales (N,) float16, and codes (N, 32) uint8, `high` more than what they mean."""
    x = np.ascontiguousarray(x.T)
    scale = best_scale(x, None, -high, high - 1).astype(np.float16)
    return scale, (nearest_codes(x, scale, -high, high - 1).T + high).astype(np.uint8)


def _with_minimum(x: np.ndarray, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = np.ascontiguousarray(x.T)
    scale, minimum = (part.astype(np.float16) for part in best_range(x, None, high))
    return scale, minimum, nearest_codes(x - minimum.astype(np.float32), scale, 0, high).T.astype(np.uint8)


def _bytes(x: np.ndarray) -> np.ndarray:
    """(N,) of any dtype -> (N, bytes)."""
    return x.view(np.uint8).reshape(len(x), -1)


def _halves(q: np.ndarray, size: int = 16) -> np.ndarray:
    """(N, k) of 4 bits -> (N, k / 2): of each 2 * size codes the first ones are the low halves, the others the high."""
    pairs = q.reshape(len(q), -1, 2, size)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(q), -1)


def _bits(q: np.ndarray) -> np.ndarray:
    """The fifth bits of codes (N, 32): (N, 4)."""
    return np.packbits(q >> 4, axis=1, bitorder="little")


def _q4_k(x: np.ndarray) -> Fields:
    head, q = _k_with_minima(x, 15)
    return [*head, _halves(q, 32)]


def _q5_k(x: np.ndarray) -> Fields:
    head, q = _k_with_minima(x, 31)
    fifth = np.packbits((q >> 4).reshape(-1, 8, 32), axis=1, bitorder="little")
    return [*head, fifth.reshape(-1, 32), _halves(q & 15, 32)]


def _k_with_minima(x: np.ndarray, high: int) -> tuple[Fields, np.ndarray]:
    """d, m and the 6-bit scales and minima of eight groups, and codes (N, 256) uint8."""
    groups = np.ascontiguousarray(x.reshape(-1, 32).T)
    scale, minimum = best_range(groups, None, high, 0.0)
    d, scales = _in_steps(scale.reshape(-1, 8), 63)
    m, minima = _in_steps(-minimum.reshape(-1, 8), 63)
    # Both were rounded: a neighbour may be better, with the minimum that is best for its codes.
    best = np.full(groups.shape[1], np.inf, np.float32)
    best_scales, best_minima, best_q = scales.reshape(-1), minima.reshape(-1), np.zeros(groups.shape, np.uint8)
    steps_d, steps_m = (np.repeat(step.astype(np.float32), 8) for step in (d, m))
    per_m = np.divide(1, steps_m, out=np.zeros_like(steps_m), where=steps_m != 0)
    for move in (0, -1, 1):
        some = np.clip(scales.reshape(-1) + move, 0, 63)
        wide = steps_d * some
        q = nearest_codes(groups + steps_m * minima.reshape(-1), wide, 0, high)
        moved = np.clip(np.rint((wide * q - groups).mean(0) * per_m), 0, 63)
        q = nearest_codes(groups + steps_m * moved, wide, 0, high)
        error = np.square(wide * q - steps_m * moved - groups).sum(0)
        better = error < best
        for kept, new in ((best, error), (best_scales, some), (best_minima, moved), (best_q, q)):
            np.copyto(kept, new, where=better, casting="unsafe")
    s, n = (part.reshape(-1, 8).astype(np.uint8) for part in (best_scales, best_minima))
    packed = [s[:, :4] | s[:, 4:] >> 4 << 6, n[:, :4] | n[:, 4:] >> 4 << 6, s[:, 4:] & 15 | (n[:, 4:] & 15) << 4]
    return [_bytes(d), _bytes(m), *packed], best_q.T.reshape(-1, 256)


def _in_steps(x: np.ndarray, high: int) -> tuple[np.ndarray, np.ndarray]:
    """A step (N,) float16 for each row of x (N, k), which takes its largest value to `high`, and x in these steps."""
    largest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)[:, 0]
    step = (largest / np.float32(high)).astype(np.float16)
    return step, nearest_codes(x.T, step, -abs(high), abs(high)).T


def _q6_k(x: np.ndarray) -> Fields:
    groups = np.ascontiguousarray(x.reshape(-1, 16).T)
    d, scales = _in_steps(best_scale(groups, None, -32, 31).reshape(-1, 16), -127)
    steps = np.repeat(d.astype(np.float32), 16)
    best = np.full(groups.shape[1], np.inf, np.float32)
    kept_scales, kept_q = scales.reshape(-1).copy(), np.zeros(groups.shape, np.int8)
    for move in (0, -1, 1):
        some = np.clip(scales.reshape(-1) + move, -127, 127)
        wide = steps * some
        q = nearest_codes(groups, wide, -32, 31)
        error = np.square(wide * q - groups).sum(0)
        better = error < best
        for kept, new in ((best, error), (kept_scales, some), (kept_q, q)):
            np.copyto(kept, new, where=better, casting="unsafe")
    codes = (kept_q.T.reshape(-1, 2, 4, 32) + 32).astype(np.uint8)  # halves of 128, in each four groups
    low, high = codes & 15, codes >> 4 << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return [
        (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128), np.bitwise_or.reduce(high, axis=2).reshape(-1, 64),
        kept_scales.reshape(-1, 16).astype(np.int8).view(np.uint8), _bytes(d),
    ]  # fmt: skip


ENCODED: dict[str, Callable[[np.ndarray], Fields]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
