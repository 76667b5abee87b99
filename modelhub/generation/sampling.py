"""From logits to the next token, the same on every backend: one uniform number per row, drawn by numpy, decides.

No sorting: every truncation is a threshold on the logits, found by bisection, because sorting 262,144 numbers takes
longer than running a layer on most backends.
"""

from dataclasses import dataclass

import numpy as np

from modelhub.core.backends.base import Array, Backend
from modelhub.errors import InputError

_LOWEST = -1e30
# Probabilities below exp(-60) are 0 for float32 sums; halving 60 this often leaves steps finer than a float32 logit.
_RANGE, _HALVINGS = 60.0, 28


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen. All None: greedy. Giving any value means sampling.

    temperature divides the logits; top_k keeps the k likeliest tokens; top_p the fewest whose probabilities reach p
    (Holtzman et al. 2019, arXiv:1904.09751); min_p those at least min_p times as likely as the likeliest
    (arXiv:2407.01082). Applied in this order, as in transformers. Ties at a threshold are all kept.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not (0.0 <= self.temperature < float("inf")):
            raise InputError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and not (self.top_k >= 0 and self.top_k % 1 == 0):
            raise InputError(f"top_k must be a whole number, 1 or more (0 or None: off), got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise InputError(f"{name} must lie between 0 and 1, got {value}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or (self.temperature, self.top_k, self.top_p, self.min_p) == (None,) * 4

    @property
    def truncations(self) -> tuple[str, ...]:
        """The names of the truncations that are on: what a compiled program depends on, unlike their values."""
        active = {"top_k": self.top_k, "top_p": self.top_p not in (None, 1.0), "min_p": self.min_p}
        return tuple(name for name, on in active.items() if on)

    def values(self) -> np.ndarray:
        """(4,) float32: temperature, top_k, top_p, min_p."""
        chosen = (1.0 if self.temperature is None else self.temperature, self.top_k, self.top_p, self.min_p)
        return np.array([0.0 if value is None else value for value in chosen], np.float32)


def greedy(xp: Backend, logits: Array) -> Array:
    """(B,) int32 likeliest tokens of logits (B, V)."""
    return xp.argmax(logits, axis=-1)


def sample(xp: Backend, logits: Array, uniform: Array, values: Array, truncations: tuple[str, ...]) -> Array:
    """(B,) int32 tokens drawn from float32 logits (B, V) by inverting the distribution at uniform (B,) in [0, 1).

    values: Sampler.values(); truncations: Sampler.truncations.
    """
    x = logits / values[0]
    x = x - xp.max(x, axis=-1, keepdims=True)
    if "top_k" in truncations:
        x = _keep(xp, x, xp.cast(x > _LOWEST, "float32"), values[1])
    if "top_p" in truncations:
        p = xp.exp(x)
        x = _keep(xp, x, p, values[2] * xp.sum(p, axis=-1, keepdims=True))
    if "min_p" in truncations:
        x = xp.where(xp.exp(x) >= values[3], x, xp.full((), _LOWEST))
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
