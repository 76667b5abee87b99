"""What the configs of all families share: strict reading of config.json, rope in both spellings, GGUF metadata."""

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, Protocol

import numpy as np

from modelhub.core.nn import ACTIVATIONS, Rope
from modelhub.errors import ConfigError

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}

# Keys that say nothing about the forward pass. They are kept and written back.
COSMETIC = {
    "architectures", "attention_dropout", "attn_implementation", "auto_map", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "finetuning_task", "id2label", "initializer_range",
    "is_decoder", "is_encoder_decoder", "label2id", "max_length", "model_type", "name_or_path", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "tf_legacy_loss",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "unsloth_fixed", "use_bfloat16",
    "transformers.js_config", "use_cache",
}  # fmt: skip


def check_keys(data: Mapping[str, Any], known: Iterable[str], where: str) -> dict[str, Any]:
    """Return the cosmetic keys of `data`; raise ConfigError for keys that are neither known nor cosmetic.

    Unknown keys that switch nothing on (null, false, empty) count as cosmetic. What `write_common` writes anyway is
    left out: architectures, and the older spelling of dtype.
    """
    known = {*known, "architectures", "torch_dtype"}
    extra = {key: value for key, value in data.items() if key not in known}
    if dtype := data.get("dtype") or data.get("torch_dtype"):
        extra["dtype"] = dtype
    unknown = sorted(
        key
        for key, value in extra.items()
        if key not in COSMETIC and not key.startswith("_") and value not in (None, False, [], {}, "")
    )
    if unknown:
        listed = ", ".join(f"{key}={extra[key]!r}" for key in unknown)
        raise ConfigError(
            f"{where}: keys that modelhub does not know and that may change the maths: {listed}. "
            f"If they are harmless, remove them from config.json; if not, this model needs a newer modelhub."
        )
    return extra


def check_sizes(sizes: Mapping[str, Any], where: str) -> None:
    """Raise one ConfigError for all sizes that are no whole numbers above 0, and for a head_dim that is odd."""
    bad = [f"{k}={v!r}" for k, v in sizes.items() if not isinstance(v, Integral) or isinstance(v, bool) or v < 1]
    if bad:
        raise ConfigError(f"{where}: these must be whole numbers, 1 or more: {', '.join(bad)}")
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


def read_rope(where: str, theta: Any, *entries: Mapping[str, Any] | None) -> Rope:
    """A Rope from rope_theta and from rope_scaling or rope_parameters entries, of which later ones win."""
    entry: dict[str, Any] = {"rope_theta": theta}
    for given in entries:
        entry |= {key: value for key, value in (given or {}).items() if value is not None}
    kind = entry.pop("rope_type", entry.pop("type", "default"))
    entry.pop("type", None)  # the older name of rope_type; some files have both
    fields = {"default": (), "linear": ("factor",), "llama3": Rope.LLAMA3}.get(kind)
    if fields is None:
        raise ConfigError(f"{where}: rope type {kind!r} is not supported; supported: default, linear, llama3")
    if missing := [key for key in fields if key not in entry]:
        raise ConfigError(f"{where}: rope type {kind!r} needs {', '.join(missing)}")
    if unknown := set(entry) - {"rope_theta", *Rope.LLAMA3}:
        raise ConfigError(f"{where}: rope keys that modelhub does not know: {', '.join(sorted(unknown))}")
    return Rope(float(entry["rope_theta"]), kind, **{key: entry[key] for key in fields})


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


def read_gguf(file: GGUFLike) -> dict[str, Any]:
    """The keys that all decoder architectures of GGUF have, under our names. Raises ConfigError for missing ones."""
    metadata = file.metadata
    arch = metadata["general.architecture"]

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{arch}.{key}", default)

    needed = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count", "context_length")
    if missing := [f"{arch}.{key}" for key in needed if get(key) is None]:
        raise ConfigError(f"GGUF metadata lacks {', '.join(missing)}; the file is incomplete")
    check_sizes({f"{arch}.{key}": get(key) for key in needed}, "GGUF metadata")
    heads = get("attention.head_count")
    tokens = metadata.get("tokenizer.ggml.tokens")
    scaling = get("rope.scaling.type", "none")
    rope = read_rope(
        "GGUF metadata",
        get("rope.freq_base", 10_000.0),
        {} if scaling == "none" else {"rope_type": scaling, "factor": get("rope.scaling.factor")},
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
        "max_position_embeddings": get("context_length"),
        # GGUF keeps float32, in which 1e-6 is 9.99999997e-07; taken as the decimal it came from.
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon', 1e-6):.6g}"),
        "rope": rope,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "extra": {
            f"{name}_token_id": metadata[f"tokenizer.ggml.{name}_token_id"]
            for name in ("bos", "eos")
            if f"tokenizer.ggml.{name}_token_id" in metadata
        },
    }
    check_sizes({key: values[key] for key in SIZES}, "GGUF metadata")
    return values


def _llama3_rope(rope: Rope, divisors: np.ndarray) -> Rope:
    """GGUF keeps what each frequency (h / 2,) is divided by; the config has the formula."""
    plain = rope.frequencies(2 * len(divisors))
    found = Rope(rope.theta, "llama3", factor=round(float(divisors.max()), 4))
    if not np.allclose(plain / found.frequencies(2 * len(divisors)), divisors, rtol=1e-3):
        raise ConfigError("GGUF: rope_freqs.weight does not follow Llama 3's formula, the only one that is supported")
    return found
