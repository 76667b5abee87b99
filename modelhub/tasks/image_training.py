"""What an image classifier needs to be trained: compile, fit, evaluate, the confusion matrix."""

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from modelhub.core.head import Loss
from modelhub.core.problems import SINGLE_LABEL, problem_of
from modelhub.core.tree import Params
from modelhub.errors import ConfigError, DataError, InputError
from modelhub.processing.augment import Augment
from modelhub.processing.image import ImageProcessor
from modelhub.processing.image_reading import OnError
from modelhub.training.batches import BatchSource
from modelhub.training.callbacks import Callback
from modelhub.training.confusion import ConfusionMatrix
from modelhub.training.engine import Engine, Settings
from modelhub.training.history import History
from modelhub.training.image_examples import Examples, read_examples
from modelhub.training.images import ImageBatches, ReadyImages
from modelhub.training.loaders import repeatable
from modelhub.training.objectives import ImageObjective
from modelhub.training.trainer import Trainable, called, check_batch_size, check_split

log = logging.getLogger("modelhub")


class ImageTraining(Trainable):
    """Mixed into tasks that have a backbone with a classification head and an image processor."""

    preprocessor: ImageProcessor | None
    backbone_frozen = False
    _new_head: bool  # an adapter alone would be trained under a head that knows nothing
    _learning: dict[str, Any] = {}  # what ImageObjective is told

    @property
    def saves_adapter(self) -> bool:
        return self.has_adapter and not self._new_head

    @property
    def labels(self) -> list[str]:
        """The names of the classes, in their order."""
        return [self.config.id2label.get(index, f"LABEL_{index}") for index in range(self.config.num_labels)]

    @property
    def _names(self) -> list[str] | None:
        """The labels, if they are more than numbers."""
        labels = self.labels
        return None if labels == [f"LABEL_{index}" for index in range(len(labels))] else labels

    @property
    def _processor(self) -> ImageProcessor:
        """Gives all images one size."""
        if self.preprocessor is None:
            raise InputError(
                "this model has no preprocessor_config.json, which would say how it takes images: set clf.preprocessor "
                "= ImageProcessor(...) of modelhub.processing.image"
            )
        found = self.preprocessor
        return found if found.output_size else found.with_size(self.config.image_size)

    def _outputs(self, batches: Iterable[np.ndarray], params: Params | None = None) -> Iterator[tuple[Any, np.ndarray]]:
        """Pooled (B, D) and logits (B, classes) of pixels (B, C, H, W), batch after batch."""
        raise NotImplementedError

    def enable_lora(
        self, rank: int = 4, alpha: float | None = None, dropout: float = 0.0,
        targets: str | Sequence[str] | None = None, use_rslora: bool = False, use_dora: bool = False,
        *, name: str = "default", seed: int = 0,
    ) -> None:  # fmt: skip
        """Add a low-rank adapter, which `fit` then trains, with the head if that is new; see Backbone.enable_lora.

        targets: None: the projections of queries and values.
        """
        super().enable_lora(rank, alpha, dropout, targets, use_rslora, use_dora, name=name, seed=seed)

    def freeze_backbone(self, frozen: bool = True) -> None:
        """From now on `fit` trains the head alone; frozen=False: everything again."""
        self.backbone_frozen = frozen

    def compile(
        self, optimizer: Any = "adamw", learning_rate: float | None = None, schedule: Any = None,
        weight_decay: float = 0.0, clip_norm: float | None = None, loss: Loss | str | None = None,
        metrics: Sequence[str] | None = None, mixed_precision: str | None = None,
        matmul_precision: str | None = None, remat: bool = False, jit: bool | None = None,
        *, label_smoothing: float = 0.0,
    ) -> None:  # fmt: skip
        """Say how to train; see CausalLM.compile for what is not said here. Raises ConfigError.

        loss: loss(logits, labels) -> one loss per image, logits (B, classes) float32, labels (B,) int32, or where they
            are soft (B, classes); or loss(xp, logits, labels), or the name of a registered one. None: what the config's
            problem_type asks for: cross entropy, binary cross entropy for several labels an image, squared error.
        metrics: "accuracy", and "top5_accuracy" with any number in place of 5; for several labels an image "accuracy"
            (the share of labels that are right) and "exact_match" (of images whose labels all are); for regression
            "mae". None: all of the problem's.
        label_smoothing: the share of each label that is spread over all classes.
        """
        learning: dict[str, Any] = {"label_smoothing": label_smoothing}
        learning |= {"metrics": None if metrics is None else tuple(metrics)}
        ImageObjective(self.config, **learning)  # raises for what makes no sense
        if loss is not None and label_smoothing:
            raise ConfigError(
                "label_smoothing belongs to cross entropy: put it into the loss, or leave one of them out"
            )
        self._compile(
            optimizer, learning_rate, schedule, weight_decay, clip_norm, loss, mixed_precision, matmul_precision, remat,
            jit, label_smoothing=label_smoothing,
        )  # fmt: skip
        self._learning = learning

    def fit(
        self, data: Any, epochs: int = 1, batch_size: int = 32, steps: int | None = None, validation_data: Any = None,
        grad_accum: int = 1, augment: Augment | bool | None = None, freeze_backbone: bool | None = None,
        callbacks: Sequence[Callback] = (), checkpoint_dir: str | os.PathLike[str] | None = None,
        resume: str | bool = "auto", seed: int = 0,
        *, validation_split: float = 0.0, on_error: OnError = "raise", save_steps: int | None = None,
        verbose: bool = True,
    ) -> History:  # fmt: skip
        """Train on data: all weights, the head alone, or the active adapter. Returns what was measured.

        Without a call of `compile`: with AdamW, and a learning rate of 5e-5, or 1e-3 for a head alone.

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
        frozen = self.backbone_frozen if freeze_backbone is None else freeze_backbone
        if self._compiled is None:
            self.compile(learning_rate=1e-3 if frozen else None)
        compiled, plan = self._ready(
            epochs, steps, grad_accum, checkpoint_dir, resume, save_steps, callbacks, seed
        )  # fmt: skip
        check_batch_size(batch_size)
        augment = Augment(seed=seed) if augment is True else augment or None
        if not isinstance(augment, Augment | None):
            raise InputError(f"augment must be an Augment, True or False, got {augment!r}")
        name = called(data)
        examples, data = self._examples(data, training=True)
        held_out, held_data = None, validation_data
        if validation_split:
            check_split(validation_split, validation_data)
            if examples is None:
                raise InputError("validation_split takes examples; of ready batches give some as validation_data")
            examples, held_out = examples.split(validation_split, seed)
        elif validation_data is not None:
            held_out, held_data = self._examples(repeatable(validation_data))
        train = self._batches(data, examples, batch_size, augment=augment, seed=seed, on_error=on_error)
        validation = None
        if held_out is not None or held_data is not None:
            validation = self._batches(held_data, held_out, batch_size, shuffle=False, on_error=on_error)
        self.backbone.keep_merged()
        frozen = frozen and not self.has_adapter
        total = plan.total_steps(train)
        if frozen and augment is None and isinstance(train, ImageBatches) and (total or 0) > train.steps(0):
            train = self._pooled(train, compiled.settings, verbose)
            if isinstance(validation, ImageBatches):
                validation = self._pooled(validation, compiled.settings, verbose)
        positions = int(np.prod(self.config.grid)) + self.config.tokens_before
        return self._train(
            train, validation, compiled, plan, ImageObjective(self.config, **self._learning, frozen=frozen),
            self._trained_names(frozen), seed=seed, dropout=True, shape=(batch_size, positions), callbacks=callbacks,
            settings={
                "batch_size": batch_size, "seed": seed, "freeze_backbone": frozen, "on_error": on_error,
                "augment": augment and dataclasses.asdict(augment),
                "preprocessor": self.preprocessor and self.preprocessor.to_config(),
            },
            called=name, verbose=verbose,
        )  # fmt: skip

    def evaluate(self, data: Any, batch_size: int = 32, *, on_error: OnError = "raise") -> dict[str, float]:
        """loss, accuracy and top5_accuracy (the metrics of `compile`), means over images, and their number: images.

        Without metrics in `compile` those of the problem: for several labels an image accuracy and exact_match.

        data, batch_size, on_error: as in `fit`.
        """
        settings = self._compiled.settings if self._compiled else Settings()
        objective = ImageObjective(self.config, **self._learning)
        engine = Engine(self.backbone.xp, self.backbone.model, self.params, (), settings, objective)
        return engine.evaluate(self._in_order(data, batch_size, on_error))

    def confusion_matrix(
        self, data: Any, path: str | os.PathLike[str] | None = None, batch_size: int = 32,
        *, on_error: OnError = "raise",
    ) -> np.ndarray:  # fmt: skip
        """How many images of each class (rows) were taken for each class (columns): int64 (classes, classes).

        For several labels an image (classes, 2, 2): of each label, how many images have it not or have it (rows), and
        were taken so (columns), as scikit-learn's multilabel_confusion_matrix. Raises InputError for regression.

        data, batch_size, on_error: as in `fit`. path: a picture of it, .png, .svg or .pdf, which takes matplotlib.
        """
        problem = problem_of(self.config)
        matrix = ConfusionMatrix(self.labels, problem, drawn=path is not None)
        for batch in self._in_order(data, batch_size, on_error):
            (_, logits), *_ = self._outputs([batch["pixels"]])
            matrix.add(logits, batch["labels"], batch["weights"] > 0)
        if path is not None:
            matrix.draw(Path(path))
        return matrix.counts

    def _examples(self, data: Any, training: bool = False) -> tuple[Examples | None, Any]:
        """read_examples, with labels as the model counts them; a model without names takes those of its first data."""
        examples, data = read_examples(data)
        if examples is None:
            return None, data
        if training and self.config.problem_type is None:
            self._decide(examples.told)
        problem = problem_of(self.config)
        names = self._names
        if training and problem == SINGLE_LABEL and len(found := np.unique(examples.kinds)) < 2:
            name = examples.classes[int(found[0])] if examples.classes else found[0]
            raise DataError(f"{examples.origin} has images of one class only ({name}): nothing can be told apart")
        examples = examples.numbered(self.config.num_labels, names, problem)
        if training and names is None and examples.classes:
            self._name(examples.classes)
        return examples, data

    def _decide(self, told: str | None) -> None:
        """What the first training data are for decides what a config without a problem_type is, as in transformers."""
        if told is not None or self.config.num_labels == 1:
            told = told or problem_of(self.config)
            self.backbone.config = dataclasses.replace(self.config, problem_type=told)
            log.info("problem_type: %s, as the labels tell", told)

    def _name(self, labels: Sequence[str]) -> None:
        named = {"id2label": dict(enumerate(labels)), "label2id": None}
        self.backbone.config = dataclasses.replace(self.config, **named)

    def _batches(
        self, data: Any, examples: Examples | None, batch_size: int, *, augment: Augment | None = None,
        seed: int = 0, shuffle: bool = True, on_error: OnError = "raise",
    ) -> BatchSource:  # fmt: skip
        if examples is not None:
            rows = min(batch_size, len(examples))
            return ImageBatches(
                examples, self._processor, self.config.num_labels, rows, augment, seed, shuffle, on_error
            )
        if augment is not None:
            raise InputError("ready batches are taken as they come: augment the images where the batches are made")
        config = self.config
        return ReadyImages(
            data, self.preprocessor and self._processor, config.num_channels, config.num_labels, self._names,
            problem_of(config),
        )  # fmt: skip

    def _in_order(self, data: Any, batch_size: int, on_error: OnError) -> Iterator[Any]:
        check_batch_size(batch_size)
        examples, data = self._examples(data)
        return self._batches(data, examples, batch_size, shuffle=False, on_error=on_error).epoch(0)

    def _pooled(self, batches: ImageBatches, settings: Settings, verbose: bool) -> ImageBatches:
        """The same with what the encoder makes of the images, which were all read once; broken ones are left out."""
        xp, params = self.backbone.xp, self.params
        if settings.compute_dtype:
            params = {name: xp.cast(x, settings.compute_dtype) for name, x in params.items()}
        kept: list[np.ndarray] = []

        def pixels() -> Iterator[np.ndarray]:
            in_order = dataclasses.replace(batches, shuffle=False)
            for batch in tqdm(
                in_order.epoch(0), "features", in_order.steps(0), leave=False, disable=None if verbose else True
            ):  # fmt: skip
                kept.append(batch["weights"] > 0)
                yield batch["pixels"]

        found = np.concatenate([pooled for pooled, _ in self._outputs(pixels(), params)])
        read = np.flatnonzero(np.concatenate(kept))
        return dataclasses.replace(batches, examples=batches.examples.only(read), pooled=found[read])

    def _trainable_names(self) -> list[str]:
        return self._trained_names(self.backbone_frozen and not self.has_adapter)

    def _trained_names(self, frozen: bool) -> list[str]:
        encoder = f"{self.config.model_type}."
        head = [name for name in self.params if not name.startswith(encoder)]
        if self.has_adapter:
            adapter = self.backbone.trainable_names()
            return adapter + [name for name in head if self._new_head and name not in adapter]
        return head if frozen else list(self.params)
