"""`modelhub cache`: what is on the disk, and taking it off again."""

import json
import sys
import time
from dataclasses import asdict
from typing import Annotated

import typer

from modelhub.cli import options
from modelhub.cli.options import App, option
from modelhub.cli.presets import in_bytes

app = App(help="List, check and remove what is in the cache.", invoke_without_command=True)
Names = Annotated[list[str], typer.Argument(help="names of presets, or addresses as `modelhub cache` lists them")]


@app.callback()
def list_(context: typer.Context, as_json: options.Json = False) -> None:
    """List what is in modelhub's cache and in the Hugging Face client's, with sizes."""
    if context.invoked_subcommand is not None:
        return
    from modelhub.hub.cache import entries

    found = entries()
    if as_json:
        print(json.dumps([asdict(entry) | {"path": str(entry.path)} for entry in found], indent=2))
        return
    width = max((len(entry.address) for entry in found), default=0)
    for entry in found:  # no table: it would cut addresses, which are to be copied
        day = time.strftime("%Y-%m-%d", time.localtime(entry.last_used))
        print(f"{in_bytes(entry.size):>10}  {day}  {entry.address:<{width}}  {', '.join(entry.presets)}".rstrip())
    print(f"{in_bytes(sum(entry.size for entry in found)):>10}  in all")


@app.command()
def remove(names: Names, yes: Annotated[bool, option("do not ask", None, "--yes", "-y")] = False) -> None:
    """Remove presets from the cache; a repository of the Hugging Face Hub goes with all its revisions."""
    from modelhub.hub import cache

    for entry in cache.select(names):
        print(f"{in_bytes(entry.size):>10}  {entry.address}  {entry.path}", file=sys.stderr)
    if not yes:
        typer.confirm("Remove this?", abort=True, err=True)
    print(f"{in_bytes(cache.remove(*names))} freed")


app.command("rm", hidden=True)(remove)


@app.command()
def verify(names: Annotated[list[str] | None, typer.Argument(help="as for remove; none: all")] = None) -> None:
    """Read all files again and compare their checksums; the exit status is 1 where one is damaged."""
    from modelhub.hub import cache

    damaged = False
    for entry in cache.select(names) if names else cache.entries():
        wrong = cache.verify(entry)
        damaged |= bool(wrong)
        state = "nothing to check" if wrong is None else f"damaged: {', '.join(wrong)}" if wrong else "ok"
        print(f"{entry.address}: {state}")
        if wrong:
            print(f"To replace it: modelhub cache remove {entry.address}, then pull it again", file=sys.stderr)
    raise typer.Exit(int(damaged))
