"""Gemma 1, 2 and 3 (text), also the text tower of multimodal Gemma 3.

Gemma: arXiv:2403.08295. Gemma 2: arXiv:2408.00118. Gemma 3: arXiv:2503.19786.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from modelhub.core import decoder, nn
from modelhub.core.backends.base import Array, Backend
from modelhub.core.decoder import GLOBAL, LOCAL
from modelhub.core.tree import Module
from modelhub.errors import ConfigError
from modelhub.families import kerashub
from modelhub.families.config import FLAG, POSITIVE, TEXT, Kind, check_kinds, hf_rope, key, require, write_rope
from modelhub.families.config import names as names
from modelhub.families.gguf import BLOCK, GGUF, GGUFLike
from modelhub.families.naming import BARE_DECODER, KEEP, MINUS_ONE, NameMap, Rule, Via
from modelhub.families.text import HuggingFace, TextConfig, layer_types

_GEMMA = {
    "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192,
}  # fmt: skip
_GEMMA2 = _GEMMA | {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "sliding_window": 4096, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}  # fmt: skip
_GEMMA3 = _GEMMA2 | {
    "vocab_size": 262208, "max_position_embeddings": 131072, "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}  # fmt: skip
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_KINDS = {
    "gemma": Kind("GemmaForCausalLM", _GEMMA, ("sliding_window", "layer_types", "query_pre_attn_scalar", *_CAPS)),
    "gemma2": Kind("Gemma2ForCausalLM", _GEMMA2),
    "gemma3_text": Kind("Gemma3ForCausalLM", _GEMMA3),
}
_GLOBAL_EVERY = {"gemma": 1, "gemma2": 2, "gemma3_text": 6}
# Multimodal Gemma 3 has the decoder one level down; older files, and PEFT's, have it elsewhere again.
_DEEPER = Rule("model.language_model.{}", "model.{}")
_OLDER = (Rule("language_model.model.{}", "model.{}"), Rule("language_model.lm_head{}", "lm_head{}"))
_SHARED_WITH_TEXT = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")


class GemmaHF(HuggingFace):
    def reads_besides(self) -> set[str]:
        return {"hidden_act", "rope_local_base_freq", "sliding_window_pattern", "sliding_window_size"}

    def read(self, cls: Any, data: Mapping[str, Any]) -> dict[str, Any]:
        check_kinds(data, "config.json")
        if data.get("model_type") == "gemma3":  # multimodal; the text part lies one level down
            text = {"model_type": "gemma3_text"} | dict(data.get("text_config") or {})
            shared = {key: data[key] for key in _SHARED_WITH_TEXT if key in data and key not in text}
            data = shared | text
        # The first Gemma configs said hidden_act "gelu" and meant its tanh form; transformers reads them so too.
        act = data.get("hidden_act") or "gelu_pytorch_tanh"
        act = data.get("hidden_activation") or ("gelu_pytorch_tanh" if act == "gelu" else act)
        values = super().read(cls, dict(data) | {"hidden_activation": act})
        where = f"{values['model_type']} config"
        require(data, "sliding_window_size", (values.get("sliding_window"),), where)  # Gemma 2 9B and 27B say it twice
        if values["model_type"] == "gemma3_text" and (every := data.get("sliding_window_pattern")):
            values["layer_types"] = values.get("layer_types") or layer_types(values["num_hidden_layers"], every)
        return values

    def ropes(self, kind: str, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        if kind != "gemma3_text":
            rope = super().ropes(kind, data, where)["rope"]
            return {"rope": rope, "local_rope": rope}
        found = data.get("rope_parameters") or {}
        if found and not {GLOBAL, LOCAL} & set(found):  # transformers reads nothing else
            raise ConfigError(
                f"{where}: rope_parameters must be an object with {GLOBAL} and {LOCAL}, got {found!r:.200}"
            )
        rope = hf_rope(where, data, found.get(GLOBAL), 1_000_000.0, merged=True)
        older = {"rope_theta": data.get("rope_local_base_freq")}
        return {"rope": rope, "local_rope": hf_rope(where, older, found.get(LOCAL), 10_000.0)}

    def write(self, config: Any) -> dict[str, Any]:
        data = super().write(config)
        if config.model_type == "gemma":
            data["hidden_act"] = config.hidden_activation
        if config.model_type == "gemma3_text":
            types, local = config.layer_types, config.local_rope
            data["rope_parameters"] = {GLOBAL: data["rope_parameters"], LOCAL: write_rope(local)}
            data["rope_local_base_freq"] = local.theta
            data["sliding_window_pattern"] = (types.index(GLOBAL) if GLOBAL in types else len(types)) + 1
        return data


class GemmaGGUF(GGUF):
    """What the format leaves out follows llama.cpp's rules for these models."""

    archs: ClassVar = {"gemma3_text": "gemma3"}
    keys: ClassVar = {**GGUF.keys, **{cap: cap for cap in _CAPS}}
    activations = ("gelu_pytorch_tanh", "gelu_new")

    def own_keys(self, kind: Kind) -> dict[str, str]:
        return super().own_keys(kind) | ({"local_rope": "rope.freq_base_swa"} if kind is _KINDS["gemma3_text"] else {})

    def fields(self, kind: Kind, file: GGUFLike, values: dict[str, Any]) -> dict[str, Any]:
        found = {"local_rope": values["rope"]} | super().fields(kind, file, values)
        if kind is _KINDS["gemma3_text"]:
            found["local_rope"] = nn.Rope(found["local_rope"] or 10_000.0)
        scalar = {} if "query_pre_attn_scalar" in kind.lacks else {"query_pre_attn_scalar": _query_scalar(values)}
        return found | scalar

    def needs(self, config: Any) -> dict[str, bool]:
        kind, scalar = config.model_type, _query_scalar(vars(config))
        capped = [getattr(config, key) is not None for key in _CAPS]
        return super().needs(config) | {
            f"queries scaled by 1 / sqrt({scalar}), not {config.query_scale:.6g}": config.query_scale == scalar**-0.5,
            "the embedding as its head": kind == "gemma3_text" or config.tie_word_embeddings,
            "both soft caps": kind != "gemma2" or all(capped),
            "no soft cap of attention": kind == "gemma2" or not capped[0],
            "no soft cap of logits": kind != "gemma" or not capped[1],
            "no Llama 3 rope in local layers": config.local_rope.rope_type != "llama3",
            "no rope scaling in local layers": kind != "gemma3_text" or config.local_rope.rope_type == "default",
        }

    def metadata(self, config: Any, arch: str) -> dict[str, Any]:
        data = super().metadata(config, arch)
        return data | {key: float(rope.theta) for key, rope in data.items() if isinstance(rope, nn.Rope)}

    def block(self, config: Any) -> Mapping[str, str]:
        return BLOCK if config.model_type == "gemma" else _SANDWICH

    def via(self, config: Any, ours: str) -> Via:
        return MINUS_ONE if "norm" in ours else KEEP


_SANDWICH = BLOCK | {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def _query_scalar(values: Mapping[str, Any]) -> int:
    """The 27B models scale queries by the mean head width, not the real one; GGUF has no key for it."""
    is_27b = (values["model_type"], values["num_hidden_layers"]) in (("gemma2", 46), ("gemma3_text", 62))
    scalar: int = values["hidden_size"] // values["num_attention_heads"] if is_27b else values["head_dim"]
    return scalar


_IGNORED = ("vision_tower.{}", "multi_modal_projector.{}", "model.vision_tower.{}", "model.multi_modal_projector.{}")


@dataclass
class Config(TextConfig):
    """rope: of global layers, local_rope: of local ones."""

    MEMBER: ClassVar = "a Gemma"
    ACTIVATION: ClassVar = "hidden_activation"
    KINDS: ClassVar = _KINDS
    FORMATS: ClassVar = {
        "hf": GemmaHF(aliases=(*_OLDER, _DEEPER), ignored=_IGNORED),
        "gguf": GemmaGGUF(),
        "keras": kerashub.GemmaKeras(),
    }

    hidden_activation: str = key(TEXT, "gelu_pytorch_tanh")
    tie_word_embeddings: bool = key(FLAG, True)
    local_rope: nn.Rope = nn.Rope()
    query_pre_attn_scalar: float | None = key(POSITIVE, None)
    attn_logit_softcapping: float | None = key(POSITIVE, None)
    final_logit_softcapping: float | None = key(POSITIVE, None)

    @property
    def query_scale(self) -> float:
        return float(self.query_pre_attn_scalar or self.head_dim) ** -0.5

    def default_layer_types(self) -> list[str]:
        return layer_types(self.num_hidden_layers, _GLOBAL_EVERY[self.model_type])

    def rope_of(self, kind: str) -> nn.Rope:
        return self.local_rope if kind == LOCAL else self.rope


def adapter_names(config: Config, part_of: str | None) -> NameMap:
    """How PEFT's files call the layers: in multimodal Gemma 3 they sit deeper, elsewhere before transformers 4.52."""
    bare = tuple(Rule(f"language_model.{rule.theirs}", rule.ours) for rule in BARE_DECODER)
    return NameMap((_DEEPER,) if part_of else (), (_DEEPER, *_OLDER, *bare, *BARE_DECODER), _IGNORED)


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
        def norm(width: int = cfg.hidden_size) -> nn.RMSNorm:
            return nn.RMSNorm.abstract(width, cfg.rms_norm_eps, 1.0)

        sandwich, of_heads = cfg.model_type != "gemma", cfg.model_type == "gemma3_text"
        return cls(
            norm(),
            decoder.Attention.abstract(
                cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, kind=kind,
                bias=cfg.attention_bias, scale=cfg.query_scale, softcap=cfg.attn_logit_softcapping,
                q_norm=norm(cfg.head_dim) if of_heads else None, k_norm=norm(cfg.head_dim) if of_heads else None,
            ),
            norm(),
            decoder.GatedMLP.abstract(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_activation),
            norm() if sandwich else None,
            norm() if sandwich else None,
        )  # fmt: skip

    def __call__(self, xp: Backend, x: Array, context: decoder.Context, layer: int) -> Array:
        stream, dtype = xp.dtype(x), xp.dtype(self.input_layernorm.weight)

        def before(norm: nn.RMSNorm) -> Array:
            return xp.cast(norm(xp, x), dtype)

        y = xp.cast(self.self_attn(xp, before(self.input_layernorm), context, layer), stream)
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:  # Gemma 1
            x = x + y
            return x + xp.cast(self.mlp(xp, before(self.post_attention_layernorm)), stream)
        x = x + self.post_attention_layernorm(xp, y)
        y = xp.cast(self.mlp(xp, before(self.pre_feedforward_layernorm)), stream)
        return x + self.post_feedforward_layernorm(xp, y)


@dataclass
class Decoder(decoder.Decoder):
    def embed(self, xp: Backend, ids: Array) -> Array:
        x = self.embed_tokens(xp, ids)
        dtype = xp.dtype(x)
        x = x * _rounded(self.config.hidden_size**0.5, dtype)
        # What the layers add up to goes beyond 65504, where float16 ends (transformers issue 36822): only what is
        # between two norms is in float16.
        return xp.cast(x, "float32") if dtype == "float16" else x


def _rounded(value: float, dtype: str) -> float:
    """The value as the model's dtype holds it: Gemma was trained with sqrt(D) rounded to bfloat16."""
    return float(np.asarray(value, np.float32).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))


_rounded._dynamo_marked_constant = True  # type: ignore[attr-defined] # torch.compiler.assume_constant_result


@dataclass
class Model(decoder.CausalModel):
    block: ClassVar = Block
    decoder: ClassVar = Decoder
    norm_offset: ClassVar = 1.0
