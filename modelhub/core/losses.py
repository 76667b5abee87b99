"""Losses for training loops of the user's own, on arrays of any framework.

Each is found by its arguments' framework and works where that framework's own would: under jax.jit, grad and vmap, in
torch's autograd and torch.compile, under TensorFlow's tape and in tf.function. Either may also be numpy's or a list,
whatever the other is. All is computed in float32. V: the number of classes, or the size of the vocabulary.
"""

import numpy as np

from modelhub.core import problems
from modelhub.core.backends import backend_of
from modelhub.core.backends.base import Array, Backend
from modelhub.errors import InputError

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Array, labels: Array, ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Array:
    """float32 cross entropy, as torch.nn.functional.cross_entropy computes it; here the classes are the last axis.

    logits (..., V). labels (...): integers, ignore_index where there is no loss; or (..., V): a probability for each
    class. label_smoothing: the share of each label that is spread over all classes (Szegedy et al. 2015,
    arXiv:1512.00567). reduction: "mean", over the labels that count, a scalar; "sum"; "none": (...).

    A label outside 0 ... V - 1 makes the loss NaN, and so does the mean over no label at all: a compiled function
    cannot raise. Raises InputError for shapes that do not fit, MixedBackends for arrays of two frameworks.
    """
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise InputError(f"label_smoothing must be between 0 and 1, got {label_smoothing!r}")
    xp, logits, labels = together(logits, labels)
    scores = xp.log_softmax(logits)
    if is_soft(xp, logits, labels):
        meant = xp.sum(scores * xp.cast(labels, "float32"), axis=-1)
        counts = None
    else:
        labels = xp.cast(labels, "int32")
        inside = (labels >= 0) & (labels < xp.shape(logits)[-1])
        place = xp.where(inside, labels, xp.zeros((), "int32"))
        meant = xp.take_along_axis(scores, xp.expand_dims(place, -1), -1)[..., 0]
        counts = xp.cast(labels != ignore_index, "float32")
        meant = xp.where(inside, meant, xp.full((), float("nan")))
    if label_smoothing:
        meant = meant + label_smoothing * (xp.mean(scores, axis=-1) - meant)
    losses = -meant if counts is None else xp.where(counts > 0.0, -meant, xp.zeros(()))
    if reduction == "none":
        return losses
    if reduction == "sum":
        return xp.sum(losses)
    return xp.mean(losses) if counts is None else xp.sum(losses) / xp.sum(counts)


def classification_loss(
    logits: Array, labels: Array, problem_type: str = problems.SINGLE_LABEL, label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Array:  # fmt: skip
    """The loss of a head with labels, as transformers' ForSequenceClassificationLoss computes it; float32.

    logits (B, C). problem_type: "single_label_classification": `cross_entropy`, labels as there;
    "multi_label_classification": binary cross entropy, labels (B, C) of 0 and 1, or between; "regression": the squared
    error, labels numbers (B, C), or (B,) where C is 1. reduction: "mean"; "sum" over rows of each row's mean; "none":
    (B,). Raises InputError for shapes that do not fit, MixedBackends for arrays of two frameworks.
    """
    if problem_type not in problems.PROBLEM_TYPES:
        raise InputError(f"problem_type must be one of {', '.join(problems.PROBLEM_TYPES)}, got {problem_type!r}")
    if problem_type == problems.SINGLE_LABEL:
        return cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction=reduction)
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    xp, logits, labels = together(logits, labels)
    logits, labels = xp.cast(logits, "float32"), xp.cast(labels, "float32")
    if len(labels.shape) == 1 and len(logits.shape) == 2 and logits.shape[1] == 1:
        labels = xp.expand_dims(labels, 1)
    if len(logits.shape) != 2 or not fits(tuple(labels.shape), tuple(logits.shape)):
        raise InputError(
            f"for {problem_type} labels must have the logits' shape (batch, classes), got {tuple(labels.shape)} beside "
            f"logits {tuple(logits.shape)}"
        )
    found = problems.losses(xp, logits, labels, problem_type, label_smoothing)
    return found if reduction == "none" else xp.sum(found) if reduction == "sum" else xp.mean(found)


def causal_lm_loss(
    logits: Array, labels: Array, num_items_in_batch: Array | float | None = None, ignore_index: int = -100
) -> Array:
    """The loss of the next token, as transformers' ForCausalLMLoss computes it: a float32 scalar.

    logits (..., T, V), labels (..., T) integers that are not shifted: the logits of a position are compared with the
    label of the next one. num_items_in_batch: None: the mean over the labels that count; else their sum over this
    number, which makes batches of a step that is accumulated weigh what they should. The rest as for cross_entropy.
    """
    xp, logits, labels = together(logits, labels)
    logits, labels = shifted(xp, logits, labels)
    if num_items_in_batch is None:
        return cross_entropy(logits, labels, ignore_index)
    if xp.owns(num_items_in_batch):
        num_items_in_batch = xp.cast(num_items_in_batch, "float32")
    return cross_entropy(logits, labels, ignore_index, reduction="sum") / num_items_in_batch


def together(logits: Array, labels: Array) -> tuple[Backend, Array, Array]:
    """The backend that both are of, and both as its arrays: lists and numpy's become what the other one is."""
    given = {"logits": logits, "labels": labels}
    given = {name: np.asarray(x) if isinstance(x, (list, tuple, np.generic)) else x for name, x in given.items()}
    xp = backend_of(**({name: x for name, x in given.items() if not isinstance(x, np.ndarray)} or given))
    logits, labels = (
        x if xp.owns(x) else xp.array(x, "int32" if x.dtype.kind in "iub" else "float32") for x in given.values()
    )
    if any(getattr(x.shape, "rank", 0) is None for x in (logits, labels)):
        raise InputError("where a tf.function is traced, the number of dimensions of logits and labels must be known")
    return xp, logits, labels


def shifted(xp: Backend, logits: Array, labels: Array) -> tuple[Array, Array]:
    """Logits (..., T - 1, V) and the labels (..., T - 1) that they are to predict."""
    if len(labels.shape) < 1 or is_soft(xp, logits, labels):
        raise InputError(
            f"logits must be (..., time, vocabulary) and labels (..., time), got logits {tuple(logits.shape)} and "
            f"labels {tuple(labels.shape)}"
        )
    return logits[..., :-1, :], labels[..., 1:]


def is_soft(xp: Backend, logits: Array, labels: Array) -> bool:
    """Whether labels are probabilities (..., V) rather than integers (...). Raises InputError for what is neither."""
    wanted, found = tuple(logits.shape), tuple(labels.shape)
    floats = "float" in xp.dtype(labels)
    if wanted and fits(found, wanted if floats else wanted[:-1]):
        return floats
    kind = "floats" if floats else "integers"
    raise InputError(
        f"labels must be integers of the logits' shape without its last axis, or floats of the same shape; got "
        f"{kind} {found} beside logits {wanted}"
    )


def fits(found: tuple, wanted: tuple) -> bool:
    """Whether shapes are equal, as far as they are known: in a tf.function a dimension may be None."""
    return len(found) == len(wanted) and all(
        a is None or b is None or a == b for a, b in zip(found, wanted, strict=True)
    )
