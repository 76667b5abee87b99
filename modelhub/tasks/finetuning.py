"""What a task needs to be trained: compile, fit, evaluate, adapters, saving."""

import dataclasses
import logging
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelhub.core import head, optim
from modelhub.core.tree import Params
from modelhub.errors import ConfigError, InputError, ModelhubError
from modelhub.processing.tokenizer import Tokenizer
from modelhub.tasks.backbone import Backbone
from modelhub.tasks.loading import DTYPES
from modelhub.tasks.saving import save_to_preset
from modelhub.training.batches import BatchSource, prepare
from modelhub.training.callbacks import Callback, ProgressBar
from modelhub.training.engine import Engine, Settings
from modelhub.training.fit import Plan, Run
from modelhub.training.history import History
from modelhub.training.records import read_records, rows_of

log = logging.getLogger("modelhub")

PRECISIONS = {
    None: None, "float32": "float32", "mixed_bfloat16": "bfloat16", "bfloat16": "bfloat16",
    "mixed_float16": "float16", "float16": "float16",
}  # fmt: skip


@dataclass
class Preprocessor:
    """sequence_length: tokens of a row in training; longer examples are cut."""

    sequence_length: int


@dataclass(frozen=True)
class Compiled:
    """What `compile` was told."""

    settings: Settings
    learning_rate: float | None  # None: the native optimizer's own
    schedule: Callable[[int, int | None], float]
    described: dict[str, Any]  # for checkpoints: what a resumed run must have in common


class FineTuning:
    """Mixed into tasks that have a backbone, a tokenizer and a preprocessor."""

    backbone: Backbone
    tokenizer: Tokenizer | None
    preprocessor: Preprocessor
    preset: str
    generation_config: dict[str, Any]
    params: Params
    stop_training = False  # set by callbacks, as in Keras
    _compiled: Compiled | None = None

    # --- adapters -----------------------------------------------------------------------------------------------

    def enable_lora(
        self, rank: int = 4, alpha: float | None = None, dropout: float = 0.0,
        targets: str | Sequence[str] | None = None, use_rslora: bool = False, use_dora: bool = False,
        *, name: str = "default", seed: int = 0,
    ) -> None:  # fmt: skip
        """Add a low-rank adapter, which `fit` then trains alone; see Backbone.enable_lora."""
        self.backbone.enable_lora(rank, alpha, dropout, targets, use_rslora, use_dora, name=name, seed=seed)

    def set_adapter(self, name: str | None) -> None:
        """Make one of several adapters the active one; None: the base model alone."""
        self.backbone.set_adapter(name)

    def merge_lora(self) -> None:
        """Put the active adapter into the weights: the same outputs, at the base model's speed."""
        self.backbone.merge_lora()

    def unmerge_lora(self) -> None:
        """Undo merge_lora: the base weights are what they were, bit for bit."""
        self.backbone.unmerge_lora()

    def save_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Write the active adapter as a folder that PEFT, transformers and vLLM load."""
        self.backbone.save_adapter(folder, base=self.preset.removeprefix("hf://").partition("@")[0])

    def load_adapter(self, folder: str | os.PathLike[str], name: str | None = None) -> str:
        """Read a PEFT folder and make it the active adapter; returns its name, by default that of the folder."""
        return self.backbone.load_adapter(folder, name)

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is active, and not merged."""
        return self.backbone.has_adapter

    def save_to_preset(self, folder: str | os.PathLike[str], dtype: str | None = None) -> None:
        """Write a Hugging Face model folder: config, weights (with the active adapter merged in), tokenizer.

        transformers and `from_preset` load it. The folder is replaced as a whole, or not at all. dtype: of the weights
        in the files, "float32", "bfloat16" or "float16"; None: the model's.
        """
        if dtype is not None and dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        save_to_preset(folder, self.backbone, self.tokenizer, self.generation_config, dtype)

    # --- training -----------------------------------------------------------------------------------------------

    def compile(
        self, optimizer: Any = "adamw", learning_rate: float | None = None, schedule: Any = None,
        weight_decay: float = 0.0, clip_norm: float | None = None, loss: head.Loss | None = None,
        metrics: Sequence[str] = ("accuracy",), mixed_precision: str | None = None,
        matmul_precision: str | None = None, remat: bool = False, jit: bool | None = None,
    ) -> None:  # fmt: skip
        """Say how to train. Without a call, `fit` trains with AdamW and the defaults here.

        optimizer: "sgd", "adam", "adamw", "adafactor", "lion" or "muon", an object of modelhub.optim, or a native one
            of the model's backend: an optax transformation, a torch.optim class (or a function params -> optimizer).
        learning_rate: of the first step after warm-up; None: the optimizer object's own, else 5e-5. schedule:
            "constant", "linear", "cosine", an object of modelhub.optim, or a function (step, total_steps) -> factor.
        clip_norm: the largest norm of all gradients together. loss: the user's own, loss(logits, labels) -> losses per
            position, on arrays of the backend, in place of cross entropy.
        metrics: "accuracy", the share of positions whose likeliest token is the label, is all there is.
        mixed_precision: "mixed_bfloat16" or "mixed_float16" compute in 16 bits and keep what is trained in float32;
            float16 with a loss scale. matmul_precision: "highest", or "high" for TF32 on NVIDIA.
        remat: keep less for the backward pass and compute it again. jit: compile the step, or not; None: what is
            usual for the backend.

        Raises ConfigError.
        """
        xp = self.backbone.xp
        if mixed_precision not in PRECISIONS:
            names = ", ".join(map(repr, PRECISIONS))
            raise ConfigError(f"mixed_precision must be one of {names}, got {mixed_precision!r}")
        if matmul_precision not in (None, "highest", "high"):
            raise ConfigError(f'matmul_precision must be "highest", "high" or None, got {matmul_precision!r}')
        if unknown := set(metrics) - {"accuracy"}:
            raise ConfigError(f'metrics can only be "accuracy", got {", ".join(map(repr, sorted(unknown)))}')
        if clip_norm is not None and not clip_norm > 0:
            raise ConfigError(f"clip_norm must be above 0, got {clip_norm!r}; None is for no clipping")
        if loss is not None and not callable(loss):
            raise ConfigError(f"loss must be a function (logits, labels) -> losses per position, got {loss!r}")
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
        self._compiled = Compiled(settings, rate, found_schedule, described)

    def fit(
        self, data: Any, epochs: int = 1, batch_size: int = 4, steps: int | None = None, validation_data: Any = None,
        grad_accum: int = 1, packing: bool = True, loss_on: str = "response", callbacks: Sequence[Callback] = (),
        checkpoint_dir: str | os.PathLike[str] | None = None, resume: str | bool = "auto", seed: int = 0,
        *, validation_split: float = 0.0, template: str | None = None, kind: str | None = None,
        save_steps: int | None = None, verbose: bool = True,
    ) -> History:  # fmt: skip
        """Train on data: the active adapter, or without one all weights. Returns what was measured.

        data: a path (.jsonl, .json, .csv, .parquet), a list of strings or dicts, a Hugging Face Dataset, or an iterable
            of ready batches (dicts with input_ids and labels, arrays of any framework).
        batch_size: rows of sequence_length in one step, packed or not. grad_accum: batches in one optimizer step.
        steps: optimizer steps in all; None: as many as `epochs` have.
        validation_data: like data, or validation_split: a share of the records to hold out; measured after each epoch.
        packing: several examples in one row, invisible to each other. False: one a row, similar lengths together.
        loss_on: "response" (instructions and chats; strings always count whole) or "all".
        template: for instruction records; a string with {instruction}, {context} and {response}, or "chat", the
            preset's own. kind: of the records, where the keys do not tell: "dolly", "alpaca", "prompt", "messages",
            "text".
        checkpoint_dir: keep the run's state here; with resume="auto" the same call goes on where it was broken off,
            also on another backend. save_steps: steps between checkpoints; None: two minutes, and each epoch's end.
        verbose: print what will be trained on, and the progress.

        Raises DataError, ConfigError, NoGradients (numpy), ResumeError, TrainingError (a loss that is not a number).
        """
        xp = self.backbone.xp
        xp.value_and_grad(lambda variables: (variables, None))  # numpy says now that it cannot
        if self._compiled is None:
            self.compile()
        compiled = self._compiled
        assert compiled is not None
        plan = Plan(
            epochs, steps, grad_accum, compiled.learning_rate, compiled.schedule, checkpoint_dir, resume, save_steps
        )
        if not isinstance(seed, int) or seed < 0:
            raise InputError(f"seed must be a whole number, 0 or more, got {seed!r}")
        if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
            raise InputError(f"callbacks must be a list, got {callbacks!r}")
        held_out = validation_data
        if validation_split:
            if validation_data is not None or not 0.0 < validation_split < 1.0:
                raise InputError("give validation_data, or a validation_split between 0 and 1, not both")
            data, held_out = _split(data, kind, validation_split, seed)
        options = {"packing": packing, "loss_on": loss_on, "template": template, "kind": kind, "seed": seed}
        train = self._prepare(data, batch_size, **options)
        validation = None if held_out is None else self._prepare(held_out, batch_size, shuffle=False, **options)
        self.backbone.keep_merged()
        adapter = self.backbone.adapter
        dropout = adapter is not None and adapter.config.dropout > 0
        settings = dataclasses.replace(compiled.settings, seed=seed, dropout=dropout)
        free = xp.free_memory()
        names = self.backbone.trainable_names()
        engine = Engine(xp, self.backbone.model, self.params, names, settings)
        total = plan.total_steps(train)
        if verbose:
            self._describe(train, engine, batch_size, total, free)
        frozen = {name: array for name, array in self.params.items() if name not in engine.trainable}

        def publish(trainable: Params) -> None:
            self.params = frozen | trainable

        run = Run(
            engine, train, plan, model=self, publish=publish, validation=validation,
            callbacks=[*callbacks, *([ProgressBar(total)] if verbose else [])],
            settings=compiled.described | options | {
                "preset": self.preset, "dtype": self.backbone.dtype, "data": train.fingerprint,
                "adapter": adapter and dataclasses.asdict(adapter.config) | {"modules": adapter.modules},
                "sequence_length": self.preprocessor.sequence_length, "batch_size": batch_size,
                "grad_accum": grad_accum,
            },
        )  # fmt: skip
        return run.fit()

    def evaluate(
        self, data: Any, batch_size: int = 4, packing: bool = True, loss_on: str = "response",
        *, template: str | None = None, kind: str | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """loss (mean over tokens), perplexity (its exponential), accuracy, and tokens, of data as `fit` takes it."""
        compiled = self._compiled
        settings = compiled.settings if compiled else Settings()
        source = self._prepare(
            data, batch_size, packing=packing, loss_on=loss_on, template=template, kind=kind, shuffle=False
        )
        found = Engine(self.backbone.xp, self.backbone.model, self.params, (), settings).evaluate(source.epoch(0))
        perplexity = math.exp(found["loss"]) if found["loss"] < 700 else math.inf
        return {"loss": found["loss"], "perplexity": perplexity} | found

    def _prepare(self, data: Any, batch_size: int, **options: Any) -> BatchSource:
        length, context = self.preprocessor.sequence_length, self.backbone.config.max_position_embeddings
        if not isinstance(length, int) or not 2 <= length <= context:
            raise InputError(f"sequence_length must be 2 to {context}, the model's context; got {length!r}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be a whole number, 1 or more, got {batch_size!r}")
        return prepare(data, self.tokenizer, self._render(), length, batch_size, **options)

    def _render(self) -> Callable[..., str] | None:
        try:
            return self.chat_template.render  # type: ignore[attr-defined]
        except ModelhubError:  # the preset has none; an error only for data that needs one
            return None

    def _describe(
        self, data: BatchSource, engine: Engine, batch_size: int, total: int | None, free: int | None
    ) -> None:  # fmt: skip
        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        counts = [int(np.prod(x.shape)) for x in engine.trainable.values()]
        every = self.backbone.num_parameters
        what = "of LoRA" if self.has_adapter else "all weights"
        console.print(
            f"training {sum(counts):,} parameters ({sum(counts) / every:.2%}, {what}) on "
            f"{self.backbone.xp.name}, {self.backbone.xp.device}, for {total or 'an unknown number of'} steps",
            soft_wrap=True,
        )
        console.print(data.report(), soft_wrap=True)
        needed = engine.memory(batch_size, self.preprocessor.sequence_length)
        console.print(
            f"memory: about {needed / 1e9:.1f} GB beside the weights"
            + ("" if free is None else f", {free / 1e9:.1f} GB are free")
        )
        if free is not None and needed > free:
            log.warning(
                "this may not fit: %.1f GB needed, %.1f GB free; take a smaller batch_size or sequence_length, "
                "or compile(remat=True)", needed / 1e9, free / 1e9,
            )  # fmt: skip


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
    """Equal in another process for the same function or object; without memory addresses."""
    if dataclasses.is_dataclass(function):
        return repr(function)
    return getattr(function, "__qualname__", type(function).__qualname__)


def _split(data: Any, kind: str | None, share: float, seed: int) -> tuple[list[Any], list[Any]]:
    rows = [row for _, row in rows_of(data)]
    if rows and isinstance(rows[0], Mapping) and "input_ids" in rows[0]:
        raise InputError("validation_split takes records; of ready batches give some as validation_data")
    # Errors name the file's lines; what can be gone through only once is read already.
    read_records(data if isinstance(data, str | os.PathLike) else rows, kind)
    held = math.ceil(share * len(rows))
    if held >= len(rows):
        raise InputError(f"validation_split={share} leaves nothing of {len(rows)} records to train on")
    chosen = set(np.random.default_rng(seed).permutation(len(rows))[:held].tolist())
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]
