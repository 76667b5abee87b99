"""Image models against transformers: a tiny random model there, saved by its own code and read by ours, and back."""

from types import SimpleNamespace

import numpy as np
import torch
from safetensors.numpy import save_file
from text_parity import TOLERANCE

from modelhub.hub.files import write_json
from modelhub.model.loading import load_params
from modelhub.model.source import open_source

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
    "initializer_range": 0.3, "layer_norm_eps": 1e-3, "id2label": {0: "cat", 1: "dog", 2: "fish"},
    "label2id": {"cat": 0, "dog": 1, "fish": 2},
}  # fmt: skip


def pixels(height, width, batch=2, channels=3):
    return np.random.default_rng(0).standard_normal((batch, channels, height, width)).astype(np.float32)


def run_theirs(model, images, **options):
    with torch.no_grad():
        return model(torch.tensor(images), output_hidden_states=True, output_attentions=True, **options)


def load(folder, xp):
    with open_source(folder, {}) as source:
        params = load_params(source, xp, "float32")
    return SimpleNamespace(xp=xp, config=source.config, skeleton=source.model, names=source.names, params=params)


def run_ours(ours, images, collect=True):
    """{"last_hidden_state", "pooled", "logits", "hidden_states", "attentions"} as numpy arrays."""
    xp = ours.xp

    def forward(model, x):
        collected = {} if collect else None
        hidden = model.encode(xp, x, collected)
        found = {"last_hidden_state": hidden, "pooled": model.pooled(xp, hidden), **(collected or {})}
        if model.config.num_labels:
            found["logits"] = model.logits(xp, hidden)
        return found

    found = xp.compile(forward, ours.skeleton, hot=False)(ours.params, xp.array(images))
    return {k: [xp.get(x) for x in v] if isinstance(v, list) else xp.get(v) for k, v in found.items()}


def assert_close(found, wanted, tolerance=TOLERANCE):
    """To within `tolerance` of the largest value."""
    wanted = wanted.numpy() if isinstance(wanted, torch.Tensor) else wanted
    assert found.shape == wanted.shape and np.isfinite(found).all()
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def assert_equal_models(ours, theirs, images, **options):
    """Features and logits, as the models compute them when nobody looks inside."""
    with torch.no_grad():
        last = theirs.base_model(torch.tensor(images), **options).last_hidden_state
        logits = theirs(torch.tensor(images), **options).logits
    found = run_ours(ours, images, collect=False)
    assert_close(found["last_hidden_state"], last)
    assert found["logits"].dtype == np.float32
    assert_close(found["logits"], logits)


def assert_equal_insides(ours, theirs, images):
    """Hidden states and attention maps of every block, and the logits that they lead to."""
    wanted, found = run_theirs(theirs, images), run_ours(ours, images)
    assert len(wanted.attentions) == ours.config.num_hidden_layers
    for key in ("hidden_states", "attentions"):
        for ours_, theirs_ in zip(found[key], getattr(wanted, key), strict=True):
            assert_close(ours_, theirs_)
    assert_close(found["logits"], wanted.logits)


def save(ours, folder):
    """As save_to_preset does."""
    folder.mkdir()
    write_json(folder / "config.json", ours.config.to_hf())
    save_file({name: ours.xp.get(x) for name, x in ours.params.items()}, folder / "model.safetensors", {"format": "pt"})


def read_by_transformers(model_class, folder, **options):
    model, info = model_class.from_pretrained(folder, output_loading_info=True, attn_implementation="eager", **options)
    assert not any(info.values()), info
    return model.eval()
