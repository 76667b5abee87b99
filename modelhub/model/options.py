"""How a preset is loaded: the keywords of every `from_preset`, said once."""

import difflib
import os
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from modelhub.core import custom
from modelhub.core.backends import FASTEST, get_backend
from modelhub.core.backends.base import Backend
from modelhub.hub.preset import Preset, resolve


class SourceOptions(TypedDict, total=False):
    """Where the files are found.

    revision: branch, tag or commit on the hub. offline: use the cache only. token: of the hub, where it asks for one.
    cache_dir: where fetched files are kept; None: $MODELHUB_CACHE, else ~/.cache/modelhub.
    """

    revision: str | None
    offline: bool
    token: str | None
    cache_dir: str | None


class LoadOptions(SourceOptions, total=False):
    """Keywords of `from_preset`, all of them optional; and those of SourceOptions.

    backend: "jax", "torch", "tensorflow" or "numpy"; None: set_backend(), else $MODELHUB_BACKEND, else an installed
        one that sees an accelerator, else the first installed of these. "fastest": the one that measures fastest
        here with this model; see `modelhub bench`.
    device: "cpu", "gpu", "gpu:1", "tpu", "mps"; None: the best present.
    dtype: "float32", "bfloat16" or "float16"; None: float32 on CPU, the checkpoint's own elsewhere.
    load_weights: False gives random weights drawn from `seed`, equal on all backends.
    attention: fn(q, k, v, mask, scale=scale) on arrays of the backend, or fn(xp, q, k, v, mask, scale=scale)
        written once, or the name of a registered one, in place of ours, such as torch's scaled_dot_product_attention;
        q (B, heads, T, h), k and v (B, key heads, S, h), mask None or bool (B, 1, T, S).
    layers: {pattern: name of a registered layer}, see modelhub.register: these take the places that the pattern
        means: dotted names ("model.layers.0.mlp"), ends of them ("mlp"), patterns ("model.layers.*.mlp").
        Parameters that the checkpoint has under the same name and shape are loaded, the others drawn from `seed`.
    """

    backend: str | None
    device: str | None
    dtype: str | None
    load_weights: bool
    attention: Callable | str | None
    layers: Mapping[str, str] | None
    seed: int


_KEYWORDS = SourceOptions.__annotations__ | LoadOptions.__annotations__


def check_options(options: Mapping[str, Any]) -> None:
    """Raise TypeError, as Python itself does, for keywords that there are not."""
    for name in options:
        if name not in _KEYWORDS:
            near = difflib.get_close_matches(name, _KEYWORDS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"from_preset() got an unexpected keyword argument {name!r}{hint}")


def resolve_preset(preset: str | os.PathLike[str], options: LoadOptions) -> Preset:
    return resolve(
        os.fspath(preset), revision=options.get("revision"), offline=options.get("offline", False),
        token=options.get("token"), cache_dir=options.get("cache_dir"), weights=options.get("load_weights", True),
    )  # fmt: skip


def choose_backend(preset: str | os.PathLike[str], task: str, options: LoadOptions) -> Backend:
    """The backend that is asked for, with the user's own attention function if there is one.

    task: the name of what is loaded, which "fastest" is measured with.
    """
    name = options.get("backend")
    if name == FASTEST:
        from modelhub.bench.compare import fastest

        name = fastest(preset, task=task, **options)
    return custom.with_attention(get_backend(name, options.get("device")), options.get("attention"))
