"""Task: what all tasks have in common. A new one says what it is (a TaskKind) and what makes its inputs."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import numpy as np

from modelhub.bench.compare import choose_backend
from modelhub.core.leaves import count
from modelhub.core.tree import Params
from modelhub.errors import InputError
from modelhub.habits import Habits
from modelhub.kinds import TEXT, TaskKind, kind_reading
from modelhub.model import placement
from modelhub.model.adapters import AdapterSet
from modelhub.model.delegate import attribute, delegate
from modelhub.model.options import LoadOptions, takes
from modelhub.model.source import Source, open_source
from modelhub.publishing import publishing
from modelhub.tasks.backbone import Backbone
from modelhub.training.trainer import Trainer


class Task(Habits):
    """A model, what makes its inputs, and what can be done with both.

    backbone: the model; its `weights` own all arrays. trainer: how it is trained. preset: where it came from. Tasks say
    what they are: `kind`, `processors`, `write_processors`; and those that learn, `objective`.
    """

    kind: ClassVar[TaskKind]
    stop_training = False  # set by callbacks, as in Keras

    def __init__(self, backbone: Backbone, preset: str = ""):
        self.backbone, self.preset, self.trainer = backbone, preset, Trainer(self)

    @classmethod
    @takes(LoadOptions)
    def from_preset(cls, preset: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> Self:
        """Load a model.

        preset: a registry name, a Hugging Face folder, a .gguf file, or hf://org/repo[@revision]. options: backend,
        device, dtype, revision, offline, token, cache_dir, load_weights, attention, layers and seed; see
        modelhub.model.options.LoadOptions.

        Raises PresetNotFound, CheckpointError, ConfigError, TokenizerError, BackendNotInstalled, DeviceError,
        DownloadError; InputError for a preset that reads something else; whatever fails, nothing half-loaded is left.
        """
        return load(cls, preset, options)

    @classmethod
    def processors(cls, source: Source) -> tuple[Any, ...]:
        """What the class takes between the backbone and the preset: a tokenizer or the like, of a preset's files."""
        return ()

    def write_processors(self, folder: Path) -> None:
        """Tokenizer or image processor, and further config files."""

    @property
    def chats(self) -> bool:
        """Whether a card shows how to chat."""
        return False

    @property
    def adapter_labels(self) -> Sequence[str]:
        """What the classes of the active adapter's own head are called."""
        return ()

    config: Any = attribute("backbone.weights.config")
    backend: str = attribute("backbone.weights.xp.name")
    device: str = attribute("backbone.weights.xp.device")
    dtype: str = attribute("backbone.weights.dtype")
    has_adapter: bool = attribute("backbone.weights.has_adapter", "Whether an adapter is active, and not merged.")
    saves_adapter: bool = attribute(
        "backbone.weights.has_adapter", "Whether an adapter's folder holds all that `fit` trains."
    )
    optimizer_state: Params | None = attribute("trainer.optimizer_state", Trainer.optimizer_state.__doc__ or "")

    @property
    def params(self) -> Params:
        """{Hugging Face name: array of the backend}. Replace the dict to change weights; never change it in place.

        New weights begin anew: what the optimizer remembers of the last `fit` is dropped.
        """
        return self.backbone.params

    @params.setter
    def params(self, params: Params) -> None:
        self.backbone.params = params

    def to(self, backend: str | None = None, device: str | None = None, dtype: str | None = None) -> Self:
        """Move the task in place to another backend, device or dtype, and return it; see Backbone.to.

        Raises besides ConfigError if `compile` was given an optimizer, or a loss, of the old backend's framework.
        """
        own = self.backbone.trainable_names() if self.has_adapter else ()
        placement.to(self.backbone.weights, backend, device, dtype, own, self.trainer.check_backend)
        return self

    def summary(self) -> None:
        """Print what the model is made of: parts, parameters, memory."""
        self.backbone.summary(title=repr(self))

    def described(self, *more: str) -> str:
        """For reprs: where it comes from, what it is, where it is, and the adapter on it."""
        what = repr(self.preset) if self.preset else f"a {self.config.model_type} without a preset"
        return ", ".join([what, *more, self.backbone.placed()])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.described()})"

    load_params = delegate("backbone", Backbone.load_params)

    def quantize(self, scheme: str | Mapping[str, str | None], calibration: Any = None) -> None:
        """Quantise the weights in memory, one matrix after the other.

        scheme: "int8", "int4", or {pattern: scheme}, as from_preset(quantize=...) takes it. Matrices that are quantised
        already stay as they are. calibration: of a language model, texts like those to come, a few hundred tokens or
        more: of a matrix, errors in columns that get large inputs count more.
        Raises ConfigError for what is no scheme, and with an adapter merged into the weights; InputError.
        """
        self.backbone.quantize(scheme, () if calibration is None else self.calibration_rows(calibration))

    def calibration_rows(self, calibration: Any) -> list[np.ndarray]:
        """What the model gets of texts to calibrate with."""
        raise InputError("quantize: calibration is for language models, which learn from it what their inputs are like")

    enable_lora = delegate("backbone.adapters", AdapterSet.enable_lora)
    set_adapter = delegate("backbone.adapters", AdapterSet.set_adapter)
    merge_lora = delegate("backbone.adapters", AdapterSet.merge_lora)
    unmerge_lora = delegate("backbone.adapters", AdapterSet.unmerge_lora)
    load_adapter = delegate("backbone.adapters", AdapterSet.load_adapter)
    trainable_names = delegate("backbone.adapters", AdapterSet.trainable_names)
    compile = delegate("trainer", Trainer.compile)
    provenance = property(publishing.provenance)
    save_to_preset = publishing.save_to_preset
    save_adapter = publishing.save_adapter
    publish = publishing.publish

    def print_trainable_parameters(self) -> None:
        """Print how many parameters `fit` would train, and their share of all, in the words of PEFT."""
        counts = {name: count(x) for name, x in self.params.items()}
        trained, every = sum(counts[name] for name in self.trainable_names()), sum(counts.values())
        print(f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100 * trained / every:.4f}")


def load(
    task: Any, preset: str | os.PathLike[str], options: LoadOptions, change: Callable[[Source], Source] | None = None,
    **more: Any,
) -> Any:  # fmt: skip
    """An object of the class `task`. change: of what is in the preset, before weights are read. more: for the class."""
    preset = os.fspath(preset)
    xp = choose_backend(preset, task.kind.name, options)
    with open_source(preset, options) as source:
        if (found := source.model.reads) not in task.kind.reads:
            reads = found if TEXT in task.kind.reads else f"no {', '.join(task.kind.reads)}"
            raise InputError(
                f"{preset} is a {source.config.model_type}, which reads {reads}; load it as "
                f"{kind_reading(found).class_name}, or as Backbone for its features"
            )
        processors = task.processors(source)
        backbone = Backbone.from_source(change(source) if change else source, xp, options)
    return task(backbone, *processors, preset=preset, **more)
