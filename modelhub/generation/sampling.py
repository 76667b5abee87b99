"""From logits to the next token, the same on every backend: one uniform number per row, drawn by numpy, decides.

No sorting: every truncation is a threshold on the logits, found by bisection, because sorting 262,144 numbers takes
longer than running a layer on most backends.
"""

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from modelhub.core.backends.base import Array, Backend
from modelhub.errors import InputError

LOWEST = -1e30
# Probabilities below exp(-60) are 0 for float32 sums; halving 60 this often leaves steps finer than a float32 logit.
_RANGE, _HALVINGS = 60.0, 28
# Order in Sampler.values().
TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY, TOP_H, TYPICAL, EPSILON, ETA = range(11)
_TOP_H_AMONG = 100  # transformers looks no further


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
    (arXiv:2407.01082); top_h the likeliest whose entropy stays within that share of the whole (arXiv:2509.02510);
    typical_p the fewest whose surprise is nearest to the entropy and that reach p (arXiv:2202.00666); epsilon_cutoff
    and eta_cutoff those at least that likely, the latter less so where the entropy is high (arXiv:2210.15191).
    Ties at a threshold are all kept.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_h: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None

    def __post_init__(self) -> None:
        def check(name: str, fits: Callable[[Any], bool], wanted: str) -> None:
            value = getattr(self, name)
            if value is not None and not (is_number(value) and fits(value)):
                raise InputError(f"{name} must be {wanted}, got {value!r}")

        check("temperature", lambda t: 0.0 <= t < float("inf"), "0 (greedy) or more")
        check("top_k", lambda k: k >= 0 and k % 1 == 0, "a whole number, 1 or more (0 or None: off)")
        check("top_p", lambda p: 0.0 <= p <= 1.0, "between 0 and 1")
        check("min_p", lambda p: 0.0 <= p <= 1.0, "between 0 and 1")
        check("repetition_penalty", lambda r: 0.0 < r < float("inf"), "more than 0 (1: off)")
        check("presence_penalty", lambda p: abs(p) < float("inf"), "a finite number")
        check("frequency_penalty", lambda p: abs(p) < float("inf"), "a finite number")
        check("top_h", lambda p: 0.0 < p <= 1.0, "above 0 and at most 1")
        check("typical_p", lambda p: 0.0 < p <= 1.0, "above 0 and at most 1 (1: off)")
        for name in ("epsilon_cutoff", "eta_cutoff"):
            check(name, lambda p: 0.0 <= p < 1.0, "at least 0 (off) and below 1")
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(f"logit_bias must be {{token id: amount}}, got {self.logit_bias!r:.200}")
        for token, amount in self.logit_bias.items():
            if not is_whole(token) or not is_number(amount) or math.isnan(amount):
                raise InputError(
                    f"logit_bias must be {{token id: amount}}, whole numbers to numbers, got {{{token!r}: {amount!r}}};"
                    " tokenizer.encode and tokenizer.token_to_id give the ids of a text"
                )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or (self.temperature, self.top_k, self.top_p, self.min_p) == (None,) * 4

    @property
    def sampling(self) -> "Sampler":
        """The same without what changes logits before one is drawn: no logit_bias and no penalties."""
        return replace(self, logit_bias={}, **dict.fromkeys(PENALTIES))

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
            "top_h": not self.greedy and self.top_h is not None,
            "typical_p": not self.greedy and self.typical_p not in (None, 1.0),
            "epsilon_cutoff": not self.greedy and self.epsilon_cutoff,
            "eta_cutoff": not self.greedy and self.eta_cutoff,
        }
        return frozenset(name for name, on in active.items() if on)

    @property
    def counts_tokens(self) -> bool:
        return bool(self.features & PENALTIES)

    def values(self) -> np.ndarray:
        """(7,) float32, in the order of the constants above; (11,) where one of the last four is on."""
        rare = (self.top_h, self.typical_p, self.epsilon_cutoff, self.eta_cutoff)
        chosen = (
            1.0 if self.temperature is None else self.temperature,
            *(self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.presence_penalty),
            *(self.frequency_penalty, *(rare if any(rare) else ())),
        )
        return np.array([0.0 if value is None else value for value in chosen], np.float32)

    def bias(self, vocabulary: int) -> np.ndarray:
        """(V,) float32 of logit_bias. Raises InputError for ids outside the vocabulary."""
        bias = np.zeros(vocabulary, np.float32)
        for token, amount in self.logit_bias.items():
            if not 0 <= token < vocabulary:
                raise InputError(f"logit_bias has the token id {token}; the vocabulary goes from 0 to {vocabulary - 1}")
            bias[token] = max(amount, LOWEST)  # -inf means never, and is no number to reckon with
        return bias


def choose(
    xp: Backend, logits: Array, uniform: Array, values: Array, bias: Array, seen: Array, counts: Array,
    *, features: frozenset[str], logprobs: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """One step for all rows: int32 tokens (B,), float32 log-probabilities (B,), and the new counts.

    logits (B, V) float32; uniform (B,) in [0, 1); values and bias from the Sampler; seen (B, V), 1 where the prompt has
    the token; counts (B, V), how often the answer has it. What no feature needs may have any shape.
    The log-probabilities are those of the model itself, before penalties, temperature and truncation; 0 if not wanted,
    and NaN in a row with a logit that is not finite.
    """
    alarm = not_finite(xp, logits)
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
        return token, alarm, counts
    return token, xp.take_along_axis(xp.log_softmax(logits), chosen, -1)[:, 0] + alarm, counts


def not_finite(xp: Backend, logits: Array) -> Array:
    """(B,) float32: NaN for rows of logits (B, V) with a NaN or an infinity among them, 0 for others.

    One sum tells: no finite logits add up to an infinity.
    """
    total = xp.sum(logits, axis=-1)
    return xp.where(xp.abs(total) < float("inf"), xp.full((), 0.0), xp.full((), float("nan")))


def sample(xp: Backend, logits: Array, uniform: Array, values: Array, features: frozenset[str]) -> Array:
    """(B,) int32 tokens drawn from float32 logits (B, V) by inverting the distribution at uniform (B,) in [0, 1)."""
    x = logits / values[TEMPERATURE]
    x = x - xp.max(x, axis=-1, keepdims=True)
    if "top_h" in features:
        x = _top_h(xp, x, values[TOP_H])
    if "top_k" in features:
        x = _keep(xp, x, xp.cast(x > LOWEST, "float32"), values[TOP_K])
    if "top_p" in features:
        p = xp.exp(x)
        x = _keep(xp, x, p, values[TOP_P] * xp.sum(p, axis=-1, keepdims=True))
    if "min_p" in features:
        x = xp.where(xp.exp(x) >= values[MIN_P], x, xp.full((), LOWEST))
    if "typical_p" in features:
        x = _typical(xp, x, values[TYPICAL])
    if "epsilon_cutoff" in features:
        x = _at_least(xp, x, values[EPSILON])
    if "eta_cutoff" in features:
        eta = values[ETA]
        x = _at_least(xp, x, xp.minimum(eta, xp.sqrt(eta) * xp.exp(-xp.expand_dims(_entropy(xp, x)[0], -1))))
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
    return xp.where(x >= low, x, xp.full((), LOWEST))


def _at_least(xp: Backend, x: Array, probability: Array) -> Array:
    """x (B, V; maximum 0) with -1e30 for what is less probable; the likeliest stays whatever it has."""
    kept = (xp.softmax(x) >= probability) | (x >= 0.0)
    return xp.where(kept, x, xp.full((), LOWEST))


def _entropy(xp: Backend, x: Array) -> tuple[Array, Array]:
    """(B,) entropy of the softmax of x (B, V), in nats; and the log-probabilities (B, V)."""
    logs = xp.log_softmax(x)
    return -xp.sum(xp.where(logs > -_RANGE, xp.exp(logs) * logs, xp.full((), 0.0)), axis=-1), logs


def _typical(xp: Backend, x: Array, mass: Array) -> Array:
    """Keep of x (B, V; maximum 0) what is nearest to the entropy, until it has that share of the probability."""
    entropy, logs = _entropy(xp, x)
    surprise = xp.abs(logs + xp.expand_dims(entropy, -1))
    # As what _keep wants: the nearest at 0. Beyond its range nothing is probable.
    near = xp.min(surprise, axis=-1, keepdims=True) - surprise
    kept = _keep(xp, near, xp.exp(logs), mass) > LOWEST
    x = xp.where(kept, x, xp.full((), LOWEST))
    return x - xp.max(x, axis=-1, keepdims=True)


def _top_h(xp: Backend, x: Array, share: Array) -> Array:
    """Keep of x (B, V; maximum 0) the likeliest whose entropies together stay within a share of all of theirs."""
    likeliest, _ = xp.top_k(x, min(_TOP_H_AMONG, x.shape[-1]))
    logs = xp.log_softmax(likeliest)
    terms = xp.where(logs > -_RANGE, -xp.exp(logs) * logs, xp.full((), 0.0))
    within = xp.cumsum(terms, axis=-1) <= share * xp.sum(terms, axis=-1, keepdims=True)
    lowest = xp.min(xp.where(within, likeliest, xp.full((), 0.0)), axis=-1, keepdims=True)
    return xp.where(x >= lowest, x, xp.full((), LOWEST))


def draw(generators: list[np.random.Generator]) -> np.ndarray:
    """(B,) float32 in [0, 1), one number from each generator.

    The factor keeps u * mass below mass in float32, so that a token is always found.
    """
    return np.array([g.random(dtype=np.float32) for g in generators], np.float32) * np.float32(1 - 1e-6)


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
