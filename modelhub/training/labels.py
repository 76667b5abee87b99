"""Labels as users write them, and as a model with classes counts them: for every task whose rows have labels.

The rule, whatever the data come from: a text is the name of a class, a whole number is its position, from 0 on. Files
of text can write numbers only as text, so text of digits alone is a position too, unless a class of the model has such
a name. Several labels of a row are a list of names, or 0 and 1 for each class. Missing ones (None, NaN, an empty cell)
are errors, and so is what the model has no class for: all before anything is looked up by them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from modelhub.core.problems import MULTI_LABEL, REGRESSION, SINGLE_LABEL, no_label
from modelhub.errors import DataError, InputError
from modelhub.training.missing import is_missing

_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Labels:
    """values: whole numbers int64 (N,); numbers float32 (N,); shares, or 0 and 1 for each class, float32 (N, C).

    classes: the names that whole numbers, or columns, stand for; None: the data have numbers only. written: the same as
    text, where files of text wrote digits. several: each row has a list of names.
    """

    values: np.ndarray
    classes: list[str] | None = None
    written: list[str] | None = None
    several: bool = False


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Rows with labels, before `numbered` as they were read; after it as core/problems.py has them.

    labels, classes, written, several: those of Labels. origin: what errors call the data; first: the number of its
    first row, there.
    """

    labels: np.ndarray
    classes: list[str] | None
    origin: str
    fingerprint: str | None = None
    written: list[str] | None = None
    several: bool = False
    first: int = 1

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def kinds(self) -> np.ndarray:
        """(N,): the class of each row, of several and of soft labels the likeliest; 0 for numbers."""
        if self.labels.ndim == 2:
            return self.labels.argmax(1)
        return self.labels if self.labels.dtype.kind in "iu" else np.zeros(len(self.labels), np.int32)

    def only_class(self) -> str | None:
        """What all rows are, if they are of one class."""
        found = np.unique(self.kinds)
        if len(found) > 1 or (self.labels.ndim == 2 and (self.labels.max(1) < 1).any()):
            return None
        return self.classes[int(found[0])] if self.classes else str(found[0])

    @property
    def told(self) -> str | None:
        """The problem type that the labels themselves tell: rows of 0 and 1 that are no shares; else None."""
        if self.several:
            return MULTI_LABEL
        if self.labels.ndim != 2 or self.classes is not None or self.labels.shape[1] < 2:
            return None
        hot = ((self.labels == 0) | (self.labels == 1)).all()
        return MULTI_LABEL if hot and not (self.labels.sum(1) == 1).all() else None

    def place(self, row: int) -> str:
        return f"{self.origin}, row {row + self.first}" + (" (counted from 0)" if self.first == 0 else "")

    def only(self, rows: np.ndarray) -> Self:
        """Some of the rows."""
        written = None if self.written is None else [self.written[row] for row in rows]
        return replace(self, labels=self.labels[rows], written=written)

    def split(self, share: float, seed: int) -> tuple[Self, Self]:
        """Two parts, the second with that share of each class, drawn at random."""
        order = np.random.default_rng(seed).permutation(len(self))
        order = order[np.argsort(self.kinds[order], kind="stable")]
        whole = np.floor(np.arange(1, len(order) + 1) * share + 0.5)
        held = np.diff(whole, prepend=0.0) > 0
        if not held.any() or held.all():
            raise InputError(f"validation_split={share} of {len(self)} images leaves one of the two parts empty")
        return self.only(np.sort(order[~held])), self.only(np.sort(order[held]))

    def numbered(self, num_classes: int, names: Sequence[str] | None, problem: str = SINGLE_LABEL) -> Self:
        """Labels as a model counts them. names: its own; None: it has none yet. Raises DataError.

        The result has classes where the labels had names.
        """
        if problem == REGRESSION:
            return replace(self, labels=self._numbers(num_classes), classes=None, written=None)
        known = self._named(num_classes, names)
        labels, classes = (known._placed(names), list(names or ())) if known._unplaced(num_classes, names) else (
            known.labels, known.classes,
        )  # fmt: skip
        known = replace(known, labels=labels, classes=classes)
        found = known._several(num_classes) if problem == MULTI_LABEL else known._single(num_classes)
        return replace(found, written=None)

    def _named(self, num_classes: int, names: Sequence[str] | None) -> Self:
        """With classes, where digits are names by the rule."""
        if self.classes is not None:
            return self
        if self.written is not None:
            found = sorted(set(self.written))
            # A model without names takes those of the data: "1", "2" and "3" are the names of three classes.
            apart = names is None and len(found) == num_classes and not 0 <= self.labels.max() < num_classes
            if apart or not set(found).isdisjoint(names or ()):
                places = {name: place for place, name in enumerate(found)}
                labels = np.array([places[name] for name in self.written], np.int64)
                return replace(self, labels=labels, classes=found)
        elif (value := ambiguous(self.labels, names)) is not None:
            row = int(np.flatnonzero(self.labels == value)[0])
            assert names is not None
            raise DataError(
                f"{self.place(row)}: label {value} may be the class named {str(value)!r}, at position "
                f"{list(names).index(str(value))}, or position {value}, "
                f"{f'the class {names[value]!r}' if value < len(names) else 'which the model does not have'}: "
                f"give the names as texts"
            )
        return self

    def _unplaced(self, num_classes: int, names: Sequence[str] | None) -> bool:
        """Whether the model counts the classes otherwise. Raises DataError for classes that it does not have."""
        classes = self.classes
        if classes is None or (names is None and len(classes) == num_classes):
            return False
        unknown = [name for name in classes if name not in (names or ())]
        if unknown:
            shown = f"{', '.join(map(str, (names or [])[:5]))}, ..." if names else f"{num_classes} without names"
            raise DataError(
                f"{self.origin} has the {len(classes)} classes {listed(classes)}, and the model has {shown}: "
                f"{listed(unknown)} cannot be learnt or measured. For a new head load the model with "
                f"labels={classes if len(classes) <= 5 else '[...]'}"
            )
        return True

    def _placed(self, names: Sequence[str] | None) -> np.ndarray:
        self._check_declared()
        names, classes = list(names or ()), self.classes or []
        places = np.array([names.index(name) for name in classes], np.int64)
        if self.labels.ndim == 1:
            return places[self.labels]
        labels = np.zeros((len(self), len(names)), np.float32)
        labels[:, places] = self.labels
        return labels

    def _check_declared(self) -> None:
        """A Dataset's ClassLabel may hold numbers that it has no name for: -1 in test splits."""
        if self.classes is not None and self.labels.ndim == 1:
            wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
            if wrong.size:
                value = self.labels[wrong[0]]
                raise DataError(
                    f"{self.place(int(wrong[0]))}: label {value} is none of its {len(self.classes)} classes, 0 to "
                    f"{len(self.classes) - 1}{no_label(value)}"
                )

    def _single(self, num_classes: int) -> Self:
        self._check_declared()
        labels = self.labels
        if self.several or self.told == MULTI_LABEL:
            raise DataError(
                f"{self.origin} has several labels a row, or none, and the model has one: for several load it with "
                f"problem_type={MULTI_LABEL!r}"
            )
        if labels.ndim == 2:
            self._check_width(num_classes, "soft labels of")
            wrong = np.flatnonzero(~are_shares(labels))
            if wrong.size:
                raise DataError(
                    f"{self.place(int(wrong[0]))}: soft labels must be shares from 0 to 1 that sum to 1 in each row, "
                    f"found {labels[wrong[0]].tolist()!s:.80}; for several labels a row load the model with "
                    f"problem_type={MULTI_LABEL!r}"
                )
            return self
        whole = labels.astype(np.int64) if (labels == np.floor(labels)).all() else None
        if whole is None:
            row = int(np.flatnonzero(labels != np.floor(labels))[0])
            raise DataError(
                f"{self.place(row)}: label {labels[row]:g} is no class: {_FORMS}. To learn numbers load the model with "
                f"problem_type={REGRESSION!r}"
            )
        wrong = np.flatnonzero((whole < 0) | (whole >= num_classes))
        if wrong.size:
            value, largest, distinct = whole[wrong[0]], int(whole.max()), len(np.unique(whole))
            raise DataError(
                f"{self.place(int(wrong[0]))}: label {value} is out of range, the model has {num_classes} classes, 0 "
                f"to {num_classes - 1}{no_label(value)}" + self._advice(value, largest, distinct)
            )
        return replace(self, labels=whole.astype(np.int32))

    def _advice(self, value: int, largest: int, distinct: int) -> str:
        if value < 0:
            return "" if value == -1 else ": correct the labels"
        if distinct > largest / 2:
            return f"; load it with num_classes={largest + 1}, or correct the labels"
        # More likely names, or numbers of something else.
        names = sorted(set(self.written or ()))
        written = "" if self.written else ", and the labels as texts"
        return (
            f". The data have {distinct} different labels, up to {largest}: if they are names, load the model with "
            f"labels={names if 0 < len(names) <= 5 else '[...]'}{written}"
        )

    def _several(self, num_classes: int) -> Self:
        """float32 (N, C), 1 where a row has the label."""
        self._check_declared()
        labels = self.labels
        if labels.ndim == 1:
            if num_classes == 1 and self.classes is None:  # yes or no
                labels = labels[:, None].astype(np.float32)
            else:
                positions = self._single(num_classes).labels
                labels = np.eye(num_classes, dtype=np.float32)[positions]
        found = replace(self, labels=labels.astype(np.float32), several=True)
        found._check_width(num_classes, "labels for")
        wrong = np.flatnonzero(~((labels >= 0) & (labels <= 1)).all(1))
        if wrong.size:
            raise DataError(
                f"{self.place(int(wrong[0]))}: several labels are 0 or 1 for each class, or between; found "
                f"{labels[wrong[0]].tolist()!s:.80}"
            )
        return found

    def _check_width(self, num_classes: int, what: str) -> None:
        if (given := self.labels.shape[-1]) != num_classes:
            raise DataError(f"{self.origin}: {what} {given} classes, and the model has {num_classes}")

    def _numbers(self, outputs: int) -> np.ndarray:
        """float32 (N, outputs)."""
        labels = self.labels
        if self.classes is not None and not self.several and labels.ndim == 1:  # files of text
            found = [_number(name) for name in self.classes]
            if None in found:
                name = self.classes[found.index(None)]
                row = int(np.flatnonzero(labels == found.index(None))[0])
                raise DataError(f"{self.place(row)}: label {name!r} is no number, which regression learns")
            labels = np.array(found, np.float32)[labels]
        if self.several:
            raise DataError(f"{self.origin} has lists of names as labels; regression learns numbers")
        labels = labels.astype(np.float32)
        labels = labels[:, None] if labels.ndim == 1 else labels
        if labels.shape[1] != outputs:
            raise DataError(f"{self.origin} has {labels.shape[1]} numbers a row, and the model has {outputs} outputs")
        wrong = np.flatnonzero(~np.isfinite(labels).all(1))
        if wrong.size:
            raise DataError(f"{self.place(int(wrong[0]))}: label {labels[wrong[0]].tolist()} is no finite number")
        return labels


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def are_shares(labels: np.ndarray) -> np.ndarray:
    """(N,): which rows of (N, C) are from 0 to 1 and sum to 1."""
    return (labels >= 0).all(1) & (abs(labels.sum(1) - 1) < 1e-2)  # NaN fails both


def ambiguous(values: np.ndarray, names: Sequence[str] | None) -> int | None:
    """A number that is the name of one class and the position of another; None: there is none."""
    if values.ndim != 1 or not names or not any(name.isdecimal() for name in names):
        return None
    places = {name: place for place, name in enumerate(names)}
    return next((int(x) for x in np.unique(values) if places.get(str(int(x)), x) != x), None)


def read_labels(values: Any, origin: str, place: Callable[[int], str]) -> Labels:
    """Labels of any of the forms that the rule knows. place: what errors call a row. Raises DataError.

    values: an array of numbers, or one value for each row: a text, a number, a list of names, a list of numbers.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind in "iufb":
        return Labels(_array(values, origin))
    values = [_plain(value) for value in values]
    blank = (i for i, x in enumerate(values) if is_missing(x) or (isinstance(x, str) and not x.strip()))
    if (wrong := next(blank, None)) is not None:
        raise DataError(f"{place(wrong)} has no label")
    kinds = [_kind(value) for value in values]
    kind = next((kind for kind in kinds if kind != "empty"), "empty")
    odd = next((i for i, x in enumerate(kinds) if x != kind and (kind, x) != ("texts", "empty")), None)
    if kind == "empty" or odd is not None:
        raise _mixed(origin, values, odd or 0, place)
    if kind == "text":
        texts = [value.strip() for value in values]
        if all(text.isdecimal() for text in texts) and max(map(len, texts)) <= 18:
            return Labels(np.array(texts, np.int64), written=texts)
        return Labels(*_positions(texts))
    if kind == "texts":
        classes = sorted({name for names in values for name in names})
        places = {name: place for place, name in enumerate(classes)}
        hot = np.zeros((len(values), len(classes)), np.float32)
        for row, names in enumerate(values):
            hot[row, [places[name] for name in names]] = 1
        return Labels(hot, classes, several=True)
    try:
        return Labels(_array(np.stack([np.asarray(value) for value in values]), origin))
    except (ValueError, TypeError):
        width = np.shape(values[0])
        odd = next((i for i, value in enumerate(values) if np.shape(value) != width), 0)
        raise _mixed(origin, values, odd, place) from None


def _plain(value: Any) -> Any:
    """Texts and lists of texts as Python has them; TensorFlow gives bytes."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray) and value.dtype.kind in "OUS":
        value = value.tolist()
    if isinstance(value, list | tuple | set):
        return [_plain(part) for part in value]
    return value


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and not value:
        return "empty"
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "texts"
    return "numbers"


def _positions(texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Texts as numbers, by the order of the alphabet."""
    classes = sorted(set(texts))
    places = {name: number for number, name in enumerate(classes)}
    return np.array([places[text] for text in texts], np.int64), classes


def _array(labels: np.ndarray, origin: str) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2) or labels.dtype.kind not in "iufb":
        raise DataError(f"{origin}: {_FORMS}, found an array of {labels.dtype} {labels.shape}")
    if labels.dtype.kind == "f":
        if labels.ndim == 1 and (wrong := np.flatnonzero(np.isnan(labels))).size:
            raise DataError(f"{origin}, row {wrong[0] + 1} has no label: it is NaN")
        return labels.astype(np.float32)
    if labels.size and (labels.max() > _LARGEST or labels.min() < -_LARGEST):
        raise DataError(f"{origin}: label {labels.flat[abs(labels.astype(np.float64)).argmax()]} is out of range")
    return labels.astype(np.int64 if labels.ndim == 1 else np.float32)


_FORMS = "labels must all be texts, all be numbers, or soft: one share per class"


def _mixed(origin: str, values: Sequence[Any], odd: int, place: Callable[[int], str]) -> DataError:
    shown = ", ".join(f"{place(i)} has {values[i]!r:.80}" for i in dict.fromkeys((0, odd)) if i < len(values))
    return DataError(f"{origin}: {_FORMS}" + (f" ({shown})" if shown else ""))


def listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
