"""A user's images and their labels, from folders, files, arrays, datasets and loaders, as examples of one form."""

import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modelhub.errors import DataError, InputError
from modelhub.training.loaders import peek
from modelhub.training.records import rows_of

IMAGE_KEYS = ("image", "path", "file_name", "file", "image_path", "images", "pixel_values", "img")
LABEL_KEYS = ("label", "labels", "class", "target", "fine_label")


@dataclass(frozen=True)
class Examples:
    """sources[i]: what ImageProcessor reads, taken when it is needed. labels: int32 (N,) or soft, float32 (N, classes).

    classes: the names of the labels; None: the data have numbers only. origin: what to call the data in errors.
    """

    sources: Any
    labels: np.ndarray
    classes: list[str] | None
    origin: str
    fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def kinds(self) -> np.ndarray:
        """(N,): the class of each, of soft labels the likeliest."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(1)

    def only(self, rows: np.ndarray) -> "Examples":
        mark = None if self.fingerprint is None else _digest(self.fingerprint, rows.tolist())
        return replace(self, sources=_Rows(self.sources, rows), labels=self.labels[rows], fingerprint=mark)

    def numbered(self, num_classes: int, names: Sequence[str] | None) -> "Examples":
        """Labels as a model counts them. names: the model's own; None: it has none yet. Raises DataError."""
        labels, classes = self.labels, self.classes
        if classes is None:
            wrong = np.flatnonzero((labels < 0) | (labels >= num_classes)) if labels.ndim == 1 else labels[:0]
            if wrong.size:
                raise DataError(
                    f"{self.origin}, row {wrong[0] + 1}: label {labels[wrong[0]]} is out of range, the model has "
                    f"{num_classes} classes, 0 to {num_classes - 1}; load it with num_classes="
                    f"{int(labels.max()) + 1}, or correct the labels"
                )
            if labels.ndim == 2 and (given := labels.shape[-1]) != num_classes:
                raise DataError(f"{self.origin}: soft labels of {given} classes, and the model has {num_classes}")
            return self
        if names is None and len(classes) == num_classes:
            return self
        unknown = [name for name in classes if name not in (names or ())]
        if unknown:
            shown = f"{', '.join(map(str, (names or [])[:5]))}, ..." if names else f"{num_classes} without names"
            raise DataError(
                f"{self.origin} has the {len(classes)} classes {_listed(classes)}, and the model has {shown}: "
                f"{_listed(unknown)} cannot be learnt or measured. For a new head load the model with "
                f"labels={classes if len(classes) <= 5 else '[...]'}"
            )
        places = np.array([list(names or ()).index(name) for name in classes], np.int32)
        return replace(self, labels=places[labels], classes=list(names or ()))

    def split(self, share: float, seed: int) -> tuple["Examples", "Examples"]:
        """Two parts, the second with that share of each class, drawn at random."""
        order = np.random.default_rng(seed).permutation(len(self))
        order = order[np.argsort(self.kinds[order], kind="stable")]
        whole = np.floor(np.arange(1, len(order) + 1) * share + 0.5)
        held = np.diff(whole, prepend=0.0) > 0
        if not held.any() or held.all():
            raise InputError(f"validation_split={share} of {len(self)} images leaves one of the two parts empty")
        return self.only(np.sort(order[~held])), self.only(np.sort(order[held]))


def read_examples(data: Any) -> tuple[Examples | None, Any]:
    """Whatever the user calls data, as examples; or None, and the data, if they are ready batches.

    data: a folder with a folder per class; a .csv, .jsonl, .json or .parquet file with a column for the image (one of
    IMAGE_KEYS, paths relative to the file) and one for the label (one of LABEL_KEYS); a tuple (images, labels) of
    arrays; a list or another iterable of such rows as dicts, or of pairs; a Hugging Face Dataset.

    Raises DataError.
    """
    if isinstance(data, str | Path):
        path = Path(data)
        if not path.exists():
            raise DataError(
                f"{path}: no such file or folder; give one with a folder per class, or a file of paths and labels"
            )
        return (_of_folder(path) if path.is_dir() else _of_rows(rows_of(path), str(path), path.parent)), data
    if isinstance(data, tuple) and len(data) == 2 and not isinstance(data[1], Mapping | tuple):
        return _of_arrays(*data), data
    sized = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if sized and hasattr(data, "features") and hasattr(data, "cast_column"):
        return _of_dataset(data), data
    if isinstance(data, Mapping) or hasattr(data, "iterrows"):
        return _of_rows(rows_of(data), "the data"), data
    if sized:
        if not len(data):
            raise DataError("the data holds no rows")
        rows = ((f"row {number}", data[number]) for number in range(len(data)))
        return (None if _is_batch(data[0]) else _of_rows(rows, "the data")), data
    first, data = peek(data)
    return (None if first is None or _is_batch(first) else _of_rows(rows_of(data), "the data")), data


def _of_arrays(images: Any, labels: Any) -> Examples:
    if len(images) != len(labels):
        raise DataError(f"{len(images)} images and {len(labels)} labels were given")
    sources = images if isinstance(images, list | tuple) else as_array(images, "images")
    mark = hashlib.sha256(np.ascontiguousarray(sources).data).hexdigest() if isinstance(sources, np.ndarray) else None
    return labelled(sources, list(as_array(labels, "labels")), "the labels", mark)


def _of_folder(path: Path) -> Examples:
    visible = sorted(item for item in path.iterdir() if not item.name.startswith("."))
    folders = [item for item in visible if item.is_dir()]
    if not folders:
        raise DataError(f"{path} holds no folders: images of one class belong into a folder that is called after it")
    known, files = Image.registered_extensions(), []
    for number, folder in enumerate(folders):
        found = sorted(item for item in folder.iterdir() if not item.name.startswith("."))
        images = [item for item in found if item.suffix.lower() in known and item.is_file()]
        if not images:
            inside = next((item.name for item in found if item.is_dir()), None)
            hint = f"; it holds folders such as {inside}: give {folder} itself as the data" if inside else ""
            raise DataError(f"{folder} holds no images: an empty class cannot be learnt, remove it or fill it{hint}")
        files += [(str(image), number) for image in images]
    names = [os.path.relpath(file, path) for file, _ in files]
    mark = _digest(*(f"{name} {os.path.getsize(path / name)}" for name in names))
    labels = np.array([label for _, label in files], np.int32)
    return Examples([file for file, _ in files], labels, [folder.name for folder in folders], str(path), mark)


def _of_rows(rows: Iterable[tuple[str, Any]], origin: str, folder: Path | None = None) -> Examples:
    sources, labels, places = [], [], []
    for where, row in rows:
        source, label = _pair(row, where)
        if isinstance(source, str | os.PathLike) and folder is not None:
            source = str(folder / source)
        sources.append(_source(source, where))
        labels.append(label)
        places.append(where)
    if not sources:
        raise DataError(f"{origin} holds no rows")
    mark = _digest(*map(str, sources), *map(str, labels)) if isinstance(sources[0], str) else None
    return labelled(sources, labels, origin, mark, places)


def _of_dataset(data: Any) -> Examples:
    features = data.features
    image, label = (key_of(features, keys, "the dataset") for keys in (IMAGE_KEYS, LABEL_KEYS))
    data = data.with_format(None)
    names, labels = getattr(features[label], "names", None), list(data[label])
    if hasattr(features[image], "decode"):  # threads of ours do it
        data = data.cast_column(image, type(features[image])(decode=False))
    sources, mark = _Column(data, image), getattr(data, "_fingerprint", None)
    if names is None:
        return labelled(sources, labels, "the dataset", mark)
    return Examples(sources, np.array(labels, np.int32), list(names), "the dataset", mark)


class _Column:
    """The images of a Dataset, each taken out when it is needed."""

    def __init__(self, data: Any, key: str) -> None:
        self._data, self._key = data, key

    def __getitem__(self, row: int) -> Any:
        return _source(self._data[row][self._key], f"row {row} of the dataset")


class _Rows:
    """Some of the rows of something that can be indexed."""

    def __init__(self, whole: Any, rows: np.ndarray) -> None:
        self._whole, self._rows = whole, rows

    def __getitem__(self, row: int) -> Any:
        return self._whole[int(self._rows[row])]


class _Bytes(io.BytesIO):
    name = ""  # what errors call it


def _source(value: Any, where: str) -> Any:
    """What Parquet files and datasets keep of an image, {"bytes", "path"}, as something to read."""
    if not isinstance(value, Mapping):
        return value
    if value.get("bytes") is None:
        return value.get("path")
    named = _Bytes(value["bytes"])
    named.name = f"{where} ({value['path']})" if value.get("path") else where
    return named


def _pair(row: Any, where: str) -> tuple[Any, Any]:
    if isinstance(row, Mapping):
        found = row[key_of(row, IMAGE_KEYS, where)], row[key_of(row, LABEL_KEYS, where)]
    elif isinstance(row, list | tuple) and len(row) == 2:
        found = row[0], row[1]
    else:
        raise DataError(f"{where} must be a dict with image and label, or a pair of them; found {type(row).__name__}")
    if found[0] is None or found[1] is None:
        raise DataError(f"{where} has no {'image' if found[0] is None else 'label'}")
    return found


def key_of(row: Mapping[str, Any], keys: tuple[str, ...], where: str) -> str:
    found = next((key for key in keys if key in row), None)
    if found is None:
        raise DataError(f"{where} has the columns {', '.join(map(str, row))}; one of {', '.join(keys)} is needed")
    return found


def labelled(
    sources: Any, values: list[Any], origin: str, mark: str | None, places: list[str] | None = None
) -> Examples:
    """Texts become numbers by the order of the alphabet; files of text also write numbers as texts."""
    classes = None
    if all(isinstance(value, str) for value in values):
        texts = [value.strip() for value in values]
        if all(text.isdecimal() for text in texts):
            labels = np.array(texts, np.int64)
        else:
            classes = sorted(set(texts))
            place = {name: number for number, name in enumerate(classes)}
            labels = np.array([place[text] for text in texts])
    else:
        try:
            labels = np.stack([np.asarray(value) for value in values])
        except ValueError:
            labels = np.array(None)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 1 and labels.dtype.kind in "iu":
        labels = labels.astype(np.int32)
    elif labels.ndim == 2 and labels.dtype.kind in "iuf":
        labels = labels.astype(np.float32)
    else:
        where = f" ({places[0]} has {values[0]!r:.80})" if places and values else ""
        raise DataError(f"{origin}: labels must all be texts, all be numbers, or soft: one share per class{where}")
    return Examples(sources, labels, classes, origin, mark and _digest(mark, labels.tolist()))


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --- loaders ----------------------------------------------------------------------------------------------------------


def _is_batch(item: Any) -> bool:
    """Whether it is several examples at once; else one."""
    if isinstance(item, Mapping):
        images = next((item[key] for key in IMAGE_KEYS if key in item), None)
    else:
        images = item[0] if isinstance(item, list | tuple) and len(item) == 2 else None
    shape = getattr(images, "shape", None)
    if shape is None:
        return isinstance(images, list | tuple)
    labels = item[1] if isinstance(item, list | tuple) else next((item[key] for key in LABEL_KEYS if key in item), 0)
    return len(shape) == 4 or (len(shape) == 3 and tuple(getattr(labels, "shape", ()))[:1] == tuple(shape)[:1])


def as_array(value: Any, where: str) -> np.ndarray:
    """An array of any framework, or a list of numbers, as numpy's."""
    for attempt in (lambda: value, lambda: value.detach().cpu(), lambda: value.detach().cpu().float()):
        try:
            array = np.asarray(attempt())
        except (AttributeError, TypeError, ValueError, RuntimeError):
            continue  # a tensor on a GPU, or of a dtype that numpy has not
        if array.dtype.kind in "iufbU":
            return array
        if array.dtype.name == "bfloat16":
            return array.astype(np.float32)
        break
    raise DataError(f"{where}: a {type(value).__name__} cannot be made an array of numbers")
