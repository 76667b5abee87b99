"""Folders that are whole or not there, whatever fails in between."""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file. Raises OSError and SafetensorError."""
    # safetensors writes memory as it lies: a transposed view would come back in another order.
    arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    save_file(arrays, path, None if metadata is None else dict(metadata))
    path.chmod(0o644)  # safetensors makes it for the user alone, as if it were a secret


@contextmanager
def replacing(target: Path, keep: str | None = None) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `target` at the end of the block.

    After an exception `target` is what it was. keep: the name of a file that goes over from the old folder.
    """
    work = target.with_name(f".{target.name}.saving")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        yield work
        if keep is not None and (target / keep).is_file():
            shutil.copy2(target / keep, work)
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
