"""`modelhub convert`: from one file format to another."""

from typing import Annotated

import typer
from rich.console import Console

from modelhub.cli import options
from modelhub.cli.options import option
from modelhub.cli.presets import size_of

err = Console(stderr=True, soft_wrap=True, highlight=False)


def convert(
    source: Annotated[str, typer.Argument(help="what to convert: all that from_preset loads")],
    target: Annotated[str, typer.Argument(help="a .gguf file, or a folder for Hugging Face's format")],
    dtype: Annotated[
        str | None,
        option("GGUF: float16 (default), bfloat16, float32 or q8_0; folder: the first three (default: the source's)"),
    ] = None,
    adapter: options.Adapter = None,
    force: Annotated[bool, option("replace what is at TARGET", None, "--force")] = False,
    revision: Annotated[str | None, option("a branch, tag or commit of SOURCE on the Hub")] = None,
    offline: options.Offline = False,
) -> None:
    """Write a model in another format: a GGUF file for llama.cpp, or a Hugging Face folder. An adapter is merged."""
    from modelhub.tasks.convert import converted

    written, before = converted(
        source, target, dtype, adapter=adapter, force=force, revision=revision, offline=offline
    )  # fmt: skip
    err.print(f"{source}: {size_of(before) / 1e6:,.1f} MB; {written.name}: {size_of(written) / 1e6:,.1f} MB")
    print(written)
