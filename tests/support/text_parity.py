"""Text models against transformers: a tiny random model there, its weights under our names here."""

from types import SimpleNamespace

import numpy as np
import torch

from modelhub.core.tree import check
from modelhub.families import family_of
from modelhub.generation.decode import GenerationEngine

TOLERANCE = 1e-4


def reference(model_class, config, seed=0):
    """A transformers model with every weight random and large, norms and biases too, which start at 0 or 1 otherwise."""
    torch.manual_seed(seed)
    model = model_class._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model


def reference_logits(model, ids):
    """float32 (B, T, V) of int ids (B, T)."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(np.asarray(ids))).logits.float().numpy()


def load(model, xp, dtype="float32"):
    """Our skeleton, config, parameters and engine for a transformers model, through its config dict and names."""
    data = model.config.to_dict()
    family = family_of(data["model_type"])
    config = family.Config.from_hf(data)
    skeleton = family.Model.abstract(config)
    names = family.names("hf", config)
    arrays = {}
    for theirs, tensor in model.state_dict().items():
        if (renamed := names.to_ours(theirs)) is not None:
            ours, via = renamed
            arrays[ours] = via.to_ours(tensor.float().numpy().copy())
    check(skeleton, {name: array.shape for name, array in arrays.items()}, type(model).__name__)
    params = {name: xp.array(array, dtype) for name, array in arrays.items()}
    return SimpleNamespace(
        xp=xp,
        family=family,
        config=config,
        skeleton=skeleton,
        names=names,
        params=params,
        engine=GenerationEngine(xp, skeleton, dtype),
    )


def cached_logits(ours, rows, steps):
    """(B, steps + 1, V): logits after each row's last steps + 1 tokens, by prefill and then one token at a time."""
    xp, engine = ours.xp, ours.engine
    prompts = [row[: len(row) - steps] for row in rows]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    cache = engine._new_cache(len(rows), engine._slots(int(lengths.max()), steps + 1))
    logits, cache = engine._prefill(ours.params, prompts, lengths, cache)
    found = [xp.get(logits)]
    last = xp.zeros((len(rows),), "int32")
    for index in range(steps):
        tokens = np.array([[row[length + index]] for row, length in zip(rows, lengths, strict=True)], np.int32)
        start = xp.array(lengths + index, "int32")
        logits, cache = engine._decode_step(ours.params, xp.array(tokens), start, last, cache)
        found.append(xp.get(logits))
    return np.stack(found, 1)


def assert_close(found, wanted, tolerance=TOLERANCE):
    """To within `tolerance` of the largest logit."""
    assert found.shape == wanted.shape and found.dtype == np.float32
    assert np.isfinite(found).all()
    error, peak = np.abs(found - wanted).max(), np.abs(wanted).max()
    assert error <= tolerance * peak, f"off by {error:.3g} where the largest logit is {peak:.3g}"
