"""Models with quantised weights as Hugging Face folders: written, read again, and loaded by transformers."""

import json
import shutil

import numpy as np
import pytest
from tiny_preset import CONFIG, write_preset

from modelhub import CausalLM, ImageClassifier, convert
from modelhub.core import leaves
from modelhub.core.backends import get_backend
from modelhub.core.quantized import tiles_of, untiled
from modelhub.core.tree import bind
from modelhub.errors import ConfigError
from modelhub.model.weights import PARAMS, Change

XP = get_backend("numpy")
TABLE = "model.embed_tokens.weight"
IDS = np.array([[2, 17, 33, 101, 5, 9, 250, 60]])
WIDE = CONFIG | {"hidden_size": 64, "intermediate_size": 96}
UNTIED = WIDE | {"tie_word_embeddings": False}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return write_preset(tmp_path_factory.mktemp("quantized") / "tied", WIDE)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return write_preset(tmp_path_factory.mktemp("quantized") / "untied", UNTIED)


def load(path, quantize=None, backend="numpy", **more):
    return CausalLM.from_preset(path, backend=backend, quantize=quantize, **more)


def packed(lm):
    return {name: leaf for name, leaf in lm.params.items() if isinstance(leaf, leaves.Packed)}


def floats(lm):
    xp = lm.backbone.xp
    return {name: np.asarray(xp.get(xp.values(leaf))) for name, leaf in lm.params.items()}


def check_same_leaves(found, wanted):
    """But the table, which is in floats if the head is another one."""
    kept = {n: x for n, x in packed(wanted).items() if n != TABLE or "lm_head.weight" not in wanted.params}
    assert packed(found).keys() == kept.keys() and kept
    for name, leaf in kept.items():
        other = packed(found)[name]
        assert (other.scheme, other.shape, other.dtype) == (leaf.scheme, leaf.shape, leaf.dtype)
        parts = [
            untiled({n: np.asarray(lm.backbone.xp.get(x)) for n, x in x.arrays.items()}, x.scheme, x.shape[0])
            for lm, x in ((found, other), (wanted, leaf))
        ]
        for a, b in zip(*parts, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


SCHEMES = ["int8", "int4", {"*": "int4", "lm_head": "int8"}, {"*_proj": "int4", "down_proj": "int8h"}]


def test_a_tied_head_has_its_own_name(tied):
    found = {name: leaf.scheme for name, leaf in packed(load(tied, {"*": "int4", "lm_head": "int8"})).items()}
    assert found.pop(TABLE) == "int8" and {*found.values()} == {"int4"}
    lm = load(tied)
    lm.quantize({"lm_head": "int4"})
    assert {name: leaf.scheme for name, leaf in packed(lm).items()} == {TABLE: "int4"}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_written_and_kept(tmp_path, untied, scheme):
    lm = load(untied, scheme)
    lm.save_to_preset(tmp_path / "saved")
    check_same_leaves(load(tmp_path / "saved", "keep"), lm)
    again = load(tmp_path / "saved")
    assert not packed(again)
    for name, x in floats(lm).items():
        np.testing.assert_array_equal(again.params[name], x, err_msg=name)
    assert "quantization_config" not in again.backbone.config.to_hf()


@pytest.mark.parametrize("backend", ["jax", "torch", "tensorflow"])
def test_other_backends(tmp_path, untied, backend):
    lm = load(untied, "int4", backend)
    lm.save_to_preset(tmp_path / "saved")
    again = load(tmp_path / "saved", "keep", backend)
    check_same_leaves(again, lm)
    assert again.generate("The river", max_new_tokens=4) == lm.generate("The river", max_new_tokens=4)


def test_a_head_that_is_the_table(tmp_path, tied):
    lm = load(tied, "int8")
    assert "model.embed_tokens.weight" in packed(lm) and "lm_head.weight" not in lm.params
    lm.save_to_preset(tmp_path / "saved")
    for quantize in ("keep", None):
        again = load(tmp_path / "saved", quantize)
        assert "lm_head.weight" not in again.params and again.backbone.config.tie_word_embeddings
        for name, x in floats(lm).items():
            np.testing.assert_array_equal(floats(again)[name], x, err_msg=name)
    check_same_leaves(load(tmp_path / "saved", "keep"), lm)
    again.save_to_preset(tmp_path / "floats")
    config = json.loads((tmp_path / "floats" / "config.json").read_text())
    assert "quantization_config" not in config and config["tie_word_embeddings"]


def test_int4_of_a_file_with_4_bits_is_not_rounded_again(tmp_path, untied, caplog):
    lm = load(untied, {"*": "int4", "lm_head": "int8"})
    lm.save_to_preset(tmp_path / "saved")
    again = load(tmp_path / "saved", "int4")
    assert again.params["lm_head.weight"].scheme == "int4"
    assert "1 matrices went from pack-quantized 8 bits to int4, by rounding (lm_head)" in caplog.text
    for name, x in floats(lm).items():
        if name != "lm_head.weight":
            np.testing.assert_array_equal(floats(again)[name], x, err_msg=name)


@pytest.mark.parametrize("scheme", ["int4m", "int8m"])
def test_minima_are_refused(tmp_path, untied, scheme):
    lm = load(untied, {"*": "int4", "down_proj": scheme})
    with pytest.raises(ConfigError, match=f"down_proj.weight is {scheme}.*minimum.*dequantize=True"):
        lm.save_to_preset(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    lm.save_to_preset(tmp_path / "saved", dequantize=True)
    for name, x in floats(lm).items():
        np.testing.assert_array_equal(load(tmp_path / "saved").params[name], x, err_msg=name)


def test_minima_of_zero_points_are_written(tmp_path, untied):
    """As a model has them that came from AWQ or GPTQ."""
    lm = load(untied, {"*": "int4", "down_proj": "int4m"})
    rng = np.random.default_rng(0)
    params = dict(lm.params)
    for name, leaf in packed(lm).items():
        if leaf.scheme == "int4m":
            zeros = rng.integers(0, 16, leaf.scales.shape)
            minima = (0.0 - zeros.astype(np.float32) * leaf.scales.astype(np.float32)).astype(np.float16)
            arrays = {"codes": leaf.codes, "scales": leaf.scales, "minima": minima}
            params[name] = tiles_of(XP, arrays, "int4m", leaf.shape, leaf.dtype)
    lm.backbone.weights.change(Change.QUANTIZED, {PARAMS: params})
    lm.save_to_preset(tmp_path / "saved")
    check_same_leaves(load(tmp_path / "saved", "keep"), lm)


def test_adapters_on_quantised_weights(tmp_path, untied):
    lm = load(untied, "int4", "torch")
    lm.enable_lora(2)
    with pytest.raises(ConfigError, match="adapter is active on 4 quantised.*save_adapter"):
        lm.save_to_preset(tmp_path / "saved")
    lm.save_to_preset(tmp_path / "floats", dequantize=True)
    assert not packed(load(tmp_path / "floats"))
    lm.backbone.set_adapter(None)
    lm.save_to_preset(tmp_path / "saved")
    check_same_leaves(load(tmp_path / "saved", "keep"), lm)


def test_publishing_and_the_card(tmp_path, tied):
    lm = load(tied, "int4")
    lm.publish(f"file://{tmp_path}/hub/tiny", licence="apache-2.0", from_scratch=True)
    (folder,) = {path.parent for path in (tmp_path / "hub").rglob("config.json")}
    card = (folder / "README.md").read_text()
    assert "Its weights are quantised: of the matrices 15 in `int4`" in card and "- compressed-tensors" in card
    check_same_leaves(load(folder, "keep"), lm)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("is_tied", [False, True])
def test_transformers_loads_what_is_written(tmp_path, tied, untied, scheme, is_tied):
    pytest.importorskip("compressed_tensors")
    import torch
    from transformers import AutoModelForCausalLM

    if is_tied and isinstance(scheme, dict) and "lm_head" in scheme:
        pytest.skip("the head is the table")
    lm = load(tied if is_tied else untied, scheme)
    lm.save_to_preset(tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(IDS)).logits.numpy()  # the first call dequantises
    state = {name: x.numpy() for name, x in theirs.state_dict().items()}
    for name, x in floats(lm).items():
        np.testing.assert_array_equal(state[name], x, err_msg=name)
    theirs.save_pretrained(tmp_path / "theirs")  # what changes the table or the head takes away that they are one
    assert "modelhub_tied" not in (tmp_path / "theirs" / "config.json").read_text()
    lm.save_to_preset(tmp_path / "floats", dequantize=True)
    np.testing.assert_allclose(logits, load(tmp_path / "floats").logits(IDS), atol=1e-3 * np.abs(logits).max())


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_folder_that_transformers_has_saved(tmp_path, tied, untied, is_tied):
    pytest.importorskip("compressed_tensors")
    import torch
    from transformers import AutoModelForCausalLM

    lm = load(tied if is_tied else untied, "int4")
    lm.save_to_preset(tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "saved").glob("tokenizer*"):
        shutil.copy(path, tmp_path / "theirs")
    kept = packed(load(tmp_path / "theirs", "keep"))
    assert {leaf.scheme for leaf in kept.values()} == {"int4"} and len(kept) == 15
    head = lm.params.get("lm_head.weight", lm.params[TABLE])
    for name, x in load(tmp_path / "theirs").params.items():
        np.testing.assert_array_equal(x, XP.values(lm.params.get(name, head)), err_msg=name)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_image_models(tmp_path, scheme):
    pytest.importorskip("compressed_tensors")
    import torch
    from transformers import AutoModelForImageClassification

    images = ImageClassifier.from_preset("vit_tiny_fashion", backend="numpy", quantize=scheme)
    images.save_to_preset(tmp_path / "saved")
    check_same_leaves(ImageClassifier.from_preset(tmp_path / "saved", backend="numpy", quantize="keep"), images)
    wide = ImageClassifier.from_preset(tmp_path / "saved", backend="numpy")
    config = wide.backbone.config
    pixels = np.random.default_rng(0).standard_normal((2, config.num_channels, *config.size)).astype(np.float32)
    wanted = wide.kind.forward(XP, bind(wide.backbone.model, wide.params), pixels)
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        found = theirs(torch.from_numpy(pixels)).logits.numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_quantised_folder_is_converted_as_floats(tmp_path, tied):
    lm = load(tied, "int4")
    lm.save_to_preset(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "floats")
    convert(tmp_path / "saved", tmp_path / "model.gguf", "float32")
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    for path in ("floats", "model.gguf"):
        again = load(tmp_path / path)
        for name, x in floats(lm).items():
            np.testing.assert_allclose(again.params[name], x, atol=1e-6, err_msg=name)
