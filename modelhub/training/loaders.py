"""Iterables of the user's own: their first item, and torch's workers beside the threads of other frameworks."""

import itertools
import multiprocessing
import pickle
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelhub.errors import DataError
from modelhub.training.rows import is_table

_THREADED = ("jax", "tensorflow")  # a forked process inherits their locks, and not the threads that would release them


def peek(data: Any) -> tuple[Any, Any]:
    """The first item (None if there is none to see), and the data with it put back where it was taken out."""
    if isinstance(data, str | Path | Mapping) or is_table(data) or not isinstance(data, Iterable):
        return None, data
    if isinstance(data, Sequence):
        return (data[0] if len(data) else None), data
    wanted = start_workers_safely(data)
    try:
        iterator = iter(data)
        first = next(iterator)
    except StopIteration:
        return None, []
    except (AttributeError, TypeError, RuntimeError, OSError, pickle.PicklingError) as error:
        if wanted:
            raise DataError(f"the DataLoader's workers could not be started: {error}. {wanted}") from error
        raise
    return first, Begun(data, itertools.chain([first], iterator))


def repeatable(data: Any) -> Any:
    """The same, for what is gone through more than once: a generator, which can be read once, is kept as a list."""
    return list(data) if isinstance(data, Iterator) else data


class Begun:
    """An iterable with an iterator under way, which its first reader gets: a DataLoader starts its workers once."""

    def __init__(self, data: Iterable[Any], begun: Iterator[Any]) -> None:
        self.data = data
        self._begun: Iterator[Any] | None = begun

    def __iter__(self) -> Iterator[Any]:
        begun, self._begun = self._begun, None
        return iter(self.data) if begun is None else begun


def start_workers_safely(data: Any) -> str | None:
    """Have a torch DataLoader start its workers as new processes, where forking this one could leave them waiting for a
    lock for ever: JAX and TensorFlow run threads. Returns what that asks of the user, None where nothing was changed.
    """
    chosen = getattr(data, "multiprocessing_context", data)
    if chosen is not None or not getattr(data, "num_workers", 0) or not any(name in sys.modules for name in _THREADED):
        return None
    if multiprocessing.get_context().get_start_method() != "fork":
        return None
    data.multiprocessing_context = (
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )  # fmt: skip
    return (
        "They are new processes, as forks deadlock beside the threads of JAX and TensorFlow: the dataset and the "
        'collate function must be picklable (defined in a module), and a script needs `if __name__ == "__main__":`. '
        "Or give the DataLoader num_workers=0"
    )
