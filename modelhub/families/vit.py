"""ViT and DeiT; ViTs without a class token too.

ViT: arXiv:2010.11929. DeiT with its distillation token: arXiv:2012.12877.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from modelhub.core import nn, vision
from modelhub.core.backends.base import Array, Backend
from modelhub.core.problems import PROBLEM_TYPES
from modelhub.core.tree import Module
from modelhub.core.vision import Collected, Dropout
from modelhub.errors import ConfigError
from modelhub.families import kerashub
from modelhub.families.config import check_activation, check_keys, check_sizes, write_common
from modelhub.families.naming import NameMap, Rule

# Keys that transformers does not have; config.json keeps them apart, in an object under the key "modelhub".
_OURS = ("class_token", "pooling", "classifier_dropout")
_PREFIX = "modelhub_"  # of model_types that transformers must not take for its own


@dataclass
class ImageConfig:
    """What the configs of all image encoders have: Hugging Face's names, meanings and defaults, except the last eight.

    num_labels: classes of the head, 0 for none. class_token, pooling (see core/vision.py's `pool`), classifier_dropout
    (before the head): ours. problem_type: what the head's logits mean, see core/problems.py. Sizes of images and
    patches: one number, or (height, width).
    """

    KINDS: ClassVar[dict[str, dict[str, Any]]]  # model_type: defaults that differ from those below
    SIZES: ClassVar[tuple[str, ...]] = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_channels")
    RATES: ClassVar[tuple[str, ...]] = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")

    model_type: str
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-12
    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    num_labels: int = 0
    class_token: bool = True
    pooling: str = "cls"
    classifier_dropout: float = 0.0
    problem_type: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ConfigError for values that no model can have, all of them at once."""
        where = f"{self.model_type} config"
        self.image_size, self.patch_size = _pair(self.image_size), _pair(self.patch_size)
        sizes = {key: getattr(self, key) for key in self.SIZES}
        for key in ("image_size", "patch_size"):
            sizes |= {f"{key}[{axis}]": size for axis, size in enumerate(_both(getattr(self, key)))}
        check_sizes(sizes, where)
        check_activation(self.hidden_act, where)
        if problems := self.problems():
            raise ConfigError(f"{where}: {'; '.join(problems)}")
        if self.num_labels and self.id2label is None:
            self.id2label = {index: f"LABEL_{index}" for index in range(self.num_labels)}
        if self.id2label is not None and self.label2id is None:
            self.label2id = {label: index for index, label in self.id2label.items()}

    def problems(self) -> list[str]:
        """What is wrong with the values, one sentence each."""
        found = []
        for key, value in vars(self).items():
            if key in self.RATES and (type(value) not in (int, float) or not 0 <= value < 1):
                found.append(f"{key}={value!r} must be at least 0 and below 1")
            if self.__dataclass_fields__[key].type is bool and type(value) is not bool:
                found.append(f"{key} must be true or false, found {value!r}")
        if not isinstance(self.layer_norm_eps, int | float) or not 0 < self.layer_norm_eps < 1:
            found.append(f"layer_norm_eps={self.layer_norm_eps!r} must be above 0 and below 1")
        if self.hidden_size % self.num_attention_heads:
            found.append(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if any(size % patch for size, patch in zip(self.size, self.patch, strict=True)):
            found.append(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if self.pooling not in vision.POOLINGS:
            found.append(f"pooling={self.pooling!r} must be one of {', '.join(vision.POOLINGS)}")
        elif not self.class_token and self.pooling.startswith("cls"):
            found.append(f'pooling={self.pooling!r} needs a class token; without one, pooling is "mean" or "none"')
        elif self.num_labels and self.pooling == "none":
            found.append(f'{self.num_labels} classes need one vector per image, not pooling="none"')
        if self.problem_type not in (None, *PROBLEM_TYPES):
            found.append(f"problem_type={self.problem_type!r} must be one of {', '.join(PROBLEM_TYPES)}")
        if type(self.num_labels) is not int or self.num_labels < 0:
            found.append(f"num_labels={self.num_labels!r} must be a whole number, 0 for no head")
        elif self.num_labels and self.id2label is not None and len(self.id2label) != self.num_labels:
            found.append(f"num_labels is {self.num_labels} and id2label names {len(self.id2label)}; give both, or one")
        return found

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        """From config.json. It has a head if its `architectures` say so. Raises ConfigError."""
        kind = str(data.get("model_type")).removeprefix(_PREFIX)
        if kind not in cls.KINDS:
            raise ConfigError(f"model_type {kind!r} is not of this family; it reads {', '.join(cls.KINDS)}")
        where = f"{kind} config"
        ours = data.get("modelhub") or {}
        if not isinstance(ours, Mapping) or set(ours) - set(_OURS):
            raise ConfigError(f"{where}: modelhub={ours!r} must be an object with no keys but {', '.join(_OURS)}")
        known = set(cls.__dataclass_fields__) - {"extra", *_OURS}
        extra = check_keys(data, known | {"modelhub"}, where, {"head_dim": ()})
        values = cls.KINDS[kind] | {key: data[key] for key in known if data.get(key) is not None} | dict(ours)
        values |= cls.read_heads(data, where) | {"model_type": kind}
        return cls(**values, extra=extra)

    @classmethod
    def read_heads(cls, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Fields that say which heads there are."""
        labels = data.get("id2label")
        try:
            labels = None if labels is None else {int(index): str(label) for index, label in labels.items()}
        except (AttributeError, TypeError, ValueError):
            raise ConfigError(f"{where}: id2label must be an object from class numbers to labels") from None
        architectures = data.get("architectures") or []
        count = len(labels) if labels else data.get("num_labels")
        if any("ForImageClassification" in str(name) for name in architectures):
            count = 2 if count is None else count  # transformers leaves two labels without names out
        elif architectures:
            count = 0
        return {"id2label": labels, "num_labels": count or 0}

    def to_hf(self) -> dict[str, Any]:
        """config.json. What transformers has no model for gets a model_type that it does not know."""
        data = write_common(self, self.architecture)
        defaults = {key: getattr(type(self), key) for key in _OURS}
        ours = {key: data.pop(key) for key in _OURS}
        if ours := {key: value for key, value in ours.items() if value != defaults[key]}:
            data["modelhub"] = ours
        if not self.class_token or (self.num_labels and "pooling" in ours):
            data["model_type"] = _PREFIX + self.model_type
        if not self.num_labels or self.id2label:
            del data["num_labels"]
        for key in ("id2label", "label2id", "problem_type"):
            if data[key] is None:
                del data[key]
        if self.id2label is not None:
            data["id2label"] = {str(index): label for index, label in self.id2label.items()}
        for key in ("image_size", "patch_size"):
            data[key] = value if isinstance(value := data[key], int) else list(value)
        return data

    @property
    def architecture(self) -> str:
        """The transformers class."""
        raise NotImplementedError

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return _both(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in images of that size."""
        (height, width), (high, wide) = self.size, self.patch
        return height // high, width // wide

    @property
    def patch(self) -> tuple[int, int]:
        return _both(self.patch_size)

    @property
    def tokens_before(self) -> int:
        """Tokens that stand before those of the patches."""
        return int(self.class_token)

    @property
    def pooled_size(self) -> int:
        """Width of what the head sees."""
        return self.hidden_size * (2 if self.pooling == "cls_mean" else 1)


def _pair(value: Any) -> Any:
    """Equal sides as one number; lists, which JSON has, as tuples."""
    if isinstance(value, list | tuple) and len(value) == 2:
        return value[0] if value[0] == value[1] else tuple(value)
    return value


def _both(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


@dataclass
class Config(ImageConfig):
    """distillation_head: DeiT's second head, on the distillation token; logits are the mean of both."""

    KINDS: ClassVar = {"vit": {}, "deit": {}}
    SIZES: ClassVar = (*ImageConfig.SIZES, "intermediate_size")

    intermediate_size: int = 3072
    distillation_head: bool = False

    def problems(self) -> list[str]:
        found = super().problems()
        if self.model_type == "deit" and not (self.class_token and (self.pooling == "cls" or not self.num_labels)):
            found.append("DeiT's heads are on its class and distillation tokens; other poolings are for vit")
        if self.distillation_head and not (self.model_type == "deit" and self.num_labels):
            found.append("distillation_head needs model_type deit and num_labels")
        return found

    @classmethod
    def read_heads(cls, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        values = super().read_heads(data, where)
        teacher = any(str(name).endswith("WithTeacher") for name in data.get("architectures") or [])
        return values | {"distillation_head": teacher and values["num_labels"] > 0}

    @classmethod
    def from_keras(cls, data: Mapping[str, Any], tensors: Container[str] | None = None) -> "Config":
        """From the config.json of a KerasHub preset, with its task.json under "task"; tensors is not needed here.

        KerasHub drops values inside the MLP too, with the same rate, which shows in training only. Raises ConfigError.
        """
        return cls(**kerashub.read_vit(data, tensors))

    def to_hf(self) -> dict[str, Any]:
        data = super().to_hf()
        del data["distillation_head"]  # `architectures` says it
        return data

    @property
    def architecture(self) -> str:
        name = {"vit": "ViT", "deit": "DeiT"}[self.model_type]
        teacher = "WithTeacher" if self.distillation_head else ""
        return f"{name}ForImageClassification{teacher}" if self.num_labels else f"{name}Model"

    @property
    def tokens_before(self) -> int:
        return self.class_token + (self.model_type == "deit")


# transformers 5 has other names in memory than in files, where they are still those of transformers 4.
_IN_MEMORY = {
    "attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
}  # fmt: skip


def names(source: str, config: Config) -> NameMap:
    """How the tensors of a "hf" folder, with or without the prefix that models with a head have, are called here.

    And those of a "keras" preset.
    """
    if source == "keras":
        return kerashub.vit_names(config)
    if source != "hf":
        raise ConfigError(f"{config.model_type} is read from Hugging Face folders, not from {source!r} files")
    prefix = config.model_type
    ours = f"{prefix}.encoder.layer.{{}}"
    rules = [Rule(f"{part}.{{}}", f"{prefix}.{part}.{{}}") for part in ("embeddings", "encoder", "layernorm")]
    for start in (f"{prefix}.layers.{{}}", "layers.{}"):
        rules += [Rule(f"{start}.{theirs}.{{}}", f"{ours}.{name}.{{}}") for theirs, name in _IN_MEMORY.items()]
    # No classifier uses the pooler; mask token and decoder are of masked image modelling.
    unused = ("pooler.{}", "embeddings.mask_token", "decoder.{}")
    return NameMap(aliases=tuple(rules), ignored=(*unused, *(f"{prefix}.{name}" for name in unused)))


def adapter_names(config: Config, part_of: str | None) -> NameMap:
    """How PEFT's files call the layers: as transformers does in memory; an encoder without a head has no prefix."""
    ours = f"{config.model_type}.encoder.layer.{{}}"
    with_head, bare = (
        tuple(Rule(f"{start}layers.{{}}.{theirs}", f"{ours}.{name}") for theirs, name in _IN_MEMORY.items())
        for start in (f"{config.model_type}.", "")
    )
    older = Rule("encoder.{}", f"{config.model_type}.encoder.{{}}")
    return NameMap(with_head if config.num_labels else bare, (*with_head, *bare, older))


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
        weights = Dropout.at(f"attention weights {index}", cfg.attention_probs_dropout_prob)
        return cls(
            vision.Attention.abstract(width, cfg.num_attention_heads, cfg.qkv_bias, weights),
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
    vit: vision.Encoder | None
    deit: vision.Encoder | None
    cls_classifier: nn.Linear | None
    distillation_classifier: nn.Linear | None

    @classmethod
    def abstract(cls, cfg: Config) -> "Model":
        deit = cfg.model_type == "deit"
        encoder = vision.Encoder(
            vision.Embeddings.abstract(
                cfg.hidden_size, cfg.grid, cfg.patch, cfg.num_channels, class_token=cfg.class_token,
                distillation_token=deit, dropout=cfg.hidden_dropout_prob,
            ),
            vision.Blocks([Block.abstract(cfg, index) for index in range(cfg.num_hidden_layers)]),
            nn.LayerNorm.abstract(cfg.hidden_size, cfg.layer_norm_eps),
        )  # fmt: skip
        heads = [nn.Linear.abstract(cfg.pooled_size, cfg.num_labels, True) if cfg.num_labels else None] * 2
        one, two = (None, heads) if cfg.distillation_head else (heads[0], [None, None])
        return cls(one, cfg, None if deit else encoder, encoder if deit else None, *two)

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
