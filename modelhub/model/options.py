"""How a preset is loaded: the keywords of every `from_preset`, said once."""

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, TypeVar, get_type_hints

from modelhub.errors import UnknownArgument
from modelhub.hub.preset import Preset, resolve

F = TypeVar("F", bound=Callable[..., Any])


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
    quantize: "int8" or "int4": the matrices in so many bits, with a scale for each 32 columns; {pattern: scheme}, as in
        {"*": "int4", "lm_head": "int8"}, the last that means a matrix counts; "keep": what a quantised file has as it
        is. None: floats.
    strict: refuse a config.json with keys that modelhub does not know, and a checkpoint without the head that it should
        have; otherwise a warning names them.
    """

    backend: str | None
    device: str | None
    dtype: str | None
    load_weights: bool
    attention: Callable | str | None
    layers: Mapping[str, str] | None
    seed: int
    quantize: str | Mapping[str, str | None] | None
    strict: bool


_DEFAULTS = {"offline": False, "load_weights": True, "seed": 0, "strict": False}  # of all others None


def takes(options: type) -> Callable[[F], F]:
    """For a function that ends in **options: their names in its signature, and an error for any other keyword."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        hints = get_type_hints(options)
        own += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS.get(name), annotation=hint)
            for name, hint in hints.items()
        ]
        known = [p.name for p in own]

        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            if unknown := tuple(name for name in keywords if name not in known):
                text = f"{function.__name__}() got an unexpected keyword argument {unknown[0]!r}"
                raise UnknownArgument(text, unknown)
            return function(*args, **keywords)

        call.__annotations__ = {p.name: p.annotation for p in own} | {"return": signature.return_annotation}
        call.hands_on = True  # type: ignore[attr-defined]
        call.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def resolve_preset(preset: str | os.PathLike[str], options: LoadOptions) -> Preset:
    return resolve(
        os.fspath(preset), revision=options.get("revision"), offline=options.get("offline", False),
        token=options.get("token"), cache_dir=options.get("cache_dir"), weights=options.get("load_weights", True),
    )  # fmt: skip
