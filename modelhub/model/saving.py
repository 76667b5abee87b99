"""A model's config and weights into a folder, for transformers, vLLM and `from_preset`."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from modelhub.core import custom, leaves, lora
from modelhub.core.lora import HEAD_WEIGHT, TABLE_WEIGHT
from modelhub.core.quantized import Tiles
from modelhub.errors import ConfigError
from modelhub.hub.files import write_json
from modelhub.hub.model_folder import write_tensors
from modelhub.model.source import ATTENTION, LAYERS, QUANTIZATION, TIED
from modelhub.progress import bar
from modelhub.quantizing.compressed import Compressed

log = logging.getLogger("modelhub")


def write_backbone(
    folder: Path, backbone: Any, dtype: str | None, max_shard_size: int, digests: dict[str, str] | None = None,
    compressed: Compressed | None = None,
) -> None:  # fmt: skip
    """config.json and the weights, tensor by tensor, in shards of at most max_shard_size bytes.

    dtype: of the floats in the files; None: as they are. An active adapter is merged into the weights that are written,
    not into those of the model. digests: gets the sha256 of each file of weights. compressed: how quantised weights are
    written, see `compressed_of`; None: as floats.
    """
    xp, dtype, get = backbone.xp, dtype or backbone.dtype, backbone.plain_param()
    config = backbone.plain_config().to_hf() | {"dtype": dtype, "torch_dtype": dtype}
    names = backbone.plain_names()
    shapes = {name: (tuple(backbone.params[name].shape), dtype) for name in names}
    if compressed is not None:
        told = compressed.config
        if compressed.is_tied:
            config["tie_word_embeddings"], told[TIED] = False, True
        config[QUANTIZATION] = told
        shapes = {name: spec for name, spec in shapes.items() if name not in compressed.packed} | compressed.tensors
    write_json(folder / "config.json", config | _own_pieces(backbone, config.get("architectures") or []))
    sizes = {name: leaves.size(shape, kind) for name, (shape, kind) in shapes.items()}
    with bar(total=sum(sizes.values()), desc=f"writing {folder.name}", unit="B", unit_scale=True) as shown:

        def read(name: str) -> np.ndarray:
            shown.update(sizes[name])
            if compressed is not None and name in compressed.tensors:
                return compressed.read(name)
            return xp.get(xp.cast(xp.values(get(name)), dtype))

        write_tensors(folder, shapes, read, max_shard_size, digests)


def compressed_of(backbone: Any) -> Compressed | None:
    """How the model's quantised weights are written, if it has any.

    Raises ConfigError for some that the format cannot hold, and for an adapter on them.
    """
    packed = {name: x for name in backbone.plain_names() if isinstance(x := backbone.params[name], Tiles)}
    if not packed:
        return None
    if adapted := packed.keys() & lora.folding(backbone.xp, backbone.model, backbone.params).keys():
        raise ConfigError(
            f"an adapter is active on {len(adapted)} quantised matrices, and both together are no codes any more. "
            "save_adapter() writes the adapter alone; dequantize=True merges it into floats; with set_adapter(None) "
            "the quantised weights are saved without it"
        )
    linears = list(lora.linears(backbone.weights.layout.plain))
    tables = {name: x for name, x in packed.items() if name.removesuffix(".weight") not in linears}
    # No tool reads quantised tables: they are floats in files. A head that is the table is written quantised, apart.
    tied = TABLE_WEIGHT in tables and getattr(backbone.plain_config(), "tie_word_embeddings", False)
    if tables:
        size = sum(leaves.size(x.shape, backbone.dtype) for x in tables.values())
        log.warning(
            "%s: written as %.0f MB of floats%s, since transformers and vLLM have no quantised tables",
            ", ".join(tables), size / 1e6, " and once more quantised, as the head" if tied else "",
        )  # fmt: skip
    packed = {name: x for name, x in packed.items() if name not in tables}
    return Compressed(backbone.xp, packed | ({HEAD_WEIGHT: tables[TABLE_WEIGHT]} if tied else {}), linears, tied)


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
