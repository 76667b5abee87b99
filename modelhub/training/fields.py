"""What a batch is made of, as an objective names it: arrays, their shapes and what fills rows that are missing."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from modelhub.errors import DataError


@dataclass(frozen=True)
class Field:
    """One array of a batch.

    forms: the shapes that it may have, each with its dtype, such as {"rows time": "int32"}. The first dimension is
    always rows; a name that comes again, here or in another field, is of the same size.
    fill: what rows that are missing hold. required: whether every batch has it.
    """

    forms: Mapping[str, str]
    fill: float = 0
    required: bool = True


def rows_of(batch: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(batch.values())))


def check(fields: Mapping[str, Field], batch: Mapping[str, np.ndarray], where: str = "the batch") -> None:
    """Raise DataError, naming the array, for one that is missing or unknown, or whose shape or type is another."""
    missing = [name for name, field in fields.items() if field.required and name not in batch]
    unknown = [name for name in batch if name not in fields]
    if missing or unknown:
        told = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
        raise DataError(f"{where} {' and '.join(told)}; this objective takes {', '.join(fields)}")
    sizes: dict[str, tuple[int, str]] = {}
    for name, array in batch.items():
        forms = {tuple(form.split()): dtype for form, dtype in fields[name].forms.items()}
        axes = next((axes for axes in forms if len(axes) == array.ndim), None)
        if axes is None or array.dtype.kind != np.dtype(forms[axes]).kind:
            wanted = " or ".join(f"({', '.join(axes)}) {dtype}" for axes, dtype in forms.items())
            raise DataError(f"{where}: {name} must be {wanted}, found {array.shape} {array.dtype}")
        for axis, size in zip(axes, array.shape, strict=True):
            before, first = sizes.setdefault(axis, (size, name))
            if before != size:
                raise DataError(f"{where}: {name} has {size} {axis} and {first} has {before}: they must be equal")


def cut(fields: Mapping[str, Field], batch: Mapping[str, np.ndarray], first: int, rows: int) -> dict[str, np.ndarray]:
    """`rows` rows from `first` on, also where the batch has fewer: shapes stay the same."""
    found = {}
    for name, array in batch.items():
        part = array[first : first + rows]
        if len(part) < rows:
            empty = ((0, rows - len(part)), *((0, 0),) * (array.ndim - 1))
            part = np.pad(part, empty, constant_values=fields[name].fill)
        found[name] = part
    return found
