"""Text of users and strangers in Markdown: shown as it is, never taken for markup."""

import json
import re
import unicodedata
from collections.abc import Iterable

# Harmless in the middle of a line: letters, digits, space, ".,;/%?-", an underscore inside a word.
_SPECIAL = re.compile(r"[^\w .,;/%?-]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.", re.IGNORECASE)
_SAFE_CODE = re.compile(r"[\w .,:;/@+=%()\[\]{}'\"*#?^~…-]+")


def clean(text: str, most: int) -> str:
    """One line of visible characters, cut."""
    seen = ""
    for char in text[: 2 * most]:
        kind = unicodedata.category(char)
        if kind == "Cc" or kind[0] == "Z":  # control characters, all kinds of space
            seen += " "
        elif kind[0] != "C":  # what turns the direction of writing, halves of characters
            seen += char
    line = " ".join(seen.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def escaped(text: str, most: int = 200) -> str:
    """As entities, where needed: those are never taken for structure, as backslashes may be."""
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};" if found[0].isascii() else found[0], clean(text, most))


def code(value: object, most: int = 200) -> str:
    """A name or a JSON value: as code, or escaped where that is not safe."""
    text = clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), most)
    return f"`{text}`" if _SAFE_CODE.fullmatch(text) else escaped(text, most)


def literal(text: str) -> str:
    """As a string of Python."""
    return json.dumps(clean(text, 1000), ensure_ascii=False)


def fenced(lines: Iterable[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in [head, ("---", "---"), *rows])
