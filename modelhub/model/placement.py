"""Where weights are: moving them to other backends and devices, into and out of training loops of the user's own."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any
from weakref import ref

import numpy as np

from modelhub.core import custom, leaves
from modelhub.core.backends import backend_class, get_backend, of
from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Params, listed
from modelhub.errors import DeviceError, InputError
from modelhub.model.loading import check_dtype
from modelhub.model.weights import PARAMS, REPLACED, Change, Weights
from modelhub.progress import bar

Places = list[tuple[Params, str]]  # dicts that hold an array, and under which names


def own(weights: Weights, x: Array) -> Array:
    """x, or a copy if another framework's array has the memory of x too: what may be written to, and donated."""
    return leaves.mapped(weights.xp.copy, x) if id(x) in weights.borrowed else x


def owned(weights: Weights) -> Params:
    """`params`, of which none shares its memory with another framework's array: such are copied first."""
    if any(id(x) in weights.borrowed for x in weights.params.values()):
        weights.change(Change.MOVED, {PARAMS: {name: own(weights, x) for name, x in weights.params.items()}})
    return weights.params


def share(weights: Weights, params: Params, xp: Backend | None = None, dtype: str | None = None) -> None:
    """Put arrays that will be written to from outside (torch's Parameters, TensorFlow's Variables) in the place of
    all `params`, under the same names and with the same values.

    xp, dtype: where they are now and what they are, if their owner has moved or cast them.
    """
    if xp is not None and (xp.name, xp.device) != (weights.xp.name, weights.xp.device):
        hand_over(weights, custom.moved(weights.xp, xp), params)
    weights.change(Change.SHARED, {PARAMS: params}, dtype=dtype)
    weights.outside.update({id(x): x for x in params.values()})


def take(weights: Weights, params: Mapping[str, Any], needed: Collection[str]) -> Params:
    """Copies of arrays of any framework, for the place of parameters of the same names, in the model's dtypes.

    needed: the names that must be there. Raises InputError, with every name and shape that does not fit.
    """
    owner, xp, current = backend_class(of(params)), weights.xp, weights.params
    for name, x in params.items():
        owner.check_whole(name, x)
    found = {name: tuple(x.shape) for name, x in params.items()}
    shapes = {name: tuple(x.shape) for name, x in current.items()}
    problems = [f"missing: {name} {shapes[name]}" for name in needed if name not in params]
    problems += [f"unexpected: {name} {shape}" for name, shape in found.items() if name not in shapes]
    problems += [
        f"wrong shape: {name} is {shape}, the model's is {shapes[name]}"
        for name, shape in found.items()
        if shapes.get(name, shape) != shape
    ]
    if problems:
        raise InputError(
            f"load_params: {len(problems)} of the arrays do not fit the model:\n{listed(problems)}\n"
            "Give the names and shapes of `params`, all of them or at least those of trainable_names()."
        )
    taken: Params = {}
    for name, x in params.items():
        holder = get_backend(owner.name, owner.device_of(leaves.arrays_of(x)[0]))
        x = leaves.cast(holder, x, leaves.dtype_of(current[name]))
        taken[name] = leaves.mapped(functools.partial(_taken, xp, holder), x)
    return taken


def _taken(xp: Backend, holder: Backend, x: Array) -> Array:
    return xp.copy(xp.adopt(x, holder))


def same(xp: Backend, x: Array, y: Array) -> bool:
    """Whether two arrays hold the same numbers."""
    try:
        return np.array_equal(xp.get(x), xp.get(y))
    except RuntimeError:  # a loop of the user's own has donated y: nobody knows
        return False


def to(
    weights: Weights, backend: str | None, device: str | None, dtype: Any, own: Collection[str],
    check: Callable[[str], None] = lambda name: None,
) -> None:  # fmt: skip
    """See Backbone.to. own: the active adapter's parameters, which stay in float32. check: may refuse the backend."""
    found = check_dtype(dtype)
    xp = destination(weights, backend, device, found)
    if xp is not None:
        check(xp.name)
    if found not in (None, weights.dtype):
        cast(weights, found, own)
    if xp is not None:
        hand_over(weights, xp)


def cast(weights: Weights, dtype: str, own: Collection[str]) -> None:
    """Give all parameters but `own` another dtype."""
    made: dict[int, Array] = {}  # an array in several places stays one

    def other(x: Array) -> Array:
        if id(x) not in made:
            mine = leaves.mapped(weights.xp.stop_gradient, x)  # it may be a torch Parameter
            made[id(x)] = leaves.cast(weights.xp, mine, dtype)
        return made[id(x)]

    params = {name: x if name in own else other(x) for name, x in weights.params.items()}
    replaced = {name: other(x) for name, x in weights.stores.get(REPLACED, {}).items()}
    weights.change(Change.CAST, {PARAMS: params, REPLACED: replaced or None}, xp=weights.xp, dtype=dtype)


def destination(weights: Weights, backend: str | None, device: str | None, dtype: str | None = None) -> Backend | None:
    """Where `to` would move the model; None: nowhere. Raises what `to` does."""
    old = weights.xp
    cls = backend_class(backend or old.name)
    if device is None and (cls.name == old.name or old.device in cls.devices()):
        device = old.device
    xp = get_backend(cls.name, device)
    if (xp.name, xp.device) == (old.name, old.device):
        return None
    xp = custom.moved(old, xp)
    custom.check_backend(weights.layout.skeleton, xp.name)
    arrays = {id(x): x for store in weights.stores.values() for x in store.values()}
    needed = sum(
        leaves.nbytes(x) for key, x in arrays.items() if xp.device != old.device or key in weights.outside
    )  # fmt: skip
    if dtype is not None:  # nearly all are in the model's
        needed = needed * leaves.size((), dtype) // leaves.size((), weights.dtype)
    free = xp.free_memory()
    if free is not None and needed > free:
        raise DeviceError(
            f"the model was to move to {xp.name} on {xp.device}, where its {needed / 1e9:.2f} GB do not fit: "
            f"{free / 1e9:.2f} GB are free. Free some there, load it with a smaller dtype, or take another device"
        )
    return xp


def hand_over(weights: Weights, xp: Backend, instead: Params | None = None) -> None:
    """Move everything to the backend xp, one array after the other, so that no more than one is there twice.

    instead: parameters that are there already, for the place of `params`.
    """
    old = weights.xp
    # The dicts may be in the user's hands; those that are worked on hold arrays of both backends until the end.
    stores = {name: dict(store) for name, store in weights.stores.items()}
    if instead is not None:
        stores[PARAMS] = instead
    places: dict[int, Places] = {}
    for store in stores.values():
        for name, x in store.items():
            places.setdefault(id(x), []).append((store, name))
    if instead is not None:
        places = {key: spots for key, spots in places.items() if spots[0][0] is not instead}
    with weights.moving:
        # Without programs, so that old arrays are let go of one by one.
        weights.change(Change.MOVED, stores, xp=old)
        moved: list[tuple[Places, Callable[[], Array | None]]] = []
        try:
            for spots in bar(places.values(), desc=f"moving to {xp.name}", unit="tensor"):
                moved.append((spots, _move(weights, spots, old, xp)))
        except BaseException:
            for spots, outside in moved:
                if (x := outside()) is None:
                    _move(weights, spots, xp, old)
                else:  # a module still writes to it
                    _put(spots, x)
            raise
        weights.change(Change.MOVED, xp=xp)


def _move(weights: Weights, spots: Places, old: Backend, new: Backend) -> Callable[[], Array | None]:
    """Returns what gives the array that was there, if it is still written to from outside."""
    held, name = spots[0]
    before = held[name]
    outside = id(before) in weights.outside
    x = leaves.mapped(lambda part: new.adopt(old.copy(part) if outside else part, old), before)
    if old.device == new.device and not outside:
        weights.borrowed[id(x)] = x
    _put(spots, x)
    return ref(before) if outside else lambda: None


def _put(spots: Places, x: Array) -> None:
    for held, name in spots:
        held[name] = x
