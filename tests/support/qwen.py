"""Qwen 2, 2.5 and 3, written by docs/add-a-family.md alone: the proof that the guide is complete. No part of modelhub yet.

Qwen 2: arXiv:2407.10671. Qwen 3: arXiv:2505.09388.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from modelhub.core import decoder, nn
from modelhub.core.backends.base import Array, Backend
from modelhub.core.decoder import GLOBAL, LOCAL
from modelhub.core.tree import Module
from modelhub.families.config import FLAG, NUMBER, TEXT, Kind, key
from modelhub.families.config import names as names
from modelhub.families.gguf import GGUF
from modelhub.families.naming import BARE_DECODER, NameMap
from modelhub.families.text import HuggingFace, TextConfig

_QWEN2 = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096,
}  # fmt: skip


class QwenGGUF(GGUF):
    keys: ClassVar = {}  # llama.cpp's Qwen has no window


@dataclass
class Config(TextConfig):
    MEMBER: ClassVar = "a Qwen"
    KINDS: ClassVar = {
        "qwen2": Kind("Qwen2ForCausalLM", _QWEN2, lacks=("attention_bias",)),
        "qwen3": Kind("Qwen3ForCausalLM", _QWEN2 | {"head_dim": 128}),
    }
    FORMATS: ClassVar = {"hf": HuggingFace(), "gguf": QwenGGUF()}

    hidden_act: str = key(TEXT, "silu")
    use_sliding_window: bool = key(FLAG, False)
    max_window_layers: int = key(NUMBER, 28)

    def checked(self, where: str) -> None:
        if not self.use_sliding_window:
            self.sliding_window = None
        super().checked(where)

    def default_layer_types(self) -> list[str]:
        first = self.max_window_layers if self.sliding_window else self.num_hidden_layers
        return [LOCAL if index >= first else GLOBAL for index in range(self.num_hidden_layers)]


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
        def norm(width: int = cfg.hidden_size) -> nn.RMSNorm:
            return nn.RMSNorm.abstract(width, cfg.rms_norm_eps)

        newer = cfg.model_type == "qwen3"
        attention = decoder.Attention.abstract(
            cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, kind=kind,
            bias=cfg.attention_bias or not newer, q_norm=norm(cfg.head_dim) if newer else None,
            k_norm=norm(cfg.head_dim) if newer else None,
        )  # fmt: skip
        if not newer:  # biases for queries, keys and values only
            attention.o_proj = nn.Linear.abstract(cfg.num_attention_heads * cfg.head_dim, cfg.hidden_size)
        return cls(
            norm(), attention, norm(), decoder.GatedMLP.abstract(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)
        )

    def __call__(self, xp: Backend, x: Array, context: decoder.Context, layer: int) -> Array:
        x = x + self.self_attn(xp, self.input_layernorm(xp, x), context, layer)
        return x + self.mlp(xp, self.post_attention_layernorm(xp, x))


@dataclass
class Model(decoder.CausalModel):
    block: ClassVar[Any] = Block
