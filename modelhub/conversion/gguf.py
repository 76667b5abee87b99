"""A model into a GGUF file: the names, values and metadata that llama.cpp knows."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from modelhub.conversion.gguf_blocks import encode
from modelhub.families import family_of
from modelhub.families.naming import KEEP
from modelhub.hub import gguf_writer
from modelhub.hub.gguf_settings import write_origin, write_settings
from modelhub.processing.tokenizer import Tokenizer
from modelhub.tasks.causal_lm import CausalLM

log = logging.getLogger("modelhub")


def gguf_metadata(config: Any, tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """And tensors that are no parameters."""
    metadata, extra = config.to_gguf()
    return metadata | tokenizer.to_gguf(config.vocab_size), extra


def write_gguf(
    lm: CausalLM, tokenizer: Tokenizer, target: Path, dtype: str, check: Callable[[Path], None]
) -> None:  # fmt: skip
    config = lm.backbone.plain_config()
    metadata, extra = gguf_metadata(config, tokenizer)
    arch = metadata["general.architecture"]
    metadata |= {"general.type": "model", "general.name": target.stem}
    if (context := metadata[f"{arch}.context_length"]) < config.max_position_embeddings:
        log.warning(
            "llama.cpp knows no sliding window for this model: the file says that its context is the window, %d tokens",
            context,
        )
    listed = lm.generation_config.get("eos_token_id")
    ends = [end for end in listed if end in lm.stop_ids] if isinstance(listed, list) else []
    ends += sorted(lm.stop_ids.difference(ends))
    settings, lost = write_settings(lm.generation_config, metadata, ends, next(iter(lm._end_of_turn), None))
    metadata |= settings
    origin = lm.backbone.provenance
    metadata |= write_origin(origin.licence or origin.base_licence, origin.base_model)
    if texts := sorted(lm.backbone.licence_files):
        log.warning("%s go with every copy of the model: put them beside %s", " and ".join(texts), target.name)
    if lost:
        log.warning("%s does not say, since GGUF files have no place for it: %s", target.name, "; ".join(lost))
    names, param = family_of(config.model_type).names("gguf", config), lm.backbone.plain_param()
    ours = {names.to_theirs(name)[0]: name for name in lm.backbone.plain_names()}

    def read(theirs: str) -> np.ndarray:
        if theirs in extra:
            return extra[theirs]
        x, via = lm.backbone.xp.get(param(ours[theirs])), names.to_theirs(ours[theirs])[1]
        return x if via is KEEP else via.to_theirs(np.array(x, np.float32))  # a copy, which via may write to

    shapes = {theirs: x.shape for theirs, x in extra.items()}
    shapes |= {theirs: lm.params[name].shape for theirs, name in ours.items()}
    gguf_writer.write_gguf(target, metadata, shapes, read, dtype, check, encode)
