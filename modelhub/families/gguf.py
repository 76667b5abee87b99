"""The format "gguf": what llama.cpp's files say of decoders, and how they call their tensors."""

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import numpy as np

from modelhub.core.decoder import GLOBAL, LOCAL
from modelhub.core.nn import Rope
from modelhub.errors import ConfigError
from modelhub.families.config import Kind, check_kinds, check_sizes, read_rope
from modelhub.families.naming import KEEP, NameMap, Rule, Via
from modelhub.families.text import TextConfig, layer_types


class GGUFLike(Protocol):
    """What a family needs to see of a GGUF file."""

    metadata: dict[str, Any]
    tensors: Mapping[str, Any]

    def read(self, name: str, dtype: str = "float32") -> np.ndarray: ...


# Sizes that all architectures have, of which the last three may be left out.
_SIZES = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "max_position_embeddings": "context_length",
    "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length", "vocab_size": "vocab_size",
}  # fmt: skip
# What else they have, and what says nothing to models whose rope is neither "yarn" nor cut.
_OTHERS = {
    "attention.value_length", "attention.causal", "attention.layer_norm_rms_epsilon", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout", "mm.tokens_per_image",
}  # fmt: skip
# llama.cpp's names of what most decoders have (gguf-py's tensor_mapping.py says the same).
BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
CONTEXT = "modelhub.context_length"  # of a model for which llama.cpp is told less


_PATTERN = "attention.sliding_window_pattern"


class GGUF:
    """As llama.cpp has it when nothing is overridden: silu, plain or linear rope, no biases.

    A family overrides what is otherwise. archs: {model_type: llama.cpp's name of it}, where they differ. keys: {field:
    key of the architecture}, of the model_types that have the field. activations: the names of the one in its code.
    """

    archs: ClassVar[Mapping[str, str]] = {}
    keys: ClassVar[Mapping[str, str]] = {"sliding_window": "attention.sliding_window"}
    activations: ClassVar[tuple[str, ...]] = ("silu", "swish")
    biases: ClassVar[bool] = False
    llama3: ClassVar[bool] = False  # whether llama.cpp's code takes Llama 3's rope for this architecture

    def kind(self, arch: str, file: GGUFLike) -> str:
        """The model_type."""
        return {theirs: ours for ours, theirs in self.archs.items()}.get(arch, arch)

    def own_keys(self, kind: Kind) -> dict[str, str]:
        """{field: key of the architecture}, of what this model_type has besides what all have."""
        keys = {**self.keys, "layer_types": _PATTERN}
        return {field: key for field, key in keys.items() if field not in kind.lacks}

    def fields(self, kind: Kind, file: GGUFLike, values: dict[str, Any]) -> dict[str, Any]:
        """What is particular to the model_type. values: the fields that all have."""
        arch = file.metadata["general.architecture"]
        stored = {field: file.metadata.get(f"{arch}.{key}") for field, key in self.own_keys(kind).items()}
        pattern = stored.pop("layer_types", None)
        found = {field: kind.defaults.get(field) if x is None else x for field, x in stored.items()}
        if isinstance(pattern, np.ndarray):
            found["layer_types"] = [LOCAL if is_local else GLOBAL for is_local in pattern]
        elif pattern is not None:
            check_sizes({f"{arch}.{_PATTERN}": pattern}, "GGUF metadata")
            found["layer_types"] = layer_types(values["num_hidden_layers"], pattern)
        return found

    def needs(self, config: TextConfig) -> dict[str, bool]:
        """{what llama.cpp's code for it has: whether that is true of the config}."""
        windows = "sliding_window" in self.own_keys(config.kind(config.model_type))
        return {
            f"the activation {self.activations[0]}, not {config.activation}": config.activation in self.activations,
            "only global layers": windows or LOCAL not in config.layer_types,
            "no biases": self.biases or not config.attention_bias,
        }

    def metadata(self, config: TextConfig, arch: str) -> dict[str, Any]:
        """What `fields` reads."""
        keys = self.own_keys(config.kind(config.model_type))
        values = {key: getattr(config, field) for field, key in keys.items()}
        if LOCAL not in config.layer_types:
            values["attention.sliding_window"] = None
        if _PATTERN in values:
            usual = config.layer_types == config.default_layer_types()
            values[_PATTERN] = None if usual else [kind == LOCAL for kind in config.layer_types]
        return {f"{arch}.{key}": x for key, x in values.items() if x is not None}

    def block(self, config: TextConfig) -> Mapping[str, str]:
        return BLOCK

    def via(self, config: TextConfig, ours: str) -> Via:
        """How values of a layer's part are stored otherwise than here."""
        return KEEP

    def read(self, cls: type[TextConfig], file: GGUFLike) -> dict[str, Any]:
        """The fields, of a file's metadata. Raises ConfigError for missing keys, and for others that are set."""
        metadata = file.metadata
        arch = metadata["general.architecture"]
        model_type = self.kind(arch, file)
        kind = cls.kind(model_type)

        def get(key: str, default: Any = None) -> Any:
            return metadata.get(f"{arch}.{key}", default)

        needed = [*_SIZES.values()][:5]
        if missing := [f"{arch}.{key}" for key in needed if get(key) is None]:
            raise ConfigError(f"GGUF metadata lacks {', '.join(missing)}; the file is incomplete")
        check_sizes({f"{arch}.{key}": get(key) for key in needed}, "GGUF metadata")
        same = {
            "rope_theta": "rope.freq_base", "rope_local_base_freq": "rope.freq_base_swa",
            "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_type": "rope.scaling.type",
        }  # fmt: skip
        check_kinds({ours: get(theirs) for ours, theirs in same.items()}, f"GGUF metadata of {arch}")
        ids = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        check_kinds(ids, "GGUF metadata of the tokenizer")
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list | None):
            found = reprlib.repr(tokens)
            raise ConfigError(f"GGUF metadata: tokenizer.ggml.tokens must be a list of texts, found {found}")
        # As llama.cpp has it: the older key, 0 for none, and a factor without a type.
        scales = [
            x for x in (get("rope.scaling.factor"), get("rope.scale_linear")) if x is not None and not _is_zero(x)
        ]
        scaling = get("rope.scaling.type") or ("linear" if scales else "none")
        entry = {} if scaling == "none" else {"rope_type": scaling, "factor": scales[0] if scales else None}
        rope = read_rope("GGUF metadata", get("rope.freq_base", 10_000.0), entry)
        if "rope_freqs.weight" in file.tensors:
            rope = _llama3_rope(rope, file.read("rope_freqs.weight"))
        sizes = {field: get(key) for field, key in _SIZES.items()}
        heads = sizes["num_attention_heads"]
        told = {"num_key_value_heads": heads, "head_dim": sizes["hidden_size"] // heads}
        told |= {field: size for field, size in sizes.items() if size is not None}
        told["vocab_size"] = sizes["vocab_size"] if tokens is None else len(tokens)
        values = told | {
            "model_type": model_type,
            "max_position_embeddings": metadata.get(CONTEXT, told["max_position_embeddings"]),
            # GGUF keeps float32, in which 1e-6 is 9.99999997e-07; taken as the decimal it came from.
            "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon', 1e-6):.6g}"),
            "rope": rope,
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "extra": {key: value for key, value in ids.items() if value is not None},
        }
        check_sizes({key: values[key] for key in cls.sizes() & values.keys()}, "GGUF metadata")
        known = {*_SIZES.values(), *_OTHERS, *self.own_keys(kind).values()}
        _check_keys(metadata, arch, known, values["head_dim"])
        values |= self.fields(kind, file, values)
        cls.check_values(values, f"GGUF metadata of {arch}")
        return values

    def write(self, config: TextConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Metadata but for the tokenizer's, and tensors that are no parameters. Raises ConfigError: see `needs`."""
        arch = self.archs.get(config.model_type, config.model_type)
        problems = [what for what, holds in self.needs(config).items() if not holds]
        if config.rope.rope_type == "llama3" and not self.llama3:
            problems.append("no Llama 3 rope")
        if problems:
            raise ConfigError(
                f"this model cannot be a GGUF file, since llama.cpp's {arch} has {'; '.join(problems)}. Save it as a "
                "Hugging Face folder instead"
            )
        values: dict[str, Any] = {key: getattr(config, field) for field, key in _SIZES.items()} | {
            "attention.value_length": config.head_dim,
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            "rope.dimension_count": config.head_dim,
            "rope.freq_base": float(config.rope.theta),
        }
        if config.rope.rope_type == "linear":
            values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope.factor)}
        data = {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in values.items()}
        return data | self.metadata(config, arch), _rope_freqs(config)

    def names(self, config: TextConfig) -> NameMap:
        rules = [
            Rule("token_embd.weight", "model.embed_tokens.weight"),
            Rule("output_norm.weight", "model.norm.weight", self.via(config, "model.norm")),
            Rule("output.weight", "lm_head.weight"),
        ]
        for theirs, ours in self.block(config).items():
            rules.append(Rule(f"blk.{{}}.{theirs}.{{}}", f"model.layers.{{}}.{ours}.{{}}", self.via(config, ours)))
        return NameMap(tuple(rules), ignored=("rope_freqs.weight",))


def _check_keys(metadata: Mapping[str, Any], arch: str, known: Iterable[str], head_dim: int) -> None:
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


def _rope_freqs(config: TextConfig) -> dict[str, np.ndarray]:
    """Llama 3's rope as GGUF keeps it: what each frequency (h / 2,) is divided by.

    Raises ConfigError where `_llama3_rope` could not tell the formula from that.
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
