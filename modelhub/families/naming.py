"""Two-way tables between the names of a file format and ours. Ours are Hugging Face's, so most tables are short."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Via:
    """A change of values that goes with a change of name, and its inverse. Both may write to their argument.

    our_shape: what to_ours makes of a shape, so that shapes are checked before anything is read. rows_alone: only the
    order of rows changes, so that it can be done with the rows of a quantised file as they are.
    """

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]
    our_shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape
    rows_alone: bool = False


KEEP = Via(lambda x: x, lambda x: x, rows_alone=True)


def _add(amount: float) -> Callable[[np.ndarray], np.ndarray]:
    def add(x: np.ndarray) -> np.ndarray:
        x += x.dtype.type(amount)
        return x

    return add


# GGUF stores Gemma's norm weights as w + 1, so that its readers need no special norm.
MINUS_ONE = Via(_add(-1), _add(1))


@dataclass(frozen=True)
class Rule:
    """theirs <-> ours. "{}" stands for the same text on both sides, in the same order."""

    theirs: str
    ours: str
    via: Via = KEEP


@dataclass(frozen=True)
class NameMap:
    """The first rule that fits decides; a name that none fits is the same on both sides.

    aliases: further spellings that are read but never written.
    ignored: patterns of tensors that the family does not use (the image tower of a text model).
    parts: {end of our name of a layer: ends of theirs}, of layers of adapters that are one here and several there, in
    the order of their rows.
    """

    rules: tuple[Rule, ...] = ()
    aliases: tuple[Rule, ...] = ()
    ignored: tuple[str, ...] = ()
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def to_ours(self, name: str) -> tuple[str, Via] | None:
        """Our name for theirs, and what happens to the values; None for an ignored tensor."""
        if any(_rename(name, pattern, pattern) for pattern in self.ignored):
            return None
        for rule in self.rules + self.aliases:
            if (found := _rename(name, rule.theirs, rule.ours)) is not None:
                return found, rule.via
        return name, KEEP

    def to_theirs(self, name: str) -> tuple[str, Via]:
        for rule in self.rules:
            if (found := _rename(name, rule.ours, rule.theirs)) is not None:
                return found, rule.via
        return name, KEEP


# How PEFT calls the layers of a decoder that was adapted without its head.
BARE_DECODER = tuple(Rule(name, f"model.{name}") for name in ("layers.{}", "embed_tokens", "norm"))


def _rename(name: str, source: str, target: str) -> str | None:
    match = _pattern(source).fullmatch(name)
    return target.format(*match.groups()) if match else None


@functools.cache
def _pattern(source: str) -> re.Pattern[str]:
    return re.compile(re.escape(source).replace(r"\{\}", "(.*?)"))
