"""GGUF files: their metadata, and their tensors dequantised to floats.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
Blocks: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml
Results are bit-equal to gguf-py's `gguf.quants.dequantize`.
"""

import math
import os
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from modelhub.errors import CheckpointError
from modelhub.hub.checkpoint import (
    FLOAT_DTYPES,
    MAX_HEADER_BYTES,
    SPAN,
    Checkpoint,
    TensorInfo,
    WeightFile,
    check_ranges,
    empty,
    find,
    in_spans,
    read_array,
    shown,
    target_dtype,
)

# ggml_type -> name, elements in a block, bytes in a block
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
NUMBERS = {name: number for number, (name, *_) in _TYPES.items()}
BLOCKS = {name: (elements, nbytes) for name, elements, nbytes in _TYPES.values()}
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9

_MAX_NAME_BYTES = 65535
_MAX_DIMS = 4
_MAX_NESTING, _MAX_NESTED = 4, 100_000
_TILE = 1 << 17  # elements dequantised at a time: 0.5 MB of float32, within the L2 cache


class GGUFFile(Checkpoint):
    """One GGUF file, version 2 or 3, little-endian. Tensors keep their GGUF names.

    metadata: key -> int, float, bool, str, numpy array (arrays of numbers), list of str (arrays of strings) or list
        (arrays of arrays). Bytes that are not UTF-8, such as byte-level tokens stored raw, come as lone surrogates:
        text.encode("utf-8", "surrogateescape") gives the bytes of the file back.
    tensors: name -> TensorInfo with the ggml type as dtype, and the shape outermost first (ggml's own order reversed).

    Reading gives floats: block-quantised types are dequantised. Raises CheckpointError for a file that does not hold
    together, and on reading a tensor of a type that is not supported.
    """

    metadata: dict[str, Any]

    def __init__(self, path: str | os.PathLike[str]):
        self._file = WeightFile(path)
        self.path = self._file.path
        try:
            self.metadata, self.tensors, self._offsets = _parse(self._file)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, dtype: str = "float32") -> np.ndarray:
        info = find(self.tensors, name, self._file.path)
        offset = self._offsets[name]
        target = target_dtype(name, dtype, FLOAT_DTYPES, self._file.path)
        if info.dtype in _PLAIN:
            return read_array(self._file, offset, info.shape, np.dtype(_PLAIN[info.dtype]), target)
        if info.dtype not in _PARTS:
            raise CheckpointError(
                f"{self._file.path}: tensor {shown(name)} has type {info.dtype}; modelhub reads "
                f"{', '.join([*_PLAIN, *_PARTS])}. Take a file quantised to one of these."
            )
        return self._dequantised(info, offset, target)

    def blocks(self, name: str) -> np.ndarray:
        """The rows of a matrix as they are in the file: uint8 (N, bytes of a row's blocks), owned by the caller."""
        info = find(self.tensors, name, self._file.path)
        elements, nbytes = BLOCKS[info.dtype]
        out = empty((math.prod(info.shape[:-1]), info.shape[-1] // elements * nbytes), "uint8")
        offset, flat = self._offsets[name], out.reshape(-1)
        in_spans(lambda at, stop: self._file.read_into(offset + at, flat[at:stop]), flat.size, SPAN)
        return out

    def close(self) -> None:
        self._file.close()

    def _dequantised(self, info: TensorInfo, offset: int, target: np.dtype[Any]) -> np.ndarray:
        elements, nbytes = BLOCKS[info.dtype]
        out = empty(info.shape, target)
        blocks_out = out.reshape(-1, elements)
        tile = _TILE // elements

        def work(start: int, stop: int) -> None:
            raw = np.empty((tile, nbytes), np.uint8)
            scratch = np.empty((tile, elements), np.float32)
            for at in range(start, stop, tile):
                blocks = raw[: stop - at]
                self._file.read_into(offset + at * nbytes, blocks.reshape(-1))
                part = blocks_out[at : at + len(blocks)]
                if target == np.float32:
                    _dequantise(info.dtype, blocks, part)
                else:
                    _dequantise(info.dtype, blocks, scratch[: len(blocks)])
                    part[...] = scratch[: len(blocks)]

        in_spans(work, len(blocks_out), SPAN // elements)
        return out


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a .gguf file and read its metadata; CheckpointError when it does not hold together."""
    return GGUFFile(path)


# Header


class _Fields:
    """The header's fields, in order. Lengths and counts are held against the bytes left before they are believed."""

    def __init__(self, file: WeightFile):
        self._file = file
        self._stream = file.stream
        self._size = min(file.size, MAX_HEADER_BYTES)
        self.left = self._size
        self._nested = 0

    @property
    def position(self) -> int:
        return self._size - self.left

    def take(self, nbytes: int, field: str) -> bytes:
        self.expect(nbytes, field)
        self.left -= nbytes
        return self._stream.read(nbytes)

    def expect(self, nbytes: int, field: str) -> None:
        if nbytes > self.left:
            raise self._file.damaged(
                f"{field} needs {nbytes} bytes at byte {self.position}, found {self.left} (a header has at most "
                f"{MAX_HEADER_BYTES})"
            )

    def integer(self, nbytes: int, field: str) -> int:
        return int.from_bytes(self.take(nbytes, field), "little")

    def string(self, field: str) -> str:
        return self.take(self.integer(8, field), field).decode("utf-8", "surrogateescape")

    def name(self, field: str) -> str:
        length = self.integer(8, field)
        if length > _MAX_NAME_BYTES:
            raise self._file.damaged(f"{field} has {length} bytes, expected at most {_MAX_NAME_BYTES}")
        return self.take(length, field).decode("utf-8", "surrogateescape")

    def value(self, field: str) -> Any:
        kind = self.integer(4, field)
        if kind == _STRING:
            return self.string(field)
        if kind == _ARRAY:
            return self.array(field, depth=1)
        return self.numbers(kind, 1, field)[0].item()

    def array(self, field: str, depth: int) -> Any:
        if depth > _MAX_NESTING:
            raise self._file.damaged(f"{field} nests arrays more than {_MAX_NESTING} deep")
        kind, count = self.integer(4, field), self.integer(8, field)
        if kind == _STRING:
            return self.strings(count, field)
        if kind == _ARRAY:
            self.expect(12 * count, field)
            self._nested += count
            if self._nested > _MAX_NESTED:
                raise self._file.damaged(f"{field} holds more than {_MAX_NESTED} arrays in arrays")
            return [self.array(field, depth + 1) for _ in range(count)]
        return self.numbers(kind, count, field)

    def numbers(self, kind: int, count: int, field: str) -> np.ndarray:
        if kind not in _SCALARS:
            raise self._file.damaged(f"{field} has value type {kind}, expected 0 to 12")
        dtype = _SCALARS[kind]
        raw = bytearray(self.take(count * dtype.itemsize, field))  # a bytearray, so that the caller may write
        if dtype == np.bool_ and raw.strip(b"\0\1"):
            raise self._file.damaged(f"{field} holds a bool other than 0 and 1")
        return np.frombuffer(raw, dtype)

    def strings(self, count: int, field: str) -> list[str]:
        self.expect(8 * count, field)
        read, left = self._stream.read, self.left  # a vocabulary has 262144: no method calls of our own in the loop
        found: list[str] = []
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            left -= 8 + length
            if left < 0:
                raise self._file.damaged(f"{field}: string {len(found)} has {length} bytes, more than the header holds")
            found.append(read(length).decode("utf-8", "surrogateescape"))
        self.left = left
        return found


def _parse(file: WeightFile) -> tuple[dict[str, Any], dict[str, TensorInfo], dict[str, int]]:
    """The metadata, name -> info, and name -> offset in the file."""
    fields = _Fields(file)
    magic = fields.take(4, "the magic")
    if magic != b"GGUF":
        raise file.damaged(f"a GGUF file begins with b'GGUF', found {magic!r}")
    version = fields.integer(4, "the version")
    if version not in (2, 3):
        found = "big-endian" if version and version & 0xFFFF == 0 else f"version {version}"
        raise CheckpointError(
            f"{file.path}: modelhub reads GGUF versions 2 and 3, little-endian; this one is {found}. "
            "Convert the model again with a current llama.cpp."
        )
    tensor_count = fields.integer(8, "the tensor count")
    key_count = fields.integer(8, "the metadata count")
    fields.expect(13 * key_count + 32 * tensor_count, f"a header of {key_count} keys and {tensor_count} tensors")

    metadata: dict[str, Any] = {}
    for i in range(key_count):
        key = fields.name(f"metadata key {i}")
        if key in metadata:
            raise file.damaged(f"metadata key {shown(key)} is there twice")
        metadata[key] = fields.value(f"metadata {shown(key)}")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise file.damaged(f"general.alignment is {shown(alignment)}, expected a power of two")
    parts = metadata.get("split.count", 1)
    if type(parts) is not int or parts > 1:
        raise CheckpointError(
            f"{file.path} is one of {shown(parts)} parts of a split GGUF. Join them: llama-gguf-split --merge."
        )

    tensors: dict[str, TensorInfo] = {}
    ranges: dict[str, tuple[int, int]] = {}
    for i in range(tensor_count):
        name = fields.name(f"the name of tensor {i}")
        if name in tensors:
            raise file.damaged(f"tensor {shown(name)} is there twice")
        tensors[name], ranges[name] = _parse_tensor(file, fields, f"tensor {shown(name)}", alignment)
    data_start = -(-fields.position // alignment) * alignment
    for name, (_, end) in ranges.items():
        if data_start + end > file.size:
            raise file.damaged(f"tensor {shown(name)} ends at byte {data_start + end}, the file at {file.size}")
    check_ranges(file, ((begin, end, name) for name, (begin, end) in ranges.items()))
    return metadata, tensors, {name: data_start + begin for name, (begin, _) in ranges.items()}


def _parse_tensor(file: WeightFile, fields: _Fields, field: str, alignment: int) -> tuple[TensorInfo, tuple[int, int]]:
    """The info, and where the data begins and ends in the data section."""
    dim_count = fields.integer(4, f"{field}, dimension count")
    if not 1 <= dim_count <= _MAX_DIMS:
        raise file.damaged(f"{field} has {dim_count} dimensions, expected 1 to {_MAX_DIMS}")
    dims = struct.unpack(f"<{dim_count}Q", fields.take(8 * dim_count, f"{field}, dimensions"))
    kind = fields.integer(4, f"{field}, type")
    offset = fields.integer(8, f"{field}, offset")
    if kind not in _TYPES:
        raise CheckpointError(
            f"{file.path}: {field} has ggml type {kind}, which modelhub does not know; it reads "
            f"{', '.join([*_PLAIN, *_PARTS])}. Take a file quantised to one of these."
        )
    name, elements, nbytes = _TYPES[kind]
    if 0 in dims or dims[0] % elements:
        raise file.damaged(f"{field} has dimensions {dims}, expected none of 0 and rows of whole {name} blocks")
    if offset % alignment:
        raise file.damaged(f"{field} begins at {offset}, expected a multiple of the alignment {alignment}")
    return TensorInfo(name, dims[::-1]), (offset, offset + math.prod(dims) // elements * nbytes)


# Blocks. Each function takes blocks (N, bytes) uint8 apart: codes (N, elements) int8 or uint8, scales (N, groups)
# float32 and, of some types, minima (N, groups) float32. An element is scale * code + minimum of its group. Integers
# are put together as bytes, where a vector register holds four times as many as of floats. ggml's order of operations
# is kept, since float products and sums round at each step.

Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def parts(kind: str, blocks: np.ndarray) -> Parts:
    """Codes, scales and minima of blocks (N, bytes) of a type that is read; see the comment above.

    What is handed out may lie in `blocks`.
    """
    return _PARTS[kind](blocks)


def _dequantise(kind: str, blocks: np.ndarray, out: np.ndarray) -> None:
    """out: (N, elements) float32."""
    codes, scales, minima = _PARTS[kind](blocks)
    out[...] = codes
    groups = out.reshape(*scales.shape, -1)
    groups *= scales[..., None]
    if minima is not None:
        groups += minima[..., None]


def _half(blocks: np.ndarray) -> np.ndarray:
    """(N, 2k) bytes of float16 -> (N, k) float32."""
    return blocks.view("<f2").astype(np.float32)


def _q8_0(blocks: np.ndarray) -> Parts:
    return blocks[:, 2:].view(np.int8), _half(blocks[:, :2]), None


def _q4_0(blocks: np.ndarray) -> Parts:
    q = _nibbles(blocks[:, 2:])
    q -= 8
    return q.view(np.int8), _half(blocks[:, :2]), None


def _q4_1(blocks: np.ndarray) -> Parts:
    return _nibbles(blocks[:, 4:]), _half(blocks[:, :2]), _half(blocks[:, 2:4])


def _q5_0(blocks: np.ndarray) -> Parts:
    q = _nibbles(blocks[:, 6:])
    q |= _fifth_bits(blocks[:, 2:6])
    q -= 16
    return q.view(np.int8), _half(blocks[:, :2]), None


def _q5_1(blocks: np.ndarray) -> Parts:
    q = _nibbles(blocks[:, 8:])
    q |= _fifth_bits(blocks[:, 4:8])
    return q, _half(blocks[:, :2]), _half(blocks[:, 2:4])


def _nibbles(packed: np.ndarray, size: int = 16) -> np.ndarray:
    """(N, k) -> (N, 2k): of each `size` bytes the low halves, then the high ones."""
    lines = np.ascontiguousarray(packed).reshape(-1, size)
    q = np.empty((len(lines), 2, size), np.uint8)
    np.bitwise_and(lines, 15, out=q[:, 0])
    np.right_shift(lines, 4, out=q[:, 1])
    return q.reshape(len(packed), -1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """(N, 4) -> (N, 32): bit i belongs to element i, and is worth 16."""
    bits = np.unpackbits(packed, axis=1, bitorder="little")
    bits <<= 4
    return bits


def _spread(packed: np.ndarray, count: int, step: int, mask: int, shift: int) -> np.ndarray:
    """(N, parts, size) -> (N, parts, count, size): `mask`ed pieces of each byte, `step` bits apart from the lowest on,
    moved up by `shift`."""
    q = packed[:, :, None] >> np.arange(0, count * step, step, dtype=np.uint8)[:, None]
    q &= mask
    q <<= shift
    return q


def _q2_k(blocks: np.ndarray) -> Parts:
    q = _spread(blocks[:, 16:80].reshape(-1, 2, 32), 4, 2, 3, 0)
    d = (blocks[:, :16] & 15).astype(np.float32)
    m = (blocks[:, :16] >> 4).astype(np.float32)
    d *= _half(blocks[:, 80:82])
    m *= -_half(blocks[:, 82:])
    return q.reshape(-1, 256), d, m


def _q3_k(blocks: np.ndarray) -> Parts:
    q = _spread(blocks[:, 32:96].reshape(-1, 2, 32), 4, 2, 3, 0).reshape(-1, 256)
    q |= _spread(blocks[:, :32].reshape(-1, 1, 32), 8, 1, 1, 2).reshape(-1, 256)
    q -= 4
    scales = _nibbles(blocks[:, 96:104], 8)  # the lower four of six bits
    scales |= _spread(blocks[:, 104:108].reshape(-1, 1, 4), 4, 2, 3, 4).reshape(-1, 16)
    scales -= 32
    d = scales.view(np.int8).astype(np.float32)
    d *= _half(blocks[:, 108:])
    return q.view(np.int8), d, None


def _q4_k(blocks: np.ndarray) -> Parts:
    return _nibbles(blocks[:, 16:], 32), *_scales_of_k(blocks)


def _q5_k(blocks: np.ndarray) -> Parts:
    q = _nibbles(blocks[:, 48:], 32)
    q |= _spread(blocks[:, 16:48].reshape(-1, 1, 32), 8, 1, 1, 4).reshape(-1, 256)
    return q, *_scales_of_k(blocks)


def _scales_of_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the eight groups of a Q4_K or Q5_K block, from 6 bits each."""
    packed = blocks[:, 4:16].reshape(-1, 3, 4)
    low_d, low_m, rest = packed[:, 0], packed[:, 1], packed[:, 2]
    d = np.concatenate([low_d & 63, (rest & 15) | ((low_d >> 2) & 48)], axis=1).astype(np.float32)
    m = np.concatenate([low_m & 63, (rest >> 4) | ((low_m >> 2) & 48)], axis=1).astype(np.float32)
    d *= _half(blocks[:, :2])
    m *= -_half(blocks[:, 2:4])
    return d, m


def _q6_k(blocks: np.ndarray) -> Parts:
    q = _nibbles(blocks[:, :128], 64)
    q |= _spread(blocks[:, 128:192].reshape(-1, 2, 32), 4, 2, 3, 4).reshape(-1, 256)
    q -= 32
    d = blocks[:, 192:208].view(np.int8).astype(np.float32)
    d *= _half(blocks[:, 208:])
    return q.view(np.int8), d, None


_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # halves


def _iq4_nl(blocks: np.ndarray) -> Parts:
    return _IQ4.take(_nibbles(blocks[:, 2:])), _half(blocks[:, :2]), None


def _iq4_xs(blocks: np.ndarray) -> Parts:
    scales = _spread(blocks[:, 2:4].reshape(-1, 2, 1), 4, 2, 3, 4).reshape(-1, 8)  # the upper two of six bits
    scales |= _nibbles(blocks[:, 4:8], 1)
    scales -= 32
    d = scales.view(np.int8).astype(np.float32)
    d *= _half(blocks[:, :2])
    return _IQ4.take(_nibbles(blocks[:, 8:])), d, None


def _mxfp4(blocks: np.ndarray) -> Parts:
    return _FP4.take(_nibbles(blocks[:, 1:])), np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128), None


_PARTS: dict[str, Callable[[np.ndarray], Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
