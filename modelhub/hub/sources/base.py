"""What all sources share: what may be asked of them, the cache's place, the files of a preset."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from modelhub.errors import DownloadError

# What a model folder needs. Not *.safetensors: some repositories hold the same weights twice, under two names.
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")


class Unreachable(DownloadError):
    """The network, or the server that was asked, does not answer."""


@dataclass(frozen=True)
class Options:
    """What a caller may ask of any source."""

    revision: str | None = None
    token: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    weights: bool = True  # False: config and tokenizer are enough


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The cache folder: cache_dir, else $MODELHUB_CACHE, else ~/.cache/modelhub."""
    chosen = cache_dir or os.environ.get("MODELHUB_CACHE") or "~/.cache/modelhub"
    return Path(os.path.abspath(os.path.expanduser(chosen)))


class Source(Protocol):
    """A place that a preset is fetched from."""

    @property
    def verified(self) -> bool: ...  # whether somebody has seen that this address holds the preset

    def find(self, options: Options) -> Path | None:
        """The files in the cache, complete, or None. No network."""

    def fetch(self, options: Options) -> Path:
        """Bring what is missing into the cache; the folder, or the .gguf file. Raises DownloadError, PresetNotFound."""
        raise NotImplementedError

    def address(self, path: Path) -> str:
        """Where exactly the files at `path` came from."""
        raise NotImplementedError


@contextmanager
def progress(name: str, size: int) -> Iterator[Callable[[int, int], object]]:
    """A bar on stderr, where that is a terminal, after two seconds. Yields show(bytes written, bytes downloaded)."""
    from tqdm import tqdm

    with tqdm(total=size, desc=name, unit="B", unit_scale=True, delay=2, disable=None, leave=False) as bar:
        yield lambda written, downloaded: bar.update(min(written + downloaded, size) - bar.n)
