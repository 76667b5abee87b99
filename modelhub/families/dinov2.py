"""DINOv2, with and without registers.

DINOv2: arXiv:2304.07193. Registers: arXiv:2309.16588.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from modelhub.core import nn, vision
from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Module, Spec
from modelhub.core.vision import Collected, Dropout
from modelhub.families.config import FLAG, RATE, TEXT, Kind, Value, key
from modelhub.families.config import names as names
from modelhub.families.image import EPSILON, HuggingFace, ImageConfig
from modelhub.families.image import adapter_names as adapter_names

_IN_MEMORY = {"mlp.down_proj": "mlp.weights_out"}
_APART = {"mlp.weights_in": ("mlp.gate_proj", "mlp.up_proj")}
_SCALE = Value("a number above 0 and below 10000", lambda x: type(x) in (int, float) and 0 < x < 1e4)
_COUNT = Value("a whole number from 0 to 9999", lambda x: type(x) is int and 0 <= x < 1e4)


class DINOv2HF(HuggingFace):
    def ignored(self, config: Any) -> tuple[str, ...]:
        return () if config.use_mask_token else ("embeddings.mask_token",)


@dataclass
class Config(ImageConfig):
    """mlp_ratio: inner width of the MLP over hidden_size; SwiGLU takes two thirds of it, rounded up to a multiple of 8.

    layerscale_value: where layer scales start. drop_path_rate: of blocks left out, per image, while training.
    """

    KINDS: ClassVar = {
        "dinov2": Kind("Dinov2", {"patch_size": 14}, lacks=("num_register_tokens",)),
        "dinov2_with_registers": Kind("Dinov2WithRegisters", {"num_register_tokens": 4}, lacks=("use_mask_token",)),
    }
    FORMATS: ClassVar = {"hf": DINOv2HF("encoder.layer", _IN_MEMORY, _APART)}

    layer_norm_eps: float = key(EPSILON, 1e-6)
    pooling: str = key(TEXT, "cls_mean")
    drop_path_rate: float = key(RATE, 0.0)
    mlp_ratio: float = key(_SCALE, 4)
    layerscale_value: float = key(_SCALE, 1.0)
    use_swiglu_ffn: bool = key(FLAG, False)
    use_mask_token: bool = key(FLAG, True)
    num_register_tokens: int = key(_COUNT, 0)

    def faults(self) -> dict[str, bool]:
        registers, count = self.model_type == "dinov2_with_registers", self.num_register_tokens
        counted, tokens = (count > 0) == registers, self.class_token and (self.use_mask_token or not registers)
        return super().faults() | {
            f"num_register_tokens={count} must be 1 or more with registers, 0 for model_type dinov2": not counted,
            "class_token must be true; with registers use_mask_token too": not tokens,
        }

    @property
    def tokens_before(self) -> int:
        return 1 + self.num_register_tokens

    @property
    def intermediate_size(self) -> int:
        inner = int(self.hidden_size * self.mlp_ratio)
        return (int(inner * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else inner


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
        of_attention, of_mlp = (Dropout.at(f"path {part} {index}", cfg.drop_path_rate) for part in ("attention", "mlp"))
        scale = Spec((width,), "constant", cfg.layerscale_value)
        out = nn.Linear.abstract(inner, width, True)
        return cls(
            nn.LayerNorm.abstract(width, cfg.layer_norm_eps),
            vision.Attention.abstract(cfg, index),
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
    block: ClassVar = Block

    dinov2: vision.Encoder | None = None
    dinov2_with_registers: vision.Encoder | None = None

    @classmethod
    def embeddings(cls, cfg: Config) -> vision.Embeddings:
        return vision.Embeddings.abstract(
            cfg, mask_token=cfg.use_mask_token, registers=cfg.num_register_tokens,
            antialias=cfg.model_type == "dinov2_with_registers",
        )  # fmt: skip
