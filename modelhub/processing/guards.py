"""Bounds on what a stranger's files and tokenizer may do: to the libraries that read it, to memory, and to a text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelhub.errors import ModelhubError, TokenizerError

# Bytes. Gemma's tokenizer.json has 33 million; in memory JSON can take 30 times as much as on disk.
LARGEST_TOKENIZER = 64_000_000
LARGEST_CONFIG = 10_000_000
LARGEST_ID = 1 << 24
LARGEST_GROWTH = 10_000

# How many characters one character can become. Unicode's longest: U+FDFA, which NFKC writes as 18.
_GROWTH = {
    "NFD": 4,
    "NFC": 3,
    "NFKD": 18,
    "NFKC": 18,
    "Precompiled": 18,
    "BertNormalizer": 4,
    "ByteLevel": 4,
    "Metaspace": 2,
}


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Whatever a tokenizer makes the libraries raise, as TokenizerError."""
    try:
        yield
    except (TokenizerError, MemoryError):
        raise
    except BaseException as error:  # the tokenizers library raises bare Exceptions, and Rust's panics are not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {error!r:.1000}. Download the tokenizer again.") from error


def check_size(path: Path, most: int, kind: type[ModelhubError] = TokenizerError) -> None:
    """Raises an error of that kind for a file that is larger."""
    if path.is_file() and (size := path.stat().st_size) > most:
        raise kind(f"{path} has {size} bytes; a tokenizer's or processor's file of this kind has {most} at most.")


def read_json(path: Path, kind: type[ModelhubError] = TokenizerError) -> dict[str, Any]:
    """The object in a config file. Raises an error of that kind for one of over 10 MB, and for anything else."""
    check_size(path, LARGEST_CONFIG, kind)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise kind(f"{path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise kind(f"{path} cannot be read as JSON: it is not valid JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise kind(f"{path} holds {type(content).__name__}, not an object. Download it again.")
    return content


def check_growth(*parts: Mapping[str, Any] | None) -> None:
    """Raises TokenizerError for steps, as tokenizer.json spells them, that together make a text LARGEST_GROWTH times
    as long: fifty that double it would fill any memory.
    """
    growth = math.prod(_growth(part) for part in parts if part)
    if growth > LARGEST_GROWTH:
        raise TokenizerError(
            f"The steps of tokenizer.json can make a text more than {LARGEST_GROWTH} times as long, which no tokenizer "
            "needs. Do not use it unless you know who made it."
        )


def _growth(part: Mapping[str, Any]) -> int:
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in part:
            return math.prod(map(_growth, part[key]))
    if part["type"] == "Replace":  # an expression can match between any two characters
        return len(part["content"]) + ("Regex" in part["pattern"]) or 1
    if part["type"] == "Prepend":
        return len(part["prepend"]) + 1
    return _GROWTH.get(part["type"], 1)
