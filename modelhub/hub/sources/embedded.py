"""Presets that come with modelhub itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modelhub.errors import DownloadError
from modelhub.hub.resources import resource
from modelhub.hub.sources.base import Options


@dataclass(frozen=True)
class EmbeddedSource:
    """A folder that comes with modelhub itself, in presets/."""

    folder: str
    verified: bool = True
    revision: ClassVar[None] = None

    def takes(self, revision: str) -> bool:
        return False

    def address(self, path: Path) -> str:
        return path.as_uri()

    def find(self, options: Options) -> Path | None:
        path = resource("presets") / self.folder
        return path if path.is_dir() else None

    def fetch(self, options: Options) -> Path:
        """The folder. Raises DownloadError where it is missing."""
        if path := self.find(options):
            return path
        raise DownloadError(f"the folder {self.folder} is missing in {resource('presets')}; install modelhub again")
