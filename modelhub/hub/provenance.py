"""Where a model comes from and what was done to it; kept in its folder as modelhub.json.

{"base": "hf://owner/name@commit", "base_model": "owner/name", "licence": "gemma", "base_licence": null,
 "from_scratch": false, "layers": [], "attention": null, "labels": [],
 "runs": [{"data": "dolly_style.jsonl", "settings": {...}, "metrics": {"loss": 2.1}, "losses": [[1, 3.4], ...],
           "adapter": {"rank": 8, ...}, "examples": 250, "tokens": 31415, "seconds": 60.5, "backend": "jax",
           "date": "2025-01-31T12:00:00+00:00"}]}
"""

import dataclasses
import json
import math
import numbers
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modelhub.errors import CheckpointError
from modelhub.hub.checkpoint import shown

FILE = "modelhub.json"
PRESET = "modelhub:"  # in a base, before the name of a preset whose files come with modelhub or from the package index
_CARD = "README.md"
_LARGEST = 1_000_000  # bytes of modelhub.json
_LARGEST_HEADER = 100_000  # bytes of a card's front matter; the library reads 60 kB of YAML a second
_POINTS = 200
_ENTRIES = 100  # of a table of settings
_LONGEST_ENTRY = 1_000  # characters
_LONGEST_TEXT = 2_000
_HEADER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_REPO = re.compile(r"\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b", re.ASCII)


@dataclass(frozen=True)
class TrainingRun:
    """One call of fit that came to an end.

    data: its name. settings: JSON values. metrics: the last values, by name; those on validation data begin with val_.
    losses: (step, loss per token). adapter: what was trained of it (rank, alpha, targets, ...); None: weights.
    seconds: the steps took. date: of the end, ISO 8601. part: which weights were trained besides, "all", "head" or
    None, and trained: how many parameters that were, the adapter's included; None: written before this was noted.

    What JSON cannot hold becomes text, numbers that are not finite or make no sense are left out, losses are thinned to
    200 points, and what is long is cut.
    """

    data: str
    settings: dict[str, Any]
    metrics: dict[str, float]
    losses: list[tuple[int, float]]
    adapter: dict[str, Any] | None
    examples: int | None
    tokens: int | None
    seconds: float | None
    backend: str
    date: str
    part: str | None = None
    trained: int | None = None

    def __post_init__(self) -> None:
        points = [(int(step), float(loss)) for step, loss in self.losses]
        losses = [(step, loss) for step, loss in points if _is_count(step) and _is_number(loss)]
        kept = min(len(losses), _POINTS)  # the first and the last are among them
        chosen = [losses[i * (len(losses) - 1) // max(kept - 1, 1)] for i in range(kept)]
        numbers = {name: float(value) for name, value in self.metrics.items()}
        clean: dict[str, Any] = {
            "settings": _settings(self.settings), "losses": chosen, "adapter": self.adapter and _settings(self.adapter),
            "metrics": {name: value for name, value in numbers.items() if _is_number(value)},
            "seconds": None if self.seconds is None else float(self.seconds),
        }  # fmt: skip
        clean |= {name: getattr(self, name)[:_LONGEST_TEXT] for name in ("data", "backend", "date")}
        for name in ("examples", "tokens", "trained"):
            count = getattr(self, name)
            clean[name] = None if count is None else int(count)
        clean |= {name: None for name in ("examples", "tokens", "trained", "seconds") if not _RUN[name](clean[name])}
        for name, value in clean.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen


@dataclass(frozen=True)
class Provenance:
    """base: address of what the model was made from (hf://owner/name@revision, kaggle://..., pypi:...).

    base_model: the repository on the Hugging Face Hub, where known. licence: identifier as the Hub spells it.
    from_scratch: the weights began random. runs: in order of time. base_licence: whose terms follow the weights, where
    `licence` is another. layers: (pattern, name) of layers of the user's own in the model that an adapter is for;
    attention: the name of the attention function that it was trained with, if that was the user's own. labels: of the
    classes of an adapter's own head.
    """

    base: str | None = None
    base_model: str | None = None
    licence: str | None = None
    from_scratch: bool = False
    runs: tuple[TrainingRun, ...] = ()
    base_licence: str | None = None
    layers: tuple[tuple[str, str], ...] = ()
    attention: str | None = None
    labels: tuple[str, ...] = ()

    def with_run(self, run: TrainingRun) -> "Provenance":
        return dataclasses.replace(self, runs=(*self.runs, run))


def read_provenance(folder: Path) -> Provenance | None:
    """What modelhub.json says; without one, licence and base_model from the front matter of README.md.

    None where there is neither, or a README.md that says nothing of it: those are written by others. Raises
    CheckpointError for a modelhub.json that is damaged.
    """
    own, card = folder / FILE, folder / _CARD
    if own.is_file():
        return _parse(own, _read(own, _LARGEST + 1))
    return _from_card(_read(card, _LARGEST_HEADER)) if card.is_file() else None


def write_provenance(folder: Path, provenance: Provenance) -> None:
    """Write modelhub.json. Where it would be over 1 MB, the oldest runs are left out; texts end after 2,000 characters.

    Raises OSError.
    """
    texts = {name: getattr(provenance, name) for name in ("base", "base_model", "licence", "base_licence")}
    provenance = dataclasses.replace(
        provenance, **{name: text and text[:_LONGEST_TEXT] for name, text in texts.items()}
    )
    runs = provenance.runs
    while len(text := _as_json(dataclasses.replace(provenance, runs=runs))) > _LARGEST and runs:
        runs = runs[max(1, len(runs) // 10) :]
    (folder / FILE).write_text(text, encoding="ascii")


def is_repo_id(text: str) -> bool:
    """Whether text is owner/name, as the Hub allows it (huggingface_hub has the rule, and takes long to import)."""
    return bool(_REPO.fullmatch(text)) and "--" not in text and ".." not in text and not text.endswith(".git")


# --- modelhub.json --------------------------------------------------------------------------------------------------


def _as_json(provenance: Provenance) -> str:
    return json.dumps(dataclasses.asdict(provenance), indent=1, allow_nan=False) + "\n"


def _settings(table: dict[str, Any]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in list(table.items())[:_ENTRIES]:
        value = _json_value(value)
        text = value if isinstance(value, str) else json.dumps(value)
        entries[str(name)[:200]] = value if len(text) <= _LONGEST_ENTRY else text[: _LONGEST_ENTRY - 4] + " ..."
    return entries


def _json_value(value: Any, depth: int = 0) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):  # numpy's, too
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, dict | list | tuple) and depth == 5:
        return "..."
    if isinstance(value, dict):
        return {str(key): _json_value(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item, depth + 1) for item in value]
    return str(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # type: ignore[arg-type]  # False for NaN, too


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _is_metrics(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_curve(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(point, list) and len(point) == 2 and _is_count(point[0]) and _is_number(point[1]) for point in value
    )


def _is_layers(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_text, pair)) for pair in value
    )


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _or_none(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


_RUN: dict[str, Callable[[object], bool]] = {
    "data": _is_text, "settings": _is_table, "metrics": _is_metrics, "losses": _is_curve,
    "adapter": _or_none(_is_table), "examples": _or_none(_is_count), "tokens": _or_none(_is_count),
    "seconds": _or_none(_is_number), "backend": _is_text, "date": _is_text,
    "part": _or_none(_is_text), "trained": _or_none(_is_count),
}  # fmt: skip
_WHOLE: dict[str, Callable[[object], bool]] = {
    "base": _or_none(_is_text), "base_model": _or_none(_is_text), "licence": _or_none(_is_text),
    "base_licence": _or_none(_is_text), "from_scratch": lambda value: isinstance(value, bool),
    "layers": _or_none(_is_layers), "attention": _or_none(_is_text), "labels": _or_none(_is_texts),
}  # fmt: skip


def _parse(path: Path, raw: bytes) -> Provenance:
    advice = "Take the file from where the model came from, or remove it"
    if len(raw) > _LARGEST:
        raise CheckpointError(f"{path} is damaged: expected at most {_LARGEST} bytes. {advice}")
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({shown(str(error))}). {advice}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} is damaged: expected a JSON object, found {shown(parsed)}. {advice}")
    problems: list[str] = []
    facts = _take(parsed, _WHOLE, "", problems)
    runs = parsed.get("runs", [])
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        problems.append(f"runs is {shown(runs)}")
        runs = []
    tables = [_take(run, _RUN, f"runs[{i}].", problems) for i, run in enumerate(runs)]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{path} is damaged: {'; '.join(problems[:5])}{more}. {advice}")
    facts["labels"] = tuple(facts["labels"] or ())
    facts["layers"] = tuple((pattern, name) for pattern, name in facts["layers"] or ())
    return Provenance(**facts, runs=tuple(TrainingRun(**table) for table in tables))


def _take(table: dict[str, Any], checks: dict[str, Callable[[object], bool]], where: str, problems: list[str]) -> Any:
    """Only the known keys: a later version may have more."""
    values = {name: table.get(name, False if name == "from_scratch" else None) for name in checks}
    problems += [f"{where}{name} is {shown(value)}" for name, value in values.items() if not checks[name](value)]
    return values


# --- front matter ---------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Without aliases: a few lines of them can stand for more nodes than there is memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def _from_card(raw: bytes) -> Provenance | None:
    match = _HEADER.match(raw.decode("utf-8-sig", errors="replace"))
    try:
        data = yaml.load(match[1], _Loader) if match else None
    except Exception:  # scalars that do not fit their tags raise anything: KeyError, AttributeError, ...
        data = None
    if not isinstance(data, dict):
        return None
    licence, base_model = _only(data.get("license")), _only(data.get("base_model"))
    if licence == "other":
        licence = _only(data.get("license_name"))
    if base_model and not is_repo_id(base_model):
        base_model = None  # trainers put paths of their machines here
    return Provenance(base_model=base_model, licence=licence) if licence or base_model else None


def _only(value: object) -> str | None:
    """A text, or the only one of a list. With several base models it is a merge, and none of them is the base."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) and 0 < len(value) <= 200 else None


def _read(path: Path, most: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(most)
