"""Writing: .safetensors files, and folders that are whole or not there, whatever fails in between."""

import ctypes
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from modelhub.hub.checkpoint import DTYPES

# What may lie beside the weights of a model or of an adapter, and what a model's folder is made of.
COMPANIONS = ("NOTICE", "README.md", "SHA256SUMS", "best.json", "curve.png", "modelhub.json")
MODEL_FILES = re.compile(
    r"(config|generation_config|preprocessor_config)\.json|model.*\.safetensors(\.index\.json)?|tokenizer\.model|"
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template)\.json|chat_template\.jinja|"
    + "|".join(map(re.escape, COMPANIONS))
)

_CODES = {name: code for code, name in DTYPES.items()}


def save_tensors(
    shapes: Mapping[str, tuple[tuple[int, ...], str]],
    read: Callable[[str], np.ndarray],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    digest: Any = None,
) -> None:
    """Write a .safetensors file of {name: (shape, dtype)}; read(name) is asked for one tensor after the other.

    digest: an object of hashlib that gets the file's bytes. Raises OSError. The safetensors library wants all tensors
    in memory at once, and copies them.
    """
    # The widest first, as the library does it: each tensor then begins at a multiple of its item's size.
    names = sorted(shapes, key=lambda name: -np.dtype(shapes[name][1]).itemsize)
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        shape, dtype = shapes[name]
        begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file, _behind(digest) as hashed:
        file.write(hashed(len(text).to_bytes(8, "little") + text))
        for name in names:
            file.write(hashed(np.ascontiguousarray(read(name)).reshape(-1).view(np.uint8).data))


@contextmanager
def _behind(digest: Any) -> Iterator[Callable[[Any], Any]]:
    """A function that gives a piece of bytes back and has it hashed meanwhile: that takes half as long as writing."""
    if digest is None:
        yield lambda piece: piece
        return
    with ThreadPoolExecutor(1) as thread:
        last: Future = thread.submit(int)

        def hashed(piece: Any) -> Any:
            nonlocal last
            last.result()  # no more than one piece is held
            last = thread.submit(digest.update, piece)
            return piece

        yield hashed


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """save_tensors for what is in memory already."""
    native = {name: np.asarray(x, x.dtype.newbyteorder("=")) for name, x in arrays.items()}
    save_tensors({name: (x.shape, str(x.dtype)) for name, x in native.items()}, native.__getitem__, path, metadata)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `target` at the end of the block.

    After an exception `target` is what it was.
    """
    work = target.with_name(f".{target.name}.saving")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        yield work
        replace_folder(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Make `target` the folder that `source` is, on the disk for good; what `target` was is removed.

    Both in one file system. One atomic step on Linux; elsewhere two renames when there is a `target` already.
    """
    for path in [*source.rglob("*"), source]:
        _sync(path)
    if not target.exists():
        source.rename(target)
    elif not _exchange(source, target):
        aside = source.with_name(f"{source.name}-old")
        target.rename(aside)
        source.rename(target)
        source = aside
    _sync(target.parent)
    shutil.rmtree(source, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: man 2 rename
    return libc.renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def _sync(path: Path) -> None:
    windows = os.name == "nt"  # it opens no folders, and syncs no file that is open for reading only
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
