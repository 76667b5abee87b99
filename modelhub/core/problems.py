"""What the logits of a head with labels mean: `problem_type`, with the names and the meaning of transformers' configs.

  problem_type                 what logits become    labels                                loss, a mean over them
  single_label_classification  shares that sum to 1  int32 (B,), or shares float32 (B, C)  cross entropy
  multi_label_classification   a probability each    0 or 1, or between: float32 (B, C)    binary cross entropy
  regression                   they are the result   numbers: float32 (B, C)               squared error

C: classes, or outputs. A config may leave it out: then several logits are a single label's; one alone is trained by
squared error and shown through a sigmoid, as transformers and its pipelines have it.
"""

import re
from typing import Any

import numpy as np

from modelhub.core.backends.base import Array, Backend
from modelhub.errors import ConfigError, DataError

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
# Measured where nothing else is asked for.
METRICS = {
    SINGLE_LABEL: ("accuracy", "top5_accuracy"), MULTI_LABEL: ("accuracy", "exact_match"), REGRESSION: ("mae",),
}  # fmt: skip


def problem_of(config: Any) -> str:
    """What a model with this config is trained and measured for. config: problem_type and num_labels."""
    return config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE_LABEL)


def scores(xp: Backend, logits: Array, problem_type: str | None) -> Array:
    """What people are shown of logits (..., C), float32: probabilities, or for regression the numbers themselves.

    problem_type: the config's own, None included. As in transformers' classification pipelines.
    """
    if problem_type == REGRESSION:
        return logits
    if problem_type == MULTI_LABEL or logits.shape[-1] == 1:
        return xp.sigmoid(xp.cast(logits, "float32"))
    return xp.softmax(logits)


def losses(xp: Backend, logits: Array, labels: Array, problem: str, label_smoothing: float = 0.0) -> Array:
    """One loss a row, float32 (B,), of logits (B, C); labels as above, integers within 0 to C - 1.

    Means of them are torch's cross_entropy, binary_cross_entropy_with_logits and mse_loss. label_smoothing: the share
    of each label that is spread over all classes (Szegedy et al. 2015, arXiv:1512.00567), of several labels over yes
    and no.
    """
    if problem == REGRESSION:
        return xp.mean((logits - labels) * (logits - labels), axis=1)
    if problem == MULTI_LABEL:
        labels = labels * (1.0 - label_smoothing) + 0.5 * label_smoothing if label_smoothing else labels
        # log(1 + exp(x)) - x * y, in a form whose exponential cannot overflow.
        above = xp.maximum(logits, 0.0) + xp.log(1.0 + xp.exp(-xp.abs(logits)))
        return xp.mean(above - logits * labels, axis=1)
    soft = len(labels.shape) == 2
    meant = xp.sum(logits * labels, axis=1) if soft else _own(xp, logits, labels)[:, 0]
    if label_smoothing:
        meant = meant + label_smoothing * (xp.mean(logits, axis=1) - meant)
    return xp.logsumexp(logits, axis=1) - meant


def measured(xp: Backend, logits: Array, labels: Array, metric: str, problem: str) -> Array:
    """float32 (B,): a metric of each row, so that its mean is that of the data. NaN is never right.

    accuracy: of a single label, whether the largest logit is its; top5_accuracy, with any number, whether it is among
    the 5 largest. Of several labels accuracy is the share of them that are right at a probability of 0.5 (Keras'
    BinaryAccuracy), exact_match whether all are (scikit-learn's accuracy_score). mae: the mean absolute error.
    """
    if problem == REGRESSION:
        return xp.mean(xp.abs(logits - labels), axis=1)
    if problem == MULTI_LABEL:
        yes = labels >= 0.5
        right = xp.cast(xp.where(yes, logits > 0.0, logits <= 0.0), "float32")
        return xp.mean(right, axis=1) if metric == "accuracy" else xp.min(right, axis=1)
    likeliest = xp.argmax(labels, 1) if len(labels.shape) == 2 else labels
    # Of NaN nothing is at most as large.
    behind = xp.sum(xp.cast(logits <= _own(xp, logits, likeliest), "float32"), axis=1)
    return xp.cast(logits.shape[1] - behind < float(_places_of(metric) or 1), "float32")


def check_metrics(metrics: tuple[str, ...], problem: str) -> None:
    """Raise ConfigError for metrics that a problem does not have."""
    known = ("mae",) if problem == REGRESSION else ("accuracy", "exact_match")
    if problem == SINGLE_LABEL:
        wrong = [metric for metric in metrics if _places_of(metric) is None]
        can_be = 'metrics can be "accuracy" and "top5_accuracy" (or another number)'
    else:
        wrong = [metric for metric in metrics if metric not in known]
        can_be = f"metrics can be {' and '.join(map(repr, known))} for problem_type={problem!r}"
    if wrong:
        raise ConfigError(f"{can_be}, got {wrong}")


def check_labels(labels: np.ndarray, num_labels: int, problem: str, where: str = "") -> None:
    """Raise DataError for labels that a model with so many classes, or outputs, has no place for.

    labels: of a batch, as above. Compiled programs cannot raise: an index beyond an array's end gives NaN on one
    backend and another class on the next, -1 the last class. where: the batch, for the error.
    """
    named = f"{where}: " if where else ""
    if problem == SINGLE_LABEL and labels.ndim == 1:
        wrong = np.flatnonzero((labels < 0) | (labels >= num_labels))
        if wrong.size:
            raise DataError(
                f"{named}label {labels[wrong[0]]} is out of range: the model has {num_labels} classes, 0 to "
                f"{num_labels - 1}{no_label(labels[wrong[0]])}"
            )
        return
    if labels.ndim != 2 or labels.shape[1] != num_labels:
        kind = {SINGLE_LABEL: "soft labels", MULTI_LABEL: "several labels a row", REGRESSION: "numbers"}[problem]
        raise DataError(f"{named}{kind} must be (batch, {num_labels} classes), found {labels.shape}")
    low, high = (-np.inf, np.inf) if problem == REGRESSION else (0.0, 1.0)
    places = np.argwhere(~((labels >= low) & (labels <= high) & np.isfinite(labels)))
    if places.size:
        row, column = places[0]
        what = "a finite number" if problem == REGRESSION else "between 0 and 1"
        raise DataError(f"{named}label {column} of row {row + 1} is {labels[row, column]:g}; it must be {what}")


def no_label(label: Any) -> str:
    """A hint, for what data sets write in place of labels that they do not have."""
    return "; -1 means no label in many data sets: leave those rows out" if label == -1 else ""


def _own(xp: Backend, logits: Array, labels: Array) -> Array:
    """(B, 1): the logit of each row's label."""
    return xp.take_along_axis(logits, xp.expand_dims(labels, 1), 1)


def _places_of(metric: str) -> int | None:
    """ "top5_accuracy" -> 5; None for what is no metric of a single label."""
    match = re.fullmatch(r"(?:top([1-9]\d*)_)?accuracy", metric)
    return None if match is None else int(match[1] or 1)
