"""The loss of a vocabulary head and its gradients, without the (tokens, vocabulary) logits ever being there.

Only positions with loss reach the head, ROWS at a time, and the vocabulary comes in blocks. The logits of one piece are
kept between the pass that finds the largest and the one that multiplies the probabilities back: two products per piece,
where recomputing would take three. Gradients come out of the forward pass; `surrogate` hands them to the backward pass.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from modelhub.core.backends.base import Array, Backend
from modelhub.core.nn import Linear
from modelhub.core.tree import Module, Params, bind, flatten
from modelhub.errors import InputError

ROWS = 256  # positions at a time; (ROWS, vocabulary) float32 logits are in memory
BLOCK = 8192  # of the vocabulary

Loss = Callable[[Array, Array], Array]  # (logits (N, V) float32, labels (N,)) -> losses (N,)


def head_names(skeleton: Any) -> list[str]:
    """Which parameters the head consists of, those of an adapter included."""
    return ["model.embed_tokens.weight"] if skeleton.lm_head is None else list(flatten(skeleton.lm_head, "lm_head"))


def loss_and_gradients(
    xp: Backend, skeleton: Module, params: Params, hidden: Array, batch: Mapping[str, Array], trainable: frozenset[str],
    loss: Loss | None = None, gradients: bool = True,
) -> tuple[dict[str, Array], dict[str, Array]]:  # fmt: skip
    """The sum of losses and the number of correct positions; and the gradients of that sum.

    hidden (N, D); batch: places (M,) int32, which of the N positions have loss, M a multiple of ROWS or below it; their
    labels (M,); count (), how many of the M are meant. trainable: names of parameters; those of the head among them get
    gradients too. loss: the user's own, in place of cross entropy.

    Gradients: {"hidden": (N, D) float32, parameter name: its shape, float32}; nothing here is differentiable.
    """
    wanted = [name for name in head_names(skeleton) if name in trainable] if gradients else []
    params = {name: xp.stop_gradient(array) for name, array in params.items()}
    model: Any = bind(skeleton, params)
    hidden = xp.stop_gradient(hidden)
    rows = min(ROWS, batch["places"].shape[0])
    plain = loss is None and (model.lm_head is None or _is_plain(model.lm_head))

    def piece(i: Array, state: dict[str, Array]) -> dict[str, Array]:
        places = xp.slice_rows(batch["places"], i * rows, rows)
        labels = xp.slice_rows(batch["labels"], i * rows, rows)
        valid = xp.cast(i * rows + xp.arange(rows) < batch["count"], "float32")
        h = xp.take(hidden, places)
        if plain:
            value, correct, found = _cross_entropy(xp, model, h, labels, valid, gradients, bool(wanted))
        else:
            value, correct, found = _any_loss(xp, skeleton, params, h, labels, valid, loss, gradients, wanted)
        state = dict(state)
        state["loss"], state["correct"] = state["loss"] + value, state["correct"] + correct
        if gradients:
            state["hidden"] = xp.add_rows(state["hidden"], places, found["hidden"])
        for name in wanted:
            state[name] = xp.add_into(state[name], found["weight" if plain else name])
        return state

    state = {"loss": xp.zeros(()), "correct": xp.zeros(())}
    if gradients:
        state |= {"hidden": xp.zeros(hidden.shape)} | {name: xp.zeros(params[name].shape) for name in wanted}
    state = xp.loop((batch["count"] + (rows - 1)) // rows, piece, state)
    return {name: state.pop(name) for name in ("loss", "correct")}, state


def _is_plain(head: Any) -> bool:
    """Whether it is one product, and nothing of the user's own."""
    return type(head) is Linear and head.bias is None and head.lora is None


def surrogate(xp: Backend, values: Mapping[str, Array], gradients: Mapping[str, Array]) -> Array:
    """A scalar whose gradients by `values` are `gradients`: their inner product."""
    total = xp.zeros(())
    for name, gradient in gradients.items():
        total = total + xp.sum(xp.cast(values[name], "float32") * xp.stop_gradient(gradient))
    return total


def _blocks(vocabulary: int) -> tuple[int, int]:
    """Number and size of equal blocks; what is left of the vocabulary after them is less than one more."""
    least = math.ceil(vocabulary / BLOCK)
    n = next((n for n in range(least, 2 * least) if vocabulary % n == 0), least)
    return n, vocabulary // n


def _cross_entropy(
    xp: Backend, model: Any, h: Array, labels: Array, valid: Array, gradients: bool, of_weight: bool
) -> tuple[Array, Array, dict[str, Array]]:
    """Sum of losses, number of correct positions, gradients by hidden states (R, D) and weight (V, D)."""
    weight, cap = model.head_weight, model.softcap
    dtype, rows = xp.dtype(weight), h.shape[0]
    n, size = _blocks(weight.shape[0])
    done, rest = n * size, weight.shape[0] - n * size

    def logits(state: tuple[Array, Array], first: Array, width: int) -> tuple[tuple[Array, Array], Array]:
        peak, own = state
        z = xp.cast(xp.linear(h, xp.slice_rows(weight, first, width)), "float32")
        if cap:
            z = xp.tanh(z / cap) * cap
        place = labels - first
        inside = (place >= 0) & (place < width)
        here = xp.take_along_axis(z, xp.expand_dims(xp.minimum(xp.maximum(place, 0), width - 1), 1), 1)
        return (xp.maximum(peak, xp.max(z, axis=1, keepdims=True)), xp.where(xp.expand_dims(inside, 1), here, own)), z

    state = xp.full((rows, 1), -1e30), xp.zeros((rows, 1))
    state, zs = xp.scan(lambda state, j, _: logits(state, j * size, size), state, n)
    if rest:
        state, z_rest = logits(state, done, rest)
    peak, own = state

    def slope(z: Array) -> Array | float:
        return 1.0 - (z / cap) * (z / cap) if cap else 1.0

    def back(state: tuple[Array, Array], first: Array, width: int, z: Array) -> tuple[Array, Array]:
        total, dh = state
        e = xp.exp(z - peak)
        total = total + xp.sum(e, axis=1, keepdims=True)
        if not gradients:
            return total, dh
        e = xp.cast(e * slope(z) if cap else e, dtype)
        part = xp.matmul(e, xp.slice_rows(weight, first, width))
        return total, xp.add_into(dh, xp.cast(part, "float32"))

    sums = xp.zeros((rows, 1)), xp.zeros(h.shape)
    sums, _ = xp.scan(lambda state, j, z: (back(state, j * size, size, z), None), sums, n, zs)
    if rest:
        sums = back(sums, done, rest, z_rest)
    total, dh = sums
    valid = xp.expand_dims(valid, 1)
    loss = xp.sum((peak + xp.log(total) - own) * valid)
    correct = xp.sum(xp.cast(own >= peak, "float32") * valid)
    if not gradients:
        return loss, correct, {}
    own_slope = valid * slope(own)
    found = {"hidden": dh * (valid / total) - xp.cast(xp.take(weight, labels), "float32") * own_slope}
    if of_weight:
        scaled = xp.cast(xp.cast(h, "float32") * (valid / total), dtype)

        def of_block(z: Array) -> Array:
            e = xp.cast(xp.exp(z - peak) * slope(z), dtype)
            return xp.cast(xp.matmul(xp.transpose(e, (1, 0)), scaled), "float32")

        _, parts = xp.scan(lambda state, _, z: (state, of_block(z)), xp.zeros(()), n, zs)
        dw = xp.joined(parts)
        if rest:
            dw = xp.concat([dw, of_block(z_rest)])
        found["weight"] = xp.add_rows(dw, labels, -xp.cast(h, "float32") * own_slope)
    return loss, correct, found


def _any_loss(
    xp: Backend, skeleton: Module, params: Params, h: Array, labels: Array, valid: Array, loss: Loss | None,
    gradients: bool, wanted: list[str],
) -> tuple[Array, Array, dict[str, Array]]:  # fmt: skip
    """As _cross_entropy, by automatic differentiation of the piece: a loss of the user's, or a head with an adapter."""

    def summed(variables: Params) -> tuple[Array, Array]:
        model: Any = bind(skeleton, params | variables)
        logits = model.logits(xp, variables["hidden"])
        own = xp.take_along_axis(logits, xp.expand_dims(labels, 1), 1)
        correct = xp.sum(xp.cast(own >= xp.max(logits, axis=1, keepdims=True), "float32")[:, 0] * valid)
        losses = loss(logits, labels) if loss else xp.logsumexp(logits, axis=1) - own[:, 0]
        if tuple(losses.shape) != tuple(labels.shape):
            raise InputError(
                f"loss(logits, labels) must return one loss for each of the labels, shape {tuple(labels.shape)}; it "
                f'returned shape {tuple(losses.shape)}. Leave out the mean or sum (reduction="none")'
            )
        return xp.sum(losses * valid), correct

    variables = {"hidden": h} | {name: params[name] for name in wanted}
    if not gradients:
        value, correct = summed(variables)
        return value, correct, {}
    (value, correct), found = xp.value_and_grad(summed)(variables)
    return value, correct, {name: xp.cast(gradient, "float32") for name, gradient in found.items()}
