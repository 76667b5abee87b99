"""Models as pure JAX functions."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modelhub.core import custom
from modelhub.core.backends.base import Array
from modelhub.core.backends.jax import JaxBackend
from modelhub.core.tree import Params, bind, flatten
from modelhub.errors import InputError
from modelhub.interop.pieces import piece_of


def to_jax(x: Any) -> tuple[Params, Callable[..., Any]]:
    """See modelhub.to_jax."""
    piece = piece_of(x, "jax")
    skeleton, forward = piece.skeleton, piece.forward
    xp = custom.moved(piece.xp, JaxBackend(None))
    names = list(flatten(skeleton))

    def bound(params: Mapping[str, Array]) -> Any:
        if missing := [name for name in names if name not in params]:
            raise InputError(
                f"{len(missing)} of the model's {len(names)} parameters are not among those given, the first "
                f"{missing[0]}; to train some of them, call fn({{**params, **trained}}, ...)"
            )
        return bind(skeleton, {n: jnp.asarray(x) if isinstance(x := params[n], np.ndarray) else x for n in names})

    def run(params: Mapping[str, Array], first: Array, rank: int, dropout_rng: Array | None, *more: Any) -> Array:
        first = jnp.asarray(first)
        if first.ndim != rank:
            wanted = "pixel_values must be (batch, channels, height, width)" if rank == 4 else "input_ids (batch, time)"
            raise InputError(f"{wanted}, got shape {first.shape}; under vmap add the batch axis: x[None]")
        working = copy.copy(xp)  # not xp.for_training, which decides what is kept for the backward pass
        if dropout_rng is not None:
            bits = jax.random.bits(dropout_rng, first.shape[:1], "uint32")
            working.dropout_keys = jax.lax.bitcast_convert_type(bits, jnp.int32)
        more = tuple(None if x is None else jnp.asarray(x) for x in more)
        return forward(working, bound(params), first, *more)

    def text(
        params: Mapping[str, Array], input_ids: Array, attention_mask: Array | None = None,
        position_ids: Array | None = None, *, dropout_rng: Array | None = None,
    ) -> Array:  # fmt: skip
        return run(params, input_ids, 2, dropout_rng, attention_mask, position_ids)

    def image(params: Mapping[str, Array], pixel_values: Array, *, dropout_rng: Array | None = None) -> Array:
        return run(params, pixel_values, 4, dropout_rng)

    def module(params: Mapping[str, Array], *inputs: Any) -> Any:
        return forward(xp, bound(params), *inputs)

    params = dict(piece.owned())  # they may be donated
    if piece.kind is None:
        return params, module
    return params, image if piece.reads_images else text
