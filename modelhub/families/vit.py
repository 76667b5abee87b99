"""ViT and DeiT; ViTs without a class token too.

ViT: arXiv:2010.11929. DeiT with its distillation token: arXiv:2012.12877.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from modelhub.core import nn, vision
from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Module
from modelhub.core.vision import Collected, Dropout
from modelhub.families import kerashub
from modelhub.families.config import FLAG, SIZE, Kind, key
from modelhub.families.config import names as names
from modelhub.families.image import HuggingFace, ImageConfig
from modelhub.families.image import adapter_names as adapter_names

_IN_MEMORY = {
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
}  # fmt: skip


class ViTHF(HuggingFace):
    def heads(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        values = super().heads(data, where)
        teacher = any(str(name).endswith("WithTeacher") for name in data.get("architectures") or [])
        return values | {"distillation_head": teacher and values["num_labels"] > 0}


@dataclass
class Config(ImageConfig):
    """distillation_head: DeiT's second head, on the distillation token; logits are the mean of both."""

    KINDS: ClassVar = {
        name: Kind(architecture, {}, lacks=("distillation_head",))  # `architectures` says it
        for name, architecture in {"vit": "ViT", "deit": "DeiT"}.items()
    }
    FORMATS: ClassVar = {"hf": ViTHF("layers", _IN_MEMORY), "keras": kerashub.ViTKeras()}

    intermediate_size: int = key(SIZE, 3072)
    distillation_head: bool = key(FLAG, False)

    def faults(self) -> dict[str, bool]:
        is_deit, plain = self.model_type == "deit", self.class_token and (self.pooling == "cls" or not self.num_labels)
        return super().faults() | {
            "DeiT's heads are on its class and distillation tokens; other poolings are for vit": is_deit and not plain,
            "distillation_head needs model_type deit and num_labels": (
                self.distillation_head and not (is_deit and self.num_labels)
            ),
        }

    @property
    def architecture(self) -> str:
        return super().architecture + ("WithTeacher" if self.distillation_head else "")

    @property
    def tokens_before(self) -> int:
        return self.class_token + (self.model_type == "deit")


@dataclass
class Block(Module):
    attention: vision.Attention
    intermediate: vision.Output
    output: vision.Output
    layernorm_before: nn.LayerNorm
    layernorm_after: nn.LayerNorm
    activation: str
    dropouts: tuple[Dropout, Dropout]  # after attention and after the MLP

    @classmethod
    def abstract(cls, cfg: Config, index: int) -> "Block":
        width, inner = cfg.hidden_size, cfg.intermediate_size
        hidden = [Dropout.at(f"{part} {index}", cfg.hidden_dropout_prob) for part in ("attention", "mlp")]
        return cls(
            vision.Attention.abstract(cfg, index),
            vision.Output(nn.Linear.abstract(width, inner, True)),
            vision.Output(nn.Linear.abstract(inner, width, True)),
            nn.LayerNorm.abstract(width, cfg.layer_norm_eps),
            nn.LayerNorm.abstract(width, cfg.layer_norm_eps),
            cfg.hidden_act,
            (hidden[0], hidden[1]),
        )

    def __call__(self, xp: Backend, x: Array, collected: Collected | None) -> Array:
        after_attention, after_mlp = self.dropouts
        x = x + after_attention(xp, self.attention(xp, self.layernorm_before(xp, x), collected))
        y = nn.ACTIVATIONS[self.activation](xp, self.intermediate.dense(xp, self.layernorm_after(xp, x)))
        return x + after_mlp(xp, self.output.dense(xp, y))


@dataclass
class Model(vision.ImageModel):
    block: ClassVar = Block

    vit: vision.Encoder | None = None
    deit: vision.Encoder | None = None
    cls_classifier: nn.Linear | None = None
    distillation_classifier: nn.Linear | None = None

    @classmethod
    def embeddings(cls, cfg: Config) -> vision.Embeddings:
        return vision.Embeddings.abstract(cfg, distillation_token=cfg.model_type == "deit")

    @classmethod
    def abstract(cls, cfg: Config) -> Self:
        model = super().abstract(cfg)
        if not cfg.distillation_head:
            return model
        head = model.classifier
        return dataclasses.replace(model, classifier=None, cls_classifier=head, distillation_classifier=head)

    def pooled(self, xp: Backend, hidden: Array) -> Array:
        """As ImageModel's; with two heads class and distillation token side by side, (B, 2 D)."""
        if self.cls_classifier is None:
            return super().pooled(xp, hidden)
        return xp.concat([hidden[:, 0], hidden[:, 1]], 1)

    def _classify(self, xp: Backend, pooled: Array) -> Array:
        if self.cls_classifier is None or self.distillation_classifier is None:
            return super()._classify(xp, pooled)
        of_class, of_distillation = xp.split(pooled, 2, axis=1)
        return (self.cls_classifier(xp, of_class) + self.distillation_classifier(xp, of_distillation)) * 0.5
