"""What the families of image encoders share: their config, and how a Hugging Face folder holds them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from modelhub.core import vision
from modelhub.core.problems import PROBLEM_TYPES
from modelhub.errors import ConfigError
from modelhub.families.config import (
    FLAG,
    RATE,
    SIZE,
    TEXT,
    FamilyConfig,
    Value,
    check_activation,
    check_keys,
    check_kinds,
    check_sizes,
    key,
    write_common,
)
from modelhub.families.naming import NameMap, Rule

# Keys that transformers does not have; config.json keeps them apart, in an object under the key "modelhub".
_OURS = ("class_token", "pooling", "classifier_dropout")
_PREFIX = "modelhub_"  # of model_types that transformers must not take for its own
# What transformers 5 calls the parts of attention in memory, in all encoders: ours.
_ATTENTION = {
    "attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense",
}  # fmt: skip

EPSILON = Value("a number above 0 and below 1", lambda x: isinstance(x, int | float) and 0 < x < 1)
_COUNT = Value("a whole number, 0 for no head", lambda x: type(x) is int and x >= 0)


@dataclass
class ImageConfig(FamilyConfig):
    """What the configs of all image encoders have: Hugging Face's names, meanings and defaults, except the last eight.

    num_labels: classes of the head, 0 for none. class_token, pooling (see core/vision.py's `pool`), classifier_dropout
    (before the head): ours. problem_type: what the head's logits mean, see core/problems.py. Sizes of images and
    patches: one number, or (height, width).
    """

    model_type: str
    hidden_size: int = key(SIZE, 768)
    num_hidden_layers: int = key(SIZE, 12)
    num_attention_heads: int = key(SIZE, 12)
    hidden_act: str = key(TEXT, "gelu")
    hidden_dropout_prob: float = key(RATE, 0.0)
    attention_probs_dropout_prob: float = key(RATE, 0.0)
    layer_norm_eps: float = key(EPSILON, 1e-12)
    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    num_channels: int = key(SIZE, 3)
    qkv_bias: bool = key(FLAG, True)
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    num_labels: int = key(_COUNT, 0)
    class_token: bool = key(FLAG, True)
    pooling: str = key(TEXT, "cls")
    classifier_dropout: float = key(RATE, 0.0)
    problem_type: str | None = key(TEXT, None)
    extra: dict[str, Any] = field(default_factory=dict)

    def checked(self, where: str) -> None:
        self.image_size, self.patch_size = _pair(self.image_size), _pair(self.patch_size)
        sizes = {key: getattr(self, key) for key in self.values() if key in self.sizes()}
        for name, pair in {"image_size": self.size, "patch_size": self.patch}.items():
            sizes |= {f"{name}[{axis}]": size for axis, size in enumerate(pair)}
        check_sizes(sizes, where)
        check_kinds(vars(self), where, self.values(), self.values().keys() - self.optional())
        check_activation(self.hidden_act, where)
        if wrong := [what for what, holds in self.faults().items() if holds]:
            raise ConfigError(f"{where}: {'; '.join(wrong)}")
        if self.num_labels and self.id2label is None:
            self.id2label = {index: f"LABEL_{index}" for index in range(self.num_labels)}
        if self.id2label is not None and self.label2id is None:
            self.label2id = {label: index for index, label in self.id2label.items()}

    def faults(self) -> dict[str, bool]:
        """{what may be wrong with the fields: whether it is}."""
        return {
            f"pooling={self.pooling!r} must be one of {', '.join(vision.POOLINGS)}": (
                self.pooling not in vision.POOLINGS
            ),
            f"problem_type={self.problem_type!r} must be one of {', '.join(PROBLEM_TYPES)}": (
                self.problem_type not in (None, *PROBLEM_TYPES)
            ),
            f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads": bool(
                self.hidden_size % self.num_attention_heads
            ),
            f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}": any(
                size % patch for size, patch in zip(self.size, self.patch, strict=True)
            ),
            f'pooling={self.pooling!r} needs a class token; without one, pooling is "mean" or "none"': (
                not self.class_token and self.pooling.startswith("cls")
            ),
            f'{self.num_labels} classes need one vector per image, not pooling="none"': (
                self.num_labels > 0 and self.pooling == "none"
            ),
            f"num_labels is {self.num_labels} and id2label names {len(self.id2label or ())}; give both, or one": (
                self.num_labels > 0 and self.id2label is not None and len(self.id2label) != self.num_labels
            ),
        }

    @property
    def architecture(self) -> str:
        """The transformers class."""
        return self.kind(self.model_type).architecture + ("ForImageClassification" if self.num_labels else "Model")

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


class HuggingFace:
    """The format "hf" of image encoders: config.json, and weights under our names. See config.Format.

    layers: what transformers 5 calls them in memory, in_memory: {what it calls their parts besides attention: ours},
    apart: {ours: the several that it has}. In files both have the names of transformers 4 still, which are ours.
    """

    def __init__(
        self, layers: str, in_memory: Mapping[str, str], apart: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    ):  # fmt: skip
        self.layers, self.in_memory, self.apart = layers, _ATTENTION | dict(in_memory), apart

    def read(self, cls: type[ImageConfig], data: Mapping[str, Any]) -> dict[str, Any]:
        """The fields, of config.json. There is a head if its `architectures` say so."""
        name = str(data.get("model_type")).removeprefix(_PREFIX)
        kind, where = cls.kind(name), f"{name} config"
        ours = data.get("modelhub") or {}
        if not isinstance(ours, Mapping) or set(ours) - set(_OURS):
            raise ConfigError(f"{where}: modelhub={ours!r} must be an object with no keys but {', '.join(_OURS)}")
        known = cls.__dataclass_fields__.keys() - {"extra", *_OURS}
        extra = check_keys(data, known | {"modelhub"}, where, {"head_dim": ()})
        values = dict(kind.defaults) | {key: data[key] for key in known if data.get(key) is not None} | dict(ours)
        return values | self.heads(data, where) | {"model_type": name, "extra": extra}

    def heads(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
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

    def write(self, config: ImageConfig) -> dict[str, Any]:
        """config.json. What transformers has no model for gets a model_type that it does not know."""
        data = write_common(config, config.architecture)
        ours = {key: value for key in _OURS if (value := data.pop(key)) != getattr(type(config), key)}
        if ours:
            data["modelhub"] = ours
        if not config.class_token or (config.num_labels and "pooling" in ours):
            data["model_type"] = _PREFIX + config.model_type
        if not config.num_labels or config.id2label:
            del data["num_labels"]
        if config.id2label is not None:
            data["id2label"] = {str(index): label for index, label in config.id2label.items()}
        data |= {name: list(data[name]) for name in ("image_size", "patch_size") if isinstance(data[name], tuple)}
        empty = (name for name in ("id2label", "label2id", "problem_type") if data[name] is None)
        left_out = {*config.kind(config.model_type).lacks, *empty}
        return {name: value for name, value in data.items() if name not in left_out}

    def names(self, config: ImageConfig) -> NameMap:
        """Of models with a head, whose encoder has a prefix, and of encoders alone, without one."""
        prefix, ignored = f"{config.model_type}.", self.ignored(config)
        with_head, bare = self._in_memory(prefix, ".{}")
        parts = tuple(Rule(f"{part}.{{}}", f"{prefix}{part}.{{}}") for part in ("embeddings", "encoder", "layernorm"))
        return NameMap(
            aliases=(*with_head, *bare, *parts), ignored=(*ignored, *(f"{prefix}{name}" for name in ignored))
        )

    def ignored(self, config: Any) -> tuple[str, ...]:
        """Patterns of tensors that are not used, without the prefix."""
        # No classifier uses the pooler; mask token and decoder are of masked image modelling.
        return "pooler.{}", "embeddings.mask_token", "decoder.{}"

    def adapter_names(self, config: ImageConfig) -> NameMap:
        prefix = f"{config.model_type}."
        with_head, bare = self._in_memory(prefix, "")
        older = Rule("encoder.{}", f"{prefix}encoder.{{}}")
        rules = with_head if config.num_labels else (*bare, older)
        return NameMap(rules, (*with_head, *bare, older), parts=self.apart)

    def _in_memory(self, prefix: str, rest: str) -> tuple[tuple[Rule, ...], tuple[Rule, ...]]:
        """Rules for the parts of the layers, with the prefix and without."""
        with_prefix, bare = (
            tuple(
                Rule(f"{start}{self.layers}.{{}}.{theirs}{rest}", f"{prefix}encoder.layer.{{}}.{ours}{rest}")
                for theirs, ours in self.in_memory.items()
            )
            for start in (prefix, "")
        )
        return with_prefix, bare


def adapter_names(config: Any, part_of: str | None) -> NameMap:
    """How PEFT's files call the layers: as transformers does in memory; an encoder without a head has no prefix."""
    found: NameMap = config.stored_as("hf").adapter_names(config)
    return found
