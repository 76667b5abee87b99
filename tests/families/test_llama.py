"""Llama and Mistral against transformers: tiny random configs in which every feature changes the result."""

import copy
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import transformers

from modelhub.core.tree import flatten
from modelhub.errors import ConfigError
from modelhub.families.llama import Config, Model, names
from modelhub.generation import decode

SMALL = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "head_dim": 12, "max_position_embeddings": 64, "initializer_range": 0.3, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CASES = {
    "llama": ("Llama", SMALL),
    "llama-bias-tied-linear": (
        "Llama",
        SMALL | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"}
        | {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
    ),
    "llama3": ("Llama", SMALL | {"num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", SMALL | {"sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    "mistral-full": ("Mistral", SMALL | {"sliding_window": None}),
}  # fmt: skip
CLASSES = {
    "Llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "Mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
}
IDS = np.random.default_rng(0).integers(0, 101, (2, 26)).astype(np.int32)
ROWS = [np.random.default_rng(1).integers(0, 101, length).tolist() for length in (26, 9, 17)]
STEPS = 4


def hf_config(name, **changes):
    kind, values = CASES[name]
    return CLASSES[kind][0](**copy.deepcopy(values) | changes)


@functools.cache
def build(parity_reference, name):
    return parity_reference(CLASSES[CASES[name][0]][1], hf_config(name))


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def theirs(parity, case):
    return build(parity.reference, case)


@pytest.fixture(scope="module")
def ours(parity, theirs, backend):
    return parity.load(theirs, backend)


def test_logits(parity, ours, theirs):
    parity.assert_close(ours.engine.logits(ours.params, IDS), parity.reference_logits(theirs, IDS))


def test_cached_logits_of_a_batch(parity, ours, theirs):
    found = parity.cached_logits(ours, ROWS, STEPS)
    for row, logits in zip(ROWS, found, strict=True):
        parity.assert_close(logits, parity.reference_logits(theirs, [row])[0, -STEPS - 1 :])


def test_prompts_longer_than_a_chunk(parity, backend, monkeypatch):
    monkeypatch.setattr(decode, "CHUNK", 16)
    theirs = build(parity.reference, "mistral")
    rows = [np.random.default_rng(2).integers(0, 101, length).tolist() for length in (5, 16, 17, 40)]
    found = parity.cached_logits(parity.load(theirs, backend), rows, 0)
    for row, logits in zip(rows, found, strict=True):
        parity.assert_close(logits, parity.reference_logits(theirs, [row])[0, -1:])


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_bfloat16(parity, backend, name):
    """As near to the float32 logits as transformers' own bfloat16, on average."""
    exact = build(parity.reference, name)
    half = copy.deepcopy(exact).bfloat16()
    wanted, theirs = (parity.reference_logits(model, IDS) for model in (copy.deepcopy(half).float(), half))
    ours = parity.load(exact, backend, "bfloat16")
    noise = np.abs(theirs - wanted).mean()
    assert noise > 0
    assert np.abs(ours.engine.logits(ours.params, IDS) - wanted).mean() <= 1.5 * noise


FEATURES = {
    "llama3 rope": ("llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "linear rope": ("llama-bias-tied-linear", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    "theta": ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "window": ("mistral", {"sliding_window": 64}),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_the_feature_changes_the_logits(parity, feature):
    name, changes = FEATURES[feature]
    model = build(parity.reference, name)
    other = CLASSES[CASES[name][0]][1]._from_config(hf_config(name, **changes), attn_implementation="eager").eval()
    other.load_state_dict(model.state_dict())
    with_it, without = parity.reference_logits(model, IDS), parity.reference_logits(other, IDS)
    assert np.abs(with_it - without).max() > 0.05 * np.abs(with_it).max()


def test_names_are_hugging_faces(case, theirs):
    config = Config.from_hf(theirs.config.to_dict())
    wanted = set(theirs.state_dict()) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    assert set(flatten(Model.abstract(config))) == wanted
    assert {names("hf", config).to_ours(name)[0] for name in wanted} == wanted


# Configs.

HUB = {  # as on the Hugging Face Hub
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
    "SmolLM2-1.7B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 24, "num_key_value_heads": 32, "pad_token_id": 2,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 130000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
        "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "use_cache": True, "vocab_size": 49152,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
}  # fmt: skip


def all_configs():
    return HUB | {name: json.loads(json.dumps(hf_config(name).to_dict())) for name in CASES}


def transformers_config(data):
    return transformers.AutoConfig.for_model(**copy.deepcopy(data))


def maths(config):
    keys = {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
        "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings", "hidden_act",
        "max_position_embeddings", "sliding_window", "rope_parameters",
    }  # fmt: skip
    return {key: value for key, value in config.to_dict().items() if key in keys}


@pytest.mark.parametrize("name", all_configs())
def test_config_round_trip(name):
    data = all_configs()[name]
    config = Config.from_hf(data)
    written = json.loads(json.dumps(config.to_hf()))
    assert Config.from_hf(written) == config
    wanted, found = transformers_config(data), transformers_config(written)
    different = {key: value for key, value in maths(wanted).items() if maths(found)[key] != value}
    assert different in ({}, {"head_dim": None})  # written out, where the original leaves it to be computed
    same = {key: value for key, value in vars(config).items() if hasattr(wanted, key) and key != "extra"}
    assert {key: getattr(wanted, key) or value for key, value in same.items()} == same and len(same) >= 10
    rope = wanted.rope_parameters
    assert {key: getattr(config.rope, "theta" if key == "rope_theta" else key) for key in rope} == rope


def test_old_and_new_spelling_of_rope_mean_the_same():
    new = HUB["Llama-3.2-1B"] | {"rope_scaling": None, "rope_theta": None}
    new["rope_parameters"] = HUB["Llama-3.2-1B"]["rope_scaling"] | {"rope_theta": 500000.0}
    assert Config.from_hf(new).rope == Config.from_hf(HUB["Llama-3.2-1B"]).rope


BAD = {
    "another family": ({"model_type": "gemma"}, "'gemma'"),
    "heads": ({"num_attention_heads": 12, "num_key_value_heads": 8}, "num_attention_heads 12.*num_key_value_heads 8"),
    "no heads": ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads"),
    "no key heads": ({"num_key_value_heads": 0}, "num_key_value_heads"),
    "a size as text": ({"hidden_size": "2048", "head_dim": None}, "hidden_size"),
    "a layer count as a fraction": ({"num_hidden_layers": 16.5}, "num_hidden_layers"),
    "odd head width": ({"head_dim": 63}, "head_dim"),
    "odd computed head width": ({"head_dim": None, "hidden_size": 96}, "head_dim"),
    "an unknown activation": ({"hidden_act": "relu"}, "relu"),
    "an unknown rope": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    "an incomplete rope": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor, high_freq_factor"),
    "unknown maths": ({"qk_norm": True, "num_experts": 8}, "num_experts=8, qk_norm=True"),
    "interleaved rope": ({"rope_interleaved": True}, "rope_interleaved"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_configs_raise(what):
    changes, message = BAD[what]
    with pytest.raises(ConfigError, match=message):
        Config.from_hf(HUB["Llama-3.2-1B"] | changes)


# GGUF.

GGUF = {
    "general.architecture": "llama", "llama.context_length": 131072, "llama.embedding_length": 2048,
    "llama.block_count": 16, "llama.feed_forward_length": 8192, "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8, "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.attention.key_length": 64, "llama.rope.dimension_count": 64, "llama.rope.freq_base": 500000.0,
    "llama.vocab_size": 128256, "tokenizer.ggml.bos_token_id": 128000, "tokenizer.ggml.eos_token_id": 128001,
}  # fmt: skip


def llama3_divisors():
    """rope_freqs.weight as llama.cpp's converter computes it: per frequency, what it is divided by."""
    scaling = HUB["Llama-3.2-1B"]["rope_scaling"]
    frequencies = 1.0 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    wavelengths = 2 * np.pi / frequencies
    low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - 1.0) / (4.0 - 1.0)
    between = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return np.where(wavelengths < high, 1.0, np.where(wavelengths > low, scaling["factor"], between)).astype(np.float32)


def test_config_from_gguf_equals_the_one_from_hugging_face():
    tensors = {"rope_freqs.weight": llama3_divisors()}
    file = SimpleNamespace(metadata=GGUF, tensors=tensors, read=lambda name, dtype="float32": tensors[name])
    found, wanted = Config.from_gguf(file), Config.from_hf(HUB["Llama-3.2-1B"])
    wanted.extra = {key: value for key, value in wanted.extra.items() if key in ("bos_token_id", "eos_token_id")}
    assert found == wanted


def test_other_rope_factors_in_gguf_raise():
    tensors = {"rope_freqs.weight": np.linspace(1, 8, 32, dtype=np.float32)}
    file = SimpleNamespace(metadata=GGUF, tensors=tensors, read=lambda name, dtype="float32": tensors[name])
    with pytest.raises(ConfigError, match="rope_freqs"):
        Config.from_gguf(file)


@pytest.mark.parametrize("name", ["llama", "llama-bias-tied-linear"])
def test_gguf_names_are_those_of_gguf_py(name):
    gguf = pytest.importorskip("gguf")
    config = Config.from_hf(hf_config(name).to_dict())
    ours = flatten(Model.abstract(config))
    oracle = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    table = names("gguf", config)
    theirs = {name: table.to_theirs(name)[0] for name in ours}
    assert theirs == {name: oracle.get_name(name, (".weight", ".bias")) for name in ours}
    assert {table.to_ours(name)[0] for name in theirs.values()} == set(ours) and len(set(theirs.values())) == len(ours)


@pytest.mark.parametrize("part, heads", [("q_proj", 4), ("k_proj", 2)])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_gguf_rows_are_permuted_for_neighbouring_channels(part, heads, kind):
    """llama.cpp rotates channels 2i and 2i + 1 where Hugging Face rotates i and i + h / 2."""
    table = names("gguf", Config.from_hf(hf_config("llama-bias-tied-linear").to_dict()))
    rows = np.arange(heads * 12, dtype=np.float32)
    ours = np.stack([rows, rows], 1) if kind == "weight" else rows
    theirs, via = table.to_theirs(f"model.layers.1.self_attn.{part}.{kind}")
    stored = via.to_theirs(ours.copy())
    for head in range(heads):
        of_head = (stored[:, 0] if kind == "weight" else stored)[head * 12 : (head + 1) * 12] - head * 12
        assert of_head.tolist() == [channel for i in range(6) for channel in (i, i + 6)]
    back = table.to_ours(theirs)[1].to_ours(stored.copy())
    assert back.tolist() == ours.tolist() and back.flags.c_contiguous
