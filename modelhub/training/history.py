"""What a run measured, as numbers and as a picture."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

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

    @overload
    def plot(self, path: str | os.PathLike[str]) -> Path: ...
    @overload
    def plot(self, path: None = None) -> Any: ...
    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the curves into a .png, .svg or .pdf file and return its path; None: return the figure, a
        matplotlib.figure.Figure, which a notebook shows.

        The loss of each step (thin) and smoothed; the validation losses; the learning rate where it changed.

        Raises InputError before the first step and for other endings; BackendNotInstalled (an ImportError) without
        matplotlib.
        """
        target = None if path is None else Path(path)
        if target is not None and target.suffix.lower() not in _FORMATS:
            raise InputError(f"{path} ends in {target.suffix!r}; pictures can be written as {', '.join(_FORMATS)}")
        if not self.steps:
            raise InputError("there is nothing to draw: no step was recorded")
        # Not pyplot: it would choose a backend for the whole process, and may open a window.
        figure = _figure(optional_package("matplotlib.figure", "History.plot"))
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
        if target is None:
            return figure
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=150)
        return target


def _figure(matplotlib_figure: Any) -> Any:
    class Curve(matplotlib_figure.Figure):
        def _repr_png_(self) -> bytes:
            """What a notebook shows, also where pyplot was never imported."""
            picture = io.BytesIO()
            self.savefig(picture, format="png", dpi=100)
            return picture.getvalue()

    return Curve(figsize=(8, 4.5), layout="constrained")


def _smoothed(values: Sequence[float]) -> list[float]:
    """Straight lines through a tenth of the values, fitted anew at each (Cleveland 1979, without his iterations): where
    the loss falls, or at the end, they do not lag as a mean does. Values that are not finite are passed over."""
    size = min(max(10, len(values) // 10), 500)
    y = np.pad(np.asarray(values, np.float64), size)
    known = np.isfinite(y)
    known[:size] = known[-size:] = False
    y = np.where(known, y, 0.0)
    away = np.arange(-size, size + 1) / (size + 1)
    weight = (1 - np.abs(away) ** 3) ** 3
    s0, s1, s2 = (np.correlate(known.astype(np.float64), weight * away**power, "valid") for power in range(3))
    t0, t1 = (np.correlate(y, weight * away**power, "valid") for power in range(2))
    spread = s0 * s2 - s1 * s1
    with np.errstate(divide="ignore", invalid="ignore"):
        # One value alone, or none: no line goes through.
        smooth = np.where(spread > 1e-9 * s0 * s0, (s2 * t0 - s1 * t1) / spread, t0 / s0)
    begun = np.cumsum(known[size:-size]) > 0
    return np.where(begun, smooth, math.nan).tolist()
