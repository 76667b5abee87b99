"""The shared-folder hub: folders that others can read, on a network share or a USB stick; no server.

A published folder holds, beside the model's files, SHA256SUMS in the format of coreutils' sha256sum. A revision v1 of
it is the folder name@v1 beside it.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from modelhub.errors import DownloadError, InputError, PresetNotFound
from modelhub.hub.sources.base import Options, Unreachable, cache_root, needed, progress, sha256_of
from modelhub.hub.sources.entry import RECORD, check_room, fill_entry, find_entry, is_inside, read_record

MANIFEST = "SHA256SUMS"
_MANIFEST_BYTES = 1 << 20
_BLOCK = 1 << 20


@dataclass(frozen=True)
class FolderSource:
    """A folder; where it holds SHA256SUMS it is copied into the cache, where it does not it is used in place."""

    path: Path
    verified: bool = False

    @classmethod
    def parse(cls, address: str, verified: bool = False) -> "FolderSource":
        """From file:///path/name[@revision]. Raises PresetNotFound for anything else."""
        if (path := path_of(address)) is None:
            raise PresetNotFound(f"{address!r} is no address of a folder; write file:///path/name[@revision]")
        return cls(Path(os.path.abspath(path)), verified)

    @property
    def revision(self) -> str | None:
        """What follows the @ in the folder's name."""
        return self.path.name.partition("@")[2] or None

    def takes(self, revision: str) -> bool:
        own = self.revision
        return revision == own or (own is None and re.fullmatch(r"[\w.-]+", revision) is not None)

    def address(self, path: Path) -> str:
        """Where the files at `path` came from."""
        record = read_record(path)
        return record["address"] if record else address_of(path)

    def find(self, options: Options) -> Path | None:
        """The newest copy in the cache; else the folder itself, where it needs no copy."""
        folder = self._folder(options)
        return _cached(folder, options) or (folder if _in_place(folder) else None)

    def fetch(self, options: Options) -> Path:
        """Copy the folder into the cache, checked against its SHA256SUMS; nothing is read where that has not changed.

        It takes no network but the file system's own: this is right offline too. Where the folder cannot be read an
        earlier copy serves. Raises PresetNotFound, DownloadError (a file that is not as SHA256SUMS says, a full disk)
        and Unreachable (a share that does not answer).
        """
        folder = self._folder(options)
        try:
            manifest = _read_manifest(folder)
        except Unreachable:
            if cached := _cached(folder, options):
                return cached
            raise
        if manifest is None:
            if not _in_place(folder) and (cached := _cached(folder, options)):  # an empty mount point, too
                return cached
            if not os.path.exists(folder):
                raise PresetNotFound(
                    f"{address_of(folder)} does not exist, and the cache holds no copy of it. Check the path, and that "
                    "the share is mounted"
                )
            if os.path.isfile(folder) and not _in_place(folder):
                raise PresetNotFound(f"{address_of(folder)} is a file, but no .gguf file; give a model's folder")
            return folder
        while True:
            try:
                return _copy(folder, manifest, options)
            except DownloadError:
                before, manifest = manifest, _read_manifest(folder)
                if manifest is None or manifest == before:
                    raise
                # else it was published anew while it was copied

    def _folder(self, options: Options) -> Path:
        asked = options.revision
        if asked is None or asked == self.revision:
            return self.path
        if not self.takes(asked):
            raise InputError(
                f"revision={asked!r} does not fit {address_of(self.path)}: a revision v1 of a folder `name` is the "
                "folder `name@v1` beside it"
            )
        return self.path.with_name(f"{self.path.name}@{asked}")


def path_of(address: str) -> Path | None:
    """The absolute path that a file:// address means, percent-encoded or plain; None where it means none.

    `#` and `?` are parts of it: folders may have them in their names, and a shell's file://$PWD/... encodes nothing.
    """
    from urllib.request import url2pathname  # its import takes long

    rest = address.removeprefix("file://").removeprefix("localhost")
    if not address.startswith("file://") or not rest.startswith("/"):
        return None
    path = Path(url2pathname(rest))
    return path if path.is_absolute() else None


def address_of(folder: Path) -> str:
    return folder.as_uri().replace("%40", "@")


def read_sums(text: bytes, where: str) -> dict[str, str]:
    """{path: sha256} from the text of a SHA256SUMS file. where: for errors. Raises DownloadError."""
    sums: dict[str, str] = {}
    for line in text.decode(errors="replace").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if match is None or match[2] in sums or not is_inside(match[2]):
            raise DownloadError(f"{where}: {MANIFEST} holds the line {line[:200]!r}: no sum of a file in its folder")
        sums[match[2]] = match[1]
    return sums


def check_sums(found: Mapping[str, str], expected: Mapping[str, str], where: str) -> None:
    """Raises DownloadError that names the files whose sum is not the expected one."""
    if wrong := [name for name in found if found[name] != expected.get(name)]:
        raise DownloadError(
            f"{where}: {', '.join(wrong)}: not the bytes that {MANIFEST} promises (sha256 {found[wrong[0]]}, expected "
            f"{expected.get(wrong[0])}); nothing was kept. The files are damaged, or were changed after publishing: "
            "publish them again"
        )


def _in_place(folder: Path) -> bool:
    # os.path, not Path: it answers False where a share does not answer.
    if os.path.isfile(folder):
        return folder.suffix.lower() == ".gguf"
    if os.path.isfile(folder / MANIFEST):
        return False
    return any(os.path.isfile(folder / name) for name in ("config.json", "adapter_config.json"))


def _read_manifest(folder: Path) -> bytes | None:
    """None where there is none."""
    try:
        with open(folder / MANIFEST, "rb") as file:
            text = file.read(_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Unreachable(f"{address_of(folder)} cannot be read ({error}). Check that the share is mounted") from error
    if len(text) > _MANIFEST_BYTES:
        raise DownloadError(f"{address_of(folder)}: {MANIFEST} is larger than {_MANIFEST_BYTES:,} bytes")
    return text


def _entries(folder: Path, options: Options) -> tuple[Path, str]:
    """Where the cache keeps copies of `folder`, and what their names begin with; the manifest's sum follows."""
    key = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    return cache_root(options.cache_dir) / "folder", f"{folder.name[:80]}+{key}+"


def _cached(folder: Path, options: Options) -> Path | None:
    root, stem = _entries(folder, options)
    names = os.listdir(root) if root.is_dir() else []
    found = [find_entry(root / name, options.weights) for name in names if name.startswith(stem)]
    return max(filter(None, found), key=lambda path: (path / RECORD).stat().st_mtime, default=None)


def _copy(folder: Path, manifest: bytes, options: Options) -> Path:
    address = address_of(folder)
    root, stem = _entries(folder, options)
    entry = root / (stem + hashlib.sha256(manifest).hexdigest()[:12])

    def fill(work: Path) -> dict[str, str]:
        expected = read_sums(manifest, address)
        paths = {name: _inside(folder, name) for name in needed(expected, options.weights, address)}
        size = sum(path.stat().st_size for path in paths.values())
        check_room(work, size, address)
        sums: dict[str, str] = {}
        done = 0
        with progress(folder.name, size) as show:
            for name, path in paths.items():
                target = work / "files" / name
                # What arrived before an interruption is not read from the share again.
                if not (target.is_file() and sha256_of(target) == expected[name]):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with open(target, "wb") as out:
                        for block in _blocks(path):
                            out.write(block)
                            show(done, out.tell())
                sums[name] = sha256_of(target)
                done += target.stat().st_size
        check_sums(sums, expected, address)
        return sums

    path = fill_entry(entry, address, options.weights, fill)
    with suppress(OSError):  # a cache that can only be read
        os.utime(path / RECORD)  # an older state may have been published again: now it is the newest
    return path


def _inside(folder: Path, name: str) -> Path:
    """The file that a manifest names. Raises DownloadError where it is missing, or a link out of the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise DownloadError(f"{address_of(folder)}: {name} is a link to {path}, which is outside the folder")
    if not os.path.isfile(path):
        raise DownloadError(f"{address_of(folder)}: {MANIFEST} lists {name}, which is no file there; publish it again")
    return path


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                yield block
    except OSError as error:
        raise Unreachable(f"{path} cannot be read ({error}). Check that the share is mounted") from error
