"""What the families of causal decoders share: their config, and how a Hugging Face folder holds them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from modelhub.core.decoder import GLOBAL, LOCAL
from modelhub.core.nn import Rope
from modelhub.errors import ConfigError
from modelhub.families.config import (
    FLAG,
    POSITIVE,
    SIZE,
    TEXTS,
    FamilyConfig,
    Kind,
    check_activation,
    check_keys,
    check_sizes,
    hf_rope,
    key,
    write_common,
    write_rope,
)
from modelhub.families.naming import NameMap, Rule


def layer_types(layers: int, every: int) -> list[str]:
    """Every n-th layer is global, the others look at a window."""
    return [LOCAL if layer % every else GLOBAL for layer in range(1, layers + 1)]


ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}


@dataclass
class TextConfig(FamilyConfig):
    """Hugging Face's names and meanings, except `rope`. layer_types: which layers look at a window only.

    A family adds its own fields, and ACTIVATION, the name of the one that says the activation of the MLPs.
    """

    KINDS: ClassVar[Mapping[str, Kind]]
    ACTIVATION: ClassVar[str] = "hidden_act"

    model_type: str
    vocab_size: int = key(SIZE)
    hidden_size: int = key(SIZE)
    intermediate_size: int = key(SIZE)
    num_hidden_layers: int = key(SIZE)
    num_attention_heads: int = key(SIZE)
    num_key_value_heads: int = key(SIZE)
    head_dim: int = key(SIZE)
    max_position_embeddings: int = key(SIZE)
    sliding_window: int | None = key(SIZE, None)
    layer_types: list[str] = key(TEXTS, factory=list)
    rms_norm_eps: float = key(POSITIVE, 1e-6)
    rope: Rope = Rope()
    attention_bias: bool = key(FLAG, False)
    tie_word_embeddings: bool = key(FLAG, False)
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def activation(self) -> str:
        name: str = getattr(self, self.ACTIVATION)
        return name

    def default_layer_types(self) -> list[str]:
        """Where layer_types does not say them."""
        return [LOCAL if self.sliding_window else GLOBAL] * self.num_hidden_layers

    def checked(self, where: str) -> None:
        check_activation(self.activation, where)
        check_sizes({"head_dim": self.head_dim}, where)
        self.layer_types = self.layer_types or self.default_layer_types()
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

    def rope_of(self, kind: str) -> Rope:
        """Of layers of this kind."""
        return self.rope

    def rope_frequencies(self) -> dict[str, np.ndarray]:
        return {kind: self.rope_of(kind).frequencies(self.head_dim) for kind in sorted(set(self.layer_types))}

    def windows(self) -> dict[str, int | None]:
        return {kind: self.sliding_window if kind == LOCAL else None for kind in sorted(set(self.layer_types))}


class HuggingFace:
    """The format "hf" of decoders: config.json, and weights under our names. See config.Format.

    only: {key: values} that a config.json may have and that change nothing. aliases: further spellings of names;
    ignored: patterns of tensors that the family has no use for.
    """

    def __init__(
        self, only: Mapping[str, tuple[Any, ...]] | None = None, aliases: tuple[Rule, ...] = (),
        ignored: tuple[str, ...] = (),
    ):  # fmt: skip
        self.only, self.aliases, self.ignored = only or {}, aliases, ignored

    def read(self, cls: type[TextConfig], data: Mapping[str, Any]) -> dict[str, Any]:
        """The fields, of config.json in the spelling of transformers 4 or 5."""
        name: Any = data.get("model_type")
        kind, where = cls.kind(name), f"{name} config"
        known = cls.values().keys() - set(kind.lacks)
        extra = check_keys(data, known | ROPE_KEYS | self.reads_besides(), where, self.only)
        values = dict(kind.defaults) | {key: data[key] for key in known if data.get(key) is not None}
        # null switches these off; only an absent key means the default.
        values |= {key: None for key in cls.optional() & known if key in data and data[key] is None}
        cls.check_values(values, where)
        if data.get("num_key_value_heads", 0) is None:  # then the default is not meant, but one for each head
            values.pop("num_key_value_heads", None)
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        return values | self.ropes(name, data, where) | {"model_type": name, "extra": extra}

    def reads_besides(self) -> set[str]:
        """Keys that are no fields, and that `read` looks at."""
        return set()

    def ropes(self, kind: str, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {"rope": hf_rope(where, data, data.get("rope_parameters"), 10_000.0)}

    def write(self, config: TextConfig) -> dict[str, Any]:
        """config.json with the keys of transformers 4 and of transformers 5 side by side: either reads its own."""
        kind, rope = config.KINDS[config.model_type], write_rope(config.rope)
        data = write_common(config, kind.architecture) | {"rope_theta": config.rope.theta, "rope_parameters": rope}
        if config.rope.rope_type != "default":
            data["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        return {key: value for key, value in data.items() if key not in kind.lacks or key in config.extra}

    def names(self, config: TextConfig) -> NameMap:
        backbone = (  # saved without its head
            Rule("embed_tokens.weight", "model.embed_tokens.weight"),
            Rule("layers.{}", "model.layers.{}"),
            Rule("norm.weight", "model.norm.weight"),
        )
        head = ("{}lm_head.weight",) if config.tie_word_embeddings else ()
        return NameMap(aliases=(*self.aliases, *backbone), ignored=("{}.rotary_emb.inv_freq", *self.ignored, *head))
