"""Reading config.json strictly: a key that might change the maths is never dropped in silence."""

from collections.abc import Iterable, Mapping
from typing import Any

from modelhub.errors import ConfigError

# Keys that say nothing about the forward pass. They are kept and written back.
COSMETIC = {
    "architectures", "attn_implementation", "auto_map", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "finetuning_task", "id2label", "initializer_range",
    "is_decoder", "is_encoder_decoder", "label2id", "max_length", "model_type", "name_or_path", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "tf_legacy_loss",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "unsloth_fixed", "use_bfloat16",
    "use_cache",
}  # fmt: skip


def check_keys(data: Mapping[str, Any], known: Iterable[str], where: str) -> dict[str, Any]:
    """Return the cosmetic keys of `data`; raise ConfigError for keys that are neither known nor cosmetic.

    Unknown keys that switch nothing on (null, false, empty) count as cosmetic.
    """
    known = set(known)
    extra = {key: value for key, value in data.items() if key not in known}
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


def require(data: Mapping[str, Any], key: str, allowed: Iterable[Any], where: str) -> None:
    """Raise ConfigError if `key` is set to something other than the values whose maths we have."""
    if data.get(key) is not None and data[key] not in allowed:
        raise ConfigError(f"{where}: {key}={data[key]!r} is not supported; supported: {', '.join(map(repr, allowed))}")
