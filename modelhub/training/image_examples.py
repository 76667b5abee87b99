"""A user's images and their labels, from folders, files, arrays, datasets and loaders, as examples of one form."""

import hashlib
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modelhub.errors import DataError
from modelhub.training.labels import Labelled, read_labels
from modelhub.training.loaders import peek
from modelhub.training.missing import is_missing
from modelhub.training.rows import is_series, is_table, rows_of

IMAGE_KEYS = ("image", "path", "file_name", "file", "image_path", "images", "pixel_values", "img")
LABEL_KEYS = ("label", "labels", "class", "target", "fine_label")


@dataclass(frozen=True, kw_only=True)
class Examples(Labelled):
    """Images with labels. sources[i]: what ImageProcessor reads, taken when it is needed."""

    sources: Any

    def only(self, rows: np.ndarray) -> "Examples":
        mark = None if self.fingerprint is None else _digest(self.fingerprint, rows.tolist())
        return replace(super().only(rows), sources=_Rows(self.sources, rows), fingerprint=mark)


def read_examples(data: Any) -> tuple[Examples | None, Any]:
    """Whatever the user calls data, as examples; or None, and the data, if they are ready batches.

    data: a folder with a folder per class; a file that records.rows_of reads, with a column for the image (one of
    IMAGE_KEYS, paths relative to the file) and one for the label (one of LABEL_KEYS); a DataFrame or a Table of them; a
    tuple (images, labels) of arrays; a list or another iterable of such rows as dicts, or of pairs; a Hugging Face
    Dataset. Labels are what labels.py says.

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
    if isinstance(data, Mapping) or is_table(data):
        return _of_rows(rows_of(data), "the data"), data
    if sized:
        if not len(data):
            raise DataError("the data holds no rows")
        rows = ((f"row {number}", data[number]) for number in range(len(data)))
        return (None if _is_batch(data[0]) else _of_rows(rows, "the data", first=0)), data
    first, data = peek(data)
    return (None if first is None or _is_batch(first) else _of_rows(rows_of(data), "the data")), data


def _of_arrays(images: Any, labels: Any) -> Examples:
    if len(images) != len(labels):
        raise DataError(f"{len(images)} images and {len(labels)} labels were given")
    sources = images if isinstance(images, list | tuple) else as_array(images, "images")
    mark = hashlib.sha256(np.ascontiguousarray(sources).data).hexdigest() if isinstance(sources, np.ndarray) else None
    given = list(labels) if isinstance(labels, list | tuple) or is_series(labels) else as_array(labels, "labels")
    return _labelled(sources, given, "the labels", mark)


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
    labels, classes = np.array([label for _, label in files], np.int64), [folder.name for folder in folders]
    return Examples(
        sources=[file for file, _ in files], labels=labels, classes=classes, origin=str(path), fingerprint=mark
    )


def _of_rows(
    rows: Iterable[tuple[str, Any]], origin: str, folder: Path | None = None, *, first: int = 1
) -> Examples:  # fmt: skip
    sources, labels, places = [], [], []
    for where, row in rows:
        source, label = _pair(row, where, "" if first else " (rows are counted from 0)")
        if isinstance(source, str | os.PathLike) and folder is not None and "://" not in str(source):
            source = str(folder / source)
        sources.append(_source(source, where))
        labels.append(label)
        places.append(where)
    if not sources:
        raise DataError(f"{origin} holds no rows")
    mark = _digest(*map(str, sources), *map(str, labels)) if isinstance(sources[0], str) else None
    return _labelled(sources, labels, origin, mark, places, first=first)


def _of_dataset(data: Any) -> Examples:
    features = data.features
    image, label = (key_of(features, keys, "the dataset") for keys in (IMAGE_KEYS, LABEL_KEYS))
    data = data.with_format(None)
    names, labels = _class_names(features[label]), list(data[label])
    if hasattr(features[image], "decode"):  # threads of ours do it
        data = data.cast_column(image, type(features[image])(decode=False))
    sources, mark = _Column(data, image), getattr(data, "_fingerprint", None)
    if names is None:
        return _labelled(sources, labels, "the dataset", mark, first=0)
    found = Examples(
        sources=sources, labels=np.zeros(0), classes=names, origin="the dataset", fingerprint=mark, first=0
    )  # fmt: skip
    if (wrong := next((row for row, value in enumerate(labels) if is_missing(value)), None)) is not None:
        raise DataError(f"{found.place(wrong)} has no label")
    if not isinstance(labels[0], list):
        return replace(found, labels=np.array(labels, np.int64))
    hot = np.zeros((len(labels), len(names)), np.float32)
    for row, places in enumerate(labels):
        if not all(isinstance(place, int) and 0 <= place < len(names) for place in places):
            raise DataError(f"{found.place(row)}: labels {places} are not all within its {len(names)} classes")
        hot[row, places] = 1
    return replace(found, labels=hot, several=True)


def _class_names(feature: Any) -> list[str] | None:
    """Of a ClassLabel, or a list of them."""
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
    names = getattr(inner, "names", None)
    return None if names is None else list(names)


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


def _pair(row: Any, where: str, note: str = "") -> tuple[Any, Any]:
    if isinstance(row, Mapping):
        found = row[key_of(row, IMAGE_KEYS, where)], row[key_of(row, LABEL_KEYS, where)]
    elif isinstance(row, list | tuple) and len(row) == 2:
        found = row[0], row[1]
    else:
        raise DataError(f"{where} must be a dict with image and label, or a pair of them; found {type(row).__name__}")
    for what, value in zip(("image", "label"), found, strict=True):
        if is_missing(value) or (isinstance(value, str) and not value.strip()):
            raise DataError(f"{where} has no {what}{note}")
    return found


def key_of(row: Mapping[str, Any], keys: tuple[str, ...], where: str) -> str:
    """The first of the keys that the row has; first of all one with a value."""
    found = [key for key in keys if key in row]
    if not found:
        raise DataError(f"{where} has the columns {', '.join(map(str, row))}; one of {', '.join(keys)} is needed")
    return next((key for key in found if not is_missing(row[key])), found[0])


def _labelled(
    sources: Any, values: Any, origin: str, mark: str | None, places: list[str] | None = None, *, first: int = 1
) -> Examples:  # fmt: skip
    found = read_labels(values, origin, lambda row: places[row] if places else f"{origin}, row {row + first}")
    mark = mark and _digest(mark, found.values.tolist())
    return Examples(
        sources=sources, labels=found.values, classes=found.classes, written=found.written, several=found.several,
        origin=origin, fingerprint=mark, first=first,
    )  # fmt: skip


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


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
        if array.dtype.kind in "OS" and all(isinstance(x, str | bytes) for x in array.flat):  # TensorFlow's texts
            return np.array([x.decode() if isinstance(x, bytes) else x for x in array.flat]).reshape(array.shape)
        break
    raise DataError(f"{where}: a {type(value).__name__} cannot be made an array of numbers")
