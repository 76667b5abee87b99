"""What the formats of quantised folders share: what they are told by, and the modules that they find."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelhub.errors import CheckpointError, ConfigError
from modelhub.hub.checkpoint import TensorInfo, empty, shown

KEY = "quantization_config"  # in config.json
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
SCALES = ("float32", "float16", "bfloat16", "float8_e8m0fnu")
_ROWS = 256  # dequantised at a time

Read = Callable[[str], np.ndarray]  # a tensor of the file as it is stored


@dataclass(frozen=True)
class Codes:
    """A matrix (N, K) of integers: weight[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], g = groups[k].

    codes: int16 (N, K), of `bits` bits, from `lowest` on. scales: float32 (N, G). zeros: int16 (N, G), or None for
    none. groups: int32 (K,).
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    groups: np.ndarray
    bits: int
    lowest: int

    @property
    def group_size(self) -> int | None:
        """How many columns in a row have one scale; None if a group's columns are not beside each other."""
        count, columns = self.scales.shape[1], len(self.groups)
        if columns % count:
            return None
        size = columns // count
        return size if np.array_equal(self.groups, np.arange(columns) // size) else None

    def weight(self, dtype: str) -> np.ndarray:
        """In float32, rounded to dtype."""
        return _scaled(self.codes, self.zeros, self.scales, self.groups, dtype)


class Module(ABC):
    """A quantised module. kind: what the tensor's dtype is called. hidden: the names of its other tensors."""

    shape: tuple[int, ...]
    kind: str
    hidden: tuple[str, ...]

    @abstractmethod
    def weight(self, read: Read, dtype: str) -> np.ndarray: ...

    def codes(self, read: Read) -> Codes | None:
        """None where values are no multiples of a scale."""
        return None


@dataclass
class Folder:
    """What a format is told by, with checks that say what was found."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    raw: Read  # for what is small

    def one_of(self, key: str, allowed: Iterable[Any], lost: str, config: Mapping[str, Any] | None = None) -> Any:
        """config[key], or a ConfigError for another value than the allowed ones; None, where it is not there, is
        one of them."""
        value = (self.config if config is None else config).get(key)
        value = value.lower() if isinstance(value, str) else value
        if value is not None and not any(type(value) is type(x) and value == x for x in allowed):
            raise ConfigError(
                f"{self.path}: {KEY} has {key}={shown(value)}; modelhub reads {', '.join(map(repr, allowed))}: {lost}"
            )
        return value

    def info(self, name: str, dtypes: Iterable[str], dims: tuple[int, ...] = (2,)) -> TensorInfo:
        """Of a tensor that has to be there."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path}: tensor {shown(name)} is not there, and {KEY} says that it should be. The folder is of "
                "several versions: download it again"
            )
        info = self.tensors[name]
        if info.dtype not in dtypes or len(info.shape) not in dims or 0 in info.shape:
            raise self.wrong(name, f"{' or '.join(dtypes)} with {' or '.join(map(str, dims))} dimensions")
        return info

    def wrong(self, name: str, expected: str) -> CheckpointError:
        info = self.tensors[name]
        return CheckpointError(
            f"{self.path}: tensor {shown(name)} is {info.dtype} of shape {info.shape}; expected {expected}, as {KEY} "
            "has it. Download the folder again, or take another version"
        )

    def order(self, name: str, columns: int, groups: int, least: int = 0) -> bool:
        """Whether there is a tensor that says which group each column is of; CheckpointError for one that cannot be."""
        if name not in self.tensors:
            return False
        fits = self.info(name, ("int32", "int64"), (1,)).shape == (columns,)
        if not fits or not least <= self.raw(name).min() <= self.raw(name).max() < groups:
            raise self.wrong(name, f"the group, of {groups}, of each of {columns} columns")
        return True

    def names(self, module: str, *ends: str) -> tuple[str, ...]:
        """Those of the tensors that are there."""
        return tuple(name for end in ends if (name := f"{module}.{end}") in self.tensors)

    def ending(self, end: str) -> list[str]:
        """The names of the modules that have a tensor called that."""
        return [name.removesuffix(f".{end}") for name in self.tensors if name.endswith(f".{end}")]


def unpacked(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int32 (R, W) -> uint8 (R, count): in each row the codes follow each other, from the lowest bit of a word on."""
    raw = np.ascontiguousarray(words).view(np.uint8)  # files are little-endian, as all machines that we run on
    if bits == 8:
        return raw[:, :count]
    if bits in (1, 2, 4):
        parts = np.empty((*raw.shape, 8 // bits), np.uint8)
        for i in range(8 // bits):
            parts[..., i] = raw >> (i * bits) & (1 << bits) - 1
        return parts.reshape(len(raw), -1)[:, :count]
    out = np.empty((len(raw), count), np.uint8)
    for at in range(0, len(raw), _ROWS):  # it takes a byte for each bit
        each = np.unpackbits(raw[at : at + _ROWS], axis=1, bitorder="little")[:, : count * bits]
        out[at : at + _ROWS] = each.reshape(len(each), count, bits) @ (1 << np.arange(bits)).astype(np.uint8)
    return out


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `unpacked`, for 4 and 8 bits: uint8 (R, C) -> int32 (R, ceil(C * bits / 32))."""
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % (32 // bits))))
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return np.ascontiguousarray(codes).view(np.int32)


def _scaled(
    values: np.ndarray, zeros: np.ndarray | None, scales: np.ndarray, groups: np.ndarray, dtype: str
) -> np.ndarray:
    """(values - zeros) * scales in float32, rounded to dtype. values: (N, K); zeros, scales: (N, G); groups: (K,)."""
    out = empty(values.shape, dtype)
    for at in range(0, len(out), _ROWS):
        rows = slice(at, at + _ROWS)
        part = values[rows].astype(np.float32)
        if zeros is not None:
            part -= zeros[rows].astype(np.float32)[:, groups]
        out[rows] = part * scales[rows][:, groups]
    return out


@dataclass(frozen=True)
class Grid:
    """Where the scales of a matrix are. size: rows and columns of a block."""

    shape: tuple[int, ...]
    size: tuple[int, int]

    def spread(self, x: np.ndarray) -> np.ndarray:
        """What there is one of for each block, (ceil(N / rows), ceil(K / columns)), as (N, G)."""
        x = x.reshape(-(-self.shape[0] // self.size[0]), -(-self.shape[1] // self.size[1]))
        return np.repeat(x, self.size[0], axis=0)[: self.shape[0]] if self.size[0] > 1 else x

    @property
    def groups(self) -> np.ndarray:
        return (np.arange(self.shape[1]) // self.size[1]).astype(np.int32)


def grid_of(folder: Folder, name: str, shape: tuple[int, ...], block: tuple[int, int] | None) -> Grid:
    """Of the scales called `name` of a matrix: one for all, for each row, for groups of a row, or for blocks."""
    found, (rows, columns) = folder.info(name, SCALES, (0, 1, 2)).shape, shape
    block = block and (min(block[0], rows), min(block[1], columns))
    if all(x == 1 for x in found):
        return Grid(shape, (rows, columns))
    if found == (rows,):
        return Grid(shape, (1, columns))
    if block is not None and found == (-(-rows // block[0]), -(-columns // block[1])):
        return Grid(shape, block)
    if len(found) == 2 and found[0] == rows and columns % found[1] == 0:
        return Grid(shape, (1, columns // found[1]))
    blocks = f", or for blocks of {block}" if block else ""
    raise folder.wrong(name, f"a scale for all of {shape}, for each row, for equal groups of a row{blocks}")


@dataclass(frozen=True)
class Scaled(Module):
    """Numbers that are stored one by one, int8 or float8, times their scales."""

    module: str
    shape: tuple[int, ...]
    kind: str
    hidden: tuple[str, ...]
    scale: str
    grid: Grid
    zero: str | None = None
    divisor: float = 1.0  # of the scales

    def weight(self, read: Read, dtype: str) -> np.ndarray:
        zeros = None if self.zero is None else self.grid.spread(read(self.zero))
        return _scaled(read(self.hidden[0]), zeros, self._scales(read), self.grid.groups, dtype)

    def codes(self, read: Read) -> Codes | None:
        values = read(self.hidden[0])
        if values.dtype != np.int8:
            return None
        zeros = None if self.zero is None else self.grid.spread(read(self.zero)).astype(np.int16)
        return Codes(values.astype(np.int16), self._scales(read), zeros, self.grid.groups, 8, -128)

    def _scales(self, read: Read) -> np.ndarray:
        return self.grid.spread(read(self.scale).astype(np.float32)) / np.float32(self.divisor)


class Packed(Module):
    def weight(self, read: Read, dtype: str) -> np.ndarray:
        return self.codes(read).weight(dtype)

    @abstractmethod
    def codes(self, read: Read) -> Codes: ...


def block_size(folder: Folder, key: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(x) is int and 0 < x < 1 << 31 for x in value):
        raise ConfigError(f"{folder.path}: {KEY} has {key}={shown(value)}; expected [rows, columns]")
    return value[0], value[1]


ACTIVATIONS = (
    "input_scale", "input_zero_point", "output_scale", "output_zero_point", "input_global_scale", "k_scale", "v_scale",
    "q_scale", "activation_scale",
)  # fmt: skip


def one_by_one(folder: Folder, dtypes: Iterable[str], block: tuple[int, int] | None, *scales: str) -> dict[str, Module]:
    """Of matrices of one of the dtypes, with a tensor that is called one of `scales` beside them."""
    found: dict[str, Module] = {}
    for module in folder.ending("weight"):
        info = folder.tensors[f"{module}.weight"]
        present = folder.names(module, *scales)
        if not present:
            continue
        info = folder.info(f"{module}.weight", dtypes)
        kind = "int8 with scales" if info.dtype == "int8" else "fp8 with scales"
        grid = grid_of(folder, present[0], info.shape, block)
        zero = next(iter(folder.names(module, "weight_zero_point")), None)
        if zero is not None and (folder.info(zero, ("int8",), (0, 1, 2)).shape != folder.tensors[present[0]].shape):
            raise folder.wrong(zero, f"int8 of the shape of {present[0]}")
        hidden = folder.names(module, "weight", *scales, "weight_zero_point", *ACTIVATIONS)
        found[f"{module}.weight"] = Scaled(module, info.shape, kind, hidden, present[0], grid, zero)
    return found
