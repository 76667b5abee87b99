"""A model as a Hugging Face folder, for transformers, vLLM and `from_preset`."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from modelhub.errors import CheckpointError
from modelhub.hub.files import replacing, save_tensors
from modelhub.processing.tokenizer import Tokenizer
from modelhub.tasks.backbone import Backbone

SHARD_BYTES = 5_000_000_000
_OURS = re.compile(
    r"config\.json|generation_config\.json|model.*\.safetensors(\.index\.json)?|best\.json|README\.md|"
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template)\.json|tokenizer\.model|"
    r"chat_template\.jinja"
)


def save_to_preset(
    folder: str | os.PathLike[str],
    backbone: Backbone,
    tokenizer: Tokenizer | None,
    generation_config: Mapping[str, Any],
    dtype: str | None = None,
) -> None:
    """Write the folder beside its place and then swap: it is whole or as it was. Raises CheckpointError.

    dtype: of the weights in the files; None: as they are. An active adapter is merged into the weights that are
    written, not into those of the model.
    """
    target = Path(folder).resolve()
    if found := strangers(target):
        raise CheckpointError(
            f"{target} holds {', '.join(found[:5])}, which saving a model there would remove; give a new or empty "
            f"folder"
        )
    dtype = dtype or backbone.dtype
    try:
        with replacing(target, keep="README.md") as work:
            _write_json(work / "config.json", backbone.config.to_hf() | {"dtype": dtype, "torch_dtype": dtype})
            if generation_config:
                _write_json(work / "generation_config.json", generation_config)
            if tokenizer is not None:
                tokenizer.save(work)
            xp, params = backbone.xp, backbone.plain_params()
            _write_weights(work, {name: xp.get(xp.cast(x, dtype)) for name, x in params.items()})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} could not be written: {error}. What was there before is as it was") from error


def strangers(target: Path) -> list[str]:
    """What is in the folder that saving a model there would remove and does not write."""
    if not target.is_dir():
        return []
    return sorted(path.name for path in target.iterdir() if not _OURS.fullmatch(path.name))


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(folder: Path, params: Mapping[str, np.ndarray]) -> None:
    shards = list(_shards(params))
    if len(shards) == 1:
        save_tensors(shards[0], folder / "model.safetensors", {"format": "pt"})
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(shard, folder / name, {"format": "pt"})
        index |= dict.fromkeys(shard, name)
    total = sum(array.nbytes for array in params.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _shards(params: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in params.items():
        if shard and size + array.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard
