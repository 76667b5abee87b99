"""Llama 2, 3.1, SmolLM2 and Mistral against transformers: tiny random configs in which every feature matters."""

import copy
import functools
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import transformers

from modelhub.core.nn import Rope
from modelhub.core.tree import flatten
from modelhub.errors import ConfigError
from modelhub.families.llama import Config, Model, names

SMALL = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "rms_norm_eps": 1e-5,
}  # fmt: skip
# Wavelengths of all three kinds: kept, blended and stretched.
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 100.0,
}  # fmt: skip
LLAMA, MISTRAL = (
    (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    (transformers.MistralConfig, transformers.MistralForCausalLM),
)
CASES = {
    "llama2": (LLAMA, SMALL | {"num_key_value_heads": 4}),
    "llama3.1": (LLAMA, SMALL | {"rope_parameters": LLAMA3}),
    "smollm2": (LLAMA, SMALL | {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 36}
                | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}}),
    "biased": (LLAMA, SMALL | {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "mistral": (MISTRAL, SMALL | {"sliding_window": 8, "head_dim": 12}),
    "mistral-no-window": (MISTRAL, SMALL | {"sliding_window": None}),
}  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 101, (2, 26)).astype(np.int32)
ROWS = [np.random.default_rng(1).integers(0, 101, length).tolist() for length in (26, 9, 17)]
STEPS = 4


def hf_config(name):
    (config_class, _), values = CASES[name]
    return config_class(**copy.deepcopy(values))


@functools.cache
def build(parity_reference, name):
    return parity_reference(CASES[name][0][1], hf_config(name))


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


@pytest.mark.parametrize("name", ["llama3.1", "mistral"])
def test_bfloat16(parity, backend, name):
    """As near to the float32 logits as transformers' own bfloat16, on average."""
    exact = build(parity.reference, name)
    half = copy.deepcopy(exact).bfloat16()
    wanted, theirs = (parity.reference_logits(model, IDS) for model in (copy.deepcopy(half).float(), half))
    ours = parity.load(exact, backend, "bfloat16")
    noise = np.abs(theirs - wanted).mean()
    assert noise > 0
    assert np.abs(ours.engine.logits(ours.params, IDS) - wanted).mean() <= 1.5 * noise


PLAIN = {"rope_type": "default", "rope_theta": 100.0}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama3.1", {"rope_parameters": PLAIN}),
        ("smollm2", {"rope_parameters": PLAIN}),
        ("mistral", {"sliding_window": 64}),
        ("biased", {"hidden_act": "gelu"}),
    ],
)
def test_the_feature_changes_the_logits(parity, name, changes):
    """Or the comparisons prove nothing."""
    model = build(parity.reference, name)
    (config_class, model_class), values = CASES[name]
    other = model_class._from_config(config_class(**copy.deepcopy(values) | changes), attn_implementation="eager")
    other.load_state_dict(model.state_dict())
    with_it, without = (parity.reference_logits(m, IDS) for m in (model, other.eval()))
    assert np.abs(with_it - without).max() > 0.05 * np.abs(with_it).max()


@pytest.mark.parametrize("name", CASES)
def test_config_round_trip(name):
    theirs = hf_config(name)
    config = Config.from_hf(theirs.to_dict())
    assert Config.from_hf(config.to_hf()) == config
    again = type(theirs)(**config.to_hf())
    for key in ("hidden_size", "head_dim", "num_key_value_heads", "tie_word_embeddings", "rope_parameters"):
        assert getattr(again, key) == getattr(theirs, key), key
    if name.startswith("mistral"):
        assert again.sliding_window == theirs.sliding_window


def test_the_spelling_of_transformers_4():
    """meta-llama/Llama-3.2-1B's config.json, as published."""
    config = Config.from_hf(
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
            "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
            "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
            "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
            "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
        }
    )  # fmt: skip
    assert config.rope == Rope(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    parameters = sum(np.prod(spec.shape) for spec in flatten(Model.abstract(config)).values())
    assert parameters == 1_235_814_400


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "needs low_freq_factor"),
        ({"hidden_act": "relu6"}, "'relu6' is not supported"),
        ({"qk_layernorm": True}, "qk_layernorm=True"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"model_type": "llama4"}, "'llama4' is not a Llama"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_key_value_heads": 0, "vocab_size": -1}, "vocab_size=-1, num_key_value_heads=0"),
        ({"hidden_size": "32"}, "hidden_size='32'"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"hidden_size": 36}, "head_dim=9 is odd"),
    ],
)
def test_bad_configs_raise(changes, says):
    with pytest.raises(ConfigError, match=says):
        Config.from_hf({"model_type": "llama"} | SMALL | changes)


def test_keys_of_published_configs_that_mean_nothing_here():
    data = {"model_type": "llama", "is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1} | SMALL
    data |= {"transformers.js_config": {"dtype": "q4"}, "rope_parameters": {"rope_theta": None, "rope_type": "default"}}
    config = Config.from_hf(data | {"rope_theta": 130000})
    assert config.rope == Rope(130000.0)
    assert config.to_hf()["transformers.js_config"] == {"dtype": "q4"}


def permuted(weight, heads):
    """The formula of llama.cpp's converter."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def test_gguf_names_and_permuted_rows(parity):
    theirs = build(parity.reference, "llama3.1")
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
