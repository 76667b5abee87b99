"""Configs, and whole presets: loaded, and made to write a few tokens."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import gguf as gguf_py
from fuzz import mutations
from fuzz.target import TARGETS, Target, write_json
from fuzz.texts import TEMPLATE, byte_level
from fuzz.weights import finish
from sentencepiece import SentencePieceProcessor
from tiny_preset import CONFIG, write_preset

from modelhub import CausalLM
from modelhub.core.tree import flatten, initial_value
from modelhub.errors import InputError
from modelhub.families import family_of
from modelhub.hub.preset import Preset
from modelhub.model.source import open_preset

# Configs

_SMALL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "bos_token_id": 2,
    "eos_token_id": [1, 3], "pad_token_id": None, "torch_dtype": "bfloat16", "tie_word_embeddings": True,
    "attention_bias": False, "initializer_range": 0.02, "use_cache": True,
}  # fmt: skip
_GEMMA3 = _SMALL | {
    "model_type": "gemma3_text", "sliding_window": 8, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8, "hidden_activation": "gelu",
    "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 6, "final_logit_softcapping": 30,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": _SMALL | {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None},
    "gemma2": _SMALL | {
        "model_type": "gemma2", "sliding_window": 8, "sliding_window_size": 8, "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gemma3": {"model_type": "gemma3", "eos_token_id": [1], "dtype": "bfloat16", "text_config": _GEMMA3},
    "gemma3_text": _GEMMA3 | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "llama": _SMALL | {
        "model_type": "llama", "hidden_act": "silu", "mlp_bias": False, "rope_theta": 5e5, "rope_interleaved": False,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": _SMALL | {"model_type": "mistral", "sliding_window": 8, "rope_parameters": {"rope_theta": 1e4}},
}  # fmt: skip

_KERAS = {
    "vocabulary_size": 32, "num_layers": 2, "num_query_heads": 2, "num_key_value_heads": 1, "hidden_dim": 16,
    "intermediate_dim": 64, "name": "backbone", "trainable": True,
    "dtype": {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "bfloat16"}},
}  # fmt: skip
_KERAS_CLASSES = {
    "GemmaBackbone": {
        "head_dim": 8, "query_head_dim_normalize": True, "use_post_ffw_norm": True, "use_post_attention_norm": True,
        "attention_logit_soft_cap": 50.0, "final_logit_soft_cap": 30.0, "use_sliding_window_attention": True,
        "sliding_window_size": 8, "layer_norm_epsilon": 1e-6, "dropout": 0,
    },
    "Llama3Backbone": {
        "rope_max_wavelength": 500_000, "rope_position_scaling_factor": 1.0, "rope_frequency_adjustment_factor": 8.0,
        "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_pretraining_sequence_length": 32,
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    },
    "MistralBackbone": {"rope_max_wavelength": 10_000, "rope_scaling_factor": 1.0, "sliding_window": 8},
}  # fmt: skip
for _name, _arguments in _KERAS_CLASSES.items():
    CONFIGS[f"keras-{_name}"] = {"registered_name": f"keras_hub>{_name}", "config": _KERAS | _arguments}


def _load_config(folder: Path) -> None:
    source = open_preset(Preset("damaged", folder, None, ""))
    flatten(source.model)
    json.dumps(source.config.to_hf())


for _name, _config in CONFIGS.items():
    TARGETS[f"config-{_name}"] = Target(
        lambda folder, config=_config: write_json(folder / "config.json", config),
        _load_config,
        {"config.json": mutations.json_text},
        0.5,
    )

# Whole presets

GENERATION = {
    "bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0, "do_sample": False, "temperature": 0.7, "top_k": 64,
    "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "early_stopping": False,
    "transformers_version": "4.50.0", "num_beams": 1, "max_new_tokens": 20,
}  # fmt: skip


def _write_whole(folder: Path) -> None:
    write_preset(folder)
    write_json(folder / "generation_config.json", GENERATION)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", config | {"chat_template": TEMPLATE})


def _use(path: Path) -> None:
    lm = CausalLM.from_preset(str(path), backend="numpy", device="cpu")
    lm.generate("She wrote", max_new_tokens=2)
    lm.generate("She", max_new_tokens=2, temperature=lm.generation_config.get("temperature") or 1.0)
    with contextlib.suppress(InputError):  # not with the penalties that damage may have switched on
        lm.generate("She", max_new_tokens=2, num_beams=2)


TARGETS["preset"] = Target(
    _write_whole,
    _use,
    {
        "config.json": mutations.json_text, "generation_config.json": mutations.json_text,
        "tokenizer_config.json": mutations.json_text, "tokenizer.model": mutations.raw,
        "model.safetensors": mutations.safetensors,
    },
)  # fmt: skip
TARGETS["generation_config"] = Target(_write_whole, _use, {"generation_config.json": mutations.json_text})


def _write_gguf_gemma(folder: Path) -> None:
    whole = write_preset(folder / "whole")

    sp = SentencePieceProcessor()
    sp.Load(str(whole / "tokenizer.model"))
    writer = gguf_py.GGUFWriter(folder / "model.gguf", "gemma3")
    _add_sizes(writer, CONFIG)
    writer.add_tokenizer_model("llama")
    ids = range(len(sp))
    kinds = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in ids]
    writer.add_token_list([sp.id_to_piece(i) for i in ids])
    writer.add_token_scores([sp.get_score(i) for i in ids])
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(False)
    _add_the_rest(writer, CONFIG, whole)
    shutil.rmtree(whole)


def _write_gguf_llama(folder: Path) -> None:
    tokens, merges = byte_level()
    config = {k: v for k, v in CONFIGS["llama"].items() if k != "rope_scaling"} | {"vocab_size": len(tokens)}
    writer = gguf_py.GGUFWriter(folder / "model.gguf", "llama")
    _add_sizes(writer, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    _add_the_rest(writer, config, None)


def _add_sizes(writer: gguf_py.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_sliding_window(8)
    writer.add_rope_scaling_type(gguf_py.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)


def _add_the_rest(writer: gguf_py.GGUFWriter, config: dict[str, Any], folder: Path | None) -> None:
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    family = family_of(config["model_type"])
    read = family.Config.from_hf(config)
    names = family.names("gguf", read)
    for name, spec in flatten(family.Model.abstract(read)).items():
        theirs, via = names.to_theirs(name)
        writer.add_tensor(theirs, via.to_theirs(initial_value(name, spec, 0)))
    finish(writer)


for _name, _writer in (("gemma", _write_gguf_gemma), ("llama", _write_gguf_llama)):
    TARGETS[f"gguf-{_name}"] = Target(
        _writer, lambda folder: _use(folder / "model.gguf"), {"model.gguf": mutations.gguf}
    )
