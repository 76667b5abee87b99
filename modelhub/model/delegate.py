"""Methods and attributes that are a part's, under the same name, with the same signature and the same words."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


def delegate(part: str, method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A method that calls this one of `self.PART`, a dotted name."""

    @hands_on(method)
    def call(self: Any, *args: P.args, **named: P.kwargs) -> R:
        return method(_at(self, part), *args, **named)

    return call


def hands_on(method: Callable) -> Callable[[F], F]:
    """For a function that hands its arguments on to `method`: has its signature, and what it says of wrong ones."""

    def decorate(function: F) -> F:
        doc = function.__doc__
        functools.update_wrapper(function, method)
        function.__doc__ = doc or method.__doc__
        function.hands_on = True  # type: ignore[attr-defined]
        return function

    return decorate


def attribute(path: str, doc: str = "") -> Any:
    """A property that reads `self.PATH`, a dotted name."""

    return property(lambda self: _at(self, path), doc=doc or None)


def _at(owner: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), owner)
