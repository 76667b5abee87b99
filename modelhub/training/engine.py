"""One training step: sums of losses and gradients over pieces of a batch, then one update.

Losses and gradients are sums over positions; the division by their number comes once, in the update. So it makes no
difference into how many pieces a batch is cut, and accumulation over batches does not change the loss.
"""

import functools
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelhub.core import head, lora, optim
from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Module, Params, bind
from modelhub.errors import DataError
from modelhub.training.batches import NO_LABEL

Batch = Mapping[str, np.ndarray]

# Tokens in one piece on a processor: more do not make its products faster, only the memory larger. Narrow models take
# more of them: tokens times width.
_CPU_TOKENS, _CPU_SIZE = 512, 2**19


@dataclass(frozen=True)
class Settings:
    """How to train; see CausalLM.compile. compute_dtype: what the forward pass is computed in, None: the model's."""

    optimizer: Any = field(default_factory=lambda: optim.AdamW(5e-5))
    clip_norm: float | None = None
    loss: head.Loss | None = None
    compute_dtype: str | None = None
    matmul_precision: str | None = None
    remat: bool = False
    dropout: bool = False
    seed: int = 0
    jit: bool | None = None


class Engine:
    """The compiled programs of a training run and its state: trainable parameters and what the optimizer remembers.

    params: all of the model's; trainable: the names of those to train, which are copied. The others are only read.
    """

    def __init__(self, xp: Backend, skeleton: Module, params: Params, trainable: Iterable[str], settings: Settings):
        self.xp, self.settings = xp, settings
        names = frozenset(trainable)
        self._config: Any = skeleton.model.config  # type: ignore[attr-defined]
        self._dtype = settings.compute_dtype or xp.dtype(params[head.head_names(skeleton)[0]])
        self.frozen = {name: _compute(xp, settings, name, x) for name, x in params.items() if name not in names}
        self.trainable = {name: xp.copy(x) for name, x in params.items() if name in names}
        self.state: Params = settings.optimizer.init(xp, self.trainable)
        self.scaling = optim.LossScale() if self._dtype == "float16" else None
        if self.scaling:
            self.state |= {f"loss_scale/{key}": x for key, x in self.scaling.init(xp).items()}
            self.state["loss_scale/steps"] = xp.array(0)  # those that were not left out
        compiled = functools.partial(xp.compile, training=True, jit=settings.jit)
        gradients = functools.partial(_add_gradients, xp, skeleton, settings, self.scaling is not None)
        self._gradients = compiled(gradients, donate=(3,))
        self._update = compiled(functools.partial(_update, xp, settings, self.scaling), donate=(1, 2))
        self._losses = compiled(functools.partial(_add_losses, xp, skeleton, settings), donate=(2,))

    @property
    def params(self) -> Params:
        """Frozen and trainable in one dict."""
        return self.frozen | self.trainable

    def train(self, batches: Iterable[Batch], step: int, learning_rate: float) -> dict[str, float]:
        """One step, counted from 1, on all the batches together: loss and accuracy per position, grad_norm, tokens.

        A step whose gradients are not finite changes nothing; its grad_norm says so.
        """
        xp = self.xp
        with xp.matmul_precision(self.settings.matmul_precision):
            sums = {"loss": xp.zeros(()), "correct": xp.zeros(())}
            sums |= {f"gradient/{name}": xp.zeros(x.shape) for name, x in self.trainable.items()}
            scale = self.state.get("loss_scale/scale", xp.array(1.0))
            tokens = 0
            for piece, count in self._pieces(batches, step):
                sums = self._gradients(self.trainable, self.frozen, piece, sums, scale)
                tokens += count
            if not tokens:
                return {"loss": 0.0, "accuracy": 0.0, "grad_norm": 0.0, "tokens": 0.0}
            numbers = xp.array(float(tokens)), xp.array(learning_rate, "float32"), xp.array(step, "int32")
            self.trainable, self.state, found = self._update(self.trainable, self.state, sums, *numbers)
        return {name: float(xp.get(x)) for name, x in found.items()} | {"tokens": float(tokens)}

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """loss and accuracy per position, and their number: tokens."""
        xp = self.xp
        with xp.matmul_precision(self.settings.matmul_precision):
            sums = {"loss": xp.zeros(()), "correct": xp.zeros(())}
            tokens = 0
            for piece, count in self._pieces(batches, None):
                sums = self._losses(self.params, piece, sums)
                tokens += count
        return {
            "loss": float(xp.get(sums["loss"])) / max(tokens, 1),
            "accuracy": float(xp.get(sums["correct"])) / max(tokens, 1),
            "tokens": float(tokens),
        }

    def memory(self, rows: int, time: int) -> int:
        """Bytes that a step of that many rows needs beside the weights: a rough count for decoder blocks."""
        config = self._config
        item = 4 if self._dtype == "float32" else 2
        trained = sum(4 * int(np.prod(x.shape)) for x in self.trainable.values())
        slots = sum(4 * int(np.prod(x.shape)) for x in self.state.values())
        positions = self._at_once(rows, time) * time
        width, heads = config.hidden_size, config.num_attention_heads
        block = (12 * width + 6 * config.intermediate_size + 8 * heads * config.head_dim) * item + 3 * heads * time * 4
        layers = config.num_hidden_layers
        kept = block + layers * width * item if self.settings.remat else layers * block
        logits = min(head.ROWS, positions) * config.vocab_size * 4
        return 3 * trained + slots + positions * kept + logits

    def _at_once(self, rows: int, time: int) -> int:
        """How many rows go through the model together."""
        if self.xp.device != "cpu":
            return rows
        return min(rows, max(1, max(_CPU_TOKENS, _CPU_SIZE // self._config.hidden_size) // time))

    def _pieces(self, batches: Iterable[Batch], step: int | None) -> Iterator[tuple[dict[str, Array], int]]:
        for number, batch in enumerate(batches):
            rows, time = batch["input_ids"].shape
            _check(batch, self._config)
            at_once = self._at_once(rows, time)
            for first in range(0, rows, at_once):
                piece = {name: _part(batch[name], first, at_once, fill) for name, fill in _ARRAYS.items()}
                arrays = _with_places(piece)
                if not (count := int(arrays["count"])):
                    continue
                if self.settings.dropout and step is not None:
                    arrays["dropout_keys"] = _keys(self.settings.seed, step, number, first, at_once)
                yield {name: self.xp.array(x, "int32") for name, x in arrays.items()}, count


_ARRAYS = {"input_ids": 0, "labels": NO_LABEL, "position_ids": 0, "segment_ids": 0}  # and what fills missing rows


def _check(batch: Batch, config: Any) -> None:
    """Raise DataError for what some backends would take for something else, without a word."""
    largest = int(max(batch["input_ids"].max(), batch["labels"].max()))
    if largest >= config.vocab_size:
        raise DataError(
            f"token id {largest} is outside the vocabulary: 0 to {config.vocab_size - 1}; were the batches made with "
            f"another model's tokenizer?"
        )
    if (length := int(batch["position_ids"].max()) + 1) > config.max_position_embeddings:
        raise DataError(
            f"an example has {length} tokens and the model's context holds {config.max_position_embeddings}: cut it"
        )


def _part(array: np.ndarray, first: int, rows: int, fill: int) -> np.ndarray:
    """`rows` rows from `first` on, also where the batch has fewer: shapes stay the same."""
    part = array[first : first + rows]
    return np.pad(part, ((0, rows - len(part)), (0, 0)), constant_values=fill) if len(part) < rows else part


def _with_places(batch: Batch) -> dict[str, np.ndarray]:
    """The batch as the programs get it: which positions have loss, and the labels there.

    A position predicts the label of the next one, if that belongs to the same example.
    """
    labels, segments = batch["labels"], batch["segment_ids"]
    targets = np.full_like(labels, NO_LABEL)
    targets[:, :-1] = np.where(segments[:, 1:] == segments[:, :-1], labels[:, 1:], NO_LABEL)
    targets = targets.reshape(-1)
    places = np.flatnonzero(targets != NO_LABEL)
    room = -(-len(targets) // head.ROWS) * head.ROWS if len(targets) > head.ROWS else len(targets)
    padded = np.zeros((2, room), np.int32)
    padded[0, : len(places)], padded[1, : len(places)] = places, targets[places]
    return {
        "input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "segment_ids": segments,
        "places": padded[0], "labels": padded[1], "count": np.int32(len(places)),
    }  # fmt: skip


def _keys(seed: int, step: int, number: int, first: int, rows: int) -> np.ndarray:
    """(rows,) int32: the same for a row whatever piece it comes in."""
    found = [zlib.crc32(f"{seed} {step} {number} {first + row}".encode()) for row in range(rows)]
    return np.array(found, np.uint32).view(np.int32)


def _compute(xp: Backend, settings: Settings, name: str, x: Array) -> Array:
    """A parameter as the forward pass gets it; an adapter's stay in float32, its layers cast what they may."""
    dtype = settings.compute_dtype
    return x if dtype is None or lora.MARK in name else xp.cast(x, dtype)


def _hidden(xp: Backend, skeleton: Module, params: Params, batch: Mapping[str, Array]) -> Array:
    """(B * T, D)"""
    model: Any = bind(skeleton, params)
    hidden = model.model(xp, batch["input_ids"], positions=batch["position_ids"], segments=batch["segment_ids"])
    return xp.reshape(hidden, (-1, hidden.shape[-1]))


def _add_gradients(
    xp: Backend, skeleton: Module, settings: Settings, scaled: bool, trainable: Params, frozen: Params,
    batch: Mapping[str, Array], sums: Params, scale: Array,
) -> Params:  # fmt: skip
    # A loss scale is meant for means: as sums, gradients of float16 overflow.
    positions = float(batch["places"].shape[0]) if scaled else 1.0

    def summed(trainable: Params) -> tuple[Array, dict[str, Array]]:
        params = frozen | {name: _compute(xp, settings, name, x) for name, x in trainable.items()}
        forward = xp.for_training(batch.get("dropout_keys"), settings.remat)
        hidden = _hidden(forward, skeleton, params, batch)
        found, gradients = head.loss_and_gradients(
            xp, skeleton, params, hidden, batch, frozenset(trainable), settings.loss
        )
        return head.surrogate(xp, params | {"hidden": hidden}, gradients) * (scale / positions), found

    (_, found), gradients = xp.value_and_grad(summed)(trainable)
    found |= {f"gradient/{name}": xp.cast(x, "float32") * positions for name, x in gradients.items()}
    return {name: xp.add_into(total, found[name]) for name, total in sums.items()}


def _add_losses(
    xp: Backend, skeleton: Module, settings: Settings, params: Params, batch: Mapping[str, Array], sums: Params
) -> Params:
    params = {name: _compute(xp, settings, name, x) for name, x in params.items()}
    hidden = _hidden(xp, skeleton, params, batch)
    found, _ = head.loss_and_gradients(xp, skeleton, params, hidden, batch, frozenset(), settings.loss, gradients=False)
    return {name: sums[name] + x for name, x in found.items()}


def _update(
    xp: Backend, settings: Settings, scaling: optim.LossScale | None, trainable: Params, state: Params, sums: Params,
    tokens: Array, learning_rate: Array, step: Array,
) -> tuple[Params, Params, dict[str, Array]]:  # fmt: skip
    gradients = {name: sums[f"gradient/{name}"] / tokens for name in trainable}
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
    found = {"loss": sums["loss"] / tokens, "accuracy": sums["correct"] / tokens, "grad_norm": norm}
    return trainable, ours, found
