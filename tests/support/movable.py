"""What tests of lm.to have in common: small models, and what their arrays hold and where."""

import itertools

import numpy as np
import tensorflow as tf
import torch
from tiny_preset import CONFIG, LINES, write_preset

from modelhub import CausalLM, ImageClassifier
from modelhub.core.backends import installed

# Every ordered pair of the four, one after the other.
ROUND = (
    "torch", "jax", "tensorflow", "jax", "numpy", "torch", "tensorflow", "torch", "numpy", "tensorflow", "numpy", "jax",
)  # fmt: skip
PAIRS = list(itertools.permutations(installed(), 2))
TRAINING = [name for name in installed() if name != "numpy"]
IDS = np.random.default_rng(0).integers(4, 400, (2, 12))
PROMPT = "In the morning"
TEXTS = sorted(set(LINES))
PIXELS = np.random.default_rng(1).random((4, 3, 8, 8), dtype=np.float32)
QUIET = {"verbose": False, "batch_size": 2}


def one_layer(folder):
    """There is less to compile."""
    return write_preset(folder, CONFIG | {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]})


def load(preset, backend, dtype="float32", lora=False):
    lm = CausalLM.from_preset(str(preset), backend=backend, device="cpu", dtype=dtype)
    lm.preprocessor.sequence_length = 32
    if lora:
        lm.enable_lora(rank=2, name="other", seed=5)
        fill(lm, seed=6)
        lm.enable_lora(rank=3, targets="all-linear", name="mine")
        fill(lm, seed=7)
    return lm


def fill(lm, seed):
    """An adapter begins as nothing: B is zero."""
    xp, generator = lm.backbone.xp, np.random.default_rng(seed)
    lm.params = lm.params | {
        name: xp.array(generator.normal(0, 0.2, lm.params[name].shape), "float32")
        for name in lm.backbone.trainable_names()
        if "lora_B" in name
    }


def classifier(backend, **options):
    return ImageClassifier.from_config(
        3, image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        backend=backend, device="cpu", **options
    )  # fmt: skip


def values(lm, params=None):
    """Copies of all arrays, in float32, which holds a bfloat16 whole."""
    xp = lm.backbone.xp
    return {name: np.array(xp.get(x), np.float32) for name, x in (params or lm.params).items()}


def address(x):
    if isinstance(x, np.ndarray):
        return x.ctypes.data
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    return torch.from_dlpack(x).data_ptr() if isinstance(x, tf.Tensor) else x.unsafe_buffer_pointer()


def addresses(lm):
    return {name: address(x) for name, x in lm.params.items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def batches(count):
    """The same rows however many are asked for."""
    generator = np.random.default_rng(3)
    rows = generator.integers(4, 400, (count, 2, 12)).astype(np.int32)
    return [{"input_ids": ids, "labels": ids} for ids in rows]
