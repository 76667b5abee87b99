"""`modelhub convert`: from one file format to another."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from modelhub.cli import options
from modelhub.cli.options import option
from modelhub.cli.presets import size_of

err = Console(stderr=True, soft_wrap=True, highlight=False)


def convert(
    source: Annotated[str, typer.Argument(help="what to convert: all that from_preset loads")],
    target: Annotated[
        str, typer.Argument(help="a .gguf, .onnx or .tflite file, or a folder for Hugging Face's format")
    ],
    dtype: Annotated[
        str | None,
        option(
            "GGUF: float16 (default), bfloat16, float32, q8_0, q6_k, q5_k_m, q4_k_m, q4_1 or q4_0; folder: the first "
            "three (default: the source's); "
            "ONNX: float32 (default) or float16; LiteRT: float32"
        ),
    ] = None,
    adapter: options.Adapter = None,
    force: Annotated[bool, option("replace what is at TARGET", None, "--force")] = False,
    revision: Annotated[str | None, option("a branch, tag or commit of SOURCE on the Hub")] = None,
    offline: options.Offline = False,
) -> None:
    """Write a model in another format: a GGUF file for llama.cpp, an ONNX or LiteRT file of its forward pass, or a
    Hugging Face folder. An adapter is merged.
    """
    from modelhub.conversion import WAYS_OUT, check_name, convert_files

    if Path(target).suffix.lower() in WAYS_OUT:
        file = _forward_pass(source, Path(target), dtype, adapter, force, revision, offline)
        err.print(f"{file.name}: {size_of(file) / 1e6:,.1f} MB")
        print(file)
        return
    check_name(Path(target))
    written, before = convert_files(source, target, dtype, adapter, force, {"revision": revision, "offline": offline})
    err.print(f"{source}: {size_of(before) / 1e6:,.1f} MB; {written.name}: {size_of(written) / 1e6:,.1f} MB")
    print(written)


def _forward_pass(
    source: str, target: Path, dtype: str | None, adapter: str | None, force: bool, revision: str | None, offline: bool
) -> Path:  # fmt: skip
    import modelhub
    from modelhub.cli.finetune import kind_of, task_class
    from modelhub.conversion import WAYS_OUT
    from modelhub.errors import InputError
    from modelhub.hub import files
    from modelhub.interop.pieces import check_installed

    way_out, dtypes = WAYS_OUT[target.suffix.lower()]
    # Mistakes should not cost the time that loading a model takes.
    if dtype not in (None, *dtypes):
        raise InputError(f"dtype must be {' or '.join(dtypes)} for a {target.suffix} file, got {dtype!r}")
    if force:
        raise InputError(
            f"{target}: ONNX and LiteRT files replace none that is there; remove it, and leave out --force"
        )
    files.check_new(files.place(target))
    check_installed(way_out)
    task = task_class(kind_of(source, offline, revision)[0])
    loading = {"dtype": dtype or "float32", "revision": revision, "offline": offline}
    model = task.from_preset(source, backend="numpy", **loading)
    if adapter is not None:
        model.load_adapter(adapter, offline=offline)
        model.merge_lora()
    written: Path = getattr(modelhub, way_out)(model, target)
    return written
