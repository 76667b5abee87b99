"""Llama 2, 3, 3.1, 3.2, SmolLM2 and Mistral.

Llama 2: arXiv:2307.09288. Llama 3: arXiv:2407.21783. Mistral: arXiv:2310.06825.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelhub.core import decoder, nn
from modelhub.core.backends.base import Array, Backend
from modelhub.core.decoder import GLOBAL, LOCAL
from modelhub.core.tree import Module
from modelhub.errors import ConfigError
from modelhub.families import kerashub
from modelhub.families.config import (
    CONTEXT,
    ROPE_KEYS,
    SIZES,
    GGUFLike,
    check_activation,
    check_keys,
    check_sizes,
    gguf_rope_freqs,
    hf_rope,
    read_gguf,
    write_common,
    write_gguf,
    write_rope,
)
from modelhub.families.naming import BARE_DECODER, NameMap, Rule, Via

# What a key is when config.json leaves it out: the defaults of transformers' config classes, which checkpoints rely on.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 2048,
    },
    "mistral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
    },
}  # fmt: skip
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}


@dataclass
class Config:
    """Hugging Face's names and meanings, except `rope`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    sliding_window: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope: nn.Rope = nn.Rope()
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "Config":
        """From config.json, in the spelling of transformers 4 or 5. Raises ConfigError."""
        kind = data.get("model_type")
        if kind not in _DEFAULTS:
            raise ConfigError(f"model_type {kind!r} is not a Llama; this family reads {', '.join(_DEFAULTS)}")
        where = f"{kind} config"
        known = set(cls.__dataclass_fields__) - {"extra", "rope"}
        # SmolLM2's configs carry rope_interleaved=false and is_llama_config; transformers reads neither.
        extra = check_keys(data, known | ROPE_KEYS | {"is_llama_config"}, where, {"rope_interleaved": (False,)})
        values = _DEFAULTS[kind] | {key: data[key] for key in known if data.get(key) is not None}
        if kind == "llama" or ("sliding_window" in data and data["sliding_window"] is None):
            values["sliding_window"] = None
        check_sizes({key: values[key] for key in SIZES if key in values}, where)
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        check_sizes({"head_dim": values["head_dim"]}, where)
        check_activation(values.get("hidden_act", "silu"), where)
        rope = hf_rope(where, data, data.get("rope_parameters"), 10_000.0)
        return cls(**values, rope=rope, extra=extra)._checked(where)

    @classmethod
    def from_gguf(cls, file: GGUFLike) -> "Config":
        """From a GGUF file's metadata, where Mistral is a Llama too."""
        window = file.metadata.get("llama.attention.sliding_window")
        values = read_gguf(file, {"attention.sliding_window"})
        values |= {
            "attention_bias": "blk.0.attn_q.bias" in file.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        }
        return cls(model_type="mistral" if window else "llama", sliding_window=window, **values)._checked("GGUF")

    def to_gguf(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """GGUF metadata, and tensors that are no parameters. ConfigError for what llama.cpp cannot do.

        llama.cpp knows Mistral's sliding window by no other name than context_length: longer texts would be computed
        without it.
        """
        silu = self.hidden_act in ("silu", "swish")
        data = write_gguf(self, "llama", [] if silu else [f"the activation silu, not {self.hidden_act}"])
        if self.sliding_window:
            data["llama.attention.sliding_window"] = self.sliding_window
            data["llama.context_length"] = min(self.sliding_window, self.max_position_embeddings)
            data[CONTEXT] = self.max_position_embeddings
        return data, gguf_rope_freqs(self)

    @classmethod
    def from_keras(cls, data: Mapping[str, Any], tensors: Container[str] | None = None) -> "Config":
        """From the config.json of a KerasHub preset and the names in its weights, where known. Raises ConfigError."""
        return cls(**kerashub.read_llama(data, tensors))._checked("KerasHub config")

    def to_hf(self) -> dict[str, Any]:
        """config.json with the keys of transformers 4 and of transformers 5 side by side: either reads its own."""
        data = write_common(self, _ARCHITECTURES[self.model_type])
        rope = write_rope(self.rope)
        data |= {"rope_theta": self.rope.theta, "rope_parameters": rope}
        if self.rope.rope_type != "default":
            data["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        if self.model_type == "llama":
            del data["sliding_window"]
        else:
            del data["attention_bias"], data["mlp_bias"]
        return data

    def _checked(self, where: str) -> "Config":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{where}: num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        return self

    @property
    def kind(self) -> str:
        return LOCAL if self.sliding_window else GLOBAL


_GGUF_BLOCK = {
    "attn_norm": "input_layernorm", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def names(source: str, config: Config) -> NameMap:
    """How the tensors of a "hf" folder, a "gguf" file or a "keras" preset are called here."""
    if source == "keras":
        return kerashub.llama_names(config)
    if source == "hf":
        return NameMap(
            aliases=(  # the backbone saved without its head
                Rule("embed_tokens.weight", "model.embed_tokens.weight"),
                Rule("layers.{}", "model.layers.{}"),
                Rule("norm.weight", "model.norm.weight"),
            ),
            ignored=("{}.rotary_emb.inv_freq", *(("lm_head.weight",) if config.tie_word_embeddings else ())),
        )
    rules = [
        Rule("token_embd.weight", "model.embed_tokens.weight"),
        Rule("output_norm.weight", "model.norm.weight"),
        Rule("output.weight", "lm_head.weight"),
        Rule("blk.{}.attn_q.{}", "model.layers.{}.self_attn.q_proj.{}", _interleaved(config.num_attention_heads)),
        Rule("blk.{}.attn_k.{}", "model.layers.{}.self_attn.k_proj.{}", _interleaved(config.num_key_value_heads)),
    ]
    rules += [Rule(f"blk.{{}}.{theirs}.{{}}", f"model.layers.{{}}.{ours}.{{}}") for theirs, ours in _GGUF_BLOCK.items()]
    return NameMap(tuple(rules), ignored=("rope_freqs.weight",))


def adapter_names(config: Config, part_of: str | None) -> NameMap:
    """How PEFT's files call the layers."""
    return NameMap(aliases=BARE_DECODER)


def _interleaved(heads: int) -> Via:
    """llama.cpp rotates neighbouring channels where Hugging Face rotates halves: its q and k rows are permuted."""

    def to_ours(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2)).reshape(x.shape)

    def to_theirs(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2)).reshape(x.shape)

    return Via(to_ours, to_theirs)


@dataclass
class Block(Module):
    input_layernorm: nn.RMSNorm
    self_attn: decoder.Attention
    post_attention_layernorm: nn.RMSNorm
    mlp: decoder.GatedMLP

    @classmethod
    def abstract(cls, cfg: Config) -> "Block":
        return cls(
            nn.RMSNorm.abstract(cfg.hidden_size, cfg.rms_norm_eps),
            decoder.Attention.abstract(
                cfg.hidden_size,
                cfg.num_attention_heads,
                cfg.num_key_value_heads,
                cfg.head_dim,
                kind=cfg.kind,
                bias=cfg.attention_bias,
            ),  # fmt: skip
            nn.RMSNorm.abstract(cfg.hidden_size, cfg.rms_norm_eps),
            decoder.GatedMLP.abstract(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, cfg.mlp_bias),
        )

    def __call__(self, xp: Backend, x: Array, context: decoder.Context, layer: int) -> Array:
        x = x + self.self_attn(xp, self.input_layernorm(xp, x), context, layer)
        return x + self.mlp(xp, self.post_attention_layernorm(xp, x))


@dataclass
class Decoder(Module):
    embed_tokens: nn.Embedding
    layers: list
    norm: nn.RMSNorm
    config: Config

    def __call__(
        self, xp: Backend, ids: Array, start: Array | None = None, cache: decoder.KVCache | None = None,
        positions: Array | None = None, segments: Array | None = None,
    ) -> Array:  # fmt: skip
        """Hidden states (B, T, D) of ids (B, T); the other arguments are those of decoder.decoder_context."""
        xp.expect(ids=ids, embed_tokens=self.embed_tokens.weight)
        cfg = self.config
        x = self.embed_tokens(xp, ids)
        frequencies, windows = {cfg.kind: cfg.rope.frequencies(cfg.head_dim)}, {cfg.kind: cfg.sliding_window}
        context = decoder.decoder_context(
            xp, xp.shape(ids)[1], xp.dtype(x), frequencies, windows, start, cache, positions, segments
        )
        return self.norm(xp, decoder.run_layers(xp, self.layers, x, context))


@dataclass
class Model(decoder.CausalModel):
    @classmethod
    def abstract(cls, cfg: Config) -> "Model":
        return cls(
            Decoder(
                nn.Embedding.abstract(cfg.vocab_size, cfg.hidden_size),
                [Block.abstract(cfg) for _ in range(cfg.num_hidden_layers)],
                nn.RMSNorm.abstract(cfg.hidden_size, cfg.rms_norm_eps),
                cfg,
            ),
            None if cfg.tie_word_embeddings else nn.Linear.abstract(cfg.hidden_size, cfg.vocab_size),
        )
