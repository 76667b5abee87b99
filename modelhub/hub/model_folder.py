"""A model's folder in Hugging Face's format, as it is written: whole or not at all, tensors in shards, its card."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from modelhub.errors import CheckpointError, InputError
from modelhub.hub.checkpoint import nbytes
from modelhub.hub.files import GENERATED, MODEL_FILES, rewriting, save_tensors, write_json

MAX_SHARD_SIZE = 5_000_000_000
_CARD = "README.md"


def strangers(target: Path) -> list[str]:
    """What is in the folder that saving a model there would remove and does not write."""
    if not target.is_dir():
        return []
    return sorted(path.name for path in target.iterdir() if not MODEL_FILES.fullmatch(path.name))


@contextmanager
def model_folder(target: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `target` at the end of the block; `target` is whole or as it was.

    Raises InputError for a file, CheckpointError for a folder with other things in it, and when writing fails.
    """
    if target.is_file():
        raise InputError(f"{target} is a file; give a new or empty folder")
    if found := strangers(target):
        raise CheckpointError(
            f"{target} holds {', '.join(found[:5])}, which saving a model there would remove; give a new or empty "
            f"folder"
        )
    with rewriting(target) as work:
        yield work


def write_tensors(
    folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], str]], read: Callable[[str], np.ndarray],
    max_shard_size: int, digests: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """{name: (shape, dtype)}, one after the other, in files of at most max_shard_size bytes, with an index if there are
    several. digests: gets the sha256 of each file."""
    sizes = {name: nbytes(*spec) for name, spec in shapes.items()}
    shards = list(_shards(sizes, max_shard_size))
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        index = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = {"total_size": sum(sizes.values())}
        write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": index})
    for file, names in zip(files, shards, strict=True):
        digest = None if digests is None else hashlib.sha256()
        save_tensors({name: shapes[name] for name in names}, read, folder / file, {"format": "pt"}, digest)
        if digests is not None and digest is not None:
            digests[file] = digest.hexdigest()


def _shards(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    shard: list[str] = []
    held = 0
    for name, size in sizes.items():
        if shard and held + size > limit:
            yield shard
            shard, held = [], 0
        shard.append(name)
        held += size
    yield shard


def write_card(folder: Path, card: str, old: Path) -> None:
    """The README; one that the user has written into the folder `old` goes before ours."""
    kept = old / _CARD
    if GENERATED not in card:
        card = f"{card.rstrip()}\n\n{GENERATED}\n"
    text = card.encode()
    if kept.is_file() and GENERATED.encode() not in (own := kept.read_bytes()):
        text = own  # in whatever encoding
    (folder / _CARD).write_bytes(text)
