"""A user's data, from files, lists and datasets, as records of a few known kinds."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelhub.errors import DataError
from modelhub.processing.chat_template import ROLES

# The fields of each kind and what we call them, in the order of recognition: Alpaca's rows often carry a `text` too.
KINDS = {
    "dolly": {"instruction": "instruction", "context": "context", "response": "response"},
    "alpaca": {"instruction": "instruction", "input": "context", "output": "response"},
    "messages": {"messages": "messages"},
    "prompt": {"prompt": "prompt", "completion": "response"},
    "text": {"text": "text"},
}
OPTIONAL = ("context", "input")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}
SHOWN = 5  # wrong rows that one error tells of


@dataclass(frozen=True, slots=True)
class Record:
    """One row. where: the place it came from, for errors.

    fields, all str: instruction, context ("" if there is none) and response for the kinds dolly and alpaca; prompt and
    response; text. For the kind messages: {"messages": [{"role": ..., "content": ...}, ...]}.
    """

    kind: str
    fields: dict[str, Any]
    where: str


def read_records(data: Any, kind: str | None = None) -> list[Record]:
    """Every row of the data, checked.

    data: a path to a .jsonl, .json, .csv or .parquet file, or rows: any iterable of str or dicts, such as a list, a
    Hugging Face Dataset, or a pandas DataFrame. kind: a name in KINDS; None: recognised from the first row's keys.
    Keys that the kind does not have are ignored.

    Raises DataError with the places of the rows that do not fit.
    """
    if kind is not None and kind not in KINDS:
        raise DataError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    records: list[Record] = []
    problems: list[str] = []
    for where, row in rows_of(data):
        kind = kind or _recognise(row, where)
        try:
            records.append(Record(kind, _fields(row, kind), where))
        except DataError as error:
            problems.append(f"{where}: {error}")
    if problems:
        more = f"\nand {len(problems) - SHOWN} more rows" if len(problems) > SHOWN else ""
        raise DataError("\n".join(problems[:SHOWN]) + more)
    if not records:
        raise DataError(f"{data if isinstance(data, str | Path) else 'the data'} holds no rows")
    return records


def rows_of(data: Any) -> Iterator[tuple[str, Any]]:
    """(where it is, row) of each row."""
    if isinstance(data, str | Path):
        yield from _read_file(Path(data))
        return
    if isinstance(data, Mapping):
        raise DataError(
            f"the data is a dict with the keys {_shown(data)}; give a list of rows, or of a DatasetDict one split: "
            f'data["train"]'
        )
    if hasattr(data, "iterrows"):  # iterating a DataFrame would give the names of its columns
        data = data.to_dict("records")
    if not isinstance(data, Iterable):
        raise DataError(f"the data is a {type(data).__name__}; give a path, a list of str or dicts, or a Dataset")
    for number, row in enumerate(data, 1):
        yield f"row {number}", row


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise DataError(
            f"{path!s:.200}: cannot tell the format from the extension {path.suffix!r}; known: {', '.join(readers)}. "
            f"Texts themselves go in a list"
        )
    if not path.is_file():
        raise DataError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        yield from readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from None


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        for line_number, line in enumerate(file, 1):
            if line.strip():
                number += 1
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path} is not valid JSON on line {line_number}: {error}") from None
                yield f"{path}, row {number} (line {line_number})", row


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig") or "[]")
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise DataError(f"{path} is not valid JSON on line {error.lineno}: {error}") from None
        yield from _read_jsonl(path)  # one object a line: .jsonl under another name
        return
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a list of rows, found {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for number, row in enumerate(reader, 1):
                where = f"{path}, row {number} (line {reader.line_num})"
                if None in row:
                    raise DataError(f"{where} has more cells than the header has names; quote cells that hold commas")
                yield where, row
        except csv.Error as error:
            raise DataError(f"{path} is not valid CSV near line {reader.line_num}: {error}") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(1024)  # not the whole table beside its rows
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield f"{path}, row {number}", row
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not a Parquet file that pyarrow reads: {error}") from None


def _recognise(row: Any, where: str) -> str:
    if isinstance(row, str):
        return "text"
    if isinstance(row, Mapping):
        found = {key for key, value in row.items() if value is not None}
        if "conversations" in found:
            return "messages"
        for kind, names in KINDS.items():
            if found.issuperset(set(names).difference(OPTIONAL)):
                return kind
        if "input_ids" in found:
            raise DataError(f"{where} holds ready token ids among records; ready batches have them in every item")
    needed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in KINDS.items())
    raise DataError(
        f"{where} is of no known kind, it has {_shown(row)}. The kinds and their keys are: {needed} (or conversations "
        f"for messages; {' and '.join(OPTIONAL)} may be missing). Rename the keys, or give kind= to see what is missing"
    )


def _fields(row: Any, kind: str) -> dict[str, Any]:
    if isinstance(row, str) and kind == "text":
        return {"text": row}
    if not isinstance(row, Mapping):
        raise DataError(f"a row of the kind {kind} must be a dict, found {type(row).__name__}: {row!r:.80}")
    if kind == "messages":
        return {"messages": _messages(row)}
    given = {key: row.get(key) for key in KINDS[kind]}
    missing = [key for key, value in given.items() if value is None and key not in OPTIONAL]
    if missing:
        raise DataError(f"{' and '.join(missing)} missing for the kind {kind}; it has {_shown(row)}")
    for key, value in given.items():
        if not isinstance(value, str | None):
            raise DataError(f"{key} must be text, found {type(value).__name__}: {value!r:.80}")
    return {KINDS[kind][key]: value or "" for key, value in given.items()}


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation as chat templates take it. Datasets fill keys that a message does not have with None."""
    turns = row.get("messages") if row.get("messages") is not None else row.get("conversations")
    if turns is None:
        raise DataError(f"messages (or conversations) missing; it has {_shown(row)}")
    if isinstance(turns, str | Mapping) or not isinstance(turns, Iterable):
        raise DataError(f"messages must be a list of messages, found {type(turns).__name__}: {turns!r:.80}")
    if row.get("tools"):
        raise DataError("it has tools, which training does not render; remove them or the row")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise DataError(f"message {number} must be a dict, found {type(turn).__name__}: {turn!r:.80}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            known = ", ".join((*ROLES, *SHAREGPT_ROLES))
            raise DataError(f"message {number} has the role {role!r} (its keys: {_shown(turn)}); known: {known}")
        if not isinstance(content, str | list) and not turn.get("tool_calls"):
            raise DataError(
                f"message {number}: content must be text, found {type(content).__name__}; it has {_shown(turn)}"
            )
        rest = {key: value for key, value in turn.items() if key not in ("from", "value") and value is not None}
        messages.append({**rest, "role": role, "content": content})
    if not messages:
        raise DataError("messages is empty")
    return messages


def _shown(row: Any) -> str:
    if isinstance(row, Mapping):
        return ", ".join(map(str, list(row)[:20])) or "no keys"
    return f"{type(row).__name__}: {row!r:.80}"
