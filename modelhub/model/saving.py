"""A model as a Hugging Face folder, for transformers, vLLM and `from_preset`."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from modelhub.core import custom, leaves
from modelhub.errors import CheckpointError, InputError
from modelhub.hub.files import GENERATED, MODEL_FILES, replacing, save_tensors
from modelhub.model.source import ATTENTION, LAYERS
from modelhub.progress import bar

log = logging.getLogger("modelhub")

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
    try:
        with replacing(target) as work:
            yield work
    except OSError as error:
        raise CheckpointError(f"{target} could not be written: {error}. What was there before is as it was") from error


def write_backbone(
    folder: Path, backbone: Any, dtype: str | None, max_shard_size: int, digests: dict[str, str] | None = None
) -> None:
    """config.json and the weights, tensor by tensor, in shards of at most max_shard_size bytes.

    dtype: of the weights in the files; None: as they are. An active adapter is merged into the weights that are
    written, not into those of the model. digests: gets the sha256 of each file of weights.
    """
    xp, dtype, get = backbone.xp, dtype or backbone.dtype, backbone.plain_param()
    config = backbone.plain_config().to_hf() | {"dtype": dtype, "torch_dtype": dtype}
    write_json(folder / "config.json", config | _own_pieces(backbone, config.get("architectures") or []))
    shapes = {name: (tuple(backbone.params[name].shape), dtype) for name in backbone.plain_names()}
    sizes = {name: leaves.size(shape, dtype) for name, (shape, _) in shapes.items()}
    with bar(total=sum(sizes.values()), desc=f"writing {folder.name}", unit="B", unit_scale=True) as shown:

        def read(name: str) -> np.ndarray:
            shown.update(sizes[name])
            return xp.get(xp.cast(xp.values(get(name)), dtype))

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


def own_attention(backbone: Any) -> str | None:
    """The name of the user's attention function, if there is one and it was registered."""
    return custom.name_of(custom.own_attention(backbone.xp))


def _own_pieces(backbone: Any, architectures: list[str]) -> dict[str, Any]:
    """What config.json says of the user's own layers and attention; a warning where they are needed elsewhere.

    Other tools get architectures that they do not know: with their own they would compute something else.
    """
    attention = own_attention(backbone)
    found: dict[str, Any] = {}
    if custom.own_attention(backbone.xp) is not None and attention is None:
        log.warning(
            "the attention function that the model was given is not saved: give it again as attention= when it is "
            "loaded, or register it, and its name is saved"
        )
    if backbone.layers:
        found[LAYERS] = [list(pair) for pair in backbone.layers.items()]  # JSON's objects have no order
    if attention:
        found[ATTENTION] = attention
    if found:
        own = ", ".join(sorted({*backbone.layers.values(), *filter(None, [attention])}))
        log.warning("modelhub loads this model where its own pieces (%s) are registered; transformers cannot", own)
        found["architectures"] = [f"Modelhub{name}" for name in architectures]
    return found


def write_card(folder: Path, card: str, old: Path) -> None:
    """The README; one that the user has written into the folder `old` goes before ours."""
    kept = old / _CARD
    if GENERATED not in card:
        card = f"{card.rstrip()}\n\n{GENERATED}\n"
    text = card.encode()
    if kept.is_file() and GENERATED.encode() not in (own := kept.read_bytes()):
        text = own  # in whatever encoding
    (folder / _CARD).write_bytes(text)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
