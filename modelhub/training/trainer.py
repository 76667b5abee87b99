"""Trainer: what `compile` was told, a training run from its data to the model's card, what the optimizer remembers."""

import dataclasses
import datetime
import inspect
import logging
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from modelhub.core import custom, head, optim
from modelhub.core.leaves import count
from modelhub.core.lora import MARK
from modelhub.core.tree import Params
from modelhub.errors import ConfigError, InputError, NotFinite
from modelhub.hub.provenance import TrainingRun
from modelhub.model.placement import own
from modelhub.model.weights import OPTIMIZER, PARAMS, Change
from modelhub.training.arguments import check_flag, check_whole
from modelhub.training.batches import BatchSource
from modelhub.training.callbacks import Callback, ProgressBar
from modelhub.training.engine import OptimizerState, Settings, TrainingEngine
from modelhub.training.fit import Plan, Run
from modelhub.training.history import History
from modelhub.training.objectives import Objective
from modelhub.training.products import best_precision

log = logging.getLogger("modelhub")

PRECISIONS = {
    None: None, "float32": "float32", "mixed_bfloat16": "bfloat16", "bfloat16": "bfloat16",
    "mixed_float16": "float16", "float16": "float16",
}  # fmt: skip


RATE, LORA_RATE = 5e-5, 2e-4  # where none is given; docs/decisions.md


@dataclass(frozen=True)
class Compiled:
    """What `compile` was told. objective: what the task's objective is told of it."""

    settings: Settings
    learning_rate: float | None  # None: the native optimizer's own
    schedule: Callable[[int, int | None], float]
    described: dict[str, Any]  # for checkpoints: what a resumed run must have in common
    backend: str
    objective: dict[str, Any]
    rate_given: bool = True

    def training(self, adapter: bool) -> Self:
        """With the learning rate for what is trained, if none was given: an adapter's matrices, small and partly zero,
        take larger steps than weights that are trained already."""
        rate = LORA_RATE if adapter else RATE
        if self.rate_given or rate == self.learning_rate:
            return self
        optimizer: Any = self.settings.optimizer
        if isinstance(optimizer, optim.Optimizer):
            optimizer = dataclasses.replace(optimizer, learning_rate=rate)
        described = self.described | {"optimizer": repr(optimizer), "learning_rate": rate}
        settings = dataclasses.replace(self.settings, optimizer=optimizer)
        return dataclasses.replace(self, settings=settings, learning_rate=rate, described=described)

    def check_backend(self, name: str) -> None:
        """Raise ConfigError for an optimizer or a loss of another framework than the backend `name`."""
        if name != self.backend and not isinstance(self.settings.optimizer, optim.Optimizer):
            raise ConfigError(
                f"compile() was given {self.settings.optimizer!r}, which works on {self.backend} alone, and the model "
                f'is on, or on its way to, {name}: call compile() with one of modelhub.optim first, such as "adamw"'
            )
        if self.settings.loss is not None:
            custom.carried("loss", self.settings.loss, self.backend, name)


class Trainer:
    """How a task is trained. What the optimizer remembers is kept with the weights, and dropped when they change."""

    def __init__(self, task: Any):
        self.task = task
        self.compiled: Compiled | None = None
        self._left: OptimizerState | None = None  # its arrays are in the weights' store

    @property
    def optimizer_state(self) -> Params | None:
        """{name: array of the backend}: what the optimizer remembers of the last `fit`, whose arrays the next one
        consumes; None before the first, after `compile`, once weights were replaced, and after one that failed in its
        first step."""
        store = self.task.backbone.weights.stores.get(OPTIMIZER)
        return None if store is None else dict(store)

    def check_backend(self, name: str) -> None:
        if self.compiled is not None:
            self.compiled.check_backend(name)

    def compile(
        self, optimizer: Any = "adamw", learning_rate: float | None = None, schedule: Any = None,
        weight_decay: float = 0.0, clip_norm: float | None = None, loss: head.Loss | str | None = None,
        metrics: Sequence[str] | None = None, mixed_precision: str | None = None,
        matmul_precision: str | None = None, remat: bool = False, jit: bool | None = None,
        *, label_smoothing: float = 0.0, objective: Objective | str | None = None,
    ) -> None:  # fmt: skip
        """Say how to train. Without a call, `fit` trains with AdamW and the defaults here.

        optimizer: "sgd", "adam", "adamw", "adafactor", "lion" or "muon", an object of modelhub.optim, or a native one
            of the model's backend: an optax transformation, a torch.optim class (or a function params -> optimizer).
        learning_rate: of the first step after warm-up; None: the optimizer object's own, else 5e-5,
            and 2e-4 for an adapter. schedule:
            "constant", "linear", "cosine", an object of modelhub.optim, or a function (step, total_steps) -> factor.
        clip_norm: the largest norm of all gradients together.
        loss: the user's own, in place of cross entropy, or of what else the config's problem_type asks for:
            loss(logits, labels) on arrays of the backend, or loss(xp, logits, labels), written once for all, or the
            name of a registered one, see modelhub.register. Of text one loss per position; of images one per image,
            logits (B, classes) float32, labels (B,) int32, or where they are soft (B, classes).
        metrics: None: the task's own. Of text "accuracy", the share of positions whose likeliest token is the label, is
            all there is; of images "top5_accuracy" too, with any number in place of 5; for several labels an image
            "accuracy" (the share of labels that are right) and "exact_match" (of images whose labels all are); for
            regression "mae".
        mixed_precision: "mixed_bfloat16" or "mixed_float16" compute in 16 bits and keep what is trained in float32;
            float16 with a loss scale. "auto": mixed_bfloat16 where this processor multiplies it at least 1.5 times as
            fast as float32, measured at first use and kept in the cache; else None.
        matmul_precision: "highest", or "high" for TF32 on NVIDIA.
        remat: keep less for the backward pass and compute it again. jit: compile the step, or not; None: what is
            usual for the backend.
        label_smoothing: of classifiers, the share of each label that is spread over all classes.
        objective: of language models, what is learnt in place of the next token: an object that inherits from
            modelhub.training.objectives.Objective, whose loss and metrics are its own. `fit` and `evaluate` then take
            ready batches of its fields.

        Raises ConfigError.
        """
        weights = self.task.backbone.weights
        takes = inspect.signature(self.task.objective).parameters
        asked: dict[str, Any] = {} if metrics is None else {"metrics": tuple(metrics)}
        asked |= {} if objective is None else {"objective": objective}
        asked |= {"label_smoothing": label_smoothing} if label_smoothing or "label_smoothing" in takes else {}
        if others := sorted(asked.keys() - takes):
            raise ConfigError(f"{type(self.task).__name__} learns without {', '.join(others)}: leave it out")
        self.task.objective(**asked)  # raises for what makes no sense
        if objective is not None and (loss is not None or metrics is not None):
            raise ConfigError("an objective has a loss and metrics of its own: leave loss= and metrics= out beside it")
        if loss is not None and label_smoothing:
            raise ConfigError(
                "label_smoothing belongs to cross entropy: put it into the loss, or leave one of them out"
            )
        if mixed_precision == "auto":
            mixed_precision = best_precision(weights.xp)
            log.info(
                'mixed_precision="auto": %s is the fastest on %s here, as measured', mixed_precision or "none",
                weights.xp.name,
            )  # fmt: skip
        if mixed_precision not in PRECISIONS:
            names = ", ".join(map(repr, ("auto", *PRECISIONS)))
            raise ConfigError(f"mixed_precision must be one of {names}, got {mixed_precision!r}")
        if matmul_precision not in (None, "highest", "high"):
            raise ConfigError(f'matmul_precision must be "highest", "high" or None, got {matmul_precision!r}')
        if clip_norm is not None and not clip_norm > 0:
            raise ConfigError(f"clip_norm must be above 0, got {clip_norm!r}; None is for no clipping")
        if loss is not None:
            custom.given("loss", loss, weights.xp.name)
        if not isinstance(learning_rate, numbers.Real | None):
            raise ConfigError(f"learning_rate must be a number, got {learning_rate!r}")
        native = weights.xp.native_optimizer(optimizer)
        if native is None and not isinstance(optimizer, str | optim.Optimizer):
            raise ConfigError(
                f"optimizer {optimizer!r} is neither a name, nor an object such as optim.AdamW(), nor an optimizer of "
                f"{weights.xp.name}, the model's backend"
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
        described |= {key: value for key, value in asked.items() if key not in ("metrics", "objective")}
        described |= {} if objective is None else {"objective": _described(objective)}
        given = rate is None or learning_rate is not None or getattr(optimizer, "learning_rate", None) is not None
        self.compiled = Compiled(settings, rate, found_schedule, described, weights.xp.name, asked, given)
        weights.change(Change.TOLD, {OPTIMIZER: None})

    def plan(
        self, epochs: int, steps: int | None, grad_accum: int, checkpoint_dir: str | os.PathLike[str] | None,
        resume: str | bool, save_steps: int | None, callbacks: Sequence[Callback], seed: int,
        verbose: bool, learning_rate: float | None = None,
    ) -> tuple[Compiled, Plan]:  # fmt: skip
        """What `fit` needs before it looks at data; mistakes are told here. learning_rate: if nothing was compiled."""
        check_flag("verbose", verbose)
        xp = self.task.backbone.xp
        xp.value_and_grad(lambda variables: (variables, None))  # numpy says now that it cannot
        if self.compiled is None:
            self.compile(learning_rate=learning_rate)
        assert self.compiled is not None
        compiled = self.compiled = self.compiled.training(self.task.backbone.has_adapter)
        compiled.check_backend(xp.name)
        plan = Plan(
            epochs, steps, grad_accum, compiled.learning_rate, compiled.schedule, checkpoint_dir, resume, save_steps
        )
        check_whole("seed", seed, 0)
        if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
            raise InputError(f"callbacks must be a list, got {callbacks!r}")
        return compiled, plan

    def engine(self, objective: Objective, names: Iterable[str] = (), **settings: Any) -> TrainingEngine:
        """The compiled programs that train the parameters `names`. settings: others than those of `compile`."""
        weights = self.task.backbone.weights
        found = dataclasses.replace(self.compiled.settings if self.compiled else Settings(), **settings)
        return TrainingEngine(weights.xp, weights.layout.skeleton, weights.params, names, found, objective)

    def objective(self) -> Objective:
        """The task's, as `compile` was told."""
        return self.task.objective(**self.compiled.objective if self.compiled else {})

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """The objective's means over batches. Raises NotFinite for a loss that is no number."""
        found = self.engine(self.objective()).evaluate(batches)
        if not math.isfinite(found["loss"]):
            narrow = 'or numbers too large for float16 (take dtype="float32" or "bfloat16"), '
            raise NotFinite(
                f"the loss over this data is {found['loss']}, which says nothing: there are weights that are NaN or "
                f"infinite, {narrow if self.task.dtype == 'float16' else ''}or a loss of your own makes such values. "
                "Is the file damaged? Load the model anew, or download it again"
            )
        return found

    def run(
        self, train: BatchSource, validation: BatchSource | None, plan: Plan, objective: Objective,
        names: Sequence[str], *, seed: int, dropout: bool, shape: tuple[int, int], callbacks: Sequence[Callback],
        settings: dict[str, Any], data: str, smaller: str = "", verbose: bool = True,
    ) -> History:  # fmt: skip
        """Train the parameters `names`.

        shape: rows of a batch, and positions of a row. settings: see Run. data: what the card is to call it. smaller:
        what makes a batch smaller, besides batch_size.
        """
        compiled, weights = self.compiled, self.task.backbone.weights
        assert compiled is not None
        active, adapter = weights.layout.active, self.task.backbone.adapter
        free = weights.xp.free_memory()
        engine = self.engine(objective, names, seed=seed, dropout=dropout)
        if (kept := weights.stores.get(OPTIMIZER)) is not None and self._left is not None:
            arrays = {name: own(weights, x) for name, x in kept.items()}
            engine.take_up(dataclasses.replace(self._left, arrays=arrays), active)
        weights.change(Change.TOLD, {OPTIMIZER: None})  # a step consumes its arrays, and may fail
        total = plan.total_steps(train)
        if verbose:
            self._describe(train, engine, shape, total, free, smaller)
        frozen = {name: array for name, array in weights.params.items() if name not in engine.trainable}

        def publish(trainable: Params) -> None:
            left = engine.left(run.step, active)
            self._left = dataclasses.replace(left, arrays={})
            weights.change(Change.TRAINED, {PARAMS: frozen | trainable, OPTIMIZER: left.arrays})

        run = Run(
            engine, train, plan, model=self.task, publish=publish, validation=validation,
            callbacks=[*callbacks, *([ProgressBar(total)] if verbose else [])],
            settings=compiled.described | settings | {
                "preset": self.task.preset, "dtype": weights.dtype, "data": train.fingerprint,
                "adapter": adapter and dataclasses.asdict(adapter.config) | {"modules": adapter.modules},
                "grad_accum": plan.grad_accum,
            },
        )  # fmt: skip
        history = run.fit()
        self._record(history, run.settings, data, train.report(), engine.trainable)
        return history

    def _describe(
        self, data: BatchSource, engine: TrainingEngine, shape: tuple[int, int], total: int | None, free: int | None,
        smaller: str,
    ) -> None:  # fmt: skip
        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        backbone = self.task.backbone
        counts = [count(x) for x in engine.trainable.values()]
        whole = len(counts) == len(backbone.params)
        what = "of LoRA" if backbone.has_adapter else "all weights" if whole else "the head"
        console.print(
            f"training {sum(counts):,} parameters ({sum(counts) / backbone.num_parameters:.2%}, {what}) on "
            f"{backbone.xp.name}, {backbone.xp.device}, for {total or 'an unknown number of'} steps",
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
                needed / 1e9, free / 1e9, smaller,
            )  # fmt: skip

    def _record(self, history: History, settings: Mapping[str, Any], data: str, report: Any, trained: Params) -> None:
        """Remember a finished run for the model's card."""
        adapter, weights = self.task.backbone.adapter, self.task.backbone.weights
        own = () if adapter is None else [name for name in adapter.names if MARK in name]
        beside = [name for name in trained if name not in own]
        told = {key: value for key, value in settings.items() if key not in ("data", "adapter", "preset")}
        run = TrainingRun(
            data=data,
            settings=told | {"steps": len(history.steps), "epochs": len(history.epoch)},
            metrics={name: values[-1] for name, values in history.history.items() if values},
            losses=[(int(step["step"]), step["loss"]) for step in history.steps],
            adapter=None if adapter is None else adapter.described(),
            examples=getattr(report, "examples", None),
            tokens=getattr(report, "tokens", None),
            seconds=sum(step.get("seconds", 0.0) for step in history.steps),
            backend=weights.xp.name,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            part="all" if len(beside) == len(weights.plain_names()) else "head" if beside else None,
            trained=sum(map(count, trained.values())),
        )
        if adapter is not None:
            adapter.runs += (run,)
        else:
            weights.describe(provenance=weights.origin.provenance.with_run(run))


def _rate(optimizer: Any, learning_rate: float | None) -> float | None:
    """The learning rate to train with; None: the optimizer's own, which is out of reach."""
    if not getattr(optimizer, "takes_rate", True):
        return None
    own = getattr(optimizer, "learning_rate", None)
    if own is not None and learning_rate is not None and own != learning_rate:
        raise ConfigError(
            f"learning_rate={learning_rate} was given beside an optimizer that has {own}: give one of them"
        )
    return float(learning_rate if learning_rate is not None else RATE if own is None else own)


def _described(function: Any) -> str:
    """Equal in another process for the same function, name or object; without memory addresses."""
    if isinstance(function, str):
        return function
    if dataclasses.is_dataclass(function):
        return repr(function)
    return getattr(function, "__qualname__", type(function).__qualname__)
