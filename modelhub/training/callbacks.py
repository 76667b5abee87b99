"""What happens beside a run: stopping early, keeping the best, logging, showing progress. The hooks are Keras'.

The loop calls set_model, on_train_begin, then, if the run is resumed, load_state_dict, and then the hooks of the steps.
"""

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TextIO

from tqdm import tqdm

from modelhub.errors import BackendNotInstalled, InputError
from modelhub.habits import Habits
from modelhub.hub.files import replacing
from modelhub.progress import bar, in_notebook

Logs = dict[str, float]

_STARTS = {start[:size] for start in (b'{"step', b'{"epoc') for size in range(1, 7)}  # of JSONLogger's lines


class Callback(Habits):
    """Base of all callbacks: override what you need.

    step: counts the optimizer steps of the whole run, also over a resume; 1 is the first. epoch: from 0, as in Keras.
    logs of a finished step: loss, accuracy, learning_rate, grad_norm, tokens (those with a loss), tokens_per_second,
    seconds, memory (peak, in bytes); with images, images and images_per_second, and all metrics. logs of a finished
    epoch: loss and accuracy per token or image over the whole epoch, and val_loss and val_accuracy where there is
    validation.

    `self.model.stop_training = True` ends the run after the step or epoch at hand.
    """

    model: Any = None

    def set_model(self, model: Any) -> None:
        self.model = model

    def on_train_begin(self, logs: Logs) -> None: ...
    def on_train_end(self, logs: Logs) -> None: ...
    def on_epoch_begin(self, epoch: int, logs: Logs) -> None: ...
    def on_epoch_end(self, epoch: int, logs: Logs) -> None: ...
    def on_train_batch_begin(self, step: int, logs: Logs) -> None: ...
    def on_train_batch_end(self, step: int, logs: Logs) -> None: ...
    def on_test_begin(self, logs: Logs) -> None: ...
    def on_test_end(self, logs: Logs) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """JSON values that a resumed run needs; they are kept with the run's checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class _Best(Callback):
    """Follows the best value of one name over the epochs. NaN is never the best."""

    def __init__(self, monitor: str, mode: str, min_delta: float = 0.0):
        if mode not in ("auto", "min", "max"):
            raise InputError(f"mode must be auto, min or max, got {mode!r}")
        if mode == "auto":
            if not monitor.endswith(("loss", "perplexity", "accuracy")):
                raise InputError(
                    f'mode="auto" knows losses, perplexities and accuracies; whether {monitor!r} is better low or high '
                    'must be said: mode="min" or mode="max"'
                )
            mode = "max" if monitor.endswith("accuracy") else "min"
        self.monitor, self.min_delta = monitor, abs(min_delta)
        self.best: float | None = None
        self._sign = 1 if mode == "max" else -1

    def on_train_begin(self, logs: Logs) -> None:
        self.best = None

    def improves(self, logs: Logs) -> bool:
        if self.monitor not in logs:
            hint = "; give fit validation_data" if self.monitor.startswith("val_") else ""
            raise InputError(
                f"{type(self).__name__} was asked to monitor {self.monitor!r}, and the epoch has only "
                f"{', '.join(sorted(logs)) or 'no values'}{hint}"
            )
        value = logs[self.monitor]
        better = self.best is None or self._sign * value - self.min_delta > self._sign * self.best
        if math.isnan(value) or not better:
            return False
        self.best = value
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = state["best"]


class EarlyStopping(_Best):
    """End the run when `monitor` has not improved by more than min_delta for `patience` epochs, as in Keras.

    mode: "min", "max", or "auto": accuracies should rise, losses and perplexities fall.
    stopped_epoch: the epoch (from 0) after which the run was ended, else None.
    Raises InputError at the end of an epoch whose logs lack `monitor`.
    """

    def __init__(self, monitor: str = "val_loss", patience: int = 1, min_delta: float = 0.0, mode: str = "auto"):
        super().__init__(monitor, mode, min_delta)
        self.patience = patience
        self.wait = 0
        self.stopped_epoch: int | None = None

    def on_train_begin(self, logs: Logs) -> None:
        super().on_train_begin(logs)
        self.wait, self.stopped_epoch = 0, None

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        self.wait = 0 if self.improves(logs) else self.wait + 1
        if self.wait and self.wait >= self.patience:
            self.stopped_epoch = epoch
            self.model.stop_training = True

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"wait": self.wait}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.wait = state["wait"]


class BestCheckpoint(_Best):
    """Save the model to `folder` after each epoch that is the best so far: the adapter, or all of a model without one.

    The folder always holds one whole model: the new one is written beside it and then takes its place. best.json in it
    says the epoch and the value. mode: as for EarlyStopping.
    Raises InputError at the beginning if the folder holds something that BestCheckpoint did not write, and at the end
    of an epoch whose logs lack `monitor`.
    """

    def __init__(self, folder: str | os.PathLike[str], monitor: str = "val_loss", mode: str = "auto"):
        super().__init__(monitor, mode)
        self.folder = Path(folder).resolve()

    def on_train_begin(self, logs: Logs) -> None:
        super().on_train_begin(logs)
        # Replacing the folder removes what is in it: a wrong path must not cost the user his files.
        if self.folder.exists() and not (self.folder / "best.json").is_file() and not _is_empty(self.folder):
            raise InputError(
                f"{self.folder} holds files that BestCheckpoint did not write and would have to remove; give a new or "
                "an empty folder"
            )

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        if not self.improves(logs):
            return
        with replacing(self.folder) as work:
            save = self.model.save_adapter if self.model.saves_adapter else self.model.save_to_preset
            save(str(work))
            (work / "best.json").write_text(json.dumps({"epoch": epoch, self.monitor: self.best}) + "\n")


class JSONLogger(Callback):
    """One JSON object a line: {"step", "epoch", ...} after each step, {"epoch", ...} after each epoch.

    Each line is on its way to the disk before the next step. A resumed run goes on with the file from where it takes
    the run up; one that starts anew starts the file anew. NaN and infinities, which JSON lacks, are null.
    Raises InputError at the beginning if the file was not written by a JSONLogger.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file: IO[bytes] | None = None
        self._epoch = 0
        self._old: list[tuple[int, dict[str, Any]]] = []  # the lines that were there, and where each begins

    def on_train_begin(self, logs: Logs) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115 (closed when the training ends)
        self._file.seek(0)
        self._old, begin = [], 0
        for line in self._file:
            if not line.endswith(b"\n") and line[:6] in _STARTS:  # torn by a kill
                self._file.truncate(begin)
                break
            self._old.append((begin, _record(line, self.path)))
            begin += len(line)

    def on_train_end(self, logs: Logs) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def on_epoch_begin(self, epoch: int, logs: Logs) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, step: int, logs: Logs) -> None:
        self._write({"step": step, "epoch": self._epoch, **logs}, "step")

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        self._write({"epoch": epoch, **logs}, "epoch")

    def _write(self, record: dict[str, Any], kind: str) -> None:
        assert self._file is not None
        for begin, old in self._old:  # before the first line of this run: cut off what comes again
            if ("step" in old) == (kind == "step") and old[kind] >= record[kind]:
                self._file.truncate(begin)
                break
        self._old = []
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self._file.write(json.dumps(finite).encode() + b"\n")
        self._file.flush()


class _ScalarLogger(Callback):
    """Hands "train/..." after each step and "epoch/..." after each epoch, both at the step, to `_write`."""

    _step = 0

    def on_train_batch_end(self, step: int, logs: Logs) -> None:
        self._step = step
        self._write({f"train/{name}": value for name, value in logs.items()})

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        self._write({f"epoch/{name}": value for name, value in logs.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]

    def _write(self, values: dict[str, float]) -> None:
        raise NotImplementedError


class TensorBoardLogger(_ScalarLogger):
    """Event files for TensorBoard, through tensorboardX, which needs neither torch nor TensorFlow.

    In a resumed run TensorBoard drops what the run before wrote of the steps that come again.
    Raises BackendNotInstalled (an ImportError) if tensorboardX is missing.
    """

    def __init__(self, log_dir: str | os.PathLike[str]):
        self.log_dir = Path(log_dir)
        self._package = optional_package("tensorboardX", "TensorBoardLogger")
        self._writer: Any = None

    def on_train_end(self, logs: Logs) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, values: dict[str, float]) -> None:
        if self._writer is None:
            # The suffix, since files are otherwise named by the second, and a quick resume would overwrite.
            self._writer = self._package.SummaryWriter(
                str(self.log_dir), purge_step=self._step, flush_secs=10, filename_suffix=f".{self._step:08d}"
            )
        for name, value in values.items():
            self._writer.add_scalar(name, value, self._step)


class WandbLogger(_ScalarLogger):
    """Weights & Biases. A run that the user has begun with wandb.init is used and left open.

    project, name, entity, config, mode ("online", "offline", "disabled"): wandb.init's. A resumed run is the same run
    there, and steps that it has already are not repeated.
    Raises BackendNotInstalled (an ImportError) if wandb is missing.
    """

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        entity: str | None = None,
        config: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ):
        self._settings = {"project": project, "name": name, "entity": entity, "config": config, "mode": mode}
        self._package = optional_package("wandb", "WandbLogger")
        self._run: Any = None
        self._id: str | None = None
        self._own = False

    def on_train_begin(self, logs: Logs) -> None:
        self._run = self._id = None

    def on_train_batch_begin(self, step: int, logs: Logs) -> None:
        self._open()  # so that a missing login is noticed before the first step is paid for

    def on_train_end(self, logs: Logs) -> None:
        if self._run is not None and self._own:
            self._run.finish()
        self._run = None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"id": self._id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._id = state["id"]

    def _open(self) -> None:
        if self._run is None:
            self._own = self._package.run is None
            if self._own:
                self._run = self._package.init(**self._settings, id=self._id, resume="allow" if self._id else None)
            else:
                self._run = self._package.run
            self._id = self._run.id

    def _write(self, values: dict[str, float]) -> None:
        self._open()
        self._run.log(values, step=self._step)


class ProgressBar(Callback):
    """Step, loss, accuracy, speed, memory and time left: a bar on terminals and in notebooks, else a line now and then.

    total: optimizer steps of the whole run; None: unknown. every: seconds between two lines where there is no terminal.
    file: sys.stderr if None.
    """

    def __init__(self, total: int | None = None, every: float = 10.0, file: TextIO | None = None):
        self.total, self.every, self.file = total, every, file
        self._bar: Any = None
        self._first: tuple[int, float] | None = None  # the first step that finished, and when
        self._printed, self._line = -math.inf, ""

    def on_train_begin(self, logs: Logs) -> None:
        self._bar = self._first = None
        self._printed, self._line = -math.inf, ""

    def on_train_batch_begin(self, step: int, logs: Logs) -> None:
        if self._bar is None and (self._stream.isatty() or (self.file is None and in_notebook())):
            self._bar = bar(
                total=self.total, initial=step - 1, unit="step", file=self._stream, dynamic_ncols=True, delay=0,
                leave=True, disable=False,
            )  # fmt: skip

    def on_train_batch_end(self, step: int, logs: Logs) -> None:
        shown = [f"{name} {logs[name]:.4f}" for name in ("loss", "accuracy") if name in logs]
        if "tokens_per_second" in logs:
            shown.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
        if "images_per_second" in logs:
            shown += [f"{logs['images_per_second']:,.1f} images/s", f"{logs['seconds'] * 1000:,.0f} ms a step"]
        if "memory" in logs:
            shown.append(tqdm.format_sizeof(logs["memory"], "B"))
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(shown), refresh=False)
            self._bar.update()
            return
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        elif self.total is not None:
            # From the first step's end on: that step compiles, and says nothing about the others.
            left = (now - self._first[1]) / (step - self._first[0]) * (self.total - step)
            shown.append(f"{tqdm.format_interval(left)} left")
        self._line = f"step {step}{f'/{self.total}' if self.total is not None else ''}: {', '.join(shown)}"
        if now - self._printed >= self.every:
            self._print_line(now)

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        self._print_line(time.monotonic())
        shown = [f"{name} {value:.4f}" for name, value in logs.items() if name.endswith(("loss", "accuracy"))]
        self._print(f"epoch {epoch + 1}: {', '.join(shown)}")

    def on_test_begin(self, logs: Logs) -> None:
        if self._bar is not None:
            self._bar.set_description("validation")

    def on_test_end(self, logs: Logs) -> None:
        if self._bar is not None:
            self._bar.set_description(None)

    def on_train_end(self, logs: Logs) -> None:
        self._print_line(time.monotonic())
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @property
    def _stream(self) -> TextIO:
        return self.file or (sys.stdout if in_notebook() else sys.stderr)  # there stderr is shown as an error

    def _print_line(self, now: float) -> None:
        """The line of the last step, unless it was printed already."""
        if self._line:
            self._print(self._line)
            self._printed, self._line = now, ""

    def _print(self, text: str) -> None:
        with suppress(OSError):  # a terminal that was closed is no reason to lose the run
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            else:
                print(text, file=self._stream, flush=True)


def optional_package(name: str, wanted_by: str) -> Any:
    """Import a package that modelhub does not require. Raises BackendNotInstalled (an ImportError) if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendNotInstalled(
            f"{wanted_by} needs {name.partition('.')[0]}, which cannot be imported ({error}): "
            f"pip install {name.partition('.')[0]}"
        ) from error


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _record(line: bytes, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
        raise InputError(
            f"{path} holds lines that JSONLogger did not write, such as {line[:60]!r}; give another path for the log"
        )
    return record
