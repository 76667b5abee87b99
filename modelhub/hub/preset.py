"""From what a user calls a preset to the files on disk.

A name is read in this order:
1. With a scheme (hf://, file:///): that address.
2. With a path separator, a leading ~ or the ending .gguf: a path, never a preset's name. owner/name where there is no
   such path, nor one with a name like it, is a repository on the Hugging Face Hub, as for transformers.
3. An existing folder in the working directory that holds a config.json: that folder. Who saved a preset there under a
   registry's name means the one saved, as with transformers.
4. A name of the registry.
"""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelhub.errors import CheckpointError, DownloadError, InputError, ModelhubError, PresetNotFound
from modelhub.hub.sources import (
    EmbeddedSource,
    FolderSource,
    HttpsSource,
    HubSource,
    Options,
    Source,
    Unreachable,
    Unresolved,
    cache_root,
    source_of,
)

if TYPE_CHECKING:  # addresses and paths need no registry, and reading its modules takes as long as all the rest
    from modelhub.hub.registry import Card

_KINDS = "a name from `modelhub list`, a folder, a .gguf file, or an address: hf://, kaggle://, https:// or file:///"
_ADAPTER = "adapter_config.json"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?")  # on the Hub; not ../name


@dataclass
class Preset:
    """The files of a preset on this machine."""

    name: str
    path: Path  # a folder, or a .gguf file
    card: "Card | None"  # None: not from the registry
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

    revision: a branch, tag or commit on the Hub, a version's number on Kaggle. offline: only the cache, no network;
    HF_HUB_OFFLINE=1 means the same. token: for the Hub, instead of the one that `hf auth login` saved. cache_dir:
    instead of $MODELHUB_CACHE and ~/.cache/modelhub. weights False: config and tokenizer are enough (a GGUF comes
    whole).

    Raises PresetNotFound, DownloadError, and InputError where revision cannot apply.
    """
    text = as_address(name)
    if text != os.fspath(name):
        with _asked_instead(os.fspath(name)):
            return resolve(
                text, revision=revision, offline=offline, token=token, cache_dir=cache_dir, weights=weights
            )  # fmt: skip
    options = Options(revision, token, cache_dir, weights)
    if "://" in text:
        source = _source_at(text, options)
        text = _shown(text, source)
        preset = _from_sources(text, None, [source], options, offline)
        if isinstance(source, FolderSource):
            preset.name = source.path.name
    elif (path := _as_path(text)) is not None:
        if revision is not None:
            raise InputError(f"revision={revision!r} was given, but {text} is a local path, which has no revisions")
        preset = Preset(path.name, path, None, path.as_uri())
    else:
        card = _find_card(text)
        sources = [source for source in card.sources if revision is None or source.takes(revision)]
        if not sources:
            raise InputError(
                f"revision={revision!r} was given, and {text} has no source with such revisions; leave it out"
            )
        preset = _from_sources(text, card, sources, options, offline)
    if (preset.path / _ADAPTER).is_file() and not (preset.path / "config.json").is_file():
        raise PresetNotFound(
            f"{text} holds an adapter, not a model: load its base model, then lm.load_adapter({text!r})"
        )
    return preset


def resolve_adapter(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The folder of an adapter in PEFT's format: a path as it is, an address fetched first; arguments as in `resolve`.

    A model beside it is not fetched. Raises PresetNotFound where an address holds no adapter, DownloadError and
    InputError as `resolve` does.
    """
    text = as_address(name)
    if text != os.fspath(name):
        with _asked_instead(os.fspath(name)):
            return resolve_adapter(text, revision=revision, offline=offline, token=token, cache_dir=cache_dir)
    options = Options(revision, token, cache_dir, weights=False)
    if "://" in text:
        source = _source_at(text, options)
        text = _shown(text, source)
        path = _from_sources(text, None, [source], options, offline).path
        if not (path / _ADAPTER).is_file():
            raise PresetNotFound(f"{text} holds no adapter: it has no {_ADAPTER}")
        return path
    if revision is not None:
        raise InputError(f"revision={revision!r} was given, but {text} is a local path, which has no revisions")
    return Path(os.path.abspath(os.path.expanduser(text)))


def as_address(name: str | os.PathLike[str]) -> str:
    """hf://owner/name of a bare owner/name that is no path here, as transformers reads it; else the text as it is."""
    text = os.fspath(name)
    if not _REPOSITORY.fullmatch(text) or _is_gguf(text) or os.path.exists(text) or _near_files(Path(text)):
        return text
    return f"hf://{text}"


@contextmanager
def _asked_instead(text: str) -> Iterator[None]:
    try:
        yield
    except (PresetNotFound, DownloadError) as error:
        raise type(error)(f"{error} (there is no folder {text} here: it was taken as hf://{text})") from error


def _from_sources(name: str, card: "Card | None", sources: Sequence[Source], options: Options, offline: bool) -> Preset:
    forbidden = "offline=True" if offline else _offline_variable()
    if forbidden and not name.startswith("file://"):  # a folder takes no network
        ways = [(source, source.find) for source in sources]
        ways += [(source, source.adopt) for source in sources if isinstance(source, HubSource)]  # takes a while
        for source, find in ways:
            if path := find(options):
                return Preset(name, path, card, source.address(path))
        raise DownloadError(
            f"{name} is not complete in the cache and {forbidden}. {_cache_contents(options)} "
            f"Fetch it once with the network on: modelhub pull {name}"
        )
    failures: list[ModelhubError] = []
    # What is here already, from whichever source, is not fetched a second time from another.
    for source in sorted(sources, key=lambda source: source.find(options) is None):
        try:
            path = source.fetch(options)
        except (DownloadError, PresetNotFound, CheckpointError) as error:
            failures.append(error)
        else:
            return Preset(name, path, card, source.address(path))
    if hosts := dict.fromkeys(error.host for error in failures if isinstance(error, Unresolved)):
        others = [str(error) for error in failures if not isinstance(error, Unresolved)]
        raise DownloadError(
            f"no network: the address of {' and '.join(hosts)} could not be found. {name} is not in the cache"
            f"{''.join(f'; {text}' for text in others)}. {_cache_contents(options)}"
        ) from failures[-1]
    unreachable = any(isinstance(error, Unreachable) for error in failures)
    if len(failures) == 1 and not unreachable:
        raise failures[0]
    raise DownloadError(
        f"{name}: " + "; ".join(map(str, failures)) + (f". {_cache_contents(options)}" if unreachable else "")
    ) from failures[-1]


def _offline_variable() -> str | None:
    """The client's variable that forbids the network, as a user may have set it for transformers."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if value := os.environ.get(name):
            return f"{name}={value}" if value.upper() in ("1", "ON", "YES", "TRUE") else None
    return None


def _cache_contents(options: Options) -> str:
    from modelhub.hub.registry import list_presets

    try:
        cards = list_presets()
    except ModelhubError:  # a broken card is not what the error at hand is about
        return f"The cache is {cache_root(options.cache_dir)}."
    options = replace(options, revision=None)  # of the preset that is asked for
    names = [
        card.name
        for card in cards
        if any(not isinstance(source, EmbeddedSource) and source.find(options) for source in card.sources)
    ]
    return f"Presets in the cache: {', '.join(names) or 'none'} ({cache_root(options.cache_dir)})."


def _source_at(address: str, options: Options) -> Source:
    """The source that an address means. Raises InputError where options ask for a revision that it cannot have."""
    source = source_of(address)
    if options.revision and isinstance(source, HttpsSource):  # the others say what their revisions look like
        shown = _shown(address, source)
        raise InputError(f"revision={options.revision!r} was given, but {shown} has no revisions; leave it out")
    if options.revision and source.revision and options.revision != source.revision:
        raise InputError(
            f"{address} asks for one revision and revision={options.revision!r} for another; give one of them"
        )
    return source


def _shown(address: str, source: Source) -> str:
    """An address in messages and names; the query of a web server's may be a signature that opens the file."""
    return source.address(Path()) if isinstance(source, HttpsSource) else address


def _as_path(text: str) -> Path | None:
    """The file or folder that `text` means by rules 2 and 3; None: it can only be a name of the registry."""
    if not text:
        raise PresetNotFound(f"the name of the preset is empty; give {_KINDS}")
    explicit = text.startswith(("~", ".")) or any(mark in text for mark in ("/", "\\")) or _is_gguf(text)
    path = os.path.expanduser(text)
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
    if _REPOSITORY.fullmatch(text):
        hints.append(f"For the repository on the Hugging Face Hub write hf://{text}.")
    return " ".join([f"{text!r} does not exist; give {_KINDS}.", *hints])


def _near_files(path: Path) -> list[str]:
    folder = path.parent
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [str(folder / name) for name in difflib.get_close_matches(path.name, names, n=2)]


def _find_card(name: str) -> "Card":
    from modelhub.hub.registry import find_card

    try:
        return find_card(name)
    except PresetNotFound as error:
        near = [file for file in _near_files(Path(name)) if Path(file).is_dir() or _is_gguf(file)]
        hint = f". Here there is {' and '.join(near)}" if near else ""
        raise PresetNotFound(f"{error}{hint}") from None
