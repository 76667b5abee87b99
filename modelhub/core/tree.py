"""Module trees and flat parameter dicts.

A Module is an ordinary dataclass whose fields are arrays, Modules, lists of either, or static values. Three verbs:

    abstract skeleton   a Module whose array fields hold Specs (shape, initial values); families build these
    flatten(module)     {dotted name: leaf}, the only form in which parameters cross a framework boundary
    bind(skeleton, params)   the same Module with arrays in place of the Specs

The dotted names are Hugging Face's, because the field names are.
"""

import copy
import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from modelhub.errors import CheckpointError, ConfigError

Array = Any  # an array of whichever framework the model is on
Params = dict[str, Array]


class Module:
    """Base of all layers. Subclasses are plain dataclasses; nothing is inherited but the name."""


ModuleT = TypeVar("ModuleT", bound=Module)


INITS = ("normal", "uniform", "constant", "zeros", "ones")


@dataclass(frozen=True)
class Spec:
    """Stands where an array will be: its shape and how it starts when no weights are loaded.

    init: "normal" (mean 0, standard deviation `scale`), "uniform" (from -scale to scale), "constant" (scale),
    "zeros" or "ones". Raises ConfigError for another.
    """

    shape: tuple[int, ...]
    init: str = "normal"
    scale: float = 0.02

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise ConfigError(f"init of a Spec must be one of {', '.join(INITS)}, got {self.init!r}")


def is_leaf(value: object) -> bool:
    """True for Specs and for arrays of any framework: whatever has a shape."""
    return hasattr(value, "shape")


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of a Module's fields, or of a list's items; nothing for anything else."""
    if isinstance(value, Module):
        for field in dataclasses.fields(value):  # type: ignore[arg-type]
            yield field.name, getattr(value, field.name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield str(index), item


def flatten(module: Any, prefix: str = "") -> Params:
    """{dotted name: leaf} in the order of the fields. Static values are not included."""
    if is_leaf(module):
        return {prefix: module}
    leaves: Params = {}
    for name, child in children(module):
        if is_leaf(child) or isinstance(child, (Module, list)):
            leaves |= flatten(child, f"{prefix}.{name}" if prefix else name)
    return leaves


def bind(skeleton: ModuleT, params: Mapping[str, Array], prefix: str = "") -> ModuleT:
    """The skeleton with `params` in place of its leaves. Neither argument is changed.

    Raises KeyError for a missing name; names that the skeleton lacks are ignored (see `check` for a full comparison).
    """
    return _bind(skeleton, params, prefix + "." if prefix else "")


def _bind(node: Any, params: Mapping[str, Array], prefix: str) -> Any:
    if isinstance(node, Module):
        bound = copy.copy(node)
        fields = bound.__dict__
        for name, child in fields.items():
            if is_leaf(child):
                fields[name] = params[prefix + name]
            elif isinstance(child, (Module, list)):
                fields[name] = _bind(child, params, f"{prefix}{name}.")
        return bound
    if isinstance(node, list):
        return [
            params[f"{prefix}{index}"] if is_leaf(item) else _bind(item, params, f"{prefix}{index}.")
            for index, item in enumerate(node)
        ]
    return node  # a static value in a list


def with_parts(node: Any, parts: Mapping[str, Any], prefix: str = "") -> Any:
    """The Module with others at the dotted names in `parts`; what is changed is copied."""
    if prefix in parts:
        return parts[prefix]
    if isinstance(node, list):
        return [with_parts(item, parts, f"{prefix}.{index}") for index, item in enumerate(node)]
    if not isinstance(node, Module):
        return node
    changed = copy.copy(node)
    for name, child in changed.__dict__.items():
        if isinstance(child, (Module, list)):
            changed.__dict__[name] = with_parts(child, parts, f"{prefix}.{name}" if prefix else name)
    return changed


def check(skeleton: Module, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare the skeleton's names and shapes with those found; every mismatch goes into one CheckpointError."""
    wanted = {name: spec.shape for name, spec in flatten(skeleton).items()}
    problems = [f"missing: {name} {wanted[name]}" for name in wanted if name not in found]
    problems += [f"unexpected: {name} {tuple(found[name])}" for name in found if name not in wanted]
    problems += [
        f"wrong shape: {name} should be {shape} by the config, the file has {tuple(found[name])}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != shape
    ]
    if problems:
        raise CheckpointError(
            f"{where}: config and weights disagree in {len(problems)} places:\n{listed(problems)}\n"
            "The config and the weight files must come from the same checkpoint."
        )


def listed(problems: list[str]) -> str:
    """One a line, for an error: the first 20, and how many more there are."""
    more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
    return "\n".join(f"  {line}" for line in problems[:20] + more)


def initial_value(name: str, spec: Spec, seed: int) -> np.ndarray:
    """float32 start value drawn by a numpy generator seeded with (seed, name).

    Equal on every backend and independent of the order in which parameters are made.
    """
    if spec.init == "zeros":
        return np.zeros(spec.shape, np.float32)
    if spec.init == "ones":
        return np.ones(spec.shape, np.float32)
    if spec.init == "constant":
        return np.full(spec.shape, spec.scale, np.float32)
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if spec.init == "uniform":
        values = generator.random(spec.shape, dtype=np.float32) * 2 - 1
    else:
        values = generator.standard_normal(spec.shape, dtype=np.float32)
    values *= np.float32(spec.scale)
    return values
