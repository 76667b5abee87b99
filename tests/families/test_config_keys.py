"""Keys of config.json that modelhub does not read: the harmless are kept, what changes the maths is refused by name."""

import contextlib
import inspect
import json
import logging
import re

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny_families import CONFIGS, write_preset

from modelhub import CausalLM
from modelhub.errors import ConfigError
from modelhub.families import family_of
from modelhub.families.config import _HARMLESS, _MATTERS, unknown_keys
from modelhub.interop.conformance import FAMILIES

# model_type: transformers' model class, of all that `modelhub conformance` compares. Its config class and its code say
# which keys there are.
CLASSES = {getattr(transformers, case.model).config_class.model_type: case.model for case in FAMILIES.values()}
# What transformers' code asks a config for besides keys of config.json, or what it asks of another one.
METHODS = {"get_text_config", "text_config", "vision_config", "mm_tokens_per_image"}


@pytest.mark.parametrize("kind", CLASSES)
def test_what_save_pretrained_writes_is_known(kind):
    data = json.loads(getattr(transformers, CLASSES[kind]).config_class().to_json_string(use_diff=False))
    assert unknown_keys(family_of(kind).Config.from_hf(data).extra) == []


@pytest.mark.parametrize("kind", CLASSES)
def test_every_key_that_transformers_code_reads_is_known(kind):
    """No key that its forward pass reads may be among those that are kept without being looked at."""
    model = getattr(transformers, CLASSES[kind])
    source = inspect.getsource(inspect.getmodule(model))
    keys = set(re.findall(r"config\.([a-z]\w+)", source)) - METHODS
    config = family_of(kind).Config.from_hf(json.loads(model.config_class().to_json_string(use_diff=False)))
    fields = {*vars(config), "hidden_act", "rope_parameters", "num_labels", *_MATTERS}
    assert [key for key in keys - fields if not _HARMLESS.fullmatch(key)] == []


def test_every_attribute_of_a_transformers_config_is_known():
    config = transformers.PreTrainedConfig()
    names = set(vars(config))
    old = {"pruned_heads", "tie_encoder_decoder", "torchscript", "use_bfloat16", "temperature", "sep_token_id"}
    assert sorted(key for key in names | old if not _HARMLESS.fullmatch(key) and key not in _MATTERS) == []


@pytest.mark.parametrize("kind", sorted({*CLASSES} - {"vit", "deit", "dinov2", "dinov2_with_registers"}))
def test_no_number_of_key_heads_means_as_many_as_query_heads(kind):
    """As in transformers 4 for all, and in 5 for those that still take null."""
    data = {"model_type": kind, "num_attention_heads": 6, "hidden_size": 96, "num_key_value_heads": None}
    assert family_of(kind).Config.from_hf(data).num_key_value_heads == 6
    with contextlib.suppress(StrictDataclassFieldValidationError):
        assert getattr(transformers, CLASSES[kind]).config_class.from_dict(data).num_key_value_heads == 6


FOREIGN = {
    "unsloth_version": "2025.3.19", "unsloth_fixed": True, "neftune_noise_alpha": 5, "gradient_checkpointing": True,
    "temperature": 0.7, "num_labels": 2, "max_window_layers": 28, "model_max_length": 4096, "sep_token_id": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return write_preset(tmp_path_factory.mktemp("keys") / "llama", CONFIGS["llama"] | FOREIGN)


def test_unknown_keys_are_named_once_kept_and_written_back(preset, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        lm = CausalLM.from_preset(preset, backend="numpy")
    said = [record.getMessage() for record in caplog.records if "does not know" in record.getMessage()]
    assert len(said) == 1 and "max_window_layers, neftune_noise_alpha" in said[0]
    assert "unsloth" not in said[0] and "temperature" not in said[0]
    lm.save_to_preset(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {key: written[key] for key in FOREIGN if key != "rope_parameters"} == {
        key: value for key, value in FOREIGN.items() if key != "rope_parameters"
    }


def test_strict_refuses_them(preset, tmp_path):
    with pytest.raises(ConfigError, match="max_window_layers, neftune_noise_alpha"):
        CausalLM.from_preset(preset, backend="numpy", strict=True)
    known = write_preset(tmp_path / "known", CONFIGS["llama"] | {"unsloth_version": "2025.3.19"})
    assert CausalLM.from_preset(known, backend="numpy", strict=True).config.extra["unsloth_version"] == "2025.3.19"


@pytest.mark.parametrize(
    "keys",
    [
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"num_local_experts": 8},
        {"partial_rotary_factor": 0.5},
        {"use_bidirectional_attention": True},
        {"per_layer_config": {"0": {"num_attention_heads": 2}}},
    ],
)
def test_what_changes_the_maths_is_refused(keys):
    with pytest.raises(ConfigError, match=f"{next(iter(keys))}=.*changes the maths"):
        family_of("llama").Config.from_hf(CONFIGS["llama"] | keys)


@pytest.mark.parametrize("keys", [{"num_local_experts": 0}, {"partial_rotary_factor": 1.0}, {"clip_qkv": None}])
def test_what_is_switched_off_is_not(keys):
    assert unknown_keys(family_of("llama").Config.from_hf(CONFIGS["llama"] | keys).extra) == []


def test_the_error_of_an_architecture_that_is_near():
    with pytest.raises(ConfigError, match=r"'gemma3n_text' is not supported \(gemma and gemma3 is"):
        family_of("gemma3n_text")


@pytest.mark.parametrize("kind", CLASSES)
def test_defaults_are_those_of_transformers(kind):
    """What config.json leaves out is what transformers takes for it."""
    theirs = getattr(transformers, CLASSES[kind]).config_class()
    ours = family_of(kind).Config.from_hf({"model_type": kind})
    shared = [key for key in vars(ours) if hasattr(theirs, key) and key not in ("id2label", "label2id", "num_labels")]
    assert len(shared) >= 12
    assert {key: getattr(ours, key) for key in shared} == {key: getattr(theirs, key) for key in shared}
