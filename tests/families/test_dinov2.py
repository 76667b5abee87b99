"""DINOv2 with and without registers against transformers, on every backend."""

import numpy as np
import transformers
from image_parity import SMALL, assert_close, pixels
from image_suite import ImageSuite

from modelhub.core.backends import get_backend
from modelhub.core.tree import bind, flatten, initial_value
from modelhub.core.vision import Dropout
from modelhub.families.dinov2 import Config, Model

DINOV2, REGISTERS = transformers.Dinov2ForImageClassification, transformers.Dinov2WithRegistersForImageClassification
GIANT = {"hidden_size": 1536, "num_attention_heads": 24, "num_hidden_layers": 40, "use_swiglu_ffn": True}
WHOLE = {"model_type": "dinov2", "architectures": ["Dinov2Model"], "image_size": 518}


class TestDINOv2(ImageSuite):
    cases = {
        "plain": (DINOV2, SMALL | {"mlp_ratio": 2}),
        "giant": (DINOV2, SMALL | {"use_swiglu_ffn": True, "use_mask_token": False, "mlp_ratio": 3, "qkv_bias": False}),
        "registers": (REGISTERS, SMALL | {"num_register_tokens": 3}),
    }
    headless = {"plain": (transformers.Dinov2Model, {}), "registers": (transformers.Dinov2WithRegistersModel, {})}
    sizes = ((24, 12), (8, 32))  # the second has as many patches as the trained one
    several = ("giant",)
    published = {
        "facebook/dinov2-small": (WHOLE | {"hidden_size": 384, "num_attention_heads": 6}, 22_056_576),
        "facebook/dinov2-giant": (WHOLE | GIANT, 1_136_480_768),
    }
    refused_from = SMALL | {"model_type": "dinov2"}
    refused = {
        "drop_path_rate=-0.1.*mlp_ratio='4'": {"mlp_ratio": "4", "drop_path_rate": -0.1},
        "0 for model_type dinov2": {"num_register_tokens": 4},
        "1 or more with registers": {"model_type": "dinov2_with_registers", "num_register_tokens": 0},
        "class_token must be true": {"modelhub": {"class_token": False, "pooling": "mean"}},
        "ffn_layer='swiglu'": {"ffn_layer": "swiglu"},
    }


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


def test_another_pooling_for_the_head_is_not_for_transformers():
    config = Config.from_hf(SMALL | {"model_type": "dinov2", "modelhub": {"pooling": "cls"}})
    assert Model.abstract(config).classifier.weight.shape == (3, 32)
    assert config.to_hf()["model_type"] == "modelhub_dinov2" and Config.from_hf(config.to_hf()) == config
