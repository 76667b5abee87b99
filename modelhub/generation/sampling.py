"""From logits to the next token, the same on every backend: one uniform number per row, drawn by numpy, decides.

No sorting: every truncation is a threshold on the logits, found by bisection, because sorting 262,144 numbers takes
longer than running a layer on most backends.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelhub.core.backends.base import Array, Backend
from modelhub.errors import InputError

_LOWEST = -1e30
# Probabilities below exp(-60) are 0 for float32 sums; halving 60 this often leaves steps finer than a float32 logit.
_RANGE, _HALVINGS = 60.0, 28
# Order in Sampler.values().
TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(7)


PENALTIES = {"repetition_penalty", "presence_penalty", "frequency_penalty"}


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen. Without temperature, top_k, top_p and min_p: the likeliest (greedy).

    Applied in this order, that of transformers:
    logit_bias: {token id: amount added to its logit}.
    repetition_penalty divides positive and multiplies negative logits of tokens that the prompt or the answer has
    (Keskar et al. 2019, arXiv:1909.05858).
    presence_penalty is subtracted from the logits of tokens that the answer has, frequency_penalty as often as it has
    them (as in OpenAI's interface; the prompt does not count).
    temperature divides the logits; top_k keeps the k likeliest tokens; top_p the fewest whose probabilities reach p
    (Holtzman et al. 2019, arXiv:1904.09751); min_p those at least min_p times as likely as the likeliest
    (arXiv:2407.01082). Ties at a threshold are all kept.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def check(name: str, fits: Callable[[Any], bool], wanted: str) -> None:
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise InputError(f"{name} must be {wanted}, got {value!r}")

        check("temperature", lambda t: 0.0 <= t < float("inf"), "0 (greedy) or more")
        check("top_k", lambda k: k >= 0 and k % 1 == 0, "a whole number, 1 or more (0 or None: off)")
        check("top_p", lambda p: 0.0 <= p <= 1.0, "between 0 and 1")
        check("min_p", lambda p: 0.0 <= p <= 1.0, "between 0 and 1")
        check("repetition_penalty", lambda r: 0.0 < r < float("inf"), "more than 0 (1: off)")
        check("presence_penalty", lambda p: abs(p) < float("inf"), "a finite number")
        check("frequency_penalty", lambda p: abs(p) < float("inf"), "a finite number")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or (self.temperature, self.top_k, self.top_p, self.min_p) == (None,) * 4

    @property
    def features(self) -> frozenset[str]:
        """What is switched on: a compiled program depends on it, and not on the values."""
        active = {
            "logit_bias": self.logit_bias,
            "repetition_penalty": self.repetition_penalty not in (None, 1.0),
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "sample": not self.greedy,
            "top_k": not self.greedy and self.top_k,
            "top_p": not self.greedy and self.top_p not in (None, 1.0),
            "min_p": not self.greedy and self.min_p,
        }
        return frozenset(name for name, on in active.items() if on)

    @property
    def counts_tokens(self) -> bool:
        return bool(self.features & PENALTIES)

    def values(self) -> np.ndarray:
        """(7,) float32, in the order of the constants above."""
        chosen = (
            1.0 if self.temperature is None else self.temperature,
            *(self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.presence_penalty),
            self.frequency_penalty,
        )
        return np.array([0.0 if value is None else value for value in chosen], np.float32)

    def bias(self, vocabulary: int) -> np.ndarray:
        """(V,) float32 of logit_bias. Raises InputError for ids outside the vocabulary."""
        bias = np.zeros(vocabulary, np.float32)
        for token, amount in self.logit_bias.items():
            if not 0 <= token < vocabulary:
                raise InputError(f"logit_bias has the token id {token}; the vocabulary goes from 0 to {vocabulary - 1}")
            bias[token] = amount
        return bias


def choose(
    xp: Backend, logits: Array, uniform: Array, values: Array, bias: Array, seen: Array, counts: Array,
    *, features: frozenset[str], logprobs: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """One step for all rows: int32 tokens (B,), float32 log-probabilities (B,), and the new counts.

    logits (B, V) float32; uniform (B,) in [0, 1); values and bias from the Sampler; seen (B, V), 1 where the prompt has
    the token; counts (B, V), how often the answer has it. What no feature needs may have any shape.
    The log-probabilities are those of the model itself, before penalties, temperature and truncation; 0 if not wanted.
    """
    x = logits + bias if "logit_bias" in features else logits
    if "repetition_penalty" in features:
        penalised = xp.where(x < 0, x * values[REPETITION], x / values[REPETITION])
        x = xp.where(seen + counts > 0, penalised, x)
    if "presence_penalty" in features:
        x = x - values[PRESENCE] * xp.cast(counts > 0, "float32")
    if "frequency_penalty" in features:
        x = x - values[FREQUENCY] * counts
    token = sample(xp, x, uniform, values, features) if "sample" in features else xp.argmax(x, axis=-1)
    chosen = xp.expand_dims(token, -1)
    if features & PENALTIES:
        ids = xp.expand_dims(xp.arange(logits.shape[-1]), 0)
        counts = counts + xp.cast(ids == chosen, "float32")
    if not logprobs:
        return token, xp.zeros((logits.shape[0],)), counts
    return token, xp.take_along_axis(xp.log_softmax(logits), chosen, -1)[:, 0], counts


def sample(xp: Backend, logits: Array, uniform: Array, values: Array, features: frozenset[str]) -> Array:
    """(B,) int32 tokens drawn from float32 logits (B, V) by inverting the distribution at uniform (B,) in [0, 1)."""
    x = logits / values[TEMPERATURE]
    x = x - xp.max(x, axis=-1, keepdims=True)
    if "top_k" in features:
        x = _keep(xp, x, xp.cast(x > _LOWEST, "float32"), values[TOP_K])
    if "top_p" in features:
        p = xp.exp(x)
        x = _keep(xp, x, p, values[TOP_P] * xp.sum(p, axis=-1, keepdims=True))
    if "min_p" in features:
        x = xp.where(xp.exp(x) >= values[MIN_P], x, xp.full((), _LOWEST))
    # XLA sums prefixes in a tree, so rounding can make the sums rise at a token of probability 0: only others count.
    p = xp.exp(x)
    mass = xp.where(p > 0.0, xp.cumsum(p, axis=-1), xp.full((), 0.0))
    target = xp.expand_dims(uniform, -1) * xp.max(mass, axis=-1, keepdims=True)
    return xp.argmax(xp.cast(mass > target, "int32"), axis=-1)


def _keep(xp: Backend, x: Array, weight: Array, target: Array) -> Array:
    """Keep the largest of x (B, V; maximum 0) whose weights (B, V) together reach target; the rest become -1e30."""
    low = xp.full((x.shape[0], 1), -_RANGE)
    high = xp.full((x.shape[0], 1), 0.0)
    for _ in range(_HALVINGS):
        middle = (low + high) * 0.5
        enough = xp.sum(xp.where(x >= middle, weight, xp.full((), 0.0)), axis=-1, keepdims=True) >= target
        low, high = xp.where(enough, middle, low), xp.where(enough, high, middle)
    return xp.where(x >= low, x, xp.full((), _LOWEST))


def draw(generators: list[np.random.Generator]) -> np.ndarray:
    """(B,) float32 in [0, 1), one number from each generator.

    The factor keeps u * mass below mass in float32, so that a token is always found.
    """
    return np.array([g.random(dtype=np.float32) for g in generators], np.float32) * np.float32(1 - 1e-6)
