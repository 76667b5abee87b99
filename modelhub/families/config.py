"""What the configs of all families share: strict reading of config.json, rope in both spellings, GGUF metadata."""

import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from modelhub.core.nn import ACTIVATIONS, Rope
from modelhub.errors import ConfigError

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}

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


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e30 < value < 1e30


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 1e-30


def _is_size(value: Any) -> bool:
    # GGUF metadata holds numpy's integers
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and 1 <= int(value) <= _LARGEST_SIZE


def _is_ids(value: Any) -> bool:
    # -1: "none" in old Llama configs
    return all(type(x) is int and -1 <= x <= _LARGEST_SIZE for x in (value if isinstance(value, list) else [value]))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) for x in value)


# What a value must be, in words and as a test, if it is there and not null; config.json and generation_config.json.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    key: kind
    for keys, kind in (
        (
            "rms_norm_eps query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping rope_theta "
            "rope_local_base_freq factor low_freq_factor high_freq_factor original_max_position_embeddings",
            ("a number above 0", _is_positive),
        ),
        (
            "temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty",
            ("a number", _is_number),
        ),
        # Scores are divided by length ** length_penalty.
        ("length_penalty", ("a number from -50 to 50", lambda x: _is_number(x) and -50 <= x <= 50)),
        ("early_stopping", ('true, false or "never"', lambda x: isinstance(x, bool) or x == "never")),
        (
            "attention_bias mlp_bias tie_word_embeddings do_sample",
            ("true or false", lambda x: isinstance(x, bool)),
        ),
        (
            "model_type hidden_act hidden_activation dtype torch_dtype rope_type type",
            ("text", lambda x: isinstance(x, str)),
        ),
        ("rope_scaling rope_parameters text_config", ("an object", lambda x: isinstance(x, Mapping))),
        ("sliding_window sliding_window_size sliding_window_pattern", ("a whole number above 0", _is_size)),
        ("layer_types", ("a list of texts", _is_texts)),
        ("bos_token_id eos_token_id pad_token_id", ("a token id, or a list of them", _is_ids)),
    )
    for key in keys.split()
}


def check_kinds(data: Mapping[str, Any], where: str) -> None:
    """Raise one ConfigError for all values of `data` that are of another kind than their keys say."""
    bad = [
        f"{key} must be {words}, found {reprlib.repr(data[key])}"
        for key, (words, test) in _KINDS.items()
        if data.get(key) is not None and not test(data[key])
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
    check_kinds({"rope_theta": data.get("rope_theta")}, where)
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


class GGUFLike(Protocol):
    """What a family needs to see of a GGUF file."""

    metadata: dict[str, Any]
    tensors: Mapping[str, Any]

    def read(self, name: str, dtype: str = "float32") -> np.ndarray: ...


# What is read below, and what says nothing to models whose rope is neither "yarn" nor cut.
_GGUF_KEYS = {
    "vocab_size", "context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.causal",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
    "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "tensor_data_layout", "mm.tokens_per_image",
}  # fmt: skip
CONTEXT = "modelhub.context_length"  # of a model for which llama.cpp is told less


def read_gguf(file: GGUFLike, own: Iterable[str] = ()) -> dict[str, Any]:
    """The keys that all decoder architectures of GGUF have, under our names.

    own: further keys that the caller reads, without the architecture. Raises ConfigError for missing keys, for values
    that make no sense, and for other keys of the architecture that are set: they may change the maths.
    """
    metadata = file.metadata
    arch = metadata["general.architecture"]

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{arch}.{key}", default)

    needed = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count", "context_length")
    if missing := [f"{arch}.{key}" for key in needed if get(key) is None]:
        raise ConfigError(f"GGUF metadata lacks {', '.join(missing)}; the file is incomplete")
    check_sizes({f"{arch}.{key}": get(key) for key in needed}, "GGUF metadata")
    same = {
        "rope_theta": "rope.freq_base", "rope_local_base_freq": "rope.freq_base_swa",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_type": "rope.scaling.type",
        "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
        "sliding_window": "attention.sliding_window",
    }  # fmt: skip
    check_kinds({ours: get(theirs) for ours, theirs in same.items()}, f"GGUF metadata of {arch}")
    ids = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    check_kinds(ids, "GGUF metadata of the tokenizer")
    heads = get("attention.head_count")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list | None):
        raise ConfigError(f"GGUF metadata: tokenizer.ggml.tokens must be a list of texts, found {reprlib.repr(tokens)}")
    # As llama.cpp has it: the older key, 0 for none, and a factor without a type.
    factors = [x for x in (get("rope.scaling.factor"), get("rope.scale_linear")) if x is not None and not _is_zero(x)]
    scaling = get("rope.scaling.type") or ("linear" if factors else "none")
    rope = read_rope(
        "GGUF metadata",
        get("rope.freq_base", 10_000.0),
        {} if scaling == "none" else {"rope_type": scaling, "factor": factors[0] if factors else None},
    )
    if "rope_freqs.weight" in file.tensors:
        rope = _llama3_rope(rope, file.read("rope_freqs.weight"))
    values = {
        "vocab_size": get("vocab_size") if tokens is None else len(tokens),
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", get("embedding_length") // heads),
        "max_position_embeddings": metadata.get(CONTEXT, get("context_length")),
        # GGUF keeps float32, in which 1e-6 is 9.99999997e-07; taken as the decimal it came from.
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon', 1e-6):.6g}"),
        "rope": rope,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "extra": {key: value for key, value in ids.items() if value is not None},
    }
    check_sizes({key: values[key] for key in SIZES}, "GGUF metadata")
    _check_gguf_keys(metadata, arch, {*_GGUF_KEYS, *own}, values["head_dim"])
    return values


def _check_gguf_keys(metadata: Mapping[str, Any], arch: str, known: set[str], head_dim: int) -> None:
    bad = []
    needed = {"rope.dimension_count": head_dim, "attention.value_length": head_dim, "attention.causal": True}
    for name, value in metadata.items():
        key = name.removeprefix(f"{arch}.")
        if key == name:
            continue
        if key in needed and (type(value), value) != (type(needed[key]), needed[key]):
            bad.append(f"{name}={reprlib.repr(value)} (only {needed[key]} is supported)")
        elif key not in known and not _is_zero(value):
            bad.append(f"{name}={reprlib.repr(value)}")
    if bad:
        raise ConfigError(
            f"GGUF metadata that may change the maths, and that modelhub does not have: {', '.join(bad[:10])}. This "
            "model needs a newer modelhub"
        )


def _is_zero(value: Any) -> bool:
    """Whether a GGUF value switches nothing on: 0, false, empty, or an array of such."""
    return not np.any(value) if isinstance(value, np.ndarray) else not value


def write_gguf(config: Any, arch: str, problems: Iterable[str]) -> dict[str, Any]:
    """The keys that `read_gguf` reads, but for the tokenizer's.

    problems: what llama.cpp's code for `arch` cannot do of this config; one ConfigError is raised for all of them.
    """
    if problems := list(problems):
        raise ConfigError(
            f"this model cannot be a GGUF file, since llama.cpp's {arch} has {'; '.join(problems)}. Save it as a "
            "Hugging Face folder instead"
        )
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope.theta),
    }
    if config.rope.rope_type == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope.factor)}
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in values.items()}


def gguf_rope_freqs(config: Any) -> dict[str, np.ndarray]:
    """Llama 3's rope as GGUF keeps it: what each frequency (h / 2,) is divided by.

    Raises ConfigError where `read_gguf` could not tell the formula from that.
    """
    if config.rope.rope_type != "llama3":
        return {}
    default = Rope(config.rope.theta)
    plain, scaled = (rope.frequencies(config.head_dim) for rope in (default, config.rope))
    try:
        _llama3_rope(default, plain / scaled)
    except ConfigError:
        values = ", ".join(f"{key}={getattr(config.rope, key):g}" for key in Rope.LLAMA3)
        usual = ", ".join(f"{key}={getattr(default, key):g}" for key in Rope.LLAMA3[1:])
        raise ConfigError(
            f"this model cannot be a GGUF file that modelhub reads again: its rope has {values}; the file "
            f"would keep only what comes of them, which is told for {usual}. Save it as a Hugging Face folder instead"
        ) from None
    return {"rope_freqs.weight": plain / scaled}


def _llama3_rope(rope: Rope, divisors: np.ndarray) -> Rope:
    """GGUF keeps what each frequency (h / 2,) is divided by; the config has the formula."""
    if divisors.ndim != 1 or not ((divisors >= 1) & (divisors < 1e6)).all():
        raise ConfigError(f"GGUF: rope_freqs.weight {divisors.shape} must be a vector of divisors, 1 or more")
    plain = rope.frequencies(2 * len(divisors))
    found = Rope(rope.theta, "llama3", factor=round(float(divisors.max()), 4))
    if not np.allclose(plain / found.frequencies(2 * len(divisors)), divisors, rtol=1e-3):
        raise ConfigError("GGUF: rope_freqs.weight does not follow Llama 3's formula, the only one that is supported")
    return found
