"""The formats of quantised folders that have integers or float8 beside scales: compressed-tensors, AWQ, GPTQ, fp8."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelhub.errors import ConfigError
from modelhub.hub.checkpoint import shown
from modelhub.hub.quantized_modules import (
    ACTIVATIONS,
    FLOAT8,
    KEY,
    SCALES,
    Codes,
    Folder,
    Grid,
    Module,
    Packed,
    Read,
    block_size,
    grid_of,
    one_by_one,
    unpacked,
)

# --- compressed-tensors -----------------------------------------------------------------------------------------------

_ONE_BY_ONE = ("int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class _PackQuantized(Packed):
    """Codes packed along a row; zero points, where there are any, along a column; both are 2 ** (bits - 1) more."""

    module: str
    shape: tuple[int, ...]
    bits: int
    grid: Grid
    hidden: tuple[str, ...]

    @property
    def kind(self) -> str:  # type: ignore[override]
        return f"pack-quantized {self.bits} bits"

    def codes(self, read: Read) -> Codes:
        (rows, columns), middle = self.shape, np.int16(1 << self.bits - 1)
        found = unpacked(read(f"{self.module}.weight_packed"), self.bits, columns) - middle
        scales = self.grid.spread(read(f"{self.module}.weight_scale").astype(np.float32))
        zeros, groups = None, self.grid.groups
        if (name := f"{self.module}.weight_zero_point") in self.hidden:
            packs = read(name)
            if packs.dtype != np.int8:  # of one scale for all it is as it is
                packs = unpacked(packs.T, self.bits, rows).T - middle
            zeros = self.grid.spread(packs).astype(np.int16)
        if (name := f"{self.module}.weight_g_idx") in self.hidden:
            order = read(name)
            groups = groups if (order < 0).any() else order.astype(np.int32)  # -1: it was never set
        return Codes(found, scales, zeros, groups, self.bits, -int(middle))


def compressed_tensors(folder: Folder) -> dict[str, Module]:
    config, blocks, told = folder.config, set(), set()
    formats = ("pack-quantized", *_ONE_BY_ONE, "mixed-precision", "dense")
    folder.one_of("format", formats, "the weights are packed in a way that it does not know")
    for key in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        entry = config.get(key) or {}
        if (
            entry
            and not (isinstance(entry, Mapping) and entry.get("format") == "dense")
            and entry != {"config_groups": {}}
        ):
            raise ConfigError(
                f"{folder.path}: {KEY} has {key}={shown(entry)}, which modelhub does not read: without it the model "
                "would compute something else. Take a version without it"
            )
    groups = config.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise ConfigError(f"{folder.path}: {KEY} must have config_groups as an object, found {shown(groups)}")
    for group in groups.values():
        if not isinstance(group, Mapping):  # the name of a preset, and what it is for
            blocks.add((128, 128))
            continue
        folder.one_of("format", formats[:-2], "the weights are packed in a way that it does not know", group)
        weights = group.get("weights")
        if not isinstance(weights, Mapping):
            continue
        kind = folder.one_of("type", ("int", "float"), "codes of another kind", weights)
        bits = tuple(range(1, 9)) if kind != "float" else (8,)
        told.add(folder.one_of("num_bits", bits, f"codes of type {kind} with so many bits", weights))
        if (block := weights.get("block_structure")) is not None:
            blocks.add(block_size(folder, "block_structure", block))
    if len(blocks) > 1:
        raise ConfigError(f"{folder.path}: {KEY} has blocks of several sizes ({blocks}); modelhub reads one size")
    alone = one_by_one(folder, ("int8", *FLOAT8), next(iter(blocks), None), "weight_scale")
    return _pack_quantized(folder, told) | alone


def _pack_quantized(folder: Folder, told: set[Any]) -> dict[str, Module]:
    """told: how many bits the config has codes of; some sizes leave more than one possibility."""
    found: dict[str, Module] = {}
    for module in folder.ending("weight_packed"):
        name = f"{module}.weight_packed"
        rows, words = folder.info(name, ("int32",)).shape
        folder.info(f"{module}.weight_shape", ("int64", "int32"), (1,))
        shape = tuple(map(int, folder.raw(f"{module}.weight_shape")))
        fits = [b for b in range(1, 9) if len(shape) == 2 and shape[0] == rows and -(-shape[1] * b // 32) == words]
        bits = next((b for b in fits if b in told), fits[0] if len(fits) == 1 else 0)
        if not bits or min(shape) < 1:
            raise folder.wrong(name, f"what {shape}, in {module}.weight_shape, takes with 1 to 8 bits")
        grid = grid_of(folder, f"{module}.weight_scale", shape, None)
        if (zero := f"{module}.weight_zero_point") in folder.tensors:
            info, (down, across) = folder.info(zero, ("int32", "int8"), (0, 1, 2)), grid.size
            expected = folder.tensors[f"{module}.weight_scale"].shape
            if info.dtype == "int32":
                expected = (-(-rows * bits // 32), -(-shape[1] // across))
            if info.shape != expected or (info.dtype == "int32" and down != 1):
                raise folder.wrong(zero, f"{info.dtype} of shape {expected}, for scales of rows or of groups")
        folder.order(f"{module}.weight_g_idx", shape[1], -(-shape[1] // grid.size[1]), least=-1)
        ends = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", *ACTIVATIONS)
        found[f"{module}.weight"] = _PackQuantized(module, shape, bits, grid, folder.names(module, *ends))
    return found


# --- AWQ and GPTQ: transposed, a scale and a zero point for each group of rows ----------------------------------------

# Which of 8 columns is in which 4 bits of a word, from the lowest on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class _Awq(Packed):
    module: str
    shape: tuple[int, ...]
    size: int
    hidden: tuple[str, ...]
    kind: str = "awq 4 bits"

    def codes(self, read: Read) -> Codes:
        codes, zeros = (self._ordered(read(f"{self.module}.{name}")) for name in ("qweight", "qzeros"))
        scales = np.ascontiguousarray(read(f"{self.module}.scales").T.astype(np.float32))
        return Codes(codes, scales, zeros, Grid(self.shape, (1, self.size)).groups, 4, 0)

    def _ordered(self, words: np.ndarray) -> np.ndarray:
        x = unpacked(words, 4, self.shape[0]).reshape(len(words), -1, 8)
        return np.ascontiguousarray(x[..., np.argsort(_AWQ_ORDER)].reshape(len(words), -1).T.astype(np.int16))


def awq(folder: Folder) -> dict[str, Module]:
    lost = "the codes are in another order"
    for key in ("version", "checkpoint_format", "format"):
        folder.one_of(key, ("gemm",), lost)
    folder.one_of("backend", ("autoawq", "auto"), lost)
    for key in ("bits", "w_bit"):
        folder.one_of(key, (4,), "codes of another size")
    folder.one_of("zero_point", (True,), "the zero points mean something else")
    found: dict[str, Module] = {}
    for module in folder.ending("qweight"):
        columns, words = folder.info(name := f"{module}.qweight", ("int32",)).shape
        groups = folder.info(f"{module}.qzeros", ("int32",)).shape[0]
        scales = folder.info(f"{module}.scales", SCALES).shape
        if scales != (groups, 8 * words) or folder.tensors[f"{module}.qzeros"].shape[1] != words or columns % groups:
            raise folder.wrong(name, f"8 columns in a word, and scales {scales} and zero points of the same columns")
        size = columns // groups
        for key in ("group_size", "q_group_size"):
            folder.one_of(key, (size, *([-1] if groups == 1 else [])), f"{module} has groups of {size}")
        hidden = folder.names(module, "qweight", "qzeros", "scales")
        found[f"{module}.weight"] = _Awq(module, (8 * words, columns), size, hidden)
    return found


@dataclass(frozen=True)
class _Gptq(Packed):
    """one_less: whether zero points in the file are one less than what is meant."""

    module: str
    shape: tuple[int, ...]
    bits: int
    size: int
    one_less: bool
    hidden: tuple[str, ...]

    @property
    def kind(self) -> str:  # type: ignore[override]
        return f"gptq {self.bits} bits"

    def codes(self, read: Read) -> Codes:
        rows, columns = self.shape
        codes = unpacked(read(f"{self.module}.qweight").T, self.bits, columns).astype(np.int16)
        words = read(f"{self.module}.qzeros")
        if self.one_less and self.bits != 3:
            # As GPTQModel takes it off: of whole words, so that a zero point of 0 borrows from the next one.
            words = words + np.int32(sum(1 << at for at in range(0, 31, self.bits)))
        zeros = unpacked(words, self.bits, rows).T.astype(np.int16)
        if self.one_less and self.bits == 3:
            zeros = zeros + 1 & 7
        scales = np.ascontiguousarray(read(f"{self.module}.scales").T.astype(np.float32))
        order = f"{self.module}.g_idx"
        groups = read(order) if order in self.hidden else Grid(self.shape, (1, self.size)).groups
        return Codes(codes, scales, zeros, groups, self.bits, 0)


def gptq(folder: Folder) -> dict[str, Module]:
    lost = "the codes are in another order"
    formats = [folder.one_of(key, ("gptq", "gptq_v2"), lost) for key in ("checkpoint_format", "format")]
    folder.one_of("is_marlin_format", (False,), lost)
    folder.one_of("pack_dtype", ("int32",), lost)
    folder.one_of("bits", (2, 3, 4, 8), "codes of another size")
    found: dict[str, Module] = {}
    for module in folder.ending("qweight"):
        words, rows = folder.info(name := f"{module}.qweight", ("int32",)).shape
        groups, across = folder.info(zeros := f"{module}.qzeros", ("int32",)).shape
        bits = next((b for b in (2, 3, 4, 8) if rows * b == across * 32), 0)
        if not bits or words * 32 % bits:
            raise folder.wrong(zeros, f"codes of 2, 3, 4 or 8 bits for {rows} columns")
        if not folder.config.get("dynamic"):  # which gives single modules other bits
            folder.one_of("bits", (bits,), f"{module} has {bits} bits")
        columns = words * 32 // bits
        if folder.info(f"{module}.scales", SCALES).shape != (groups, rows):
            raise folder.wrong(f"{module}.scales", f"shape {(groups, rows)}")
        told = folder.config.get("group_size")
        size = told if type(told) is int and told > 0 else -(-columns // groups)
        if not folder.order(f"{module}.g_idx", columns, groups) and -(-columns // size) != groups:
            raise folder.wrong(zeros, f"zero points of groups of {size} of {columns} columns")
        hidden = folder.names(module, "qweight", "qzeros", "scales", "g_idx")
        found[f"{module}.weight"] = _Gptq(module, (rows, columns), bits, size, "gptq_v2" not in formats, hidden)
    return found


# --- fp8 --------------------------------------------------------------------------------------------------------------


def fp8(folder: Folder) -> dict[str, Module]:
    folder.one_of("fmt", ("e4m3", "float8_e4m3fn", "e5m2"), "other numbers of 8 bits")
    folder.one_of("activation_scheme", ("dynamic", "static"), "other numbers of 8 bits")
    block = folder.config.get("weight_block_size")
    size = (128, 128) if block is None else block_size(folder, "weight_block_size", block)
    found = one_by_one(folder, FLOAT8, size, "weight_scale_inv", "weight_scale")
    bare = [m for m in folder.ending("weight") if folder.tensors[f"{m}.weight"].dtype in FLOAT8]
    if missing := [m for m in bare if f"{m}.weight" not in found]:
        folder.info(f"{missing[0]}.weight_scale_inv", SCALES)
    return found
