"""Weights in safetensors files: one file, or a folder with an index and its shards.

Nothing here is mapped into memory: mapped pages count as resident, arrive one page fault at a time, and tie the arrays
to the file. Bytes go straight from the page cache into the array that the caller gets, or through a small scratch
buffer where the dtype changes. Everything a header says is checked against the file's size before memory is taken.

Format: https://github.com/huggingface/safetensors#format
"""

import difflib
import json
import math
import mmap
import os
import reprlib
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import ml_dtypes  # noqa: F401 (registers bfloat16 and the 8-bit floats with numpy)
import numpy as np

from modelhub.errors import CheckpointError

if TYPE_CHECKING:
    from modelhub.hub.quantized_modules import Codes

# The format allows 100 MB. No known file has a tenth of it, and JSON can take 30 times as much in memory as on disk.
MAX_HEADER_BYTES = 25_000_000
FLOAT_DTYPES = ("float32", "float16", "bfloat16")
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
SPAN = 1 << 19  # elements; a smaller span costs more to hand to a thread than it saves

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}

_THREADS = 2
_SCRATCH_BYTES = 1 << 18  # stays in the L2 cache between the read and the cast

_ALIGNMENT = 64  # JAX copies host arrays that are less aligned than this
_BLOCK_BYTES = 64 << 20
_SHARE_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor, known without reading it.

    dtype: a numpy-style name ("float32", "bfloat16", "int8", ...); in a GGUF file the ggml type ("F32", "Q4_K", ...).
    shape: outermost first, as numpy and Hugging Face write it; (out, in) for a linear layer.
    """

    dtype: str
    shape: tuple[int, ...]


class Checkpoint(ABC):
    """Named tensors in one or more files. Readers are safe to use from several threads, and close as context managers.

    tensors: name -> TensorInfo, in the file's order.
    """

    tensors: dict[str, TensorInfo]

    @abstractmethod
    def read(self, name: str, dtype: str = "float32") -> np.ndarray:
        """One tensor in a new array that the caller owns: C-contiguous, 64-byte aligned, of shape tensors[name].shape.

        dtype: "float32", "float16", "bfloat16" (ml_dtypes), or the one it is stored in; casts round to nearest even.
        Raises CheckpointError for a name or dtype that is not there, and for a file that ends early.
        """

    @property
    def quantized(self) -> Container[str]:
        """The names of tensors that are stored as codes beside their scales, in tensors of their own."""
        return ()

    def codes(self, name: str) -> "Codes | None":
        """The integers, scales and zero points of one of `quantized`, 2 bytes a weight; None where it has none, as
        fp8 and nf4."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Close the files; arrays already read stay valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SafetensorsCheckpoint(Checkpoint):
    """One .safetensors file. Raises CheckpointError when the file is missing or its header does not hold together."""

    def __init__(self, path: str | os.PathLike[str]):
        self._file = WeightFile(path)
        try:
            self.tensors, self._offsets = _parse_header(self._file)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, dtype: str = "float32") -> np.ndarray:
        info = find(self.tensors, name, self._file.path)
        target = target_dtype(name, dtype, (*FLOAT_DTYPES, info.dtype), self._file.path)
        return read_array(self._file, self._offsets[name], info.shape, np.dtype(info.dtype), target)

    def close(self) -> None:
        self._file.close()


class ShardedCheckpoint(Checkpoint):
    """The shards named by a model.safetensors.index.json; tensors that the index does not list are not shown.

    Raises CheckpointError when an entry leaves the folder, and once for all shards or tensors that are missing.
    """

    def __init__(self, index: str | os.PathLike[str]):
        self._path = Path(index)
        self._shard_of = _parse_index(self._path)
        folder = self._path.parent
        shards = sorted(set(self._shard_of.values()))
        if missing := [shard for shard in shards if not os.path.isfile(folder / shard)]:
            raise CheckpointError(
                f"{self._path} lists {len(shards)} shards and {len(missing)} of them are not there: "
                f"{', '.join(missing)}. Download the missing files."
            )
        self._shards: dict[str, SafetensorsCheckpoint] = {}
        try:
            for shard in shards:
                self._shards[shard] = SafetensorsCheckpoint(folder / shard)
            absent = [name for name, shard in self._shard_of.items() if name not in self._shards[shard].tensors]
            if absent:
                raise CheckpointError(
                    f"{self._path} lists {len(absent)} tensors that are not in the shard it names: "
                    + _listed(f"{shown(name)} in {self._shard_of[name]}" for name in absent)
                    + ". The index and the shards are of different versions: download the folder again."
                )
        except BaseException:
            self.close()
            raise
        self.tensors = {name: self._shards[shard].tensors[name] for name, shard in self._shard_of.items()}

    def read(self, name: str, dtype: str = "float32") -> np.ndarray:
        find(self.tensors, name, self._path)
        return self._shards[self._shard_of[name]].read(name, dtype)

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()


def open_folder(folder: str | os.PathLike[str]) -> Checkpoint:
    """The weights of a Hugging Face folder: model.safetensors, else model.safetensors.index.json and its shards.

    Raises CheckpointError when neither is there; pickles are refused, because opening one can run code.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").is_file():
        return SafetensorsCheckpoint(folder / "model.safetensors")
    if (folder / "model.safetensors.index.json").is_file():
        return ShardedCheckpoint(folder / "model.safetensors.index.json")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Give the folder that holds model.safetensors.")
    found = sorted(path.name for path in folder.iterdir())
    if pickles := [name for name in found if Path(name).suffix in PICKLE_SUFFIXES]:
        raise CheckpointError(
            f"{folder} holds its weights only as pickles ({_listed(pickles)}), and opening a pickle can run any code "
            "that its author put in it. Take the repository's safetensors version, or, if you trust the author, "
            "convert once with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
    raise CheckpointError(
        f"{folder} holds no weights: expected model.safetensors or model.safetensors.index.json, found "
        f"{_listed(found) or 'an empty folder'}. Give the folder that holds the weights, or the path of a .gguf file."
    )


# Memory


def nbytes(shape: Iterable[int], dtype: str | np.dtype[Any]) -> int:
    """Bytes of a tensor in a file."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def empty(shape: tuple[int, ...], dtype: str | np.dtype[Any]) -> np.ndarray:
    """Uninitialised memory, 64-byte aligned, so that JAX, TensorFlow and PyTorch adopt it without a copy.

    On Linux it asks for 2 MB pages: reading 1.07 GB takes 0.08 s where np.empty takes 0.16 s, and matrix-vector
    products gain a few per cent. Arrays under 16 MB share blocks of 64 MB, since most tensors do not fill their last
    2 MB page; a block goes back to the system when the last of its arrays does.
    """
    needed = nbytes(shape, dtype)
    memory = _share(needed) if needed < _SHARE_BYTES else _pages(needed)
    return memory[:needed].view(np.dtype(dtype)).reshape(shape)


_share_lock = threading.Lock()
_block: weakref.ref[np.ndarray] | None = None  # weak: tensors keep their block alive, this module does not
_block_used = 0


def _share(nbytes: int) -> np.ndarray:
    global _block, _block_used
    with _share_lock:
        block = _block() if _block else None
        if block is None or _block_used + nbytes > _BLOCK_BYTES:
            block, _block_used = _pages(_BLOCK_BYTES), 0
            _block = weakref.ref(block)
        start = _block_used
        _block_used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return block[start : start + nbytes]


def _pages(nbytes: int) -> np.ndarray:
    """At least nbytes of fresh memory, aligned to 64 bytes."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
        return raw[-raw.ctypes.data % _ALIGNMENT :]
    # Not malloc: the heap keeps freed pieces of up to 32 MB, and starts its arrays 16 bytes into a page.
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


# Files, for the GGUF reader too


class WeightFile:
    """A regular file, open for reading at any offset from any thread."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{self.path} is not there, or is not a file. Check the path, or download it again.")
        try:
            self.stream = open(self.path, "rb")  # noqa: SIM115 (close() is the caller's)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be opened: {error.strerror}.") from error
        self.size = os.fstat(self.stream.fileno()).st_size
        self._lock = threading.Lock()

    def read_into(self, offset: int, out: np.ndarray) -> None:
        """Fill `out`, a contiguous uint8 vector, with the bytes from `offset` on."""
        view = out.data
        while len(view):
            count = self._read_some(offset, view[: 1 << 30])  # macOS refuses 2 GB and more in one call
            if count == 0:
                raise self.damaged(f"it ended at byte {offset} while being read, and had {self.size} when opened")
            view = view[count:]
            offset += count

    def read(self, offset: int, nbytes: int) -> bytes:
        out = np.empty(nbytes, np.uint8)
        self.read_into(offset, out)
        return out.tobytes()

    def damaged(self, problem: str) -> CheckpointError:
        """The error for bytes that make no sense, with the likeliest cure."""
        head = bytearray(23)
        self._read_some(0, memoryview(head))
        if head == b"version https://git-lfs":
            return CheckpointError(f"{self.path} is a Git LFS pointer, not the weights. Run `git lfs pull`.")
        return CheckpointError(f"{self.path} is damaged: {problem}. Download it again.")

    def close(self) -> None:
        self.stream.close()

    def _read_some(self, offset: int, view: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.stream.fileno(), [view], offset)
        with self._lock:  # Windows has no read at an offset
            self.stream.seek(offset)
            return self.stream.readinto(view)


def find(tensors: dict[str, TensorInfo], name: str, path: Path) -> TensorInfo:
    """tensors[name], or a CheckpointError with the nearest names."""
    if name in tensors:
        return tensors[name]
    near = difflib.get_close_matches(name, tensors, n=3)
    hint = f"; the nearest: {', '.join(near)}" if near else ""
    raise CheckpointError(f"{path} has no tensor {shown(name)} among its {len(tensors)}{hint}.")


def target_dtype(name: str, wanted: str, allowed: tuple[str, ...], path: Path) -> np.dtype[Any]:
    """The dtype to read into, or a CheckpointError that lists the allowed ones."""
    if wanted not in allowed:
        choice = ", ".join(dict.fromkeys(allowed))
        raise CheckpointError(f"{path}: tensor {shown(name)} cannot be read as {shown(wanted)}. Ask for {choice}.")
    return np.dtype(wanted)


def read_array(
    file: WeightFile, offset: int, shape: tuple[int, ...], stored: np.dtype[Any], target: np.dtype[Any]
) -> np.ndarray:
    """The array at `offset`, of dtype `stored`, cast to `target`."""
    out = empty(shape, target)
    flat = out.reshape(-1)

    def copy(start: int, stop: int) -> None:
        file.read_into(offset + start * stored.itemsize, flat[start:stop].view(np.uint8))

    def cast(start: int, stop: int) -> None:
        scratch = np.empty(_SCRATCH_BYTES // stored.itemsize, stored)
        for at in range(start, stop, scratch.size):
            part = scratch[: stop - at]
            file.read_into(offset + at * stored.itemsize, part.view(np.uint8))
            flat[at : at + part.size] = part

    in_spans(copy if stored == target else cast, flat.size, SPAN)
    return out


def in_spans(work: Callable[[int, int], None], size: int, least: int) -> None:
    """work(start, stop) over all of range(size), on two threads where each gets at least `least`.

    The threads live for one call: a pool that outlived it would be broken in a forked data-loading worker.
    """
    count = max(1, min(_THREADS, size // least))
    bounds = [size * i // count for i in range(count + 1)]
    if count == 1:
        return work(0, size)
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, bounds, bounds[1:]))


def check_ranges(file: WeightFile, ranges: Iterable[tuple[int, int, str]]) -> None:
    """Raise CheckpointError where two tensors' (begin, end, name) overlap: a small file would fill a large memory."""
    last_end, last_name = 0, ""
    for begin, end, name in sorted(ranges):
        if begin < last_end:
            raise file.damaged(f"tensors {shown(last_name)} and {shown(name)} overlap at byte {begin} of the data")
        last_end, last_name = end, name


def shown(value: object) -> str:
    """repr, cut short: a hostile name can be megabytes long."""
    return _short.repr(value)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 160


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


# Headers


def _parse_header(file: WeightFile) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """name -> info, and name -> offset in the file."""
    if file.size < 8:
        raise file.damaged(f"expected 8 bytes of header length, found {file.size} bytes in all")
    length = int.from_bytes(file.read(0, 8), "little")
    most = min(file.size - 8, MAX_HEADER_BYTES)
    if length > most:
        raise file.damaged(f"expected a header of at most {most} bytes, found a header length of {length}")
    data_start, data_size = 8 + length, file.size - 8 - length

    tensors: dict[str, TensorInfo] = {}
    ranges: dict[str, tuple[int, int]] = {}
    for name, entry in _parse_object(file, file.read(8, length), "header").items():
        if name == "__metadata__":
            continue
        field = f"tensor {shown(name)}"
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise file.damaged(f"{field}: expected dtype, shape and data_offsets, found {shown(entry)}")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise CheckpointError(f"{file.path}: {field} has dtype {shown(code)}; modelhub reads {', '.join(DTYPES)}.")
        if not _are_sizes(shape) or len(shape) > 32:
            raise file.damaged(f"{field}: expected a shape of at most 32 sizes, found {shown(shape)}")
        if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_size:
            raise file.damaged(f"{field}: expected data_offsets within {data_size} bytes, found {shown(offsets)}")
        begin, end = offsets
        size = nbytes(shape, DTYPES[code])
        # numpy multiplies the sizes other than 0 into 63 bits even where the array is empty
        if size != end - begin or math.prod(size or 1 for size in shape) >= 1 << 59:
            raise file.damaged(f"{field}: {code} of shape {shown(shape)} is {size} bytes, found {end - begin}")
        tensors[name] = TensorInfo(DTYPES[code], tuple(shape))
        ranges[name] = begin, end
    check_ranges(file, ((begin, end, name) for name, (begin, end) in ranges.items()))
    held = sum(end - begin for begin, end in ranges.values())
    if held != data_size:  # the format allows no holes and nothing after the last tensor
        raise file.damaged(f"expected {held} bytes of tensors after the header, found {data_size}")
    return tensors, {name: data_start + begin for name, (begin, _) in ranges.items()}


def _parse_index(path: Path) -> dict[str, str]:
    """tensor name -> shard, relative to the index's folder."""
    with closing(WeightFile(path)) as file:
        if file.size > MAX_HEADER_BYTES:
            raise file.damaged(f"expected an index of at most {MAX_HEADER_BYTES} bytes, found {file.size}")
        shards = _parse_object(file, file.read(0, file.size), "index").get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise file.damaged(f"expected a weight_map of tensor names and files, found {shown(shards)}")
    for name, shard in shards.items():
        # Only the text is judged: the Hugging Face cache itself links files to ../../blobs.
        if not isinstance(shard, str) or not _stays_inside(shard):
            raise CheckpointError(
                f"{path}: tensor {shown(name)} is said to be in {shown(shard)}; expected a .safetensors file inside "
                "the folder. Do not use this checkpoint unless you know who made it."
            )
    return shards


def _parse_object(file: WeightFile, raw: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise file.damaged(f"the {what} names {shown(name)} twice")
            found[name] = value
        return found

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise file.damaged(f"the {what} is not JSON ({shown(str(error))})") from error
    if not isinstance(parsed, dict):
        raise file.damaged(f"expected a JSON object as {what}, found {shown(parsed)}")
    return parsed


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _stays_inside(entry: str) -> bool:
    posix, windows = PurePosixPath(entry), PureWindowsPath(entry)
    anchored = posix.is_absolute() or windows.anchor
    return entry.endswith(".safetensors") and not anchored and ".." not in windows.parts and "\0" not in entry
