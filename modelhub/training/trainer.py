"""What every task needs to be trained: adapters, the settings of `compile`, a run from its data to the model's card."""

import dataclasses
import logging
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from modelhub.core import custom, head, optim
from modelhub.core.tree import Params
from modelhub.errors import ConfigError, InputError
from modelhub.model.backbone import Backbone
from modelhub.publishing.publishing import Publishing
from modelhub.training.batches import BatchSource
from modelhub.training.callbacks import Callback, ProgressBar
from modelhub.training.engine import Engine, Settings
from modelhub.training.fit import Plan, Run
from modelhub.training.history import History
from modelhub.training.objectives import Objective

log = logging.getLogger("modelhub")

PRECISIONS = {
    None: None, "float32": "float32", "mixed_bfloat16": "bfloat16", "bfloat16": "bfloat16",
    "mixed_float16": "float16", "float16": "float16",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What `compile` was told."""

    settings: Settings
    learning_rate: float | None  # None: the native optimizer's own
    schedule: Callable[[int, int | None], float]
    described: dict[str, Any]  # for checkpoints: what a resumed run must have in common
    backend: str

    def check_backend(self, name: str) -> None:
        """Raise ConfigError for an optimizer or a loss of another framework than the backend `name`."""
        if name != self.backend and not isinstance(self.settings.optimizer, optim.Optimizer):
            raise ConfigError(
                f"compile() was given {self.settings.optimizer!r}, which works on {self.backend} alone, and the model "
                f'is on, or on its way to, {name}: call compile() with one of modelhub.optim first, such as "adamw"'
            )
        if self.settings.loss is not None:
            custom.carried("loss", self.settings.loss, self.backend, name)


class Trainable(Publishing):
    """Mixed into tasks that have a backbone."""

    backbone: Backbone
    preset: str
    stop_training = False  # set by callbacks, as in Keras
    _compiled: Compiled | None = None

    @property
    def config(self) -> Any:
        return self.backbone.config

    @property
    def backend(self) -> str:
        return self.backbone.xp.name

    @property
    def device(self) -> str:
        return self.backbone.xp.device

    @property
    def dtype(self) -> str:
        return self.backbone.dtype

    @property
    def params(self) -> Params:
        """{Hugging Face name: array of the backend}. Replace the dict to change weights; never change it in place.

        New weights begin anew: what the optimizer remembers of the last `fit` is dropped.
        """
        return self.backbone.params

    @params.setter
    def params(self, params: Params) -> None:
        self.backbone.params = params

    @property
    def optimizer_state(self) -> Params | None:
        """{name: array of the backend}: what the optimizer remembers of the last `fit`, whose arrays the next one
        consumes; None before the first, after `compile`, once weights were replaced, and after one that failed in its
        first step."""
        return None if self.backbone.optimizer is None else dict(self.backbone.optimizer.arrays)

    def to(self, backend: str | None = None, device: str | None = None) -> Self:
        """Move the task in place to another backend or device, and return it; see Backbone.to.

        Raises besides ConfigError if `compile` was given an optimizer, or a loss, of the old backend's framework.
        """
        if (xp := self.backbone.destination(backend, device)) is not None:
            if self._compiled is not None:
                self._compiled.check_backend(xp.name)
            self._forget()
            self.backbone.hand_over(xp)
        return self

    def load_params(self, params: Mapping[str, Any]) -> None:
        """Take over weights from a training loop of the user's own; see Backbone.load_params."""
        self.backbone.load_params(params)

    def _forget(self) -> None:
        """Drop what holds on to the arrays."""

    def _described(self, *more: str) -> str:
        """For reprs: where it comes from, what it is, where it is, and the adapter on it."""
        what = repr(self.preset) if self.preset else f"a {self.config.model_type} without a preset"
        return ", ".join([what, *more, self.backbone.placed()])

    def summary(self) -> None:
        """Print what the model is made of: parts, parameters, memory."""
        self.backbone.summary(title=repr(self))

    # --- adapters -----------------------------------------------------------------------------------------------

    def enable_lora(
        self, rank: int = 4, alpha: float | None = None, dropout: float = 0.0,
        targets: str | Sequence[str] | None = None, use_rslora: bool = False, use_dora: bool = False,
        *, name: str = "default", seed: int = 0, modules_to_save: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Add a low-rank adapter, which `fit` then trains alone; see Backbone.enable_lora."""
        self.backbone.enable_lora(
            rank, alpha, dropout, targets, use_rslora, use_dora, name=name, seed=seed, modules_to_save=modules_to_save
        )

    def set_adapter(self, name: str | None) -> None:
        """Make one of several adapters the active one; None: the base model alone."""
        self.backbone.set_adapter(name)

    def merge_lora(self) -> None:
        """Put the active adapter into the weights: the same outputs, at the base model's speed."""
        self.backbone.merge_lora()

    def unmerge_lora(self) -> None:
        """Undo merge_lora: the base weights are what they were, bit for bit."""
        self.backbone.unmerge_lora()

    def load_adapter(
        self, folder: str | os.PathLike[str], name: str | None = None, *, revision: str | None = None,
        offline: bool = False, token: str | None = None,
    ) -> str:  # fmt: skip
        """Read a PEFT folder, or one at an address, and make it the active adapter; see Backbone.load_adapter."""
        return self.backbone.load_adapter(folder, name, revision=revision, offline=offline, token=token)

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is active, and not merged."""
        return self.backbone.has_adapter

    @property
    def saves_adapter(self) -> bool:
        """Whether an adapter's folder holds all that `fit` trains."""
        return self.has_adapter

    def print_trainable_parameters(self) -> None:
        """Print how many parameters `fit` would train, and their share of all, in the words of PEFT."""
        counts = {name: int(np.prod(x.shape)) for name, x in self.params.items()}
        trained, every = sum(counts[name] for name in self._trainable_names()), sum(counts.values())
        print(f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100 * trained / every:.4f}")

    def _trainable_names(self) -> list[str]:
        return self.backbone.trainable_names()

    # --- training -----------------------------------------------------------------------------------------------

    def _compile(
        self, optimizer: Any, learning_rate: float | None, schedule: Any, weight_decay: float, clip_norm: float | None,
        loss: head.Loss | str | None, mixed_precision: str | None, matmul_precision: str | None, remat: bool,
        jit: bool | None, **more: Any,
    ) -> None:  # fmt: skip
        """more: what a resumed run must have in common besides."""
        xp = self.backbone.xp
        if mixed_precision not in PRECISIONS:
            names = ", ".join(map(repr, PRECISIONS))
            raise ConfigError(f"mixed_precision must be one of {names}, got {mixed_precision!r}")
        if matmul_precision not in (None, "highest", "high"):
            raise ConfigError(f'matmul_precision must be "highest", "high" or None, got {matmul_precision!r}')
        if clip_norm is not None and not clip_norm > 0:
            raise ConfigError(f"clip_norm must be above 0, got {clip_norm!r}; None is for no clipping")
        if loss is not None:
            custom.given("loss", loss, xp.name)
        if not isinstance(learning_rate, numbers.Real | None):
            raise ConfigError(f"learning_rate must be a number, got {learning_rate!r}")
        native = xp.native_optimizer(optimizer)
        if native is None and not isinstance(optimizer, str | optim.Optimizer):
            raise ConfigError(
                f"optimizer {optimizer!r} is neither a name, nor an object such as optim.AdamW(), nor an optimizer of "
                f"{xp.name}, the model's backend"
            )
        if native is not None and (weight_decay or (not native.takes_rate and (learning_rate or schedule))):
            raise ConfigError(
                f"{native!r} brings its own weight decay"
                + ("" if native.takes_rate else ", learning rate and schedule")
                + ": say it there, not beside it"
            )
        rate = _rate(native or optimizer, learning_rate)
        found_schedule = optim.get_schedule(schedule)
        named = isinstance(optimizer, str)
        chosen: Any = native or optim.get(optimizer, rate, weight_decay if named else weight_decay or None)
        settings = Settings(chosen, clip_norm, loss, PRECISIONS[mixed_precision], matmul_precision, remat, jit=jit)
        described = {
            "optimizer": repr(chosen), "learning_rate": rate, "schedule": _described(found_schedule),
            "clip_norm": clip_norm, "loss": loss and _described(loss), "mixed_precision": mixed_precision,
        }  # fmt: skip
        self._compiled = Compiled(settings, rate, found_schedule, described | more, xp.name)
        self.backbone.optimizer = None

    def compile(self) -> None:
        raise NotImplementedError

    def _ready(
        self, epochs: int, steps: int | None, grad_accum: int, checkpoint_dir: str | os.PathLike[str] | None,
        resume: str | bool, save_steps: int | None, callbacks: Sequence[Callback], seed: int,
    ) -> tuple[Compiled, Plan]:  # fmt: skip
        """What `fit` needs before it looks at data; mistakes are told here."""
        self.backbone.xp.value_and_grad(lambda variables: (variables, None))  # numpy says now that it cannot
        if self._compiled is None:
            self.compile()
        compiled = self._compiled
        assert compiled is not None
        compiled.check_backend(self.backend)
        plan = Plan(
            epochs, steps, grad_accum, compiled.learning_rate, compiled.schedule, checkpoint_dir, resume, save_steps
        )
        if not isinstance(seed, int) or seed < 0:
            raise InputError(f"seed must be a whole number, 0 or more, got {seed!r}")
        if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
            raise InputError(f"callbacks must be a list, got {callbacks!r}")
        return compiled, plan

    def _train(
        self, train: BatchSource, validation: BatchSource | None, compiled: Compiled, plan: Plan,
        objective: Objective, names: Sequence[str], *, seed: int, dropout: bool, shape: tuple[int, int],
        callbacks: Sequence[Callback], settings: dict[str, Any], called: str, verbose: bool,
    ) -> History:  # fmt: skip
        """Train the parameters `names`. shape: rows of a batch, and positions of a row. settings: see Run."""
        adapter = self.backbone.adapter
        free = self.backbone.xp.free_memory()
        engine = Engine(
            self.backbone.xp, self.backbone.model, self.params, names,
            dataclasses.replace(compiled.settings, seed=seed, dropout=dropout), objective,
        )  # fmt: skip
        if (kept := self.backbone.optimizer) is not None:
            arrays = {name: self.backbone.own(x) for name, x in kept.arrays.items()}
            engine.take_up(dataclasses.replace(kept, arrays=arrays), self.backbone.active_adapter)
            self.backbone.optimizer = None  # a step consumes its arrays, and may fail; `publish` gives it back
        total = plan.total_steps(train)
        if verbose:
            self._describe(train, engine, shape, total, free)
        frozen = {name: array for name, array in self.params.items() if name not in engine.trainable}

        def publish(trainable: Params) -> None:
            self.params = frozen | trainable
            self.backbone.optimizer = engine.left(run.step, self.backbone.active_adapter)

        run = Run(
            engine, train, plan, model=self, publish=publish, validation=validation,
            callbacks=[*callbacks, *([ProgressBar(total)] if verbose else [])],
            settings=compiled.described | settings | {
                "preset": self.preset, "dtype": self.backbone.dtype, "data": train.fingerprint,
                "adapter": adapter and dataclasses.asdict(adapter.config) | {"modules": adapter.modules},
                "grad_accum": plan.grad_accum,
            },
        )  # fmt: skip
        history = run.fit()
        self._record(history, run.settings, called, train.report())
        return history

    def _describe(
        self, data: BatchSource, engine: Engine, shape: tuple[int, int], total: int | None, free: int | None
    ) -> None:  # fmt: skip
        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        counts = [int(np.prod(x.shape)) for x in engine.trainable.values()]
        every = self.backbone.num_parameters
        whole = len(counts) == len(self.params)
        what = "of LoRA" if self.has_adapter else "all weights" if whole else "the head"
        console.print(
            f"training {sum(counts):,} parameters ({sum(counts) / every:.2%}, {what}) on "
            f"{self.backbone.xp.name}, {self.backbone.xp.device}, for {total or 'an unknown number of'} steps",
            soft_wrap=True,
        )
        console.print(data.report(), soft_wrap=True)
        needed = engine.memory(*shape)
        console.print(
            f"memory: about {needed / 1e9:.1f} GB beside the weights"
            + ("" if free is None else f", {free / 1e9:.1f} GB are free")
        )
        if free is not None and needed > free:
            log.warning(
                "this may not fit: %.1f GB needed, %.1f GB free; take a smaller batch_size%s, or compile(remat=True)",
                needed / 1e9, free / 1e9, self._smaller,
            )  # fmt: skip

    _smaller = ""  # what else makes a batch smaller


def check_split(validation_split: float, validation_data: Any) -> None:
    if validation_data is not None or not 0.0 < validation_split < 1.0:
        raise InputError("give validation_data, or a validation_split between 0 and 1, not both")


def check_batch_size(batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size must be a whole number, 1 or more, got {batch_size!r}")


def called(data: Any) -> str:
    """What to call the data in a model card."""
    if isinstance(data, str | os.PathLike):
        return os.path.basename(os.path.abspath(data))
    if isinstance(data, tuple) and len(data) == 2:  # (images, labels)
        return f"{len(data[0])} rows from memory"
    if name := getattr(getattr(data, "info", None), "dataset_name", None):  # a Hugging Face Dataset
        return str(name)
    return f"{len(data)} rows from memory" if isinstance(data, Sequence) else "batches from a program"


def _rate(optimizer: Any, learning_rate: float | None) -> float | None:
    """The learning rate to train with; None: the optimizer's own, which is out of reach."""
    if not getattr(optimizer, "takes_rate", True):
        return None
    own = getattr(optimizer, "learning_rate", None)
    if own is not None and learning_rate is not None and own != learning_rate:
        raise ConfigError(
            f"learning_rate={learning_rate} was given beside an optimizer that has {own}: give one of them"
        )
    return float(learning_rate if learning_rate is not None else 5e-5 if own is None else own)


def _described(function: Any) -> str:
    """Equal in another process for the same function, name or object; without memory addresses."""
    if isinstance(function, str):
        return function
    if dataclasses.is_dataclass(function):
        return repr(function)
    return getattr(function, "__qualname__", type(function).__qualname__)
