"""Metrics for training loops of the user's own, on arrays of any framework; see modelhub.losses.

Each is the share of right answers in one batch, a float32 scalar; NaN where no label counts.
"""

from modelhub.core.backends.base import Array
from modelhub.core.losses import is_soft, shifted, together
from modelhub.errors import InputError


def accuracy(logits: Array, labels: Array, ignore_index: int = -100) -> Array:
    """How many labels have the largest of their logits. Shapes as for top_k_accuracy."""
    return top_k_accuracy(logits, labels, 1, ignore_index)


def top_k_accuracy(logits: Array, labels: Array, k: int = 5, ignore_index: int = -100) -> Array:
    """How many labels are among those of the k largest logits; equal ones share a place, as in fit's metrics.

    logits (..., V). labels (...): integers, ignore_index where there is none; or (..., V): a probability for each
    class, of which the likeliest counts. A label outside 0 ... V - 1, and logits that are NaN, are never right.
    Raises InputError for shapes that do not fit and a k outside 1 ... V, MixedBackends for arrays of two frameworks.
    """
    xp, logits, labels = together(logits, labels)
    soft = is_soft(xp, logits, labels)
    classes = xp.shape(logits)[-1]
    if k < 1 or (isinstance(classes, int) and k > classes):
        raise InputError(f"k must be between 1 and the number of classes, {classes}, got {k}")
    labels = xp.argmax(labels, -1) if soft else xp.cast(labels, "int32")
    inside = (labels >= 0) & (labels < classes)
    place = xp.where(inside, labels, xp.zeros((), "int32"))
    own = xp.take_along_axis(logits, xp.expand_dims(place, -1), -1)
    # Of NaN nothing is at most as large.
    behind = xp.sum(xp.cast(logits <= own, "int32"), axis=-1)
    right = inside & (behind > classes - k)
    counts = xp.cast(labels != ignore_index, "float32")
    return xp.sum(xp.cast(right, "float32") * counts) / xp.sum(counts)


def causal_lm_accuracy(logits: Array, labels: Array, ignore_index: int = -100) -> Array:
    """How many next tokens have the largest logit: logits (..., T, V), labels (..., T) as for causal_lm_loss."""
    xp, logits, labels = together(logits, labels)
    return accuracy(*shifted(xp, logits, labels), ignore_index)
