"""`modelhub publish`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from modelhub.cli import options
from modelhub.cli.options import option
from modelhub.cli.presets import in_bytes
from modelhub.errors import InputError

out = Console()
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)

CARD = "Model card"


def publish(
    source: Annotated[str, typer.Argument(metavar="FOLDER|PRESET", help="a model, or the folder of an adapter")],
    address: Annotated[
        str, typer.Argument(help="hf://owner/name, kaggle://owner/model/framework/variation or file:///folder/name")
    ],
    preset: Annotated[str | None, option("the base model of the adapter in FOLDER")] = None,
    public: Annotated[bool, option("let everybody read it (default: private, where the hub can)", None, "--public")] = (
        False
    ),
    adapter_only: Annotated[bool, option("send the adapter, not the model with it merged in")] = False,
    revision: Annotated[str | None, option("a branch of the repository, or what follows @ in a folder's name")] = None,
    message: Annotated[str | None, option("of the commit, or the version's notes")] = None,
    licence: Annotated[
        str | None, option("as the Hub spells it: apache-2.0, gemma (default: the base's)", CARD)
    ] = None,
    base_model: Annotated[str | None, option("owner/name on the Hub, where it is not known", CARD)] = None,
    from_scratch: Annotated[bool, option("say that there is no base model", CARD, "--from-scratch")] = False,
    dtype: Annotated[str | None, option("float32, bfloat16 or float16 (default: as the files are)")] = None,
    dry_run: Annotated[bool, option("say what would be sent, and stop")] = False,
    backend: options.Backend = None,
    offline: options.Offline = False,
) -> None:
    """Check a model or an adapter and send it, with its card, to a hub; after a failure, the same command again."""
    from modelhub.cli.finetune import kind_of, load
    from modelhub.hub.publish import Plan, check_address

    check_address(address, revision)  # a mistake there should not cost the time that loading a model takes
    adapter = _adapter(source)
    if adapter and preset is None:
        raise InputError(f"{source} holds an adapter; give the model it belongs to: --preset {adapter}")
    if preset is not None and not adapter:
        raise InputError(f"--preset is for an adapter's folder, and {source} is none; leave it out")
    given = {} if backend is None else {"backend": backend}
    name = preset or source
    task = load(name, given, offline=offline, adapter=source if adapter else None, kind=kind_of(name, offline)[0])
    done = task.publish(
        address, private=not public, adapter_only=adapter_only, revision=revision, message=message, licence=licence,
        dry_run=dry_run, base_model=base_model, from_scratch=from_scratch, dtype=dtype,
    )  # fmt: skip
    for remark in done.remarks:
        err.print(remark)
    if isinstance(done, Plan):
        _show(done)
        return
    if done.unchanged:
        err.print("nothing has changed: nothing was sent")
    else:
        err.print(f"sent {in_bytes(done.bytes_sent)} in {len(done.sent)} files: {', '.join(done.sent)}")
    if done.url:
        err.print(done.url)
    print(done.address)


def _adapter(source: str) -> str | None:
    """What to load under the adapter, if `source` is an adapter's folder; "PRESET" where it does not say; else None."""
    from modelhub.hub.adapters import CONFIG, read_adapter
    from modelhub.hub.provenance import PRESET, is_repo_id, read_provenance

    folder = Path(source).expanduser()
    if "://" in source or not (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    base, told = read_adapter(folder).base, read_provenance(folder)
    if told is not None and told.base:
        return told.base.removeprefix(PRESET)
    if is_repo_id(base) and not Path(base).is_dir():
        return f"hf://{base}"
    return base.removeprefix(PRESET) or "PRESET"


def _show(plan: Any) -> None:
    table = Table("file", "size", "state", title=f"would be sent to {plan.address}", title_justify="left")
    table.columns[0].no_wrap = True
    table.columns[1].justify = "right"
    for change in plan.files:
        table.add_row(change.name, "" if change.state == "removed" else in_bytes(change.size), change.state)
    out.print(table)
