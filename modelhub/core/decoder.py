"""What causal decoders share: masks, the cache of keys and values, attention, the gated MLP."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from modelhub.core.backends.base import Array, Backend
from modelhub.core.leaves import dtype_of
from modelhub.core.nn import ACTIVATIONS, Embedding, Linear, RMSNorm, rope_tables, together
from modelhub.core.tree import Module, Spec

LOCAL, GLOBAL = "sliding_attention", "full_attention"  # kinds of layers, as Hugging Face's layer_types call them


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
        keys = xp.expand_dims(xp.arange(xp.shape(cache.k[0])[2]), 0)
    else:
        order = keys = steps  # what a token may see depends on its place in the row, also where positions restart
        positions = steps if positions is None else positions
    return Context(
        rope={kind: rope_tables(xp, positions, angles, dtype) for kind, angles in frequencies.items()},
        mask={kind: causal_mask(order, keys, window, segments) for kind, window in windows.items()},
        cache=cache,
        start=start,
    )


@dataclass
class Attention(Module):
    """Causal self-attention with grouped queries, rotary positions, and norms on queries and keys where there are any.

    kind: LOCAL or GLOBAL, which mask and rope of the Context apply.
    """

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    kind: str
    head_dim: int
    scale: float
    softcap: float | None

    @classmethod
    def abstract(
        cls, width: int, heads: int, kv_heads: int, head_dim: int, *, kind: str = GLOBAL, bias: bool = False,
        scale: float | None = None, softcap: float | None = None, q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> "Attention":  # fmt: skip
        return cls(
            Linear.abstract(width, heads * head_dim, bias),
            Linear.abstract(width, kv_heads * head_dim, bias),
            Linear.abstract(width, kv_heads * head_dim, bias),
            Linear.abstract(heads * head_dim, width, bias),
            q_norm,
            k_norm,
            kind,
            head_dim,
            head_dim**-0.5 if scale is None else scale,
            softcap,
        )

    def __call__(self, xp: Backend, x: Array, context: Context, layer: int) -> Array:
        batch, time, _ = xp.shape(x)

        def heads(y: Array) -> Array:
            count = y.shape[-1] // self.head_dim
            return xp.transpose(xp.reshape(y, (batch, time, count, self.head_dim)), (0, 2, 1, 3))  # B H T h

        q, k, v = map(heads, together(xp, x, self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(xp, q), self.k_norm(xp, k)
        cos, sin = context.rope[self.kind]
        q, k = xp.rotate(q, cos, sin), xp.rotate(k, cos, sin)
        if context.cache is not None:
            k, v = context.cache.write(xp, layer, k, v, context.start)
        y = xp.attention(q, k, v, context.mask[self.kind], self.scale, self.softcap)
        return self.o_proj(xp, xp.reshape(xp.transpose(y, (0, 2, 1, 3)), (batch, time, q.shape[1] * self.head_dim)))


@dataclass
class GatedMLP(Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    activation: str

    @classmethod
    def abstract(cls, width: int, inner: int, activation: str, bias: bool = False) -> "GatedMLP":
        return cls(
            Linear.abstract(width, inner, bias),
            Linear.abstract(width, inner, bias),
            Linear.abstract(inner, width, bias),
            activation,
        )

    def __call__(self, xp: Backend, x: Array) -> Array:
        gate, up = together(xp, x, self.gate_proj, self.up_proj)
        return self.down_proj(xp, ACTIVATIONS[self.activation](xp, gate) * up)


def run_layers(xp: Backend, layers: Sequence, x: Array, context: Context) -> Array:
    """x (B, T, D) through all blocks, each called as layer(xp, x, context, index)."""
    for index, layer in enumerate(layers):
        x = xp.block(layer, xp, x, context, index)
    return x


@dataclass
class Decoder(Module):
    """Embeddings, blocks, a norm. config: see families/text.py's TextConfig."""

    embed_tokens: Embedding
    layers: list
    norm: RMSNorm
    config: Any

    def __call__(
        self, xp: Backend, ids: Array, start: Array | None = None, cache: KVCache | None = None,
        positions: Array | None = None, segments: Array | None = None,
    ) -> Array:  # fmt: skip
        """Hidden states (B, T, D) of ids (B, T); the other arguments are those of decoder_context."""
        xp.expect(ids=ids, embed_tokens=self.embed_tokens.weight)
        cfg, x = self.config, self.embed(xp, ids)
        dtype = dtype_of(self.embed_tokens.weight)
        context = decoder_context(
            xp, xp.shape(ids)[1], dtype, cfg.rope_frequencies(), cfg.windows(), start, cache, positions, segments
        )
        return xp.cast(self.norm(xp, run_layers(xp, self.layers, x, context)), dtype)

    def embed(self, xp: Backend, ids: Array) -> Array:
        """What the first block gets."""
        return self.embed_tokens(xp, ids)


@dataclass
class CausalModel(Module):
    """A decoder and its head; model has embed_tokens, layers and config.

    A family gives its `block`, built as block.abstract(config, kind of layer), and perhaps a `decoder` or an offset of
    the last norm; or it has an `abstract` of its own.
    """

    reads: ClassVar[str] = "text"
    block: ClassVar[Any] = None
    decoder: ClassVar[type[Decoder]] = Decoder
    norm_offset: ClassVar[float] = 0.0

    model: Any
    lm_head: Linear | None  # None: the embedding table is the head

    @classmethod
    def abstract(cls, cfg: Any) -> Self:
        return cls(
            cls.decoder(
                Embedding.abstract(cfg.vocab_size, cfg.hidden_size),
                [cls.block.abstract(cfg, kind) for kind in cfg.layer_types],
                RMSNorm.abstract(cfg.hidden_size, cfg.rms_norm_eps, cls.norm_offset),
                cfg,
            ),
            None if cfg.tie_word_embeddings else Linear.abstract(cfg.hidden_size, cfg.vocab_size),
        )

    def hidden(self, xp: Backend, ids: Array, **more: Array | None) -> Array:
        """Hidden states (B, T, D) after the final norm, of ids (B, T); more: positions and segments, both (B, T)."""
        return self.model(xp, ids, **more)

    @property
    def head_weight(self) -> Array:
        """(V, D)."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def softcap(self) -> float | None:
        """c where logits y become c * tanh(y / c) (Gemma 2)."""
        return getattr(self.model.config, "final_logit_softcapping", None)

    def logits(self, xp: Backend, hidden: Array) -> Array:
        """float32 logits (..., V) of hidden states (..., D)."""
        y = self.model.embed_tokens.unembed(xp, hidden) if self.lm_head is None else self.lm_head(xp, hidden)
        y = xp.cast(y, "float32")
        return xp.tanh(y / self.softcap) * self.softcap if self.softcap else y

    def new_cache(self, batch: int, slots: int) -> KVCache:
        cfg = self.model.config
        return KVCache.abstract(cfg.num_hidden_layers, batch, cfg.num_key_value_heads, slots, cfg.head_dim)
