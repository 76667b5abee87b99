"""`modelhub bench`."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from modelhub.cli import options
from modelhub.cli.options import option
from modelhub.errors import InputError

err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


def bench(
    preset: Annotated[str | None, typer.Argument(help="a registry name, a folder, a .gguf file or an address")] = None,
    named: Annotated[str | None, option("the same", None, "--preset")] = None,
    backends: Annotated[str | None, option("such as jax,torch (default: all that are installed)")] = None,
    train: Annotated[bool, option("also training: LoRA of rank 4; of images all weights", None, "--train")] = False,
    batch_size: Annotated[int | None, option("rows of a batch (default: 1; images: 8)")] = None,
    prompt_tokens: Annotated[int | None, option("length of the prompts (default: 128)")] = None,
    max_new_tokens: Annotated[int | None, option("length of the answers (default: 64)")] = None,
    steps: Annotated[int, option("of training that are measured, after one that is not")] = 5,
    device: options.Device = None,
    dtype: options.Dtype = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Measure each backend with a preset on this machine, in a process of its own: load time, speed, memory."""
    from modelhub.bench import compare as benches

    if (preset is None) == (named is None):
        raise InputError("give one preset: modelhub bench NAME, or modelhub bench --preset NAME")
    with benches.progress() as show:
        report = benches.bench(
            preset or named or "", backends=None if backends is None else [b.strip() for b in backends.split(",")],
            train=train, batch_size=batch_size, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens,
            steps=steps, device=device, dtype=dtype, offline=offline, show=show,
        )  # fmt: skip
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    elif any(row.load_seconds for row in report.rows):
        _print(report)
    for error, names in report.failures.items():
        err.print(f"{', '.join(names)} failed: {error}")
    if report.fastest is None:
        raise typer.Exit(1)


def _print(report: Any) -> None:
    first, unit = ("first\ntoken s", "tokens") if report.unit == "tokens" else ("first\nbatch s", "images")
    work = report.workload
    length = f", prompts of {work.prompt_tokens} tokens, answers of {work.max_new_tokens}" if unit == "tokens" else ""
    gpus = f", {', '.join(report.machine['gpus'])}" if report.machine["gpus"] else ""
    err.print(
        f"{report.preset} on {report.machine['cpu']}, {report.machine['cores']} cores{gpus}; "
        f"batches of {work.batch_size}{length}"
    )
    # Two tables: one would be too wide for most terminals.
    speed = {
        "load s": "load_seconds", "with\nimports": "load_seconds_with_imports", first: "first_seconds",
        "later\nones": "first_seconds_warm", f"{unit}/s": "per_second", "peak MB": "peak_memory",
    }  # fmt: skip
    training = {"step s": "train_step_seconds", "samples/s": "train_samples_per_second"}
    if unit == "tokens":
        training["tokens/s"] = "train_tokens_per_second"
    _table(report.rows, "", speed)
    if work.train_steps:
        _table(report.rows, "training", training | {"peak MB": "train_peak_memory"})


def _table(rows: list[Any], title: str, columns: dict[str, str]) -> None:
    # Narrow enough for 80 columns.
    table = Table("backend", "version", "device", *columns, title=title, title_justify="left", box=None)
    table.padding = (0, 1, 0, 0)
    for column in table.columns[3:]:
        column.justify = "right"
    for row in rows:
        figures = [_figure(name, getattr(row, name)) for name in columns.values()]
        version = (row.version or "-").partition("+")[0]
        table.add_row(row.backend, version, row.device or "-", *figures)
    Console().print(table)


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name.endswith("memory"):
        return f"{value / 1e6:,.0f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
