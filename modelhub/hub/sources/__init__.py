"""The places that presets are fetched from, one module each, and the cache they are fetched into.

A source answers two questions: `find`, is it in the cache (no network), and `fetch`, bring it there.
"""

from collections.abc import Callable

from modelhub.errors import PresetNotFound
from modelhub.hub.sources.base import Options, Source, Unreachable, Unresolved, cache_root
from modelhub.hub.sources.embedded import EmbeddedSource
from modelhub.hub.sources.folder import FolderSource
from modelhub.hub.sources.https import HttpsSource
from modelhub.hub.sources.huggingface import HubSource
from modelhub.hub.sources.kaggle import KaggleSource
from modelhub.hub.sources.package import PackageSource, Part

_SCHEMES: dict[str, Callable[[str, bool], Source]] = {
    "hf": HubSource.parse,
    "kaggle": KaggleSource.parse,
    "https": HttpsSource.parse,
    "http": HttpsSource.parse,  # it says why not
    "file": FolderSource.parse,
}


def source_of(address: str, verified: bool = False) -> Source:
    """The source that an address means. Raises PresetNotFound for addresses of no known kind."""
    scheme = address.partition("://")[0]
    if scheme not in _SCHEMES:
        known = ", ".join(f"{known}://" for known in _SCHEMES)
        raise PresetNotFound(f"{address!r}: presets cannot be loaded from such an address; known are {known}")
    return _SCHEMES[scheme](address, verified)


__all__ = [
    "EmbeddedSource",
    "FolderSource",
    "HttpsSource",
    "HubSource",
    "KaggleSource",
    "Options",
    "PackageSource",
    "Part",
    "Source",
    "Unreachable",
    "Unresolved",
    "cache_root",
    "source_of",
]
