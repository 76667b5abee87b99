"""What the caches that modelhub uses hold: its own folder, and the Hugging Face client's, which transformers shares."""

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from modelhub.errors import ConfigError, DownloadError, InputError
from modelhub.hub.registry import list_presets
from modelhub.hub.sources import Options, cache_root
from modelhub.hub.sources.base import client_cache
from modelhub.hub.sources.entry import read_record
from modelhub.hub.sources.folder import address_of, path_of
from modelhub.hub.sources.huggingface import CHECKSUM, RECORDS, checksum_of
from modelhub.hub.sources.huggingface import read_record as read_hub_record

PROGRAMS = "jax"  # the folder of compiled programs
PUBLISHING = "publishing"  # of what is on its way to a hub
_KINDS = ("pypi", "kaggle", "https", "folder")  # the folders of sources that keep their files here
_THREADS = 4


@dataclass(frozen=True)
class Entry:
    """Something in a cache that can be removed by itself.

    address: where it came from, and what it is called here. presets: the names in the registry that it serves. size:
    bytes on the disk. last_used: seconds since 1970; as exact as the file system keeps it, often one day.
    """

    address: str
    presets: tuple[str, ...]
    path: Path
    size: int
    last_used: float


def entries(cache_dir: str | os.PathLike[str] | None = None) -> list[Entry]:
    """All that is in the caches, the largest first. No network. cache_dir: as in modelhub.hub.preset.resolve.

    A repository of the Hugging Face Hub is one entry with all its revisions. "unfinished:" are downloads and
    publications that were interrupted, or are under way.
    """
    try:
        cards = list_presets()
    except ConfigError:  # what is on the disk can be seen and removed all the same
        cards = []
    used = [
        (card.name, path)
        for card in cards
        for source in card.sources
        if (path := source.find(Options(cache_dir=cache_dir, weights=False)))
    ]
    found = []
    for address, path in _places(cache_dir):
        names = dict.fromkeys(name for name, file in used if file.is_relative_to(path))
        sizes, times = [0], [path.stat().st_mtime]
        for folder, _, files in os.walk(path):
            for file in files:
                with suppress(OSError):  # gone by now
                    about = os.lstat(os.path.join(folder, file))  # links of a snapshot point to what is counted anyway
                    sizes.append(about.st_size)
                    times.append(max(about.st_atime, about.st_mtime))
        found.append(Entry(address, tuple(names), path, sum(sizes), max(times)))
    return sorted(found, key=lambda entry: (-entry.size, entry.address))


def select(names: Sequence[str], cache_dir: str | os.PathLike[str] | None = None) -> list[Entry]:
    """The entries that names of presets, or addresses with or without a revision, mean.

    Raises InputError once for all names that mean none.
    """
    present = entries(cache_dir)
    chosen = {name: [entry for entry in present if _means(name, entry)] for name in names}
    if unknown := [name for name, hits in chosen.items() if not hits]:
        raise InputError(f"not in the cache: {', '.join(unknown)}; `modelhub cache` lists what is")
    return list(dict.fromkeys(entry for hits in chosen.values() for entry in hits))


def remove(*names: str, cache_dir: str | os.PathLike[str] | None = None) -> int:
    """Remove what `select` finds, and return the bytes that this freed. Raises InputError as it does, and OSError."""
    freed = 0
    for entry in select(names, cache_dir):
        shutil.rmtree(entry.path)
        freed += entry.size
    return freed


def verify(entry: Entry) -> list[str] | None:
    """Read all files of an entry whose checksum is known; the damaged ones by their paths; empty: all is well.

    None: no checksum is known.
    """
    from concurrent.futures import ThreadPoolExecutor

    def is_damaged(item: tuple[str, Path, str]) -> bool:
        _, path, expected = item
        try:
            return checksum_of(path, expected) != expected
        except OSError:
            return True

    if not (known := sorted(_checksums(entry.path))):
        return None
    with ThreadPoolExecutor(_THREADS) as pool:
        return [name for (name, _, _), damaged in zip(known, pool.map(is_damaged, known), strict=True) if damaged]


@contextmanager
def staging() -> Iterator[Path]:
    """An empty folder for what is on its way to a hub: in the cache, or among temporary files where that is read-only.

    Those of processes that were killed are removed. Raises DownloadError where there is no place at all.
    """
    root = cache_root() / PUBLISHING
    with ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            _sweep(root)
            work = root / f"tmp{uuid.uuid4().hex}"
            stack.enter_context(FileLock(_lock_of(work)))  # first the lock: a folder without one is left over
            stack.callback(_lock_of(work).unlink, missing_ok=True)
            work.mkdir()
        except OSError:
            stack.close()
            try:
                work = Path(tempfile.mkdtemp(prefix="modelhub-"))
            except OSError as error:
                raise DownloadError(
                    f"there is no place to write the model before it is sent ({error}): make room, or choose another "
                    f"folder with $MODELHUB_CACHE or $TMPDIR"
                ) from error
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        yield work


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _sweep(root: Path) -> None:
    for folder in _folders(root):
        lock = FileLock(_lock_of(folder), timeout=0)
        with suppress(Timeout), lock:
            shutil.rmtree(folder, ignore_errors=True)
            _lock_of(folder).unlink(missing_ok=True)


def _places(cache_dir: str | os.PathLike[str] | None) -> Iterator[tuple[str, Path]]:
    """Address and folder of each entry."""
    root = cache_root(cache_dir)
    for kind in _KINDS:
        for path in _folders(root / kind):
            if path.suffix == ".partial":
                yield f"unfinished:{path.stem}", path
            elif kind == "pypi":
                yield f"pypi:{', '.join(sorted(os.listdir(path)))}", path
            elif record := read_record(path):
                yield record["address"], path
    for path in _folders(root / PUBLISHING):
        yield f"unfinished:{PUBLISHING}/{path.name}", path
    for path in _folders(client_cache(cache_dir)):
        if path.name.startswith("models--"):
            yield f"hf://{path.name.removeprefix('models--').replace('--', '/')}", path
    if (root / PROGRAMS).is_dir():
        yield "programs", root / PROGRAMS


def _folders(path: Path) -> list[Path]:
    return sorted(item for item in path.iterdir() if item.is_dir()) if path.is_dir() else []


def _means(name: str, entry: Entry) -> bool:
    if name in entry.presets:
        return True
    if name.startswith("hf://"):  # hf://owner/name@revision and hf://owner/name/file.gguf are parts of hf://owner/name
        return entry.address == "/".join(name.partition("@")[0].split("/")[:4])
    if path := path_of(name):  # there are many ways to write it
        name = address_of(path)
    version = r"/\d+" if name.startswith("kaggle://") else r"@[^/]+"  # and no folder inside a folder
    return re.fullmatch(f"{re.escape(name)}({version})?", entry.address) is not None


def _checksums(folder: Path) -> Iterator[tuple[str, Path, str]]:
    """Name, file and checksum of all that is known of an entry's files."""
    if record := read_record(folder):
        yield from ((name, folder / name, checksum) for name, checksum in record["files"].items())
    elif CHECKSUM.fullmatch(folder.name):  # of a file out of wheels
        yield from ((path.name, path, folder.name) for path in folder.iterdir())
    elif (folder / "snapshots").is_dir():
        seen = set()
        for snapshot in _folders(folder / "snapshots"):
            stated: dict[str, str] = {}
            for file in (folder / RECORDS / snapshot.name).glob("*.json"):
                stated |= {name: about["checksum"] for name, about in read_hub_record(file).items()}
            for path in (path for path in snapshot.rglob("*") if not path.is_dir()):
                name, blob = path.relative_to(snapshot).as_posix(), path.resolve()
                # The client names what it has fetched after the checksum that the Hub stated.
                checksum = stated.get(name) or blob.name
                if blob not in seen and CHECKSUM.fullmatch(checksum):
                    seen.add(blob)
                    yield name, path, checksum
