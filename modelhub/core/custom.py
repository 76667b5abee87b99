"""The user's own pieces, known by name: layers, attention functions, losses, samplers, families.

Written once with `xp` a piece works on every backend; written for one framework it works there, and elsewhere an error
says so. What is registered lasts as long as the process: nothing is written anywhere but the names, into config.json.
"""

import dataclasses
import fnmatch
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from modelhub.core.backends import backend_class
from modelhub.core.backends.base import Array, Backend
from modelhub.core.leaves import dtype_of
from modelhub.core.nn import Linear
from modelhub.core.tree import Module, Params, Spec, bind, children, flatten, with_parts
from modelhub.errors import ConfigError, ModelhubError
from modelhub.habits import explained

FAMILY = ("Config", "Model", "names")  # what a family has
_LIKE = {
    "layer": "a Module",
    "attention": "a function (xp, q, k, v, mask, scale)",
    "loss": "a function (xp, logits, labels)",
    "sampler": "a function (xp, logits, uniform)",
    "family": f"something with {', '.join(FAMILY)}",
}
_CALLS: dict[str, tuple[str, ...]] = {  # what a function gets after xp; a sampler without xp only the first
    "attention": ("q", "k", "v", "mask"),  # and scale, by its name
    "loss": ("logits", "labels"),
    "sampler": ("logits", "uniform"),
}
T = TypeVar("T")


@dataclass(frozen=True)
class Registered:
    kind: str
    name: str
    value: Any
    backend: str | None  # the one that it is for; None: for all

    def require(self, backend: str) -> None:
        if self.backend not in (None, backend):
            raise ConfigError(
                f"the {self.kind} {self.name!r} was registered for {self.backend} alone, and this model is on, or on "
                f"its way to, {backend}: use it with backend={self.backend!r}, or write it with xp, for all backends"
            )


_registered: list[Registered] = []  # the last of a name counts; earlier ones may still be in use


@explained
def register(kind: str, name: str, backend: str | None = None) -> Callable[[T], T]:
    """A decorator that makes a piece of the user's own known as `name`. The piece stays as it is.

    kind: "layer": a dataclass and a Module, with a classmethod replacing(cls, old) -> its skeleton for the place of
            `old`, and a __call__(self, xp, ...) that takes and returns what the old one's does: for
            from_preset(layers={pattern: name}).
        "attention": fn(xp, q, k, v, mask, scale=scale), or without xp: for from_preset(attention=name).
        "loss": fn(xp, logits, labels), or without xp: for compile(loss=name).
        "sampler": fn(xp, logits, uniform), or fn(logits): for generate(sampler=name).
            Without xp these are for the framework that the model is on: it does not move to another one with them.
        "family": a module, or a class, with Config, Model and names, as modelhub/families/llama.py has them; name: the
            model_type of its config.json.
    backend: the one framework that it is written for; None: all of them.

    Raises ConfigError for what is no such piece, and for a name that is taken: the same definition, run again as in
    notebooks, takes the place of the one before. UnknownBackend, BackendNotInstalled.
    """
    if kind not in _LIKE:
        raise ConfigError(f"kind must be one of {', '.join(_LIKE)}, got {kind!r}")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"the name of a {kind} must be a text, got {name!r}")
    if backend is not None:
        backend = backend_class(backend).name

    def keep(value: T) -> T:
        if problem := _problem(kind, value):
            raise ConfigError(f"the {kind} {name!r}: {problem}")
        if (found := _last(kind, name)) is not None and _place(found.value) != _place(value):
            raise ConfigError(
                f"there is a {kind} {name!r} already, {'.'.join(map(str, _place(found.value)))}; take another name"
            )
        _registered.append(Registered(kind, name, value, backend))
        return value

    return keep


def _problem(kind: str, value: Any) -> str | None:
    if kind == "family":
        missing = [part for part in FAMILY if not hasattr(value, part)]
        return f"it lacks {', '.join(missing)}; a family has what modelhub/families/llama.py has" if missing else None
    if kind != "layer":
        return None if callable(value) else f"expected {_LIKE[kind]}, got {value!r}"
    if not (isinstance(value, type) and issubclass(value, Module)):
        return f"expected a class that inherits from modelhub.nn.Module, got {value!r}"
    fields = vars(value).get("__annotations__")
    if not dataclasses.is_dataclass(value) or (fields and "__dataclass_fields__" not in vars(value)):
        return "a Module is a dataclass: put @dataclass below @modelhub.register, directly above the class"
    if not callable(getattr(value, "replacing", None)):
        return (
            "it has no replacing: add a classmethod replacing(cls, old), which returns its skeleton in place of `old`"
        )
    return None if "__call__" in dir(value) else "it has no __call__(self, xp, x)"


def _place(value: Any) -> tuple[Any, ...]:
    """Where it is defined; the same for a definition that is run again."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    return (getattr(value, "__module__", ""), name) if name else (type(value).__name__, id(value))


def _last(kind: str, name: str) -> Registered | None:
    return next((r for r in reversed(_registered) if (r.kind, r.name) == (kind, name)), None)


def names(kind: str) -> list[str]:
    """Those that are registered."""
    return list(dict.fromkeys(r.name for r in _registered if r.kind == kind))


def find(kind: str, name: str, backend: str | None = None) -> Any:
    """What was registered. Raises ConfigError for a name that nobody knows, and for a piece of another backend."""
    if (found := _last(kind, name)) is None:
        known = ", ".join(map(repr, names(kind))) or "none"
        raise ConfigError(
            f'there is no {kind} {name!r}; registered: {known}. Run the code with @modelhub.register("{kind}", '
            f"{name!r}) above {_LIKE[kind]} first"
        )
    if backend is not None:
        found.require(backend)
    return found.value


def given(kind: str, piece: Any, backend: str) -> Callable:
    """The function that `piece`, the name of a registered one or a function itself, means.

    Raises ConfigError, also for one that does not take what it is going to get.
    """
    if isinstance(piece, str):
        piece = find(kind, piece, backend)
    elif not callable(piece):
        raise ConfigError(f"{kind} must be {_LIKE[kind]} or the name of a registered one, got {piece!r}")
    elif (found := _registration(piece)) is not None:
        found.require(backend)
    if kind in _CALLS:
        _check_call(kind, piece)
    return piece


def carried(kind: str, piece: Any, old: str, new: str) -> Callable:
    """The function that `piece` means, for a model that goes from the backend `old` to `new`.

    Raises ConfigError for one that is, or may be, for the old one's framework alone.
    """
    function = given(kind, piece, new)
    found = _registration(function)
    if new != old and not takes_xp(function) and (found is None or found.backend is None):
        raise ConfigError(
            f"the {kind} function {_called(function)} was given for {old}, and the model is on its way to {new}. "
            f"Write it as fn(xp, {', '.join(_CALLS[kind])}{', scale' * (kind == 'attention')}) for all backends, or "
            f"{'call compile()' if kind == 'loss' else f'load the model on {new}'} with another one"
        )
    return function


def name_of(function: Any) -> str | None:
    """The name that it was registered under."""
    found = _registration(function)
    return None if found is None else found.name


def attention_name(xp: Backend) -> str | None:
    """That of the user's attention function, if there is one and it was registered."""
    return name_of(own_attention(xp))


def _registration(piece: Any) -> Registered | None:
    return next((r for r in reversed(_registered) if r.value is piece), None)


def _check_call(kind: str, function: Callable) -> None:
    first = ("xp",) if takes_xp(function) else ()
    args = _CALLS[kind] if first or kind != "sampler" else _CALLS[kind][:1]
    named = {"scale": 1.0} if kind == "attention" else {}
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # see takes_xp
        return
    try:
        signature.bind(*first, *args, **named)
    except TypeError as error:
        raise ConfigError(
            f"the {kind} function {_called(function)}{signature} cannot be called as fn("
            f"{', '.join([*first, *args, *(f'{name}={name}' for name in named)])}), as it is going to be: {error}. It "
            f"must be {_LIKE[kind]}, its first parameter called xp, or the same without xp for one framework"
            f"{', fn(logits)' * (kind == 'sampler')}"
        ) from None


def takes_xp(function: Callable) -> bool:
    """Whether it is written once for all backends: its first parameter is called xp."""
    try:
        return next(iter(inspect.signature(function).parameters), "") == "xp"
    except (TypeError, ValueError):  # of some functions in C, such as torch's, nothing is known
        return False


def loss(piece: Any, xp: Backend) -> Callable[[Array, Array], Array] | None:
    """(logits, labels) -> losses, of what `compile` was given; without xp it gets labels as its framework's own do."""
    if piece is None:
        return None
    function = given("loss", piece, xp.name)
    if takes_xp(function):
        return functools.partial(function, xp)
    return lambda logits, labels: function(logits, xp.native_labels(labels))


# --- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """The user's attention function on a backend; see Backend.with_attention. first: (xp,) if it wants that."""

    function: Callable
    first: tuple[Backend, ...]

    def __call__(self, q: Array, k: Array, v: Array, mask: Array | None, scale: float) -> Array:
        y = self.function(*self.first, q, k, v, mask, scale=scale)
        found, wanted = _shape(y) or (), tuple(q.shape)  # None in a graph of TensorFlow's for any size
        if len(found) != len(wanted) or any(None not in (a, b) and a != b for a, b in zip(found, wanted, strict=True)):
            raise ConfigError(
                f"the attention function {_called(self.function)} returned {_told(y)} for queries of shape {wanted}; "
                f"it must return (batch, heads, time, width of a head), as the queries are"
            )
        return y


def with_attention(xp: Backend, piece: Any) -> Backend:
    """xp with the user's attention, a function or the name of a registered one; None: xp. Raises ConfigError."""
    if piece is None:
        return xp
    function = given("attention", piece, xp.name)
    return xp.with_attention(Attention(function, (xp,) if takes_xp(function) else ()))


def moved(old: Backend, new: Backend) -> Backend:
    """`new` with the user's attention that `old` has. Raises ConfigError if that is for the old framework alone."""
    function = own_attention(old)
    return new if function is None else with_attention(new, carried("attention", function, old.name, new.name))


def own_attention(xp: Backend) -> Callable | None:
    """The function that the user gave."""
    return getattr(xp.own_attention, "function", xp.own_attention)


# --- layers -----------------------------------------------------------------------------------------------------------


def means(pattern: str, name: str) -> bool:
    """Whether a pattern is for the layer `name`: its name, the end of it, or a pattern of fnmatch for all of it."""
    return f".{name}".endswith(f".{pattern}") or fnmatch.fnmatchcase(name, pattern)


def replaced(skeleton: Any, layers: Mapping[str, str], backend: str) -> tuple[Any, dict[str, Module]]:
    """The skeleton with registered layers in their places, and {dotted name of a place: what was there}.

    layers: {pattern: name of a layer}, one after the other: what a later one replaces may be an earlier one's. Where a
    pattern means a layer and what is inside it, the layer alone is replaced.

    Raises ConfigError: a pattern that means nothing, a name that nobody knows, a layer for another backend, one that
    cannot be made.
    """
    before: dict[str, Module] = {}
    for pattern, name in layers.items():
        if not (isinstance(pattern, str) and isinstance(name, str)):
            raise ConfigError(f"layers must be {{pattern: name of a registered layer}}, got {{{pattern!r}: {name!r}}}")
        cls = find("layer", name, backend)
        found = dict(_meant(skeleton, pattern))
        if not found:
            kinds = dict.fromkeys(re.sub(r"\.\d+", ".*", place) for place, _ in _modules(skeleton))
            raise ConfigError(f"layers: {pattern!r} means no layer of this model; there are {', '.join(kinds)}")
        skeleton = with_parts(skeleton, {place: _made(cls, name, place, old) for place, old in found.items()})
        before |= found
    return skeleton, before


def _modules(node: Any, prefix: str = "") -> Iterator[tuple[str, Module]]:
    for name, child in children(node):
        place = f"{prefix}.{name}" if prefix else name
        if isinstance(child, Module):
            yield place, child
        yield from _modules(child, place)


def _meant(node: Any, pattern: str) -> Iterator[tuple[str, Module]]:
    """The outermost of those that the pattern means."""
    last = ""
    for place, module in _modules(node):
        if means(pattern, place) and not (last and place.startswith(f"{last}.")):
            last = place
            yield place, module


def _made(cls: Any, name: str, place: str, old: Module) -> Module:
    try:
        new = cls.replacing(old)
    except ModelhubError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(_failed(f"{cls.__qualname__}.replacing", name, place, old, error)) from error
    if not isinstance(new, Module):
        raise ConfigError(f"{cls.__qualname__}.replacing returned {_told(new)} for {place}; it must return a Module")
    if wrong := [key for key, leaf in flatten(new).items() if not isinstance(leaf, Spec)]:
        raise ConfigError(
            f"{cls.__qualname__}.replacing put arrays into {', '.join(wrong[:5])} for {place}; put a nn.Spec(shape) "
            f"there, which says how the array starts, and is filled from the checkpoint or at random"
        )
    return new


def check_backend(skeleton: Any, backend: str) -> None:
    """Raise ConfigError if the Module, or one in it, was registered for another backend."""
    for module in (skeleton, *(module for _, module in _modules(skeleton))):
        for found in reversed(_registered):
            if found.kind == "layer" and isinstance(module, found.value):
                found.require(backend)
                break


def watched(xp: Backend, skeleton: Any, params: Params, before: Mapping[str, Module]) -> Any:
    """The bound model for one run, in which each new layer is held against what was in its place.

    The run raises ConfigError where a layer fails, and where its result has another shape or dtype than that of the
    layer it replaces, which shows late elsewhere, or never: shapes are broadcast.
    """
    places = {place: module for place, module in _modules(skeleton) if place in before}
    kinds = {(type(module), type(before[place])): place for place, module in reversed(places.items())}
    model = bind(skeleton, params)
    modules = dict(_modules(model))
    return with_parts(model, {place: _Watch(modules[place], before[place], place) for place in kinds.values()})


@dataclass
class _Watch(Module):
    layer: Any
    old: Any
    place: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["layer"], name)

    def __call__(self, xp: Backend, x: Array, *more: Any) -> Any:
        name = type(self.layer).__qualname__
        try:
            y = self.layer(xp, x, *more)
        except ModelhubError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(_failed("__call__", name, self.place, self.old, error)) from error
        dtype = next((dtype_of(leaf) for leaf in flatten(self.layer).values()), xp.dtype(x))
        if isinstance(self.old, Linear):  # a head has many weights
            wanted, wanted_dtype = (*x.shape[:-1], self.old.weight.shape[0]), xp.dtype(x)
        else:
            specs: dict[str, Any] = flatten(self.old)
            old: Any = bind(self.old, {key: xp.zeros(spec.shape, dtype) for key, spec in specs.items()})
            before = old(xp, x, *more)
            wanted, wanted_dtype = tuple(before.shape), xp.dtype(before)
        if _shape(y) != wanted or xp.dtype(y) != wanted_dtype:
            told = _told(y) + (f", {xp.dtype(y)}" if _shape(y) is not None else "")
            raise ConfigError(
                f"the layer {name} at {self.place} returned {told}, and what it replaces, {type(self.old).__name__}, "
                f"returns shape {wanted}, {wanted_dtype}: the rest of the model needs that"
            )
        return y


def _shape(y: Any) -> tuple[Any, ...] | None:
    shape = getattr(y, "shape", None)
    return None if shape is None else tuple(shape)


def _told(y: Any) -> str:
    return f"a {type(y).__name__}" if _shape(y) is None else f"shape {_shape(y)}"


def _called(function: Callable) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__


def _failed(what: str, name: str, place: str, old: Any, error: Exception) -> str:
    return (
        f"the layer {name!r} in place of {place}, a {type(old).__name__}: {what} raised {type(error).__name__}: {error}"
    )
