"""What is learnt: the parts of a training step that depend on the kind of data.

An objective turns a user's batch into the arrays of the compiled programs and says what their loss is. The engine cuts,
adds up, divides and updates, whatever the objective; what it has to know for that, the objective declares.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from modelhub.core import head, lora, problems
from modelhub.core.backends.base import Array, Backend
from modelhub.core.head import Loss
from modelhub.core.leaves import dtype_of
from modelhub.core.tree import Module, Params, bind
from modelhub.errors import ConfigError, DataError, InputError
from modelhub.training import fields
from modelhub.training.fields import Field
from modelhub.training.ready_batches import NO_LABEL

Batch = Mapping[str, np.ndarray]

# Tokens in one piece on a processor: more do not make its products faster, only the memory larger. Narrow models take
# more of them: tokens times width.
_CPU_TOKENS, _CPU_SIZE = 512, 2**19
_CPU_PATCHES = 2048  # where weights are wide and rows long, pieces of a few images would add up gradients too often


Over = Literal["window", "batch"]  # all batches of an optimizer step together, or each for itself


class Objective:
    """What the engine has to know about a loss. Losses are sums, which are divided once, by the count of their units.

    unit: what losses are means over, as the logs call it. sums: the names of what is added up, "loss" first.
    fields: the arrays of a batch, by name.

    sequences: how many sequences of the model's a row is, where it holds several.
    group: rows that belong together, such as a pair or the samples of one prompt: so many rows, one after the other,
        are never cut apart. None: the loss of a row depends on all rows of its batch.
    across: names of what `loss` takes from all rows of the batch, wherever they are computed, through
        `forward.all_rows`, such as the embeddings that are its negatives.
    counted: totals that the loss of every piece is told beforehand, for terms that are divided by another number than
        the count; `count` finds them. "window": accumulation makes no difference; "batch": the definition is that of
        one batch.
    measured: totals that take the model, such as an estimate of a KL divergence; `measure` adds them up, without
        gradients or dropout, before the first loss is computed.
    Each total is in the batch that `loss` gets as a float32 scalar, "total/NAME".
    """

    unit: Any
    sums: Any
    fields: ClassVar[Mapping[str, Field]]
    sequences: Any = 1
    group: Any = 1
    across: Any = ()
    counted: Any = {}
    measured: Any = {}

    def shape(self, batch: Batch) -> tuple[int, int]:
        """How many rows a batch has, and how many positions a row goes through the model with."""
        raise NotImplementedError

    def check(self, batch: Batch) -> None:
        """Raise DataError for values that some backends would take for something else, without a word."""

    def rows_at_once(self, positions: int) -> int:
        """How many rows of that many positions go through the model together on a processor."""
        return 1

    def piece(self, batch: Batch, first: int, rows: int) -> tuple[dict[str, np.ndarray], float]:
        """`rows` rows from `first` on, also where the batch has fewer, as the programs get them; and their count."""
        raise NotImplementedError

    def size(self, batch: Batch) -> int:
        """How many units there are to compute, those without a loss included."""
        raise NotImplementedError

    def count(self, batch: Batch) -> Mapping[str, float]:
        """What a batch adds to each of the totals in `counted`."""
        return {}

    def measure(self, xp: Backend, skeleton: Module, params: Params, batch: Mapping[str, Array]) -> Params:
        """What a piece adds to each of the totals in `measured`: float32 scalars."""
        return {}

    def loss(
        self, xp: Backend, forward: Backend, skeleton: Module, params: Params, batch: Mapping[str, Array],
        trainable: frozenset[str] | None, own: Loss | None,
    ) -> tuple[Array | None, Params]:  # fmt: skip
        """What to differentiate by the parameters in `trainable` (None: nothing), and the sums.

        forward: xp as the model gets it; see Backend.for_training. own: the user's loss.
        """
        raise NotImplementedError

    def most(self, batch: Mapping[str, Array]) -> float:
        """The largest count that a piece of this shape can have."""
        raise NotImplementedError

    def activations(self, rows: int, positions: int, item: int, remat: bool) -> int:
        """Bytes that `rows` rows need until the backward pass, `item` of them a number: a rough count."""
        raise NotImplementedError


# --- text -------------------------------------------------------------------------------------------------------------


_IDS = {"rows time": "int32"}


@dataclass(frozen=True)
class TextObjective(Objective):
    """The next token, by a vocabulary head that is done in pieces; batches are those of modelhub.training.batches."""

    config: Any
    unit = "tokens"
    sums = ("loss", "accuracy")
    fields: ClassVar[Mapping[str, Field]] = {
        "input_ids": Field(_IDS), "labels": Field(_IDS, NO_LABEL), "position_ids": Field(_IDS),
        "segment_ids": Field(_IDS),
    }  # fmt: skip

    def shape(self, batch: Batch) -> tuple[int, int]:
        rows, time = batch["input_ids"].shape
        return rows, time

    def check(self, batch: Batch) -> None:
        config = self.config
        largest = int(max(batch["input_ids"].max(), batch["labels"].max()))
        if largest >= config.vocab_size:
            raise DataError(
                f"token id {largest} is outside the vocabulary: 0 to {config.vocab_size - 1}; were the batches made "
                f"with another model's tokenizer?"
            )
        if (length := int(batch["position_ids"].max()) + 1) > config.max_position_embeddings:
            raise DataError(
                f"an example has {length} tokens and the model's context holds {config.max_position_embeddings}: cut it"
            )

    def rows_at_once(self, positions: int) -> int:
        return max(1, max(_CPU_TOKENS, _CPU_SIZE // self.config.hidden_size) // positions)

    def piece(self, batch: Batch, first: int, rows: int) -> tuple[dict[str, np.ndarray], float]:
        arrays = with_places(fields.cut(self.fields, batch, first, rows))
        return arrays, int(arrays["count"])

    def size(self, batch: Batch) -> int:
        return int((batch["segment_ids"] > 0).sum())

    def loss(
        self, xp: Backend, forward: Backend, skeleton: Module, params: Params, batch: Mapping[str, Array],
        trainable: frozenset[str] | None, own: Loss | None,
    ) -> tuple[Array | None, Params]:  # fmt: skip
        model: Any = bind(skeleton, params)
        hidden = model.model(
            forward, batch["input_ids"], positions=batch["position_ids"], segments=batch["segment_ids"]
        )
        hidden = xp.reshape(hidden, (-1, hidden.shape[-1]))  # B * T, D
        found, gradients = head.loss_and_gradients(
            xp, skeleton, params, hidden, batch, trainable or frozenset(), own, gradients=trainable is not None,
            dropout_keys=_of_positions(forward, batch["input_ids"]),
        )  # fmt: skip
        sums = {"loss": found["loss"], "accuracy": found["correct"]}
        return None if trainable is None else head.surrogate(xp, params | {"hidden": hidden}, gradients), sums

    def most(self, batch: Mapping[str, Array]) -> float:
        return float(batch["places"].shape[0])

    def activations(self, rows: int, positions: int, item: int, remat: bool) -> int:
        config, time = self.config, positions
        width, heads = config.hidden_size, config.num_attention_heads
        block = (12 * width + 6 * config.intermediate_size + 8 * heads * config.head_dim) * item + 3 * heads * time * 4
        layers = config.num_hidden_layers
        kept = block + layers * width * item if remat else layers * block
        return rows * time * kept + min(head.ROWS, rows * time) * config.vocab_size * 4


def _of_positions(forward: Backend, ids: Array) -> Array | None:
    """(B * T,) int32: dropout keys of positions, made of those of their rows; None where nothing is dropped."""
    keys = forward.dropout_keys
    if keys is None:
        return None
    rows, time = ids.shape
    keys = forward.reshape(keys() if callable(keys) else keys, (rows, 1))
    places = forward.arange(time) * -1640531527  # 2**32 by the golden ratio: neighbours are far apart
    return forward.reshape(keys ^ forward.reshape(places, (1, time)), (rows * time,))


def with_places(batch: Batch) -> dict[str, np.ndarray]:
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


# --- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageObjective(Objective):
    """The class of an image; batches are those of modelhub.training.images.

    The config's problem_type decides what labels, loss and metrics are: see core/problems.py, also for label_smoothing
    and for metrics; None: the problem's own.
    frozen: only the head is trained, on what the encoder gives outside of training.
    """

    config: Any
    label_smoothing: float = 0.0
    metrics: tuple[str, ...] | None = None
    frozen: bool = False
    unit = "images"
    fields: ClassVar[Mapping[str, Field]] = {
        "pixels": Field({"rows channels height width": "float32"}, required=False),
        "pooled": Field({"rows features": "float32"}, required=False),
        "labels": Field({"rows": "int32", "rows classes": "float32"}),
        "weights": Field({"rows": "float32"}),
    }

    def __post_init__(self) -> None:
        if not isinstance(self.label_smoothing, int | float) or not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing!r}")
        if self.label_smoothing and self.problem == problems.REGRESSION:
            raise ConfigError("label_smoothing is for classes; numbers (regression) have none to spread a label over")
        problems.check_metrics(self.sums[1:], self.problem)

    @property
    def problem(self) -> str:
        return problems.problem_of(self.config)

    @functools.cached_property
    def sums(self) -> tuple[str, ...]:
        metrics = problems.METRICS[self.problem] if self.metrics is None else self.metrics
        return "loss", *dict.fromkeys(metrics)

    def shape(self, batch: Batch) -> tuple[int, int]:
        if "pooled" in batch:
            return len(batch["pooled"]), 1
        (rows, _, height, width), (high, wide) = batch["pixels"].shape, self.config.patch
        return rows, max(1, height // high) * max(1, width // wide) + self.config.tokens_before

    def check(self, batch: Batch) -> None:
        problems.check_labels(batch["labels"][batch["weights"] > 0], self.config.num_labels, self.problem)

    def rows_at_once(self, positions: int) -> int:
        return max(1, _CPU_PATCHES // positions)

    def piece(self, batch: Batch, first: int, rows: int) -> tuple[dict[str, np.ndarray], float]:
        arrays = fields.cut(self.fields, batch, first, rows)
        return arrays, int((arrays["weights"] > 0).sum())

    def size(self, batch: Batch) -> int:
        return int((batch["weights"] > 0).sum())

    def loss(
        self, xp: Backend, forward: Backend, skeleton: Module, params: Params, batch: Mapping[str, Array],
        trainable: frozenset[str] | None, own: Loss | None,
    ) -> tuple[Array | None, Params]:  # fmt: skip
        model: Any = bind(skeleton, params)
        dtype = compute_dtype(params)
        if "pooled" in batch:
            pooled = xp.cast(batch["pooled"], dtype)
        else:
            encoder = xp if self.frozen else forward
            pooled = model.pooled(encoder, model.encode(encoder, xp.cast(batch["pixels"], dtype)))
        logits, labels, weights = model.head(forward, pooled), batch["labels"], batch["weights"]  # B, classes
        if own is not None:
            losses = own(logits, labels)
            if tuple(losses.shape) != tuple(weights.shape):
                raise InputError(
                    f"loss(logits, labels) must return one loss for each image, shape {tuple(weights.shape)}; it "
                    f'returned shape {tuple(losses.shape)}. Leave out the mean or sum (reduction="none")'
                )
        else:
            losses = problems.losses(xp, logits, labels, self.problem, self.label_smoothing)
        value = xp.sum(losses * weights)
        logits = xp.stop_gradient(logits)
        sums = {"loss": xp.stop_gradient(value)}
        for metric in self.sums[1:]:
            sums[metric] = xp.sum(problems.measured(xp, logits, labels, metric, self.problem) * weights)
        return None if trainable is None else value, sums

    def most(self, batch: Mapping[str, Array]) -> float:
        return float(batch["weights"].shape[0])

    def activations(self, rows: int, positions: int, item: int, remat: bool) -> int:
        config = self.config
        if self.frozen:
            return rows * positions * (8 * config.hidden_size + 2 * config.intermediate_size) * item
        block = (12 * config.hidden_size + 4 * config.intermediate_size) * item
        block += 3 * config.num_attention_heads * positions * 4
        layers = config.num_hidden_layers
        return rows * positions * (block + layers * config.hidden_size * item if remat else layers * block)


def compute_dtype(params: Mapping[str, Array]) -> str:
    """The dtype of the model's own parameters: an adapter's stay in float32."""
    return dtype_of(next(x for name, x in params.items() if lora.MARK not in name))
