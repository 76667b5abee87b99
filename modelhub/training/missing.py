"""What tables have in place of a value that is missing, by one rule for all readers and at every depth of a record."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def is_missing(value: Any) -> bool:
    """None, NaN, and pandas' NA and NaT; of arrays and lists False."""
    if value is None:
        return True
    if isinstance(value, float | np.floating):
        return bool(value != value)
    if isinstance(value, np.datetime64 | np.timedelta64):
        return bool(np.isnat(value))
    return type(value).__name__ in ("NAType", "NaTType")  # pandas need not be there


def present(value: Any) -> Any:
    """A record as plain data, without what is missing in it.

    Arrow gives every record of a column all keys that one of them has, filled with null, and so do tables made of it:
    a key without a value is as good as none. In lists, whose places mean something, a missing value is None. numpy's
    arrays and numbers, which pandas has inside its cells, become lists and numbers.
    """
    if isinstance(value, Mapping):
        return {key: present(item) for key, item in value.items() if not is_missing(item)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "OUSiufb":
        value = value.tolist()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list | tuple):
        return [present(item) for item in value]
    return None if is_missing(value) else value
