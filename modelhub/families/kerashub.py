"""KerasHub's backbones: the arguments in their config.json and the names in their weights, as ours.

Format and meaning: keras_hub/src/models of https://github.com/keras-team/keras-hub, version 0.32. What its classes
leave out (the context's length, rope bases, the activation) follows the models that it publishes.
"""

from collections.abc import Container, Mapping
from typing import Any, ClassVar, NamedTuple

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
_HARMLESS = {"layer_norm_epsilon", "name", "trainable", "dropout"}
_DTYPES = {
    "float32": "float32", "bfloat16": "bfloat16", "float16": "float16",
    "mixed_bfloat16": "float32", "mixed_float16": "float32",
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


def backbone_of(data: Mapping[str, Any]) -> str:
    """The class that a config.json names. Raises ConfigError for one that modelhub does not read."""
    name = str(data.get("registered_name")).rpartition(">")[2]  # "keras_hub>GemmaBackbone", earlier "keras_nlp>..."
    if name not in BACKBONES:
        raise ConfigError(
            f"this is a KerasHub preset of the class {name[:80]!r}; modelhub reads {', '.join(BACKBONES)}"
        )
    return name


class Given(NamedTuple):
    """name: of the class. tensors: the names in the weights, if known."""

    name: str
    where: str
    arguments: Mapping[str, Any]
    task: Any
    tensors: Container[str] | None


class KerasHub:
    """The format "keras", see config.Format; it is read only.

    sizes: {argument of the class: field} that must be given, same: that may be. only: {argument: the values whose maths
    we have}.
    """

    sizes: ClassVar[Mapping[str, str]] = {}
    same: ClassVar[Mapping[str, str]] = {}
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def read(self, cls: Any, stored: tuple[Mapping[str, Any], Container[str] | None]) -> dict[str, Any]:
        """The fields, of config.json and the names in the weights, if known.

        Raises ConfigError for arguments that are unknown or missing, and for quantised weights.
        """
        data, tensors = stored
        name, given = backbone_of(data), data.get("config")
        where = f"{name} config"
        if not isinstance(given, dict):
            raise ConfigError(f"{where}: expected the class's arguments as an object, found {type(given).__name__}")
        dtype = _stored_dtype(given.get("dtype"), where)
        told = {key: value for key, value in given.items() if key != "dtype"}
        refuse_unknown(told, {*self.sizes, *self.same, *self.only, *self.others(name), *_HARMLESS}, where)
        if missing := [key for key in self.sizes if given.get(key) is None]:
            raise ConfigError(f"{where} lacks {', '.join(missing)}; the file is incomplete")
        values = {ours: given[theirs] for theirs, ours in self.sizes.items()}
        check_sizes(values, where)
        for key, allowed in self.only.items():
            require(given, key, allowed, where)
        values |= {ours: given[theirs] for theirs, ours in self.same.items() if theirs in given}
        values |= {"model_type": BACKBONES[name], "extra": {"dtype": dtype} if dtype else {}}
        values |= self.fields(Given(name, where, given, data.get("task"), tensors), values)
        cls.check_values(values, where)
        return values

    def others(self, name: str) -> set[str]:
        """Arguments that `fields` looks at. name: of the class."""
        return set()

    def fields(self, given: Given, values: dict[str, Any]) -> dict[str, Any]:
        """What is not told by one argument each. values: what is."""
        return {}

    def write(self, config: Any) -> Any:
        raise ConfigError("KerasHub presets are read, not written. Save the model as a Hugging Face folder instead")


class _Decoder(KerasHub):
    """heads_first: the kernels of queries, keys and values are (heads, in, head_dim), else (in, heads, head_dim)."""

    sizes = {
        "vocabulary_size": "vocab_size", "hidden_dim": "hidden_size", "intermediate_dim": "intermediate_size",
        "num_layers": "num_hidden_layers", "num_query_heads": "num_attention_heads",
        "num_key_value_heads": "num_key_value_heads",
    }  # fmt: skip
    heads_first: ClassVar[bool] = False

    def parts(self, config: Any) -> tuple[str, Mapping[str, str], str]:
        """What is called how in the weights: the layers, their parts, and the last norm."""
        raise NotImplementedError

    def names(self, config: Any) -> NameMap:
        d, f, h, v = config.hidden_size, config.intermediate_size, config.head_dim, config.vocab_size
        n, k = config.num_attention_heads, config.num_key_value_heads

        def projection(heads: int) -> Via:
            if self.heads_first:
                return _kernel((heads, d, h), (0, 2, 1), (heads * h, d))
            return _kernel((d, heads, h), (1, 2, 0), (heads * h, d))

        kernels = {
            "self_attn.q_proj": projection(n), "self_attn.k_proj": projection(k), "self_attn.v_proj": projection(k),
            "self_attn.o_proj": _kernel((n, h, d), (2, 0, 1), (d, n * h)),
            "mlp.gate_proj": _kernel((d, f), (1, 0), (f, d)), "mlp.up_proj": _kernel((d, f), (1, 0), (f, d)),
            "mlp.down_proj": _kernel((f, d), (1, 0), (d, f)),
        }  # fmt: skip
        layer, block, norm = self.parts(config)
        rules = [
            Rule("layers/reversible_embedding/vars/0", "model.embed_tokens.weight"),
            Rule(_HEAD, "lm_head.weight", _kernel((d, v), (1, 0), (v, d))),
            Rule(f"layers/{norm}/vars/0", "model.norm.weight"),
        ]
        for theirs, ours in block.items():
            via = kernels.get(ours)
            rules += _in_layers(f"layers/{layer}", f"{theirs}/vars/0", "model.layers", f"{ours}.weight", via)
        return NameMap(tuple(rules), ignored=_IGNORED)


class GemmaKeras(_Decoder):
    """GemmaBackbone (Gemma 1, 2) and Gemma3Backbone."""

    same = {
        "head_dim": "head_dim", "attention_logit_soft_cap": "attn_logit_softcapping",
        "final_logit_soft_cap": "final_logit_softcapping",
    }  # fmt: skip
    # The blocks have this epsilon, whatever the config says.
    only = {"use_query_key_norm": (True,), "layer_norm_epsilon": (1e-6,)}
    heads_first = True

    def others(self, name: str) -> set[str]:
        return {
            "query_head_dim_normalize", "use_post_ffw_norm", "use_post_attention_norm", "use_sliding_window_attention",
            "sliding_window_size", "local_rope_scaling_factor", "global_rope_scaling_factor", "image_size",
            "vision_encoder",
        }  # fmt: skip

    def fields(self, given: Given, values: dict[str, Any]) -> dict[str, Any]:
        name, where, told, *_ = given
        is_gemma3 = name == "Gemma3Backbone"
        sandwich = is_gemma3 or bool(told.get("use_post_ffw_norm"))
        kind = "gemma2" if sandwich and not is_gemma3 else values["model_type"]
        for key in ("use_post_ffw_norm", "use_post_attention_norm"):
            require({key: False} | dict(told), key, (sandwich,), where)
        check_sizes({"head_dim": told.get("head_dim")}, where)
        every = (6 if is_gemma3 else 2) if told.get("use_sliding_window_attention") else 1  # every n-th is global
        found = {
            "model_type": kind,
            "max_position_embeddings": _CONTEXT[name],
            "layer_types": layer_types(values["num_hidden_layers"], every),
            "sliding_window": told.get("sliding_window_size") if every > 1 else None,
        }
        if not is_gemma3:
            found["intermediate_size"] = values["intermediate_size"] // 2  # there it counts the gate as well
        if kind == "gemma":
            if any((values | found).get(key) for key in (*[*self.same.values()][1:], "sliding_window")):
                raise ConfigError(
                    f"{where}: soft caps and sliding windows are supported with use_post_ffw_norm=true (Gemma 2)"
                )
        else:
            # keras-hub 0.32 takes query_head_dim_normalize and does not hand it on; Gemma 2 27B was trained without it.
            mean_width = values["hidden_size"] // values["num_attention_heads"]
            by_head = told.get("query_head_dim_normalize", True)
            found["query_pre_attn_scalar"] = told["head_dim"] if by_head else mean_width
        if is_gemma3:
            for rope, key, theta in (("rope", "global", 1_000_000.0), ("local_rope", "local", 10_000.0)):
                found[rope] = read_rope(where, theta, _linear(told.get(f"{key}_rope_scaling_factor")))
        return found

    def parts(self, config: Any) -> tuple[str, Mapping[str, str], str]:
        layer = "gemma3_decoder_block" if config.model_type == "gemma3_text" else "gemma_decoder_block"
        block = _GEMMA_BLOCK | (_GEMMA_NORMS if config.model_type == "gemma" else _GEMMA_NORMS_2)
        return layer, block, "rms_normalization"


class LlamaKeras(_Decoder):
    """LlamaBackbone, Llama3Backbone and MistralBackbone."""

    same = {"layer_norm_epsilon": "rms_norm_eps"}
    only = {"rope_position_scaling_factor": (1,)}  # keras-hub 0.32 takes it and does not use it

    def others(self, name: str) -> set[str]:
        own = {"sliding_window", "head_dim"} if name == "MistralBackbone" else {"tie_word_embeddings", *_LLAMA3_ROPE}
        return {"rope_max_wavelength", "rope_scaling_factor"} | own

    def fields(self, given: Given, values: dict[str, Any]) -> dict[str, Any]:
        name, where, told, _, tensors = given
        head_dim = told.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        check_sizes({"head_dim": head_dim}, where)
        rope = _linear(told.get("rope_scaling_factor"))
        if llama3 := {ours: told[key] for key, ours in _LLAMA3_ROPE.items() if told.get(key) is not None}:
            rope = {"rope_type": "llama3"} | llama3
        # keras-hub 0.32 does not save whether the head is the embedding.
        tied = told.get("tie_word_embeddings") is True if tensors is None else _HEAD not in tensors
        return {
            "head_dim": head_dim,
            "sliding_window": told.get("sliding_window", 512) if name == "MistralBackbone" else None,
            "rope": read_rope(where, told.get("rope_max_wavelength") or 10_000.0, rope),
            "max_position_embeddings": 131_072 if llama3 else _CONTEXT[name],
            "tie_word_embeddings": tied,
        }

    def parts(self, config: Any) -> tuple[str, Mapping[str, str], str]:
        norm = "llama_layer_norm" if config.model_type == "llama" else "mistral_layer_normalization"
        return f"{config.model_type}_transformer_decoder", _LLAMA_BLOCK, norm


class ViTKeras(KerasHub):
    """ViTBackbone, and the head that the preset's task.json tells, whose classes have no names there."""

    sizes = {
        "hidden_dim": "hidden_size", "mlp_dim": "intermediate_size", "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
    }  # fmt: skip
    same = {
        "patch_size": "patch_size", "dropout_rate": "hidden_dropout_prob", "use_class_token": "class_token",
        "attention_dropout": "attention_probs_dropout_prob",
    }  # fmt: skip
    only = dict.fromkeys(("use_mha_bias", "use_mlp_bias", "use_patch_bias"), (True,))

    def others(self, name: str) -> set[str]:
        return {"image_shape"}

    def fields(self, given: Given, values: dict[str, Any]) -> dict[str, Any]:
        shape, class_token = given.arguments.get("image_shape"), values.get("class_token", True)
        if not isinstance(shape, list) or len(shape) != 3:
            raise ConfigError(f"{given.where}: image_shape must be [height, width, channels], found {str(shape)[:80]}")
        return {
            "image_size": shape[:2],
            "num_channels": shape[2],
            "layer_norm_eps": given.arguments.get("layer_norm_epsilon", 1e-6),
            "pooling": "cls" if class_token else "mean",
        } | _classifier(given.task, class_token)

    def names(self, config: Any) -> NameMap:
        """With those of the task's weights after "task/"."""
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


def _classifier(data: Any, class_token: bool) -> dict[str, Any]:
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
