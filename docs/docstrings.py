"""Docstrings as the API reference shows them: of lines "name: what it is" a list, of indented tables a block."""

import re

import griffe

_DUNDER = re.compile(r"(?<!`)__\w+__(?!`)")
_ITEM = re.compile(r"^( *)((?:\w+(?:\(\))?)(?:, \w+)*): (?=\S)")


def listed(text: str) -> str:
    """The docstring as Markdown. An indented line belongs to the item above it."""
    lines: list[str] = []
    inside = table = False
    for line in text.splitlines():
        table = line.startswith("    ") and (table or (not inside and bool(lines) and lines[-1].endswith(":")))
        if table:
            lines += [line] if lines[-1].startswith("    ") else ["", line]
            continue
        if line and lines and lines[-1].startswith("    "):
            lines.append("")
        line = _DUNDER.sub(lambda found: f"`{found[0]}`", line)
        if match := _ITEM.match(line):
            names = ", ".join(f"`{name}`" for name in match[2].split(", "))
            if not inside and lines and lines[-1]:
                lines.append("")
            lines.append(f"- {names}: {line[match.end() :].strip()}")
            inside = True
        elif inside and line.strip() and not line.startswith("Raises"):
            lines.append(f"  {line.strip()}")
        else:
            if inside and line.startswith("Raises"):
                lines.append("")
            inside = False
            lines.append(line)
    return "\n".join(lines)


class Listed(griffe.Extension):
    """Run by mkdocstrings on everything that it reads."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.is_attribute and "property" not in obj.labels:
            obj.docstring = None  # it is that of the value's type
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)
