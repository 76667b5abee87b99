"""Quantised weights: codes of 4 or 8 bits, a scale for each group of 32 columns, in tiles that kernels read in order.

| scheme | a weight is | bits | holds exactly |
|---|---|---|---|
| int8 | scale * code, code -127 ... 127 | 8.5 | GGUF's Q8_0 and Q5_0 |
| int8m | scale * code + minimum, code 0 ... 127 | 9 | Q5_1, Q5_K |
| int8h | scale * code, a scale for each 16 columns | 9 | Q6_K |
| int4 | scale * code, code -8 ... 7 | 4.5 | Q4_0 |
| int4m | scale * code + minimum, code 0 ... 15 | 5 | Q4_1, Q4_K |

Scales and minima are float16. With few rows of x the kernels round x to 8 bits, a scale for each 32 columns, and
multiply integers (relative error of a product 0.5% to 0.8%); with many, and in training, weights are widened by blocks.
Rounding: of the scales and minima that are tried, those with the least squared error, as in llama.cpp's ggml-quants.c.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from modelhub.core import custom, kernels
from modelhub.core.leaves import Packed, size
from modelhub.errors import ConfigError

Array = Any
TILE, GROUP = 16, 32  # rows of a tile, columns of a group
SCHEMES = tuple(kernels.SCHEMES)
_AT_ONCE = 1 << 17  # elements
ASKED = ("int8", "int4")  # what people ask for
_RANGES = {"int8": (-127, 127), "int8m": (0, 127), "int8h": (-127, 127), "int4": (-8, 7), "int4m": (0, 15)}


def bits(scheme: str) -> int:
    """Of a code."""
    return 4 if scheme.startswith("int4") else 8


def has_minima(scheme: str) -> bool:
    return scheme.endswith("m")


def scales_of_group(scheme: str) -> int:
    """How many scales a group of 32 columns has."""
    return 2 if scheme == "int8h" else 1


@dataclass(frozen=True, eq=False)
class Tiles(Packed):
    """A quantised matrix (N, K), K a multiple of 32, N rounded up to tiles of 16 rows; or a stack of them (E, N, K), as
    experts have, whose arrays have E in front: `matrix` takes one out.

    codes: uint8 (N / 16, K / 32, 512), 256 with 4 bits: [8][16 rows][4 columns] of a group; with 4 bits [4][16][4], the
        low halves columns 0 to 15, the high ones 16 to 31, and 8 more than what is meant unless there are minima.
    scales: float16 (N / 16, K / 32, 16); int8h: (N / 16, K / 32, 2, 16).
    """

    ARRAYS: ClassVar[tuple[str, ...]] = ("codes", "scales")
    joins: ClassVar[bool] = True
    codes: Array
    scales: Array
    scheme: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def parts(self) -> tuple[Array, Array, Array | None]:
        """codes, scales, and minima where there are any."""
        return self.codes, self.scales, None

    @property
    def kind(self) -> int:
        """The kernels' number of the scheme."""
        return kernels.SCHEMES[self.scheme]

    def native_parts(self, pointer: Callable[[Array | None], Any]) -> tuple[Any, ...]:
        """`kind` and `parts` as native calls take them, made once; pointer: as NativeCalls has it."""
        if (found := self.__dict__.get("_native")) is None:
            found = self.__dict__["_native"] = (self.kind, *map(pointer, self.parts))
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in self.__dict__.items() if name != "_native"}  # a copy's arrays are elsewhere

    def values(self, xp: Any) -> Array:
        if len(self.shape) == 3:
            return xp.stack([self.matrix(xp, index).values(xp) for index in range(self.shape[0])])
        return xp.cast(xp.packed_rows(self, 0, self.shape[0]), self.dtype)

    def matrix(self, xp: Any, index: Array) -> "Tiles":
        arrays = {name: xp.matrix(x, index) for name, x in self.arrays.items()}
        return replace(self, **arrays, shape=self.shape[1:])

    def rows(self, xp: Any, start: Array, size: int) -> Array:
        self._needs_one("rows")
        return xp.cast(xp.packed_rows(self, start, size), self.dtype)

    def _needs_one(self, what: str) -> None:
        if len(self.shape) != 2:
            raise ConfigError(
                f"{what} of packed weights {self.shape}, which are a stack of matrices: take one with "
                "Backend.matrix(weights, index)"
            )

    def linear(self, xp: Any, x: Array, bias: Array | None) -> Array:
        self._needs_one("a product")
        y = xp.packed_linear(x, self)
        return y if bias is None else xp.plus(y, bias)

    def embedding(self, xp: Any, ids: Array) -> Array:
        self._needs_one("rows")
        return xp.cast(xp.packed_take(self, ids), self.dtype)

    def plain_window(self, xp: Any, start: Array, size: int) -> Array:
        """As `rows`, in float32, of operations that every framework has; of the tiles that are needed alone."""
        tiles = self.codes.shape[0]
        count = min(tiles, (size + 2 * TILE - 2) // TILE)
        first = start // TILE
        first = min(first, tiles - count) if isinstance(start, int) else xp.minimum(first, tiles - count)
        part = self.with_arrays({name: xp.slice_rows(x, first, count) for name, x in self.arrays.items()})
        return xp.slice_rows(part.plain_rows(xp), start - first * TILE, size)

    def plain_take(self, xp: Any, ids: Array) -> Array:
        """As `embedding`, in float32, of operations that every framework has."""
        flat = xp.take(xp.arange(self.shape[0]), xp.reshape(ids, (-1,)))  # ids outside: as of a plain table
        part = self.with_arrays({name: xp.take(x, flat // TILE, axis=0) for name, x in self.arrays.items()})
        rows = xp.reshape(part.plain_rows(xp), (-1, TILE, self.shape[1]))
        index = xp.broadcast_to(xp.reshape(flat % TILE, (-1, 1, 1)), (xp.shape(rows)[0], 1, self.shape[1]))
        return xp.reshape(xp.take_along_axis(rows, index, 1), (*xp.shape(ids), self.shape[1]))

    def plain_rows(self, xp: Any) -> Array:
        """All rows, those that fill up the last tile too, as float32 (N, K), of operations that every framework has."""
        tiles, groups, nbytes = self.codes.shape
        if nbytes == 256:
            # Bytes of the low halves, then of the high ones: 2, tiles, groups, 4, 16, 4.
            q = xp.stack([self.codes & 15, self.codes // 16])
            q = xp.reshape(xp.cast(q, "float32"), (2, tiles, groups, 4, TILE, 4))
            q = xp.transpose(q, (1, 4, 2, 0, 3, 5))  # tiles, row, group, half, 4, 4
            q = q - 8.0 if self.scheme == "int4" else q
        else:
            q = xp.reshape(xp.cast(self.codes, "float32"), (tiles, groups, 8, TILE, 4))
            q = xp.transpose(q, (0, 3, 1, 2, 4))
            q = q - 256.0 * xp.cast(q > 127.0, "float32")  # bytes are signed
        scales = xp.cast(self.scales, "float32")
        halves = scales_of_group(self.scheme)
        scales = xp.transpose(xp.reshape(scales, (tiles, groups, halves, TILE)), (0, 3, 1, 2))
        q = xp.reshape(q, (tiles, TILE, groups, halves, GROUP // halves)) * xp.expand_dims(scales, 4)
        return xp.reshape(self._shifted(xp, q), (tiles * TILE, groups * GROUP))

    def _shifted(self, xp: Any, q: Array) -> Array:
        return q


@dataclass(frozen=True, eq=False)
class TilesWithMinima(Tiles):
    """minima: float16 (N / 16, K / 32, 16)."""

    ARRAYS: ClassVar = ("codes", "scales", "minima")
    minima: Array = None

    @property
    def parts(self) -> tuple[Array, Array, Array | None]:
        return self.codes, self.scales, self.minima

    def _shifted(self, xp: Any, q: Array) -> Array:
        minima = xp.transpose(xp.cast(self.minima, "float32"), (0, 2, 1))  # tiles, row, group
        return q + xp.expand_dims(xp.expand_dims(minima, 3), 4)


def tiles_of(xp: Any, arrays: Mapping[str, np.ndarray], scheme: str, shape: tuple[int, ...], dtype: str) -> Tiles:
    """The leaf on a backend. arrays: as `pack` returns them; the caller gives them up."""
    cls = TilesWithMinima if "minima" in arrays else Tiles
    return cls(**{name: xp.put(x) for name, x in arrays.items()}, scheme=scheme, shape=tuple(shape), dtype=dtype)


def fits(shape: tuple[int, ...]) -> bool:
    """Whether an array of that shape can be packed: a matrix whose rows are whole groups, or a stack of such."""
    return len(shape) in (2, 3) and shape[-1] % GROUP == 0


def empty_tiles(scheme: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Arrays of a packed matrix or stack, to be filled tile by tile; aligned, as frameworks want what they adopt."""
    *stack, rows, columns = shape
    groups = (*stack, -(-rows // TILE), columns // GROUP)
    scales = (*groups, 2, TILE) if scales_of_group(scheme) == 2 else (*groups, TILE)
    found = {
        "codes": _aligned((*groups, TILE * GROUP * bits(scheme) // 8), "uint8"),
        "scales": _aligned(scales, "float16"),
    }
    return found | ({"minima": _aligned((*groups, TILE), "float16")} if has_minima(scheme) else {})


def matrices_of(found: Mapping[str, np.ndarray]) -> list[Mapping[str, np.ndarray]]:
    """The arrays of each matrix of a packed stack, to be filled; of a packed matrix, they themselves."""
    if found["codes"].ndim == 3:
        return [found]
    return [{name: x[index] for name, x in found.items()} for index in range(len(found["codes"]))]


def _aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    nbytes = size(shape, dtype)
    memory = np.empty(nbytes + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + nbytes].view(dtype).reshape(shape)


def pack(
    weight: np.ndarray, scheme: str, importance: np.ndarray | None = None, name: str = "the matrix"
) -> dict[str, np.ndarray]:  # fmt: skip
    """A float32 matrix (N, K), or a stack of them (E, N, K), as the arrays of Tiles.

    importance: (K,) float32, how much an error in each column counts; None: all the same. name: for errors.
    Raises ConfigError for weights that no codes and float16 scales can mean, and for such an importance.
    """
    try:
        return _packed(weight, scheme, importance)
    except OverflowError:
        bad = np.argwhere(~np.isfinite(weight))
        layer = name.removesuffix(".weight")
        found = (
            f"there are {len(bad)} that are not finite, the first in row {bad[0][-2]}, column {bad[0][-1]}: look "
            "whether the file is damaged, or training has diverged"
            if len(bad)
            else f"they go up to {np.abs(weight).max():.3g}, which is beyond float16 scales"
        )
        raise ConfigError(
            f"{name}: its weights cannot be {scheme}: {found}. quantize={{'*': {scheme!r}, {layer!r}: None}} leaves "
            "them as they are"
        ) from None


def _packed(weight: np.ndarray, scheme: str, importance: np.ndarray | None) -> dict[str, np.ndarray]:
    weight = np.ascontiguousarray(weight, np.float32)
    found = empty_tiles(scheme, weight.shape)
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        if not (importance >= 0).all() or not np.isfinite(importance).all():
            raise ConfigError("the importance of columns must be finite and not negative: look at what it was made of")
    for part, values in zip(matrices_of(found), weight.reshape(-1, *weight.shape[-2:]), strict=True):
        _pack_matrix(part, values, scheme, importance)
    return found


def _pack_matrix(
    found: Mapping[str, np.ndarray], weight: np.ndarray, scheme: str, importance: np.ndarray | None
) -> None:  # fmt: skip
    if (library := kernels.library()) is None:
        fill(found, weight, lambda rows: tiled(*_rounded(rows, scheme, importance), scheme))
        return
    width, number = weight.shape[1], kernels.SCHEMES[scheme]

    def work(tile: int) -> None:
        rows = weight[tile * TILE : (tile + 1) * TILE]
        minima = found["minima"][tile] if "minima" in found else None
        library.pack(number, rows, len(rows), width, importance, found["codes"][tile], found["scales"][tile], minima)

    in_threads(work, len(found["codes"]))


def fill(
    found: Mapping[str, np.ndarray], rows: np.ndarray, make: Callable[[np.ndarray], Mapping[str, np.ndarray]]
) -> None:  # fmt: skip
    """Fill the arrays of a packed matrix with what make(some rows) gives for these, as `tiled` does; so many at a time
    that what is made on the way stays in the cache."""
    tiles, groups, _ = found["codes"].shape
    step = max(1, _AT_ONCE // (TILE * GROUP * groups))

    def work(index: int) -> None:
        at = slice(index * step, (index + 1) * step)
        for name, x in make(rows[at.start * TILE : at.stop * TILE]).items():
            found[name][at] = x

    in_threads(work, -(-tiles // step))


def in_threads(work: Callable[[int], None], count: int) -> None:
    """work(i) for i in 0 ... count - 1, on as many threads as products have; work lets go of the GIL."""
    threads = kernels.threads()
    if threads == 1 or count < 2 * threads:
        for i in range(count):
            work(i)
        return

    def share(first: int) -> None:
        for i in range(first, count, threads):
            work(i)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))


# --- the same in numpy: where there are no kernels, and what they are tested against ----------------------------------


def _rounded(
    weight: np.ndarray, scheme: str, importance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """codes (N, G, 32), scales (N, G, halves) and minima (N, G) of a matrix, as src/round.c rounds.

    Raises OverflowError for what these cannot mean.
    """
    if not np.isfinite(weight).all():
        raise OverflowError
    low, high = _RANGES[scheme]
    halves = scales_of_group(scheme)
    size = GROUP // halves
    # Groups on the last axis: sums over the first are of whole vectors.
    x = np.ascontiguousarray(weight.reshape(-1, size).T)
    w = None if importance is None else np.tile(importance.reshape(-1, size).T, len(weight))
    if has_minima(scheme):
        scale, minimum = map(_half, best_range(x, w, high))
        codes = nearest_codes(x - minimum.astype(np.float32), scale, low, high)
        minimum = minimum.reshape(len(weight), -1)
    else:
        scale = best_scale(x, w, low, high) if scheme == "int4" else np.abs(x).max(0) / np.float32(127)
        scale, minimum = _half(scale), None
        codes = nearest_codes(x, scale, low, high)
    codes = codes.astype(np.int8).T.reshape(len(weight), -1, GROUP)
    return codes, scale.reshape(len(weight), -1, halves), minimum


def _half(x: np.ndarray) -> np.ndarray:
    if not (np.abs(x) <= np.finfo(np.float16).max).all():
        raise OverflowError
    return x.astype(np.float16)


def nearest_codes(x: np.ndarray, scale: np.ndarray, low: int, high: int) -> np.ndarray:
    """Of values (size, N) of N groups with scales (N,), as floats; 0 where a scale is 0."""
    scale = scale.astype(np.float32)
    q = x * np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    np.rint(q, out=q)
    return np.clip(q, low, high, out=q)


def best_scale(x: np.ndarray, w: np.ndarray | None, low: int, high: int) -> np.ndarray:
    """Scales (N,) for N groups x (size, N) float32 and codes low ... high, negative ones too.

    w: (size, N), how much an error counts; None: all the same. The scale with the least squared error among some around
    the one that takes the largest value to an end of the range, each the best one for the codes that it leads to.
    """
    largest = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    best, most = np.zeros(x.shape[1], np.float32), np.full(x.shape[1], -1, np.float32)
    nothing = np.abs(largest) < 1e-30
    divisor = np.where(nothing, np.float32(1), largest)
    wx = x if w is None else w * x
    q, product = np.empty_like(x), np.empty_like(x)
    for end in (low, high):
        for step in range(-8, 9):
            np.rint(np.multiply(x, np.float32(end + 0.1 * step) / divisor, out=q), out=q)
            np.clip(q, low, high, out=q)
            with_x = np.multiply(wx, q, out=product).sum(0)
            np.multiply(q, q, out=product)
            with_q = (product if w is None else np.multiply(product, w, out=product)).sum(0)
            safe = np.where(with_q > 0, with_q, 1)
            better = (with_q > 0) & (with_x * with_x > most * with_q)
            np.copyto(most, with_x * with_x / safe, where=better)
            np.copyto(best, with_x / safe, where=better)
    return np.where(nothing, np.float32(0), best)


def best_range(
    x: np.ndarray, w: np.ndarray | None, high: int, ceiling: float = np.inf
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Scales and minima (N,) for N groups x (size, N) float32 and codes 0 ... high; minima are at most `ceiling`.

    w: (size, N), how much an error counts; None: all the same. Those with the least squared error, as in `best_scale`.
    """
    least = np.minimum(x.min(0), np.float32(ceiling))
    shifted = x - least
    span = shifted.max(0)
    flat = span < 1e-30
    divisor = np.where(flat, np.float32(1), span)
    scale, minimum, best = span / np.float32(high), least.copy(), np.full_like(span, np.inf)
    wx = x if w is None else w * x
    sum_w, sum_x = np.float32(len(x)) if w is None else w.sum(0), wx.sum(0)
    q, product = np.empty_like(x), np.empty_like(x)
    for step in range(-10, 11):
        np.rint(np.multiply(shifted, np.float32(high + 0.2 * step) / divisor, out=q), out=q)
        np.minimum(q, np.float32(high), out=q)
        sum_xq = np.multiply(wx, q, out=product).sum(0)
        sum_q = q.sum(0) if w is None else np.multiply(w, q, out=product).sum(0)
        sum_qq = np.multiply(q if w is None else product, q, out=product).sum(0)
        determinant = sum_w * sum_qq - sum_q * sum_q
        usable = (determinant > 0) & ~flat
        determinant = np.where(usable, determinant, 1)
        s, m = (sum_w * sum_xq - sum_x * sum_q) / determinant, (sum_qq * sum_x - sum_q * sum_xq) / determinant
        if (above := usable & (m > ceiling)).any():
            np.copyto(s, (sum_xq - np.float32(ceiling) * sum_q) / np.where(above, sum_qq, 1), where=above)
            np.copyto(m, np.float32(ceiling), where=above)
        q *= s
        q += m
        q -= x
        q *= q
        error = (q if w is None else np.multiply(q, w, out=q)).sum(0)
        better = usable & (error < best)
        for kept, new in ((best, error), (scale, s), (minimum, m)):
            np.copyto(kept, new, where=better)
    return np.where(flat, np.float32(0), scale), minimum


def tiled(codes: np.ndarray, scales: np.ndarray, minima: np.ndarray | None, scheme: str) -> dict[str, np.ndarray]:
    """codes (N, G, 32) int8, scales (N, G, halves) and minima (N, G) float16 in the order of Tiles."""
    rows, groups, _ = codes.shape
    missing = -rows % TILE
    codes = np.pad(codes, ((0, missing), (0, 0), (0, 0)))
    tiles = len(codes) // TILE
    if bits(scheme) == 4:
        q = (codes + (8 if scheme == "int4" else 0)).astype(np.uint8)
        q[rows:] = 0
        q = q.reshape(tiles, TILE, groups, 2, 4, 4).transpose(3, 0, 2, 4, 1, 5)  # half, tile, group, 4, row, 4
        q = q[0] | q[1] << 4
    else:
        q = codes.view(np.uint8).reshape(tiles, TILE, groups, 8, 4).transpose(0, 2, 3, 1, 4)
    scales = np.pad(scales, ((0, missing), (0, 0), (0, 0))).reshape(tiles, TILE, groups, -1).transpose(0, 2, 3, 1)
    found = {
        "codes": q.reshape(tiles, groups, -1),
        "scales": scales if scales_of_group(scheme) == 2 else scales[:, :, 0],
    }
    if minima is not None:
        found["minima"] = np.pad(minima, ((0, missing), (0, 0))).reshape(tiles, TILE, groups).transpose(0, 2, 1)
    return found


def untiled(
    arrays: Mapping[str, np.ndarray], scheme: str, rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:  # fmt: skip
    """The inverse of `tiled`: codes (N, G, 32) int8, scales (N, G, halves) and minima (N, G) float16."""
    q = arrays["codes"]
    tiles, groups = q.shape[:2]
    if bits(scheme) == 4:
        q = np.stack([q & 15, q >> 4]).reshape(2, tiles, groups, 4, TILE, 4).transpose(1, 4, 2, 0, 3, 5)
    else:
        q = q.reshape(tiles, groups, 8, TILE, 4).transpose(0, 3, 1, 2, 4)
    codes = q.reshape(tiles * TILE, groups, GROUP)[:rows].astype(np.int8)
    if scheme == "int4":
        codes -= 8
    scales = arrays["scales"].reshape(tiles, groups, -1, TILE).transpose(0, 3, 1, 2)
    scales = scales.reshape(tiles * TILE, groups, -1)[:rows]
    minima = arrays.get("minima")
    if minima is not None:
        minima = minima.transpose(0, 2, 1).reshape(tiles * TILE, groups)[:rows]
    return codes, scales, minima


# --- what is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which parameters become what. patterns: (pattern of a module's name, scheme), the last that means a name counts;
    keep: leave what a file has quantised as it is, as far as there is a scheme for it."""

    patterns: tuple[tuple[str, str], ...]
    keep: bool = False

    @classmethod
    def of(cls, asked: Any) -> "Plan | None":
        """None: floats. Raises ConfigError for what is no scheme."""
        if asked is None:
            return None
        if asked == "keep":
            return cls((), keep=True)
        if isinstance(asked, str) and "=" in asked:  # as commands and recipes have it
            asked = {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in asked.split(","))}
        patterns = asked if isinstance(asked, Mapping) else {"*": asked}
        if not patterns:
            raise ConfigError('quantize is an empty dict; {"*": "int4"} means every matrix')
        for pattern, scheme in patterns.items():
            if scheme not in (*SCHEMES, None) or not isinstance(pattern, str):
                raise ConfigError(
                    f"quantize must be one of {', '.join(map(repr, ASKED))}, 'keep' (a quantised file's own kinds), or "
                    f"{{pattern: one of them}} such as {{'*': 'int4', 'lm_head': 'int8'}}; got {asked!r}"
                )
        return cls(tuple(patterns.items()))

    def scheme(self, *names: str) -> str | None:
        """For a parameter's dotted name, or names where it has several; None: it stays as it is."""
        return next((s for pattern, s in reversed(self.patterns) if any(means(pattern, name) for name in names)), None)


def means(pattern: str, name: str) -> bool:
    """Whether a pattern, as custom.means has it, is for the layer of a parameter."""
    return custom.means(pattern, name.removesuffix(".weight"))
