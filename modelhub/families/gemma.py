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
from modelhub.families.text import HuggingFace, TextConfig

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
        if not values.get("layer_types"):
            pattern = data.get("sliding_window_pattern")
            values["layer_types"] = _layer_types(values["model_type"], values["num_hidden_layers"], pattern)
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

    keys: ClassVar = {key: key for key in _CAPS} | {"sliding_window": "attention.sliding_window"}

    def arch(self, config: Any) -> str:
        return str(config.model_type).removesuffix("_text")

    def kind(self, arch: str, file: GGUFLike) -> str:
        return "gemma3_text" if arch == "gemma3" else arch

    def own_keys(self, kind: str) -> set[str]:
        more = {"attention.sliding_window_pattern"} | ({"rope.freq_base_swa"} if kind == "gemma3_text" else set())
        return set() if kind == "gemma" else super().own_keys(kind) | more

    def fields(self, kind: str, file: GGUFLike, values: dict[str, Any]) -> dict[str, Any]:
        arch, layers = file.metadata["general.architecture"], values["num_hidden_layers"]
        pattern = file.metadata.get(f"{arch}.attention.sliding_window_pattern")
        found: dict[str, Any] = {"local_rope": values["rope"], "layer_types": _layer_types(kind, layers, pattern)}
        if kind != "gemma":
            found |= {key: Config.KINDS[kind].defaults[key] for key in self.keys} | super().fields(kind, file, values)
            found["query_pre_attn_scalar"] = _query_scalar(
                kind, layers, values["hidden_size"], values["num_attention_heads"], values["head_dim"]
            )
        if kind == "gemma3_text":
            found["local_rope"] = nn.Rope(file.metadata.get(f"{arch}.rope.freq_base_swa", 10_000.0))
        return found

    def needs(self, config: Any) -> dict[str, bool]:
        kind, act, layers = config.model_type, config.hidden_activation, config.num_hidden_layers
        scalar = _query_scalar(kind, layers, config.hidden_size, config.num_attention_heads, config.head_dim)
        capped = [getattr(config, key) is not None for key in _CAPS]
        return {
            f"the activation gelu_pytorch_tanh, not {act}": act in ("gelu_pytorch_tanh", "gelu_new"),
            f"queries scaled by 1 / sqrt({scalar}), not {config.query_scale:.6g}": config.query_scale == scalar**-0.5,
            "no biases": not config.attention_bias,
            "the embedding as its head": kind == "gemma3_text" or config.tie_word_embeddings,
            "both soft caps": kind != "gemma2" or all(capped),
            "no soft cap of attention": kind == "gemma2" or not capped[0],
            "no soft cap of logits": kind != "gemma" or not capped[1],
            "only global layers": kind != "gemma" or LOCAL not in config.layer_types,
            "no Llama 3 rope in local layers": config.local_rope.rope_type != "llama3",
            "no rope scaling in local layers": kind != "gemma3_text" or config.local_rope.rope_type == "default",
        }

    def metadata(self, config: Any, arch: str) -> dict[str, Any]:
        data, types = super().metadata(config, arch), config.layer_types
        if LOCAL not in types:
            data.pop(f"{arch}.attention.sliding_window", None)
        if types != _layer_types(config.model_type, len(types), None):
            data[f"{arch}.attention.sliding_window_pattern"] = [kind == LOCAL for kind in types]
        if config.model_type == "gemma3_text":
            data[f"{arch}.rope.freq_base_swa"] = float(config.local_rope.theta)
        return data

    def block(self, config: Any) -> Mapping[str, str]:
        after = {name: f"post_{part}_layernorm" for name, part in _NORMS_AFTER.items()}
        return BLOCK if config.model_type == "gemma" else BLOCK | after | {"ffn_norm": "pre_feedforward_layernorm"}

    def via(self, config: Any, ours: str) -> Via:
        return MINUS_ONE if "norm" in ours else KEEP


_NORMS_AFTER = {"post_attention_norm": "attention", "post_ffw_norm": "feedforward"}


def _query_scalar(kind: str, layers: int, width: int, heads: int, head_dim: int) -> int:
    """The 27B models scale queries by the mean head width, not the real one; GGUF has no key for it."""
    return width // heads if (kind, layers) in (("gemma2", 46), ("gemma3_text", 62)) else head_dim


def _layer_types(kind: str, layers: int, pattern: Any) -> list[str]:
    """pattern: every n-th layer is global, or one truth value per layer, whether it is local."""
    if isinstance(pattern, np.ndarray):
        return [LOCAL if is_local else GLOBAL for is_local in pattern]
    every = {"gemma": 1, "gemma2": 2, "gemma3_text": pattern if isinstance(pattern, int) else 6}[kind]
    return [LOCAL if (index + 1) % every else GLOBAL for index in range(layers)]


_IGNORED = ("vision_tower.{}", "multi_modal_projector.{}", "model.vision_tower.{}", "model.multi_modal_projector.{}")


@dataclass
class Config(TextConfig):
    """rope: of global layers, local_rope: of local ones."""

    MEMBER: ClassVar = "a Gemma"
    ACTIVATION: ClassVar = "hidden_activation"
    KINDS: ClassVar = {
        "gemma": Kind("GemmaForCausalLM", _GEMMA, ("sliding_window", "layer_types", "query_pre_attn_scalar", *_CAPS)),
        "gemma2": Kind("Gemma2ForCausalLM", _GEMMA2),
        "gemma3_text": Kind("Gemma3ForCausalLM", _GEMMA3),
    }  # fmt: skip
    FORMATS: ClassVar = {
        "hf": GemmaHF(
            aliases=(
                Rule("language_model.model.{}", "model.{}"), Rule("model.language_model.{}", "model.{}"),
                Rule("language_model.lm_head.weight", "lm_head.weight"),
            ),
            ignored=_IGNORED,
        ),
        "gguf": GemmaGGUF(),
        "keras": kerashub.GEMMA,
    }  # fmt: skip

    hidden_activation: str = key(TEXT, "gelu_pytorch_tanh")
    tie_word_embeddings: bool = key(FLAG, True)
    local_rope: nn.Rope = nn.Rope()
    query_pre_attn_scalar: float | None = key(POSITIVE, None)
    attn_logit_softcapping: float | None = key(POSITIVE, None)
    final_logit_softcapping: float | None = key(POSITIVE, None)

    @property
    def query_scale(self) -> float:
        return float(self.query_pre_attn_scalar or self.head_dim) ** -0.5

    def rope_of(self, kind: str) -> nn.Rope:
        return self.local_rope if kind == LOCAL else self.rope


def adapter_names(config: Config, part_of: str | None) -> NameMap:
    """How PEFT's files call the layers: in multimodal Gemma 3 they sit deeper, elsewhere before transformers 4.52."""
    deeper = Rule("model.language_model.{}", "model.{}")
    older = Rule("language_model.model.{}", "model.{}"), Rule("language_model.lm_head", "lm_head")
    bare = tuple(Rule(f"language_model.{rule.theirs}", rule.ours) for rule in BARE_DECODER)
    return NameMap((deeper,) if part_of else (), (deeper, *older, *bare, *BARE_DECODER), _IGNORED)


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
