"""From token ids to the text a caller sees: stop ids, stop strings, and never half a character."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from modelhub.errors import InputError


class DecodeStream(Protocol):
    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class TextRow:
    """One answer in the making. `push` returns the text that is safe to show; what may belong to a stop is held back.

    special: how the tokens are spelled that the stream leaves out of the text: a stop string may be one, or hold one.
    room: how many tokens it may have; None: any number.
    tokens: the ids so far, without the stop id; logprobs: what came with them. done: a stop id or stop string was met,
    or there is no more room.
    """

    def __init__(
        self,
        stream: DecodeStream,
        stop_ids: frozenset[int],
        stop: Sequence[str] = (),
        special: Mapping[int, str] | None = None,
        room: int | None = None,
    ):
        if any(not string for string in stop):
            raise InputError("a stop string is empty: it would stop every answer before its first character")
        self._stream = stream
        self._stop_ids = stop_ids
        self._stop = tuple(stop)
        self._special = special or {}
        self._room = room
        self._held = ""
        self._hidden: list[bool] = []  # of each character held: it belongs to a special token and is never shown
        self._cut = False  # by a stop string
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.done = False

    def push(self, token_id: int, logprob: float = 0.0) -> str:
        if self.done:
            return ""
        if token_id in self._stop_ids:
            self.done = True
            return self.flush()
        self.tokens.append(token_id)
        self.logprobs.append(logprob)
        self.done = len(self.tokens) == self._room
        return self._show(self._stream.push(token_id), self._special.get(token_id, "") if self._stop else "")

    def flush(self) -> str:
        """What is left when the answer is over; nothing after a stop string."""
        if self._cut:
            return ""
        return self._show(self._stream.flush(), last=True)

    def _show(self, piece: str, special: str = "", last: bool = False) -> str:
        text = self._held + piece + special
        hidden = self._hidden + [False] * len(piece) + [True] * len(special)
        found = [at for string in self._stop if (at := text.find(string)) >= 0]
        if found:
            self.done = self._cut = True
            text, keep = text[: min(found)], 0
        else:
            keep = 0 if last else self._beginning_of_stop(text)
        border = len(text) - keep
        self._held, self._hidden = text[border:], hidden[border : len(text)]
        shown = "".join([c for c, is_hidden in zip(text[:border], hidden, strict=False) if not is_hidden])
        self.text += shown
        return shown

    def _beginning_of_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string could begin."""
        longest = max((len(string) - 1 for string in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._stop):
                return length
        return 0
