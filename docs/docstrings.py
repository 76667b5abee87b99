"""Of a docstring's lines "name: what it is" a list, as the API reference shows them."""

import re

import griffe

_ITEM = re.compile(r"^( *)((?:\w+(?:\(\))?)(?:, \w+)*): (?=\S)")


def listed(text: str) -> str:
    """The docstring as Markdown. An indented line belongs to the item above it."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
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
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)
