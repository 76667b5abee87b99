"""Gemma 1, 2 and 3 (text), also the text tower of multimodal Gemma 3.

Gemma: arXiv:2403.08295. Gemma 2: arXiv:2408.00118. Gemma 3: arXiv:2503.19786.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from modelhub.core import decoder, nn
from modelhub.core.backends.base import Array, Backend
from modelhub.core.decoder import GLOBAL, LOCAL
from modelhub.core.tree import Module
from modelhub.errors import ConfigError
from modelhub.families import kerashub
from modelhub.families.config import (
    ROPE_KEYS,
    SIZES,
    GGUFLike,
    check_activation,
    check_keys,
    check_kinds,
    check_sizes,
    hf_rope,
    read_gguf,
    require,
    write_common,
    write_gguf,
    write_rope,
)
from modelhub.families.naming import BARE_DECODER, KEEP, MINUS_ONE, NameMap, Rule

# What a key is when config.json leaves it out: the defaults of transformers' config classes, which checkpoints rely on.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {
        "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 8192, "sliding_window": None,
    },
    "gemma2": {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256,
    },
    "gemma3_text": {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072, "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    },
}  # fmt: skip


_OPTIONAL = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
_READ_ELSEWHERE = {"hidden_act", "rope_local_base_freq", "sliding_window_pattern", "sliding_window_size"}
_SHARED_WITH_TEXT = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")


@dataclass
class Config:
    """Hugging Face's names and meanings, except `rope` (global layers) and `local_rope` (local layers)."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    sliding_window: int | None = None
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    rms_norm_eps: float = 1e-6
    rope: nn.Rope = nn.Rope()
    local_rope: nn.Rope = nn.Rope()
    attention_bias: bool = False
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    tie_word_embeddings: bool = True
    layer_types: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "Config":
        """From config.json, in the spelling of transformers 4 or 5. Raises ConfigError."""
        data = dict(data)
        check_kinds(data, "config.json")
        if data.get("model_type") == "gemma3":  # multimodal: the text tower is a config of its own
            shared = {key: data[key] for key in _SHARED_WITH_TEXT if key in data}
            data = shared | {"model_type": "gemma3_text"} | dict(data.get("text_config") or {})
            check_kinds(data, "text_config")
        kind = data.get("model_type")
        if kind not in _DEFAULTS:
            raise ConfigError(f"model_type {kind!r} is not a Gemma; this family reads gemma3, {', '.join(_DEFAULTS)}")
        where = f"{kind} config"
        known = set(cls.__dataclass_fields__) - {"extra", "rope", "local_rope"}
        extra = check_keys(data, known | ROPE_KEYS | _READ_ELSEWHERE, where)
        require(data, "use_bidirectional_attention", (False,), where)
        values = _DEFAULTS[kind] | {key: data[key] for key in known if data.get(key) is not None}
        # null switches these off; only an absent key means the default.
        values |= {key: None for key in _OPTIONAL if key in data and data[key] is None}
        require(data, "sliding_window_size", (values["sliding_window"],), where)  # Gemma 2 9B and 27B say it twice
        # The first Gemma configs said hidden_act "gelu" and meant its tanh form; transformers reads them so too.
        act = data.get("hidden_act") or "gelu_pytorch_tanh"
        act = data.get("hidden_activation") or ("gelu_pytorch_tanh" if act == "gelu" else act)
        values["hidden_activation"] = check_activation(act, where)
        check_sizes({"head_dim": cls.head_dim} | {key: values[key] for key in SIZES if key in values}, where)
        values |= _read_ropes(kind, data, where)
        if not values.get("layer_types"):
            values["layer_types"] = _layer_types(kind, values["num_hidden_layers"], data.get("sliding_window_pattern"))
        return cls(**values, extra=extra)._checked(where)

    @classmethod
    def from_gguf(cls, file: GGUFLike) -> "Config":
        """From a GGUF file's metadata. What the format leaves out follows llama.cpp's rules for these models."""
        metadata = file.metadata
        arch = metadata["general.architecture"]
        kind = "gemma3_text" if arch == "gemma3" else arch
        values = read_gguf(file, _GGUF_KEYS[kind])
        layers, heads = values["num_hidden_layers"], values["num_attention_heads"]
        if kind != "gemma":
            values["query_pre_attn_scalar"] = _gguf_query_scalar(
                arch, layers, values["hidden_size"], heads, values["head_dim"]
            )
            default = _DEFAULTS[kind]
            values["sliding_window"] = metadata.get(f"{arch}.attention.sliding_window", default["sliding_window"])
            for key in ("attn_logit_softcapping", "final_logit_softcapping"):
                values[key] = metadata.get(f"{arch}.{key}", default.get(key))
        if kind == "gemma3_text":
            values["local_rope"] = nn.Rope(metadata.get(f"{arch}.rope.freq_base_swa", 10_000.0))
        else:
            values["local_rope"] = values["rope"]
        pattern = metadata.get(f"{arch}.attention.sliding_window_pattern")
        types = _layer_types(kind, layers, pattern if isinstance(pattern, int) else None)
        if isinstance(pattern, np.ndarray):
            types = [LOCAL if is_local else GLOBAL for is_local in pattern]
        return cls(model_type=kind, layer_types=types, **values)._checked("GGUF metadata")

    def to_gguf(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """GGUF metadata, and tensors that are no parameters (none). ConfigError for what llama.cpp cannot do."""
        kind, arch = self.model_type, self.model_type.removesuffix("_text")
        scalar = _gguf_query_scalar(
            arch, self.num_hidden_layers, self.hidden_size, self.num_attention_heads, self.head_dim
        )
        capped = self.attn_logit_softcapping is not None, self.final_logit_softcapping is not None
        act, default = self.hidden_activation, _layer_types(kind, self.num_hidden_layers, None)
        problems = {
            f"the activation gelu_pytorch_tanh, not {act}": act not in ("gelu_pytorch_tanh", "gelu_new"),
            f"queries scaled by 1 / sqrt({scalar}), not {self.query_scale:.6g}": self.query_scale != scalar**-0.5,
            "no biases": self.attention_bias,
            "the embedding as its head": kind != "gemma3_text" and not self.tie_word_embeddings,
            "both soft caps": kind == "gemma2" and not all(capped),
            "no soft cap of attention": kind != "gemma2" and capped[0],
            "no soft cap of logits": kind == "gemma" and capped[1],
            "only global layers": kind == "gemma" and LOCAL in self.layer_types,
            "no Llama 3 rope": "llama3" in (self.rope.rope_type, self.local_rope.rope_type),
            "no rope scaling in local layers": kind == "gemma3_text" and self.local_rope.rope_type != "default",
        }
        data = write_gguf(self, arch, [text for text, found in problems.items() if found])
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if (cap := getattr(self, key)) is not None:
                data[f"{arch}.{key}"] = float(cap)
        if LOCAL in self.layer_types:
            data[f"{arch}.attention.sliding_window"] = self.sliding_window
        if self.layer_types != default:
            data[f"{arch}.attention.sliding_window_pattern"] = [kind == LOCAL for kind in self.layer_types]
        if kind == "gemma3_text":
            data[f"{arch}.rope.freq_base_swa"] = float(self.local_rope.theta)
        return data, {}

    @classmethod
    def from_keras(cls, data: Mapping[str, Any], tensors: Container[str] | None = None) -> "Config":
        """From the config.json of a KerasHub preset; tensors as for Llama, and not needed here. Raises ConfigError."""
        return cls(**kerashub.read_gemma(data))._checked("KerasHub config")

    def to_hf(self) -> dict[str, Any]:
        """config.json with the keys of transformers 4 and of transformers 5 side by side: either reads its own."""
        data = write_common(self, _ARCHITECTURES[self.model_type])
        rope = write_rope(self.rope)
        data["rope_theta"] = self.rope.theta
        if self.rope.rope_type != "default":
            data["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        if self.model_type == "gemma3_text":
            data["rope_parameters"] = {GLOBAL: rope, LOCAL: write_rope(self.local_rope)}
            data["rope_local_base_freq"] = self.local_rope.theta
            first_global = self.layer_types.index(GLOBAL) if GLOBAL in self.layer_types else self.num_hidden_layers
            data["sliding_window_pattern"] = first_global + 1
            return data
        data["rope_parameters"] = rope
        if self.model_type == "gemma":
            data["hidden_act"] = self.hidden_activation
            for key in (*_OPTIONAL, "layer_types", "query_pre_attn_scalar"):
                del data[key]
        return data

    @property
    def query_scale(self) -> float:
        return float(self.query_pre_attn_scalar or self.head_dim) ** -0.5

    def rope_frequencies(self) -> dict[str, np.ndarray]:
        ropes = {GLOBAL: self.rope, LOCAL: self.local_rope}
        return {kind: ropes[kind].frequencies(self.head_dim) for kind in sorted(set(self.layer_types))}

    def windows(self) -> dict[str, int | None]:
        return {kind: self.sliding_window if kind == LOCAL else None for kind in sorted(set(self.layer_types))}

    def _checked(self, where: str) -> "Config":
        if len(self.layer_types) != self.num_hidden_layers or set(self.layer_types) - {LOCAL, GLOBAL}:
            raise ConfigError(
                f"{where}: layer_types must hold {self.num_hidden_layers} (num_hidden_layers) entries of {LOCAL!r} or "
                f"{GLOBAL!r}, got {self.layer_types!r:.200}"
            )
        if LOCAL in self.layer_types and not self.sliding_window:
            raise ConfigError(f"{where}: layers of type {LOCAL!r} need a sliding_window, got {self.sliding_window!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{where}: num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        return self


_ARCHITECTURES = {"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}


def _gguf_query_scalar(arch: str, layers: int, width: int, heads: int, head_dim: int) -> int:
    """The 27B models scale queries by the mean head width, not the real one; GGUF has no key for it."""
    return width // heads if (arch, layers) in (("gemma2", 46), ("gemma3", 62)) else head_dim


def _layer_types(kind: str, layers: int, pattern: Any) -> list[str]:
    every = {"gemma": 1, "gemma2": 2, "gemma3_text": pattern or 6}[kind]  # every n-th layer is global
    return [LOCAL if (index + 1) % every else GLOBAL for index in range(layers)]


def _read_ropes(kind: str, data: Mapping[str, Any], where: str) -> dict[str, nn.Rope]:
    parameters = data.get("rope_parameters") or {}
    if kind != "gemma3_text":
        rope = hf_rope(where, data, parameters, 10_000.0)
        return {"rope": rope, "local_rope": rope}
    if parameters and not {GLOBAL, LOCAL} & set(parameters):  # transformers reads nothing else
        raise ConfigError(
            f"{where}: rope_parameters must be an object with {GLOBAL} and {LOCAL}, found {parameters!r:.200}"
        )
    rope = hf_rope(where, data, parameters.get(GLOBAL), 1_000_000.0, merged=True)
    older = {"rope_theta": data.get("rope_local_base_freq")}
    return {"rope": rope, "local_rope": hf_rope(where, older, parameters.get(LOCAL), 10_000.0)}


_GGUF_KEYS: dict[str, set[str]] = {"gemma": set()}
_GGUF_KEYS["gemma2"] = {
    "attention.sliding_window", "attention.sliding_window_pattern", "attn_logit_softcapping", "final_logit_softcapping",
}  # fmt: skip
_GGUF_KEYS["gemma3_text"] = _GGUF_KEYS["gemma2"] | {"rope.freq_base_swa"}
_GGUF_BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
# The norm before the MLP has another name in Gemma 1, where none follows the attention.
_GGUF_NORMS = {"ffn_norm": "post_attention_layernorm"}
_GGUF_NORMS_2 = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


_IGNORED = (
    "vision_tower.{}", "multi_modal_projector.{}", "model.vision_tower.{}", "model.multi_modal_projector.{}",
    "{}.rotary_emb.inv_freq",
)  # fmt: skip


def names(source: str, config: Config) -> NameMap:
    """How the tensors of a "hf" folder, a "gguf" file or a "keras" preset are called here."""
    if source == "keras":
        return kerashub.gemma_names(config)
    if source == "hf":
        return NameMap(
            aliases=(
                Rule("language_model.model.{}", "model.{}"),
                Rule("model.language_model.{}", "model.{}"),
                Rule("language_model.lm_head.weight", "lm_head.weight"),
                # The backbone saved without its head.
                Rule("embed_tokens.weight", "model.embed_tokens.weight"),
                Rule("layers.{}", "model.layers.{}"),
                Rule("norm.weight", "model.norm.weight"),
            ),
            ignored=_IGNORED + (("{}lm_head.weight",) if config.tie_word_embeddings else ()),
        )
    block = _GGUF_BLOCK | (_GGUF_NORMS if config.model_type == "gemma" else _GGUF_NORMS_2)
    rules = [
        Rule("token_embd.weight", "model.embed_tokens.weight"),
        Rule("output_norm.weight", "model.norm.weight", MINUS_ONE),
        Rule("output.weight", "lm_head.weight"),
    ]
    for theirs, ours in block.items():
        rules.append(
            Rule(f"blk.{{}}.{theirs}.weight", f"model.layers.{{}}.{ours}.weight", MINUS_ONE if "norm" in ours else KEEP)
        )
    return NameMap(tuple(rules))


def adapter_names(config: Config, part_of: str | None) -> NameMap:
    """How PEFT's files call the layers: in multimodal Gemma 3 they sit deeper, elsewhere before transformers 4.52."""
    deeper = Rule("model.language_model.{}", "model.{}")
    older = Rule("language_model.model.{}", "model.{}"), Rule("language_model.lm_head", "lm_head")
    bare = tuple(Rule(f"language_model.{rule.theirs}", rule.ours) for rule in BARE_DECODER)
    images = tuple(name for name in _IGNORED if "vision" in name or "multi_modal" in name)
    return NameMap((deeper,) if part_of else (), (deeper, *older, *bare, *BARE_DECODER), images)


@dataclass
class Block(Module):
    input_layernorm: nn.RMSNorm
    self_attn: decoder.Attention
    post_attention_layernorm: nn.RMSNorm
    mlp: decoder.GatedMLP
    pre_feedforward_layernorm: nn.RMSNorm | None
    post_feedforward_layernorm: nn.RMSNorm | None

    @classmethod
    def abstract(cls, cfg: Config, kind: str) -> "Block":
        def norm() -> nn.RMSNorm:
            return nn.RMSNorm.abstract(cfg.hidden_size, cfg.rms_norm_eps, 1.0)

        def head_norm() -> nn.RMSNorm | None:
            return nn.RMSNorm.abstract(cfg.head_dim, cfg.rms_norm_eps, 1.0) if cfg.model_type == "gemma3_text" else None

        sandwich = cfg.model_type != "gemma"
        return cls(
            norm(),
            decoder.Attention.abstract(
                cfg.hidden_size,
                cfg.num_attention_heads,
                cfg.num_key_value_heads,
                cfg.head_dim,
                kind=kind,
                bias=cfg.attention_bias,
                scale=cfg.query_scale,
                softcap=cfg.attn_logit_softcapping,
                q_norm=head_norm(),
                k_norm=head_norm(),
            ),  # fmt: skip
            norm(),
            decoder.GatedMLP.abstract(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_activation),
            norm() if sandwich else None,
            norm() if sandwich else None,
        )

    def __call__(self, xp: Backend, x: Array, context: decoder.Context, layer: int) -> Array:
        y = self.self_attn(xp, self.input_layernorm(xp, x), context, layer)
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:  # Gemma 1
            x = x + y
            return x + self.mlp(xp, self.post_attention_layernorm(xp, x))
        x = x + self.post_attention_layernorm(xp, y)
        return x + self.post_feedforward_layernorm(xp, self.mlp(xp, self.pre_feedforward_layernorm(xp, x)))


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
        dtype = xp.dtype(x)
        x = x * _rounded(cfg.hidden_size**0.5, dtype)
        context = decoder.decoder_context(
            xp, xp.shape(ids)[1], dtype, cfg.rope_frequencies(), cfg.windows(), start, cache, positions, segments
        )
        return self.norm(xp, decoder.run_layers(xp, self.layers, x, context))


def _rounded(value: float, dtype: str) -> float:
    """The value as the model's dtype holds it: Gemma was trained with sqrt(D) rounded to bfloat16."""
    return float(np.asarray(value, np.float32).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))


_rounded._dynamo_marked_constant = True  # type: ignore[attr-defined] # torch.compiler.assume_constant_result


@dataclass
class Model(decoder.CausalModel):
    @classmethod
    def abstract(cls, cfg: Config) -> "Model":
        return cls(
            Decoder(
                nn.Embedding.abstract(cfg.vocab_size, cfg.hidden_size),
                [Block.abstract(cfg, kind) for kind in cfg.layer_types],
                nn.RMSNorm.abstract(cfg.hidden_size, cfg.rms_norm_eps, 1.0),
                cfg,
            ),
            None if cfg.tie_word_embeddings else nn.Linear.abstract(cfg.hidden_size, cfg.vocab_size),
        )
