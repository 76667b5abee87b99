"""`modelhub quantize`: a model with weights of fewer bits, as a folder."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from modelhub.cli import options
from modelhub.cli.options import option
from modelhub.cli.presets import size_of

err = Console(stderr=True, soft_wrap=True, highlight=False)


def quantize(
    source: Annotated[str, typer.Argument(help="what to quantise: all that from_preset loads")],
    target: Annotated[str, typer.Argument(help="a new folder")],
    scheme: Annotated[str, option("int4 (default), int8, or *=int4,lm_head=int8")] = "int4",
    calibration: Annotated[
        Path | None, option("a text file, by blank lines in pieces: errors that such texts show count more")
    ] = None,
    revision: Annotated[str | None, option("a branch, tag or commit of SOURCE on the Hub")] = None,
    offline: options.Offline = False,
) -> None:
    """Write a model with weights of 4 or 8 bits, as a folder in compressed-tensors' format; GGUF files are what
    `convert` writes.
    """
    from modelhub.cli.finetune import kind_of, task_class
    from modelhub.core.leaves import nbytes
    from modelhub.core.quantized import Plan
    from modelhub.errors import InputError
    from modelhub.hub import files

    # Mistakes should not cost the time that loading a model takes.
    if Path(target).suffix == ".gguf":
        raise InputError(
            f"{target}: modelhub convert {source} {target} --dtype q4_0 (or q4_k_m, ...) writes a GGUF file"
        )
    Plan.of(scheme)
    files.check_new(files.place(Path(target)))
    texts = None
    if calibration is not None:
        texts = [part.strip() for part in calibration.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    task = task_class(kind_of(source, offline, revision)[0])
    loading = {"backend": "numpy", "revision": revision, "offline": offline}
    if texts is None:
        model = task.from_preset(source, quantize=scheme, **loading)
    else:
        model = task.from_preset(source, **loading)
        model.quantize(scheme, texts)
    model.save_to_preset(target)
    inside = sum(map(nbytes, model.params.values())) / 1e6
    err.print(f"{target}: {size_of(Path(target)) / 1e6:,.1f} MB; {inside:,.1f} MB in memory with quantize='keep'")
    print(target)
