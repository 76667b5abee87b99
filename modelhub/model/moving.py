"""Moving a Backbone: to other backends and devices, and into and out of training loops of the user's own."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Self
from weakref import WeakValueDictionary, ref

import numpy as np
from tqdm import tqdm

from modelhub.core import custom
from modelhub.core.backends import backend_class, get_backend, of
from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Params, listed
from modelhub.errors import DeviceError, InputError
from modelhub.model.adapters import Adapters


class Movable(Adapters):
    """What a Backbone can do with the memory that its arrays are in.

    By id: _borrowed, arrays whose memory another framework's array has too, and _outside, those that are written to
    from outside.
    """

    dtype: str
    untouched: Any
    _params: Params
    _hidden: Any
    _borrowed: WeakValueDictionary[int, Array]
    _outside: WeakValueDictionary[int, Array]

    @property
    def shared(self) -> bool:
        """Whether parameters may be written to from outside: nothing made of them may be kept between calls."""
        return any(id(x) in self._outside for x in self._params.values())

    def owned(self) -> Params:
        """`params`, of which none shares its memory with another framework's array: such are copied first."""
        if any(id(x) in self._borrowed for x in self._params.values()):
            self._params = {name: self.own(x) for name, x in self._params.items()}
        return self._params

    def own(self, x: Array) -> Array:
        """x, or a copy if another framework's array has the memory of x too: what may be written to, and donated."""
        return self.xp.copy(x) if id(x) in self._borrowed else x

    def share(self, params: Params, xp: Backend | None = None, dtype: str | None = None) -> None:
        """Put arrays that will be written to from outside (torch's Parameters, TensorFlow's Variables) in the place of
        all `params`, under the same names and with the same values. A merge is final from then on.

        xp, dtype: where they are now and what they are, if their owner has moved or cast them.
        """
        self.keep_merged()  # what is trained from outside cannot be taken out of the weights again
        self.dtype = dtype or self.dtype
        identity = self.identity if self.has_adapter else None
        if xp is not None and (xp.name, xp.device) != (self.xp.name, self.xp.device):
            self.hand_over(custom.moved(self.xp, xp), params)
        self._params, self.identity, self.untouched = params, identity, None
        self._outside.update({id(x): x for x in params.values()})
        self._compile()

    def to(self, backend: str | None = None, device: str | None = None) -> Self:
        """Move the weights, all adapters and what the optimizer remembers to another backend or device; returns self.

        backend: None: the same. device: None: the same where the other backend sees it, else the best that it sees.
        The dtype stays. Where both backends use the same memory, arrays are handed over without a copy (DLPack), apart
        from those that one of them has to have otherwise, such as JAX and TensorFlow aligned to 64 bytes; else one
        after the other, so that no more than one is there twice. Arrays that were given away (`params`, or to a module
        of to_torch) keep their values whatever is trained after the move, and are not written to by it.

        Raises UnknownBackend, BackendNotInstalled, DeviceError (a device that is not there, or has too little free
        memory), ConfigError (an attention function or a layer written for the old backend alone). The model is then
        where it was.
        """
        if (xp := self.destination(backend, device)) is not None:
            self.hand_over(xp)
        return self

    def load_params(self, params: Mapping[str, Any]) -> None:
        """Take over weights from a training loop of the user's own: arrays of any framework under the names of
        `params`, all of them or those of trainable_names() alone. They are copied, in the model's dtype (an adapter's
        in float32). What the optimizer remembers of the last `fit` is dropped.

        Raises InputError, with every name and shape that does not fit, before anything is changed, and for arrays that
        are sharded over processes; MixedBackends.
        """
        owner = backend_class(of(params))
        for name, x in params.items():
            owner.check_whole(name, x)
        missing = [name for name in self.trainable_names() if name not in params]
        found = {name: tuple(x.shape) for name, x in params.items()}
        shapes = {name: tuple(x.shape) for name, x in self._params.items()}
        problems = [f"missing: {name} {shapes[name]}" for name in missing]
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
        xp, taken = self.xp, {}
        for name, x in params.items():
            holder = get_backend(owner.name, owner.device_of(x))
            cast = holder.cast(x, xp.dtype(self._params[name]))
            taken[name] = xp.copy(xp.adopt(cast, holder))
        own = self.adapter.params if self.adapter is not None and not self.merged else {}
        base = [name for name in taken if name not in own]
        if base:
            self.keep_merged()
        if self.identity is not None and not all(
            params[name] is self._params[name] or self._same(taken[name], self._params[name]) for name in base
        ):
            self.identity = None
        self._put(self._params | taken)
        self.optimizer = None

    def _same(self, x: Array, y: Array) -> bool:
        try:
            return np.array_equal(self.xp.get(x), self.xp.get(y))
        except RuntimeError:  # a loop of the user's own has donated y: nobody knows
            return False

    def destination(self, backend: str | None, device: str | None) -> Backend | None:
        """Where `to` would move the model; None: nowhere. Raises what `to` does."""
        old = self.xp
        cls = backend_class(backend or old.name)
        if device is None and (cls.name == old.name or old.device in cls.devices()):
            device = old.device
        xp = get_backend(cls.name, device)
        if (xp.name, xp.device) == (old.name, old.device):
            return None
        xp = custom.moved(old, xp)
        custom.check_backend(self.model, xp.name)
        arrays = {id(x): x for held in self._held() for x in held.values()}
        needed = sum(
            math.prod(x.shape) * np.dtype(old.dtype(x)).itemsize
            for key, x in arrays.items()
            if xp.device != old.device or key in self._outside
        )
        free = xp.free_memory()
        if free is not None and needed > free:
            raise DeviceError(
                f"the model was to move to {xp.name} on {xp.device}, where its {needed / 1e9:.2f} GB do not fit: "
                f"{free / 1e9:.2f} GB are free. Free some there, load it with a smaller dtype, or take another device"
            )
        return xp

    def _held(self) -> list[Params]:
        """Every dict of arrays that belongs to the model."""
        held = [self._params, self._replaced, *(adapter.params for adapter in self.adapters.values())]
        return held if self.optimizer is None else [*held, self.optimizer.arrays]

    def hand_over(self, xp: Backend, instead: Params | None = None) -> None:
        """Move everything to the backend xp; with `instead`, which are there already, in the place of `params`."""
        self._params = dict(self._params) if instead is None else instead  # the dict may be in the user's hands
        if (adapter := self.adapter) is not None and not self.merged:
            adapter.params = {name: self._params[name] for name in adapter.params}
        places: dict[int, list[tuple[Params, str]]] = {}
        for held in self._held():
            for name, x in held.items():
                places.setdefault(id(x), []).append((held, name))
        if instead is not None:
            places = {key: spots for key, spots in places.items() if spots[0][0] is not instead}
        self._hidden = None  # it holds on to the arrays
        moved: list[tuple[list[tuple[Params, str]], Callable[[], Array | None]]] = []
        try:
            for spots in tqdm(
                places.values(), f"moving to {xp.name}", unit="tensor", delay=2, leave=False, disable=None
            ):  # fmt: skip
                moved.append((spots, self._move(spots, self.xp, xp)))
            self.xp = xp
        except BaseException:
            for spots, outside in moved:
                if (x := outside()) is None:
                    self._move(spots, xp, self.xp)
                else:  # a module still writes to it
                    _put(spots, x)
            raise
        finally:
            self._compile()

    def _move(self, spots: list[tuple[Params, str]], old: Backend, new: Backend) -> Callable[[], Array | None]:
        """Returns what gives the array that was there, if it is still written to from outside."""
        held, name = spots[0]
        before = held[name]
        outside = id(before) in self._outside
        x = new.adopt(old.copy(before) if outside else before, old)
        if old.device == new.device and not outside:
            self._borrowed[id(x)] = x
        _put(spots, x)
        return ref(before) if outside else lambda: None

    def _put(self, params: Params) -> None:
        raise NotImplementedError

    def _compile(self) -> None:
        raise NotImplementedError


def _put(spots: list[tuple[Params, str]], x: Array) -> None:
    for held, name in spots:
        held[name] = x
