"""KerasHub's image presets that keras-hub made: the same features and logits here, and in transformers after saving."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import image_parity
import numpy as np
import pytest

from modelhub.core.tree import flatten
from modelhub.errors import CheckpointError, ConfigError
from modelhub.hub.preset import resolve
from modelhub.model.source import open_preset
from modelhub.processing.image import ImageProcessor

WITH_HEAD = ("vit", "vit_bfloat16", "vit_no_class_token", "vit_softmax")
MODELS = ("vit_backbone", *WITH_HEAD)


@pytest.fixture(scope="session")
def presets(tmp_path_factory) -> Path:
    if importlib.util.find_spec("keras_hub") is None:
        pytest.skip("keras-hub, which makes the presets, is not installed: pip install keras-hub")
    folder = tmp_path_factory.mktemp("kerashub_vit")
    script = Path(__file__).parents[1] / "support" / "stand_ins" / "make_kerashub.py"
    env = os.environ | {"KERAS_BACKEND": "numpy", "KERAS_HOME": str(folder / "home")}
    made = subprocess.run([sys.executable, str(script), str(folder), "images"], env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    return folder


def reference(presets: Path, name: str) -> dict[str, np.ndarray]:
    """ "pixels" as (B, C, H, W), "features", and "logits" where there is a head."""
    with np.load(presets / f"{name}.npz") as file:
        found = dict(file)
    found["pixels"] = found["pixels"].transpose(0, 3, 1, 2)
    return found


def changed(presets: Path, name: str, tmp_path: Path, task: bool = False, **arguments) -> Path:
    """A copy of the preset with other arguments in its config.json, or in its task.json."""
    folder = shutil.copytree(presets / name, tmp_path / name)
    path = folder / ("task.json" if task else "config.json")
    data = json.loads(path.read_text())
    data["config"] |= arguments
    path.write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_features_and_logits_are_those_of_keras_hub(presets, backend, name):
    wanted = reference(presets, name)
    found = image_parity.run_ours(image_parity.load(presets / name, backend), wanted["pixels"], collect=False)
    assert np.abs(wanted["features"]).max() > 2
    image_parity.assert_close(found["last_hidden_state"], wanted["features"])
    assert ("logits" in found) == ("logits" in wanted) == (name in WITH_HEAD)
    if name == "vit_softmax":  # keras-hub gives probabilities
        found["logits"] = np.exp(found["logits"]) / np.exp(found["logits"]).sum(-1, keepdims=True)
    if name in WITH_HEAD:
        image_parity.assert_close(found["logits"], wanted["logits"])


@pytest.mark.parametrize("name", ["vit", "vit_backbone"])
def test_saved_for_transformers(presets, name, tmp_path):
    import torch
    from transformers import ViTForImageClassification, ViTModel

    from modelhub.core.backends import get_backend

    wanted = reference(presets, name)
    image_parity.save(image_parity.load(presets / name, get_backend("numpy")), tmp_path / "saved")
    with torch.no_grad():
        if name in WITH_HEAD:
            theirs = image_parity.read_by_transformers(ViTForImageClassification, tmp_path / "saved")
            image_parity.assert_close(theirs(torch.tensor(wanted["pixels"])).logits.numpy(), wanted["logits"])
        else:
            theirs = ViTModel.from_pretrained(tmp_path / "saved", add_pooling_layer=False).eval()
            found = theirs(torch.tensor(wanted["pixels"])).last_hidden_state.numpy()
            image_parity.assert_close(found, wanted["features"])


@pytest.mark.parametrize("name", MODELS)
def test_names_and_values_go_both_ways(presets, name):
    source = open_preset(resolve(str(presets / name)))
    with source.checkpoint() as checkpoint:
        names = set()
        for theirs, info in checkpoint.tensors.items():
            if (renamed := source.names.to_ours(theirs)) is None:
                continue
            ours, via = renamed
            names.add(ours)
            values = checkpoint.read(theirs)
            assert via.our_shape(info.shape) == via.to_ours(values).shape
            back, via = source.names.to_theirs(ours)
            assert back == theirs and np.array_equal(via.to_theirs(via.to_ours(values)), values)
    assert names == set(flatten(source.model))


def test_config(presets):
    config = open_preset(resolve(str(presets / "vit"))).config
    assert (config.layer_norm_eps, config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (1e-3, 0.1, 0.2)
    assert (config.classifier_dropout, config.num_labels, config.pooling) == (0.5, 3, "cls")
    bare = open_preset(resolve(str(presets / "vit_no_class_token"))).config
    assert (bare.class_token, bare.pooling, bare.num_channels) == (False, "mean", 1)
    assert (bare.image_size, bare.patch_size) == ((16, 24), (4, 8))
    assert open_preset(resolve(str(presets / "vit_bfloat16"))).config.extra["dtype"] == "bfloat16"


def test_a_head_of_sigmoids_is_one_of_several_labels(presets, tmp_path):
    config = open_preset(resolve(str(changed(presets, "vit", tmp_path, True, activation="sigmoid")))).config
    assert (config.problem_type, config.num_labels) == ("multi_label_classification", 3)
    assert open_preset(resolve(str(presets / "vit"))).config.problem_type is None


def test_images_are_prepared_as_the_preset_says(presets):
    processor = ImageProcessor.from_folder(presets / "vit_no_class_token")
    assert processor.crop_size == {"height": 16, "width": 24}
    np.testing.assert_allclose((processor.image_mean, processor.image_std), 0.5, rtol=1e-6)


def test_earlier_spellings(presets, tmp_path, backend):
    """The first presets of keras-hub lack the arguments that it got later."""
    folder = changed(presets, "vit_softmax", tmp_path, layer_norm_epsilon=1e-3, patch_size=4)
    data = json.loads((folder / "config.json").read_text())
    for key in ("use_class_token", "use_patch_bias", "dropout_rate", "dtype"):
        del data["config"][key]
    (folder / "config.json").write_text(json.dumps(data))
    wanted = reference(presets, "vit_softmax")
    found = image_parity.run_ours(image_parity.load(folder, backend), wanted["pixels"], collect=False)
    image_parity.assert_close(found["last_hidden_state"], wanted["features"])


def test_without_the_files_of_the_task(presets, tmp_path):
    folder = shutil.copytree(presets / "vit", tmp_path / "preset")
    (folder / "task.weights.h5").unlink()
    source = open_preset(resolve(str(folder)))
    with pytest.raises(CheckpointError, match="classifier.weight"):
        image_parity.load(folder, None)
    source.close()
    (folder / "task.json").unlink()
    source = open_preset(resolve(str(folder)))
    assert source.config.num_labels == 0
    source.close()


@pytest.mark.parametrize(
    ("name", "task", "arguments", "message"),
    [
        ("vit_no_bias", False, {}, "use_mha_bias=False is not supported"),
        ("vit_backbone", False, {"use_mlp_bias": False}, "use_mlp_bias=False is not supported"),
        ("vit_backbone", False, {"use_patch_bias": False}, "use_patch_bias=False is not supported"),
        ("vit_backbone", False, {"rope": True}, "does not know and that may change the maths: rope=True"),
        ("vit_backbone", False, {"image_shape": [16, 16]}, "image_shape must be"),
        ("vit_backbone", False, {"image_shape": [16, None, 3]}, r"image_size\[1\]=None"),
        ("vit_backbone", False, {"image_shape": [3, 16, 16]}, "no multiple of patch_size"),
        ("vit_backbone", False, {"patch_size": [4, 4, 4]}, "patch_size"),
        ("vit_backbone", False, {"num_heads": 5}, "no multiple of 5 heads"),
        ("vit_backbone", False, {"num_heads": None}, "lacks num_heads"),
        ("vit_backbone", False, {"dropout_rate": "high"}, "hidden_dropout_prob='high'"),
        ("vit_backbone", False, {"dtype": "int8"}, "the weights are quantised"),
        ("vit_pre_logits", False, {}, "intermediate_dim=8 is a second layer.*Remove task.json"),
        ("vit_gap", False, {}, "pooling='gap' is not supported, only 'token'.*without the class token"),
        ("vit", True, {"pooling": None}, "pooling=None is not supported"),
        ("vit_no_class_token", True, {"pooling": "token"}, "pooling='token' is not supported, only 'gap'"),
        ("vit", True, {"activation": "relu"}, "activation='relu' is not supported"),
        ("vit", True, {"num_classes": "many"}, "num_labels='many'"),
        ("vit", True, {"heads": 2}, "heads=2"),
    ],
)
def test_configs_that_are_refused(presets, tmp_path, name, task, arguments, message):
    folder = changed(presets, name, tmp_path, task, **arguments)
    with pytest.raises(ConfigError, match=message):
        open_preset(resolve(str(folder)))


def test_a_task_of_another_class(presets, tmp_path):
    folder = changed(presets, "vit", tmp_path)
    data = json.loads((folder / "task.json").read_text()) | {"registered_name": "mine>Detector"}
    (folder / "task.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="class 'Detector'; modelhub reads ViTImageClassifier"):
        open_preset(resolve(str(folder)))


def test_a_head_of_another_shape(presets, tmp_path):
    folder = changed(presets, "vit", tmp_path, True, num_classes=4)
    with pytest.raises(CheckpointError, match=r"wrong shape: classifier\.weight"):
        image_parity.load(folder, None)


def test_a_damaged_head(presets, tmp_path):
    folder = changed(presets, "vit", tmp_path)
    with h5py.File(folder / "task.weights.h5", "r+") as file:
        file["x"] = h5py.SoftLink("/layers")
    with pytest.raises(CheckpointError, match="SoftLink"):
        open_preset(resolve(str(folder)))
