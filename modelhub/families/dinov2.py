"""DINOv2, with and without registers.

DINOv2: arXiv:2304.07193. Registers: arXiv:2309.16588.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from modelhub.core import nn, vision
from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Module, Spec
from modelhub.core.vision import Collected, Dropout
from modelhub.errors import ConfigError
from modelhub.families.naming import NameMap, Rule
from modelhub.families.vit import ImageConfig


@dataclass
class Config(ImageConfig):
    """mlp_ratio: inner width of the MLP over hidden_size; SwiGLU takes two thirds of it, rounded up to a multiple of 8.

    layerscale_value: where layer scales start. drop_path_rate: of blocks left out, per image, while training.
    """

    KINDS: ClassVar = {"dinov2": {"patch_size": 14}, "dinov2_with_registers": {"num_register_tokens": 4}}
    RATES: ClassVar = (*ImageConfig.RATES, "drop_path_rate")

    layer_norm_eps: float = 1e-6
    pooling: str = "cls_mean"
    mlp_ratio: float = 4
    layerscale_value: float = 1.0
    drop_path_rate: float = 0.0
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True
    num_register_tokens: int = 0

    def problems(self) -> list[str]:
        found = super().problems()
        for key in ("mlp_ratio", "layerscale_value"):
            value = getattr(self, key)
            if type(value) not in (int, float) or not 0 < value < 1e4:
                found.append(f"{key}={value!r} must be a number above 0 and below 10000")
        registers = self.num_register_tokens
        if type(registers) is not int or (not 0 < registers < 1e4 if self._registers else registers):
            found.append(f"num_register_tokens={registers!r} must be 1 or more with registers, 0 for model_type dinov2")
        if not self.class_token or (self._registers and not self.use_mask_token):
            found.append("class_token must be true; with registers use_mask_token too")
        return found

    def to_hf(self) -> dict[str, Any]:
        data = super().to_hf()
        del data["use_mask_token" if self._registers else "num_register_tokens"]
        return data

    @property
    def _registers(self) -> bool:
        return self.model_type == "dinov2_with_registers"

    @property
    def architecture(self) -> str:
        name = "Dinov2WithRegisters" if self._registers else "Dinov2"
        return f"{name}{'ForImageClassification' if self.num_labels else 'Model'}"

    @property
    def tokens_before(self) -> int:
        return 1 + self.num_register_tokens

    @property
    def intermediate_size(self) -> int:
        inner = int(self.hidden_size * self.mlp_ratio)
        return (int(inner * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else inner


# transformers 5 has other names in memory than in files, where they are still those of transformers 4. There it also
# has SwiGLU's weights_in in two parts.
_IN_MEMORY = {
    "q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "output.dense",
}  # fmt: skip


def names(source: str, config: Config) -> NameMap:
    """How the tensors of a "hf" folder are called here: with or without the prefix that models with a head have."""
    if source != "hf":
        raise ConfigError(f"{config.model_type} is read from Hugging Face folders, not from {source!r} files")
    prefix = config.model_type
    layer = "encoder.layer.{}.attention"
    rules = [
        Rule(f"{start}{layer}.{theirs}.{{}}", f"{prefix}.{layer}.{ours}.{{}}")
        for start in (f"{prefix}.", "")
        for theirs, ours in _IN_MEMORY.items()
    ]
    rules += [Rule(f"{part}.{{}}", f"{prefix}.{part}.{{}}") for part in ("embeddings", "encoder", "layernorm")]
    unused = () if config.use_mask_token else ("embeddings.mask_token", f"{prefix}.embeddings.mask_token")
    return NameMap(aliases=tuple(rules), ignored=unused)


def adapter_names(config: Config, part_of: str | None) -> NameMap:
    """How PEFT's files call the layers: as transformers does in memory; an encoder without a head has no prefix."""
    layer, prefix = "encoder.layer.{}.attention", f"{config.model_type}."
    older = Rule("encoder.{}", f"{prefix}encoder.{{}}")
    with_head, bare = (
        tuple(Rule(f"{start}{layer}.{theirs}", f"{prefix}{layer}.{ours}") for theirs, ours in _IN_MEMORY.items())
        for start in (prefix, "")
    )
    return NameMap(with_head if config.num_labels else (*bare, older), (*with_head, *bare, older))


@dataclass
class LayerScale(Module):
    """Touvron et al. 2021, arXiv:2103.17239."""

    lambda1: Any  # (D,)


@dataclass
class MLP(Module):
    fc1: nn.Linear
    fc2: nn.Linear
    activation: str

    def __call__(self, xp: Backend, x: Array) -> Array:
        return self.fc2(xp, nn.ACTIVATIONS[self.activation](xp, self.fc1(xp, x)))


@dataclass
class SwiGLU(Module):
    """Shazeer 2020, arXiv:2002.05202; gate and input in one product."""

    weights_in: nn.Linear
    weights_out: nn.Linear

    def __call__(self, xp: Backend, x: Array) -> Array:
        gate, y = xp.split(self.weights_in(xp, x), 2, axis=-1)
        return self.weights_out(xp, xp.silu(gate) * y)


@dataclass
class Block(Module):
    norm1: nn.LayerNorm
    attention: vision.Attention
    layer_scale1: LayerScale
    norm2: nn.LayerNorm
    mlp: MLP | SwiGLU
    layer_scale2: LayerScale
    drop_paths: tuple[Dropout, Dropout]  # of attention and of the MLP

    @classmethod
    def abstract(cls, cfg: Config, index: int) -> "Block":
        width, inner = cfg.hidden_size, cfg.intermediate_size
        weights = Dropout.at(f"attention weights {index}", cfg.attention_probs_dropout_prob)
        of_attention, of_mlp = (Dropout.at(f"path {part} {index}", cfg.drop_path_rate) for part in ("attention", "mlp"))
        scale = Spec((width,), "constant", cfg.layerscale_value)
        out = nn.Linear.abstract(inner, width, True)
        return cls(
            nn.LayerNorm.abstract(width, cfg.layer_norm_eps),
            vision.Attention.abstract(width, cfg.num_attention_heads, cfg.qkv_bias, weights),
            LayerScale(scale),
            nn.LayerNorm.abstract(width, cfg.layer_norm_eps),
            SwiGLU(nn.Linear.abstract(width, 2 * inner, True), out)
            if cfg.use_swiglu_ffn
            else MLP(nn.Linear.abstract(width, inner, True), out, cfg.hidden_act),
            LayerScale(scale),
            (of_attention, of_mlp),
        )

    def __call__(self, xp: Backend, x: Array, collected: Collected | None) -> Array:
        of_attention, of_mlp = self.drop_paths
        y = self.attention(xp, self.norm1(xp, x), collected)
        x = x + of_attention.rows(xp, xp.times(y, self.layer_scale1.lambda1))
        y = self.mlp(xp, self.norm2(xp, x))
        return x + of_mlp.rows(xp, xp.times(y, self.layer_scale2.lambda1))


@dataclass
class Model(vision.ImageModel):
    dinov2: vision.Encoder | None
    dinov2_with_registers: vision.Encoder | None

    @classmethod
    def abstract(cls, cfg: Config) -> "Model":
        registers = cfg.model_type == "dinov2_with_registers"
        encoder = vision.Encoder(
            vision.Embeddings.abstract(
                cfg.hidden_size, cfg.grid, cfg.patch, cfg.num_channels, mask_token=cfg.use_mask_token,
                registers=cfg.num_register_tokens, antialias=registers, dropout=cfg.hidden_dropout_prob,
            ),
            vision.Blocks([Block.abstract(cfg, index) for index in range(cfg.num_hidden_layers)]),
            nn.LayerNorm.abstract(cfg.hidden_size, cfg.layer_norm_eps),
        )  # fmt: skip
        head = nn.Linear.abstract(cfg.pooled_size, cfg.num_labels, True) if cfg.num_labels else None
        return cls(head, cfg, None if registers else encoder, encoder if registers else None)
