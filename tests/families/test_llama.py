"""Llama 2, 3.1, SmolLM2 and Mistral, given to the tests of all text models, and what only they have."""

from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from text_suite import SIZES, TextSuite, build, tiny

from modelhub.core.nn import Rope
from modelhub.core.tree import flatten
from modelhub.errors import ConfigError
from modelhub.families.llama import Config, Model, names

PLAIN = {"rope_type": "default", "rope_theta": 100.0}
# meta-llama/Llama-3.2-1B's config.json, in the spelling of transformers 4.
LLAMA_3_2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
    "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip


class TestLlama(TextSuite):
    cases = {
        "llama3.1": tiny("llama3", num_hidden_layers=2, head_dim=None),
        "llama2": tiny("llama", num_hidden_layers=2, num_key_value_heads=4, head_dim=None),
        "smollm2": tiny(
            "llama", num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, hidden_size=36, head_dim=None,
            tie_word_embeddings=True, rope_parameters={"rope_theta": 1000.0, "rope_type": "default"},
        ),
        "biased": tiny("llama_biases", num_hidden_layers=2),
        "mistral": tiny("mistral", num_hidden_layers=2),
        "mistral-no-window": tiny("mistral", num_hidden_layers=2, sliding_window=None, head_dim=None),
    }  # fmt: skip
    features = {
        "llama3 rope": ("llama3.1", {"rope_parameters": PLAIN}),
        "theta": ("smollm2", {"rope_parameters": PLAIN}),
        "window": ("mistral", {"sliding_window": 64}),
        "activation": ("biased", {"hidden_act": "gelu"}),
    }
    published = {"llama-3.2-1b": LLAMA_3_2}
    refused_from = {"model_type": "llama"} | SIZES
    refused = {
        "norms of queries": ({"qk_layernorm": True}, "qk_layernorm=True"),
        "another rotation": ({"rope_interleaved": True}, "rope_interleaved=True"),
        "a head width that comes out odd": ({"hidden_size": 36, "head_dim": None}, "head_dim=9 is odd"),
        "another Llama": ({"model_type": "llama4"}, "'llama4' is not a Llama"),
    }
    not_gguf = {"llama3.1": "its rope has factor=8"}


def test_a_published_config():
    config = Config.from_hf(LLAMA_3_2)
    assert config.rope == Rope(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    parameters = sum(np.prod(spec.shape) for spec in flatten(Model.abstract(config)).values())
    assert parameters == 1_235_814_400


def test_keys_of_published_configs_that_mean_nothing_here():
    data = {"model_type": "llama", "is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1} | SIZES
    data |= {"transformers.js_config": {"dtype": "q4"}, "rope_parameters": {"rope_theta": None, "rope_type": "default"}}
    config = Config.from_hf(data | {"rope_theta": 130000})
    assert config.rope == Rope(130000.0)
    assert config.to_hf()["transformers.js_config"] == {"dtype": "q4"}


def permuted(weight, heads):
    """The formula of llama.cpp's converter."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def test_gguf_names_and_permuted_rows():
    theirs = build(TestLlama.cases["llama3.1"])
    config = Config.from_hf(theirs.config.to_dict())
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    mapping = names("gguf", config)
    for ours, tensor in theirs.state_dict().items():
        gguf_name = table.get_name(ours, try_suffixes=(".weight", ".bias"))
        renamed, via = mapping.to_ours(gguf_name)
        assert renamed == ours and mapping.to_theirs(ours)[0] == gguf_name
        weight = tensor.numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(ours.split(".")[-2])
        stored = permuted(weight, heads) if heads else weight
        np.testing.assert_array_equal(via.to_ours(stored.copy()), weight)
        np.testing.assert_array_equal(via.to_theirs(weight.copy()), stored)


def llama_cpp_divisors(theta, width, factor, low, high, original):
    """rope_freqs.weight by the formula of llama.cpp's converter."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, width, 2) / width)
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    stretched = np.where(wavelengths > original / low, factor, between)
    return np.where(wavelengths < original / high, 1.0, stretched).astype(np.float32)


def test_gguf_metadata_and_llama3_rope_factors():
    rope = Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    divisors = llama_cpp_divisors(500000.0, 64, 8.0, 1.0, 4.0, 8192)
    file = SimpleNamespace(
        metadata={
            "general.architecture": "llama", "llama.embedding_length": 256, "llama.feed_forward_length": 512,
            "llama.block_count": 2, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
            "llama.context_length": 131072, "llama.rope.freq_base": 500000.0, "llama.vocab_size": 100,
            "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        },
        tensors={"rope_freqs.weight": None, "output.weight": None},
        read=lambda name: divisors,
    )  # fmt: skip
    config = Config.from_gguf(file)
    assert (config.rope, config.rms_norm_eps, config.head_dim) == (rope, 1e-5, 64)
    assert config.model_type == "llama" and not config.tie_word_embeddings
    file.read = lambda name: divisors[::-1]
    with pytest.raises(ConfigError, match="rope_freqs"):
        Config.from_gguf(file)
