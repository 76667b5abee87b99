"""How language models are trained: `fit` and `evaluate`, methods of a task that has a tokenizer and a preprocessor."""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelhub.errors import InputError, ModelhubError
from modelhub.progress import bar
from modelhub.training.arguments import check_flag, check_split, check_whole, name_of
from modelhub.training.batches import BatchSource, prepare
from modelhub.training.callbacks import Callback
from modelhub.training.history import History
from modelhub.training.loaders import repeatable
from modelhub.training.objectives import TextObjective
from modelhub.training.ready_batches import ReadyRows
from modelhub.training.records import OnError, read_records
from modelhub.training.rows import rows_of


@dataclass
class Preprocessor:
    """sequence_length: tokens of a row in training; longer examples are cut."""

    sequence_length: int


def fit(
    task: Any, data: Any, epochs: int = 1, batch_size: int = 4, steps: int | None = None, validation_data: Any = None,
    grad_accum: int = 1, packing: bool = True, loss_on: str = "response", callbacks: Sequence[Callback] = (),
    checkpoint_dir: str | os.PathLike[str] | None = None, resume: str | bool = "auto", seed: int = 0,
    *, validation_split: float = 0.0, template: str | None = None, kind: str | None = None,
    on_error: OnError = "raise", template_options: Mapping[str, Any] | None = None, save_steps: int | None = None,
    verbose: bool = True,
) -> History:  # fmt: skip
    """Train on data: the active adapter, or without one all weights. Returns what was measured.

    data: a path (.jsonl, .json, .csv, .tsv, .parquet), a list of strings or dicts, a Hugging Face Dataset, a
        DataFrame, or an iterable of ready batches (dicts with input_ids and labels, arrays of any framework).
    batch_size: rows of sequence_length in one step, packed or not. grad_accum: batches in one optimizer step.
    steps: optimizer steps in all; None: as many as `epochs` have.
    validation_data: like data, or validation_split: a share of the records to hold out; measured after each epoch.
    packing: several examples in one row, invisible to each other. False: one a row, similar lengths together.
    loss_on: "response" (instructions and chats; strings always count whole) or "all".
    template: for instruction records; a string with {instruction}, {context} and {response}, or "chat", the
        preset's own. kind: of the records, where the keys do not tell: "dolly", "alpaca", "prompt", "messages",
        "text". template_options: keyword arguments of the preset's chat template, as in `chat`; the tools of a
        conversation stand in its row.
    on_error: what to do about rows that do not fit: "raise", or "skip" with a warning that counts and names them.
    checkpoint_dir: keep the run's state here; with resume="auto" the same call goes on where it was broken off,
        also on another backend. save_steps: steps between checkpoints; None: two minutes, and each epoch's end.
    verbose: print what will be trained on, and the progress.

    After the same `compile` a second call goes on with the optimizer's state and its count of steps, also after
    `to`; schedules begin anew. `compile` drops that state, and with it its memory.
    Raises DataError, ConfigError, NoGradients (numpy), ResumeError, TrainingError (a loss that is not a number).
    """
    _, plan = task.trainer.plan(
        epochs, steps, grad_accum, checkpoint_dir, resume, save_steps, callbacks, seed, verbose
    )  # fmt: skip
    name, held_out = name_of(data), validation_data
    if validation_split:
        check_split(validation_split, validation_data)
        data, held_out = _split(data, kind, validation_split, seed, on_error)
    options: dict[str, Any] = dict(packing=packing, loss_on=loss_on, template=template, kind=kind, seed=seed)
    options |= {"template_options": dict(template_options)} if template_options else {}
    train = batches(task, data, batch_size, on_error=on_error, **options)
    validation = None
    if held_out is not None:
        held_out = repeatable(held_out)
        validation = batches(task, held_out, batch_size, shuffle=False, on_error=on_error, **options)
    task.backbone.keep_merged()
    adapter, length = task.backbone.adapter, task.preprocessor.sequence_length
    return task.trainer.run(
        train, validation, plan, task.trainer.objective(), task.trainable_names(),
        seed=seed, dropout=adapter is not None and adapter.config.dropout > 0, shape=(batch_size, length),
        callbacks=callbacks, settings=options | {"sequence_length": length, "batch_size": batch_size},
        data=name, smaller=" or sequence_length", verbose=verbose,
    )  # fmt: skip


def evaluate(
    task: Any, data: Any, batch_size: int = 4, packing: bool = True, loss_on: str = "response",
    *, template: str | None = None, kind: str | None = None, on_error: OnError = "raise",
    template_options: Mapping[str, Any] | None = None,
) -> dict[str, float]:  # fmt: skip
    """loss (mean over tokens), perplexity (its exponential), accuracy, and tokens, of data as `fit` takes it."""
    source = batches(
        task, data, batch_size, packing=packing, loss_on=loss_on, template=template, kind=kind, shuffle=False,
        on_error=on_error, template_options=template_options,
    )  # fmt: skip
    found = task.trainer.evaluate(bar(source.epoch(0), desc="evaluating", total=source.steps(0), unit="batch"))
    if task.trainer.objective().unit != TextObjective.unit:
        return found
    perplexity = math.exp(found["loss"]) if found["loss"] < 700 else math.inf
    return {"loss": found["loss"], "perplexity": perplexity} | found


def batches(
    task: Any, data: Any, batch_size: int, template_options: Mapping[str, Any] | None = None, **options: Any
) -> BatchSource:
    length, context = task.preprocessor.sequence_length, task.config.max_position_embeddings
    if not isinstance(length, int) or not 2 <= length <= context:
        raise InputError(f"sequence_length must be 2 to {context}, the model's context; got {length!r}")
    check_whole("batch_size", batch_size)
    check_flag("packing", options["packing"])
    objective = task.trainer.objective()
    if objective.fields != TextObjective.fields:  # only whoever made the objective knows how rows become its batches
        return ReadyRows(data, objective.fields, objective.size)
    return prepare(data, task.tokenizer, _render(task, template_options), length, batch_size, **options)


def _render(task: Any, options: Mapping[str, Any] | None) -> Callable[..., str] | None:
    try:
        return functools.partial(task.chat_template.render, options=options)
    except ModelhubError:  # the preset has none; an error only for data that needs one
        return None


def _split(
    data: Any, kind: str | None, share: float, seed: int, on_error: OnError
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    rows = [row for _, row in rows_of(data, (lambda problem: None) if on_error == "skip" else None)]
    if rows and isinstance(rows[0], Mapping) and "input_ids" in rows[0]:
        raise InputError("validation_split takes records; of ready batches give some as validation_data")
    # Errors name the file's lines; what can be gone through only once is read already.
    read_records(data if isinstance(data, str | os.PathLike) else rows, kind, on_error)
    held = math.ceil(share * len(rows))
    if held >= len(rows):
        raise InputError(f"validation_split={share} leaves nothing of {len(rows)} records to train on")
    chosen = set(np.random.default_rng(seed).permutation(len(rows))[:held].tolist())
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]
