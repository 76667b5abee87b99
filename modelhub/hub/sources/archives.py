"""Archives of a model folder: .zip, .tar and .tar.gz. Nothing is written before everything in them was looked at.

The folder's files lie at the archive's top, or in one folder there. Only those that a model needs are taken out.
"""

import gzip
import hashlib
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from modelhub.errors import DownloadError
from modelhub.hub.sources.base import needed
from modelhub.hub.sources.entry import check_room, is_inside

EXPANSION = 20  # times the archive's own size; weights hardly compress
SMALL = 16 << 20  # bytes that a small archive may hold in any case
DIRECTORY_BYTES = 16 << 20  # of the list of members; bounds the memory that reading it takes
_BLOCK = 1 << 20


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    problem: str | None  # what is wrong with its kind
    blocks: Callable[[], Iterator[bytes]]  # its bytes


class Refused(DownloadError):
    """An archive that is damaged or hostile."""


def extract(archive: Path, name: str, work: Path, where: str) -> dict[str, str]:
    """Write the files that a model needs into work / "files"; {path: sha256}.

    name: of the archive, for its ending. where: its address, for errors. Raises Refused for an archive that is
    damaged, has members outside its folder, links, devices or one name twice, or expands too much; DownloadError where
    the disk is full; PresetNotFound and CheckpointError as `needed` does.
    """
    limit = max(EXPANSION * archive.stat().st_size, SMALL)
    with open(archive, "rb") as file:
        with _readable(where):
            members = list(_zip(file) if name.endswith(".zip") else _tar(file, name, limit))
        _check(members, limit, where)
        root = _root(members)
        files = {member.name.removeprefix(root): member for member in members if member.name.startswith(root)}
        names = set(needed(files, True, where))
        wanted = [path for path in files if path in names]  # as they lie there: in a .tar.gz going back takes long
        check_room(work, archive.stat().st_size + sum(files[path].size for path in wanted), where)
        return {path: _write(files[path], work / "files" / path, where) for path in wanted}


def _check(members: list[_Member], limit: int, where: str) -> None:
    problems = [f"{member.name!r} is {member.problem}" for member in members if member.problem]
    problems += [f"{member.name!r} leads out of its folder" for member in members if not is_inside(member.name)]
    # Two names that differ in case alone are one file on some systems.
    names = Counter(member.name.casefold() for member in members)
    problems += [f"{name!r} is there {times} times" for name, times in names.items() if times > 1]
    if (total := sum(member.size for member in members)) > limit:
        problems.append(f"its members hold {total:,} bytes; at most {limit:,} are taken from an archive of this size")
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise Refused(f"{where} is refused: {'; '.join(problems[:5])}{more}. Nothing was kept")


def _root(members: list[_Member]) -> str:
    """What the paths of the model's files begin with: "", or the one top folder that holds a config."""
    split = [member.name.rpartition("/") for member in members]
    tops = {top for top, _, name in split if "/" not in top and name in ("config.json", "adapter_config.json")}
    return "" if "" in tops or len(tops) != 1 else f"{tops.pop()}/"


def _zip(file: IO[bytes]) -> Iterator[_Member]:
    source: Any = _Directory(file, limit=None)
    archive = zipfile.ZipFile(source)
    source.budget = None
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        problem = None
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "a link or a device"
        elif info.flag_bits & 1:
            problem = "encrypted"
        if problem or not info.is_dir():
            yield _Member(info.filename, info.file_size, problem, partial(_zip_blocks, archive, info))
        elif not is_inside(info.filename.rstrip("/")):
            yield _Member(info.filename, 0, "no folder of its own", partial(_zip_blocks, archive, info))


def _tar(file: IO[bytes], name: str, limit: int) -> Iterator[_Member]:
    stream: Any = file if name.endswith(".tar") else gzip.GzipFile(fileobj=file)
    # Headers and padding take room beside the members.
    directory: Any = _Directory(stream, limit=limit + DIRECTORY_BYTES)
    with tarfile.open(fileobj=directory, mode="r:") as archive:
        infos = archive.getmembers()
    for info in infos:
        inner = info.name.removeprefix("./")
        if info.isdir() and (inner == "." or is_inside(inner)):
            continue
        problem = None if info.isreg() and not info.issparse() else "a link, a device or a folder outside"
        yield _Member(inner, info.size, problem, partial(_tar_blocks, stream, info))


def _zip_blocks(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    with archive.open(info) as source:  # ends after info.file_size bytes, and checks their CRC
        while block := source.read(_BLOCK):
            yield block


def _tar_blocks(stream: IO[bytes], info: tarfile.TarInfo) -> Iterator[bytes]:
    stream.seek(info.offset_data)
    left = info.size
    while block := stream.read(min(_BLOCK, left)):
        left -= len(block)
        yield block


class _Directory:
    """A file of which only so much may be read while the list of members is: a hostile one could fill the memory."""

    def __init__(self, file: IO[bytes], limit: int | None):
        self.file, self.limit = file, limit  # limit: how far it may be decompressed
        self.budget: int | None = DIRECTORY_BYTES
        self.seekable, self.tell = file.seekable, file.tell

    def read(self, size: int = -1) -> bytes:
        if self.budget is None:
            return self.file.read(size)
        data = self.file.read(min(size, self.budget + 1) if size >= 0 else self.budget + 1)
        self.budget -= len(data)
        if self.budget < 0:
            raise ValueError(f"the list of its members is larger than {DIRECTORY_BYTES:,} bytes")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        if self.limit is not None and offset > self.limit:
            raise ValueError(f"it expands to more than {self.limit:,} bytes")
        return self.file.seek(offset, whence)


def _write(member: _Member, target: Path, where: str) -> str:
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as out:
        for block in _read(member, where):
            out.write(block)
            digest.update(block)
    return digest.hexdigest()


def _read(member: _Member, where: str) -> Iterator[bytes]:
    size = 0
    with _readable(where):
        for block in member.blocks():
            size += len(block)
            yield block
        if size != member.size:
            raise EOFError(f"{member.name} ends after {size:,} of {member.size:,} bytes")


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Errors of reading; hostile bytes can make zipfile and tarfile raise anything."""
    try:
        yield
    except Exception as error:
        raise Refused(f"{where} is no archive that can be read ({error}). Nothing was kept") from error
