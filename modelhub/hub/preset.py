"""From what a user calls a preset to the files on disk.

A name is read in this order:
1. With a scheme (hf://, file:///): that address.
2. With a path separator, a leading ~ or the ending .gguf: a path, never a preset's name.
3. An existing folder in the working directory that holds a config.json: that folder. Who saved a preset there under a
   registry's name means the one saved, as with transformers.
4. A name of the registry.
"""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from modelhub.errors import DownloadError, InputError, ModelhubError, PresetNotFound
from modelhub.hub.registry import Card, find_card, list_presets
from modelhub.hub.sources import EmbeddedSource, HubSource, Options, Source, Unreachable, cache_root

_KINDS = "a name from `modelhub list`, a folder, a .gguf file, hf://owner/name[@revision] or file:///path"


@dataclass
class Preset:
    """The files of a preset on this machine."""

    name: str
    path: Path  # a folder, or a .gguf file
    card: Card | None  # None: not from the registry
    source: str  # where the files came from, as an address


def resolve(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    weights: bool = True,
) -> Preset:
    """The preset's files, downloaded first where needed.

    revision: a branch, tag or commit on the Hub. offline: only the cache, no network. token: for the Hub, instead of
    the one that `hf auth login` saved. cache_dir: instead of $MODELHUB_CACHE and ~/.cache/modelhub. weights False:
    config and tokenizer are enough (a GGUF comes whole).

    Raises PresetNotFound, DownloadError, and InputError where revision cannot apply.
    """
    text = os.fspath(name)
    options = Options(revision, token, cache_dir, weights)
    if text.startswith("hf://"):
        return _from_sources(text, None, [_hub_source(text, revision)], options, offline)
    if (path := _as_path(text)) is not None:
        if revision is not None:
            raise InputError(f"revision={revision!r} was given, but {text} is a local path, which has no revisions")
        return Preset(path.name, path, None, path.as_uri())
    card = _find_card(text)
    sources = [source for source in card.sources if revision is None or isinstance(source, HubSource)]
    if not sources:
        raise InputError(f"revision={revision!r} was given, but {text} has no source with revisions; leave it out")
    return _from_sources(text, card, sources, options, offline)


def cached(name: str, *, cache_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """Where a preset of the registry, or an hf:// address, lies in the cache; None if it must be downloaded first."""
    sources = [_hub_source(name, None)] if name.startswith("hf://") else find_card(name).sources
    found = _find(sources, Options(cache_dir=cache_dir))
    return found and found[1]


def size_on_disk(name: str, *, cache_dir: str | os.PathLike[str] | None = None) -> int:
    """Bytes that a preset takes in the cache; 0 if it is not there."""
    path = cached(name, cache_dir=cache_dir)
    if path is None:
        return 0
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _from_sources(name: str, card: Card | None, sources: Sequence[Source], options: Options, offline: bool) -> Preset:
    if offline:
        found = _find(sources, options)
        if found is None:
            raise DownloadError(
                f"{name} is not complete in the cache and offline=True. {_cache_contents(options)} "
                f"Fetch it once with the network on: modelhub pull {name}"
            )
        return Preset(name, found[1], card, found[0].address(found[1]))
    failures: list[ModelhubError] = []
    for source in sources:
        try:
            path = source.fetch(options)
        except (DownloadError, PresetNotFound) as error:
            failures.append(error)
        else:
            return Preset(name, path, card, source.address(path))
    unreachable = any(isinstance(error, Unreachable) for error in failures)
    if len(failures) == 1 and not unreachable:
        raise failures[0]
    raise DownloadError(
        f"{name}: " + "; ".join(map(str, failures)) + (f". {_cache_contents(options)}" if unreachable else "")
    ) from failures[-1]


def _find(sources: Sequence[Source], options: Options) -> tuple[Source, Path] | None:
    """The first source whose files are in the cache, and where."""
    for source in sources:
        if path := source.find(options):
            return source, path
    return None


def _cache_contents(options: Options) -> str:
    names = [
        card.name
        for card in list_presets()
        if any(not isinstance(source, EmbeddedSource) and source.find(options) for source in card.sources)
    ]
    return f"Presets in the cache: {', '.join(names) or 'none'} ({cache_root(options.cache_dir)})."


def _hub_source(address: str, revision: str | None) -> HubSource:
    source = HubSource.parse(address)
    if revision and source.revision and revision != source.revision:
        raise InputError(f"{address} asks for one revision and revision={revision!r} for another; give one of them")
    return source


def _as_path(text: str) -> Path | None:
    """The file or folder that `text` means by rules 1 to 3; None: it can only be a name of the registry."""
    if not text:
        raise PresetNotFound(f"the name of the preset is empty; give {_KINDS}")
    explicit = text.startswith(("~", ".")) or any(mark in text for mark in ("/", "\\")) or _is_gguf(text)
    path = os.path.expanduser(text)
    if "://" in text:
        address = urlsplit(text)
        if address.scheme != "file" or address.netloc not in ("", "localhost"):
            raise PresetNotFound(f"{text!r}: presets cannot be loaded from such an address; give {_KINDS}")
        path = url2pathname(address.path)
    # os.path, not Path: it answers False for names that no file can have.
    if explicit:
        if not os.path.isdir(path) and not (os.path.isfile(path) and _is_gguf(path)):
            raise PresetNotFound(_nothing_there(text, Path(path)))
    elif not os.path.isfile(os.path.join(path, "config.json")):
        return None
    return Path(os.path.abspath(path))


def _is_gguf(text: str) -> bool:
    return text.lower().endswith(".gguf")


def _nothing_there(text: str, path: Path) -> str:
    if os.path.isfile(path):
        return f"{text!r} is a file, but no .gguf file; give {_KINDS}"
    hints = [f"Did you mean {near}?" for near in _near_files(path)]
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text):
        hints.append(f"For the repository on the Hugging Face Hub write hf://{text}.")
    return " ".join([f"{text!r} does not exist; give {_KINDS}.", *hints])


def _near_files(path: Path) -> list[str]:
    folder = path.parent
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [str(folder / name) for name in difflib.get_close_matches(path.name, names, n=2)]


def _find_card(name: str) -> Card:
    try:
        return find_card(name)
    except PresetNotFound as error:
        near = [file for file in _near_files(Path(name)) if Path(file).is_dir() or _is_gguf(file)]
        hint = f". Here there is {' and '.join(near)}" if near else ""
        raise PresetNotFound(f"{error}{hint}") from None
