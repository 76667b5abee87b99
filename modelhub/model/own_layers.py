"""Layers of the user's own in a model that is loaded: put in their places, tried, and what the files lack of them."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from modelhub.core import custom, leaves
from modelhub.core.backends.base import Backend
from modelhub.core.tree import Module, Params
from modelhub.errors import ConfigError, ModelhubError
from modelhub.kinds import IMAGES
from modelhub.model.source import Source, with_own_head

log = logging.getLogger("modelhub")


def with_layers(source: Source, asked: Mapping[str, str] | None, xp: Backend) -> tuple[Source, dict[str, Module]]:
    """The source with its own layers and those that are asked for in its model, and what they are in place of.

    Raises ConfigError: see custom.replaced.
    """
    if asked is not None and not isinstance(asked, Mapping):
        raise ConfigError(f"layers must be {{pattern: name of a registered layer}}, got {asked!r}")
    new = {pattern: name for pattern, name in (asked or {}).items() if source.layers.get(pattern) != name}
    layers = {pattern: name for pattern, name in source.layers.items() if pattern not in new} | new
    if not layers:
        return source, {}
    if getattr(source.config, "tie_word_embeddings", False) and any(custom.means(at, "lm_head") for at in layers):
        # A head of its own needs a place of its own: it starts from the table of the embeddings.
        source = with_own_head(source)
    model, before = custom.replaced(source.model, layers, xp.name)
    fresh = tuple(place for place in before if any(custom.means(pattern, place) for pattern in new))
    return dataclasses.replace(source, model=model, layers=layers, new_layers=fresh), before


def try_layers(source: Source, xp: Backend, params: Params, before: Mapping[str, Module]) -> None:
    """Run the model once on next to nothing, for what is wrong with layers of the user's own: a ConfigError."""
    if not before:
        return
    try:
        _run_once(source.config, xp, params, custom.watched(xp, source.model, params, before))
    except ModelhubError:
        raise
    except Exception as error:  # what the rest of the model asks of the user's layers may fail in any way
        own = ", ".join(f"{name!r} for {pattern!r}" for pattern, name in source.layers.items())
        raise ConfigError(
            f"the model with layers of your own ({own}) raised {type(error).__name__}: {error}. A layer needs what the "
            f"rest of the model reads of the one that it replaces"
        ) from error


def _run_once(config: Any, xp: Backend, params: Params, model: Any) -> None:
    if model.reads != IMAGES:
        model.logits(xp, model.hidden(xp, xp.array([[0, 1]], "int32")))
        return
    pixels = xp.zeros((1, config.num_channels, *config.size), leaves.dtype_of(next(iter(params.values()))))
    hidden = model.hidden(xp, pixels)
    if config.num_labels:
        model.logits(xp, hidden)


def new_params(
    source: Source, wanted: dict[str, Any], plan: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Specs of what the files lack, or have otherwise, of new layers; what those leave over goes from the plan."""
    if not source.new_layers:
        return {}
    inside = tuple(f"{place}." for place in source.new_layers)
    for name in [name for name in plan if name.startswith(inside)]:
        if name not in wanted or wanted[name].shape != shapes[name]:
            del plan[name], shapes[name]
    theirs = [name for name in wanted if name.startswith(inside)]
    new = {name: wanted[name] for name in theirs if name not in plan}
    if new:
        log.warning(
            "%d of the %d parameters in layers of your own are not in the checkpoint and start anew: train all "
            "weights, or these first, as an adapter alone leaves them as they are", len(new), len(theirs),
        )  # fmt: skip
    return new
