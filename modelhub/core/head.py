"""The loss of a vocabulary head and its gradients, without the (tokens, vocabulary) logits ever being there.

Only positions with loss reach the head, ROWS at a time, and the vocabulary comes in blocks. The logits of one piece are
kept between the pass that finds the largest and the one that multiplies the probabilities back: two products per piece,
where recomputing would take three. Gradients come out of the forward pass; `surrogate` hands them to the backward pass.

Losses that need the log-probabilities of all tokens before they can say what each of them weighs (preferences,
rewards) go through `through_logprobs`: each token's own gradient is kept and scaled afterwards, so that a frozen head
still takes two products; the weights of a trained one take a second pass.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from modelhub.core.backends.base import Array, Backend
from modelhub.core.leaves import dtype_of, mapped
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
    loss: Loss | None = None, gradients: bool = True, dropout_keys: Array | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:  # fmt: skip
    """The sum of losses and the number of correct positions; and the gradients of that sum.

    hidden (N, D); batch: places (M,) int32, which of the N positions have loss, M a multiple of ROWS or below it; their
    labels (M,); count (), how many of the M are meant. trainable: names of parameters; those of the head among them get
    gradients too. loss: the user's own, in place of cross entropy. dropout_keys (N,): what a head that drops something
    draws from, see Backend.for_training.

    Gradients: {"hidden": (N, D) float32, parameter name: its shape, float32}; nothing here is differentiable.
    """
    wanted = [name for name in head_names(skeleton) if name in trainable] if gradients else []
    params = _constant(xp, skeleton, params)
    model: Any = bind(skeleton, params)
    hidden = xp.stop_gradient(hidden)
    rows = min(ROWS, batch["places"].shape[0])
    plain = loss is None and _is_plain(model)

    def piece(i: Array, state: dict[str, Array]) -> dict[str, Array]:
        places = xp.slice_rows(batch["places"], i * rows, rows)
        labels = xp.slice_rows(batch["labels"], i * rows, rows)
        valid = xp.cast(i * rows + xp.arange(rows) < batch["count"], "float32")
        h = xp.take(hidden, places)
        if plain:
            value, correct, found = _cross_entropy(xp, model, h, labels, valid, gradients, bool(wanted))
        else:
            forward = xp if dropout_keys is None else xp.for_training(xp.take(dropout_keys, places))
            value, correct, found = _any_loss(
                xp, forward, skeleton, params, h, labels, valid, loss, gradients, wanted
            )  # fmt: skip
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


def token_logprobs(
    xp: Backend, skeleton: Module, params: Params, hidden: Array, batch: Mapping[str, Array]
) -> Array:  # fmt: skip
    """(M,) float32: the log-probability of each label at its place, 0 beyond count; a constant.

    hidden, batch: as for `loss_and_gradients`.
    """
    return _pieces(xp, skeleton, _constant(xp, skeleton, params), xp.stop_gradient(hidden), batch)["logprobs"][:, 0]


def through_logprobs(
    xp: Backend, skeleton: Module, params: Params, hidden: Array, batch: Mapping[str, Array], trainable: frozenset[str],
    fn: Callable[[Array], tuple[Array, Any]], gradients: bool = True,
) -> tuple[Array, Any, dict[str, Array]]:  # fmt: skip
    """value, more = fn(log-probabilities), and the gradients of value.

    fn: any function of the (M,) log-probabilities that `token_logprobs` gives to a float32 scalar and more results; it
    is differentiated by them, and must leave out those beyond count, which are 0. The rest as for
    `loss_and_gradients`, whose gradients these equal where fn is minus their sum.
    """
    wanted = [name for name in head_names(skeleton) if name in trainable] if gradients else []
    params, hidden = _constant(xp, skeleton, params), xp.stop_gradient(hidden)
    found = _pieces(xp, skeleton, params, hidden, batch, gradients)
    logprobs = found["logprobs"][:, 0]
    if not gradients:
        return *fn(logprobs), {}
    (value, more), slopes = xp.value_and_grad(lambda variables: fn(variables["logprobs"]))({"logprobs": logprobs})
    meant = xp.arange(logprobs.shape[0]) < batch["count"]
    slopes = xp.expand_dims(xp.where(meant, slopes["logprobs"], xp.zeros(())), 1)
    by_name = {"hidden": xp.add_rows(xp.zeros(hidden.shape), batch["places"], found["units"] * slopes)}
    if wanted:
        by_name |= _of_weights(xp, skeleton, params, hidden, batch, wanted, slopes, found["logprobs"], found["totals"])
    return value, more, by_name


def _pieces(
    xp: Backend, skeleton: Module, params: Params, hidden: Array, batch: Mapping[str, Array], gradients: bool = False
) -> dict[str, Array]:
    """Per position with loss: logprobs (M, 1), and if asked for units (M, D), their gradients by the hidden states, and
    totals (M, 1), the logarithms of what the probabilities were divided by. Zeros beyond count."""
    model: Any = bind(skeleton, params)
    room = batch["places"].shape[0]
    rows = min(ROWS, room)

    def piece(i: Array, state: dict[str, Array]) -> dict[str, Array]:
        places = xp.slice_rows(batch["places"], i * rows, rows)
        labels = xp.slice_rows(batch["labels"], i * rows, rows)
        index = i * rows + xp.arange(rows)
        valid = xp.expand_dims(xp.cast(index < batch["count"], "float32"), 1)
        h = xp.take(hidden, places)
        if _is_plain(model):
            scores = _scores(xp, model, h, labels, gradients)
            found = {"logprobs": scores.logprob, "units": scores.unit, "totals": scores.peak + xp.log(scores.total)}
        else:
            found = _any_scores(xp, skeleton, params, h, labels, gradients)
        return {name: xp.add_rows(x, index, found[name] * valid) for name, x in state.items()}

    state = {"logprobs": xp.zeros((room, 1))}
    if gradients:
        state |= {"units": xp.zeros((room, hidden.shape[1])), "totals": xp.zeros((room, 1))}
    return xp.loop((batch["count"] + (rows - 1)) // rows, piece, state)


def _of_weights(
    xp: Backend, skeleton: Module, params: Params, hidden: Array, batch: Mapping[str, Array], wanted: list[str],
    slopes: Array, logprobs: Array, totals: Array,
) -> dict[str, Array]:  # fmt: skip
    """The gradients of the sum of slopes (M, 1) times log-probabilities by the head's own parameters."""
    model: Any = bind(skeleton, params)
    rows = min(ROWS, batch["places"].shape[0])

    def piece(i: Array, state: dict[str, Array]) -> dict[str, Array]:
        places, labels, slope, logprob, total = (
            xp.slice_rows(x, i * rows, rows) for x in (batch["places"], batch["labels"], slopes, logprobs, totals)
        )
        h = xp.take(hidden, places)
        if _is_plain(model):
            scores = _Scores(logprob, logprob + total, total, xp.full((rows, 1), 1.0))
            found = {wanted[0]: _of_weight(xp, model, h, labels, scores, -slope)}
        else:

            def summed(variables: Params) -> tuple[Array, None]:
                z, own = _all_logits(xp, bind(skeleton, params | variables), h, labels)
                return xp.sum((own - xp.logsumexp(z, axis=1, keepdims=True)) * slope), None

            _, found = xp.value_and_grad(summed)({name: params[name] for name in wanted})
        return {name: xp.add_into(x, xp.cast(found[name], "float32")) for name, x in state.items()}

    state = {name: xp.zeros(params[name].shape) for name in wanted}
    return xp.loop((batch["count"] + (rows - 1)) // rows, piece, state)


def _constant(xp: Backend, skeleton: Module, params: Params) -> Params:
    """The params, of which the head's are constants: nothing else is used here."""
    return params | {name: mapped(xp.stop_gradient, params[name]) for name in head_names(skeleton)}


def _is_plain(model: Any) -> bool:
    """Whether the head is one product, and nothing of the user's own."""
    head = model.lm_head
    return head is None or (type(head) is Linear and head.bias is None and head.lora is None)


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


@dataclass
class _Scores:
    """What a piece of R positions comes to; all (R, 1) float32 but unit.

    logprob: of the labels; own: their logits; peak: what the logits were compared with; total: the sum of exp(logits -
    peak); logits: as `scan` gave them, and those of what is left of the vocabulary; unit (R, D): the gradient of each
    logprob by its hidden states.
    """

    logprob: Array
    own: Array
    peak: Array
    total: Array
    logits: tuple[Any, Array | None] | None = None
    unit: Array | None = None


def _scores(xp: Backend, model: Any, h: Array, labels: Array, gradients: bool) -> _Scores:
    """h: hidden states (R, D); labels (R,)."""
    weight = model.head_weight
    dtype, rows = dtype_of(weight), h.shape[0]
    n, size = _blocks(weight.shape[0])
    done, rest = n * size, weight.shape[0] - n * size

    def logits(state: tuple[Array, Array], first: Array, width: int) -> tuple[tuple[Array, Array], Array]:
        peak, own = state
        z = _block(xp, model, h, first, width)
        place = labels - first
        inside = (place >= 0) & (place < width)
        here = xp.take_along_axis(z, xp.expand_dims(xp.minimum(xp.maximum(place, 0), width - 1), 1), 1)
        return (xp.maximum(peak, xp.max(z, axis=1, keepdims=True)), xp.where(xp.expand_dims(inside, 1), here, own)), z

    state = xp.full((rows, 1), -1e30), xp.zeros((rows, 1))
    state, zs = xp.scan(lambda state, j, _: logits(state, j * size, size), state, n)
    z_rest = None
    if rest:
        state, z_rest = logits(state, done, rest)
    peak, own = state

    def back(state: tuple[Array, Array], first: Array, width: int, z: Array) -> tuple[Array, Array]:
        total, dh = state
        e = xp.exp(z - peak)
        total = total + xp.sum(e, axis=1, keepdims=True)
        if not gradients:
            return total, dh
        e = xp.cast(_sloped(model, e, z), dtype)
        part = xp.matmul(e, xp.weight_rows(weight, first, width))
        return total, xp.add_into(dh, xp.cast(part, "float32"))

    sums = xp.zeros((rows, 1)), xp.zeros(h.shape)
    sums, _ = xp.scan(lambda state, j, z: (back(state, j * size, size, z), None), sums, n, zs)
    if rest:
        sums = back(sums, done, rest, z_rest)
    total, dh = sums
    found = _Scores(own - peak - xp.log(total), own, peak, total, (zs, z_rest))
    if gradients:
        found.unit = _sloped(model, xp.cast(xp.embedding(weight, labels), "float32"), own) - dh / total
    return found


def _block(xp: Backend, model: Any, h: Array, first: Array, width: int) -> Array:
    """Logits (R, width) float32 of a part of the vocabulary."""
    z = xp.cast(xp.linear(h, xp.weight_rows(model.head_weight, first, width)), "float32")
    return xp.tanh(z / model.softcap) * model.softcap if model.softcap else z


def _sloped(model: Any, x: Array, z: Array) -> Array:
    """x times the slope of the cap where it made z."""
    return x * (1.0 - (z / model.softcap) * (z / model.softcap)) if model.softcap else x


def _of_weight(xp: Backend, model: Any, h: Array, labels: Array, scores: _Scores, shares: Array) -> Array:
    """The gradient (V, D) float32 of minus the sum of shares (R, 1) times logprob by the weight."""
    vocabulary = model.head_weight.shape[0]
    n, size = _blocks(vocabulary)
    done, rest = n * size, vocabulary - n * size
    wide = xp.cast(h, "float32")
    scaled = xp.cast(wide * (shares / scores.total), dtype_of(model.head_weight))
    zs, z_rest = scores.logits or (None, None)

    def of_block(first: Array, width: int, z: Array | None) -> Array:
        z = _block(xp, model, h, first, width) if z is None else z
        e = xp.cast(_sloped(model, xp.exp(z - scores.peak), z), xp.dtype(scaled))
        return xp.cast(xp.matmul(xp.transpose(e, (1, 0)), scaled), "float32")

    _, parts = xp.scan(lambda state, j, z: (state, of_block(j * size, size, z)), xp.zeros(()), n, zs)
    dw = xp.joined(parts)
    if rest:
        dw = xp.concat([dw, of_block(done, rest, z_rest)])
    return xp.add_rows(dw, labels, -_sloped(model, wide * shares, scores.own))


def _cross_entropy(
    xp: Backend, model: Any, h: Array, labels: Array, valid: Array, gradients: bool, of_weight: bool
) -> tuple[Array, Array, dict[str, Array]]:
    """Sum of losses, number of correct positions, gradients by hidden states (R, D) and weight (V, D)."""
    scores = _scores(xp, model, h, labels, gradients)
    valid = xp.expand_dims(valid, 1)
    loss = -xp.sum(scores.logprob * valid)
    correct = xp.sum(xp.cast(scores.own >= scores.peak, "float32") * valid)
    if not gradients:
        return loss, correct, {}
    found = {"hidden": scores.unit * -valid}
    if of_weight:
        found["weight"] = _of_weight(xp, model, h, labels, scores, valid)
    return loss, correct, found


def _any_loss(
    xp: Backend, forward: Backend, skeleton: Module, params: Params, h: Array, labels: Array, valid: Array,
    loss: Loss | None, gradients: bool, wanted: list[str],
) -> tuple[Array, Array, dict[str, Array]]:  # fmt: skip
    """As _cross_entropy, by automatic differentiation of the piece: a loss of the user's, or a head with an adapter."""

    def summed(variables: Params) -> tuple[Array, Array]:
        model = bind(skeleton, params | variables)
        logits, own = _all_logits(forward, model, variables["hidden"], labels)
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


def _any_scores(
    xp: Backend, skeleton: Module, params: Params, h: Array, labels: Array, gradients: bool
) -> dict[str, Array]:
    """As `_pieces` has them, by automatic differentiation. A position's logprob depends on its hidden states alone, so
    the gradient of their sum is each one's own."""

    def summed(variables: Params) -> tuple[Array, dict[str, Array]]:
        logits, own = _all_logits(xp, bind(skeleton, params), variables["hidden"], labels)
        totals = xp.logsumexp(logits, axis=1, keepdims=True)
        return xp.sum(own - totals), {"logprobs": own - totals, "totals": totals}

    if not gradients:
        return summed({"hidden": h})[1]
    (_, found), units = xp.value_and_grad(summed)({"hidden": h})
    found = {name: xp.stop_gradient(x) for name, x in found.items()}
    return found | {"units": xp.cast(units["hidden"], "float32")}


def _all_logits(xp: Backend, model: Any, h: Array, labels: Array) -> tuple[Array, Array]:
    """Logits (R, V) of one piece by the head itself, and those of the labels (R, 1)."""
    logits = model.logits(xp, h)
    return logits, xp.take_along_axis(logits, xp.expand_dims(labels, 1), 1)
