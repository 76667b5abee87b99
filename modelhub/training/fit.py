"""The loop over steps and epochs: learning rate, validation, callbacks, checkpoints, interruption."""

import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelhub.core.tree import Params
from modelhub.errors import CheckpointError, DataError, InputError, ResumeError, TrainingError
from modelhub.habits import instead_of
from modelhub.training import checkpoints
from modelhub.training.arguments import check_whole
from modelhub.training.batches import BatchSource
from modelhub.training.callbacks import Callback
from modelhub.training.engine import TrainingEngine
from modelhub.training.history import History
from modelhub.training.ready_batches import Batch

log = logging.getLogger("modelhub")

SAVE_SECONDS = 120.0  # between two checkpoints, where save_steps does not say otherwise
MOST_SKIPPED = 20  # steps in a row without finite gradients before float16 training gives up


@dataclass(frozen=True)
class Plan:
    """How long to train, and where the run is kept; see CausalLM.fit."""

    epochs: int = 1
    steps: int | None = None
    grad_accum: int = 1
    learning_rate: float | None = 5e-5  # None: the optimizer has its own
    schedule: Callable[[int, int | None], float] = lambda step, total: 1.0
    checkpoint_dir: str | os.PathLike[str] | None = None
    resume: str | bool = "auto"
    save_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "grad_accum", "steps", "save_steps"):
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value)
        if self.resume not in ("auto", True, False):
            raise InputError(f'resume must be "auto", True or False, got {self.resume!r}')

    def total_steps(self, data: BatchSource) -> int | None:
        """Optimizer steps of the whole run; None where the data cannot tell."""
        if self.steps is not None:
            return self.steps
        batches = [data.steps(epoch) for epoch in range(self.epochs)]
        return sum(math.ceil(n / self.grad_accum) for n in batches if n is not None) if None not in batches else None


class Run:
    """One training run. publish: called with the trainable parameters after each step, before callbacks see it.

    settings: what a resumed run must have in common with the one that was broken off (JSON values).
    """

    def __init__(
        self, engine: TrainingEngine, data: BatchSource, plan: Plan, *, model: Any, publish: Callable[[Params], None],
        validation: BatchSource | None, callbacks: Sequence[Callback], settings: Mapping[str, Any],
    ):  # fmt: skip
        self.engine, self.data, self.plan = engine, data, plan
        self.model, self.publish, self.validation, self.settings = model, publish, validation, dict(settings)
        self.history = History(engine.objective.unit, engine.objective.sums)
        self.callbacks = [self.history, *callbacks]
        for callback in self.callbacks:
            if not isinstance(callback, Callback):
                raise InputError(
                    f"callbacks must be objects of modelhub.training.Callback, got {callback!r}{instead_of(callback)}"
                )
        self.total = plan.total_steps(data)
        self.step = self.epoch = self.batch = 0  # steps done; the epoch, and how many of its batches are done
        self.skipped = 0  # steps in a row
        self._saved = time.monotonic()

    def fit(self) -> History:
        for callback in self.callbacks:
            callback.set_model(self.model)
        self.model.stop_training = False
        if self.plan.checkpoint_dir is None:
            return self._fit()
        try:
            os.makedirs(self.plan.checkpoint_dir, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"checkpoint_dir {self.plan.checkpoint_dir} cannot be a folder: {error}") from error
        with checkpoints.lock(self.plan.checkpoint_dir):
            return self._fit()

    def _fit(self) -> History:
        self._tell("on_train_begin", {})
        if self._resume():
            return self.history
        try:
            with checkpoints.interruptible() as interruption:
                self._loop(interruption)
        finally:
            self._tell("on_train_end", {})
        return self.history

    def _loop(self, interruption: checkpoints.Interruption) -> None:
        while not self._over():
            self._tell("on_epoch_begin", self.epoch, {})
            begun, whole = self.step, False
            for group in self._groups():
                self._step(group)
                self.batch += len(group)
                if interruption.requested:
                    self._stop_here()
                if self.model.stop_training or self.step == self.plan.steps:
                    break
                self._save_if_due()
            else:
                whole = True
            if not self.batch:
                raise DataError("the data has no batches left; an iterator can only be gone through once")
            if self.step > begun or self.history.epoch[-1:] != [self.epoch]:
                self._end_epoch()
            if whole:  # else a run of more steps goes on in the middle of it
                self.epoch, self.batch = self.epoch + 1, 0
            self._save()
            if interruption.requested:
                self._stop_here()
        if self.plan.checkpoint_dir is not None:
            checkpoints.mark_finished(self.plan.checkpoint_dir)

    def _end_epoch(self) -> None:
        logs = self.history.epoch_means()
        if self.validation is not None:
            self._tell("on_test_begin", {})
            found = self.engine.evaluate(self.validation.epoch(0))
            logs |= {f"val_{name}": found[name] for name in self.engine.objective.sums}
            if not math.isfinite(found["loss"]):
                log.warning(
                    "epoch %d: the validation loss is %s, which says nothing: some rows of the validation data make "
                    "the model's numbers NaN or infinite. Look at them, or try a lower learning_rate or float32",
                    self.epoch + 1, found["loss"],
                )  # fmt: skip
            self._tell("on_test_end", logs)
        self._tell("on_epoch_end", self.epoch, logs)

    def _over(self) -> bool:
        if self.model.stop_training:
            return True
        return self.step >= self.plan.steps if self.plan.steps is not None else self.epoch >= self.plan.epochs

    def _groups(self) -> Iterator[list[Batch]]:
        """The batches of one step after the other, to the end of the epoch."""
        batches = self.data.epoch(self.epoch, self.batch)
        while group := list(itertools.islice(batches, self.plan.grad_accum)):
            yield group

    def _step(self, group: list[Batch]) -> None:
        number = self.step + 1
        rate = None
        if self.plan.learning_rate is not None:
            rate = self.plan.learning_rate * self.plan.schedule(self.step, self.total)
        self._tell("on_train_batch_begin", number, {})
        begun = time.perf_counter()
        logs = self.engine.train(group, number, rate or 0.0)
        seconds = time.perf_counter() - begun
        self.step = number
        self.publish(self.engine.trainable)
        self._check(logs)
        objective = self.engine.objective
        speed = sum(map(objective.size, group)) / seconds
        logs |= {} if rate is None else {"learning_rate": rate}
        logs |= {"seconds": seconds, f"{objective.unit}_per_second": speed}
        if (memory := self.engine.xp.peak_memory()) is not None:
            logs["memory"] = float(memory)
        self._tell("on_train_batch_end", number, logs)

    def _check(self, logs: Mapping[str, float]) -> None:
        finite = math.isfinite(logs["grad_norm"]) and math.isfinite(logs["loss"])
        self.skipped = 0 if finite else self.skipped + 1
        # With a loss scale gradients overflow now and then: the step is left out, and the scale falls.
        if finite or (self.engine.scaling and math.isfinite(logs["loss"]) and self.skipped < MOST_SKIPPED):
            return
        kept = ""
        if self.plan.checkpoint_dir is not None and (found := checkpoints.latest(self.plan.checkpoint_dir)):
            kept = f" The checkpoint of step {found.step} in {self.plan.checkpoint_dir} is from before it."
        raise TrainingError(
            f"step {self.step}: the loss is {logs['loss']:g} and the norm of its gradients {logs['grad_norm']:g}. This "
            f"step was not applied: the model has the weights of step {self.step - 1}.{kept} Try a lower "
            f"learning_rate, warm-up steps or clip_norm=1.0; look at the rows of this step"
        )

    # --- checkpoints ------------------------------------------------------------------------------------------

    def _resume(self) -> bool:
        """Take up where the newest checkpoint is. True if there is nothing left to do."""
        directory = self.plan.checkpoint_dir
        if directory is not None and self.plan.resume is False:
            checkpoints.clear(directory)
        found = checkpoints.latest(directory) if directory is not None else None
        if found is None:
            if directory is not None and self.plan.resume is True:
                raise InputError(f'resume=True, but {directory} holds no checkpoint; resume="auto" starts anew then')
            return False
        checkpoints.check_same(found.meta["settings"], self.settings)
        xp = self.engine.xp
        tensors = {name: xp.array(array) for name, array in found.tensors().items()}
        trainable = {n.removeprefix("trainable/"): x for n, x in tensors.items() if n.startswith("trainable/")}
        state = {n.removeprefix("state/"): x for n, x in tensors.items() if n.startswith("state/")}
        if self.engine.state and state.keys() != self.engine.state.keys():
            raise ResumeError(
                f"the checkpoint in {directory} holds the state of another optimizer; give another checkpoint_dir, or "
                f"resume=False (--no-resume), which replaces it"
            )
        self.engine.trainable, self.engine.state = trainable, state
        meta = found.meta
        self.engine.offset = meta.get("optimizer_steps", 0)
        self.step, self.epoch, self.batch = meta["step"], meta["epoch"], meta["batch"]
        self.publish(self.engine.trainable)
        self.data.load_state_dict(meta["data"])
        kept = list(meta["callbacks"])
        for callback in self.callbacks:  # by class, in order: the list may have got longer or shorter
            match = next((entry for entry in kept if entry["class"] == type(callback).__name__), None)
            if match is not None:
                kept.remove(match)
                callback.load_state_dict(match["state"])
        assert directory is not None
        if self._over() or (checkpoints.is_finished(directory) and meta["plan"] == self._length()):
            log.warning("the run in %s is finished: %d steps, nothing left to do", directory, self.step)
            self._tell("on_train_end", {})
            return True
        log.warning("going on in %s after step %d", directory, self.step)
        return False

    def _length(self) -> dict[str, Any]:
        return {"epochs": self.plan.epochs, "steps": self.plan.steps}

    def _save(self) -> None:
        if self.plan.checkpoint_dir is None:
            return
        get = self.engine.xp.get
        tensors = {f"trainable/{name}": get(x) for name, x in self.engine.trainable.items()}
        tensors |= {f"state/{name}": get(x) for name, x in self.engine.state.items()}
        callbacks = [{"class": type(c).__name__, "state": c.state_dict()} for c in self.callbacks]
        meta = {
            "settings": self.settings, "plan": self._length(), "step": self.step, "epoch": self.epoch,
            "batch": self.batch, "data": self.data.state_dict() if self.batch else {}, "callbacks": callbacks,
            "optimizer_steps": self.engine.offset, "written_by": {"backend": self.engine.xp.name},
        }  # fmt: skip
        checkpoints.save(self.plan.checkpoint_dir, self.step, tensors, meta)
        self._saved = time.monotonic()

    def _save_if_due(self) -> None:
        due = self.step % self.plan.save_steps == 0 if self.plan.save_steps else None
        if due or (due is None and time.monotonic() - self._saved > SAVE_SECONDS):
            self._save()

    def _stop_here(self) -> None:
        """After Ctrl-C: save, say how to go on, and stop the program that called."""
        self._save()
        if self.plan.checkpoint_dir is None:
            how = "the model has the weights of this step; give a checkpoint_dir to be able to go on later"
        else:
            how = f"the same call, with checkpoint_dir={str(self.plan.checkpoint_dir)!r}, goes on from here"
        raise KeyboardInterrupt(f"stopped after step {self.step}: {how}")

    def _tell(self, event: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*args)
