"""From arrays, and from the blocks of quantised files, to quantised weights: as a model is loaded, and in memory."""

import copy
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from modelhub.core import kernels, leaves
from modelhub.core.backends.base import Backend
from modelhub.core.lora import HEAD_WEIGHT, TABLE_WEIGHT
from modelhub.core.quantized import (
    GROUP,
    TILE,
    Plan,
    Tiles,
    bits,
    empty_tiles,
    fill,
    fits,
    in_threads,
    matrices_of,
    means,
    pack,
    tiled,
    tiles_of,
)
from modelhub.core.tree import Module, Params, bind
from modelhub.errors import CheckpointError, ConfigError
from modelhub.families.naming import KEEP, Via
from modelhub.hub import gguf
from modelhub.hub.checkpoint import Checkpoint
from modelhub.progress import bar
from modelhub.quantizing.integer_codes import held

log = logging.getLogger("modelhub")

# The schemes that hold the codes of a GGUF file's types as they are; scales and minima, where a type has them in two
# parts, are rounded to float16 (2^-11 of each).
EXACT = {
    "Q8_0": "int8", "Q5_0": "int8", "IQ4_NL": "int8", "IQ4_XS": "int8", "MXFP4": "int8", "Q4_0": "int4",
    "Q4_1": "int4m", "Q4_K": "int4m", "Q5_1": "int8m", "Q5_K": "int8m", "Q3_K": "int8h", "Q6_K": "int8h",
}  # fmt: skip
# Q2_K has a scale and a minimum for each 16 columns, which no scheme has: its values are rounded.
KEPT = EXACT | {"Q2_K": "int4m"}
# Those that kernels repack; the others are repacked in numpy.
_NATIVE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


class Quantizer:
    """Makes leaves of the tensors of a checkpoint as they are read, one at a time.

    asked: what `from_preset(quantize=...)` was given. matrices: {name: shape} of the parameters that can be quantised.
    Raises ConfigError for a scheme that does not exist, and for a pattern that means no matrix, or one whose rows are
    not whole groups of 32.
    """

    def __init__(self, asked: Any, matrices: Mapping[str, tuple[int, ...]]):
        self.plan = Plan.of(asked)
        self.rounded: dict[str, list[str]] = {}  # {what happened: names}
        self._matrices, self._tied = frozenset(matrices), HEAD_WEIGHT not in matrices
        if self.plan is None:
            return
        for pattern, scheme in self.plan.patterns:
            found = [name for name in matrices if any(means(pattern, one) for one in self._names(name))]
            if not found:
                raise ConfigError(f"quantize: {pattern!r} means no matrix of this model; there are {_kinds(matrices)}")
            odd = [name for name in found if not fits(matrices[name])]
            if odd and (pattern != "*" or len(odd) == len(found)):
                raise ConfigError(
                    f"quantize: the rows of {odd[0]} {matrices[odd[0]]} are not whole groups of 32 columns, so it "
                    f"cannot be {scheme}; leave it out, or set it to None"
                )
            for name in odd:
                self._note("stay as they are: their rows are not whole groups of 32 columns", name)

    def leaf(self, xp: Backend, name: str, weight: np.ndarray, dtype: str, importance: np.ndarray | None = None) -> Any:
        """Of an array in memory, which the caller gives up. importance: as `pack` has it."""
        if (scheme := self._scheme(name, weight.shape)) is None:
            return xp.put(weight)
        return tiles_of(xp, pack(weight, scheme, importance, name), scheme, weight.shape, dtype)

    def from_file(self, xp: Backend, name: str, checkpoint: Checkpoint, theirs: str, via: Via, dtype: str) -> Any:
        """Of a tensor in a file: read, and rounded if that is asked for; or made of its blocks as they are."""
        info = checkpoint.tensors[theirs]
        shape = via.our_shape(info.shape)
        scheme, own = self._scheme(name, shape), KEPT.get(info.dtype)
        if self._keeps(name, shape):
            scheme = own
        if scheme is not None and own is not None:
            if bits(scheme) == bits(own) == 4:
                scheme = own  # four bits of the file's own are not rounded once more; finer ones are
            if info.dtype not in EXACT or (own, scheme) not in ((own, own), ("int4", "int8")):
                self._note(f"went from {info.dtype} to {scheme}, by rounding", name)
            elif via.rows_alone:
                return _repacked(xp, checkpoint, theirs, via, scheme, shape, dtype)
        elif theirs in checkpoint.quantized:
            found, scheme = self._from_codes(xp, name, checkpoint, theirs, scheme, dtype)
            if found is not None:
                return found
        if via is KEEP and scheme is None:
            return xp.put(checkpoint.read(theirs, dtype))
        weight = via.to_ours(checkpoint.read(theirs, "float32"))
        if scheme is None:
            return xp.put(weight.astype(dtype, copy=False))
        return tiles_of(xp, pack(weight, scheme, name=name), scheme, shape, dtype)

    def _from_codes(
        self, xp: Backend, name: str, folder: Checkpoint, theirs: str, scheme: str | None, dtype: str
    ) -> tuple[Tiles | None, str | None]:  # fmt: skip
        """Of a matrix that a Hugging Face folder has quantised: a leaf, or else the scheme to round it to, if any."""
        info = folder.tensors[theirs]
        if scheme is None and not self._keeps(name, info.shape):
            return None, None
        codes = folder.codes(theirs)
        found = None if codes is None else held(codes, scheme)
        if found is None:  # of kinds that no scheme holds int8 is the nearest
            scheme = scheme or "int8"
            self._note(f"went from {info.dtype} to {scheme}, by rounding", name)
            return None, scheme
        if found.clipped:
            self._note("have codes of -128, which became -127", name)
        return tiles_of(xp, found.arrays, found.scheme, info.shape, dtype), found.scheme

    def _scheme(self, name: str, shape: tuple[int, ...]) -> str | None:
        return self.plan.scheme(*self._names(name)) if self.plan is not None and self._holds(name, shape) else None

    def _keeps(self, name: str, shape: tuple[int, ...]) -> bool:
        return self.plan is not None and self.plan.keep and self._holds(name, shape)

    def _holds(self, name: str, shape: tuple[int, ...]) -> bool:
        return name in self._matrices and fits(shape)

    def _names(self, name: str) -> tuple[str, ...]:
        """What patterns may call a parameter: the head is the table of embeddings where it has no matrix of its own."""
        return (name, HEAD_WEIGHT) if self._tied and name == TABLE_WEIGHT else (name,)

    def _note(self, what: str, name: str) -> None:
        self.rounded.setdefault(what, []).append(name)

    def tell(self, where: str) -> None:
        """Log what is not as one might think."""
        for what, names in self.rounded.items():
            log.warning("%s: %d matrices %s (%s)", where, len(names), what, _kinds(names))


def _repacked(
    xp: Backend, file: Any, theirs: str, via: Via, scheme: str, shape: tuple[int, ...], dtype: str
) -> Tiles:  # fmt: skip
    """The blocks of a GGUF file in the order of tiles."""
    kind = file.tensors[theirs].dtype
    found = repack(kind, via.to_ours(file.blocks(theirs)), scheme, shape)
    # Where one is too large for float16 the kernels put the largest float16.
    if not all(np.abs(found[name]).max() < np.finfo(np.float16).max for name in found if name != "codes"):
        raise CheckpointError(
            f"{file.path}: some scales of tensor {theirs!r} ({kind}) are too large for float16, or no numbers, so it "
            "cannot be kept as it is. Load the file with quantize=None; it is broken if its weights are not finite then"
        )
    return tiles_of(xp, found, scheme, shape, dtype)


def repack(kind: str, rows: np.ndarray, scheme: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Rows of blocks of a GGUF type, uint8 (N, bytes of a row), of a stack (E, N, ...), as the arrays of Tiles; nothing
    is rounded but scales and minima, to float16.

    scheme: EXACT[kind], or "int8" for a type that is an "int4".
    """
    found = empty_tiles(scheme, shape)
    for part, blocks in zip(matrices_of(found), rows.reshape(-1, shape[-2], rows.shape[-1]), strict=True):
        _repack_matrix(part, kind, blocks, scheme, shape[-1])
    return found


def _repack_matrix(found: Mapping[str, np.ndarray], kind: str, rows: np.ndarray, scheme: str, width: int) -> None:
    library = kernels.library()
    if library is not None and kind in _NATIVE and scheme == EXACT[kind]:

        def native(tile: int) -> None:
            part = rows[tile * TILE : (tile + 1) * TILE]
            minima = found["minima"][tile] if "minima" in found else None
            codes, scales = found["codes"][tile], found["scales"][tile]
            library.pack_gguf(gguf.NUMBERS[kind], part, rows.shape[1], len(part), width, codes, scales, minima)

        in_threads(native, len(found["codes"]))
        return

    def make(part: np.ndarray) -> dict[str, np.ndarray]:
        codes, scales, minima = gguf.parts(kind, part.reshape(-1, gguf.BLOCKS[kind][1]))
        codes = codes.view(np.int8).reshape(len(part), -1, GROUP)
        if kind == "Q8_0":
            codes = np.maximum(codes, -127)  # -128, which no writer makes: some kernels have no room for it
        with np.errstate(over="ignore"):
            scales = scales.astype(np.float16).reshape(*codes.shape[:2], -1)
            minima = minima if minima is None else minima.astype(np.float16).reshape(codes.shape[:2])
        return tiled(codes, scales, minima, scheme)

    fill(found, rows, make)


def quantized(
    xp: Backend, params: Params, scheme: Any, dtype: str, importance: Mapping[str, np.ndarray] = MappingProxyType({})
) -> Params:  # fmt: skip
    """Parameters in memory with their matrices quantised, one after the other; those that are packed stay as they are.

    scheme: "int8", "int4", or {pattern: scheme}; see Plan. dtype: of the arrays that the packed ones stand for.
    importance: see `importance_of`. Raises ConfigError for what is no scheme.
    """
    if scheme == "keep":
        raise ConfigError('quantize("keep") is for files that are quantised: give it to from_preset')
    params = dict(params)
    matrices = {name: tuple(x.shape) for name, x in params.items() if is_matrix(name, x)}
    quantizer = Quantizer(scheme, matrices)
    for name in bar(matrices, desc="quantizing", unit="tensor"):
        if not isinstance(params[name], leaves.Packed) and quantizer._scheme(name, matrices[name]):
            weight = np.array(xp.get(xp.cast(params[name], "float32")))
            params[name] = quantizer.leaf(xp, name, weight, dtype, importance.get(name))
    quantizer.tell("quantize")
    return params


def importance_of(
    backend: Backend, skeleton: Module, params: Params, calibration: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:  # fmt: skip
    """{name of a matrix: mean squares of its inputs (K,) float32}, over all tokens of the rows of ids.

    calibration: token ids (time,) of texts like those to come: of a matrix, an error in a column that gets large inputs
    from them counts more, in the square of the inputs' mean (the diagonal of GPTQ's Hessian; llama.cpp's imatrix).
    """
    names = {id(x): name for name, x in params.items()}
    sums: dict[str, np.ndarray] = {}
    count = 0

    def note(name: str, x: Any) -> None:
        values = xp.get(xp.cast(x, "float32")).reshape(-1, x.shape[-1])
        sums[name] = sums.get(name, 0) + np.square(values, dtype=np.float64).sum(0)

    class Watched(type(backend)):  # type: ignore[misc]
        def linear(self, x: Any, weight: Any, bias: Any = None) -> Any:
            if id(weight) in names:
                note(names[id(weight)], x)
            return super().linear(x, weight, bias)

        def linears(self, x: Any, layers: Any) -> list[Any]:
            return [self.linear(x, *layer) for layer in layers]

    xp = copy.copy(backend)
    xp.__class__ = Watched
    module: Any = bind(skeleton, params)
    for ids in bar(calibration, desc="calibrating", unit="text"):
        hidden = module.hidden(xp, xp.array(ids[None], "int32"))
        note(names[id(module.head_weight)], hidden)
        count += len(ids)
    return {name: (total / count).astype(np.float32) for name, total in sums.items()}


def is_matrix(name: str, leaf: Any) -> bool:
    """Whether a parameter is a weight of a Linear or a table, or a stack of experts' weights: what can be quantised."""
    return name.endswith(".weight") and len(leaf.shape) == 2 or "experts" in name.split(".") and len(leaf.shape) == 3


def _kinds(names: Any) -> str:
    kinds = dict.fromkeys(name.removesuffix(".weight").rpartition(".")[2] for name in names)
    return ", ".join(list(kinds)[:8])
