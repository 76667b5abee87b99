"""Tools for a chat template: JSON schemas as they are, Python functions turned into the schema that transformers makes.

A function's type hints give the types, its docstring in Google's style the descriptions.
"""

import contextlib
import inspect
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from modelhub.errors import InputError

_SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_KINDS = {**_SCALARS, list: "array", tuple: "array", dict: "object"}
_SECTIONS = ("Args:", "Returns:", "Raises:")


def tool_schemas(tools: Iterable[Mapping[str, Any] | Callable[..., Any]]) -> list[dict[str, Any]]:
    """The schema of each tool. Raises InputError for what is neither a schema nor a function that tells its own."""
    if isinstance(tools, str | Mapping) or callable(tools) or not isinstance(tools, Iterable):
        raise InputError(f"tools must be a list of JSON schemas or functions, got {tools!r:.200}")
    found = []
    for number, tool in enumerate(tools):
        if isinstance(tool, Mapping):
            found.append(dict(tool))
        elif inspect.isfunction(tool) or inspect.ismethod(tool):
            found.append(function_schema(tool))
        else:
            raise InputError(f"tool {number} must be a JSON schema (a dict) or a function, got {tool!r:.200}")
    return found


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "description", "parameters"}}, as transformers' get_json_schema has it.

    Raises InputError where hints or descriptions are missing, or a hint means nothing in JSON.
    """
    name = getattr(function, "__name__", "operation")
    doc = (inspect.getdoc(function) or "").strip()
    if not doc:
        raise InputError(f"the tool {name} has no docstring: say what it does, and each argument under Args:")
    try:
        hints = get_type_hints(function)
    except Exception as error:  # a hint may be any expression
        raise InputError(f"the type hints of the tool {name} cannot be read: {error}") from None
    parameters = dict(inspect.signature(function).parameters)
    first = next(iter(parameters), None)
    if first in ("self", "cls") and parameters[first].annotation is inspect.Parameter.empty:
        del parameters[first]
    if bare := [key for key in parameters if key not in hints]:
        raise InputError(f"the tool {name} has no type hint for {', '.join(bare)}")
    description, described, returns = _read_docstring(doc)
    properties: dict[str, Any] = {}
    for key in (key for key in hints if key in parameters):
        if key not in described:
            raise InputError(f"the docstring of the tool {name} does not describe {key}: add it under Args:")
        properties[key] = _described(_schema(hints[key], f"{key} of the tool {name}"), described[key], name)
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required := [key for key, one in parameters.items() if one.default is inspect.Parameter.empty]:
        schema["required"] = required
    found = {"name": name, "description": description, "parameters": schema}
    if "return" in hints:
        with contextlib.suppress(InputError):  # nobody writes what a tool returns but the tool
            found["return"] = _schema(hints["return"], "") | ({} if returns is None else {"description": returns})
    return {"type": "function", "function": found}


def _described(schema: dict[str, Any], text: str, name: str) -> dict[str, Any]:
    """With its description, at whose end (choices: ["a", "b"]) says all there is to choose from."""
    if choices := re.search(r"\(choices:\s*(.*?)\)\s*$", text, re.IGNORECASE):
        try:
            values = json.loads(choices[1])
        except ValueError:
            raise InputError(f"the docstring of the tool {name}: {choices[0]!r} must hold a JSON list") from None
        schema["enum"] = [value.strip() if isinstance(value, str) else value for value in values]
        text = text[: choices.start()].strip()
    return schema | {"description": text}


def _schema(hint: Any, where: str) -> dict[str, Any]:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _one_of([member.value for member in hint], where)
    if origin is Literal:
        return _one_of(list(args), where)
    if origin is Union or origin is types.UnionType:
        return _union(args, where)
    kind = _KINDS.get(origin or hint)
    if kind is None or (origin is tuple and (... in args or len(args) == 1)):
        raise InputError(
            f"{where}: the type hint {hint!r} has no JSON schema; take int, float, str, bool, list, dict, tuples of "
            "several, unions of these, Literal or Enum, or give the schema itself in place of the function"
        )
    if origin is list and args:
        return {"type": kind, "items": _schema(args[0], where)}
    if origin is tuple and args:
        return {"type": kind, "prefixItems": [_schema(arg, where) for arg in args]}
    if origin is dict and len(args) == 2:
        return {"type": kind, "additionalProperties": _schema(args[1], where)}
    return {"type": kind}


def _one_of(values: list[Any], where: str) -> dict[str, Any]:
    kinds = list(dict.fromkeys(_SCALARS.get(type(value), "") for value in values))
    if not values or "" in kinds:
        raise InputError(
            f"{where}: the choices {values!r:.200} must be numbers, texts, True, False or None, one at least"
        )
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _union(args: tuple[Any, ...], where: str) -> dict[str, Any]:
    parts = [_schema(arg, where) for arg in args if arg is not type(None)]
    found: dict[str, Any]
    if len(parts) == 1:
        found = parts[0]
    elif all(part.keys() == {"type"} and isinstance(part["type"], str) for part in parts):
        kinds = sorted({part["type"] for part in parts})
        found = {"type": kinds[0] if len(kinds) == 1 else kinds}
    else:
        found = {"anyOf": parts}
    return found | {"nullable": True} if type(None) in args else found


def _read_docstring(doc: str) -> tuple[str, dict[str, str], str | None]:
    """What it says of the function, of each argument, and of what is returned; None: nothing."""
    sections: dict[str, list[str]] = {"": []}
    current = ""
    for line in doc.splitlines():
        if line.strip() in _SECTIONS and line.strip() not in sections:
            current = line.strip()
            sections[current] = []
        else:
            sections[current].append(line)
    described: dict[str, str] = {}
    lines = [line for line in sections.get("Args:", []) if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    key = ""
    for line in lines:
        begun = re.fullmatch(r"(\w+):\s*(.*)", line.strip())
        if begun and len(line) - len(line.lstrip()) == indent:
            key, text = begun.groups()
            described[key] = text
        elif key:
            described[key] = f"{described[key]} {line.strip()}".strip()
    returns = "\n".join(sections["Returns:"]).strip() if "Returns:" in sections else None
    return "\n".join(sections[""]).strip(), described, returns
