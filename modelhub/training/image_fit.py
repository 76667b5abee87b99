"""How image classifiers are trained: `fit`, `evaluate`, `confusion_matrix`, methods of a task with a preprocessor."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelhub.core.problems import SINGLE_LABEL, problem_of
from modelhub.errors import DataError, InputError
from modelhub.processing.augment import Augment
from modelhub.processing.image_reading import OnError
from modelhub.progress import bar
from modelhub.training.arguments import check_split, check_whole, name_of
from modelhub.training.batches import BatchSource
from modelhub.training.callbacks import Callback
from modelhub.training.confusion import ConfusionMatrix
from modelhub.training.engine import Settings
from modelhub.training.history import History
from modelhub.training.image_examples import Examples, read_examples
from modelhub.training.images import ImageBatches, ReadyImages
from modelhub.training.loaders import repeatable

log = logging.getLogger("modelhub")


def fit(
    task: Any, data: Any, epochs: int = 1, batch_size: int = 32, steps: int | None = None, validation_data: Any = None,
    grad_accum: int = 1, augment: Augment | bool | None = None, freeze_backbone: bool | None = None,
    callbacks: Sequence[Callback] = (), checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: str | bool = "auto", seed: int = 0,
    *, validation_split: float = 0.0, on_error: OnError = "raise", save_steps: int | None = None,
    verbose: bool = True,
) -> History:  # fmt: skip
    """Train on data: all weights, the head alone, or the active adapter. Returns what was measured.

    Without a call of `compile`: with AdamW, and a learning rate of 5e-5, 2e-4 for an adapter, or 1e-3 for a head
    alone.

    data: a folder with a folder per class; a .csv, .jsonl, .json or .parquet file of image paths and labels; arrays
        (images, labels); a list of dicts with image and label; a Hugging Face Dataset; or an iterable of ready
        batches, such as a torch DataLoader or a tf.data pipeline: pairs (images, labels), or dicts. Their floats
        are taken as they are, and their integers go through the preprocessor, as all other images do.
    batch_size: images in one step; ready batches have their own. grad_accum: batches in one optimizer step.
    steps: optimizer steps in all; None: as many as `epochs` have.
    validation_data: like data, or validation_split: a share of each class to hold out; measured after each epoch.
    augment: an Augment, or True for its defaults (a random part of the image, mirrored half of the time).
    freeze_backbone: True: the head alone; without `augment` the encoder then sees each image only once, in however
        many epochs. None: what `freeze_backbone()` said, else False. With an adapter, that is what is trained, and
        the head if it is new.
    on_error: what to do about images that cannot be read: "raise", or "skip" with a warning that names them.
    checkpoint_dir, resume, save_steps, seed, callbacks, verbose, and what a second call goes on with: as in
        CausalLM.fit.

    Raises DataError and InputError (which name the file), ConfigError, NoGradients (numpy), ResumeError,
    TrainingError (a loss that is not a number).
    """
    frozen = task.backbone_frozen if freeze_backbone is None else freeze_backbone
    compiled, plan = task.trainer.plan(
        epochs, steps, grad_accum, checkpoint_dir, resume, save_steps, callbacks, seed, verbose,
        learning_rate=1e-3 if frozen else None,
    )  # fmt: skip
    check_whole("batch_size", batch_size)
    augment = Augment(seed=seed) if augment is True else augment or None
    if not isinstance(augment, Augment | None):
        raise InputError(f"augment must be an Augment, True or False, got {augment!r}")
    name = name_of(data)
    examples, data = _examples(task, data, training=True)
    held_out, held_data = None, validation_data
    if validation_split:
        check_split(validation_split, validation_data)
        if examples is None:
            raise InputError("validation_split takes examples; of ready batches give some as validation_data")
        examples, held_out = examples.split(validation_split, seed)
    elif validation_data is not None:
        held_out, held_data = _examples(task, repeatable(validation_data))
    train = _batches(task, data, examples, batch_size, augment=augment, seed=seed, on_error=on_error)
    validation = None
    if held_out is not None or held_data is not None:
        validation = _batches(task, held_data, held_out, batch_size, shuffle=False, on_error=on_error)
    task.backbone.keep_merged()
    frozen = frozen and not task.has_adapter
    total = plan.total_steps(train)
    if frozen and augment is None and isinstance(train, ImageBatches) and (total or 0) > train.steps(0):
        train = _pooled(task, train, compiled.settings, verbose)
        if isinstance(validation, ImageBatches):
            validation = _pooled(task, validation, compiled.settings, verbose)
    positions = int(np.prod(task.config.grid)) + task.config.tokens_before
    return task.trainer.run(
        train, validation, plan, task.objective(**compiled.objective, frozen=frozen), task.trainable_names(frozen),
        seed=seed, dropout=True, shape=(batch_size, positions), callbacks=callbacks,
        settings={
            "batch_size": batch_size, "seed": seed, "freeze_backbone": frozen, "on_error": on_error,
            "augment": augment and dataclasses.asdict(augment),
            "preprocessor": task.preprocessor and task.preprocessor.to_config(),
        },
        data=name, verbose=verbose,
    )  # fmt: skip


def evaluate(task: Any, data: Any, batch_size: int = 32, *, on_error: OnError = "raise") -> dict[str, float]:
    """loss, accuracy and top5_accuracy (the metrics of `compile`), means over images, and their number: images.

    Without metrics in `compile` those of the problem: for several labels an image accuracy and exact_match.

    data, batch_size, on_error: as in `fit`.
    """
    return task.trainer.evaluate(_in_order(task, data, batch_size, on_error))


def confusion_matrix(
    task: Any, data: Any, path: str | os.PathLike[str] | None = None, batch_size: int = 32,
    *, on_error: OnError = "raise",
) -> np.ndarray:  # fmt: skip
    """How many images of each class (rows) were taken for each class (columns): int64 (classes, classes).

    For several labels an image (classes, 2, 2): of each label, how many images have it not or have it (rows), and
    were taken so (columns), as scikit-learn's multilabel_confusion_matrix. Raises InputError for regression.

    data, batch_size, on_error: as in `fit`. path: a picture of it, .png, .svg or .pdf, which takes matplotlib.
    """
    matrix = ConfusionMatrix(task.labels, problem_of(task.config), drawn=path is not None)
    for batch in _in_order(task, data, batch_size, on_error):
        (_, logits), *_ = task.outputs([batch["pixels"]])
        matrix.add(logits, batch["labels"], batch["weights"] > 0)
    if path is not None:
        matrix.draw(Path(path))
    return matrix.counts


def _examples(task: Any, data: Any, training: bool = False) -> tuple[Examples | None, Any]:
    """read_examples, with labels as the model counts them; a model without names takes those of its first data."""
    examples, data = read_examples(data)
    if examples is None:
        return None, data
    if training and task.config.problem_type is None:
        _decide(task, examples.told)
    problem, names = problem_of(task.config), task.names
    examples = examples.numbered(task.config.num_labels, names, problem)
    if training and problem == SINGLE_LABEL and (only := examples.only_class()) is not None:
        raise DataError(f"{examples.origin} has images of one class only ({only}): nothing can be told apart")
    if training and names is None and examples.classes:
        task.name_labels(examples.classes)
    return examples, data


def _decide(task: Any, told: str | None) -> None:
    """What the first training data are for decides what a config without a problem_type is, as in transformers."""
    if told is not None or task.config.num_labels == 1:
        told = told or problem_of(task.config)
        task.backbone.config = dataclasses.replace(task.config, problem_type=told)
        log.info("problem_type: %s, as the labels tell", told)


def _batches(
    task: Any, data: Any, examples: Examples | None, batch_size: int, *, augment: Augment | None = None,
    seed: int = 0, shuffle: bool = True, on_error: OnError = "raise",
) -> BatchSource:  # fmt: skip
    if examples is not None:
        rows = min(batch_size, len(examples))
        return ImageBatches(examples, task.processor, task.config.num_labels, rows, augment, seed, shuffle, on_error)
    if augment is not None:
        raise InputError("ready batches are taken as they come: augment the images where the batches are made")
    config = task.config
    return ReadyImages(
        data, task.preprocessor and task.processor, config.num_channels, config.num_labels, task.names,
        problem_of(config),
    )  # fmt: skip


def _in_order(task: Any, data: Any, batch_size: int, on_error: OnError) -> Iterator[Any]:
    check_whole("batch_size", batch_size)
    examples, data = _examples(task, data)
    batches = _batches(task, data, examples, batch_size, shuffle=False, on_error=on_error)
    return iter(bar(batches.epoch(0), desc="evaluating", total=batches.steps(0), unit="batch"))


def _pooled(task: Any, batches: ImageBatches, settings: Settings, verbose: bool) -> ImageBatches:
    """The same with what the encoder makes of the images, which were all read once; broken ones are left out."""
    xp, params = task.backbone.xp, task.params
    if settings.compute_dtype:
        params = {name: xp.cast(x, settings.compute_dtype) for name, x in params.items()}
    kept: list[np.ndarray] = []

    def pixels() -> Iterator[np.ndarray]:
        in_order = dataclasses.replace(batches, shuffle=False)
        for batch in bar(
            in_order.epoch(0), desc="features", total=in_order.steps(0), disable=None if verbose else True
        ):  # fmt: skip
            kept.append(batch["weights"] > 0)
            yield batch["pixels"]

    found = np.concatenate([pooled for pooled, _ in task.outputs(pixels(), params)])
    read = np.flatnonzero(np.concatenate(kept))
    return dataclasses.replace(batches, examples=batches.examples.only(read), pooled=found[read])
