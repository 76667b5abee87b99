"""`modelhub conformance`."""

import functools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from modelhub.cli import options
from modelhub.cli.options import option

err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


def conformance(
    families: Annotated[str | None, option("some of them, e.g. gemma3,llama (default: all)")] = None,
    backends: Annotated[str | None, option("some of them, e.g. jax,torch (default: all that are installed)")] = None,
    dtypes: Annotated[str | None, option("float32 or bfloat16 (default: both)")] = None,
    output: Annotated[Path | None, option("a file for the table (default: standard output)")] = None,
    as_json: options.Json = False,
) -> None:
    """Measure how far each family on each backend is from its transformers class: logits, loss, gradients."""
    from tqdm import tqdm

    from modelhub.errors import InputError
    from modelhub.interop.conformance import conformance as measure

    if output is not None and (output.is_dir() or not output.parent.is_dir()):  # now, and not after two minutes
        what = f"{output} is a folder" if output.is_dir() else f"there is no folder {output.parent}"
        raise InputError(f"{output} cannot be written: {what}; give a file")
    bar = functools.partial(tqdm, desc="comparing with transformers", unit="model", dynamic_ncols=True)
    chosen = [[x.strip() for x in names.split(",")] if names else None for names in (families, backends, dtypes)]
    report = measure(chosen[0], chosen[1], chosen[2], progress=bar)
    text = report.as_json() + "\n" if as_json else report.as_markdown()
    if output is None:
        print(text, end="")
    else:
        output.write_text(text, encoding="utf-8")
        print(output)
    for figure in report.failures:
        err.print(str(figure))
    if report.failures:
        raise typer.Exit(1)
