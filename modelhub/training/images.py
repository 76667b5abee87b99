"""Images and their labels as batches of static shapes, made ahead of their use.

A batch is a dict of arrays:
  pixels   float32 (rows, channels, height, width), normalised; 0 where there is no image
  labels   int32 (rows,), or float32 (rows, classes): soft, several, or numbers, as core/problems.py has them
  weights  float32 (rows,): 1 for an image, 0 for a row that only fills up the batch
or, where only a head is trained, pooled float32 (rows, width) in place of pixels: what the encoder makes of them.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from modelhub.core.problems import SINGLE_LABEL, check_labels
from modelhub.errors import DataError
from modelhub.processing.augment import Augment
from modelhub.processing.image import ImageProcessor
from modelhub.processing.image_reading import OnError
from modelhub.training.image_examples import IMAGE_KEYS, LABEL_KEYS, Examples, as_array, key_of
from modelhub.training.labels import Labelled, ambiguous, read_labels
from modelhub.training.ready_batches import Batch, ReadyBatches

log = logging.getLogger("modelhub")

T = TypeVar("T")

AHEAD = 2  # batches that are made while the accelerator works


@dataclass(frozen=True)
class ImageDataReport:
    """What the training data comes to."""

    examples: int
    classes: int
    least: int  # images of the class that has the fewest
    steps: int
    batch_size: int

    def __rich__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return (
            f"{self.examples:,} images of {self.classes} classes, at least {self.least:,} of each\n"
            f"{self.steps:,} steps an epoch, each {self.batch_size} images"
        )


@dataclass(frozen=True)
class ImageBatches:
    """Examples in shuffled batches, read and resized in threads ahead of their use.

    The order, and what `augment` does to an image, depend on (seed, epoch) alone. shuffle False: every epoch alike.
    on_error: "raise" for images that cannot be read, or "skip": a warning names them, and their rows stay empty.
    pooled: what an encoder made of the examples, (N, D) float32, to give in place of their pixels.
    """

    examples: Examples
    processor: ImageProcessor
    num_classes: int
    batch_size: int
    augment: Augment | None = None
    seed: int = 0
    shuffle: bool = True
    on_error: OnError = "raise"
    pooled: np.ndarray | None = None
    _broken: set[int] = field(default_factory=set, repr=False, compare=False)  # rows that were skipped, and told of

    @property
    def fingerprint(self) -> str | None:
        return self.examples.fingerprint

    def steps(self, epoch: int) -> int:
        return -(-len(self.examples) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on, which costs nothing."""
        rows, size = np.arange(len(self.examples)), self.batch_size
        if self.shuffle:
            rows = np.random.default_rng([self.seed, epoch]).permutation(len(rows))
        numbers = range(start, self.steps(epoch))
        seen = start
        for batch in prefetched(self._batch(rows[n * size : (n + 1) * size], epoch, n) for n in numbers):
            seen += int(batch["weights"].any())
            yield batch
        if not seen:
            raise DataError(f"none of the {len(rows)} images of {self.examples.origin} can be read")

    def state_dict(self) -> dict[str, Any]:
        """Nothing: (seed, epoch, start) say it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def report(self) -> ImageDataReport:
        counts = np.unique(self.examples.kinds, return_counts=True)[1]
        return ImageDataReport(len(self.examples), len(counts), int(counts.min()), self.steps(0), self.batch_size)

    def _batch(self, rows: np.ndarray, epoch: int, number: int) -> Batch:
        if self.pooled is not None:
            batch = filled(self.pooled[rows], self.examples.labels[rows], self.batch_size)
            return {"pooled": batch.pop("pixels")} | batch
        augment, processor = self.augment, self.processor
        rows = np.array([row for row in rows if row not in self._broken], np.int64)

        def changed(index: int, image: Image.Image) -> Image.Image:
            return augment.image(image, processor, int(rows[index]), epoch)  # type: ignore[union-attr]

        sources = [self.examples.sources[int(row)] for row in rows]
        if not sources:  # all of them were broken in the epoch before
            return filled(self._nothing(), self.examples.labels[:0], self.batch_size)
        pixels, kept = processor.load(sources, changed if augment else None, self.on_error)
        self._broken.update(set(rows.tolist()) - set(rows[kept].tolist()))
        labels = self.examples.labels[rows[kept]]
        if augment is not None and augment.mixes:
            pixels, labels = augment.batch(pixels, labels, self.num_classes, number, epoch)
        return filled(pixels, labels, self.batch_size)

    def _nothing(self) -> np.ndarray:
        """Pixels of no image. The processor that fit gives a batch has one size for all."""
        height, width = self.processor.output_size or (0, 0)
        return np.empty((0, self.processor.channels, height, width), np.float32)


def filled(pixels: np.ndarray, labels: np.ndarray, rows: int) -> Batch:
    """A batch of so many rows, those that are missing with weight 0."""
    missing = max(rows - len(pixels), 0)
    batch = {"pixels": pixels, "labels": labels, "weights": np.ones(len(pixels), np.float32)}
    if not missing:
        return batch
    return {n: np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]) for n, x in batch.items()}


def prefetched(items: Iterable[T]) -> Iterator[T]:
    """The same items, AHEAD of them made by a thread while the caller works on the one before."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, "prefetch") as pool:
        pending = deque(pool.submit(next, iterator, end) for _ in range(AHEAD))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(pool.submit(next, iterator, end))
                yield item  # type: ignore[misc]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# --- ready batches ----------------------------------------------------------------------------------------------------


class ReadyImages(ReadyBatches):
    """Batches from any iterable: a torch DataLoader, a tf.data pipeline, a list, a generator. Checked and completed.

    A batch is a pair (images, labels), or a dict with one of IMAGE_KEYS and one of LABEL_KEYS; arrays of any framework.
    Floats are pixels as the model takes them, (B, C, H, W) or (B, H, W, C), and go through no processor; integers, and
    lists of images, do. The last batch is filled up to the size of the first.
    """

    _nothing = "there is no image in {}"

    def __init__(
        self, data: Iterable[Any], processor: ImageProcessor | None, channels: int, num_classes: int | None = None,
        names: Sequence[str] | None = None, problem: str = SINGLE_LABEL,
    ) -> None:  # fmt: skip
        """num_classes (None: not known), names, problem: of the model; see Labelled.numbered."""
        super().__init__(data)
        self._processor, self._channels, self._rows = processor, channels, 0
        self._num_classes, self._names, self._problem = num_classes, names, problem
        self._warned = False
        self._state: dict[str, Any] = {}

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of a pass, from batch `start` on. Raises DataError for batches that cannot be used."""
        batches, state = super().epoch(epoch, start), super().state_dict
        # The iterable is ahead of what was trained on: each batch comes with the state it left the iterable in.
        for batch, self._state in prefetched((batch, state()) for batch in batches):
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def complete(self, batch: Any, where: str) -> Batch:
        if isinstance(batch, Mapping):
            images, labels = batch[key_of(batch, IMAGE_KEYS, where)], batch[key_of(batch, LABEL_KEYS, where)]
        elif isinstance(batch, list | tuple) and len(batch) == 2:
            images, labels = batch
        else:
            raise DataError(
                f"{where} must be a pair (images, labels), or a dict with image and label; found {type(batch).__name__}"
            )
        pixels = self._pixels(images, where)
        found = self._labels(labels, where)
        if len(found) != len(pixels):
            raise DataError(f"{where} has {len(pixels)} images and {len(found)} labels")
        self._rows = self._rows or len(pixels)
        return filled(pixels, found, self._rows)

    def learnt(self, batch: Batch) -> int:
        return int((batch["weights"] > 0).sum())

    def _labels(self, labels: Any, where: str) -> np.ndarray:
        """As core/problems.py has them."""
        listed = isinstance(labels, list | tuple)
        read = read_labels(labels if listed else as_array(labels, f"{where}: labels"), where, lambda row: where)
        if read.classes is not None and self._names is None:
            raise DataError(f"{where}: labels must be numbers, found {read.classes[0]!r}")
        values, names = read.values, self._names
        classes = self._num_classes or (values.shape[1] if values.ndim == 2 else int(values.max(initial=0)) + 1)
        if self._problem == SINGLE_LABEL and values.ndim == 1 and read.classes is None and read.written is None:
            check_labels(values, classes, SINGLE_LABEL, where)
            self._warn(values, where)
            names = None
        given = Labelled(labels=values, classes=read.classes, written=read.written, several=read.several, origin=where)
        return given.numbered(classes, names, self._problem).labels

    def _warn(self, values: np.ndarray, where: str) -> None:
        """Once, where numbers may be meant as names: of tensors they are positions, which is all that most hold."""
        value = None if self._warned else ambiguous(values, self._names)
        if value is not None and self._names is not None:
            self._warned = True
            log.warning(
                "%s: labels that are numbers count as positions: %d is the class %r, not %r; give names as texts",
                where, value, self._names[value], str(value),
            )  # fmt: skip

    def _pixels(self, images: Any, where: str) -> np.ndarray:
        if isinstance(images, list | tuple):
            return self._processed(list(images), where)
        array, wanted = as_array(images, f"{where}: images"), self._channels
        array = array[..., None] if array.ndim == 3 else array  # grey
        if array.ndim != 4 or not array.size:
            raise DataError(
                f"{where}: images must have the shape (batch, channels, height, width) or (batch, height, width, "
                f"channels), found {array.shape}"
            )
        if array.dtype.kind != "f":
            return self._processed(array, where)
        return channels_first(array, wanted, where)

    def _processed(self, images: Any, where: str) -> np.ndarray:
        if self._processor is None:
            raise DataError(f"{where}: the model has no preprocessor for images; give pixels as floats, or set one")
        return self._processor(images)


def channels_first(pixels: np.ndarray, channels: int, where: str) -> np.ndarray:
    """float32 (B, C, H, W), a copy: loaders use their memory again. Raises DataError for shapes that do not tell."""
    first, last = pixels.shape[1] == channels, pixels.shape[3] == channels
    if first == last:
        what = "its first or its last axis may be the channels" if first else f"no axis has {channels} channels"
        raise DataError(f"{where}: images of shape {pixels.shape[1:]}: {what}; give them as (channels, height, width)")
    return np.array(pixels if first else np.moveaxis(pixels, 3, 1), np.float32, order="C")
