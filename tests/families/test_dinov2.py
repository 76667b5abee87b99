"""DINOv2 with and without registers against transformers, on every backend."""

import functools

import image_parity
import numpy as np
import pytest
import torch
import transformers
from image_parity import (
    SMALL,
    assert_close,
    assert_equal_insides,
    assert_equal_models,
    load,
    pixels,
    run_ours,
    save,
)
from text_parity import reference

from modelhub.core.backends import get_backend
from modelhub.core.tree import bind, flatten, initial_value
from modelhub.core.vision import Dropout
from modelhub.errors import ConfigError
from modelhub.families.dinov2 import Config, Model, names

PLAIN = (transformers.Dinov2ForImageClassification, transformers.Dinov2Config)
REGISTERS = (transformers.Dinov2WithRegistersForImageClassification, transformers.Dinov2WithRegistersConfig)
CASES = {
    "plain": (*PLAIN, SMALL | {"mlp_ratio": 2}),
    "giant": (*PLAIN, SMALL | {"use_swiglu_ffn": True, "use_mask_token": False, "mlp_ratio": 3, "qkv_bias": False}),
    "registers": (*REGISTERS, SMALL | {"num_register_tokens": 3}),
}
HEADLESS = {"plain": transformers.Dinov2Model, "registers": transformers.Dinov2WithRegistersModel}


@functools.cache
def their_model(name):
    model_class, config_class, values = CASES[name]
    return reference(model_class, config_class(**values))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    their_model(request.param).save_pretrained(folder)
    return their_model(request.param), folder


@pytest.fixture(scope="module")
def ours(case, backend):
    return load(case[1], backend)


@pytest.mark.parametrize("size", [(16, 16), (24, 12), (8, 32)])
def test_logits_and_features(case, ours, size):
    """The trained size, others, and another shape of as many patches."""
    assert_equal_models(ours, case[0], pixels(*size))


def test_hidden_states_and_attention_maps(case, ours):
    assert_equal_insides(ours, case[0], pixels(16, 16))


@pytest.mark.parametrize("name", HEADLESS)
def test_without_a_head(name, tmp_path):
    _, config_class, values = CASES[name]
    theirs = reference(HEADLESS[name], config_class(**values))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs", get_backend("numpy"))
    found = run_ours(ours, pixels(24, 16))
    wanted = image_parity.run_theirs(theirs, pixels(24, 16))
    assert_close(found["last_hidden_state"], wanted.last_hidden_state)
    assert_close(found["pooled"][:, :32], wanted.pooler_output)
    save(ours, tmp_path / "ours")
    again = image_parity.read_by_transformers(HEADLESS[name], tmp_path / "ours")
    assert all(torch.equal(x, theirs.state_dict()[key]) for key, x in again.state_dict().items())


def test_saved_models_load_in_transformers(case, tmp_path):
    theirs, folder = case
    save(load(folder, get_backend("numpy")), tmp_path / "saved")
    model = image_parity.read_by_transformers(type(theirs), tmp_path / "saved")
    assert model.config.id2label == theirs.config.id2label
    for (name, found), wanted in zip(model.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(found, wanted), name


def test_names_in_memory():
    theirs = their_model("registers")
    config = Config.from_hf(theirs.config.to_dict() | {"architectures": [type(theirs).__name__]})
    mapping = names("hf", config)
    wanted = set(flatten(Model.abstract(config)))
    assert {mapping.to_ours(name)[0] for name in theirs.state_dict()} == wanted
    stripped = [name.removeprefix("dinov2_with_registers.") for name in theirs.state_dict()]
    assert {mapping.to_ours(name)[0] for name in stripped} == wanted


@pytest.mark.parametrize("name", CASES)
def test_config_round_trip(name):
    model_class, config_class, values = CASES[name]
    theirs = config_class(**values, architectures=[model_class.__name__])
    config = Config.from_hf(theirs.to_dict())
    assert Config.from_hf(config.to_hf()) == config and config.architecture == model_class.__name__
    again = config_class(**config.to_hf())
    for key in ("mlp_ratio", "use_swiglu_ffn", "layerscale_value", "patch_size", "qkv_bias", "id2label"):
        assert getattr(again, key) == getattr(theirs, key), key


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [  # facebook/dinov2-small and -giant, as published
        ({"hidden_size": 384, "num_attention_heads": 6}, 22_056_576),
        (
            {"hidden_size": 1536, "num_attention_heads": 24, "num_hidden_layers": 40, "use_swiglu_ffn": True},
            1_136_480_768,
        ),
    ],
)
def test_parameters_of_published_models(changes, parameters):
    config = Config.from_hf({"model_type": "dinov2", "architectures": ["Dinov2Model"], "image_size": 518} | changes)
    assert sum(np.prod(spec.shape) for spec in flatten(Model.abstract(config)).values()) == parameters


def test_layer_scales_start_where_the_config_says():
    config = Config.from_hf({"model_type": "dinov2", "layerscale_value": 1e-5} | {"num_hidden_layers": 1})
    name = "dinov2.encoder.layer.0.layer_scale1.lambda1"
    np.testing.assert_array_equal(initial_value(name, flatten(Model.abstract(config))[name], 0), np.float32(1e-5))


def test_stochastic_depth(backend):
    keys = np.arange(2000, dtype=np.int32)
    training, ones = backend.for_training(backend.array(keys)), backend.full((2000, 2, 3), 1.0)
    path = Dropout.at("path mlp 1", 0.2)
    found = backend.get(path.rows(training, ones))
    assert (found == found[:, :1, :1]).all()  # an image as a whole
    assert set(np.unique(found)) == {np.float32(0), np.float32(1.25)}
    assert abs((found == 0).mean() - 0.2) < 0.03
    assert path.rows(backend, ones) is ones


def test_stochastic_depth_is_the_same_everywhere(backend):
    config = Config.from_hf(
        SMALL | {"model_type": "dinov2", "drop_path_rate": 0.5, "attention_probs_dropout_prob": 0.1}
    )
    skeleton, images, keys = Model.abstract(config), pixels(16, 16, batch=4), np.arange(4, dtype=np.int32)
    values = {name: initial_value(name, spec, 0) * 3 for name, spec in flatten(skeleton).items()}

    def logits(xp, keys):
        tx = xp.for_training(None if keys is None else xp.array(keys))
        model = bind(skeleton, {name: xp.array(value) for name, value in values.items()})
        return xp.get(model.logits(tx, model.encode(tx, xp.array(images))))

    wanted = logits(get_backend("numpy"), keys)
    assert_close(logits(backend, keys), wanted)
    assert np.abs(wanted - logits(get_backend("numpy"), None)).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mlp_ratio": "4", "drop_path_rate": -0.1}, "drop_path_rate=-0.1.*mlp_ratio='4'"),
        ({"num_register_tokens": 4}, "0 for model_type dinov2"),
        ({"model_type": "dinov2_with_registers", "num_register_tokens": 0}, "1 or more with registers"),
        ({"modelhub": {"class_token": False, "pooling": "mean"}}, "class_token must be true"),
        ({"ffn_layer": "swiglu"}, "ffn_layer='swiglu'"),
    ],
)
def test_bad_configs_raise(changes, says):
    with pytest.raises(ConfigError, match=says):
        Config.from_hf(SMALL | {"model_type": "dinov2"} | changes)


def test_another_pooling_for_the_head_is_not_for_transformers():
    config = Config.from_hf(SMALL | {"model_type": "dinov2", "modelhub": {"pooling": "cls"}})
    assert Model.abstract(config).classifier.weight.shape == (3, 32)
    assert config.to_hf()["model_type"] == "modelhub_dinov2" and Config.from_hf(config.to_hf()) == config
