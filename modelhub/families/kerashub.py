"""KerasHub's backbones: the arguments in their config.json and the names in their weights, as ours.

Format and meaning: keras_hub/src/models of https://github.com/keras-team/keras-hub, version 0.32. What its classes
leave out (the context's length, rope bases, the activation) follows the models that it publishes.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import numpy as np

from modelhub.core.problems import MULTI_LABEL
from modelhub.errors import ConfigError
from modelhub.families.config import check_sizes, read_rope, refuse_unknown, require
from modelhub.families.naming import KEEP, NameMap, Rule, Via
from modelhub.families.text import layer_types

# The class that config.json names -> model_type. Gemma 2 is a GemmaBackbone too.
BACKBONES = {
    "GemmaBackbone": "gemma", "Gemma3Backbone": "gemma3_text", "LlamaBackbone": "llama", "Llama3Backbone": "llama",
    "MistralBackbone": "mistral", "ViTBackbone": "vit",
}  # fmt: skip
_SIZES = {
    "vocabulary_size": "vocab_size", "hidden_dim": "hidden_size", "intermediate_dim": "intermediate_size",
    "num_layers": "num_hidden_layers", "num_query_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
}  # fmt: skip
_VIT_SIZES = {
    "hidden_dim": "hidden_size", "mlp_dim": "intermediate_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}  # fmt: skip
_HARMLESS = {"layer_norm_epsilon", "name", "trainable", "dropout"}
_DTYPES = {
    "float32": "float32", "bfloat16": "bfloat16", "float16": "float16",
    "mixed_bfloat16": "float32", "mixed_float16": "float32",
}  # fmt: skip

_GEMMA_KEYS = {
    "head_dim", "query_head_dim_normalize", "use_post_ffw_norm", "use_post_attention_norm", "attention_logit_soft_cap",
    "final_logit_soft_cap", "use_sliding_window_attention", "sliding_window_size", "use_query_key_norm",
    "local_rope_scaling_factor", "global_rope_scaling_factor", "image_size", "vision_encoder",
}  # fmt: skip
_LLAMA_KEYS = {
    "rope_max_wavelength", "rope_position_scaling_factor", "rope_frequency_adjustment_factor", "rope_low_freq_factor",
    "rope_high_freq_factor", "rope_pretraining_sequence_length", "rope_scaling_factor", "tie_word_embeddings",
}  # fmt: skip
_MISTRAL_KEYS = {"rope_max_wavelength", "rope_scaling_factor", "sliding_window", "head_dim"}
_VIT_KEYS = {
    "image_shape", "patch_size", "dropout_rate", "attention_dropout", "use_mha_bias", "use_mlp_bias", "use_patch_bias",
    "use_class_token",
}  # fmt: skip
_CLASSIFIER_KEYS = {"backbone", "preprocessor", "num_classes", "pooling", "activation", "intermediate_dim"}
_LLAMA3_ROPE = {
    "rope_frequency_adjustment_factor": "factor", "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor", "rope_pretraining_sequence_length": "original_max_position_embeddings",
}  # fmt: skip
_CONTEXT = {
    "GemmaBackbone": 8192, "Gemma3Backbone": 131_072, "LlamaBackbone": 4096, "Llama3Backbone": 8192,
    "MistralBackbone": 32_768,
}  # fmt: skip


def backbone_of(data: Mapping[str, Any]) -> str:
    """The class that a config.json names. Raises ConfigError for one that modelhub does not read."""
    name = str(data.get("registered_name")).rpartition(">")[2]  # "keras_hub>GemmaBackbone", earlier "keras_nlp>..."
    if name not in BACKBONES:
        raise ConfigError(
            f"this is a KerasHub preset of the class {name[:80]!r}; modelhub reads {', '.join(BACKBONES)}"
        )
    return name


Stored = tuple[Mapping[str, Any], Container[str] | None]  # config.json, and the names in the weights, if known


def _read_gemma(data: Mapping[str, Any], tensors: Container[str] | None) -> dict[str, Any]:
    """The fields of Gemma's Config from the config.json of a GemmaBackbone (Gemma 1, 2) or Gemma3Backbone."""
    name = backbone_of(data)
    where = f"{name} config"
    values, given = _read_decoder(data, _GEMMA_KEYS, where)
    is_gemma3 = name == "Gemma3Backbone"
    sandwich = is_gemma3 or bool(given.get("use_post_ffw_norm"))
    kind = BACKBONES[name] if is_gemma3 or not sandwich else "gemma2"
    for key in ("use_post_ffw_norm", "use_post_attention_norm"):
        require({key: False} | given, key, (sandwich,), where)
    require(given, "use_query_key_norm", (True,), where)
    require(given, "layer_norm_epsilon", (1e-6,), where)  # the blocks have this one, whatever the config says
    check_sizes({"head_dim": given.get("head_dim")}, where)
    values |= {"model_type": kind, "head_dim": given["head_dim"]}
    if not is_gemma3:
        values["intermediate_size"] //= 2  # there it counts the gate as well
    if kind != "gemma":
        # keras-hub 0.32 takes query_head_dim_normalize and does not hand it on; Gemma 2 27B was trained without it.
        mean_width = values["hidden_size"] // values["num_attention_heads"]
        values["query_pre_attn_scalar"] = (
            given["head_dim"] if given.get("query_head_dim_normalize", True) else mean_width
        )
    every = (6 if is_gemma3 else 2) if given.get("use_sliding_window_attention") else 1  # every n-th layer is global
    values["layer_types"] = layer_types(values["num_hidden_layers"], every)
    optional = {
        "attn_logit_softcapping": given.get("attention_logit_soft_cap"),
        "final_logit_softcapping": given.get("final_logit_soft_cap"),
        "sliding_window": given.get("sliding_window_size") if every > 1 else None,
    }
    if kind == "gemma" and any(optional.values()):
        raise ConfigError(f"{where}: soft caps and sliding windows are supported with use_post_ffw_norm=true (Gemma 2)")
    if is_gemma3:
        values["rope"] = read_rope(where, 1_000_000.0, _linear(given.get("global_rope_scaling_factor")))
        values["local_rope"] = read_rope(where, 10_000.0, _linear(given.get("local_rope_scaling_factor")))
    return values | optional


def _read_llama(data: Mapping[str, Any], tensors: Container[str] | None) -> dict[str, Any]:
    """The fields of Llama's Config from the config.json of a LlamaBackbone, Llama3Backbone or MistralBackbone.

    tensors: the names in the weights; keras-hub 0.32 does not save whether the head is the embedding.
    """
    name = backbone_of(data)
    where = f"{name} config"
    is_mistral = name == "MistralBackbone"
    values, given = _read_decoder(data, _MISTRAL_KEYS if is_mistral else _LLAMA_KEYS, where)
    head_dim = given.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    check_sizes({"head_dim": head_dim}, where)
    require(given, "rope_position_scaling_factor", (1,), where)  # keras-hub 0.32 takes it and does not use it
    rope = _linear(given.get("rope_scaling_factor"))
    if llama3 := {ours: given[key] for key, ours in _LLAMA3_ROPE.items() if given.get(key) is not None}:
        rope = {"rope_type": "llama3"} | llama3
    values |= {
        "model_type": BACKBONES[name],
        "head_dim": head_dim,
        "sliding_window": given.get("sliding_window", 512) if is_mistral else None,
        "rope": read_rope(where, given.get("rope_max_wavelength") or 10_000.0, rope),
        "max_position_embeddings": 131_072 if llama3 else values["max_position_embeddings"],
        "tie_word_embeddings": given.get("tie_word_embeddings") is True if tensors is None else _HEAD not in tensors,
    }
    return values


def _read_vit(data: Mapping[str, Any], tensors: Container[str] | None) -> dict[str, Any]:
    """The fields of ViT's Config from the config.json of a ViTBackbone.

    data["task"]: the preset's task.json, for the head. Its classes have no names there.
    """
    where = "ViTBackbone config"
    values, given = _read(data, _VIT_SIZES, _VIT_KEYS, where)
    for key in ("use_mha_bias", "use_mlp_bias", "use_patch_bias"):
        require(given, key, (True,), where)
    shape = given.get("image_shape")
    if not isinstance(shape, list) or len(shape) != 3:
        raise ConfigError(f"{where}: image_shape must be [height, width, channels], found {str(shape)[:80]}")
    values |= {"model_type": "vit", "image_size": shape[:2], "num_channels": shape[2]}
    optional = {
        "patch_size": "patch_size", "dropout_rate": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob", "use_class_token": "class_token",
    }  # fmt: skip
    values |= {ours: given[theirs] for theirs, ours in optional.items() if theirs in given}
    values |= {"layer_norm_eps": given.get("layer_norm_epsilon", 1e-6)}
    class_token = values.get("class_token", True)
    values["pooling"] = "cls" if class_token else "mean"
    return values | _read_classifier(data.get("task"), class_token)


def _read_classifier(data: Any, class_token: bool) -> dict[str, Any]:
    """From a task.json, or None for a backbone alone."""
    if data is None:
        return {}
    where, head = "task.json", data.get("config")
    name = str(data.get("registered_name")).rpartition(">")[2]
    if name != "ViTImageClassifier" or not isinstance(head, dict):
        raise ConfigError(f"{where} is of the class {name[:80]!r}; modelhub reads ViTImageClassifier")
    refuse_unknown({key: value for key, value in head.items() if key != "dtype"}, _CLASSIFIER_KEYS | _HARMLESS, where)
    # Of the probabilities of softmax or sigmoid, the logits are what they are given.
    require(head, "activation", ("linear", "softmax", "sigmoid"), where)
    if head.get("intermediate_dim") is not None:
        raise ConfigError(
            f"{where}: intermediate_dim={head['intermediate_dim']!r} is a second layer in the head, which ViTs here do "
            "not have. Remove task.json to load the backbone alone"
        )
    if head.get("pooling", "token") != (pooling := "token" if class_token else "gap"):
        raise ConfigError(
            f"{where}: pooling={head['pooling']!r} is not supported, only {pooling!r} for a backbone with "
            f"use_class_token={class_token}: the mean here is of patches, without the class token"
        )
    values = {"num_labels": head.get("num_classes"), "classifier_dropout": head.get("dropout", 0.0)}
    return values | ({"problem_type": MULTI_LABEL} if head.get("activation") == "sigmoid" else {})


def _read_decoder(data: Mapping[str, Any], known: Iterable[str], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`_read`, and what else all decoders have."""
    values, given = _read(data, _SIZES, known, where)
    values["rms_norm_eps"] = given.get("layer_norm_epsilon", 1e-6)
    values["max_position_embeddings"] = _CONTEXT[backbone_of(data)]
    return values, given


def _read(
    data: Mapping[str, Any], sizes: Mapping[str, str], known: Iterable[str], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Under our names the sizes and the dtype; and all arguments as they are.

    known: the class's own arguments. Raises ConfigError for unknown and missing ones, and for quantised weights.
    """
    given = data.get("config")
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: expected the class's arguments as an object, found {type(given).__name__}")
    dtype = _stored_dtype(given.get("dtype"), where)
    refuse_unknown({key: value for key, value in given.items() if key != "dtype"}, {*sizes, *_HARMLESS, *known}, where)
    if missing := [key for key in sizes if given.get(key) is None]:
        raise ConfigError(f"{where} lacks {', '.join(missing)}; the file is incomplete")
    values = {ours: given[theirs] for theirs, ours in sizes.items()}
    check_sizes(values, where)
    return values | {"extra": {"dtype": dtype} if dtype else {}}, given


def _stored_dtype(policy: Any, where: str) -> str | None:
    """From a Keras dtype policy; None: an older config, which has none."""
    if isinstance(policy, Mapping):
        kind, arguments = policy.get("class_name"), policy.get("config")
        policy = arguments.get("name") if kind == "DTypePolicy" and isinstance(arguments, Mapping) else kind
    if policy is None:
        return None
    if not isinstance(policy, str) or policy not in _DTYPES:
        raise ConfigError(
            f"{where}: the weights are quantised (dtype {str(policy)[:80]}), and modelhub reads KerasHub presets of "
            f"the dtypes {', '.join(_DTYPES)}. Take the preset that is not quantised"
        )
    return _DTYPES[policy]


def _linear(factor: Any) -> dict[str, Any]:
    return {} if factor in (None, 1) else {"rope_type": "linear", "factor": factor}


_HEAD = "layers/reversible_embedding/vars/1"
_GEMMA_BLOCK = {
    "pre_attention_norm": "input_layernorm", "attention/query_dense": "self_attn.q_proj",
    "attention/key_dense": "self_attn.k_proj", "attention/value_dense": "self_attn.v_proj",
    "attention/output_dense": "self_attn.o_proj", "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm", "gating_ffw": "mlp.gate_proj", "gating_ffw_2": "mlp.up_proj",
    "ffw_linear": "mlp.down_proj",
}  # fmt: skip
# The norm before the MLP has another name in Gemma 1, where none follows the attention.
_GEMMA_NORMS = {"pre_ffw_norm": "post_attention_layernorm"}
_GEMMA_NORMS_2 = {
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LLAMA_BLOCK = {
    "_self_attention_layernorm": "input_layernorm", "_self_attention_layer/_query_dense": "self_attn.q_proj",
    "_self_attention_layer/_key_dense": "self_attn.k_proj", "_self_attention_layer/_value_dense": "self_attn.v_proj",
    "_self_attention_layer/_output_dense": "self_attn.o_proj", "_feedforward_layernorm": "post_attention_layernorm",
    "_feedforward_gate_dense": "mlp.gate_proj", "_feedforward_intermediate_dense": "mlp.up_proj",
    "_feedforward_output_dense": "mlp.down_proj",
}  # fmt: skip
_VIT_BLOCK = {
    "layer_norm_1": "layernorm_before", "mha/query_dense": "attention.attention.query",
    "mha/key_dense": "attention.attention.key", "mha/value_dense": "attention.attention.value",
    "mha/output_dense": "attention.output.dense", "layer_norm_2": "layernorm_after",
    "mlp/dense_1": "intermediate.dense", "mlp/dense_2": "output.dense",
}  # fmt: skip
_IGNORED = (
    "{}/seed_generator/vars/{}",  # of dropout
    "layers/gemma3_vision_encoder/{}",
    "layers/gemma3_interleave_embeddings/{}",
    "task/optimizer/{}",
)


def _gemma_names(config: Any) -> NameMap:
    """The names of a preset of GemmaBackbone or Gemma3Backbone. config: Gemma's Config."""
    block = _GEMMA_BLOCK | (_GEMMA_NORMS if config.model_type == "gemma" else _GEMMA_NORMS_2)
    layer = "gemma3_decoder_block" if config.model_type == "gemma3_text" else "gemma_decoder_block"
    return _names(config, layer, block, "rms_normalization", heads_first=True)


def _llama_names(config: Any) -> NameMap:
    """The names of a preset of LlamaBackbone, Llama3Backbone or MistralBackbone. config: Llama's Config."""
    norm = "llama_layer_norm" if config.model_type == "llama" else "mistral_layer_normalization"
    return _names(config, f"{config.model_type}_transformer_decoder", _LLAMA_BLOCK, norm, heads_first=False)


def _names(config: Any, layer: str, block: Mapping[str, str], norm: str, heads_first: bool) -> NameMap:
    """heads_first: the kernels of queries, keys and values are (heads, in, head_dim), else (in, heads, head_dim)."""
    d, f, h, v = config.hidden_size, config.intermediate_size, config.head_dim, config.vocab_size
    n, k = config.num_attention_heads, config.num_key_value_heads

    def projection(heads: int) -> Via:
        if heads_first:
            return _kernel((heads, d, h), (0, 2, 1), (heads * h, d))
        return _kernel((d, heads, h), (1, 2, 0), (heads * h, d))

    kernels = {
        "self_attn.q_proj": projection(n), "self_attn.k_proj": projection(k), "self_attn.v_proj": projection(k),
        "self_attn.o_proj": _kernel((n, h, d), (2, 0, 1), (d, n * h)),
        "mlp.gate_proj": _kernel((d, f), (1, 0), (f, d)), "mlp.up_proj": _kernel((d, f), (1, 0), (f, d)),
        "mlp.down_proj": _kernel((f, d), (1, 0), (d, f)),
    }  # fmt: skip
    rules = [
        Rule("layers/reversible_embedding/vars/0", "model.embed_tokens.weight"),
        Rule(_HEAD, "lm_head.weight", _kernel((d, v), (1, 0), (v, d))),
        Rule(f"layers/{norm}/vars/0", "model.norm.weight"),
    ]
    for theirs, ours in block.items():
        rules += _in_layers(f"layers/{layer}", f"{theirs}/vars/0", "model.layers", f"{ours}.weight", kernels.get(ours))
    return NameMap(tuple(rules), ignored=_IGNORED)


def _vit_names(config: Any) -> NameMap:
    """The names of a preset of ViTBackbone, with those of its task's weights after "task/". config: ViT's Config."""
    d, f, n, c = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_channels
    h, tokens = d // n, config.grid[0] * config.grid[1] + config.class_token
    projection, bias = _kernel((d, n, h), (1, 2, 0), (d, d)), _kernel((n, h), (0, 1), (d,))
    vias = {f"attention.attention.{name}": (projection, bias) for name in ("query", "key", "value")} | {
        "attention.output.dense": (_kernel((n, h, d), (2, 0, 1), (d, d)), KEEP),
        "intermediate.dense": (_kernel((d, f), (1, 0), (f, d)), KEEP),
        "output.dense": (_kernel((f, d), (1, 0), (d, f)), KEEP),
    }
    start, embeddings = "layers/vi_t_patching_and_embedding", "vit.embeddings"
    patches, positions = (*config.patch, c, d), (tokens, d)
    head = _kernel((d, config.num_labels), (1, 0), (config.num_labels, d))
    rules = [
        Rule(f"{start}/vars/0", f"{embeddings}.cls_token"),
        Rule(f"{start}/position_embedding/vars/0", f"{embeddings}.position_embeddings",
             _kernel(positions, (0, 1), (1, *positions))),
        Rule(f"{start}/patch_embedding/vars/0", f"{embeddings}.patch_embeddings.projection.weight",
             _kernel(patches, (3, 2, 0, 1), (d, c, *config.patch))),
        Rule(f"{start}/patch_embedding/vars/1", f"{embeddings}.patch_embeddings.projection.bias"),
        Rule("layers/vi_t_encoder/layer_norm/vars/0", "vit.layernorm.weight"),
        Rule("layers/vi_t_encoder/layer_norm/vars/1", "vit.layernorm.bias"),
        Rule("task/layers/dense/vars/0", "classifier.weight", head),
        Rule("task/layers/dense/vars/1", "classifier.bias"),
    ]  # fmt: skip
    layer = "layers/vi_t_encoder/encoder_layers/vi_t_encoder_block"
    for theirs, ours in _VIT_BLOCK.items():
        for index, (part, via) in enumerate(zip(("weight", "bias"), vias.get(ours, (KEEP, KEEP)), strict=True)):
            rules += _in_layers(layer, f"{theirs}/vars/{index}", "vit.encoder.layer", f"{ours}.{part}", via)
    return NameMap(tuple(rules), ignored=_IGNORED)


def _in_layers(layer: str, theirs: str, layers: str, ours: str, via: Via | None) -> list[Rule]:
    """The same tensor of all layers: Keras numbers them "block", "block_1", "block_2", ..."""
    return [
        Rule(f"{layer}/{theirs}", f"{layers}.0.{ours}", via or KEEP),
        Rule(f"{layer}_{{}}/{theirs}", f"{layers}.{{}}.{ours}", via or KEEP),
    ]


def _kernel(theirs: tuple[int, ...], axes: tuple[int, ...], ours: tuple[int, ...]) -> Via:
    """A tensor of shape `theirs`: its axes in this order, run together (or apart), are ours; kernels are (out, in)."""
    permuted = [theirs[axis] for axis in axes]
    return Via(
        lambda x: np.ascontiguousarray(x.transpose(axes)).reshape(ours),
        lambda x: np.ascontiguousarray(x.reshape(permuted).transpose(np.argsort(axes))),
        lambda shape: ours if shape == theirs else (1, 1, 1, *shape),  # never taken for ours
    )


class _KerasHub:
    """The format "keras", see config.Format; it is read only."""

    def __init__(
        self,
        read: Callable[[Mapping[str, Any], Container[str] | None], dict[str, Any]],
        names: Callable[[Any], NameMap],
    ):
        self._read, self.names = read, names

    def read(self, cls: Any, stored: Stored) -> dict[str, Any]:
        values = self._read(*stored)
        cls.check_values(values, f"{backbone_of(stored[0])} config")
        return values

    def write(self, config: Any) -> Any:
        raise ConfigError("KerasHub presets are read, not written. Save the model as a Hugging Face folder instead")


GEMMA = _KerasHub(_read_gemma, _gemma_names)
LLAMA = _KerasHub(_read_llama, _llama_names)
VIT = _KerasHub(_read_vit, _vit_names)
