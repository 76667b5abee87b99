"""lm.to(backend=...): the same model on every backend in turn, in memory that is shared where it can be."""

import itertools
import os
import subprocess
import sys
import textwrap
import time

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from movable import (
    IDS,
    PAIRS,
    PIXELS,
    PROMPT,
    QUIET,
    ROUND,
    TEXTS,
    address,
    addresses,
    assert_same,
    batches,
    classifier,
    fill,
    load,
    one_layer,
    values,
)  # fmt: skip
from safetensors import safe_open

from modelhub import Backbone, CausalLM
from modelhub.core.backends import get_backend, installed
from modelhub.errors import BackendNotInstalled, ConfigError, DeviceError, InputError, UnknownBackend


@pytest.fixture(scope="module")
def tiny_preset(tmp_path_factory):
    return one_layer(tmp_path_factory.mktemp("presets") / "one_layer")


# --- what is the same after a move ------------------------------------------------------------------------------


def test_the_round_is_every_pair():
    assert sorted(zip(("jax", *ROUND), ROUND, strict=False)) == sorted(PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_the_same_model_on_every_backend(tiny_preset, lora):
    lm = load(tiny_preset, "jax", lora=lora)
    before, logits, text = values(lm), lm.logits(IDS), lm.generate(PROMPT, 8)
    engine = lm._engine
    for hop, name in enumerate(ROUND):
        assert lm.to(name) is lm
        assert (lm.backend, lm.device, lm.dtype) == (name, "cpu", "float32")
        assert all(lm.backbone.xp.owns(x) for x in lm.params.values())
        assert lm._engine is not engine and lm._engine.xp is lm.backbone.xp
        assert_same(values(lm), before)
        np.testing.assert_allclose(lm.logits(IDS), logits, atol=2e-4)
        if not lora or hop < 5:  # all four backends
            assert lm.generate(PROMPT, 8) == text
        engine = lm._engine


@pytest.mark.slow
def test_bfloat16(tiny_preset):
    lm = load(tiny_preset, "jax", "bfloat16", lora=True)
    before, logits = values(lm), lm.logits(IDS)
    for name in ROUND:
        lm.to(name)
        assert {lm.backbone.xp.dtype(x) for x in lm.params.values()} == {"bfloat16", "float32"}
        assert_same(values(lm), before)
        assert np.abs(lm.logits(IDS) - logits).max() < 0.02 * np.abs(logits).max()


@pytest.mark.parametrize("backend", installed())
def test_another_dtype(tiny_preset, backend, tmp_path):
    lm, other = load(tiny_preset, backend, lora=True), load(tiny_preset, backend, "bfloat16", lora=True)
    table = "model.embed_tokens.weight"
    assert lm.to(dtype="bf16") is lm and lm.dtype == "bfloat16"
    assert {lm.backbone.xp.dtype(x) for x in lm.params.values()} == {"bfloat16", "float32"}
    assert_same(values(lm), values(other))
    np.testing.assert_array_equal(lm.logits(IDS), other.logits(IDS))
    assert lm.generate(PROMPT, 4) == other.generate(PROMPT, 4)
    lm.merge_lora()
    lm.to(dtype="float32")
    assert {lm.backbone.xp.dtype(x) for x in lm.params.values()} == {"float32"}
    lm.unmerge_lora()
    assert_same(values(lm), values(other))  # what was rounded stays so
    lm.set_adapter(None)
    lm.to(dtype="float16").save_to_preset(tmp_path / "half")
    with safe_open(tmp_path / "half" / "model.safetensors", "np") as file:
        assert file.get_slice(table).get_dtype() == "F16"
    with pytest.raises(InputError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        lm.to(dtype="int8")


def test_dtype_and_backend_at_once(tiny_preset):
    lm = load(tiny_preset, "torch")
    lm.fit(TEXTS[:2], steps=1, **QUIET)
    assert lm.optimizer_state and lm.to("jax", dtype="bfloat16").optimizer_state is None
    assert (lm.backend, lm.dtype) == ("jax", "bfloat16")
    lm.fit(TEXTS[:2], steps=1, **QUIET)
    with pytest.raises(UnknownBackend):
        lm.to("abacus", dtype="float32")
    assert lm.dtype == "bfloat16"


@pytest.mark.slow
def test_images():
    clf = classifier("jax")
    clf.enable_lora(rank=2)
    before, logits, names = values(clf), clf.logits({"pixel_values": PIXELS}), clf.predict({"pixel_values": PIXELS})
    for name in ROUND:
        clf.to(backend=name)
        assert_same(values(clf), before)
        np.testing.assert_allclose(clf.logits({"pixel_values": PIXELS}), logits, atol=1e-5)
        assert [row[0][0] for row in clf.predict({"pixel_values": PIXELS})] == [row[0][0] for row in names]


@pytest.mark.slow
def test_every_adapter_goes_along(tiny_preset):
    """One is merged into the weights while they move, the other is not in use."""
    lm = load(tiny_preset, "jax", lora=True)
    mine, base, logits = values(lm), values(lm, lm.backbone.weights.base_params()), lm.logits(IDS)
    lm.set_adapter("other")
    other = values(lm)
    for name in ROUND:
        lm.set_adapter("mine")
        lm.merge_lora()
        lm.to(name)
        np.testing.assert_allclose(lm.logits(IDS), logits, atol=2e-4)
        lm.unmerge_lora()
        assert_same(values(lm), mine)
        lm.set_adapter("other")
        assert_same(values(lm), other)
    lm.set_adapter(None)
    assert_same(values(lm), base)


@pytest.mark.slow
def test_a_backbone(tiny_preset):
    backbone = Backbone.from_preset(str(tiny_preset), backend="torch", device="cpu")
    hidden = backbone(IDS).numpy()
    assert backbone.to("jax") is backbone
    np.testing.assert_allclose(np.asarray(backbone(IDS)), hidden, atol=1e-4)
    np.testing.assert_allclose(np.asarray(backbone.module.model(backbone.xp, jnp.array(IDS))), hidden, atol=1e-4)


@pytest.mark.slow
def test_a_task_whose_backbone_was_moved(tiny_preset):
    lm = load(tiny_preset, "torch")
    text = lm.generate(PROMPT, 4)
    lm.backbone.to("jax")
    assert lm.backend == "jax" and lm.generate(PROMPT, 4) == text


def test_to_where_it_is(tiny_preset):
    lm = load(tiny_preset, "torch")
    params, engine = lm.params, lm._engine
    for moved in (lm.to("torch"), lm.to(device="cpu"), lm.to("torch", "cpu"), lm.to()):
        assert moved is lm and lm.params is params
    assert lm._engine is engine and not lm.backbone.weights.borrowed  # nothing is compiled again


def test_saved_after_a_move(tiny_preset, tmp_path):
    lm = load(tiny_preset, "jax")
    wanted = values(lm)
    assert lm.backbone.untouched
    lm.to("tensorflow")
    assert lm.backbone.untouched and lm.backbone.identity  # the same weights, elsewhere
    lm.save_to_preset(tmp_path / "saved")
    assert_same(values(CausalLM.from_preset(tmp_path / "saved", backend="numpy")), wanted)
    lm.enable_lora(rank=2)
    fill(lm, 0)
    lm.to("torch").save_adapter(tmp_path / "adapter")
    other = load(tiny_preset, "numpy")
    other.load_adapter(tmp_path / "adapter")
    np.testing.assert_allclose(other.logits(IDS), lm.logits(IDS), atol=2e-4)


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_copies(tiny_preset, dtype):
    lm = load(tiny_preset, "jax", dtype, lora=True)  # JAX's arrays are aligned as everybody wants them
    before = addresses(lm)
    for name in ROUND:
        lm.to(name)
        assert addresses(lm) == before, name


@pytest.mark.parametrize("target", ["jax", "tensorflow"])
def test_memory_that_is_not_aligned_is_copied(tiny_preset, target):
    lm = load(tiny_preset, "torch")
    wanted = lm.logits(IDS)
    lm.params = {name: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for name, x in lm.params.items()}
    assert all(address(x) % 64 for x in lm.params.values())
    lm.to(target)
    assert not any(address(x) % 64 for x in lm.params.values())
    np.testing.assert_allclose(lm.logits(IDS), wanted, atol=2e-4)


@pytest.mark.slow
def test_strides_survive(tiny_preset):
    lm = load(tiny_preset, "torch")
    wanted = lm.logits(IDS)
    strided = {name: x.t().contiguous().t() if x.ndim == 2 else x for name, x in lm.params.items()}
    for source, target in PAIRS:
        lm.to("torch").params = strided
        lm.to(source).to(target)
        np.testing.assert_allclose(lm.logits(IDS), wanted, atol=2e-4)


@pytest.mark.parametrize("target", ["jax", "tensorflow"])
def test_no_more_than_one_tensor_is_there_twice(target):
    """Most of numpy's memory is not aligned as these want it: 200 MB are copied, one tensor after the other."""
    program = f"""
        import threading, time
        from modelhub import ImageClassifier
        from modelhub.core.backends import get_backend

        def resident():
            with open("/proc/self/status") as lines:
                return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1e3

        clf = ImageClassifier.from_config(
            2, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8, image_size=32,
            backend="numpy",
        )
        get_backend("{target}", "cpu").zeros((3,))  # what the framework itself needs is not counted
        seen, done = [], False

        def watch():
            while not done:
                seen.append(resident())
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        before = resident()
        watcher.start()
        aligned = sum(x.nbytes for x in clf.params.values() if x.ctypes.data % 64 == 0)
        clf.to("{target}")
        done = True
        watcher.join()
        print(4 * clf.backbone.num_parameters / 1e6, aligned / 1e6, max(seen) - before)
    """
    # Memory that is given back is given back at once.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    size, aligned, more = map(float, result.stdout.split())
    assert size > 200 and aligned < 50
    assert more < 30  # the largest tensor has 17 MB


# --- what cannot be done is said before anything is moved --------------------------------------------------------


def still_there(lm, params):
    assert lm.backend == "torch" and lm.params is params
    assert lm.generate(PROMPT, 2)


def test_unknown_places(tiny_preset, monkeypatch):
    lm = load(tiny_preset, "torch")
    params = lm.params
    with pytest.raises(UnknownBackend, match="mxnet"):
        lm.to("mxnet")
    with pytest.raises(DeviceError, match="gpu:7"):
        lm.to("jax", device="gpu:7")
    with pytest.raises(DeviceError, match="tpu"):
        lm.to(device="tpu")
    monkeypatch.setitem(sys.modules, "modelhub.core.backends.jax", None)
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.setattr(
        "importlib.import_module",
        lambda name: (_ for _ in ()).throw(ModuleNotFoundError("No module named 'jax'", name="jax")),
    )
    with pytest.raises(BackendNotInstalled, match="pip install"):
        lm.to("jax")
    monkeypatch.undo()
    still_there(lm, params)


def test_too_little_memory(tiny_preset, monkeypatch):
    from modelhub import to_torch

    lm = load(tiny_preset, "torch")
    xp = get_backend("jax", "cpu")
    monkeypatch.setattr(type(xp), "free_memory", lambda self: 1000)
    lm.to("jax").to("torch")  # takes none
    to_torch(lm)
    params = lm.params
    with pytest.raises(DeviceError, match="do not fit"):  # the module keeps its arrays
        lm.to("jax")
    still_there(lm, params)


def runs_out_of_memory(lm, monkeypatch):
    """The move to JAX fails at the 21st array."""
    xp = get_backend("jax", "cpu")
    adopt, calls = type(xp).adopt, itertools.count()

    def fails(self, x, owner):
        if next(calls) == 20:
            raise MemoryError("no more")
        return adopt(self, x, owner)

    monkeypatch.setattr(type(xp), "adopt", fails)
    with pytest.raises(MemoryError):
        lm.to("jax")


def test_memory_that_runs_out_on_the_way(tiny_preset, monkeypatch):
    lm = load(tiny_preset, "torch", lora=True)
    wanted, logits = values(lm), lm.logits(IDS)
    runs_out_of_memory(lm, monkeypatch)
    assert lm.backend == "torch"
    assert_same(values(lm), wanted)
    np.testing.assert_array_equal(lm.logits(IDS), logits)
    monkeypatch.undo()
    assert lm.to("jax").backend == "jax"


def test_a_module_is_still_the_models_after_a_move_that_failed(tiny_preset, monkeypatch):
    from modelhub import to_torch

    lm = load(tiny_preset, "torch", lora=True)
    net = to_torch(lm)
    mine = list(lm.params.values())
    lm.set_adapter("mine")
    runs_out_of_memory(lm, monkeypatch)
    assert all(x is y for x, y in zip(lm.params.values(), mine, strict=True)) and lm.backbone.shared
    before = lm.logits(IDS)
    with torch.no_grad():
        net.model.norm.weight.add_(1)
    assert np.abs(lm.logits(IDS) - before).max() > 1e-2


def test_a_native_optimizer(tiny_preset):
    lm = load(tiny_preset, "torch")
    params = lm.params
    lm.compile(torch.optim.AdamW)
    with pytest.raises(ConfigError, match="works on torch alone"):
        lm.to("jax")
    still_there(lm, params)
    lm.to(device="cpu")
    lm.compile("adamw")
    assert lm.to("jax").backend == "jax"


def test_a_backbone_that_left_its_native_optimizer(tiny_preset):
    lm = load(tiny_preset, "torch")
    lm.compile(torch.optim.AdamW)
    lm.backbone.to("jax")
    with pytest.raises(ConfigError, match="compile"):
        lm.fit(batches(1), verbose=False)
    lm.to("jax")


def test_an_attention_function(tiny_preset):
    def own(q, k, v, mask, scale):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    lm = CausalLM.from_preset(str(tiny_preset), backend="torch", device="cpu", attention=own)
    params, logits = lm.params, lm.logits(IDS)
    with pytest.raises(ConfigError, match="attention"):
        lm.to("jax")
    still_there(lm, params)
    np.testing.assert_array_equal(lm.to(device="cpu").logits(IDS), logits)


# --- the real one -----------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.slow
def test_gemma3_goes_round(gemma3_gguf, capsys):
    lm = CausalLM.from_preset(str(gemma3_gguf), backend="jax", device="cpu")
    for name in installed():
        get_backend(name, "cpu")  # importing is no part of a move
    text = lm.generate("The capital of France is", max_new_tokens=20)
    assert text.startswith(" the capital of the country of France.")
    for name in ("torch", "tensorflow", "numpy", "jax"):
        before, begun = addresses(lm), time.perf_counter()
        lm.to(name)
        seconds = time.perf_counter() - begun
        with capsys.disabled():
            print(f"\n{lm.backbone.num_parameters:,} parameters to {name}: {seconds:.3f} s", end="")
        assert addresses(lm) == before
        assert seconds < 0.5
        assert lm.generate("The capital of France is", max_new_tokens=20) == text
