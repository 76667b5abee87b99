"""A hub that is nothing but a folder which others can read: a mounted disk, a bucket, a web server's files."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modelhub.errors import DownloadError, InputError
from modelhub.hub.files import replacing
from modelhub.hub.publish.base import File, Shipment, There, kinds, listed
from modelhub.hub.sources.base import progress, sha256_of
from modelhub.hub.sources.folder import MANIFEST, path_of, read_sums


@dataclass(frozen=True)
class FolderTarget:
    """The folder `path`, or `path@revision` beside it."""

    path: Path  # without the revision
    revision: str | None = None
    whole: ClassVar[bool] = True

    @property
    def address(self) -> str:
        return self.path.as_uri() + (f"@{self.revision}" if self.revision else "")

    @property
    def title(self) -> str:
        return self.path.name

    @property
    def folder(self) -> Path:
        return self.path.with_name(f"{self.path.name}@{self.revision}") if self.revision else self.path

    @classmethod
    def parse(cls, address: str, place: str, revision: str | None) -> "FolderTarget":
        """place: what follows file://. Raises InputError."""
        path = path_of(f"file://{place}")
        if path is None or not path.name or ".." in path.parts:
            raise InputError(f"{address!r} is no folder's address; write file:///folder/name, with three slashes")
        return cls(path, revision)

    def look(self, folder: Path, token: str | None) -> There:
        """The files by sha256, read anew: one that was damaged there is repaired by publishing again."""
        target, source = self.folder.resolve(), folder.resolve()
        if target.is_relative_to(source) or source.is_relative_to(target):
            raise InputError(f"{self.address} is inside the folder that is published, or the other way round")
        try:
            paths = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if not path.is_dir()}
            known = read_sums(paths[MANIFEST].read_bytes(), self.address) if MANIFEST in paths else {}
            if others := sorted(paths.keys() - known.keys() - {MANIFEST}):
                raise InputError(
                    f"{self.address} holds {listed(others)}, which modelhub has not published and which would be "
                    "removed; give another name, or move these away"
                )
            if target.is_file():
                raise InputError(f"{self.address} is a file; give the name of a folder")
            files = {name: sha256_of(path) for name, path in paths.items()}
        except OSError as error:
            raise DownloadError(f"{self.address} could not be read: {error}") from error
        return There("there" if files else None, files)

    def check(self, files: Sequence[File], there: There, private: bool, licence: str | None) -> list[str]:
        ours = kinds([file.name for file in files])
        if lost := kinds(there.files) - ours:
            raise InputError(
                f"{self.address} holds {lost.pop()}, whose place {' and '.join(ours)} would take; give another name, "
                "or remove that folder first"
            )
        return ["a shared folder has no private models: who can read the folder can read this"] if private else []

    def send(self, shipment: Shipment, there: There) -> str:
        """Write beside the folder and swap: readers see the old or the new one."""
        target = self.folder
        try:
            total = sum(file.size for file in shipment.files)
            with replacing(target) as work, progress(target.name, total) as show:
                written = 0
                for file in shipment.files:
                    path = work / file.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if isinstance(file.content, bytes):
                        path.write_bytes(file.content)
                    else:
                        shutil.copyfile(file.content, path)
                    written += file.size
                    show(written, 0)
        except OSError as error:
            raise DownloadError(
                f"{self.address} could not be written: {error}. What was published before is as it was"
            ) from error
        return "there"

    def published(self, version: str) -> tuple[str, str | None]:
        return self.address, None
