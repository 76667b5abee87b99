"""One training step: sums of losses and gradients over pieces of a batch, then one update.

Losses and gradients are sums over positions (or images); the division by their number comes once, in the update. So it
makes no difference into how many pieces a batch is cut, and accumulation over batches does not change the loss.
"""

import functools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from modelhub.core import custom, leaves, lora, optim
from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Module, Params
from modelhub.errors import DataError
from modelhub.training import fields
from modelhub.training.objectives import Batch, Objective, compute_dtype


@dataclass(frozen=True)
class Settings:
    """How to train; see CausalLM.compile. compute_dtype: what the forward pass is computed in, None: the model's."""

    optimizer: Any = field(default_factory=lambda: optim.AdamW(5e-5))
    clip_norm: float | None = None
    loss: Any = None  # the user's own, or the name of a registered one
    compute_dtype: str | None = None
    matmul_precision: str | None = None
    remat: bool = False
    dropout: bool = False
    seed: int = 0
    jit: bool | None = None


@dataclass
class OptimizerState:
    """What an optimizer remembers after `steps` steps, for the next run.

    shapes: of the parameters that it trained, by name; adapter: the one that was active. They must be the same then.
    """

    arrays: Params
    steps: int
    shapes: dict[str, tuple[int, ...]]
    adapter: str | None


class TrainingEngine:
    """The compiled programs of a training run and its state: trainable parameters and what the optimizer remembers.

    params: all of the model's; trainable: the names of those to train, which are copied. The others are only read.
    objective: what is learnt.
    """

    def __init__(
        self, xp: Backend, skeleton: Module, params: Params, trainable: Iterable[str], settings: Settings,
        objective: Objective,
    ):  # fmt: skip
        settings = replace(settings, loss=custom.loss(settings.loss, xp))
        self.xp, self.settings, self.objective = xp, settings, objective
        names = frozenset(trainable)
        leaves.check_plain(
            {name: x for name, x in params.items() if name in names}, "training",
            "train an adapter on top of them (enable_lora), or load the model unpacked",
        )  # fmt: skip
        self._dtype = settings.compute_dtype or compute_dtype(params)
        self.frozen = {name: _compute(xp, settings, name, x) for name, x in params.items() if name not in names}
        self.trainable = {name: xp.copy(x) for name, x in params.items() if name in names}
        self._shapes = {name: tuple(x.shape) for name, x in self.trainable.items()}
        self.state: Params = settings.optimizer.init(xp, self.trainable)
        self.offset = 0  # steps of runs before this one that the state has seen
        self.scaling = optim.LossScale() if self._dtype == "float16" else None
        if self.scaling:
            self.state |= {f"loss_scale/{key}": x for key, x in self.scaling.init(xp).items()}
            self.state["loss_scale/steps"] = xp.array(0)  # those that were not left out
        compiled = functools.partial(xp.compile, training=True, jit=settings.jit)
        common = xp, skeleton, self.objective, settings
        gradients = functools.partial(_add_gradients, *common, self.scaling is not None)
        self._gradients = compiled(gradients, donate=(3,))
        update = functools.partial(_update, xp, settings, self.objective.sums, self.scaling)
        self._update = compiled(update, donate=(1, 2))
        self._losses = compiled(functools.partial(_add_losses, *common), donate=(2,))
        self._measured = compiled(functools.partial(_add_measured, *common), donate=(2,))

    @property
    def params(self) -> Params:
        """Frozen and trainable in one dict."""
        return self.frozen | self.trainable

    def take_up(self, kept: OptimizerState, adapter: str | None) -> None:
        """Go on with the state of an earlier run, if it is of the same parameters. Its arrays are consumed."""
        same_slots = not self.state or self.state.keys() == kept.arrays.keys()  # torch's optimizers have none so far
        if (kept.adapter, kept.shapes) != (adapter, self._shapes) or not same_slots:
            return
        xp, self.state, self.offset = self.xp, dict(kept.arrays), kept.steps
        for name, x in self.trainable.items():
            if (master := self.state.get(f"master/{name}")) is not None:
                # A loop of the user's own may have trained the weights since.
                as_left = xp.cast(master, xp.dtype(x)) == x
                self.state[f"master/{name}"] = xp.where(as_left, master, xp.cast(x, "float32"))

    def left(self, step: int, adapter: str | None) -> OptimizerState:
        """What a later run may take up after `step` of this one."""
        return OptimizerState(self.state, self.offset + step, self._shapes, adapter)

    def train(self, batches: Iterable[Batch], step: int, learning_rate: float) -> dict[str, float]:
        """One step, counted from 1, on all the batches together: the objective's sums (loss, accuracy, ...) over their
        count, grad_norm, and the count under the name of its unit (tokens, images).

        A step whose gradients are not finite changes nothing; its grad_norm says so.
        """
        xp, names, unit = self.xp, self.objective.sums, self.objective.unit
        step += self.offset
        with xp.matmul_precision(self.settings.matmul_precision):
            sums = {name: xp.zeros(()) for name in names}
            sums |= {f"gradient/{name}": xp.zeros(x.shape) for name, x in self.trainable.items()}
            scale = self.state.get("loss_scale/scale", xp.array(1.0))
            counted = 0.0
            for piece, count in self._pieces(self._with_totals(batches), step):
                sums = self._gradients(self.trainable, self.frozen, piece, sums, scale)
                counted += count
            if not counted:
                return dict.fromkeys((*names, "grad_norm", unit), 0.0)
            numbers = xp.array(counted), xp.array(learning_rate, "float32"), xp.array(step, "int32")
            self.trainable, self.state, found = self._update(self.trainable, self.state, sums, *numbers)
        return {name: float(xp.get(found[name])) for name in (*names, "grad_norm")} | {unit: counted}

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The objective's sums (loss, accuracy, ...) over their count, and the count under the name of its unit.

        Totals that an objective has over a window are those of each batch.
        """
        xp, names = self.xp, self.objective.sums
        with xp.matmul_precision(self.settings.matmul_precision):
            sums = {name: xp.zeros(()) for name in names}
            counted = 0.0
            each = (told for batch in batches for told in self._with_totals([batch]))
            for piece, count in self._pieces(each, None):
                sums = self._losses(self.params, piece, sums)
                counted += count
        means = {name: float(xp.get(sums[name])) / max(counted, 1) for name in names}
        return means | {self.objective.unit: counted}

    def memory(self, rows: int, positions: int) -> int:
        """Bytes that a step of that many rows, each of that many positions, needs beside the weights: a rough count."""
        item = leaves.size((), self._dtype)
        trained = sum(leaves.size(x.shape, "float32") for x in self.trainable.values())
        slots = sum(map(leaves.nbytes, self.state.values()))
        at_once = self._at_once(rows, positions)
        return 3 * trained + slots + self.objective.activations(at_once, positions, item, self.settings.remat)

    def _at_once(self, rows: int, positions: int) -> int:
        """How many rows go through the model together: whole groups."""
        if self.xp.device != "cpu" or self.objective.group is None:
            return rows
        group = self.objective.group
        return min(rows, max(1, self.objective.rows_at_once(positions) // group) * group)

    def _pieces(
        self, batches: Iterable[tuple[Batch, Params]], step: int | None
    ) -> Iterator[tuple[dict[str, Array], float]]:
        """Those with something to learn, with the totals that they are told."""
        for number, (batch, totals) in enumerate(batches):
            for first, rows, arrays, count in self._cut(batch):
                if not count:
                    continue
                if self.settings.dropout and step is not None:
                    sequences = self.objective.sequences
                    arrays["dropout_keys"] = _keys(self.settings.seed, step, number, first, rows, sequences)
                yield {name: self._taken(x) for name, x in arrays.items()} | totals, count

    def _cut(self, batch: Batch) -> Iterator[tuple[int, int, dict[str, np.ndarray], float]]:
        """The pieces of a batch: first row, how many rows, arrays, count."""
        fields.check(self.objective.fields, batch)
        self.objective.check(batch)
        rows, positions = self.objective.shape(batch)
        if rows % (group := self.objective.group or rows):
            raise DataError(
                f"the batch has {rows} rows, of which each {group} belong together: give whole groups, a multiple of "
                f"{group} rows"
            )
        at_once = self._at_once(rows, positions)
        for first in range(0, rows, at_once):
            yield first, at_once, *self.objective.piece(batch, first, at_once)

    def _with_totals(self, batches: Iterable[Batch]) -> Iterable[tuple[Batch, Params]]:
        """The batches of one step, each with the totals that its pieces are told."""
        counted, measured = self.objective.counted, self.objective.measured
        if not counted and not measured:
            return ((batch, {}) for batch in batches)
        batches = list(batches)
        found: list[dict[str, Array]] = [
            {name: self.xp.array(float(x)) for name, x in self.objective.count(batch).items()} for batch in batches
        ]
        if measured:
            found = [told | self._measure(batch) for told, batch in zip(found, batches, strict=True)]
        over: Mapping[str, str] = {**counted, **measured}
        windows = {name: _total([told[name] for told in found]) for name in over if over[name] == "window"}
        return [
            (batch, {f"total/{name}": (told | windows)[name] for name in over})
            for batch, told in zip(batches, found, strict=True)
        ]  # fmt: skip

    def _measure(self, batch: Batch) -> Params:
        sums = {name: self.xp.zeros(()) for name in self.objective.measured}
        params = self.params
        for *_, arrays, _ in self._cut(batch):
            sums = self._measured(params, {name: self._taken(x) for name, x in arrays.items()}, sums)
        return sums

    def _taken(self, x: np.ndarray) -> Array:
        """Pixels are many and the batch is ours: they are not copied once more."""
        return self.xp.put(x) if x.dtype == np.float32 else self.xp.array(x)


def _keys(seed: int, step: int, number: int, first: int, rows: int, sequences: int = 1) -> np.ndarray:
    """(rows * sequences,) int32: the same for a row whatever piece it comes in."""
    names = [f"{seed} {step} {number} {first + row}" for row in range(rows)]
    if sequences > 1:
        names = [f"{name} {sequence}" for name in names for sequence in range(sequences)]
    return np.array([zlib.crc32(name.encode()) for name in names], np.uint32).view(np.int32)


def _total(parts: Sequence[Array]) -> Array:
    return functools.reduce(lambda total, part: total + part, parts)


def _compute(xp: Backend, settings: Settings, name: str, x: Array) -> Array:
    """A parameter as the forward pass gets it; an adapter's stay in float32, its layers cast what they may."""
    dtype = settings.compute_dtype
    return x if dtype is None or lora.MARK in name else leaves.cast(xp, x, dtype)


def _add_gradients(
    xp: Backend, skeleton: Module, objective: Objective, settings: Settings, scaled: bool, trainable: Params,
    frozen: Params, batch: Mapping[str, Array], sums: Params, scale: Array,
) -> Params:  # fmt: skip
    # A loss scale is meant for means: as sums, gradients of float16 overflow.
    count = objective.most(batch) if scaled else 1.0

    def summed(trainable: Params) -> tuple[Array, dict[str, Array]]:
        params = frozen | {name: _compute(xp, settings, name, x) for name, x in trainable.items()}
        forward = xp.for_training(batch.get("dropout_keys"), settings.remat)
        value, found = objective.loss(
            xp, forward, skeleton, params, batch, frozenset(trainable), settings.loss
        )  # fmt: skip
        return value * (scale / count), found

    (_, found), gradients = xp.value_and_grad(summed)(trainable)
    found |= {f"gradient/{name}": xp.cast(x, "float32") * count for name, x in gradients.items()}
    return {name: xp.add_into(total, found[name]) for name, total in sums.items()}


def _add_losses(
    xp: Backend, skeleton: Module, objective: Objective, settings: Settings, params: Params,
    batch: Mapping[str, Array], sums: Params,
) -> Params:  # fmt: skip
    params = {name: _compute(xp, settings, name, x) for name, x in params.items()}
    _, found = objective.loss(xp, xp, skeleton, params, batch, None, settings.loss)
    return {name: sums[name] + x for name, x in found.items()}


def _add_measured(
    xp: Backend, skeleton: Module, objective: Objective, settings: Settings, params: Params,
    batch: Mapping[str, Array], sums: Params,
) -> Params:  # fmt: skip
    params = {name: _compute(xp, settings, name, x) for name, x in params.items()}
    found = objective.measure(xp, skeleton, params, batch)
    return {name: total + xp.stop_gradient(found[name]) for name, total in sums.items()}


def _update(
    xp: Backend, settings: Settings, names: tuple[str, ...], scaling: optim.LossScale | None, trainable: Params,
    state: Params, sums: Params, count: Array, learning_rate: Array, step: Array,
) -> tuple[Params, Params, dict[str, Array]]:  # fmt: skip
    gradients = {name: sums[f"gradient/{name}"] / count for name in trainable}
    if scaling:
        kept = {name: state[f"loss_scale/{name}"] for name in ("scale", "good_steps")}
        gradients = scaling.unscale(xp, gradients, kept)
        step = state["loss_scale/steps"] + 1
    norm = optim.global_norm(xp, gradients)
    finite = norm < float("inf")
    if settings.clip_norm is not None:
        gradients = optim.clip(xp, gradients, norm, settings.clip_norm)
    ours = {name: x for name, x in state.items() if not name.startswith("loss_scale/")}
    trainable, ours = settings.optimizer.update(xp, gradients, ours, trainable, learning_rate, step, finite)
    if scaling:
        ours |= {f"loss_scale/{name}": x for name, x in scaling.update(xp, kept, finite).items()}
        ours["loss_scale/steps"] = xp.where(finite, step, step - 1)
    found = {name: sums[name] / count for name in names} | {"grad_norm": norm}
    return trainable, ours, found
