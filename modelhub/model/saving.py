"""A model's config and weights into a folder, for transformers, vLLM and `from_preset`."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from modelhub.core import custom, leaves
from modelhub.hub.files import write_json
from modelhub.hub.model_folder import write_tensors
from modelhub.model.source import ATTENTION, LAYERS
from modelhub.progress import bar

log = logging.getLogger("modelhub")


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

        write_tensors(folder, shapes, read, max_shard_size, digests)


def _own_pieces(backbone: Any, architectures: list[str]) -> dict[str, Any]:
    """What config.json says of the user's own layers and attention; a warning where they are needed elsewhere.

    Other tools get architectures that they do not know: with their own they would compute something else.
    """
    attention = custom.attention_name(backbone.xp)
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
