"""Examples, or batches that the user made, as batches of static shapes.

A batch is a dict of int32 arrays (rows, length):
  input_ids     the tokens; 0 or the pad id where there are none
  labels        the token itself where the model learns it, else -100; not shifted: the label of a position is predicted
                from the position before it, so the first token of an example never has one
  position_ids  0, 1, 2, ... in each example
  segment_ids   0: nothing here; 1, 2, ...: the examples of a row, which must not see each other
"""

import hashlib
import itertools
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from modelhub.errors import DataError
from modelhub.processing.tokenizer import Tokenizer
from modelhub.training.examples import Example, Examples, Render, make_examples
from modelhub.training.loaders import peek
from modelhub.training.ready_batches import NO_LABEL, Batch, ReadyBatches
from modelhub.training.records import OnError, read_all

if TYPE_CHECKING:
    from rich.text import Text

WIDTHS = 8  # without packing: at most so many lengths of rows, each of which is compiled once


class BatchSource(Protocol):
    """What the fit loop sees: the same for records and for batches that the user made."""

    @property
    def fingerprint(self) -> str | None:
        """Equal for equal data; None where it cannot be known."""

    def steps(self, epoch: int) -> int | None:
        """The number of batches in an epoch; None where it cannot be known."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on."""

    def report(self) -> Any:
        """For people: str() of it."""

    def state_dict(self) -> dict[str, Any]:
        """What the user's own iterable wants kept in a checkpoint; {} if nothing."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next epoch(n, start) continues where the state was taken."""


def prepare(
    data: Any,
    tokenizer: Tokenizer | None,
    render: Render | None,
    sequence_length: int,
    batch_size: int,
    *,
    packing: bool = True,
    loss_on: str = "response",
    template: str | None = None,
    kind: str | None = None,
    seed: int = 0,
    shuffle: bool = True,
    on_error: OnError = "raise",
) -> BatchSource:
    """Whatever the user calls data, as batches for the fit loop.

    data: what `read_records` takes, or ready batches: an iterable of dicts with `input_ids` and `labels`, for which the
    other arguments mean nothing. The rest as in `read_records`, `make_examples` and `Batches`. Raises DataError.
    """
    first, data = peek(data)
    if isinstance(first, Mapping) and "input_ids" in first:
        return ReadyBatches(data)
    if tokenizer is None:
        raise DataError("this model has no tokenizer: set lm.tokenizer, or give ready batches (input_ids and labels)")
    records, skipped = read_all(data, kind, on_error)
    made = make_examples(records, tokenizer, sequence_length, render=render, template=template, loss_on=loss_on)
    if skipped:
        made.dropped["rows that could not be used"] = skipped
    return Batches(made, sequence_length, batch_size, packing=packing, seed=seed, shuffle=shuffle, tokenizer=tokenizer)


# --- examples ---------------------------------------------------------------------------------------------------------


@dataclass
class TextDataReport:
    """What the training data comes to. fill: the share of the rows' positions that hold tokens."""

    examples: int
    tokens: int
    learnt: int
    cut: int
    dropped: dict[str, int]
    notes: dict[str, int]
    steps: int
    rows_per_step: int
    fill: float
    sample: list[tuple[str, bool]]  # text of the first example, and whether it is learnt

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(highlight=False)  # colours on a terminal, none in a file
        with console.capture() as capture:
            console.print(self.__rich__(), soft_wrap=True, end="")
        return capture.get()

    def __rich__(self) -> "Text":
        from rich.text import Text

        text = Text(
            f"{self.examples:,} examples, {self.tokens:,} tokens, of which {self.learnt / self.tokens:.1%} are learnt\n"
            f"{self.steps:,} steps an epoch, each {self.rows_per_step} rows or {self.examples / self.steps:.1f} "
            f"examples; rows are {self.fill:.1%} full\n"
        )
        counted = [(f"dropped: {what}", count) for what, count in self.dropped.items()] + list(self.notes.items())
        for what, count in [("cut at the end to fit sequence_length", self.cut), *counted]:
            text.append(f"{count:,} {what}\n" if count else "")
        if self.sample:
            text.append("an example; learnt is what stands between » and «:\n")
        for piece, learnt in self.sample:
            text.append(f"»{piece}«" if learnt else piece, style="bold" if learnt else "dim")
        return text


class Batches:
    """Examples in shuffled batches; an epoch's order depends on (seed, epoch) alone.

    examples: a list of Example, or what `make_examples` returns. batch_size: rows of a batch. packing: as many examples
    in a row of sequence_length as go in (best fit); else one a row, with rows of similar lengths in a batch, and at
    most WIDTHS different lengths of rows. shuffle=False: every epoch alike, for evaluation. tokenizer: for the pad id
    and the report's sample. group: so many examples, one after the other, belong together: with packing they lie in one
    row, without in rows of one batch that follow each other, always in their order.
    """

    def __init__(
        self,
        examples: Sequence[Example] | Examples,
        sequence_length: int,
        batch_size: int,
        *,
        packing: bool = True,
        seed: int = 0,
        shuffle: bool = True,
        tokenizer: Tokenizer | None = None,
        group: int = 1,
    ) -> None:
        self._made = examples if isinstance(examples, Examples) else Examples(list(examples))
        self.examples = self._made.examples
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.packing, self.seed, self.shuffle, self.tokenizer = packing, seed, shuffle, tokenizer
        if batch_size < 1:
            raise DataError(f"batch_size must be 1 or more, got {batch_size}")
        self._lengths = [len(example.ids) for example in self.examples]
        if max(self._lengths, default=0) > sequence_length:
            raise DataError(f"an example has {max(self._lengths)} tokens, more than sequence_length={sequence_length}")
        if len(self.examples) % group or (not packing and batch_size % group):
            raise DataError(
                f"each {group} examples belong together, which {len(self.examples)} examples and batches of "
                f"{batch_size} rows cut apart: both must be multiples of {group}"
            )
        parts = [self._lengths[i : i + group] for i in range(0, len(self._lengths), group)]
        self._group, self._sizes = group, [sum(part) if packing else max(part) for part in parts]  # of groups
        if (longest := max(self._sizes, default=0)) > sequence_length:
            raise DataError(
                f"group {self._sizes.index(longest) + 1}, {group} examples that belong together, has {longest} tokens, "
                f"more than sequence_length={sequence_length}"
            )
        if not any(example.loss[1:].any() for example in self.examples):
            raise DataError(f"none of the {len(self.examples)} examples has a token to learn (a label)")
        self._plan_of: tuple[int, list[_Plan]] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all ids and masks, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(len(example.ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(example.ids, "<i4").tobytes() + np.packbits(example.loss).tobytes())
        return digest.hexdigest()

    def steps(self, epoch: int) -> int:
        """The number of batches; packing makes a few more or less of it in each epoch."""
        return len(self._plan(epoch))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on, which costs nothing."""
        return (self._batch(*plan) for plan in self._plan(epoch)[start:])

    def state_dict(self) -> dict[str, Any]:
        """Nothing: (seed, epoch, start) say it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def report(self) -> TextDataReport:
        """Of epoch 0."""
        plan = self._plan(0)
        positions = sum(width * len(rows) for width, rows in plan)
        return TextDataReport(
            examples=len(self.examples),
            tokens=sum(self._lengths),
            learnt=sum(int(example.loss[1:].sum()) for example in self.examples),
            cut=self._made.cut,
            dropped=dict(self._made.dropped),
            notes=dict(self._made.notes),
            steps=len(plan),
            rows_per_step=self.batch_size,
            fill=sum(self._lengths) / positions,
            sample=_sample(self.examples[0], self.tokenizer) if self.tokenizer else [],
        )

    def _plan(self, epoch: int) -> "list[_Plan]":
        if self._plan_of is None or self._plan_of[0] != epoch:
            draw = np.random.default_rng([self.seed, epoch])
            order = draw.permutation(len(self._sizes)) if self.shuffle else np.arange(len(self._sizes))
            plan = self._packed(order) if self.packing else self._bucketed(order)
            if self.shuffle:
                plan = [plan[i] for i in draw.permutation(len(plan))]
            self._plan_of = epoch, plan
        return self._plan_of[1]

    def _packed(self, order: np.ndarray) -> "list[_Plan]":
        # Sorted by length the rows would be 99.9% full instead of 98.6% (Dolly's lengths, rows of 512), but then long
        # examples are always alone and short ones among themselves.
        packed = pack([self._sizes[i] for i in order], self.sequence_length)
        rows = [[example for i in row for example in self._members(order[i])] for row in packed]
        return [(self.sequence_length, list(part)) for part in _parts(rows, self.batch_size)]

    def _bucketed(self, order: np.ndarray) -> "list[_Plan]":
        widths = least_padding(self._sizes, self.sequence_length)
        buckets: dict[int, list[list[int]]] = defaultdict(list)
        for i in order:
            buckets[widths[bisect_left(widths, self._sizes[i])]] += [[example] for example in self._members(i)]
        plan: list[_Plan] = []
        left: list[list[int]] = []
        for width in sorted(buckets):
            rows = left + buckets[width]
            full = len(rows) // self.batch_size * self.batch_size
            plan += [(width, part) for part in _parts(rows[:full], self.batch_size)]
            left = rows[full:]  # they go into longer rows, so that only the last batch has empty ones
        return plan + [(max(buckets), left)] * bool(left)

    def _members(self, group: int) -> range:
        """The examples of a group."""
        return range(int(group) * self._group, (int(group) + 1) * self._group)

    def _batch(self, width: int, rows: list[list[int]]) -> Batch:
        shape = (self.batch_size, width)
        batch = {name: np.zeros(shape, np.int32) for name in ("input_ids", "labels", "position_ids", "segment_ids")}
        batch["labels"].fill(NO_LABEL)
        for row, indices in enumerate(rows):
            begin = 0
            for segment, index in enumerate(indices, 1):
                example = self.examples[index]
                place = row, slice(begin, begin + len(example.ids))
                batch["input_ids"][place] = example.ids
                batch["labels"][place] = np.where(example.loss, example.ids, NO_LABEL)
                batch["labels"][row, begin] = NO_LABEL
                batch["position_ids"][place] = np.arange(len(example.ids))
                batch["segment_ids"][place] = segment
                begin += len(example.ids)
        return batch


_Plan = tuple[int, list[list[int]]]  # length of the rows, and the examples of each


def pack(lengths: Iterable[int], capacity: int) -> list[list[int]]:
    """Rows of indices whose lengths add up to at most `capacity`: each goes where it leaves the least space (best fit).

    Takes constant time for each, however many rows are open: rows lie in stacks by the space they have left, and a bit
    of `spaces` says which stacks are not empty.
    """
    rows: list[list[int]] = []
    stacks: dict[int, list[list[int]]] = defaultdict(list)
    spaces = 0
    for index, length in enumerate(lengths):
        fits = spaces >> length
        if fits:
            space = length + (fits & -fits).bit_length() - 1
            row = stacks[space].pop()
            if not stacks[space]:
                spaces &= ~(1 << space)
        else:
            space, row = capacity, []
            rows.append(row)
        row.append(index)
        if left := space - length:
            stacks[left].append(row)
            spaces |= 1 << left
    return rows


def least_padding(lengths: Iterable[int], capacity: int) -> list[int]:
    """The at most WIDTHS multiples of 64 (or the capacity) to which the lengths are padded with the least in all."""
    counts = sorted(Counter(min(-(-length // 64) * 64, capacity) for length in lengths).items())
    # best[j]: (positions, widths) for the j shortest sizes; each round may add one width, which takes sizes i to j
    best: list[tuple[float, list[int]]] = [(0, []), *[(float("inf"), [])] * len(counts)]
    total = [0, *itertools.accumulate(count for _, count in counts)]
    for _ in range(WIDTHS):
        for j in range(len(counts), 0, -1):
            size = counts[j - 1][0]
            added = min((best[i][0] + size * (total[j] - total[i]), i) for i in range(j))
            if added[0] < best[j][0]:
                best[j] = added[0], [*best[added[1]][1], size]
    return best[-1][1]


def _parts(rows: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


def _sample(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of each run of tokens that are learnt, or not."""
    borders = [0, *(np.flatnonzero(np.diff(example.loss)) + 1), len(example.ids)]
    runs = itertools.pairwise(map(int, borders))
    return [(tokenizer.decode(example.ids[a:b].tolist(), False), bool(example.loss[a])) for a, b in runs]
