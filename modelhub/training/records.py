"""A user's data, from files, lists, tables and datasets, as records of a few known kinds."""

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modelhub.errors import DataError
from modelhub.processing.chat_template import ROLES
from modelhub.training.missing import is_missing, present
from modelhub.training.rows import rows_of, shown

# The fields of each kind and what we call them, in the order of recognition: Alpaca's rows often carry a `text` too.
KINDS = {
    "dolly": {"instruction": "instruction", "context": "context", "response": "response"},
    "alpaca": {"instruction": "instruction", "input": "context", "output": "response"},
    "messages": {"messages": "messages"},
    "prompt": {"prompt": "prompt", "completion": "response"},
    "text": {"text": "text"},
}
OPTIONAL = ("context", "input")
# Other names for the keys of a kind, where a row has them and not the kind's own.
ALSO = {"dolly": {"instruction": "question", "response": "answer"}, "messages": {"messages": "conversations"}}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}
SHOWN = 5  # wrong rows that one error tells of

OnError = Literal["raise", "skip"]


@dataclass(frozen=True, slots=True)
class Record:
    """One row. where: the place it came from, for errors.

    fields, all str: instruction, context ("" if there is none) and response for the kinds dolly and alpaca; prompt and
    response; text. For the kind messages: {"messages": [{"role": ..., "content": ...}, ...]}, perhaps prompt_messages,
    the number of those that are a prompt, in which nothing is learnt, and tools, a list of JSON schemas.
    """

    kind: str
    fields: dict[str, Any]
    where: str


def read_records(data: Any, kind: str | None = None, on_error: OnError = "raise") -> list[Record]:
    """Every row of the data, checked.

    data: a path to a .jsonl, .json, .csv, .tsv or .parquet file, or rows: any iterable of str or dicts, such as a list,
    a Hugging Face Dataset, a pandas or polars DataFrame, or an Arrow table. kind: a name in KINDS; None: recognised
    from the first row's keys. Keys that the kind does not have are ignored; a missing value (None, NaN, pandas' NA) is
    as good as no key, at every depth. on_error: "skip" leaves rows out that do not fit, with one warning for all.

    Raises DataError with the places of the rows that do not fit.
    """
    return read_all(data, kind, on_error)[0]


def read_all(data: Any, kind: str | None = None, on_error: OnError = "raise") -> tuple[list[Record], int]:
    """`read_records`, and how many rows were skipped."""
    if kind is not None and kind not in KINDS:
        raise DataError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if on_error not in ("raise", "skip"):
        raise DataError(f"on_error is 'raise' or 'skip', not {on_error!r}")
    skips = on_error == "skip"
    records: list[Record] = []
    problems: list[str] = []
    for where, row in rows_of(data, problems.append if skips else None):
        try:
            kind = kind or _recognise(row, where)
        except DataError as error:
            if not skips:
                raise
            problems.append(str(error))
            continue
        try:
            fields = _fields(row, kind)
            records.append(Record("messages" if "messages" in fields else kind, fields, where))
        except DataError as error:
            problems.append(f"{where}: {error}")
    named = data if isinstance(data, str | Path) else "the data"
    if problems:
        more = f"\nand {len(problems) - SHOWN} more rows" if len(problems) > SHOWN else ""
        told = "\n".join(problems[:SHOWN]) + more
        if not skips:
            raise DataError(told)
        if not records:
            raise DataError(f"none of the {len(problems)} rows of {named} can be used:\n{told}")
        warnings.warn(
            f"skipped {len(problems)} of {len(problems) + len(records)} rows of {named}:\n{told}", stacklevel=3
        )
    if not records:
        raise DataError(f"{named} holds no rows")
    return records, len(problems)


def _recognise(row: Any, where: str) -> str:
    if isinstance(row, str):
        return "text"
    if isinstance(row, Mapping):
        with_value = {key for key, value in row.items() if not is_missing(value)}
        if "input_ids" in with_value and not any(map(with_value.__contains__, ("text", "prompt", "messages"))):
            raise DataError(f"{where} holds ready token ids among records; ready batches have them in every item")
        for found in (with_value, set(row)):  # the latter: the error then says which value is missing
            if kind := _kind_of(found):
                return kind
            if {"chosen", "rejected"} <= found:
                raise DataError(
                    f"{where} holds preferences (chosen, rejected). Training on preferences, such as DPO, is not "
                    f"offered yet: it takes an objective of its own. To learn the chosen answers alone, rename chosen "
                    f"to completion, or to messages where it is a whole conversation"
                )
    if is_missing(row):
        raise DataError(f"{where} is missing: it is {row!r}")
    needed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in KINDS.items())
    raise DataError(
        f"{where} is of no known kind, it has {shown(row)}. The kinds and their keys are: {needed} (or conversations "
        f"for messages, question and answer for dolly; {' and '.join(OPTIONAL)} may be missing). Rename the keys, or "
        f"give kind= to see what is missing"
    )


def _kind_of(found: set[str]) -> str | None:
    if "conversations" in found:
        return "messages"
    for kind, names in KINDS.items():
        also = ALSO.get(kind, {})
        if all(key in found or also.get(key) in found for key in names if key not in OPTIONAL):
            return kind
    return None


def _fields(row: Any, kind: str) -> dict[str, Any]:
    if isinstance(row, str) and kind == "text":
        return {"text": _text(row, "text")}
    if is_missing(row):
        raise DataError(f"it is missing: {row!r}")
    if not isinstance(row, Mapping):
        raise DataError(f"a row of the kind {kind} must be a dict, found {type(row).__name__}: {row!r:.80}")
    if kind == "messages":
        return {"messages": _messages(row)} | _tools(row)
    also = ALSO.get(kind, {})
    given = {key: row.get(key) for key in KINDS[kind]}
    given |= {key: row.get(also[key]) for key in also if is_missing(given[key])}
    given = {key: present(value) for key, value in given.items()}
    missing = [key for key, value in given.items() if value is None and key not in OPTIONAL]
    if missing:
        raise DataError(f"{' and '.join(missing)} missing for the kind {kind}; it has {shown(row)}")
    if kind == "prompt" and any(isinstance(value, list) for value in given.values()):
        return _conversational(given, row)
    for key, value in given.items():
        if not isinstance(value, str | None):
            raise DataError(f"{key} must be text, found {type(value).__name__}: {value!r:.80}")
    return {KINDS[kind][key]: _text(value or "", key) for key, value in given.items()}


def _conversational(given: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt and a completion that are lists of messages, as TRL has them."""
    if not all(isinstance(value, list) and value for value in given.values()):
        found = ", ".join(f"{key} is {value!r:.80}" for key, value in given.items())
        raise DataError(f"prompt and completion must both be texts, or both lists of messages; {found}")
    messages = _messages({**row, "messages": [*given["prompt"], *given["completion"]]})
    return {"messages": messages, "prompt_messages": len(given["prompt"])} | _tools(row)


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation as chat templates take it, without what is missing in it; an answer's content stays, as None:
    templates ask for it where there are calls of tools."""
    turns = row.get("messages") if not is_missing(row.get("messages")) else row.get("conversations")
    turns = present(turns)
    if turns is None:
        raise DataError(f"messages (or conversations) missing; it has {shown(row)}")
    if isinstance(turns, str | Mapping) or not isinstance(turns, Iterable):
        raise DataError(f"messages must be a list of messages, found {type(turns).__name__}: {turns!r:.80}")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise DataError(f"message {number} must be a dict, found {type(turn).__name__}: {turn!r:.80}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            known = ", ".join((*ROLES, *SHAREGPT_ROLES))
            raise DataError(f"message {number} has the role {role!r} (its keys: {shown(turn)}); known: {known}")
        if not isinstance(content, str | list) and not turn.get("tool_calls"):
            raise DataError(
                f"message {number}: content must be text, found {type(content).__name__}; it has {shown(turn)}"
            )
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        _text(rest | {"content": content}, f"message {number}")
        messages.append({**rest, "role": role, "content": content})
    if not messages:
        raise DataError("messages is empty")
    return messages


def _text(value: Any, what: str) -> Any:
    """The same, where every text in it is one. Raises DataError for half surrogates, which JSON can write."""
    if isinstance(value, Mapping):
        value = {_text(key, what): _text(item, what) for key, item in value.items()}
    elif isinstance(value, list):
        value = [_text(item, what) for item in value]
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{what} has half of a surrogate pair, {value[error.start]!a}, at character {error.start + 1}, which "
                f"is no text: correct or remove it"
            ) from None
    return value


def _tools(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{"tools": the JSON schemas of what may be called in a conversation}, which many datasets have as text; or {}."""
    tools = present(row.get("tools"))
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "[]")
        except ValueError as error:
            raise DataError(f"tools is not valid JSON: {error}") from None
    tools = [] if tools is None else tools
    if isinstance(tools, Mapping) or not isinstance(tools, Iterable) or not all(isinstance(t, Mapping) for t in tools):
        raise DataError(f"tools must be a list of JSON schemas, found {type(tools).__name__}: {tools!r:.80}")
    return {"tools": list(_text(tools, "tools"))} if tools else {}
