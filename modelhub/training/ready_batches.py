"""Batches that the user made: from any iterable, checked, completed, and resumed."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from modelhub.errors import DataError
from modelhub.training import fields
from modelhub.training.fields import Field
from modelhub.training.loaders import Begun

Batch = dict[str, np.ndarray]
NO_LABEL = -100


class ReadyBatches:
    """Batches from any iterable: a torch DataLoader, a tf.data pipeline, a list, a generator. Checked and completed.

    An epoch is one pass. A run that is resumed reads the passes and batches again that it had seen, so that iterables
    that shuffle go on as they would have; one with state_dict() and load_state_dict() is asked instead.
    """

    fingerprint = None
    _nothing = f"all labels of {{}} are {NO_LABEL}"

    def __init__(self, data: Iterable[Mapping[str, Any]]) -> None:
        self._data = data
        self._source: Any = data.data if isinstance(data, Begun) else data
        self._passes = 0  # begun so far
        self._restored = False

    def steps(self, epoch: int) -> int | None:
        """The iterable's len(), if it has one."""
        try:
            return len(self._source)
        except (TypeError, NotImplementedError):
            return None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of a pass, from batch `start` on. Raises DataError for batches that cannot be used."""
        restored, self._restored = self._restored, False
        if restored:
            self._passes = epoch
        while self._passes < epoch:
            self._passes += 1
            for _ in self._data:
                pass
        self._passes = max(self._passes, epoch + 1)
        if hasattr(self._source, "set_epoch"):  # a Hugging Face IterableDataset shuffles, and resumes, by it
            self._source.set_epoch(epoch)
        skipped = 0 if restored else start
        number, learnt = start, 0
        for number, batch in enumerate(itertools.islice(self._data, skipped, None), start + 1):
            ready = self.complete(batch, f"batch {number} of epoch {epoch + 1}")
            learnt += self.learnt(ready)
            yield ready
        if number == 0:
            again = ": a generator can be read once. Give something that can be read again, such as a list"
            raise DataError(f"the data gave no batch in epoch {epoch + 1}{again if epoch else ''}")
        if start == 0 and not learnt:
            raise DataError(f"{self._nothing.format(f'the {number} batches of epoch {epoch + 1}')}: nothing to learn")

    def complete(self, batch: Any, where: str) -> Batch:
        """A user's batch as the objective takes it. Raises DataError."""
        return complete(batch, where)

    def learnt(self, batch: Batch) -> int:
        """How much there is to learn from a batch."""
        return int((batch["labels"] != NO_LABEL).sum())

    def state_dict(self) -> dict[str, Any]:
        """The iterable's own, if it has one."""
        return self._source.state_dict() if hasattr(self._source, "state_dict") else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hands the state to the iterable; {} means that it has none."""
        if state:
            self._source.load_state_dict(state)
            self._data, self._restored = self._source, True

    def report(self) -> str:
        steps = self.steps(0)
        return f"ready batches, {'an unknown number of' if steps is None else f'{steps:,}'} steps an epoch"


class ReadyRows(ReadyBatches):
    """Ready batches of an objective of another kind: its fields, arrays of any framework or lists, taken as they are.

    A batch with fewer rows than the first is filled up. Raises DataError for what the fields do not allow.
    """

    _nothing = "there is no row with a loss in {}"

    def __init__(
        self, data: Iterable[Mapping[str, Any]], named: Mapping[str, Field], learnt: Callable[[Batch], int]
    ) -> None:  # fmt: skip
        super().__init__(data)
        self._fields, self._learnt, self._rows = named, learnt, 0

    def complete(self, batch: Any, where: str) -> Batch:
        if not isinstance(batch, Mapping):
            raise DataError(f"{where} must be a dict with {', '.join(self._fields)}, found {type(batch).__name__}")
        arrays = {name: _as_numpy(x, f"{where}: {name}", floats=True) for name, x in batch.items()}
        fields.check(self._fields, arrays, where)
        rows = fields.rows_of(arrays)
        self._rows = self._rows or rows
        narrow = {"i": np.int32, "f": np.float32}
        arrays = {name: x.astype(narrow[x.dtype.kind], copy=False) for name, x in arrays.items()}
        return fields.cut(self._fields, arrays, 0, max(rows, self._rows))

    def learnt(self, batch: Batch) -> int:
        return self._learnt(batch)


def complete(batch: Mapping[str, Any], where: str = "the batch") -> Batch:
    """A user's batch as the four arrays of a batch.

    batch: integers (rows, length) of any framework: input_ids and labels; optionally attention_mask (0: padding),
    position_ids, segment_ids. Without segment_ids a row is one example, or several where given position_ids start anew.
    Labels of padding and of an example's first token become -100. Raises DataError for missing keys, other shapes and
    other types.
    """
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
        found = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise DataError(f"{where} must be a dict with input_ids and labels, found {found}")
    names = ("input_ids", "labels", "attention_mask", "position_ids", "segment_ids")
    arrays = {name: _as_numpy(batch[name], f"{where}: {name}") for name in names if batch.get(name) is not None}
    shapes = {name: array.shape for name, array in arrays.items()}
    ids, labels = arrays["input_ids"], arrays["labels"]
    if ids.ndim != 2 or not ids.size or len(set(shapes.values())) != 1:
        raise DataError(
            f"{where}: the arrays must all have one shape (rows, length), found {shapes}. Single examples are put "
            f"together by a DataLoader's collate function or by dataset.batch()"
        )
    if max(ids.max(), labels.max()) > np.iinfo(np.int32).max:  # int32 below would make another id of it
        raise DataError(f"{where}: token id {max(ids.max(), labels.max())} is outside any vocabulary")
    wrong = labels[(labels < 0) & (labels != NO_LABEL)]
    if wrong.size or (ids < 0).any():
        raise DataError(f"{where}: negative {f'labels {wrong[:3]}' if wrong.size else 'input_ids'}; only -100 masks")
    real = arrays.get("attention_mask", np.ones_like(ids)) != 0
    positions, segments = arrays.get("position_ids"), arrays.get("segment_ids")
    if segments is None:
        if positions is None:
            segments = np.ones_like(ids)
            positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
        else:
            segments = np.cumsum(np.diff(positions, axis=1, prepend=positions[:, :1] - 2) != 1, axis=1)
    segments = np.where(real, segments, 0)
    first = np.diff(segments, axis=1, prepend=0) != 0
    if positions is None:
        index = np.arange(ids.shape[1])
        positions = index - np.maximum.accumulate(np.where(first, index, 0), axis=1)
    labels = np.where((segments == 0) | first, NO_LABEL, labels)
    done = {"input_ids": ids, "labels": labels, "position_ids": positions, "segment_ids": segments}
    return {name: np.ascontiguousarray(array, np.int32) for name, array in done.items()}


def _as_numpy(value: Any, where: str, floats: bool = False) -> np.ndarray:
    convert: list[Callable[[], Any]] = [lambda: value, lambda: value.detach().cpu(), lambda: value.numpy()]
    for attempt in convert:  # a torch tensor on a GPU must first come to the CPU
        try:
            array = np.asarray(attempt())
        except (AttributeError, TypeError, ValueError, RuntimeError):
            continue
        if array.dtype.kind in "iub":
            return array.astype(np.int64)  # -100 is no unsigned number
        if floats and array.dtype.kind == "f":
            return array
        raise DataError(f"{where} must be {'numbers' if floats else 'integers'}, found {array.dtype}")
    raise DataError(
        f"{where}: a {type(value).__name__} cannot be made an array; rows of different lengths need padding"
    )
