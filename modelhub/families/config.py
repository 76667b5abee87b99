"""What the configs of all families share: declared keys, which keys matter, the formats, rope in both spellings."""

import re
import reprlib
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from modelhub.core.nn import ACTIVATIONS, Rope
from modelhub.errors import ConfigError
from modelhub.families.naming import NameMap

# Keys of transformers' models that change the forward pass and that no family here has, unless it names them itself.
# What they may be all the same: whatever switches nothing on, and the values here.
_MATTERS: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (), "alibi": (), "attention_multiplier": (), "attn_temperature_tuning": (), "clip_qkv": (),
    "cross_attention_hidden_size": (), "embedding_multiplier": (), "ffn_layer": (), "is_causal": (True,),
    "is_encoder_decoder": (), "logit_scale": (), "logits_scaling": (), "n_routed_experts": (), "no_rope_layers": (),
    "num_experts": (), "num_local_experts": (), "partial_rotary_factor": (1,), "per_layer_config": (),
    "qk_layernorm": (), "quantization_config": (), "residual_multiplier": (), "tie_last_hidden_states": (),
    "use_bidirectional_attention": (), "use_mrope": (), "use_parallel_residual": (), "use_qk_norm": (),
}  # fmt: skip
# Of the files, the training, the generation and the labels; nothing of the forward pass.
_HARMLESS = re.compile(
    r"_.*|.*_token_id|.*_token_index|.*_version|unsloth_.*|output_.*|.*_dropout|.*gradient_checkpointing.*|"
    r"(id2label|label2id|num_labels|problem_type|architectures|auto_map|name_or_path|model_type|tokenizer_class|prefix)|"
    r"(torch_dtype|dtype|torchscript|transformers\.js_config|attn_implementation|experts_implementation|use_cache)|"
    r"(return_dict|use_return_dict|tf_legacy_loss|use_bfloat16|finetuning_task|task_specific_params|initializer_range)|"
    r"(cache_implementation|chunk_size_feed_forward|is_decoder|pretraining_tp|pruned_heads|tie_encoder_decoder)|"
    r"(do_sample|early_stopping|temperature|top_k|top_p|min_p|typical_p|max_length|max_new_tokens|min_length|num_beams|"
    r"num_beam_groups|num_return_sequences|diversity_penalty|repetition_penalty|encoder_no_repeat_ngram_size|"
    r"no_repeat_ngram_size|length_penalty|bad_words_ids|suppress_tokens|begin_suppress_tokens|remove_invalid_values|"
    r"exponential_decay_length_penalty|model_max_length)|"
    r"(pooler_output_size|pooler_act|encoder_stride)|"  # of the pooler, which we leave out; of masked image modelling
    r"(apply_layernorm|reshape_hidden_states|out_features|out_indices|stage_names)"  # of backbones for detectors
)


_LARGEST_SIZE = (1 << 31) - 1
_MOST_LAYERS = 10_000  # each is a handful of objects, made before the weights can disagree


@dataclass(frozen=True)
class Value:
    """What a value must be, in words and as a test, if it is there and not null."""

    words: str
    test: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e30 < value < 1e30


def _is_size(value: Any) -> bool:
    # GGUF metadata holds numpy's integers
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and 1 <= int(value) <= _LARGEST_SIZE


def _is_ids(value: Any) -> bool:
    # -1: "none" in old Llama configs
    return all(type(x) is int and -1 <= x <= _LARGEST_SIZE for x in (value if isinstance(value, list) else [value]))


SIZE = Value("a whole number above 0", _is_size)
NUMBER = Value("a number", _is_number)
POSITIVE = Value("a number above 0", lambda x: _is_number(x) and x > 1e-30)
RATE = Value("at least 0 and below 1", lambda x: _is_number(x) and 0 <= x < 1)
FLAG = Value("true or false", lambda x: isinstance(x, bool))
TEXT = Value("text", lambda x: isinstance(x, str))
TEXTS = Value("a list of texts", lambda x: isinstance(x, list) and all(isinstance(text, str) for text in x))
OBJECT = Value("an object", lambda x: isinstance(x, Mapping))
IDS = Value("a token id, or a list of them", _is_ids)

# Of keys that are no fields of a family's config, and of generation_config.json.
_KINDS = {
    key: value
    for value, keys in {
        POSITIVE: (
            "rope_theta", "rope_local_base_freq", "factor", "low_freq_factor", "high_freq_factor",
            "original_max_position_embeddings",
        ),
        NUMBER: (
            "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        ),
        # Scores are divided by length ** length_penalty.
        Value("a number from -50 to 50", lambda x: _is_number(x) and -50 <= x <= 50): ("length_penalty",),
        Value('true, false or "never"', lambda x: isinstance(x, bool) or x == "never"): ("early_stopping",),
        FLAG: ("do_sample",),
        TEXT: ("model_type", "dtype", "torch_dtype", "rope_type", "type"),
        OBJECT: ("rope_scaling", "rope_parameters", "text_config"),
        SIZE: ("sliding_window_size", "sliding_window_pattern"),
        IDS: ("bos_token_id", "eos_token_id", "pad_token_id"),
    }.items()
    for key in keys
}  # fmt: skip


def key(value: Value, default: Any = MISSING, *, factory: Any = MISSING) -> Any:
    """A field of a family's config that is a key of config.json, and what its value must be."""
    if factory is not MISSING:
        return field(default_factory=factory, metadata={"value": value})
    return field(default=default, metadata={"value": value})


class Format(Protocol):
    """One way to store a family's models, both ways."""

    def read(self, cls: Any, stored: Any) -> dict[str, Any]:
        """The fields of the family's Config `cls`, of config.json, a GGUF file, or a KerasHub preset's two."""
        ...

    def write(self, config: Any) -> Any: ...

    def names(self, config: Any) -> NameMap: ...


@dataclass(frozen=True)
class Kind:
    """A model_type. architecture: transformers' class of models; what the names of several start with, for images.

    defaults: of transformers' config class, which checkpoints rely on, where they are not ours. lacks: fields of ours
    that the class does not have.
    """

    architecture: str
    defaults: Mapping[str, Any]
    lacks: tuple[str, ...] = ()


class FamilyConfig:
    """Base of the families' configs: dataclasses whose fields, where `key` declares them, are keys of config.json.

    FORMATS: "hf", "gguf" and "keras", as far as the family has them. MEMBER: what a model of it is, for errors.
    """

    MEMBER: ClassVar[str] = "of this family"
    KINDS: ClassVar[Mapping[str, Kind]]
    FORMATS: ClassVar[Mapping[str, Format]]

    model_type: str

    def __post_init__(self) -> None:
        self.checked(f"{self.model_type} config")

    def checked(self, where: str) -> None:
        """Complete what depends on other fields. Raises ConfigError for fields that do not fit each other."""

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        """From config.json, in the spelling of transformers 4 or 5. Raises ConfigError."""
        return cls(**cls.stored_as("hf").read(cls, data))

    @classmethod
    def from_gguf(cls, file: Any) -> Self:
        """From a GGUF file, see gguf.GGUFLike. Raises ConfigError."""
        return cls(**cls.stored_as("gguf").read(cls, file))

    @classmethod
    def from_keras(cls, data: Mapping[str, Any], tensors: Container[str] | None = None) -> Self:
        """From a KerasHub preset: its config.json, with task.json under "task", and the names in its weights, if known.

        Raises ConfigError.
        """
        return cls(**cls.stored_as("keras").read(cls, (data, tensors)))

    def to_hf(self) -> dict[str, Any]:
        """config.json."""
        data: dict[str, Any] = self.stored_as("hf").write(self)
        return data

    def to_gguf(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """GGUF metadata, and tensors that are no parameters. ConfigError for what llama.cpp cannot do."""
        found: tuple[dict[str, Any], dict[str, np.ndarray]] = self.stored_as("gguf").write(self)
        return found

    @classmethod
    def stored_as(cls, source: str) -> Format:
        if source not in cls.FORMATS:
            raise ConfigError(
                f"models of type {', '.join(cls.KINDS)} are stored as {', '.join(cls.FORMATS)}, not {source}"
            )
        return cls.FORMATS[source]

    @classmethod
    def kind(cls, name: str) -> Kind:
        if name not in cls.KINDS:
            raise ConfigError(f"model_type {name!r} is not {cls.MEMBER}; this family reads {', '.join(cls.KINDS)}")
        return cls.KINDS[name]

    @classmethod
    def values(cls) -> dict[str, Value]:
        """What the declared keys must be."""
        return {name: f.metadata["value"] for name, f in cls.__dataclass_fields__.items() if "value" in f.metadata}  # type: ignore[attr-defined]

    @classmethod
    def sizes(cls) -> set[str]:
        return {name for name, value in cls.values().items() if value is SIZE} - cls.optional()

    @classmethod
    def optional(cls) -> set[str]:
        """Keys for which null is a value."""
        return {name for name in cls.values() if cls.__dataclass_fields__[name].default is None}  # type: ignore[attr-defined]

    @classmethod
    def check_values(cls, found: Mapping[str, Any], where: str) -> None:
        """Raise ConfigError for values that are of another kind than the fields say."""
        check_sizes(
            {key: found[key] for key in cls.values() if key in cls.sizes() and found.get(key) is not None}, where
        )
        check_kinds(found, where, cls.values())


def names(source: str, config: FamilyConfig) -> NameMap:
    """How the tensors of a "hf" folder, a "gguf" file or a "keras" preset are called here. A family's `names`."""
    return config.stored_as(source).names(config)


def check_kinds(
    data: Mapping[str, Any], where: str, values: Mapping[str, Value] = _KINDS, needed: Container[str] = ()
) -> None:
    """Raise one ConfigError for all values of `data` that are of another kind than their keys say.

    needed: keys that cannot be left out, nor be null.
    """
    bad = [
        f"{key} must be {value.words}, found {key}={reprlib.repr(data.get(key))}"
        for key, value in values.items()
        if (key in needed or data.get(key) is not None) and not value.test(data.get(key))
    ]
    if bad:
        raise ConfigError(f"{where}: {'; '.join(bad)}. Correct it, or download it again")


def check_keys(
    data: Mapping[str, Any], known: Iterable[str], where: str, only: Mapping[str, Iterable[Any]] | None = None
) -> dict[str, Any]:
    """What `data` has besides `known`, to be kept and written back; see `unknown_keys`.

    only: {key: values} that it may have and that change nothing. What `write_common` writes anyway is left out:
    architectures, and the older spelling of dtype. Raises ConfigError for keys that change the maths, and for values of
    another kind than their keys say.
    """
    check_kinds(data, where)
    known = {*known, "architectures", "torch_dtype"}
    extra = {key: value for key, value in data.items() if key not in known}
    if dtype := data.get("dtype") or data.get("torch_dtype"):
        extra["dtype"] = dtype
    allowed = _MATTERS | dict(only or {})
    if bad := [
        f"{key}={x!r:.200}" for key, x in extra.items() if key in allowed and _is_on(x) and x not in allowed[key]
    ]:
        raise ConfigError(
            f"{where}: {', '.join(sorted(bad))} changes the maths of the model, and modelhub does not have it. This "
            "model needs a newer modelhub"
        )
    return extra


def unknown_keys(extra: Mapping[str, Any]) -> list[str]:
    """Of what `check_keys` kept, what is switched on and not known to be harmless."""
    return sorted(k for k, value in extra.items() if _is_on(value) and k not in _MATTERS and not _HARMLESS.fullmatch(k))


def _is_on(value: Any) -> bool:
    return value not in (None, False, 0, [], {}, "")


def refuse_unknown(data: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise ConfigError for arguments of a KerasHub class that are not known: each of them may change the maths."""
    check_kinds(data, where)
    if bad := [f"{key}={value!r:.200}" for key, value in sorted(data.items()) if key not in known and _is_on(value)]:
        raise ConfigError(
            f"{where}: arguments that modelhub does not know and that may change the maths: {', '.join(bad)}. This "
            "model needs a newer modelhub"
        )


def check_sizes(sizes: Mapping[str, Any], where: str) -> None:
    """Raise one ConfigError for all sizes that no model can have, and for a head_dim that is odd."""
    if bad := [f"{key}={reprlib.repr(value)}" for key, value in sizes.items() if not _is_size(value)]:
        raise ConfigError(f"{where}: these must be whole numbers, 1 or more and below 2**31: {', '.join(bad)}")
    for key in ("num_hidden_layers", "num_layers"):
        if sizes.get(key, 0) > _MOST_LAYERS:
            raise ConfigError(f"{where}: {key}={sizes[key]}; modelhub builds models of up to {_MOST_LAYERS} layers")
    if sizes.get("head_dim", 2) % 2:
        raise ConfigError(f"{where}: head_dim={sizes['head_dim']} is odd; rotary embedding turns pairs of channels")


def require(data: Mapping[str, Any], key: str, allowed: Iterable[Any], where: str) -> None:
    """Raise ConfigError if `key` is set to something other than the values whose maths we have."""
    if data.get(key) is not None and data[key] not in allowed:
        raise ConfigError(f"{where}: {key}={data[key]!r} is not supported; supported: {', '.join(map(repr, allowed))}")


def check_activation(name: str, where: str) -> str:
    if name not in ACTIVATIONS:
        raise ConfigError(f"{where}: activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return name


def read_rope(where: str, theta: Any, given: Mapping[str, Any] | None = None) -> Rope:
    """A Rope from rope_theta and an entry such as rope_scaling's, which may have a rope_theta of its own."""
    entry = {"rope_theta": theta} | _rope_entry(where, given)
    check_kinds(entry, f"{where}, rope")
    kind = entry.pop("rope_type", "default")
    fields = {"default": (), "linear": ("factor",), "llama3": Rope.LLAMA3}.get(kind)
    if fields is None:
        raise ConfigError(f"{where}: rope type {kind!r} is not supported; supported: default, linear, llama3")
    if missing := [key for key in fields if key not in entry]:
        raise ConfigError(f"{where}: rope type {kind!r} needs {', '.join(missing)}")
    require(entry, "partial_rotary_factor", (1,), f"{where}, rope")
    if unknown := set(entry) - {"rope_theta", "partial_rotary_factor", *Rope.LLAMA3}:
        raise ConfigError(f"{where}: rope keys that modelhub does not know: {', '.join(sorted(unknown))}")
    return Rope(float(entry["rope_theta"]), kind, **{key: entry[key] for key in fields})


def _rope_entry(where: str, given: Any) -> dict[str, Any]:
    """What is set in it, under the names that are used now."""
    if not isinstance(given or {}, Mapping):
        raise ConfigError(f"{where}: a rope's parameters must be an object, found {reprlib.repr(given)}")
    entry = {key: value for key, value in (given or {}).items() if value is not None}
    if (older := entry.pop("type", None)) is not None:
        entry.setdefault("rope_type", older)
    return entry


def hf_rope(
    where: str, data: Mapping[str, Any], parameters: Mapping[str, Any] | None, theta: float, *, merged: bool = False
) -> Rope:
    """The Rope of a config.json: its rope_parameters (transformers 5), its rope_theta and rope_scaling (4), or both.

    Of both rope_scaling counts, as in transformers: beside rope_parameters it was put by hand, to switch scaling on.
    parameters: what rope_parameters has for these layers; theta: what rope_theta is where nothing says it; merged:
    whether transformers keeps the theta of rope_parameters then. Raises ConfigError where the two contradict.
    """
    old, new = _rope_entry(where, data.get("rope_scaling")), _rope_entry(where, parameters)
    thetas = {"rope_theta": data.get("rope_theta")}
    thetas |= {"rope_scaling's rope_theta": old.get("rope_theta"), "rope_parameters' rope_theta": new.get("rope_theta")}
    found = {name: value for name, value in thetas.items() if value is not None}
    check_kinds(found, where, dict.fromkeys(found, POSITIVE))
    if len(set(found.values())) > 1:
        raise ConfigError(f"{where}: {', '.join(f'{name} is {x!r}' for name, x in found.items())}; write one value")
    base = next(iter(found.values()), theta)
    if old and list(found) == ["rope_parameters' rope_theta"] and base != theta and not merged:
        raise ConfigError(
            f"{where}: rope_scaling takes the place of rope_parameters, and so transformers takes {theta:g} for "
            f'rope_theta, not {base!r}. Write "rope_theta": {base!r} beside rope_scaling'
        )
    scalings = [{key: value for key, value in entry.items() if key != "rope_theta"} for entry in (old, new)]
    if old and new and new.get("rope_type", "default") != "default" and scalings[0] != scalings[1]:
        raise ConfigError(f"{where}: rope_scaling={scalings[0]} and rope_parameters={scalings[1]}; leave out one")
    return read_rope(where, base, old or new)


def write_rope(rope: Rope) -> dict[str, Any]:
    """A rope_parameters entry as transformers 5 writes it; without rope_theta it is the older rope_scaling."""
    fields = {"default": (), "linear": ("factor",), "llama3": Rope.LLAMA3}[rope.rope_type]
    return {"rope_theta": rope.theta, "rope_type": rope.rope_type} | {key: getattr(rope, key) for key in fields}


def write_common(config: Any, architecture: str) -> dict[str, Any]:
    """config.json keys that all families write alike: their fields, the extra keys, and the dtype in both spellings."""
    data = config.extra | {"architectures": [architecture]}
    data |= {key: value for key, value in vars(config).items() if key != "extra" and not isinstance(value, Rope)}
    if dtype := data.get("dtype"):
        data["torch_dtype"] = dtype
    return data
