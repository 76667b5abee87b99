"""Bars for what takes over two seconds: on a terminal, and in notebooks; nothing anywhere else."""

import sys
from collections.abc import Iterable
from typing import Any


def bar(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """tqdm's bar on standard error, or a notebook's own; it goes away at the end.

    options: tqdm's, such as total, desc and unit.
    """
    from tqdm import tqdm

    options = {"delay": 2, "leave": False, "disable": None} | options
    if options["disable"] or not in_notebook():
        return tqdm(items, **options)
    options = {key: value for key, value in options.items() if key not in ("disable", "file", "dynamic_ncols")}
    try:
        from tqdm.notebook import tqdm_notebook

        return tqdm_notebook(items, **options)
    except ImportError:  # no ipywidgets: a line of text, on the stream that has no red background
        return tqdm(items, file=sys.stdout, **options)


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel (notebooks, Colab), which has no terminal."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)
