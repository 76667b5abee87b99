"""Leaves of params: arrays, and what stands for one array without being one.

Params hold arrays of a framework, or `Packed` leaves: codes with their scales, a part of a sharded array. Whoever wants
a leaf's shape, dtype, bytes or values asks here, or the backend (`values`, `get`, `linear`, `embedding`,
`weight_rows`), and knows nothing of what is inside. A family's Specs have shapes too, and can be counted.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

import numpy as np

from modelhub.errors import ConfigError

Array = Any
_ITEMSIZES = {"bfloat16": 2}  # numpy knows it only once ml_dtypes is imported
_kinds: list[type["Packed"]] = []
_followers: list[Callable[[type["Packed"]], None]] = []


class Packed:
    """A leaf that stands for one array and is made of several. Subclasses are frozen dataclasses, compared by identity
    (eq=False), and are known to every framework's programs as soon as they are defined.

    ARRAYS: the fields that are arrays, all of one backend; the other fields are hashable.
    scheme: what it is called, as in "int8".
    shape, dtype: of the array that it stands for.
    """

    ARRAYS: ClassVar[tuple[str, ...]]
    joins: ClassVar[bool] = False  # whether several are multiplied in one native call (Backend.linears)
    scheme: str
    shape: tuple[int, ...]
    dtype: str

    def __init_subclass__(cls) -> None:
        _kinds.append(cls)
        for tell in _followers:
            tell(cls)

    def values(self, xp: Any) -> Array:
        """The array that it stands for, whole."""
        raise NotImplementedError

    def rows(self, xp: Any, start: Array, size: int) -> Array:
        """Rows start ... start + size - 1 of a matrix, as an array; start an int or an int32 scalar array."""
        raise NotImplementedError

    def linear(self, xp: Any, x: Array, bias: Array | None) -> Array:
        """x (..., D) times the matrix (N, D), transposed, plus bias: (..., N)."""
        raise NotImplementedError

    def embedding(self, xp: Any, ids: Array) -> Array:
        """Rows of the matrix (V, D) at ids (...): (..., D)."""
        raise NotImplementedError

    def matrix(self, xp: Any, index: Array) -> "Packed":
        """Number `index` of a stack of matrices (E, N, D), index an int or an int32 scalar array: a leaf (N, D)."""
        raise NotImplementedError

    @property
    def arrays(self) -> dict[str, Array]:
        return {name: getattr(self, name) for name in self.ARRAYS}

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        return dataclasses.replace(self, **arrays)  # type: ignore[type-var]

    def taken_apart(self) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
        """Its arrays, and all that `put_together` needs besides."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return tuple(self.arrays.values()), tuple(getattr(self, f.name) for f in fields if f.name not in self.ARRAYS)

    @classmethod
    def put_together(cls, arrays: Iterable[Array], others: Iterable[Any]) -> Self:
        # Not through __init__: compilers put placeholders in the place of arrays.
        made = object.__new__(cls)
        others = iter(others)
        named = dict(zip(cls.ARRAYS, arrays, strict=True))
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            object.__setattr__(made, field.name, named[field.name] if field.name in named else next(others))
        return made

    # TensorFlow asks objects how they are made up; see tf.nest.

    def __tf_flatten__(self) -> tuple[tuple[Any, ...], tuple[Array, ...]]:
        arrays, others = self.taken_apart()
        return others, arrays

    @classmethod
    def __tf_unflatten__(cls, others: tuple[Any, ...], arrays: tuple[Array, ...]) -> Self:
        return cls.put_together(arrays, others)


def follow(tell: Callable[[type[Packed]], None]) -> None:
    """Have every kind of packed leaf told, those that are defined later too: frameworks register them."""
    for kind in _kinds:
        tell(kind)
    _followers.append(tell)


def shape_of(leaf: Any) -> tuple[int, ...]:
    """Of the array that a leaf is or stands for."""
    return tuple(leaf.shape)


def dtype_of(leaf: Any) -> str:
    """ "float32", "bfloat16", ...: of the array that a leaf is or stands for, of whichever framework."""
    dtype = leaf.dtype
    return dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")


def count(leaf: Any) -> int:
    """How many numbers a leaf stands for: what a parameter count counts."""
    return math.prod(leaf.shape)


def size(shape: Iterable[int], dtype: str) -> int:
    """Bytes of a plain array."""
    return math.prod(shape) * (_ITEMSIZES.get(dtype) or np.dtype(dtype).itemsize)


def nbytes(leaf: Any) -> int:
    """Bytes that a leaf takes."""
    return sum(size(shape_of(x), dtype_of(x)) for x in arrays_of(leaf))


def arrays_of(leaf: Any) -> tuple[Array, ...]:
    """The arrays that a leaf is made of: mostly itself."""
    return tuple(leaf.arrays.values()) if isinstance(leaf, Packed) else (leaf,)


def mapped(fn: Callable[[Array], Array], leaf: Any) -> Any:
    """The leaf with each of its arrays replaced by what fn makes of it: a copy, the same on another backend."""
    if isinstance(leaf, Packed):
        return leaf.with_arrays({name: fn(x) for name, x in leaf.arrays.items()})
    return fn(leaf)


def cast(xp: Any, leaf: Any, dtype: str) -> Any:
    """The leaf as one of dtype; a packed one stays packed and stands for another array."""
    return dataclasses.replace(leaf, dtype=dtype) if isinstance(leaf, Packed) else xp.cast(leaf, dtype)  # type: ignore[type-var]


def check_plain(params: Mapping[str, Any], what: str, instead: str) -> None:
    """Raise ConfigError, naming the first, if some of the params are packed. what: cannot be done with them."""
    if packed := {name: x for name, x in params.items() if isinstance(x, Packed)}:
        name, leaf = next(iter(packed.items()))
        raise ConfigError(
            f"{what} takes plain arrays, and {len(packed)} of the parameters are packed, the first {name} "
            f"({leaf.scheme}): {instead}"
        )
