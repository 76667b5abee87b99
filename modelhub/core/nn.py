"""Layers that all families share. Every layer is called as layer(xp, x) and holds Specs until it is bound."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from modelhub.core.backends.base import Array, Backend
from modelhub.core.leaves import dtype_of
from modelhub.core.tree import Module, Spec


@dataclass
class LoRA(Module):
    """A low-rank update of a Linear: scale * B A, rank r (Hu et al. 2021, arXiv:2106.09685).

    lora_A (r, in), lora_B (out, r). lora_magnitude_vector (out,): DoRA, the lengths of the updated weight's rows,
    learned apart from their directions (Liu et al. 2024, arXiv:2402.09353). dropout: rate, on the input of A while
    training; salt: which of the model's streams of random numbers is this layer's. Names as in PEFT.
    """

    lora_A: Any
    lora_B: Any
    lora_magnitude_vector: Any
    scale: float
    dropout: float
    salt: int

    @classmethod
    def abstract(
        cls, inputs: int, outputs: int, rank: int, *, scale: float, dropout: float, use_dora: bool, salt: int
    ) -> "LoRA":
        a = Spec((rank, inputs), "uniform", 1 / math.sqrt(inputs))
        magnitude = Spec((outputs,), "ones") if use_dora else None
        return cls(a, Spec((outputs, rank), "zeros"), magnitude, scale, dropout, salt)

    def __call__(self, xp: Backend, x: Array, y: Array, weight: Array, bias: Array | None) -> Array:
        """y: what the Linear alone makes of x."""
        dtype = xp.dtype(y)
        dropped = xp.dropout(x, self.dropout, self.salt)
        update = xp.linear(dropped, xp.cast(self.lora_A, dtype))
        update = xp.linear(update * self.scale, xp.cast(self.lora_B, dtype))
        if self.lora_magnitude_vector is None:
            return y + update
        # The length counts as a constant in the gradient (section 4.3 of the paper).
        length = xp.stop_gradient(row_lengths(xp, self.merged(xp, weight)))
        ratio = xp.cast(self.lora_magnitude_vector, "float32") / length  # near 1, where 16 bits are coarse
        plain = y if bias is None else y - bias
        base = xp.cast(xp.linear(dropped, weight) if dropped is not x else plain, "float32")
        change = (ratio - 1.0) * base + ratio * xp.cast(update, "float32")
        return xp.cast(xp.cast(y, "float32") + change, dtype)

    def merged(self, xp: Backend, weight: Array) -> Array:
        """weight + scale * B A, (out, in) float32, without the magnitude."""
        update = xp.matmul(xp.cast(self.lora_B, "float32"), xp.cast(self.lora_A, "float32"))
        return xp.cast(xp.values(weight), "float32") + update * self.scale

    def folded(self, xp: Backend, weight: Array) -> Array:
        """The one weight (out, in), in the dtype of `weight`, that does what both do."""
        merged = self.merged(xp, weight)
        if self.lora_magnitude_vector is not None:
            ratio = xp.cast(self.lora_magnitude_vector, "float32") / row_lengths(xp, merged)
            merged = merged * xp.expand_dims(ratio, 1)
        return xp.cast(merged, dtype_of(weight))


def row_lengths(xp: Backend, weight: Array) -> Array:
    """(N,) lengths of the rows of weight (N, D)."""
    return xp.sqrt(xp.sum(weight * weight, axis=1))


@dataclass
class Linear(Module):
    """y = x Wᵀ + b, weight (out, in) as in Hugging Face checkpoints; and what a LoRA adds to it, if there is one."""

    weight: Any
    bias: Any = None
    lora: LoRA | None = None

    @classmethod
    def abstract(cls, inputs: int, outputs: int, bias: bool = False, scale: float = 0.02) -> "Linear":
        return cls(Spec((outputs, inputs), scale=scale), Spec((outputs,), "zeros") if bias else None)

    def __call__(self, xp: Backend, x: Array) -> Array:
        return self.adapted(xp, x, xp.linear(x, self.weight, self.bias))

    def adapted(self, xp: Backend, x: Array, y: Array) -> Array:
        """y: what the layer without a LoRA makes of x."""
        return y if self.lora is None else self.lora(xp, x, y, self.weight, self.bias)


def together(xp: Backend, x: Array, *layers: Linear) -> list[Array]:
    """What each layer makes of the same x. Layers of the user's own, and those that watch their calls, are called."""
    if not all(type(layer) is Linear for layer in layers):
        return [layer(xp, x) for layer in layers]
    ys = xp.linears(x, [(layer.weight, layer.bias) for layer in layers])
    return [layer.adapted(xp, x, y) for layer, y in zip(layers, ys, strict=True)]


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


@dataclass
class LayerNorm(Module):
    weight: Any
    bias: Any
    eps: float

    @classmethod
    def abstract(cls, width: int, eps: float) -> "LayerNorm":
        return cls(Spec((width,), "ones"), Spec((width,), "zeros"), eps)

    def __call__(self, xp: Backend, x: Array) -> Array:
        return xp.layer_norm(x, self.weight, self.bias, self.eps)


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
        return np.array(self.values(width), np.float32)

    def values(self, width: int) -> list[float]:
        """`frequencies` as plain numbers, which torch.compile and torch.export take as constants."""
        exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        plain = np.float32(1.0) / np.float32(self.theta) ** exponent
        if self.rope_type == "default":
            return plain.tolist()
        scaled = plain / np.float32(self.factor)
        if self.rope_type == "linear":
            return scaled.tolist()
        turns = self.original_max_position_embeddings * plain / np.float32(2 * np.pi)
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0).astype(np.float32)
        return ((1 - blend) * scaled + blend * plain).tolist()


def rope_tables(xp: Backend, positions: Array, frequencies: np.ndarray, dtype: str) -> tuple[Array, Array]:
    """cos and sin for positions (B, T): two arrays (B, 1, T, h / 2). Angles in float32, tables in `dtype`."""
    angles = xp.cast(positions, "float32")[:, None, :, None] * xp.array(frequencies)
    return xp.cast(xp.cos(angles), dtype), xp.cast(xp.sin(angles), dtype)


ACTIVATIONS = {
    "gelu_pytorch_tanh": lambda xp, x: xp.gelu(x, approximate=True),
    "gelu_new": lambda xp, x: xp.gelu(x, approximate=True),
    "gelu_fast": lambda xp, x: xp.gelu(x, approximate=True),
    "gelu": lambda xp, x: xp.gelu(x),
    "gelu_python": lambda xp, x: xp.gelu(x),
    "quick_gelu": lambda xp, x: x * xp.sigmoid(1.702 * x),
    "relu": lambda xp, x: xp.maximum(x, 0.0),
    "silu": lambda xp, x: xp.silu(x),
    "swish": lambda xp, x: xp.silu(x),
}
