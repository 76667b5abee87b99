"""What image encoders share: patches, position embeddings for any image size, attention over all tokens, pooling.

The vision transformer: Dosovitskiy et al. 2020, arXiv:2010.11929. Letters in shape comments besides those of
core/backends/base.py: C channels; T tokens, those of the patches after the few that stand before them.
"""

import zlib
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from modelhub.core.backends.base import Array, Backend
from modelhub.core.nn import LayerNorm, Linear
from modelhub.core.tree import Module, Spec
from modelhub.errors import ConfigError, InputError

POOLINGS = ("cls", "mean", "cls_mean", "none")
Collected = dict[str, list[Array]]


@dataclass(frozen=True)
class Dropout:
    """rate: of values, while training; salt: which of the model's streams of random numbers is this place's."""

    rate: float
    salt: int

    @classmethod
    def at(cls, place: str, rate: float) -> "Dropout":
        return cls(rate, zlib.crc32(place.encode()) >> 1)

    def __call__(self, xp: Backend, x: Array) -> Array:
        return xp.dropout(x, self.rate, self.salt)

    def rows(self, xp: Backend, x: Array) -> Array:
        """x (B, T, D) with whole rows dropped: stochastic depth (Huang et al. 2016, arXiv:1603.09382)."""
        if not self.rate or xp.dropout_keys is None:
            return x
        return x * self(xp, xp.full((xp.shape(x)[0], 1, 1), 1.0, xp.dtype(x)))


_CLASSIFIER = Dropout.at("classifier", 0.0)


def bicubic(old: int, new: int, antialias: bool) -> np.ndarray:
    """(new, old) float32: the matrix that resizes an axis as torch's interpolate(mode="bicubic") does.

    Keys 1981, "Cubic convolution interpolation for digital image processing". Like torch: a = -0.75 and the borders
    repeated; with antialias a = -0.5, the kernel stretched when shrinking, and cut off at the borders.
    """
    scale = old / new
    a, stretch = (-0.5, max(scale, 1.0)) if antialias else (-0.75, 1.0)
    centre = (np.arange(new) + 0.5) * scale - 0.5
    reach = int(np.ceil(2 * stretch)) + 1
    taps = np.floor(centre).astype(int)[:, None] + np.arange(-reach, reach + 1)
    x = np.abs(taps - centre[:, None]) / stretch
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    if antialias:
        weights = np.where((taps >= 0) & (taps < old), weights, 0.0)
        weights /= weights.sum(1, keepdims=True)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], taps.clip(0, old - 1)), weights)
    return matrix.astype(np.float32)


def resized(xp: Backend, table: Array, old: tuple[int, int], new: tuple[int, int], antialias: bool) -> Array:
    """Position embeddings (1, h * w, D) of a grid of patches, for a grid of another size; computed in float32."""
    if old == new:
        return table
    width = table.shape[-1]
    rows, columns = (xp.array(bicubic(*axis, antialias)) for axis in zip(old, new, strict=True))
    x = xp.matmul(rows, xp.reshape(xp.cast(table, "float32"), (old[0], old[1] * width)))
    x = xp.matmul(xp.broadcast_to(columns, (new[0], *columns.shape)), xp.reshape(x, (new[0], old[1], width)))
    return xp.cast(xp.reshape(x, (1, new[0] * new[1], width)), xp.dtype(table))


@dataclass
class Projection(Module):
    """The convolution from patches to tokens, weight (D, C, height, width): one product, as no patches overlap."""

    weight: Any
    bias: Any

    def __call__(self, xp: Backend, pixels: Array) -> Array:
        """(B, C, H, W) -> (B, patches, D). Raises InputError for images that this model cannot take."""
        width, channels, high, wide = self.weight.shape
        if len(pixels.shape) != 4 or pixels.shape[1] != channels:
            raise InputError(
                f"pixels must be (batch, {channels}, height, width), got {tuple(pixels.shape)}; the model takes images "
                f"of {channels} channels"
            )
        if None in pixels.shape[2:]:
            raise InputError(
                f"the function is being traced for pixels {tuple(pixels.shape)}: height and width must be known, as "
                f"position embeddings are resized for them; only the batch can be None"
            )
        batch, _, height, length = xp.shape(pixels)
        if not height or not length or height % high or length % wide:
            raise InputError(
                f"the image is {height} x {length} pixels, which patches of {high} x {wide} do not divide; resize or "
                f"crop it, for example to {max(1, height // high) * high} x {max(1, length // wide) * wide}"
            )
        rows, columns = height // high, length // wide
        x = xp.reshape(pixels, (batch, channels, rows, high, columns, wide))
        x = xp.reshape(xp.transpose(x, (0, 2, 4, 1, 3, 5)), (batch, rows * columns, channels * high * wide))
        return xp.linear(x, xp.reshape(self.weight, (width, channels * high * wide)), self.bias)


@dataclass
class PatchEmbeddings(Module):
    projection: Projection


@dataclass
class Embeddings(Module):
    """Patches as tokens with their positions, after the tokens that stand for the whole image.

    The class token and DeiT's distillation token have positions, DINOv2's registers have none. mask_token: only for
    pretraining; kept, as checkpoints have it. grid: patches of the images that the positions are for.
    """

    cls_token: Any  # (1, 1, D)
    mask_token: Any  # (1, D)
    distillation_token: Any  # (1, 1, D)
    register_tokens: Any  # (1, registers, D)
    position_embeddings: Any  # (1, tokens with a position, D)
    patch_embeddings: PatchEmbeddings
    grid: tuple[int, int]
    antialias: bool
    dropout: Dropout

    @classmethod
    def abstract(
        cls, cfg: Any, *, distillation_token: bool = False, mask_token: bool = False, registers: int = 0,
        antialias: bool = False,
    ) -> "Embeddings":  # fmt: skip
        width, grid = cfg.hidden_size, cfg.grid
        token = Spec((1, 1, width))
        tokens = grid[0] * grid[1] + cfg.class_token + distillation_token
        return cls(
            token if cfg.class_token else None,
            Spec((1, width), "zeros") if mask_token else None,
            token if distillation_token else None,
            Spec((1, registers, width)) if registers else None,
            Spec((1, tokens, width)),
            PatchEmbeddings(Projection(Spec((width, cfg.num_channels, *cfg.patch)), Spec((width,), "zeros"))),
            grid,
            antialias,
            Dropout.at("embeddings", cfg.hidden_dropout_prob),
        )

    def __call__(self, xp: Backend, pixels: Array) -> Array:
        projection = self.patch_embeddings.projection
        xp.expect(pixels=pixels, projection=projection.weight)
        x = projection(xp, pixels)
        (batch, _, width), (high, wide) = xp.shape(x), projection.weight.shape[2:]
        grid = (pixels.shape[2] // high, pixels.shape[3] // wide)
        before = [token for token in (self.cls_token, self.distillation_token) if token is not None]
        positions, dtype = self.position_embeddings, xp.dtype(x)
        count = len(before)
        patches = resized(xp, positions[:, count:], self.grid, grid, self.antialias)
        parts = [xp.plus(x, xp.cast(patches, dtype))]
        if before:
            special = xp.concat(before, 1) if count > 1 else before[0]
            if self.register_tokens is None:
                special = special + positions[:, :count]
            else:
                special = xp.concat([special + positions[:, :count], self.register_tokens], 1)
            parts.insert(0, xp.broadcast_to(xp.cast(special, dtype), (batch, special.shape[1], width)))
        return self.dropout(xp, xp.concat(parts, 1) if before else parts[0])


@dataclass
class SelfAttention(Module):
    query: Linear
    key: Linear
    value: Linear
    heads: int
    dropout: Dropout

    def __call__(self, xp: Backend, x: Array, collected: Collected | None) -> Array:
        batch, time, width = xp.shape(x)

        def heads(y: Array) -> Array:
            return xp.transpose(xp.reshape(y, (batch, time, self.heads, width // self.heads)), (0, 2, 1, 3))  # B H T h

        q, k, v = heads(self.query(xp, x)), heads(self.key(xp, x)), heads(self.value(xp, x))
        scale = (width // self.heads) ** -0.5
        if collected is None:
            y = xp.attention(q, k, v, None, scale, dropout=self.dropout.rate, salt=self.dropout.salt)
        else:
            scores = xp.cast(xp.matmul(q, xp.transpose(k, (0, 1, 3, 2))), "float32") * scale
            weights = xp.cast(xp.softmax(scores), xp.dtype(q))
            collected["attentions"].append(weights)
            y = xp.matmul(weights, v)
        return xp.reshape(xp.transpose(y, (0, 2, 1, 3)), (batch, time, width))


@dataclass
class Output(Module):
    dense: Linear


@dataclass
class Attention(Module):
    """Every token looks at every token."""

    attention: SelfAttention
    output: Output

    @classmethod
    def abstract(cls, cfg: Any, index: int) -> "Attention":
        """index: of the layer."""
        width, dropout = cfg.hidden_size, Dropout.at(f"attention weights {index}", cfg.attention_probs_dropout_prob)
        q, k, v = (Linear.abstract(width, width, cfg.qkv_bias) for _ in range(3))
        attention = SelfAttention(q, k, v, cfg.num_attention_heads, dropout)
        return cls(attention, Output(Linear.abstract(width, width, True)))

    def __call__(self, xp: Backend, x: Array, collected: Collected | None) -> Array:
        return self.output.dense(xp, self.attention(xp, x, collected))


@dataclass
class Blocks(Module):
    layer: list


@dataclass
class Encoder(Module):
    """Every block is called as block(xp, x, collected)."""

    embeddings: Embeddings
    encoder: Blocks
    layernorm: LayerNorm

    def __call__(self, xp: Backend, pixels: Array, collect: dict | None = None) -> Array:
        x = self.embeddings(xp, pixels)
        if collect is None:
            for block in self.encoder.layer:
                x = xp.block(block, xp, x, None)
            return self.layernorm(xp, x)
        hidden_states = collect.setdefault("hidden_states", [])
        collect.setdefault("attentions", [])
        hidden_states.append(x)
        for block in self.encoder.layer:
            x = block(xp, x, collect)
            hidden_states.append(x)
        return self.layernorm(xp, x)


def pool(xp: Backend, hidden: Array, pooling: str, before: int) -> Array:
    """One vector per image of hidden states (B, T, D), of which `before` tokens are no patches.

    "cls": the first token; "mean": of the patches, taken in float32; "cls_mean": both side by side, (B, 2 D); "none":
    hidden as it is.
    """
    if pooling == "none":
        return hidden
    if pooling == "cls":
        return hidden[:, 0]
    mean = xp.cast(xp.mean(xp.cast(hidden[:, before:], "float32"), axis=1), xp.dtype(hidden))
    return mean if pooling == "mean" else xp.concat([hidden[:, 0], mean], 1)


@dataclass
class ImageModel(Module):
    """An encoder, under the name that Hugging Face's checkpoints have for it (the model_type), and perhaps a head.

    config has what families/image.py's ImageConfig has. A family gives its `block`, built as block.abstract(config,
    index), a field for the encoder of each of its model_types, and its `embeddings`.
    """

    reads: ClassVar[str] = "images"
    block: ClassVar[Any] = None

    classifier: Linear | None
    config: Any

    @classmethod
    def embeddings(cls, cfg: Any) -> Embeddings:
        return Embeddings.abstract(cfg)

    @classmethod
    def abstract(cls, cfg: Any) -> Self:
        encoder = Encoder(
            cls.embeddings(cfg),
            Blocks([cls.block.abstract(cfg, index) for index in range(cfg.num_hidden_layers)]),
            LayerNorm.abstract(cfg.hidden_size, cfg.layer_norm_eps),
        )
        head = Linear.abstract(cfg.pooled_size, cfg.num_labels, True) if cfg.num_labels else None
        parts: dict[str, Any] = {"classifier": head, "config": cfg, cfg.model_type: encoder}
        return cls(**parts)

    def hidden(self, xp: Backend, pixels: Array) -> Array:
        """Hidden states (B, T, D) after the final norm, of pixels (B, C, H, W) in the model's dtype."""
        return self.encode(xp, pixels)

    def encode(self, xp: Backend, pixels: Array, collect: dict | None = None) -> Array:
        """Hidden states (B, T, D) after the final norm, of pixels (B, C, H, W) in the model's dtype.

        collect: gets "hidden_states", a list of (B, T, D) before the first block and after each; and "attentions", one
        (B, H, T, T) per block. Not for training: nothing is dropped from attention maps that are shown.
        Raises InputError for another number of channels, and for sizes that the patches do not divide.
        """
        encoder: Encoder = getattr(self, self.config.model_type)
        return encoder(xp, pixels, collect)

    def pooled(self, xp: Backend, hidden: Array) -> Array:
        """What the head sees of hidden states (B, T, D): (B, D) or (B, 2 D), by the config's pooling; see `pool`."""
        return pool(xp, hidden, self.config.pooling, self.config.tokens_before)

    def head(self, xp: Backend, pooled: Array) -> Array:
        """float32 logits (B, num_labels) of what `pooled` returns. Raises ConfigError for a model without a head."""
        return xp.cast(self._classify(xp, self._dropped(xp, pooled)), "float32")

    def logits(self, xp: Backend, hidden: Array) -> Array:
        """float32 logits (B, num_labels) of hidden states (B, T, D)."""
        return self.head(xp, self.pooled(xp, hidden))

    def _dropped(self, xp: Backend, pooled: Array) -> Array:
        return xp.dropout(pooled, self.config.classifier_dropout, _CLASSIFIER.salt)

    def _classify(self, xp: Backend, pooled: Array) -> Array:
        if self.classifier is None:
            raise ConfigError("this model has no classification head (num_labels is 0); load it with num_classes=...")
        return self.classifier(xp, pooled)
