"""Gemma 1, 2 and 3, given to the tests of all text models, and what only they have."""

import copy
import json
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import text_parity as parity
import transformers
from text_suite import IDS, SIZES, TextSuite, build, maths, read_by_transformers, their_config, tiny

from modelhub.core.backends import get_backend
from modelhub.core.tree import bind, flatten
from modelhub.errors import ConfigError
from modelhub.families import FAMILIES, family_of, gemma
from modelhub.families.gemma import GLOBAL, LOCAL, Config, Model, names
from modelhub.interop.conformance import Case

LINEAR = {"rope_type": "linear", "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 50.0}
HUB = {  # as on the Hugging Face Hub, without the keys that say nothing
    "gemma-2b": {
        "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
        "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma", "num_attention_heads": 8,
        "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 10000.0, "torch_dtype": "bfloat16", "transformers_version": "4.38.0.dev0", "use_cache": True,
        "vocab_size": 256000,
    },
    "gemma-2-9b": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 16,
        "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
        "torch_dtype": "float32", "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 256000,
    },
    "gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
        "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
        "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
    },
    "gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
    },
}  # fmt: skip


class TestGemma(TextSuite):
    cases = {
        "gemma": tiny("gemma"),
        "gemma-bias-untied-scaled": tiny(
            "gemma", attention_bias=True, tie_word_embeddings=False, rope_parameters={"rope_theta": 100.0} | LINEAR
        ),
        "gemma2": tiny("gemma2"),
        "gemma2-bias-uncapped": tiny(
            "gemma2", attention_bias=True, query_pre_attn_scalar=30, attn_logit_softcapping=None,
            final_logit_softcapping=None, hidden_activation="gelu",
        ),
        "gemma3": tiny("gemma3"),
        "gemma3-bias-untied-capped": Case(
            "Gemma3ForCausalLM",
            SIZES | {"layer_types": [GLOBAL, LOCAL, GLOBAL], "sliding_window": 8, "query_pre_attn_scalar": 12}
            | {"attention_bias": True, "tie_word_embeddings": False, "final_logit_softcapping": 8.0},
        ),
    }  # fmt: skip
    features = {
        "window": ("gemma2", {"sliding_window": 64}),
        "attention soft-cap": ("gemma2", {"attn_logit_softcapping": None}),
        "final soft-cap": ("gemma2", {"final_logit_softcapping": None}),
        "query scale": ("gemma2", {"query_pre_attn_scalar": 12}),
        "window of gemma3": ("gemma3", {"sliding_window": 64}),
        "layer types": ("gemma3", {"layer_types": [LOCAL, GLOBAL, LOCAL, LOCAL]}),
        "query scale of gemma3": ("gemma3", {"query_pre_attn_scalar": 12}),
        "global rope": ("gemma3", {"rope_parameters": {GLOBAL: PLAIN | {"rope_theta": 1000.0}, LOCAL: PLAIN}}),
        "local rope": ("gemma3", {"rope_parameters": {GLOBAL: {"rope_theta": 1000.0} | LINEAR, LOCAL: PLAIN | {"rope_theta": 1000.0}}}),
        "linear rope": ("gemma-bias-untied-scaled", {"rope_parameters": PLAIN | {"rope_theta": 100.0}}),
        "final soft-cap of gemma3": ("gemma3-bias-untied-capped", {"final_logit_softcapping": None}),
    }  # fmt: skip
    published = HUB
    refused_from = HUB["gemma-3-1b-it"]
    refused = {
        "a Llama": ({"model_type": "llama"}, "'llama'"),
        "a window of nothing": ({"sliding_window": 0}, "sliding_window"),
        "too few layer types": ({"layer_types": [LOCAL]}, "layer_types"),
        "an unknown layer type": ({"layer_types": [LOCAL, GLOBAL, "linear_attention"], "num_hidden_layers": 3}, "linear_attention"),
        "no window": ({"sliding_window": None}, "sliding_window"),
        "an unknown activation": ({"hidden_activation": "mish"}, "mish"),
        "text_config missing": ({"model_type": "gemma3", "text_config": {"model_type": "llama"}}, "llama"),
    }  # fmt: skip
    not_gguf = {
        "gemma-bias-untied-scaled": "no biases; the embedding as its head",
        "gemma2": "queries scaled by",
        "gemma2-bias-uncapped": "the activation gelu_pytorch_tanh.*no biases; queries scaled by.*both soft caps",
        "gemma3": "queries scaled by",
        "gemma3-bias-untied-capped": "no biases",
    }


@pytest.mark.parametrize("name", TestGemma.stored())
def test_the_activation_is_the_one_that_transformers_takes(name):
    data = TestGemma.stored()[name]
    config, wanted = Config.from_hf(data), read_by_transformers(data)
    assert config.hidden_activation == (wanted.hidden_act if config.model_type == "gemma" else wanted.hidden_activation)


def test_positions_that_restart_hide_nothing_without_segments():
    xp = get_backend("numpy", "cpu")
    ours = parity.load(build(TestGemma.cases["gemma"]), xp)
    model = bind(ours.skeleton, ours.params)
    positions = np.concatenate([np.arange(9), np.arange(4)])[None].astype(np.int32)
    ids = IDS[:1, :13].copy()
    before = model.model(xp, ids, positions=positions)
    ids[0, 5] += 1
    changed = np.abs(model.model(xp, ids, positions=positions) - before).max(-1)[0]
    assert (changed[:5] == 0).all() and (changed[5:] > 0).all()


def test_float16_where_the_layers_add_up_to_more_than_it_holds(backend):
    theirs = copy.deepcopy(build(TestGemma.cases["gemma3"]))
    for layer in theirs.model.layers:  # 65504 is the largest number of float16
        layer.post_feedforward_layernorm.weight.data.fill_(30_000.0)
    wanted = parity.reference_logits(theirs, IDS)
    assert not np.isfinite(parity.reference_logits(copy.deepcopy(theirs).half(), IDS)).all()
    ours = parity.load(theirs, backend, "float16")
    found = ours.engine.logits(ours.params, IDS)
    assert np.isfinite(found).all() and np.abs(found - wanted).mean() < 5e-3 * np.abs(wanted).max()


# The multimodal checkpoint.


@pytest.fixture(scope="module")
def multimodal():
    text = their_config(TestGemma.cases["gemma3"]).to_dict()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=100
    )
    return parity.reference(transformers.Gemma3ForConditionalGeneration, config)  # fmt: skip


def test_multimodal_checkpoint(multimodal, backend):
    ours = parity.load(multimodal, backend)
    ids = IDS % 100  # no image token
    assert ours.config.model_type == "gemma3_text" and len(ours.config.layer_types) == 4
    parity.assert_close(ours.engine.logits(ours.params, ids), parity.reference_logits(multimodal, ids))


def test_multimodal_names_of_transformers_4(multimodal):
    config = Config.from_hf(multimodal.config.to_dict())
    rename = names("hf", config).to_ours
    new = [name for name in multimodal.state_dict() if name != "lm_head.weight"]
    old = [name.removeprefix("model.").replace("language_model.", "language_model.model.") for name in new]
    assert any(name.startswith("language_model.model.layers.3.") for name in old)
    assert any(name.startswith("vision_tower.") for name in old)
    wanted = flatten(Model.abstract(config)).keys()
    for spelling in (new, old):
        found = [renamed[0] for name in spelling if (renamed := rename(name)) is not None]
        assert sorted(found) == sorted(wanted)
    assert rename("lm_head.weight") is None and rename("language_model.lm_head.weight") is None  # tied: a copy


def test_untied_head_of_a_multimodal_checkpoint():
    config = Config.from_hf(their_config(TestGemma.cases["gemma3-bias-untied-capped"]).to_dict())
    for name in ("lm_head.weight", "language_model.lm_head.weight"):
        assert names("hf", config).to_ours(name)[0] == "lm_head.weight"


# Configs.


def test_old_spelling_is_written_too():
    """Readers that know only transformers 4's keys (older vLLM, llama.cpp's converter)."""
    written = Config.from_hf(their_config(TestGemma.cases["gemma3"]).to_dict()).to_hf()
    assert (written["rope_theta"], written["rope_local_base_freq"], written["rope_scaling"]) == (1000.0, 50.0, LINEAR)
    assert written["sliding_window_pattern"] == 3 and written["layer_types"] == [LOCAL, LOCAL, GLOBAL, LOCAL]
    old = {key: value for key, value in written.items() if key not in ("rope_parameters", "layer_types")}
    assert Config.from_hf(old) == Config.from_hf(written)
    assert "rope_parameters" in written and "rope_local_base_freq" not in Config.from_hf(HUB["gemma-2-9b"]).to_hf()


def test_cosmetic_keys_are_kept():
    extra = {
        "eos_token_id": [1, 106],
        "transformers_version": "4.50.0",
        "_attn_implementation_autoset": True,
        "initializer_range": 0.5,
    }
    data = HUB["gemma-3-1b-it"] | extra
    written = Config.from_hf(data).to_hf()
    assert {key: written[key] for key in extra} == extra
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    shared = Config.from_hf(HUB["gemma-3-4b-it"]).to_hf()
    assert shared["eos_token_id"] == [1, 106] and shared["dtype"] == "bfloat16"


def test_unknown_maths_keys_raise_and_are_listed():
    data = HUB["gemma-2-9b"] | {
        "attn_temperature_tuning": 2.0,
        "num_experts": 8,
        "moe": False,
        "clip_qkv": None,
        "_private": 3,
    }
    with pytest.raises(ConfigError, match="attn_temperature_tuning=2.0, num_experts=8") as caught:
        Config.from_hf(data)
    assert (
        "moe" not in str(caught.value) and "clip_qkv" not in str(caught.value) and "_private" not in str(caught.value)
    )


def test_registry():
    for kind in ("gemma", "gemma2", "gemma3", "gemma3_text"):  # Hugging Face's model_types and GGUF's architectures
        assert family_of(kind) is gemma and kind in FAMILIES
    with pytest.raises(ConfigError, match="'gpt2' is not supported; supported: gemma"):
        family_of("gpt2")


# GGUF.

METADATA = {
    "gemma3": {
        "general.architecture": "gemma3", "gemma3.context_length": 32768, "gemma3.embedding_length": 640,
        "gemma3.block_count": 18, "gemma3.feed_forward_length": 2048, "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 1, "gemma3.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        "gemma3.attention.key_length": 256, "gemma3.attention.value_length": 256, "gemma3.rope.freq_base": 1e6,
        "gemma3.attention.sliding_window": 512, "tokenizer.ggml.tokens": ["x"] * 262144,
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1,
    },
    "gemma2": {
        "general.architecture": "gemma2", "gemma2.context_length": 8192, "gemma2.embedding_length": 4608,
        "gemma2.block_count": 46, "gemma2.feed_forward_length": 36864, "gemma2.attention.head_count": 32,
        "gemma2.attention.head_count_kv": 16, "gemma2.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        "gemma2.attention.key_length": 128, "gemma2.attn_logit_softcapping": 50.0, "gemma2.final_logit_softcapping": 30.0,
        "gemma2.attention.sliding_window": 4096, "gemma2.vocab_size": 256000,
    },
    "gemma": {
        "general.architecture": "gemma", "gemma.context_length": 8192, "gemma.embedding_length": 2048,
        "gemma.block_count": 18, "gemma.feed_forward_length": 16384, "gemma.attention.head_count": 8,
        "gemma.attention.head_count_kv": 1, "gemma.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        "gemma.attention.key_length": 256, "gemma.vocab_size": 256000,
    },
}  # fmt: skip
SAME = {  # what Google published in config.json for the same models, where it differs from transformers' defaults
    "gemma3": {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
        "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 32768,
        "sliding_window": 512, "query_pre_attn_scalar": 256, "bos_token_id": 2, "eos_token_id": 1,
    },
    "gemma2": {
        "model_type": "gemma2", "hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 16, "query_pre_attn_scalar": 144,
    },
    "gemma": {key: value for key, value in HUB["gemma-2b"].items() if not key.endswith(("_token_id", "dtype"))},
}  # fmt: skip


def gguf_file(metadata):
    """What a family sees of a GGUF file."""
    return SimpleNamespace(metadata=metadata, tensors={"token_embd.weight": None})


@pytest.mark.parametrize("arch", METADATA)
def test_config_from_gguf_equals_the_one_from_hugging_face(arch):
    found, wanted = Config.from_gguf(gguf_file(METADATA[arch])), Config.from_hf(SAME[arch])
    assert found.query_scale == wanted.query_scale
    for config in (found, wanted):
        config.query_pre_attn_scalar = None
        config.extra = {key: value for key, value in config.extra.items() if key.endswith("_token_id")}
    assert found == wanted


@pytest.mark.parametrize("arch", METADATA)
def test_config_from_gguf_writes_what_transformers_reads(arch):
    config = Config.from_gguf(gguf_file(METADATA[arch]))
    written = json.loads(json.dumps(config.to_hf()))
    assert Config.from_hf(written) == config
    assert maths(read_by_transformers(written), Config) == maths(read_by_transformers(SAME[arch]), Config)


def test_bad_gguf_metadata_raises():
    incomplete = {
        key: value for key, value in METADATA["gemma3"].items() if not key.endswith(("block_count", "embedding_length"))
    }
    with pytest.raises(ConfigError, match=r"gemma3\.embedding_length, gemma3\.block_count"):
        Config.from_gguf(gguf_file(incomplete))
    with pytest.raises(ConfigError, match="yarn"):
        Config.from_gguf(gguf_file(METADATA["gemma3"] | {"gemma3.rope.scaling.type": "yarn"}))
    with pytest.raises(ConfigError, match="vocab_size"):
        Config.from_gguf(
            gguf_file({key: value for key, value in METADATA["gemma"].items() if key != "gemma.vocab_size"})
        )


def test_linear_scaling_from_gguf():
    config = Config.from_gguf(
        gguf_file(METADATA["gemma3"] | {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0})
    )
    assert (config.rope.factor, config.local_rope.factor) == (8.0, 1.0)


def test_a_head_in_the_file_means_that_it_is_not_tied():
    file = gguf_file(METADATA["gemma3"])
    assert Config.from_gguf(file).tie_word_embeddings
    file.tensors["output.weight"] = None
    assert not Config.from_gguf(file).tie_word_embeddings


@pytest.mark.parametrize("kind", METADATA)
def test_gguf_norms_are_stored_as_weight_plus_one(kind):
    config = Config.from_hf(their_config(TestGemma.cases[kind]).to_dict())
    table = names("gguf", config)
    for name in flatten(Model.abstract(config)):
        theirs, via = table.to_theirs(name)
        value = np.array([0.25, -0.5], np.float32)
        stored = via.to_theirs(value.copy())
        assert stored.tolist() == ([1.25, 0.5] if "norm" in name else [0.25, -0.5])
        assert table.to_ours(theirs)[1].to_ours(stored.copy()).tolist() == value.tolist()
        assert stored.dtype == np.float32
        assert via.to_theirs(value.astype(ml_dtypes.bfloat16)).dtype == ml_dtypes.bfloat16
