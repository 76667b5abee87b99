"""Answers to prompts: the engine driven until every text is done, by sampling or by beams; what is told of them."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from modelhub.core.tree import Params
from modelhub.errors import InputError
from modelhub.generation.beam import BeamOptions
from modelhub.generation.constraints import Guide
from modelhub.generation.decode import GenerationEngine
from modelhub.generation.sampling import is_whole
from modelhub.generation.settings import Settings
from modelhub.generation.text import DecodeStream, TextRow
from modelhub.progress import bar

_FEWEST_TIMED = 8  # tokens: the clock says nothing of fewer


@dataclass(frozen=True)
class RunStats:
    """What the last call of generate did. Seconds are wall time from the call on.

    reused_tokens: how many tokens of the prompt were in the cache of the call before, and not computed again.
    tokens_per_second: all rows together, from the second step on: what comes before is reading the prompt and, on
    backends that compile, compiling. None for fewer than 8 tokens, of which no rate can be told.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    seconds_to_first_token: float
    seconds: float
    tokens_per_second: float | None


@dataclass(frozen=True)
class Generation:
    """One answer with its numbers.

    logprobs: the model's log-probability of each token, before penalties, temperature and truncation; None for beams.
    score: their sum; for beams the sum over length ** length_penalty, the end token included.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float] | None
    score: float


@dataclass(frozen=True)
class Score:
    """logprobs: the log-probability of each token after the first, given those before it."""

    text: str
    token_ids: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        return float(sum(self.logprobs))

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability per token."""
        return math.exp(-self.total / len(self.logprobs))


class Answers:
    """What one call asks of a model: `copies` answers to each of `prompts`, which are token ids.

    engine, params: all answers are theirs, whoever trains the model before the last of them is there. context: how many
    tokens the model can hold. streams: of each prompt, what makes a stream that turns an answer's tokens into text.
    special: how the tokens are spelled that such a stream leaves out.

    Raises InputError for a prompt that fills the context.
    """

    def __init__(
        self, engine: GenerationEngine, params: Params, prompts: list[list[int]], how: Settings, copies: int,
        *, context: int, stop_ids: frozenset[int], streams: Sequence[Callable[[], DecodeStream]],
        special: Mapping[int, str],
    ):  # fmt: skip
        for index, prompt in enumerate(prompts):
            if len(prompt) >= context:
                raise InputError(
                    f"prompt {index} has {len(prompt)} tokens and the model's context holds {context}: "
                    f"shorten it so that room is left for an answer"
                )
        if how.num_beams > 1 and copies > how.num_beams:
            raise InputError(
                f"num_beams={how.num_beams} with num_return_sequences={copies}: there must be as many beams as answers"
            )
        self.engine, self.params, self.prompts, self.how, self.copies = engine, params, prompts, how, copies
        self.rooms = [min(how.room(len(prompt)), context - len(prompt)) for prompt in prompts]
        self.stop_ids, self._streams, self._special = stop_ids, streams, special
        self.guide: Guide | None = None
        if how.constraints.active or (how.num_beams > 1 and how.sampler.features):
            self.guide = Guide(how.sampler, how.constraints, prompts, self.rooms, max(copies, how.num_beams))
        self.rows = [self._row(index) for index in range(len(prompts)) for _ in range(copies)]
        self.stats: RunStats | None = None

    def _row(self, index: int, tokens: Iterable[int] = ()) -> TextRow:
        """An answer to the prompt `index` that begins with these tokens."""
        row = TextRow(self._streams[index](), self.stop_ids, self.how.stop, self._special, self.rooms[index])
        for token in tokens:
            row.push(token)
        return row

    def pieces(self, seed: int, logprobs: bool, custom: Callable | None, shows: bool) -> Iterator[str]:
        """The text of the first answer, piece by piece, until all are done; see `found` and `stats` then.

        custom: the user's own sampler. shows: a bar.
        """
        rows, begun = self.rows, time.perf_counter()
        arrived: list[float] = []  # when the first tokens and the second came, and how many there were by then
        counted = 0
        room = max(self.rooms)
        steps = self.engine.run(
            self.params, self.prompts, room, self.how.sampler, seed, copies=self.copies, logprobs=logprobs,
            custom=custom, guide=self.guide,
        )  # fmt: skip
        for tokens, scores in bar(steps, desc="generating", total=room, unit="token") if shows else steps:
            if len(arrived) < 2:
                arrived.append(time.perf_counter() - begun)
                counted += len(rows)
            shown = [row.push(int(token), float(score)) for row, token, score in zip(rows, tokens, scores, strict=True)]
            if shown[0]:
                yield shown[0]
            if all(row.done for row in rows):
                break
        steps.close()
        rest = [row.flush() for row in rows]
        if rest[0]:
            yield rest[0]
        seconds, new_tokens = time.perf_counter() - begun, sum(len(row.tokens) for row in rows)
        timed = new_tokens - counted
        speed = timed / (seconds - arrived[-1]) if timed >= _FEWEST_TIMED else None
        prompt_tokens = sum(map(len, self.prompts))
        self.stats = RunStats(prompt_tokens, self.engine.reused, new_tokens, arrived[0], seconds, speed)

    @property
    def found(self) -> list[Generation]:
        """Of `pieces`, once there are no more."""
        return [Generation(row.text, row.tokens, row.logprobs, float(sum(row.logprobs))) for row in self.rows]

    def beams(self) -> list[Generation]:
        # All at once, unless what ends them differs.
        alike, count = len({*self.rooms}) == 1 and not self.how.stop, len(self.prompts)
        groups = [range(count)] if alike else [range(i, i + 1) for i in range(count)]
        return [answer for group in groups for answer in self._beams(group)]

    def _beams(self, group: range) -> Iterator[Generation]:
        how, first = self.how, group[0]
        stopped = (lambda tokens: self._row(first, tokens).done) if how.stop else None
        options = BeamOptions(
            how.num_beams, self.rooms[first], self.stop_ids, how.length_penalty, how.early_stopping, stopped
        )
        prompts, rooms = [self.prompts[i] for i in group], [self.rooms[i] for i in group]
        guide = self.guide and replace(self.guide, prompts=prompts, rooms=rooms)
        for i, beams in zip(group, self.engine.beam_search(self.params, prompts, options, guide), strict=True):
            for tokens, score in zip(beams.finished[: self.copies], beams.finished_scores, strict=False):
                row = self._row(i, tokens)
                row.flush()
                yield Generation(row.text, row.tokens, None, float(score))


def as_prompts(given: Any, what: str = "prompt") -> list[Any]:
    """The texts, and lists of token ids, of a call, each a str or a list of ints."""
    if isinstance(given, str):
        given = [given]
    elif isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise InputError(f"the {what} is a {type(given).__name__}; give a string or a list of strings")
    listed = [text if isinstance(text, str) or not hasattr(text, "tolist") else text.tolist() for text in given]
    if not listed:
        raise InputError(f"the list of {what}s is empty; give at least one")
    for index, text in enumerate(listed):
        ids = isinstance(text, list | tuple) and all(map(is_whole, text))
        if not ids and not isinstance(text, str):
            raise InputError(
                f"{what} {index} is a {type(text).__name__}; give a string or a list of strings, or token ids as a "
                f"list of lists: [[2, 651]]"
            )
        if not text:
            raise InputError(f"{what} {index} is empty; give at least one {'token' if ids else 'character'}")
        if ids:
            listed[index] = [int(token) for token in text]
    return listed
