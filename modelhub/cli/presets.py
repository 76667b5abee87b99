"""The commands about presets as such: list, info, pull, register."""

import json
import os
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from modelhub.cli import options
from modelhub.cli.options import option

err = Console(stderr=True, soft_wrap=True, highlight=False)

_DTYPES = "float32", "bfloat16"  # that weights are mostly kept in


def list_(
    words: Annotated[
        list[str] | None, typer.Argument(help="only those with these in name, family or description")
    ] = None,
    family: Annotated[str | None, option("only this family")] = None,
    task: Annotated[str | None, option("only this task")] = None,
    max_params: Annotated[float | None, option("at most this many parameters, e.g. 3e9")] = None,
    cached: Annotated[bool, option("only those that load without a network", None, "--cached")] = False,
    as_json: options.Json = False,
) -> None:
    """List the presets that can be loaded by name."""
    from modelhub.hub.registry import list_presets

    cards = list_presets(family=family, task=task, max_params=max_params)
    wanted = [word.lower() for word in words or ()]
    cards = [card for card in cards if all(word in _described(card) for word in wanted)]
    if cached:
        cards = [card for card in cards if _cached(card)]
    cards.sort(key=lambda card: (card.family, card.parameters, card.name))
    if as_json:
        print(json.dumps([_of_card(card) for card in cards], indent=2))
        return
    rows = [
        (card.family, f"  {card.name}", card.task, _count(card.parameters), "yes" if _cached(card) else "",
         f"{card.licence} *" if card.accept_licence else card.licence)
        for card in cards
    ]  # fmt: skip
    if not rows:
        err.print("no preset is like that; all of them: modelhub list", style="dim")
        return
    # No table that folds or cuts lines where the terminal is narrow: a line can be found with grep.
    titles = ("", "preset", "task", "size", "cached", "licence *")
    name, task_, size, here = (max(len(row[i]) for row in [titles, *rows]) for i in range(1, 5))
    for group, members in groupby([titles, *rows], key=lambda row: row[0]):
        if group:
            print(group)
        for _, *cells, licence in members:
            print(f"{cells[0]:<{name}}  {cells[1]:<{task_}}  {cells[2]:>{size}}  {cells[3]:<{here}}  {licence}")
    if any(card.accept_licence for card in cards):
        err.print("* must be accepted once: `modelhub info NAME` says where", style="dim")


def info(preset: options.Preset, as_json: options.Json = False) -> None:
    """Show what is known of a preset: licence, size, memory needed, where it comes from. Uses no network."""
    about = _about(preset)
    if as_json:
        print(json.dumps(about, indent=2))
        return
    for key, value in about.items():
        if value not in (None, []):
            label = key.replace("_", " ")
            for line in _text(key, value).splitlines():
                print(f"{label:<22}  {line}")
                label = ""
    if about["path"] is None:
        err.print(f"not in the cache; to fetch it: modelhub pull {preset}", style="dim", markup=False)


def pull(
    preset: options.Preset,
    revision: Annotated[str | None, option("branch, tag or commit on the hub")] = None,
    as_json: options.Json = False,
) -> None:
    """Fetch a preset into the cache, so that it loads without a network ever after."""
    from modelhub.hub.preset import resolve

    try:
        path = resolve(preset, revision=revision).path
    except KeyboardInterrupt:
        err.print("stopped; the same command fetches what is missing")
        raise
    if as_json:
        print(json.dumps({"name": preset, "revision": revision, "path": str(path), "bytes_on_disk": size_of(path)}))
    else:
        print(path)


def register(
    card: Annotated[Path | None, typer.Argument(help="a card, NAME.toml; NAME is then a preset")] = None,
    force: Annotated[bool, option("replace a card of your own", None, "--force")] = False,
    remove: Annotated[str | None, option("take this card of your own out again", None, "--remove")] = None,
) -> None:
    """Add a card of your own to the registry, or remove it; `modelhub list` then shows it."""
    from modelhub.errors import InputError
    from modelhub.families import family_names
    from modelhub.hub import registry

    if (card is None) == (remove is None):
        raise InputError("give either the card to add, NAME.toml, or --remove NAME")
    if card is not None:
        print(registry.register(card, family_names(), force))
    elif remove is not None:
        print(registry.unregister(remove))


def _about(name: str) -> dict[str, Any]:
    """What `info` shows: of a name, a folder, a .gguf file or an address."""
    from modelhub.errors import DownloadError
    from modelhub.hub.preset import as_address, resolve
    from modelhub.hub.registry import find_card

    try:
        preset = resolve(name, offline=True)
        card, path = preset.card, preset.path
    except DownloadError:  # it is not in the cache
        card, path = None if "://" in as_address(name) else find_card(name), None
    about: dict[str, Any] = {"name": name} if card is None else _of_card(card)
    about |= {"path": path and str(path), "bytes_on_disk": path and size_of(path)}
    if card is not None:
        about["memory_for_weights"] = _memory(card.parameters)
    if path is not None:
        about |= _of_files(preset)
    return about


def _of_card(card: Any) -> dict[str, Any]:
    sources = [
        {"address": address, "verified": source.verified, "cached": _has(source)}
        for address, source in zip(card.addresses, card.sources, strict=True)
    ]
    pages = [page for source in sources if (page := _page(source["address"]))] if card.accept_licence else []
    return {
        "name": card.name,
        "family": card.family,
        "task": card.task,
        "description": card.description,
        "licence": card.licence,
        "accept_licence": card.accept_licence,
        "accept_at": pages,
        "parameters": card.parameters,
        "sources": sources,
    }


def _of_files(preset: Any) -> dict[str, Any]:
    """What config.json or the GGUF's metadata tell; no weights are read."""
    from contextlib import closing

    from modelhub.core import leaves
    from modelhub.core.tree import flatten
    from modelhub.kinds import IMAGES
    from modelhub.model.source import open_preset

    with closing(open_preset(preset)) as source:
        parameters = sum(map(leaves.count, flatten(source.model).values()))
        about = {
            "model_type": source.config.model_type,
            "parameters": parameters,
            "memory_for_weights": _memory(parameters),
        }
        if source.model.reads == IMAGES:
            return about | {"image_size": source.config.image_size, "classes": source.config.num_labels}
        cache = sum(map(leaves.count, flatten(source.model.new_cache(1, 1000)).values()))
    return about | {"context": source.config.max_position_embeddings, "memory_for_1000_tokens": _memory(cache)}


def _described(card: Any) -> str:
    return f"{card.name} {card.family} {card.description}".lower()


def _cached(card: Any) -> bool:
    return any(_has(source) for source in card.sources)


def _has(source: Any) -> bool:
    from modelhub.hub.sources import Options

    return source.find(Options()) is not None


def _page(address: str) -> str | None:
    """Where a hub lets people accept the licence of an address."""
    scheme, _, rest = address.partition("://")
    repository = "/".join(rest.partition("@")[0].split("/")[:2])
    if scheme == "hf":
        return f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{repository}"
    return f"https://www.kaggle.com/models/{repository}" if scheme == "kaggle" else None


def _memory(numbers: int) -> dict[str, int]:
    from modelhub.core import leaves

    return {dtype: leaves.size((numbers,), dtype) for dtype in _DTYPES}


def size_of(path: Path) -> int:
    """Bytes of a file, or of all that a folder holds."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _text(key: str, value: Any) -> str:
    if key == "sources":
        return "\n".join(
            f"{source['address']} ({'verified' if source['verified'] else 'not verified'}"
            f"{', cached' if source['cached'] else ''})"
            for source in value
        )
    if key == "accept_licence":
        return "must be accepted once" if value else "need not be accepted anywhere"
    if isinstance(value, dict):
        return ", ".join(f"{in_bytes(size)} in {dtype}" for dtype, size in value.items())
    if isinstance(value, list):
        return "\n".join(value)
    if key == "bytes_on_disk":
        return in_bytes(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def in_bytes(size: int) -> str:
    """A number of bytes, for people."""
    if size >= 1e9:
        return f"{size / 1e9:,.2f} GB"
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def _count(parameters: int) -> str:
    if parameters < 0.9995e6:
        return f"{parameters / 1e3:.0f} k"
    return f"{parameters / 1e9:.1f} B" if parameters >= 0.9995e9 else f"{parameters / 1e6:.0f} M"
