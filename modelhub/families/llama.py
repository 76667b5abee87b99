"""Llama 2, 3, 3.1, 3.2, SmolLM2 and Mistral.

Llama 2: arXiv:2307.09288. Llama 3: arXiv:2407.21783. Mistral: arXiv:2310.06825.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from modelhub.core import decoder, nn
from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Module
from modelhub.families import kerashub
from modelhub.families.config import FLAG, TEXT, Kind, key
from modelhub.families.config import names as names
from modelhub.families.gguf import CONTEXT, GGUF, GGUFLike
from modelhub.families.naming import BARE_DECODER, KEEP, NameMap, Via
from modelhub.families.text import HuggingFace, TextConfig

_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip
_MISTRAL = _LLAMA | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip


class LlamaGGUF(GGUF):
    archs: ClassVar = {"mistral": "llama"}
    biases = llama3 = True

    def kind(self, arch: str, file: GGUFLike) -> str:
        return "mistral" if "llama.attention.sliding_window" in file.metadata else "llama"

    def fields(self, kind: Kind, file: GGUFLike, values: dict[str, Any]) -> dict[str, Any]:
        biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
        return super().fields(kind, file, values) | {field: name in file.tensors for field, name in biases.items()}

    def metadata(self, config: Any, arch: str) -> dict[str, Any]:
        """llama.cpp knows Mistral's window by no other name than the context: longer texts would go without it."""
        data = super().metadata(config, arch)
        if config.sliding_window:
            data["llama.context_length"] = min(config.sliding_window, config.max_position_embeddings)
            data[CONTEXT] = config.max_position_embeddings
        return data

    def via(self, config: Any, ours: str) -> Via:
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        return _interleaved(heads[ours]) if ours in heads else KEEP


def _interleaved(heads: int) -> Via:
    """llama.cpp rotates neighbouring channels where Hugging Face rotates halves: its q and k rows are permuted."""

    def to_ours(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2)).reshape(x.shape)

    def to_theirs(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2)).reshape(x.shape)

    return Via(to_ours, to_theirs, rows_alone=True)


@dataclass
class Config(TextConfig):
    MEMBER: ClassVar = "a Llama"
    KINDS: ClassVar = {
        "llama": Kind("LlamaForCausalLM", _LLAMA, lacks=("sliding_window", "layer_types")),
        "mistral": Kind("MistralForCausalLM", _MISTRAL, lacks=("attention_bias", "mlp_bias", "layer_types")),
    }
    FORMATS: ClassVar = {
        # SmolLM2's configs have these; transformers reads neither.
        "hf": HuggingFace(only={"rope_interleaved": (False,), "is_llama_config": (True, False)}),
        "gguf": LlamaGGUF(),
        "keras": kerashub.LlamaKeras(),
    }

    hidden_act: str = key(TEXT, "silu")
    mlp_bias: bool = key(FLAG, False)


def adapter_names(config: Config, part_of: str | None) -> NameMap:
    """How PEFT's files call the layers."""
    return NameMap(aliases=BARE_DECODER)


@dataclass
class Block(Module):
    input_layernorm: nn.RMSNorm
    self_attn: decoder.Attention
    post_attention_layernorm: nn.RMSNorm
    mlp: decoder.GatedMLP

    @classmethod
    def abstract(cls, cfg: Config, kind: str) -> "Block":
        return cls(
            nn.RMSNorm.abstract(cfg.hidden_size, cfg.rms_norm_eps),
            decoder.Attention.abstract(
                cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, kind=kind,
                bias=cfg.attention_bias,
            ),
            nn.RMSNorm.abstract(cfg.hidden_size, cfg.rms_norm_eps),
            decoder.GatedMLP.abstract(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, cfg.mlp_bias),
        )  # fmt: skip

    def __call__(self, xp: Backend, x: Array, context: decoder.Context, layer: int) -> Array:
        x = x + self.self_attn(xp, self.input_layernorm(xp, x), context, layer)
        return x + self.mlp(xp, self.post_attention_layernorm(xp, x))


@dataclass
class Model(decoder.CausalModel):
    block = Block
