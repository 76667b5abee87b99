"""ONNX files, run by onnxruntime, against the transformers class of the same weights."""

import importlib.util
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

import modelhub
from modelhub import Backbone, CausalLM, ImageClassifier, kinds, to_onnx
from modelhub.cli.commands import app
from modelhub.core import custom
from modelhub.core.backends import get_backend
from modelhub.core.nn import Linear
from modelhub.core.tree import Module, bind
from modelhub.errors import BackendNotInstalled, ConfigError, InputError
from modelhub.interop import conformance

# What is exported stays where it is: a backend each.
CASES = {"gemma2": "jax", "gemma3": "numpy", "llama": "tensorflow", "vit": "torch", "dinov2": "jax"}


def task(family, backend, dtype="float32", xp=None):
    """Of conformance's tiny models, with their large random weights."""
    case = conformance.FAMILIES[family]
    module, config = conformance._family(case)
    xp = xp or get_backend(backend, "cpu")
    arrays = conformance._renamed(case, conformance._weights(case))
    params = {name: xp.array(x, dtype) for name, x in arrays.items()}
    backbone = Backbone(module.Model.abstract(config), params, xp, config, dtype)
    return ImageClassifier(backbone, None) if case.size else CausalLM(backbone, None, {})


def theirs(family):
    case = conformance.FAMILIES[family]
    model, weights = conformance._their_model(case), conformance._weights(case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    return model


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """Family, what was exported, the file."""
    x = task(request.param, CASES[request.param])
    return request.param, x, to_onnx(x, tmp_path_factory.mktemp("onnx") / "model.onnx")


def run(path, **inputs):
    session = onnxruntime.InferenceSession(str(path))
    (found,) = session.run(None, inputs)
    return found


def batch(rows, length):
    ids = np.random.default_rng(0).integers(0, 101, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def images(rows):
    return np.random.default_rng(0).standard_normal((rows, 3, 16, 16)).astype(np.float32)


def padded():
    """Of three rows one has padding on the left, one on the right."""
    inputs = batch(3, 26)
    inputs["attention_mask"][1, :9] = inputs["attention_mask"][2, 20:] = 0
    return inputs


def assert_close(found, wanted, tolerance=1e-4):
    assert found.shape == wanted.shape and found.dtype == np.float32
    assert np.abs(found - wanted).max() <= tolerance


@pytest.mark.slow
def test_logits(exported):
    family, x, path = exported
    model = theirs(family)
    if isinstance(x, ImageClassifier):
        given = [{"pixel_values": images(rows)} for rows in (1, 2, 5)]
    else:
        given = [batch(1, 1), batch(2, 8), batch(5, 30), padded()]
    for inputs in given:
        with torch.no_grad():
            wanted = model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()
        tokens = inputs.get("attention_mask", np.ones(len(wanted))) == 1
        assert_close(run(path, **inputs)[tokens], wanted[tokens])


def test_the_model_stays_where_it_is(exported):
    family, x, _ = exported
    assert x.backend == CASES[family]
    name, array = next(iter(x.params.items()))
    wanted = conformance._renamed(case := conformance.FAMILIES[family], conformance._weights(case))[name]
    assert np.array_equal(x.backbone.xp.get(array), wanted)


def test_the_file(exported):
    family, x, path = exported
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    sizes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    if isinstance(x, ImageClassifier):
        assert sizes == {"pixel_values": ["batch", 3, 16, 16], "logits": ["batch", 11]}
    else:
        both = ["batch", "sequence"]
        assert sizes == {"input_ids": both, "attention_mask": both, "logits": [*both, 101]}
    # Each weight is there once, as it is, whether it is tied or not. (A mask token is for pretraining.)
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    used = {name for name in x.params if "mask_token" not in name}
    assert used <= set(found)
    assert sum(np.prod(t.dims) for t in found.values()) < 1.1 * sum(np.prod(x.params[name].shape) for name in used)
    name = next(name for name in used if name.endswith("weight"))
    assert np.array_equal(onnx.numpy_helper.to_array(found[name]), x.backbone.xp.get(x.params[name]))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["model_type"] == x.config.model_type
    assert json.loads(metadata["config"]) == json.loads(json.dumps(x.config.to_hf()))
    assert (model.producer_name, model.producer_version) == ("modelhub", modelhub.__version__)
    assert b".py" not in path.read_bytes()  # where the source was is nobody's business


@pytest.mark.slow
def test_adapters(tmp_path):
    """As they are, beside the weights."""
    lm = task("llama", "numpy")
    inputs = batch(2, 12)
    base = lm.logits(inputs["input_ids"])
    lm.enable_lora(rank=3, targets="all-linear", use_dora=True)
    generator = np.random.default_rng(0)
    lm.params = lm.params | {
        name: generator.standard_normal(x.shape).astype(np.float32) for name, x in lm.params.items() if "lora_B" in name
    }
    path = to_onnx(lm, tmp_path / "lora.onnx")
    found = run(path, **inputs)
    wanted = lm.logits(inputs["input_ids"])
    assert_close(found, wanted, 1e-4 * np.abs(wanted).max())
    assert np.abs(found - base).max() > 1
    assert any("lora_B" in tensor.name for tensor in onnx.load(path).graph.initializer)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(dtype, tmp_path):
    clf = task("vit", "torch", dtype)
    path = to_onnx(clf, tmp_path / "half.onnx")
    kinds = {tensor.data_type for tensor in onnx.load(path).graph.initializer if tensor.name in clf.params}
    assert kinds == {onnx.TensorProto.FLOAT if dtype == "bfloat16" else onnx.TensorProto.FLOAT16}
    pixels = images(3)
    with torch.no_grad():
        wanted = theirs("vit")(torch.from_numpy(pixels)).logits.numpy()
    assert_close(run(path, pixel_values=pixels), wanted, 1e-4 if dtype == "bfloat16" else 0.01)  # bfloat16 holds them


@pytest.mark.slow
def test_a_backbone(tmp_path):
    x = task("vit", "numpy").backbone
    path = to_onnx(x, tmp_path / "new" / "features.onnx", opset=21)
    assert [entry.version for entry in onnx.load(path).opset_import if not entry.domain] == [21]
    pixels = images(3)
    with torch.no_grad():
        wanted = theirs("vit").base_model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    assert_close(run(path, pixel_values=pixels), wanted)


@pytest.mark.slow
def test_large_models_keep_their_weights_in_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    clf = task("vit", "numpy")
    path = to_onnx(clf, tmp_path / "model.onnx")
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < (tmp_path / "model.onnx.data").stat().st_size
    with torch.no_grad():
        assert_close(run(path, pixel_values=images(2)), theirs("vit")(torch.from_numpy(images(2))).logits.numpy())
    path.unlink()
    with pytest.raises(InputError, match=r"model\.onnx\.data is there already"):
        to_onnx(clf, path)


# --- the user's own pieces


@modelhub.register("layer", "onnx_torch_only", backend="torch")
@dataclass
class TorchOnly(Module):
    dense: Linear

    @classmethod
    def replacing(cls, old):
        return cls(old.up_proj)

    def __call__(self, xp, x):
        return torch.nn.functional.mish(self.dense(xp, x)).mean(-1, keepdim=True) * x


@modelhub.register("layer", "onnx_looks_at_values", backend="torch")
@dataclass
class LooksAtValues(TorchOnly):
    def __call__(self, xp, x):
        return x if x.sum().item() > 0 else -x


def with_layer(name):
    lm = task("llama", "torch")
    skeleton, _ = custom.replaced(lm.backbone.model, {"model.layers.*.mlp": name}, "torch")
    params = {name.replace("mlp.up_proj", "mlp.dense"): x for name, x in lm.params.items()}
    return CausalLM(Backbone(skeleton, params, lm.backbone.xp, lm.config, "float32"), None, {})


@pytest.mark.slow
def test_a_layer_for_torch_alone(tmp_path):
    lm = with_layer("onnx_torch_only")
    inputs = batch(3, 11)
    found = run(to_onnx(lm, tmp_path / "model.onnx"), **inputs)
    assert_close(found, np.asarray(lm.logits(inputs["input_ids"])))


def test_own_attention(tmp_path):
    def itself_alone(xp, q, k, v, mask, scale):
        return v * scale

    xp = custom.with_attention(get_backend("jax", "cpu"), itself_alone)
    clf = task("vit", "jax", xp=xp)
    pixels = images(2)
    wanted = kinds.image_logits(xp, bind(clf.backbone.model, clf.params), xp.array(pixels))
    assert_close(run(to_onnx(clf, tmp_path / "model.onnx"), pixel_values=pixels), np.asarray(wanted))


def test_the_command(tmp_path):
    arguments = ["convert", "vit_tiny_fashion", str(tmp_path / "model.onnx")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and done.stdout.strip() == arguments[-1]
    clf = ImageClassifier.from_preset("vit_tiny_fashion", backend="numpy")
    pixels = clf.preprocessor(np.random.default_rng(0).integers(0, 256, (2, 40, 30, 1), dtype=np.uint8))
    assert_close(
        run(tmp_path / "model.onnx", pixel_values=pixels),
        kinds.image_logits(clf.backbone.xp, bind(clf.backbone.model, clf.params), pixels),
    )
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, InputError) and "remove it" in str(done.exception)


def test_the_command_checks_before_it_loads(tmp_path, monkeypatch):
    for task_class in (CausalLM, ImageClassifier):
        monkeypatch.setattr(task_class, "from_preset", lambda *args, **kwargs: pytest.fail("it was loaded"))

    def refused(name, *options):
        done = CliRunner().invoke(app, ["convert", "vit_tiny_fashion", str(tmp_path / name), *options])
        assert isinstance(done.exception, InputError | BackendNotInstalled), done.exception
        return str(done.exception)

    assert "dtype must be float32 for a .tflite file, got 'float16'" in refused("a.tflite", "--dtype", "float16")
    for dtype in ("bfloat16", "q8_0"):
        message = refused("a.onnx", "--dtype", dtype)
        assert f"dtype must be float32 or float16 for a .onnx file, got '{dtype}'" in message
    for suffix in (".pb", ".bin", ".pt", ".safetensors", ".h5", ".keras", ".mlmodel"):
        message = refused(f"a{suffix}")
        assert f"no {suffix} files are written; give a name that ends in .gguf, .onnx or .tflite" in message
    assert "leave out --force" in refused("a.onnx", "--force")
    (tmp_path / "taken.onnx").touch()
    assert "there already" in refused("taken.onnx")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find_spec(name))
    assert "pip install onnx" in refused("a.onnx")
    assert os.listdir(tmp_path) == ["taken.onnx"]


# --- bad input


def test_bad_input(tmp_path, monkeypatch):
    lm = task("llama", "torch")
    taken = tmp_path / "taken.onnx"
    taken.write_text("mine")
    with pytest.raises(InputError, match=r"taken\.onnx is there already"):
        to_onnx(lm, taken)
    assert taken.read_text() == "mine"
    with pytest.raises(InputError, match="expected a CausalLM"):
        to_onnx("llama", tmp_path / "a.onnx")
    with pytest.raises(InputError, match="a single Module"):
        to_onnx(Linear.abstract(3, 4), tmp_path / "a.onnx")
    (tmp_path / "a.onnx").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"a\.onnx is there already"):
        to_onnx(lm, tmp_path / "a.onnx")
    (tmp_path / "a.onnx").unlink()
    with pytest.raises(InputError, match="cannot be written"):
        to_onnx(lm, taken / "a.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", lambda *args, **kwargs: pytest.fail("it was exported"))
        for opset in (3, 17, 99, "x", 18.0, True):
            with pytest.raises(InputError, match="opset must be a whole number from 18 to"):
                to_onnx(lm, tmp_path / "a.onnx", opset=opset)
    with pytest.raises(ConfigError, match="torch cannot export this llama model"):
        to_onnx(with_layer("onnx_looks_at_values"), tmp_path / "a.onnx")
    find_spec = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else find_spec(name))
        with pytest.raises(BackendNotInstalled, match="pip install onnx onnxscript"):
            to_onnx(lm, tmp_path / "a.onnx")
    assert os.listdir(tmp_path) == ["taken.onnx"]
    assert np.isfinite(lm.logits([[1, 2, 3]])).all()


def test_an_opset_that_is_too_new_for_torch(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 99)
    with pytest.raises(InputError, match="opset 99 was asked for, and torch.onnx writes 18"):
        to_onnx(task("vit", "numpy"), tmp_path / "a.onnx", opset=99)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not os.listdir(tmp_path)


def test_a_layer_that_torch_cannot_run(tmp_path):
    @modelhub.register("layer", "onnx_jax_only", backend="jax")
    @dataclass
    class JaxOnly(TorchOnly):
        def __call__(self, xp, x):
            return x

    lm = task("llama", "jax")
    skeleton, _ = custom.replaced(lm.backbone.model, {"model.layers.0.mlp": "onnx_jax_only"}, "jax")
    params = {name.replace("layers.0.mlp.up_proj", "layers.0.mlp.dense"): x for name, x in lm.params.items()}
    lm = CausalLM(Backbone(skeleton, params, lm.backbone.xp, lm.config, "float32"), None, {})
    with pytest.raises(ConfigError, match="registered for jax alone"):
        to_onnx(lm, tmp_path / "a.onnx")
    assert not os.listdir(tmp_path) and np.isfinite(lm.logits([[1, 2, 3]])).all()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def save(self, destination):
        Path(destination).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", save)
    with pytest.raises(OSError, match="No space left"):
        to_onnx(task("vit", "numpy"), tmp_path / "a.onnx")
    assert not os.listdir(tmp_path)
