"""Layers that all families share. Every layer is called as layer(xp, x) and holds Specs until it is bound."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Module, Spec


@dataclass
class Linear(Module):
    """y = x Wᵀ + b, weight (out, in) as in Hugging Face checkpoints."""

    weight: Any
    bias: Any = None

    @classmethod
    def abstract(cls, inputs: int, outputs: int, bias: bool = False, scale: float = 0.02) -> "Linear":
        return cls(Spec((outputs, inputs), scale=scale), Spec((outputs,), "zeros") if bias else None)

    def __call__(self, xp: Backend, x: Array) -> Array:
        return xp.linear(x, self.weight, self.bias)


@dataclass
class Embedding(Module):
    """A table of vectors, weight (vocabulary, width), that can also serve as the output head."""

    weight: Any

    @classmethod
    def abstract(cls, vocabulary: int, width: int, scale: float = 0.02) -> "Embedding":
        return cls(Spec((vocabulary, width), scale=scale))

    def __call__(self, xp: Backend, ids: Array) -> Array:
        return xp.embedding(self.weight, ids)

    def unembed(self, xp: Backend, x: Array) -> Array:
        return xp.linear(x, self.weight)


@dataclass
class RMSNorm(Module):
    """Root mean square norm; offset 1 where weights are stored around 0 (Gemma)."""

    weight: Any
    eps: float
    offset: float = 0.0

    @classmethod
    def abstract(cls, width: int, eps: float, offset: float = 0.0) -> "RMSNorm":
        return cls(Spec((width,), "zeros" if offset else "ones"), eps, offset)

    def __call__(self, xp: Backend, x: Array) -> Array:
        return xp.rms_norm(x, self.weight, self.eps, self.offset)


@dataclass(frozen=True)
class Rope:
    """How a position becomes the angles of a rotary embedding (Su et al. 2021, arXiv:2104.09864).

    rope_type: "default"; "linear": positions divided by `factor`; "llama3": long wavelengths divided by `factor`, short
    ones kept, those between blended (Llama 3.1, arXiv:2407.21783), where long and short are
    original_max_position_embeddings over low_freq_factor and over high_freq_factor.
    """

    LLAMA3: ClassVar = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

    theta: float = 10_000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def frequencies(self, width: int) -> np.ndarray:
        """Angle per position of each pair of channels, (width / 2,) float32."""
        exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        plain = np.float32(1.0) / np.float32(self.theta) ** exponent
        if self.rope_type == "default":
            return plain
        scaled = plain / np.float32(self.factor)
        if self.rope_type == "linear":
            return scaled
        turns = self.original_max_position_embeddings * plain / np.float32(2 * np.pi)
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0).astype(np.float32)
        return (1 - blend) * scaled + blend * plain


def rope_tables(xp: Backend, positions: Array, frequencies: np.ndarray, dtype: str) -> tuple[Array, Array]:
    """cos and sin for positions (B, T): two arrays (B, 1, T, h / 2). Angles in float32, tables in `dtype`."""
    angles = xp.cast(positions, "float32")[:, None, :, None] * xp.array(frequencies)
    return xp.cast(xp.cos(angles), dtype), xp.cast(xp.sin(angles), dtype)


def causal_mask(
    query_positions: Array, key_positions: Array, window: int | None = None, segments: Array | None = None
) -> Array:
    """(B, 1, T, S) booleans, True where a query may look: at itself and before, at most window - 1 positions back.

    query_positions (B, T), key_positions (1 or B, S). segments (B, T): examples packed into one row do not see each
    other.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    mask = distance >= 0
    if window is not None:
        mask = mask & (distance < window)
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    return mask[:, None]


@dataclass
class KVCache(Module):
    """Keys and values seen so far, one buffer (B, K, S, h) per layer. The slot of a token is its position.

    Rows of different length stand side by side, each from slot 0: what lies beyond a row's length is padding that no
    query looks at (it is later than every query) and that the row's next tokens overwrite.
    Writing CONSUMES the cache: use the one that comes back, as XLA reuses the memory of the old.
    """

    k: list
    v: list

    @classmethod
    def abstract(cls, layers: int, batch: int, kv_heads: int, slots: int, width: int) -> "KVCache":
        def buffers() -> list:
            return [Spec((batch, kv_heads, slots, width), "zeros") for _ in range(layers)]

        return cls(buffers(), buffers())

    def write(self, xp: Backend, layer: int, k: Array, v: Array, start: Array) -> tuple[Array, Array]:
        """Write k and v (B, K, T, h) to slots from start (B,); return the layer's full buffers."""
        self.k[layer] = xp.update_slots(self.k[layer], k, start)
        self.v[layer] = xp.update_slots(self.v[layer], v, start)
        return self.k[layer], self.v[layer]


@dataclass
class Context:
    """What all layers of one forward pass share; rope and mask by kind of layer ("full_attention", ...)."""

    rope: dict[str, tuple[Array, Array]]
    mask: dict[str, Array]
    cache: KVCache | None
    start: Array | None


def decoder_context(
    xp: Backend, time: int, dtype: str, frequencies: dict[str, np.ndarray], windows: dict[str, int | None],
    start: Array | None = None, cache: KVCache | None = None, positions: Array | None = None,
    segments: Array | None = None,
) -> Context:  # fmt: skip
    """The Context of a causal decoder for `time` new tokens, per kind of layer: rope frequencies, attention window.

    With a cache the tokens take the slots from start (B,) on. Without, positions (B, T) default to 0 ... T - 1, and
    segments (B, T) keep packed examples apart.
    """
    steps = xp.expand_dims(xp.arange(time), 0)
    if cache is not None:
        order = positions = xp.expand_dims(start, 1) + steps
        keys = xp.expand_dims(xp.arange(cache.k[0].shape[2]), 0)
    else:
        order = keys = steps  # what a token may see depends on its place in the row, also where positions restart
        positions = steps if positions is None else positions
    return Context(
        rope={kind: rope_tables(xp, positions, angles, dtype) for kind, angles in frequencies.items()},
        mask={kind: causal_mask(order, keys, window, segments) for kind, window in windows.items()},
        cache=cache,
        start=start,
    )


ACTIVATIONS = {
    "gelu_pytorch_tanh": lambda xp, x: xp.gelu(x, approximate=True),
    "gelu_new": lambda xp, x: xp.gelu(x, approximate=True),
    "gelu": lambda xp, x: xp.gelu(x),
    "silu": lambda xp, x: xp.silu(x),
    "swish": lambda xp, x: xp.silu(x),
}
