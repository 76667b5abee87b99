"""Writing: .safetensors files, and folders that are whole or not there, whatever fails in between."""

import ctypes
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from modelhub.errors import CheckpointError, InputError
from modelhub.hub import licences
from modelhub.hub.checkpoint import DTYPES, nbytes

# In a README that people have not made theirs.
GENERATED = "<!-- Written by modelhub when the model was saved; without this line, saving again keeps your text. -->"
# The names that weights are saved under; anything like them may be somebody's own.
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# What may lie beside the weights of a model or of an adapter, and what a model's folder is made of.
COMPANIONS = re.compile(rf"README\.md|SHA256SUMS|best\.json|curve\.png|modelhub\.json|{licences.FILES.pattern}")
MODEL_FILES = re.compile(
    rf"{WEIGHTS.pattern}|(config|generation_config|preprocessor_config)\.json|tokenizer\.model|"
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template)\.json|chat_template\.jinja|"
    + COMPANIONS.pattern
)
_LARGEST_LICENCE, _MOST_LICENCES = 1_000_000, 20  # bytes; files

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
        begin, end = end, end + nbytes(shape, dtype)
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


def save_arrays(
    arrays: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str] | None = None, digest: Any = None
) -> None:
    """save_tensors for what is in memory already."""
    native = {name: np.asarray(x, x.dtype.newbyteorder("=")) for name, x in arrays.items()}
    save_tensors(
        {name: (x.shape, str(x.dtype)) for name, x in native.items()}, native.__getitem__, path, metadata, digest
    )


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def licence_files(folder: Path) -> dict[str, bytes]:
    """The licences' texts at the top of a folder, by name; none of over 1 MB."""
    found: dict[str, bytes] = {}
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    for path in [folder / name for name in names if licences.FILES.fullmatch(name)][:_MOST_LICENCES]:
        # They are going to be published: a stranger's link must not make that a file of the user's. The Hub's cache
        # keeps all files as links into blobs/.
        if path.is_symlink() and path.resolve().parent.name != "blobs":
            continue
        with suppress(OSError):  # the model is sound all the same
            if path.is_file() and path.stat().st_size <= _LARGEST_LICENCE:
                found[path.name] = path.read_bytes()
    return found


def place(path: str | os.PathLike[str]) -> Path:
    """The absolute path, in a folder that is made where it is missing. Raises InputError for one that cannot be."""
    try:
        target = Path(path).expanduser().absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the latter: nobody's home
        raise InputError(f"{path} cannot be written, its folder cannot be made: {error}; give another place") from None
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"{target} cannot be written: the folder is read-only to you; give another place")
    return target


def check_new(*paths: Path) -> None:
    """Raise InputError if anything is there, be it a link that leads nowhere."""
    for path in paths:
        if os.path.lexists(path):
            raise InputError(f"{path} is there already; give another path, or remove it")


@contextmanager
def adding(target: Path) -> Iterator[Path]:
    """A file to write, which goes to `target` at the end of the block with what is beside it then: all, or nothing.

    Raises InputError if by then anything is there.
    """
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        yield Path(folder) / target.name
        # The file itself comes last: it needs the others.
        files = sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name)
        check_new(*(target.parent / file.name for file in files))
        moved: list[Path] = []
        try:
            for file in files:
                moved.append(file.rename(target.parent / file.name))
        except BaseException:
            for path in moved:
                path.unlink(missing_ok=True)
            raise


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `target` at the end of the block.

    After an exception `target` is what it was. Who else writes there meanwhile waits.
    """
    with _alone(target) as work:
        try:
            _restore(work, target)
            shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed
            work.mkdir()
            yield work
            replace_folder(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def rewriting(target: Path) -> Iterator[Path]:
    """As `replacing`; CheckpointError for what the disk refuses."""
    try:
        with replacing(target) as work:
            yield work
    except OSError as error:
        raise CheckpointError(f"{target} could not be written: {error}. What was there before is as it was.") from error


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """As `replacing`, for one file: a path to write to, at which nothing is."""
    with _alone(target) as work:
        try:
            work.unlink(missing_ok=True)  # left by a process that was killed
            yield work
            _sync(work)
            os.replace(work, target)
            _sync(target.parent)
        finally:
            with suppress(OSError):  # it would hide why writing failed
                work.unlink(missing_ok=True)


@contextmanager
def _alone(target: Path) -> Iterator[Path]:
    """Where what is going to be `target` is written, for no more than one process at a time; the others wait.

    The name is always the same one, so that what a killed process leaves there is found by the next.
    """
    from filelock import FileLock

    work = target.with_name(f".{target.name}.saving")
    lock = target.with_name(f".{target.name}.lock")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock, mode=0o666):  # of a folder that many publish to
        try:
            yield work
        finally:
            with suppress(OSError):  # Windows does it when the lock is released
                lock.unlink()  # who waits for it sees that it is gone, and makes a new one


def replace_folder(source: Path, target: Path) -> None:
    """Make `target` the folder that `source` is, on the disk for good; what `target` was is removed.

    Both in one file system. One atomic step on Linux; elsewhere, and on network shares, two renames when there is a
    `target` already: what a kill between them leaves, the next call puts right.
    """
    _restore(source, target)
    for path in [*source.rglob("*"), source]:
        _sync(path)
    if not target.exists():
        source.rename(target)
    elif not _exchange(source, target):
        aside = _aside(source)
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        try:
            source.rename(target)
        except OSError:
            aside.rename(target)
            raise
        source = aside
    _sync(target.parent)
    shutil.rmtree(source, ignore_errors=True)


def _aside(source: Path) -> Path:
    """Where a folder waits while `source` takes its name."""
    return source.with_name(f"{source.name}-old")


def _restore(source: Path, target: Path) -> None:
    if not target.exists() and _aside(source).exists():
        _aside(source).rename(target)


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
