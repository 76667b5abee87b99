"""Quantised weights in Hugging Face folders: what config.json's quantization_config says of the safetensors beside it.

| quant_method | weights | source of the layout |
|---|---|---|
| compressed-tensors | pack-quantized, int-quantized, naive-quantized, float-quantized (fp8) | compressed-tensors |
| awq | 4 bits, version gemm | AutoAWQ's WQLinear_GEMM |
| gptq | 2, 3, 4 and 8 bits, checkpoint_format gptq and gptq_v2, any order of columns (desc_act) | GPTQModel |
| fp8 | float8 with a scale for each block, row or matrix | transformers' FineGrainedFP8Config, DeepSeek-V3 |
| bitsandbytes | int8 with a scale for each row; nf4, fp4, double quantisation | bitsandbytes' QuantState |

A quantised module is several tensors there and one here, MODULE.weight, whole and in float32 or what is asked for.
What a model does with its activations or its cache when it runs elsewhere (input_activations, activation_scheme,
kv_cache_scheme) changes no weight and is not done here.
"""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from modelhub.errors import CheckpointError, ConfigError
from modelhub.hub.checkpoint import DTYPES, Checkpoint, TensorInfo, empty, find, open_folder, shown

KEY = "quantization_config"  # in config.json
METHODS = ("compressed-tensors", "awq", "gptq", "fp8", "bitsandbytes")
_CODES = ("int8", "uint8", "int32", "uint32")  # mean nothing without what is beside them
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
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


class _Module(ABC):
    """A quantised module. kind: what the tensor's dtype is called. hidden: the names of its other tensors."""

    shape: tuple[int, ...]
    kind: str
    hidden: tuple[str, ...]

    @abstractmethod
    def weight(self, read: Read, dtype: str) -> np.ndarray: ...

    def codes(self, read: Read) -> Codes | None:
        """None where values are no multiples of a scale."""
        return None


class QuantizedFolder(Checkpoint):
    """The weights of a folder whose config.json has a quantization_config.

    tensors: as those of other checkpoints; the dtype of a quantised matrix is its format's name, such as "gptq 4 bits".

    same: {name: another}, tensors that are one: what is read is the second, which is quantised, under the first's name.

    Raises ConfigError for a config that cannot be read exactly, naming the key; CheckpointError for tensors that are
    not what the config says.
    """

    def __init__(self, folder: Path, config: Any, same: Mapping[str, str] = MappingProxyType({})):
        self._where = folder
        method = check_config(config, folder)
        self._files = open_folder(folder)
        try:
            self._modules = _PARSERS[method](_Folder(folder, config, self._files.tensors, self._raw))
            for name, other in same.items():
                if other not in self._modules:
                    raise CheckpointError(f"{folder}: {KEY} says that {other} is quantised, and no file has it so")
                module = self._modules.pop(other)
                self._modules[name] = dataclasses.replace(module, hidden=(*module.hidden, name))  # type: ignore[type-var]
            self.tensors = self._shown()
        except BaseException:
            self._files.close()
            raise

    def _shown(self) -> dict[str, TensorInfo]:
        hidden = {name for module in self._modules.values() for name in module.hidden}
        first = {next(iter(module.hidden)): weight for weight, module in self._modules.items()}
        found: dict[str, TensorInfo] = {}
        for name, info in self._files.tensors.items():
            if name in first:
                module = self._modules[first[name]]
                found[first[name]] = TensorInfo(module.kind, module.shape)
            elif name not in hidden:
                found[name] = info
        if odd := [name for name, info in found.items() if name.endswith(".weight") and info.dtype in _CODES]:
            raise CheckpointError(
                f"{self._where}: {shown(odd[0])} is {found[odd[0]].dtype}, and has none of the tensors that "
                f"{KEY} speaks of beside it. The folder is of several versions: download it again"
            )
        return found

    def read(self, name: str, dtype: str = "float32") -> np.ndarray:
        info = find(self.tensors, name, self._where)
        if (module := self._modules.get(name)) is None:
            return self._files.read(name, dtype)
        if dtype not in ("float32", "float16", "bfloat16"):
            raise CheckpointError(
                f"{self._where}: tensor {shown(name)} is {info.dtype} and cannot be read as {shown(dtype)}. "
                "Ask for float32, float16, bfloat16."
            )
        return module.weight(self._raw, dtype)

    @property
    def quantized(self) -> Container[str]:
        return self._modules.keys()

    def codes(self, name: str) -> Codes | None:
        module = self._modules.get(name)
        return None if module is None else module.codes(self._raw)

    def _raw(self, name: str) -> np.ndarray:
        return self._files.read(name, self._files.tensors[name].dtype)

    def close(self) -> None:
        self._files.close()


def stored_dtype(info: TensorInfo) -> str:
    """The dtype in which reading a tensor loses nothing."""
    return info.dtype if info.dtype in DTYPES.values() else "float32"


def check_config(config: Any, folder: Path) -> str:
    """The quant_method of a quantization_config; ConfigError for one that is not read."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"{folder}: {KEY} must be an object, found {shown(config)}")
    method = config.get("quant_method")
    if method is None and (config.get("load_in_8bit") or config.get("load_in_4bit")):
        method = "bitsandbytes"
    if method not in METHODS:
        raise ConfigError(
            f"{folder}: {KEY} has quant_method={shown(method)}; modelhub reads {', '.join(METHODS)}. Its weights mean "
            "nothing without that library's decoding: take the model's own floats, or a version in one of these"
        )
    return str(method)


@dataclass
class _Folder:
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


_SCALES = ("float32", "float16", "bfloat16", "float8_e8m0fnu")


# --- integers with scales ---------------------------------------------------------------------------------------------


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
class _Grid:
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


def _grid(folder: _Folder, name: str, shape: tuple[int, ...], block: tuple[int, int] | None) -> _Grid:
    """Of the scales called `name` of a matrix: one for all, for each row, for groups of a row, or for blocks."""
    found, (rows, columns) = folder.info(name, _SCALES, (0, 1, 2)).shape, shape
    block = block and (min(block[0], rows), min(block[1], columns))
    if all(x == 1 for x in found):
        return _Grid(shape, (rows, columns))
    if found == (rows,):
        return _Grid(shape, (1, columns))
    if block is not None and found == (-(-rows // block[0]), -(-columns // block[1])):
        return _Grid(shape, block)
    if len(found) == 2 and found[0] == rows and columns % found[1] == 0:
        return _Grid(shape, (1, columns // found[1]))
    blocks = f", or for blocks of {block}" if block else ""
    raise folder.wrong(name, f"a scale for all of {shape}, for each row, for equal groups of a row{blocks}")


@dataclass(frozen=True)
class _Scaled(_Module):
    """Numbers that are stored one by one, int8 or float8, times their scales."""

    module: str
    shape: tuple[int, ...]
    kind: str
    hidden: tuple[str, ...]
    scale: str
    grid: _Grid
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


class _Packed(_Module):
    def weight(self, read: Read, dtype: str) -> np.ndarray:
        return self.codes(read).weight(dtype)

    @abstractmethod
    def codes(self, read: Read) -> Codes: ...


# --- compressed-tensors -----------------------------------------------------------------------------------------------

_ONE_BY_ONE = ("int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class _PackQuantized(_Packed):
    """Codes packed along a row; zero points, where there are any, along a column; both are 2 ** (bits - 1) more."""

    module: str
    shape: tuple[int, ...]
    bits: int
    grid: _Grid
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


def _compressed_tensors(folder: _Folder) -> dict[str, _Module]:
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
            blocks.add(_block(folder, "block_structure", block))
    if len(blocks) > 1:
        raise ConfigError(f"{folder.path}: {KEY} has blocks of several sizes ({blocks}); modelhub reads one size")
    one_by_one = _one_by_one(folder, ("int8", *_FLOAT8), next(iter(blocks), None), "weight_scale")
    return _pack_quantized(folder, told) | one_by_one


def _block(folder: _Folder, key: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(x) is int and 0 < x < 1 << 31 for x in value):
        raise ConfigError(f"{folder.path}: {KEY} has {key}={shown(value)}; expected [rows, columns]")
    return value[0], value[1]


def _pack_quantized(folder: _Folder, told: set[Any]) -> dict[str, _Module]:
    """told: how many bits the config has codes of; some sizes leave more than one possibility."""
    found: dict[str, _Module] = {}
    for module in folder.ending("weight_packed"):
        name = f"{module}.weight_packed"
        rows, words = folder.info(name, ("int32",)).shape
        folder.info(f"{module}.weight_shape", ("int64", "int32"), (1,))
        shape = tuple(map(int, folder.raw(f"{module}.weight_shape")))
        fits = [b for b in range(1, 9) if len(shape) == 2 and shape[0] == rows and -(-shape[1] * b // 32) == words]
        bits = next((b for b in fits if b in told), fits[0] if len(fits) == 1 else 0)
        if not bits or min(shape) < 1:
            raise folder.wrong(name, f"what {shape}, in {module}.weight_shape, takes with 1 to 8 bits")
        grid = _grid(folder, f"{module}.weight_scale", shape, None)
        if (zero := f"{module}.weight_zero_point") in folder.tensors:
            info, (down, across) = folder.info(zero, ("int32", "int8"), (0, 1, 2)), grid.size
            expected = folder.tensors[f"{module}.weight_scale"].shape
            if info.dtype == "int32":
                expected = (-(-rows * bits // 32), -(-shape[1] // across))
            if info.shape != expected or (info.dtype == "int32" and down != 1):
                raise folder.wrong(zero, f"{info.dtype} of shape {expected}, for scales of rows or of groups")
        folder.order(f"{module}.weight_g_idx", shape[1], -(-shape[1] // grid.size[1]), least=-1)
        ends = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", *_ACTIVATIONS)
        found[f"{module}.weight"] = _PackQuantized(module, shape, bits, grid, folder.names(module, *ends))
    return found


_ACTIVATIONS = (
    "input_scale", "input_zero_point", "output_scale", "output_zero_point", "input_global_scale", "k_scale", "v_scale",
    "q_scale", "activation_scale",
)  # fmt: skip


def _one_by_one(
    folder: _Folder, dtypes: Iterable[str], block: tuple[int, int] | None, *scales: str
) -> dict[str, _Module]:
    """Of matrices of one of the dtypes, with a tensor that is called one of `scales` beside them."""
    found: dict[str, _Module] = {}
    for module in folder.ending("weight"):
        info = folder.tensors[f"{module}.weight"]
        present = folder.names(module, *scales)
        if not present:
            continue
        info = folder.info(f"{module}.weight", dtypes)
        kind = "int8 with scales" if info.dtype == "int8" else "fp8 with scales"
        grid = _grid(folder, present[0], info.shape, block)
        zero = next(iter(folder.names(module, "weight_zero_point")), None)
        if zero is not None and (folder.info(zero, ("int8",), (0, 1, 2)).shape != folder.tensors[present[0]].shape):
            raise folder.wrong(zero, f"int8 of the shape of {present[0]}")
        hidden = folder.names(module, "weight", *scales, "weight_zero_point", *_ACTIVATIONS)
        found[f"{module}.weight"] = _Scaled(module, info.shape, kind, hidden, present[0], grid, zero)
    return found


# --- AWQ and GPTQ: transposed, a scale and a zero point for each group of rows ----------------------------------------

# Which of 8 columns is in which 4 bits of a word, from the lowest on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class _Awq(_Packed):
    module: str
    shape: tuple[int, ...]
    size: int
    hidden: tuple[str, ...]
    kind: str = "awq 4 bits"

    def codes(self, read: Read) -> Codes:
        codes, zeros = (self._ordered(read(f"{self.module}.{name}")) for name in ("qweight", "qzeros"))
        scales = np.ascontiguousarray(read(f"{self.module}.scales").T.astype(np.float32))
        return Codes(codes, scales, zeros, _Grid(self.shape, (1, self.size)).groups, 4, 0)

    def _ordered(self, words: np.ndarray) -> np.ndarray:
        x = unpacked(words, 4, self.shape[0]).reshape(len(words), -1, 8)
        return np.ascontiguousarray(x[..., np.argsort(_AWQ_ORDER)].reshape(len(words), -1).T.astype(np.int16))


def _awq(folder: _Folder) -> dict[str, _Module]:
    lost = "the codes are in another order"
    for key in ("version", "checkpoint_format", "format"):
        folder.one_of(key, ("gemm",), lost)
    folder.one_of("backend", ("autoawq", "auto"), lost)
    for key in ("bits", "w_bit"):
        folder.one_of(key, (4,), "codes of another size")
    folder.one_of("zero_point", (True,), "the zero points mean something else")
    found: dict[str, _Module] = {}
    for module in folder.ending("qweight"):
        columns, words = folder.info(name := f"{module}.qweight", ("int32",)).shape
        groups = folder.info(f"{module}.qzeros", ("int32",)).shape[0]
        scales = folder.info(f"{module}.scales", _SCALES).shape
        if scales != (groups, 8 * words) or folder.tensors[f"{module}.qzeros"].shape[1] != words or columns % groups:
            raise folder.wrong(name, f"8 columns in a word, and scales {scales} and zero points of the same columns")
        size = columns // groups
        for key in ("group_size", "q_group_size"):
            folder.one_of(key, (size, *([-1] if groups == 1 else [])), f"{module} has groups of {size}")
        hidden = folder.names(module, "qweight", "qzeros", "scales")
        found[f"{module}.weight"] = _Awq(module, (8 * words, columns), size, hidden)
    return found


@dataclass(frozen=True)
class _Gptq(_Packed):
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
        groups = read(order) if order in self.hidden else _Grid(self.shape, (1, self.size)).groups
        return Codes(codes, scales, zeros, groups, self.bits, 0)


def _gptq(folder: _Folder) -> dict[str, _Module]:
    lost = "the codes are in another order"
    formats = [folder.one_of(key, ("gptq", "gptq_v2"), lost) for key in ("checkpoint_format", "format")]
    folder.one_of("is_marlin_format", (False,), lost)
    folder.one_of("pack_dtype", ("int32",), lost)
    folder.one_of("bits", (2, 3, 4, 8), "codes of another size")
    found: dict[str, _Module] = {}
    for module in folder.ending("qweight"):
        words, rows = folder.info(name := f"{module}.qweight", ("int32",)).shape
        groups, across = folder.info(zeros := f"{module}.qzeros", ("int32",)).shape
        bits = next((b for b in (2, 3, 4, 8) if rows * b == across * 32), 0)
        if not bits or words * 32 % bits:
            raise folder.wrong(zeros, f"codes of 2, 3, 4 or 8 bits for {rows} columns")
        if not folder.config.get("dynamic"):  # which gives single modules other bits
            folder.one_of("bits", (bits,), f"{module} has {bits} bits")
        columns = words * 32 // bits
        if folder.info(f"{module}.scales", _SCALES).shape != (groups, rows):
            raise folder.wrong(f"{module}.scales", f"shape {(groups, rows)}")
        told = folder.config.get("group_size")
        size = told if type(told) is int and told > 0 else -(-columns // groups)
        if not folder.order(f"{module}.g_idx", columns, groups) and -(-columns // size) != groups:
            raise folder.wrong(zeros, f"zero points of groups of {size} of {columns} columns")
        hidden = folder.names(module, "qweight", "qzeros", "scales", "g_idx")
        found[f"{module}.weight"] = _Gptq(module, (rows, columns), bits, size, "gptq_v2" not in formats, hidden)
    return found


# --- fp8 --------------------------------------------------------------------------------------------------------------


def _fp8(folder: _Folder) -> dict[str, _Module]:
    folder.one_of("fmt", ("e4m3", "float8_e4m3fn", "e5m2"), "other numbers of 8 bits")
    folder.one_of("activation_scheme", ("dynamic", "static"), "other numbers of 8 bits")
    block = folder.config.get("weight_block_size")
    size = (128, 128) if block is None else _block(folder, "weight_block_size", block)
    found = _one_by_one(folder, _FLOAT8, size, "weight_scale_inv", "weight_scale")
    bare = [m for m in folder.ending("weight") if folder.tensors[f"{m}.weight"].dtype in _FLOAT8]
    if missing := [m for m in bare if f"{m}.weight" not in found]:
        folder.info(f"{missing[0]}.weight_scale_inv", _SCALES)
    return found


# --- bitsandbytes -----------------------------------------------------------------------------------------------------

_STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class _FourBit(_Module):
    """Blocks of values in the order of a matrix's rows: one of 16 numbers times the block's largest.

    nested: the size of a block of these largest, which are themselves codes of 8 bits; None: they are floats.
    """

    module: str
    shape: tuple[int, ...]
    kind: str
    hidden: tuple[str, ...]
    block: int
    nested: int | None
    offset: float

    def weight(self, read: Read, dtype: str) -> np.ndarray:
        at = f"{self.module}.weight"
        largest = read(f"{at}.absmax").reshape(-1)
        if self.nested is not None:
            scales = np.repeat(read(f"{at}.nested_absmax").reshape(-1), self.nested)[: len(largest)]
            largest = read(f"{at}.nested_quant_map")[largest] * scales + np.float32(self.offset)
        numbers, bytes_ = read(f"{at}.quant_map"), read(at).reshape(-1)
        count = self.shape[0] * self.shape[1]
        out = empty(self.shape, dtype)
        flat = out.reshape(-1)
        step = self.block * (1 << 12)  # blocks have an even number of values
        for start in range(0, count, step):
            part = bytes_[start // 2 : (start + step) // 2]
            values = np.stack([numbers[part >> 4], numbers[part & 15]], axis=1).reshape(-1)[: count - start]
            scale = np.repeat(largest[start // self.block : (start + step) // self.block], self.block)
            flat[start : start + step] = values * scale[: len(values)]
        return out


def _bitsandbytes(folder: _Folder) -> dict[str, _Module]:
    found: dict[str, _Module] = {}
    for module in folder.ending("SCB"):
        info = folder.info(name := f"{module}.weight", ("int8",))
        if folder.info(f"{module}.SCB", ("float32",), (1, 2)).shape not in ((info.shape[0],), (info.shape[0], 1)):
            raise folder.wrong(name, f"a row for each number in {module}.SCB")
        if (layout := f"{module}.weight_format") in folder.tensors and folder.raw(layout).any():
            raise ConfigError(
                f"{folder.path}: {layout} is {folder.raw(layout).tolist()}; modelhub reads 0 (rows): the others are "
                "ordered for one kind of GPU. Save it again with a current bitsandbytes"
            )
        hidden = folder.names(module, "weight", "SCB", "weight_format")
        grid = _Grid(info.shape, (1, info.shape[1]))
        found[name] = _Scaled(module, info.shape, "bitsandbytes int8", hidden, f"{module}.SCB", grid, divisor=127.0)
    for kind in ("nf4", "fp4"):
        for module in folder.ending(_STATE + kind):
            found[f"{module}.weight"] = _four_bit(folder, module, kind)
    return found


def _four_bit(folder: _Folder, module: str, kind: str) -> _FourBit:
    name = f"{module}.{_STATE}{kind}"
    folder.info(name, ("uint8",), (1,))
    try:
        state = json.loads(folder.raw(name).tobytes())
        shape, block = tuple(state["shape"]), state["blocksize"]
        nested, offset = state.get("nested_blocksize"), float(state.get("nested_offset", 0.0))
        sizes = [*shape, block, *([] if nested is None else [nested])]
        sound = len(shape) == 2 and all(type(x) is int and 0 < x < 1 << 31 for x in sizes) and block % 2 == 0
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise folder.wrong(name, "JSON with the shape of a matrix and an even blocksize")
    count, at = shape[0] * shape[1], f"{module}.weight"
    block = min(block, count + count % 2)
    blocks = -(-count // block)
    nested = nested and min(nested, blocks)
    expected = {at: (("uint8",), -(-count // 2)), f"{at}.quant_map": (("float32",), 16)}
    expected[f"{at}.absmax"] = (("float32",) if nested is None else ("uint8",), blocks)
    if nested is not None:
        expected[f"{at}.nested_absmax"] = (("float32",), -(-blocks // nested))
        expected[f"{at}.nested_quant_map"] = (("float32",), 256)
    for tensor, (dtypes, numbers) in expected.items():
        if np.prod(folder.info(tensor, dtypes, (1, 2)).shape) != numbers:
            raise folder.wrong(tensor, f"{numbers} numbers")
    hidden = tuple(expected) + (name,)
    return _FourBit(module, shape, f"bitsandbytes {kind}", hidden, block, nested, offset)


_PARSERS: dict[str, Callable[[_Folder], dict[str, _Module]]] = {
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
}
