"""Weights: the one owner of a model's arrays, of the skeleton that they are in, and of what is known of them."""

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple, Self
from weakref import WeakValueDictionary

import numpy as np

from modelhub.core import lora
from modelhub.core.backends import of
from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Params, flatten
from modelhub.errors import ConfigError, MixedBackends
from modelhub.model.origin import RANDOM, Origin
from modelhub.quantizing.quantizer import importance_of, quantized

PARAMS, REPLACED, OPTIMIZER = "params", "replaced", "optimizer"  # stores; and adapter_store(name)

KEEP, DROP, OWN = "keep", "drop", "drop if the base weights are others"


class _Means(NamedTuple):
    """identity: what the weights are for an adapter that goes on them. untouched: the files that they are still equal
    to. optimizer: what an optimizer remembers of them."""

    identity: str
    untouched: str
    optimizer: str


class Change(Enum):
    """Why weights change. Each says what that means for what is known of them."""

    #                   identity untouched optimizer
    MOVED = _Means(KEEP, KEEP, KEEP), "to another backend or device, or into memory of their own"
    CAST = _Means(KEEP, DROP, DROP), "to another dtype"
    TOLD = _Means(KEEP, KEEP, KEEP), "nothing but what is said of them: licence, base model, names of classes"
    SWITCHED = _Means(KEEP, DROP, KEEP), "another adapter, or none; merged, or taken out again"
    SHARED = _Means(OWN, DROP, KEEP), "into arrays that somebody else may write to"
    TRAINED = _Means(OWN, DROP, KEEP), "by fit"
    OVERWRITTEN = _Means(OWN, DROP, DROP), "by the user"
    LOADED = _Means(DROP, DROP, DROP), "by load_params"
    RELOADED = _Means(KEEP, DROP, DROP), "by load_params, which left the base weights as they were"
    QUANTIZED = _Means(KEEP, DROP, DROP), "rounded to fewer bits: still the same model for an adapter"
    MERGED = _Means(DROP, DROP, DROP), "for good: the adapter is forgotten"

    @property
    def means(self) -> _Means:
        return self.value[0]


@dataclass(frozen=True)
class Layout:
    """base: the skeleton without any adapter. plain: that of the model without adapters that does the same as this one;
    it may have a head of its own. skeleton: what the parameters are in, with the active adapter unless that is merged.
    """

    base: Any
    plain: Any
    skeleton: Any
    active: str | None = None
    merged: bool = False


@dataclass(frozen=True)
class Snapshot:
    """Weights as they were at one moment, for who computes with them while somebody else trains or switches adapters.

    params: never written to, but from outside where they are shared. version: equal for equal weights.
    """

    xp: Backend
    skeleton: Any
    params: Params
    dtype: str
    version: int
    programs: dict[str, Any] = field(repr=False, compare=False)  # of all with this skeleton, on this backend

    def program(self, name: str, make: Callable[[Self], Any]) -> Any:
        """What `make` makes of the skeleton, once: it may not keep the parameters."""
        if name not in self.programs:
            self.programs[name] = make(self)
        return self.programs[name]

    def run(self, name: str, make: Callable[[Self], Callable], *inputs: Any) -> Any:
        """What the program gives for these parameters and inputs."""
        return self.program(name, make)(self.params, *inputs)


def adapter_store(name: str) -> str:
    return f"adapter/{name}"


class Weights:
    """xp: the backend that the arrays are on. dtype: of the base weights. config: the family's.

    stores: dicts of arrays by what they are for: "params" (all that the skeleton takes), "replaced" (base weights that
    the active adapter, or a merge, has put others in place of), "adapter/NAME" (of adapters that are not among params),
    "optimizer". layers: {pattern: name} of the user's own in the model; new_layers: where those stand that came into it
    as it was loaded, and not out of its files. new_heads: modules of a new head, without which an adapter is of no use.
    version: counts the changes.

    borrowed, outside, by id: arrays whose memory another framework's array has too, and those that are written to from
    outside.
    """

    def __init__(
        self, skeleton: Any, params: Params, xp: Backend, config: Any, dtype: str, origin: Origin = RANDOM,
        layers: Mapping[str, str] | None = None, new_layers: tuple[str, ...] = (),
    ):  # fmt: skip
        self.xp, self.config, self.dtype = xp, config, dtype
        self.layout, self.origin, self.version = Layout(skeleton, skeleton, skeleton), origin, 0
        self.layers, self.new_layers = dict(layers or {}), new_layers
        self.new_heads: tuple[str, ...] = ()
        self.stores: dict[str, Params] = {}
        self.borrowed: WeakValueDictionary[int, Array] = WeakValueDictionary()
        self.outside: WeakValueDictionary[int, Array] = WeakValueDictionary()
        self._programs: dict[str, Any] = {}
        self.moving = threading.RLock()  # held while arrays of two backends stand beside each other
        self.change(Change.TOLD, {PARAMS: params})

    @property
    def params(self) -> Params:
        return self.stores[PARAMS]

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is active, and not merged."""
        return self.layout.active is not None and not self.layout.merged

    @property
    def shared(self) -> bool:
        """Whether parameters may be written to from outside: nothing made of them may be kept between calls."""
        return any(id(x) in self.outside for x in self.params.values())

    def change(
        self, why: Change, stores: Mapping[str, Params | None] = MappingProxyType({}), *, layout: Layout | None = None,
        origin: Origin | None = None, xp: Backend | None = None, dtype: str | None = None, config: Any = None,
    ) -> None:  # fmt: skip
        """The one way in which anything here becomes another. stores: those to replace, None: to drop.

        Raises MixedBackends for parameters of another backend.
        """
        params, means = stores.get(PARAMS), why.means
        if params is not None and xp is None and (found := of(params)) != self.xp.name:
            raise MixedBackends(f"the model is on {self.xp.name} and the new weights are on {found}")
        origin = origin or self.origin
        others = means.identity == OWN and not self.has_adapter and params is not None
        if means.identity == DROP or (others and any(params.get(n) is not x for n, x in self.params.items())):  # type: ignore[union-attr]
            origin = dataclasses.replace(origin, identity=None)
        if means.untouched == DROP:
            origin = dataclasses.replace(origin, untouched=None)
        if means.optimizer == DROP:
            stores = {OPTIMIZER: None, **stores}
        new_skeleton = layout is not None and layout.skeleton is not self.layout.skeleton
        if new_skeleton or why is Change.SHARED or xp is not None:
            self._programs = {}  # those of before are the older snapshots'
        self.origin, self.layout, self.xp = origin, layout or self.layout, xp or self.xp
        self.dtype, self.config = dtype or self.dtype, self.config if config is None else config
        self.stores = {name: x for name, x in {**self.stores, **stores}.items() if x is not None}
        self.version += 1
        # Made here, at once: whoever asks for it meanwhile gets the one before, and never half of a change.
        self._snapshot = Snapshot(self.xp, self.layout.skeleton, self.params, self.dtype, self.version, self._programs)

    def describe(self, **known: Any) -> None:
        """Say something else of the same weights: fields of Origin."""
        self.change(Change.TOLD, origin=dataclasses.replace(self.origin, **known))

    def snapshot(self) -> Snapshot:
        """The weights as they are now; in the middle of a move, as they are after it."""
        with self.moving:
            return self._snapshot

    def quantize(self, scheme: Any, calibration: Sequence[np.ndarray] = ()) -> None:
        """Quantise the base weights in memory; an adapter, and what it has in place of some of them, stays as it is.

        scheme, calibration: see `quantized` and `importance_of` in modelhub.quantizing.quantizer.
        Raises ConfigError: for what is no scheme, and with an adapter merged into the weights.
        """
        if self.layout.merged:
            raise ConfigError(
                "an adapter is merged into the weights: call unmerge_lora() first, or load the merged model"
            )
        importance = importance_of(self.xp, self.layout.skeleton, self.params, calibration) if calibration else {}
        base = quantized(self.xp, self.base_params(), scheme, self.dtype, importance)
        replaced = {name: base[name] for name in self.stores.get(REPLACED, {})}
        params = self.params | {name: x for name, x in base.items() if name not in replaced}
        self.change(Change.QUANTIZED, {PARAMS: params, REPLACED: replaced})

    # --- the model without adapters -------------------------------------------------------------------------------

    def plain_names(self) -> list[str]:
        """The parameters of the model without adapters that does the same, in its own order."""
        return list(flatten(self.layout.plain))

    def plain_config(self) -> Any:
        """The config of that model."""
        if self.layout.plain is self.layout.base:
            return self.config
        return dataclasses.replace(self.config, tie_word_embeddings=False)

    def plain_param(self) -> Callable[[str], Array]:
        """Gives, one by one, the parameters of that model."""
        folding = lora.folding(self.xp, self.layout.skeleton, self.params)
        return lambda name: folding[name]() if name in folding else self.params[name]

    def base_params(self) -> Params:
        """What the base model had before an adapter came, or was merged."""
        replaced = self.stores.get(REPLACED, {})
        return {name: replaced.get(name, self.params.get(name)) for name in flatten(self.layout.base)}
