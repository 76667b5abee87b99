"""ImageClassifier: images in, labels out."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np

from modelhub.core import custom, leaves, problems
from modelhub.core.backends import get_backend
from modelhub.core.backends.base import Array, Backend
from modelhub.core.nn import Linear
from modelhub.core.tree import Params, children, flatten
from modelhub.errors import InputError
from modelhub.families import vit
from modelhub.kinds import IMAGE_CLASSIFICATION
from modelhub.model.delegate import hands_on
from modelhub.model.loading import check_dtype, random_params
from modelhub.model.options import LoadOptions, takes
from modelhub.model.source import Source
from modelhub.processing.image import ImageProcessor
from modelhub.processing.image_reading import as_list
from modelhub.progress import bar
from modelhub.tasks.backbone import Backbone
from modelhub.tasks.task import Task, load
from modelhub.training import image_fit
from modelhub.training.arguments import check_whole
from modelhub.training.image_examples import as_array
from modelhub.training.images import channels_first, filled, prefetched
from modelhub.training.objectives import ImageObjective, Objective

_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "image_converter.json", "preprocessor.json")
ROWS = 32  # images that go through the model together outside of training


class ImageClassifier(Task):
    """An image encoder with a classification head, on one backend.

    Made by `from_preset` or `from_config`. Attributes: config (the family's), preprocessor (an ImageProcessor; with
    another size: `clf.preprocessor = clf.preprocessor.with_size(384)`), backbone, backend and device and dtype (names),
    labels, preset (where it came from).
    """

    kind = IMAGE_CLASSIFICATION
    task = kind.name
    backbone_frozen = False

    def __init__(
        self, backbone: Backbone, preprocessor: ImageProcessor | None, preset: str = "", new_head: bool = False
    ):
        if not backbone.config.num_labels:
            raise InputError(
                f"{preset or 'this model'} has no classification head: give num_classes= or labels= for a new one, or "
                f"load it as a Backbone for its features"
            )
        super().__init__(backbone, preset)
        self.preprocessor = preprocessor
        encoder = f"{backbone.config.model_type}."
        if new_head or any(not place.startswith(encoder) for place in backbone.new_layers):
            backbone.weights.new_heads = tuple(sorted({name.rpartition(".")[0] for name in self._heads()}))

    @classmethod
    @takes(LoadOptions)
    def from_preset(
        cls, preset: str | os.PathLike[str], *, num_classes: int | None = None, labels: Sequence[str] | None = None,
        problem_type: str | None = None, **options: Unpack[LoadOptions],
    ) -> Self:  # fmt: skip
        """Load a model; with a new head, drawn from `seed`, where num_classes or labels are given.

        labels: the names of the classes, saved as id2label. problem_type: what the head's logits mean, as in
        transformers: "single_label_classification", "multi_label_classification" (any number of labels an image), or
        "regression" (numbers); None: what the preset says, of a new head a single label. options, and errors: as for
        CausalLM.from_preset;
        InputError for a preset without a head if none is asked for.
        """
        count = _count(num_classes, labels, problem_type)

        def changed(source: Source) -> Source:
            if count is not None:
                source = _with_new_head(source, count, labels)
            if problem_type is None and count is None:
                return source
            return dataclasses.replace(source, config=dataclasses.replace(source.config, problem_type=problem_type))

        new_head = count is not None or not options.get("load_weights", True)
        return load(cls, preset, options, changed, new_head=new_head)

    @classmethod
    def processors(cls, source: Source) -> tuple[Any, ...]:
        told = any((source.preset.path / name).is_file() for name in _PROCESSORS)
        return (ImageProcessor.from_folder(source.preset.path) if told else None,)

    def write_processors(self, folder: Path) -> None:
        if self.preprocessor is not None:
            self.preprocessor.save(folder)

    @classmethod
    def from_config(
        cls,
        num_classes: int | None = None,
        *,
        labels: Sequence[str] | None = None,
        problem_type: str | None = None,
        image_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        num_channels: int = 3,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        classifier_dropout: float = 0.0,
        layer_norm_eps: float = 1e-12,
        qkv_bias: bool = True,
        class_token: bool = True,
        pooling: str | None = None,
        backend: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        attention: Callable | None = None,
        seed: int = 0,
    ) -> Self:
        """A ViT without a checkpoint, its weights drawn from `seed`, equal on all backends.

        Parameters are Hugging Face's ViTConfig's, and three of ours: classifier_dropout (before the head), class_token,
        and pooling: "cls" or "mean" (None: "cls" where there is a class token). problem_type: as in `from_preset`.
        Raises ConfigError.
        """
        xp = custom.with_attention(get_backend(backend, device), attention)
        count = _count(1000 if num_classes is None and labels is None else num_classes, labels, problem_type)
        assert count is not None
        named = dict(enumerate(labels)) if labels else None
        pooling = pooling or ("cls" if class_token else "mean")
        config = vit.Config(
            "vit", hidden_size, num_hidden_layers, num_attention_heads, hidden_act, hidden_dropout_prob,
            attention_probs_dropout_prob, layer_norm_eps, image_size, patch_size, num_channels, qkv_bias,
            named, None, count, class_token, pooling, classifier_dropout, problem_type,
            intermediate_size=intermediate_size,
        )  # fmt: skip
        model = vit.Model.abstract(config)
        dtype = check_dtype(dtype) or "float32"
        backbone = Backbone(model, random_params(model, xp, dtype, seed), xp, config, dtype)
        processor = None
        if num_channels in (1, 3):
            half = (0.5,) * num_channels
            processor = ImageProcessor(size=image_size, image_mean=half, image_std=half)
        return cls(backbone, processor, new_head=True)

    def __repr__(self) -> str:
        return f"ImageClassifier({self.described(f'{self.config.num_labels} classes')})"

    @property
    def labels(self) -> list[str]:
        """The names of the classes, in their order."""
        return [self.config.id2label.get(index, f"LABEL_{index}") for index in range(self.config.num_labels)]

    @property
    def names(self) -> list[str] | None:
        """The labels, if they are more than numbers."""
        labels = self.labels
        return None if labels == [f"LABEL_{index}" for index in range(len(labels))] else labels

    def name_labels(self, labels: Sequence[str]) -> None:
        """Say what the classes are called."""
        named = {"id2label": dict(enumerate(labels)), "label2id": None}
        self.backbone.config = dataclasses.replace(self.config, **named)

    @property
    def processor(self) -> ImageProcessor:
        """Gives all images one size. Raises InputError where there is none."""
        if self.preprocessor is None:
            raise InputError(
                "this model has no preprocessor_config.json, which would say how it takes images: set clf.preprocessor "
                "= ImageProcessor(...) of modelhub.processing.image"
            )
        found = self.preprocessor
        return found if found.output_size else found.with_size(self.config.image_size)

    # --- prediction ---------------------------------------------------------------------------------------------

    def predict(self, images: Any, top: int = 5) -> Any:
        """The likeliest labels of an image, [(label, probability), ...], or of each of several: a list of such lists.

        With the config's problem_type "multi_label_classification", and where there is one label alone, each has a
        probability of its own; with "regression" it is the number that was learnt, the largest first.

        images: one image or a list of them, each a path, bytes, a Pillow image or an array; see ImageProcessor. Or
        {"pixel_values": floats (B, C, H, W)}, which are taken as they are. Raises InputError, which names the file, for
        what is no image.
        """
        check_whole("top", top)
        shares = problems.scores(get_backend("numpy"), self.logits(images), self.config.problem_type)
        names = self.labels
        order = np.argsort(-shares, axis=1, kind="stable")[:, :top]
        found = [
            [(names[i], float(row[i])) for i in best] for row, best in zip(shares, order, strict=True)
        ]  # fmt: skip
        several = isinstance(images, list | tuple | Mapping) or len(getattr(images, "shape", ())) == 4
        return found if several else found[0]

    def logits(self, images: Any) -> np.ndarray:
        """float32 (images, classes), before softmax or sigmoid; images as for `predict`."""
        return np.concatenate([logits for _, logits in self._outputs(images)])

    def features(self, images: Any) -> np.ndarray:
        """float32 (images, width): what the head sees of each; images as for `predict`."""
        return np.concatenate([pooled for pooled, _ in self._outputs(images)])

    def _outputs(self, images: Any) -> Iterator[tuple[Any, np.ndarray]]:
        """`outputs` of the images, ROWS at a time, the next ones read while the model works."""
        if isinstance(images, Mapping) and "pixel_values" in images:
            ready = as_array(images["pixel_values"], "pixel_values")
            if ready.ndim != 4 or not ready.size:
                raise InputError(f"pixel_values must be (batch, channels, height, width), found {ready.shape}")
            ready = channels_first(ready, self.config.num_channels, "pixel_values")
            count = len(ready)
            pixels: Iterator[np.ndarray] = (ready[i : i + ROWS] for i in range(0, count, ROWS))
        else:
            listed, processor = as_list(images), self.processor
            if not (count := len(listed)):
                raise InputError("no images were given")
            pixels = prefetched(processor(listed[i : i + ROWS]) for i in range(0, count, ROWS))
        return iter(bar(self.outputs(pixels), desc="images", total=math.ceil(count / ROWS), unit="batch"))

    def outputs(self, batches: Iterable[np.ndarray], params: Params | None = None) -> Iterator[tuple[Any, np.ndarray]]:
        """Pooled (B, D) and logits (B, classes) of pixels (B, C, H, W), batch after batch."""
        now = self.backbone.weights.snapshot()
        xp, params = now.xp, now.params if params is None else params
        # On a processor the products take nearly all the time, and a compiler makes them little faster.
        hot = True if xp.device != "cpu" else None
        program = now.program(
            "classify", lambda now: now.xp.compile(functools.partial(_classified, now.xp), now.skeleton, hot=hot)
        )
        for pixels in batches:
            count = len(pixels)
            if hot or xp.traced:  # few shapes are compiled
                pixels = filled(pixels, np.zeros(count), 1 << (count - 1).bit_length())["pixels"]
            pooled, logits = program(params, xp.put(pixels))
            yield np.array(xp.get(pooled)[:count]), np.array(xp.get(logits)[:count])

    # --- training -----------------------------------------------------------------------------------------------

    fit = image_fit.fit
    evaluate = image_fit.evaluate
    confusion_matrix = image_fit.confusion_matrix

    def objective(
        self, metrics: Sequence[str] | None = None, label_smoothing: float = 0.0, frozen: bool = False
    ) -> Objective:
        return ImageObjective(self.config, label_smoothing, None if metrics is None else tuple(metrics), frozen)

    def freeze_backbone(self, frozen: bool = True) -> None:
        """From now on `fit` trains the head alone; frozen=False: everything again."""
        self.backbone_frozen = frozen

    def trainable_names(self, frozen: bool | None = None) -> list[str]:
        """The parameters that `fit` would train. frozen: None: as `freeze_backbone` said."""
        frozen = self.backbone_frozen if frozen is None else frozen
        return self._heads() if frozen and not self.has_adapter else self.backbone.trainable_names()

    def _heads(self) -> list[str]:
        """The parameters of the head."""
        encoder = f"{self.config.model_type}."
        return [name for name in self.backbone.plain_names() if not name.startswith(encoder)]

    @hands_on(Task.load_adapter)
    def load_adapter(self, *args: Any, **named: Any) -> str:
        """As Task.load_adapter. A model whose classes have no names takes those saved with the adapter's head."""
        name = self.backbone.load_adapter(*args, **named)
        labels = self.backbone.adapters[name].labels
        if len(labels) == self.config.num_labels and self.names is None:
            self.name_labels(labels)
        return name

    @property
    def adapter_labels(self) -> Sequence[str]:
        adapter = self.backbone.adapter
        return self.labels if adapter and {*self._heads()} & {*adapter.whole} else ()


def _classified(xp: Backend, model: Any, pixels: Array) -> tuple[Array, Array]:
    """float32 pooled (B, D) and logits (B, classes)."""
    dtype = leaves.dtype_of(next(iter(flatten(model).values())))
    pooled = model.pooled(xp, model.hidden(xp, xp.cast(pixels, dtype)))
    return xp.cast(pooled, "float32"), model.head(xp, pooled)


def _count(num_classes: int | None, labels: Sequence[str] | None, problem_type: str | None = None) -> int | None:
    """How many classes a new head has; None: there is to be none."""
    if problem_type not in (None, *problems.PROBLEM_TYPES):
        known = ", ".join(problems.PROBLEM_TYPES)
        raise InputError(f"problem_type must be one of {known}, got {problem_type!r}")
    if labels is not None:
        if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
            raise InputError(f"labels must be a list of texts, got {labels!r:.100}")
        if len(set(labels)) < len(labels):
            raise InputError("labels must all be different: what is predicted is told by its label")
        if num_classes not in (None, len(labels)):
            raise InputError(f"num_classes={num_classes} was given beside {len(labels)} labels; give one of them")
        num_classes = len(labels)
    if num_classes == 1 and problem_type in (None, problems.SINGLE_LABEL):
        raise InputError(
            "num_classes must be a whole number, 2 or more, got 1; one output is for a number, "
            f"problem_type={problems.REGRESSION!r}, or for a yes or no, {problems.MULTI_LABEL!r}"
        )
    if num_classes is not None:
        check_whole("num_classes", num_classes, 2 if problem_type in (None, problems.SINGLE_LABEL) else 1)
    return num_classes


def _with_new_head(source: Source, count: int, labels: Sequence[str] | None) -> Source:
    """The source's encoder under a head of its own kind for other classes."""
    named = {"id2label": dict(enumerate(labels)) if labels else None, "label2id": None}
    config = dataclasses.replace(source.config, num_labels=count, **named)
    plain = type(source.model).abstract(config)
    heads = {name for whole in (source.model, plain) for name, part in children(whole) if isinstance(part, Linear)}
    return dataclasses.replace(source, config=config, model=plain, new_parts=tuple(sorted(heads)))
