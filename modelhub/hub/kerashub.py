"""KerasHub presets: config.json and the weights in HDF5 files, read without Keras.

Nothing that a preset names is imported or run. Of HDF5 only what Keras writes is read: datasets in the file itself,
plain or gzip. Links, external and virtual datasets can lead to other files, and other filters load a library; they are
refused before they are followed. Bytes that lie in one piece (all that Keras writes) go past the HDF5 library, into the
array that the caller gets.

Formats: `save_to_preset` of https://github.com/keras-team/keras-hub, and `save_weights` of
https://github.com/keras-team/keras (keras/src/saving/saving_lib.py)
"""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from modelhub.errors import CheckpointError
from modelhub.hub.checkpoint import (
    FLOAT_DTYPES,
    MAX_HEADER_BYTES,
    Checkpoint,
    TensorInfo,
    WeightFile,
    check_ranges,
    empty,
    find,
    nbytes,
    read_array,
    shown,
    target_dtype,
)

WEIGHTS, INDEX, HEAD = "model.weights.h5", "model.weights.json", "task.weights.h5"
_SHARD = re.compile(r"[\w-]+\.weights\.h5")
_DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
_EXPANSION = 64  # of a whole file; trained weights compress by a few per cent, and gzip can do 1000


def is_kerashub(config: dict[str, Any]) -> bool:
    """Whether a folder with this config.json is a KerasHub preset and not a Hugging Face model."""
    return isinstance(config.get("registered_name"), str) and "model_type" not in config


class H5Checkpoint(Checkpoint):
    """One .weights.h5 file; tensors are named by their path in it, such as "layers/reversible_embedding/vars/0".

    Raises CheckpointError for a file that does not hold together, and for what is said to be refused above.
    """

    def __init__(self, path: str | os.PathLike[str]):
        with ExitStack() as stack:
            self._file = stack.enter_context(closing(WeightFile(path)))
            try:
                self._h5 = stack.enter_context(h5py.File(self._file.path, "r", locking="best-effort"))
                self._datasets = dict(_datasets(self._file, self._h5))
                self.tensors = {name: _info(self._file, name, dataset) for name, dataset in self._datasets.items()}
                self._offsets = dict(_offsets(self._file, self._datasets, self.tensors))
            except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:  # all that h5py raises
                if isinstance(error, CheckpointError):
                    raise
                raise self._file.damaged(f"the HDF5 library cannot read it ({shown(str(error))})") from error
            stack.pop_all()

    def read(self, name: str, dtype: str = "float32") -> np.ndarray:
        info = find(self.tensors, name, self._file.path)
        target = target_dtype(name, dtype, (*FLOAT_DTYPES, info.dtype), self._file.path)
        stored = np.dtype(info.dtype)
        if name in self._offsets:
            return read_array(self._file, self._offsets[name], info.shape, stored, target)
        out = empty(info.shape, target)
        try:
            values = self._datasets[name][()]
        except (OSError, RuntimeError) as error:
            raise self._file.damaged(f"tensor {shown(name)} cannot be read ({shown(str(error))})") from error
        out[...] = np.asarray(values).view(stored)  # bfloat16 comes as two opaque bytes
        return out

    def close(self) -> None:
        self._h5.close()
        self._file.close()


class ShardedH5Checkpoint(Checkpoint):
    """The shards that a model.weights.json lists. Raises CheckpointError as H5Checkpoint, and for missing shards."""

    def __init__(self, index: str | os.PathLike[str]):
        self._path = Path(index)
        folder = self._path.parent
        shards = _parse_index(self._path)
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise CheckpointError(
                f"{self._path} lists {len(shards)} shards and {len(missing)} of them are not there: "
                f"{', '.join(missing[:20])}. Download the missing files."
            )
        self._shard_of: dict[str, H5Checkpoint] = {}
        self.tensors = {}
        with ExitStack() as stack:
            for shard in shards:
                checkpoint = stack.enter_context(H5Checkpoint(folder / shard))
                if twice := self.tensors.keys() & checkpoint.tensors.keys():
                    raise CheckpointError(
                        f"{folder}: tensor {shown(min(twice))} is in {shard} and in another shard. The shards are of "
                        "different versions: download the folder again."
                    )
                self.tensors |= checkpoint.tensors
                self._shard_of |= dict.fromkeys(checkpoint.tensors, checkpoint)
            self._open = stack.pop_all()

    def read(self, name: str, dtype: str = "float32") -> np.ndarray:
        find(self.tensors, name, self._path)
        return self._shard_of[name].read(name, dtype)

    def close(self) -> None:
        self._open.close()


class WithHead(Checkpoint):
    """The weights of a backbone, and those of its task under "task/"."""

    def __init__(self, backbone: Checkpoint, head: Checkpoint):
        self._backbone, self._head = backbone, head
        self.tensors = backbone.tensors | {f"task/{name}": info for name, info in head.tensors.items()}

    def read(self, name: str, dtype: str = "float32") -> np.ndarray:
        part = self._head if name.startswith("task/") else self._backbone
        return part.read(name.removeprefix("task/"), dtype)

    def close(self) -> None:
        self._backbone.close()
        self._head.close()


def has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def open_kerashub(folder: str | os.PathLike[str], head: bool = False) -> Checkpoint:
    """The weights of a KerasHub preset: model.weights.h5, else model.weights.json and its shards.

    head: and those of its task under "task/", where they are there. Raises CheckpointError when there are none.
    """
    folder = Path(folder)
    if has_weights(folder):
        with ExitStack() as stack:
            whole = (folder / WEIGHTS).is_file()
            weights: Checkpoint = H5Checkpoint(folder / WEIGHTS) if whole else ShardedH5Checkpoint(folder / INDEX)
            stack.enter_context(weights)
            if head and (folder / HEAD).is_file():
                weights = WithHead(weights, H5Checkpoint(folder / HEAD))
            stack.pop_all()
        return weights
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) if folder.is_dir() else ""
    raise CheckpointError(
        f"{folder} holds no weights: expected {WEIGHTS} or {INDEX}, found {found or 'nothing'}. Download it again."
    )


def _datasets(file: WeightFile, root: h5py.File) -> Iterator[tuple[str, h5py.Dataset]]:
    """Path and dataset of all that is in the file, each object once."""
    if root.userblock_size:
        raise file.damaged("it starts with a block that is no HDF5, which Keras never writes")
    seen: set[int] = set()
    waiting: list[tuple[str, h5py.Group]] = [("", root)]
    while waiting:
        prefix, group = waiting.pop()
        for key in group:
            name = prefix + key
            link = group.get(key, getlink=True)
            if type(link) is not h5py.HardLink:
                raise _refused(file, name, f"a {type(link).__name__}, which can lead to another file")
            child = group[key]
            # Not h5o.get_info: it adds up the sizes of index trees, which never ends in one that is bent into a ring.
            address = group.id.links.get_info(key.encode("utf-8", "surrogateescape")).u
            if address in seen:
                raise file.damaged(f"{shown(name)} stands for something that has another name already")
            seen.add(address)
            if isinstance(child, h5py.Group):
                waiting.append((name + "/", child))
            elif isinstance(child, h5py.Dataset):
                yield name, child


def _info(file: WeightFile, name: str, dataset: h5py.Dataset) -> TensorInfo:
    dtype = dataset.dtype
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None and dataset.attrs.get("dtype") == "bfloat16":
        return TensorInfo("bfloat16", _shape(file, name, dataset))
    if dtype.name not in _DTYPES or not dtype.isnative:
        raise CheckpointError(
            f"{file.path}: tensor {shown(name)} has the type {shown(str(dtype))}; modelhub reads bfloat16 and, in this "
            f"machine's byte order, {', '.join(_DTYPES)}."
        )
    return TensorInfo(dtype.name, _shape(file, name, dataset))


def _shape(file: WeightFile, name: str, dataset: h5py.Dataset) -> tuple[int, ...]:
    shape = dataset.shape
    if shape is None or math.prod(size or 1 for size in shape) >= 1 << 59:
        raise file.damaged(f"tensor {shown(name)} has the shape {shown(shape)}")
    return tuple(int(size) for size in shape)


def _offsets(
    file: WeightFile, datasets: dict[str, h5py.Dataset], tensors: dict[str, TensorInfo]
) -> Iterator[tuple[str, int]]:
    """Where the tensors lie that lie in one piece; raises for those that would take more memory than their bytes."""
    ranges: list[tuple[int, int, str]] = []
    expanded = 0
    for name, dataset in datasets.items():
        info = tensors[name]
        needed = nbytes(info.shape, info.dtype)
        settings = dataset.id.get_create_plist()
        layout = settings.get_layout()
        if layout == h5py.h5d.VIRTUAL or settings.get_external_count():
            raise _refused(file, name, "kept in other files")
        if layout == h5py.h5d.CONTIGUOUS:
            offset = dataset.id.get_offset()
            if needed and (offset is None or dataset.id.get_storage_size() != needed or offset + needed > file.size):
                raise file.damaged(f"tensor {shown(name)} of shape {shown(info.shape)} is not all in the file")
            if needed:
                ranges.append((offset, offset + needed, name))
                yield name, offset
            continue
        if layout == h5py.h5d.CHUNKED:
            filters = {settings.get_filter(index)[0] for index in range(settings.get_nfilters())}
            if filters - _FILTERS:
                raise _refused(file, name, "compressed by other means than gzip")
            if any(chunk > size for chunk, size in zip(dataset.chunks, info.shape, strict=True)):
                raise file.damaged(f"tensor {shown(name)} of shape {shown(info.shape)} is cut into larger chunks")
        expanded += needed
        if expanded > _EXPANSION * file.size:
            raise _refused(file, name, f"part of more than {_EXPANSION} times the bytes of the file")
    check_ranges(file, ranges)


def _refused(file: WeightFile, name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{file.path}: {shown(name)} is {what}; modelhub refuses this, and Keras never writes it. Do not use this file "
        "unless you know who made it."
    )


def _parse_index(path: Path) -> list[str]:
    """The shards, without doubles. weight_map: a group's path -> the shard that holds it, or several."""
    with closing(WeightFile(path)) as file:
        if file.size > MAX_HEADER_BYTES:
            raise file.damaged(f"expected an index of at most {MAX_HEADER_BYTES} bytes, found {file.size}")
        try:
            entries = json.loads(file.read(0, file.size))["weight_map"].values()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise file.damaged(f"it has no weight_map ({shown(str(error))})") from error
    shards: set[str] = set()
    for entry in entries:
        for shard in entry if isinstance(entry, list) else [entry]:
            if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
                raise CheckpointError(
                    f"{path}: weights are said to be in {shown(shard)}; expected a .weights.h5 file inside the folder. "
                    "Do not use this checkpoint unless you know who made it."
                )
            shards.add(shard)
    if not shards:
        raise CheckpointError(f"{path} lists no shards. Download it again.")
    return sorted(shards)
