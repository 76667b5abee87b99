"""What a run measured, as numbers and as a picture."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelhub.errors import InputError
from modelhub.training.callbacks import Callback, Logs, optional_package

_FORMATS = (".png", ".svg", ".pdf")
_FEWEST = 20  # steps; fewer are shown as they are


class History(Callback):
    """Keras' History, and every step.

    history: {"loss": [one value an epoch], "accuracy": ..., "val_loss": ...}; what the objective sums up are means over
    all its units of the epoch: all images, or all tokens that have a loss. epoch: the epochs that ended, from 0. steps:
    a dict a step, {"step", "epoch", "loss", ...}. unit, sums: the objective's.
    """

    def __init__(self, unit: str = "tokens", sums: Sequence[str] = ("loss", "accuracy")) -> None:
        self._unit, self._sums = unit, tuple(sums)
        self.history: dict[str, list[float]] = {}
        self.epoch: list[int] = []
        self.steps: list[dict[str, float]] = []
        self._now = 0

    def __repr__(self) -> str:
        last = ", ".join(f"{name}={values[-1]:.4g}" for name, values in self.history.items() if values)
        return f"History({len(self.epoch)} epochs, {len(self.steps)} steps{', ' if last else ''}{last})"

    def epoch_means(self) -> dict[str, float]:
        """Of the epoch at hand so far, what the objective sums up: each step counts by its number of units."""
        steps = [step for step in self.steps if step["epoch"] == self._now]
        means = {}
        for name in self._sums:
            parts = [(step[name], step[self._unit]) for step in steps if name in step]
            if units := sum(count for _, count in parts):
                # A step without units has no mean, and 0 * NaN would spoil the others'.
                means[name] = math.fsum(value * count for value, count in parts if count) / units
        return means

    def on_train_begin(self, logs: Logs) -> None:
        self.history, self.epoch, self.steps, self._now = {}, [], [], 0

    def on_epoch_begin(self, epoch: int, logs: Logs) -> None:
        self._now = epoch

    def on_train_batch_end(self, step: int, logs: Logs) -> None:
        self.steps.append({"step": step, "epoch": self._now, **logs})

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        if self.epoch and self.epoch[-1] == epoch:  # a run that had stopped in the middle of it went on
            self.epoch.pop()
            for values in self.history.values():
                values.pop()
        self.epoch.append(epoch)
        for name, value in (logs | self.epoch_means()).items():
            self.history.setdefault(name, []).append(value)

    def state_dict(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return {"history": self.history, "epoch": self.epoch, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = {name: list(values) for name, values in state["history"].items()}
        self.epoch = list(state["epoch"])
        self.steps = [dict(step) for step in state["steps"]]

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the curves into a .png, .svg or .pdf file and return its path.

        The loss of each step (thin) and smoothed; the validation losses; the learning rate where it changed.

        Raises InputError before the first step and for other endings; BackendNotInstalled (an ImportError) without
        matplotlib.
        """
        path = Path(path)
        if path.suffix.lower() not in _FORMATS:
            raise InputError(f"{path} ends in {path.suffix!r}; pictures can be written as {', '.join(_FORMATS)}")
        if not self.steps:
            raise InputError("there is nothing to draw: no step was recorded")
        # Not pyplot: it would choose a backend for the whole process, and may open a window.
        figure = optional_package("matplotlib.figure", "History.plot").Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        numbers = [step["step"] for step in self.steps]
        losses = [step["loss"] for step in self.steps]
        blue, orange, grey = "#2a6fbb", "#d95f02", "#8a8a8a"
        if len(losses) < _FEWEST:
            axes.plot(numbers, losses, color=blue, linewidth=1.8, marker="o", markersize=3.5, label="loss of a step")
        else:
            axes.plot(numbers, losses, color=blue, linewidth=0.7, alpha=0.35, label="loss of a step")
            axes.plot(numbers, _smoothed(losses), color=blue, linewidth=2, label="smoothed")
        ends = {step["epoch"]: step["step"] for step in self.steps}  # the last step of each epoch
        validation = list(zip(self.epoch, self.history.get("val_loss", []), strict=False))
        if validation:
            axes.plot(
                [ends[epoch] for epoch, _ in validation], [loss for _, loss in validation], color=orange, linewidth=1.2,
                marker="o", markersize=6, markeredgecolor="white", zorder=3, label="validation loss",
            )  # fmt: skip
        axes.set(xlabel="step", ylabel=f"loss per {self._unit.removesuffix('s')}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        rates = [step.get("learning_rate", math.nan) for step in self.steps]
        lines = axes.get_lines()
        if max(rates) > min(rates):  # a constant is no news; NaN compares as False
            right = axes.twinx()
            lines += right.plot(numbers, rates, color=grey, linewidth=1.2, linestyle=":", label="learning rate")
            right.set_ylabel("learning rate", color=grey)
            right.tick_params(colors=grey)
            right.set_ylim(bottom=0)
            right.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
            right.spines[["top", "right", "left"]].set_visible(False)
        # Above the axes: there is no corner that no curve runs through.
        axes.legend(handles=lines, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=len(lines), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        return path


def _smoothed(values: Sequence[float]) -> list[float]:
    """The exponential moving average over about a twentieth of the values, without the bias of its start; values that
    are not finite are passed over."""
    decay = 1 - 2 / (max(10, len(values) / 20) + 1)
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean = decay * mean + (1 - decay) * value
            weight = decay * weight + (1 - decay)
        smooth.append(mean / weight if weight else math.nan)
    return smooth
