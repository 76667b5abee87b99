"""rope_theta, rope_scaling and rope_parameters, alone and side by side, mean what transformers takes them for."""

import copy

import pytest
import transformers

from modelhub.core.decoder import GLOBAL, LOCAL
from modelhub.errors import ConfigError
from modelhub.families import family_of

SIZES = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "head_dim": 8,
}  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig, "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config, "gemma3_text": transformers.Gemma3TextConfig,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
NESTED = {GLOBAL: {"rope_type": "default", "rope_theta": 9.0}, LOCAL: {"rope_type": "default", "rope_theta": 5.0}}

ALIKE = {
    "nothing": {},
    "theta": {"rope_theta": 5e5},
    "scaling": {"rope_scaling": LINEAR},
    "scaling with a theta": {"rope_scaling": LINEAR | {"rope_theta": 3.0}},
    "nothing in the older key": {"rope_theta": 7.0, "rope_scaling": None},
}
FLAT = {
    "parameters": {"rope_parameters": LINEAR},
    "parameters and theta": {"rope_theta": 7.0, "rope_parameters": LINEAR | {"rope_theta": 7.0}},
    "switched on by hand": {"rope_theta": 5e5, "rope_scaling": LINEAR, "rope_parameters": DEFAULT},
    "llama3 switched on by hand": {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
    "both the same": {"rope_scaling": LINEAR, "rope_parameters": LINEAR},
    "an empty older key": {"rope_scaling": {}, "rope_parameters": LINEAR},
    "all channels are turned": {"rope_parameters": LINEAR | {"partial_rotary_factor": 1.0}},
}
GEMMA3 = {
    "parameters": {"rope_parameters": NESTED},
    "of one kind of layer": {"rope_parameters": {GLOBAL: LINEAR, LOCAL: None}},
    "switched on by hand": {"rope_scaling": LINEAR, "rope_parameters": NESTED},
    "older bases": {"rope_theta": 11.0, "rope_local_base_freq": 12.0, "rope_scaling": LINEAR},
}
CASES = [(kind, name, keys) for kind in CONFIGS for name, keys in ALIKE.items()]
CASES += [(kind, name, keys) for kind in CONFIGS if kind != "gemma3_text" for name, keys in FLAT.items()]
CASES += [("gemma3_text", name, keys) for name, keys in GEMMA3.items()]


def ours(kind, keys):
    return family_of(kind).Config.from_hf({"model_type": kind} | SIZES | copy.deepcopy(keys))


def same(rope, theirs):
    fields = {key: theirs[key] for key in type(rope).LLAMA3 if rope.rope_type == "llama3" or key == "factor" in theirs}
    return (rope.theta, rope.rope_type) == (theirs["rope_theta"], theirs["rope_type"]) and all(
        getattr(rope, key) == value for key, value in fields.items()
    )


@pytest.mark.parametrize(("kind", "keys"), [pytest.param(k, keys, id=f"{k}: {name}") for k, name, keys in CASES])
def test_as_transformers_takes_it(kind, keys):
    theirs = CONFIGS[kind](**SIZES, **copy.deepcopy(keys)).rope_parameters
    config = ours(kind, keys)
    assert same(config.rope, theirs.get(GLOBAL, theirs))
    if kind.startswith("gemma"):
        assert same(config.local_rope, theirs.get(LOCAL, theirs))
    assert (
        ours(kind, {key: value for key, value in config.to_hf().items() if key.startswith("rope")}).rope == config.rope
    )


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": DEFAULT, "rope_theta": 5e5}, "'yarn'"),
        ({"rope_scaling": LINEAR | {"factor": 8.0}, "rope_parameters": LINEAR}, "leave out one"),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": LINEAR}, "leave out one"),
        ({"rope_theta": 7.0, "rope_parameters": DEFAULT}, "rope_theta is 7.0, rope_parameters' rope_theta is 500000"),
        ({"rope_scaling": LINEAR, "rope_parameters": DEFAULT}, 'takes 10000 for rope_theta.*"rope_theta": 500000'),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": [4.0]}, "rope_scaling must be an object"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_what_contradicts_itself_raises(kind, keys, says):
    with pytest.raises(ConfigError, match=says):
        ours(kind, keys)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"rope_scaling": LINEAR, "rope_parameters": NESTED | {GLOBAL: LINEAR | {"factor": 2.0}}}, "leave out one"),
        ({"rope_theta": 7.0, "rope_parameters": NESTED}, "rope_theta is 7.0, rope_parameters' rope_theta is 9.0"),
        ({"rope_local_base_freq": 7.0, "rope_parameters": NESTED}, "rope_theta is 7.0.* is 5.0"),
        ({"rope_parameters": LINEAR}, "an object with full_attention and sliding_attention"),
    ],
)
def test_gemma_3_that_contradicts_itself_raises(keys, says):
    with pytest.raises(ConfigError, match=says):
        ours("gemma3_text", keys)
