"""Whether a file holds the model that it was written from: opened again, and compared part by part.

The weights are compared tensor by tensor, so that nothing is in memory twice.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from modelhub.core.tree import flatten, listed
from modelhub.errors import CheckpointError, ModelhubError
from modelhub.families.naming import KEEP
from modelhub.hub.preset import Preset
from modelhub.model.source import Source, open_preset
from modelhub.processing.tokenizer import Tokenizer

# Names of one function; the ones that GGUF and transformers 5 spell otherwise.
_SAME_ACTIVATION = ({"gelu_pytorch_tanh", "gelu_new", "gelu_fast"}, {"silu", "swish"}, {"gelu", "gelu_python"})
_NOT_COMPARED = {"extra", "model_type"}  # what does not change the maths; GGUF calls Mistral a Llama
# Spaces, marks, digits, other scripts and what is spelled like a special token.
_TEXTS = (
    "Hello  world", " a\n\n\nb\t", "It's 3.14, don't you think?", "naïve café 漢字 🚀", "x" + " " * 20 + "y", "<b></s>",
)  # fmt: skip
# Relative to the value, from rounding it once; a value may have been moved by 1 before that (Gemma's norms).
_ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_SMALLEST = {"float32": 1e-30, "float16": 2.0**-25, "bfloat16": 1e-30}
_STORED = {"F16": "float16", "BF16": "bfloat16", "float16": "float16", "bfloat16": "bfloat16"}
_TILE = 1 << 18  # elements
# GGUF's blocks: elements that share a scale, and what rounding can make of the largest of them. Q8_0: half a step, and
# the rounding of the steps themselves to float16. The others, whose scales are those with the least squared error, so
# that the largest may be cut off: two steps.
_BLOCKS = {
    "Q8_0": (32, 0.57 / 127), "Q4_0": (32, 2 / 8), "Q4_1": (32, 4 / 15), "Q5_0": (32, 2 / 16), "Q5_1": (32, 4 / 31),
    "Q4_K": (256, 4 / 15), "Q5_K": (256, 4 / 31), "Q6_K": (256, 2 / 32),
}  # fmt: skip


def check_written(path: Path, backbone: Any, tokenizer: Tokenizer | None, dtype: str, shown_as: Path) -> None:
    """Raise CheckpointError unless `path`, a folder or a GGUF file, holds the model, an active adapter merged in.

    dtype: of the matrices in it, or one of gguf_writer's that are quantised. shown_as: what to call it.
    """
    problems: list[str] = []
    try:
        with closing(open_preset(Preset(shown_as.name, path, None, shown_as.as_uri()))) as source:
            problems += _configs(source.config, backbone.plain_config())
            if tokenizer is not None:
                problems += _tokenizers(source.tokenizer(), tokenizer, _texts(source))
            problems += _weights(source, backbone, dtype)
    except ModelhubError as error:
        problems.append(str(error))
    if problems:
        raise CheckpointError(
            f"{shown_as} was written, read again, and is not what was to be written:\n{listed(problems)}\nWhat was "
            "there before is as it was. Is the disk sound? If so, modelhub is at fault: please report it"
        )


def _configs(found: Any, wanted: Any) -> Iterator[str]:
    for name, value in vars(wanted).items():
        if name not in _NOT_COMPARED and not _same(getattr(found, name), value):
            yield f"config: {name} is {getattr(found, name)!r:.80}, not {value!r:.80}"


def _same(x: Any, y: Any) -> bool:
    if dataclasses.is_dataclass(x) and dataclasses.is_dataclass(y):
        return type(x) is type(y) and all(_same(value, getattr(y, name)) for name, value in vars(x).items())
    if isinstance(x, str) and isinstance(y, str):
        return x == y or any({x, y} <= group for group in _SAME_ACTIVATION)
    if isinstance(x, list | tuple) and isinstance(y, list | tuple):
        return len(x) == len(y) and all(map(_same, x, y))
    if isinstance(x, float) or isinstance(y, float):  # GGUF keeps float32
        return x is not None and y is not None and math.isclose(x, y, rel_tol=1e-5)
    return bool(x == y)


def _texts(source: Source) -> list[str]:
    """What both tokenizers must give the same ids.

    llama.cpp has one rule for tokenizers that put a space before a text: before a space too, and behind each added
    token. transformers has another.
    """
    if not source.metadata.get("tokenizer.ggml.add_space_prefix"):
        return [*_TEXTS]
    return [text for text in _TEXTS if not text[0].isspace() and not {"<", "\n"} & {*text}]


def _tokenizers(found: Tokenizer, wanted: Tokenizer, texts: list[str]) -> Iterator[str]:
    for text in texts:
        ids, right = found.encode(text), wanted.encode(text)
        if ids != right:
            yield f"tokenizer: {text!r} has the ids {ids!r:.80}, not {right!r:.80}"
    if found.chat_template != wanted.chat_template:
        yield "tokenizer: the chat template is another one"


def _weights(source: Source, backbone: Any, dtype: str) -> Iterator[str]:
    get, left = backbone.plain_param(), dict.fromkeys(backbone.plain_names())
    shapes = {name: tuple(spec.shape) for name, spec in flatten(source.model).items()}
    checkpoint = source.checkpoint()
    for theirs, info in checkpoint.tensors.items():
        if (renamed := source.names.to_ours(theirs)) is None:
            continue
        ours, via = renamed
        if ours not in left:
            yield f"weights: {theirs} is one too many"
            continue
        del left[ours]
        stored = _STORED.get(info.dtype, "float32") if via is KEEP else "float32"
        found = via.to_ours(checkpoint.read(theirs, stored))
        if found.shape != shapes.get(ours):
            yield f"weights: {ours} has the shape {found.shape}, not {shapes.get(ours)}"
            continue
        wanted = backbone.xp.get(get(ours))
        kind = dtype if dtype in _ROUNDING else info.dtype
        if not _largest_excess(found, wanted, kind) <= 1.0:  # NaN must not pass
            yield f"weights: {ours} differs by more than {dtype} rounds"
    for name in left:
        yield f"weights: {name} is missing"


def _largest_excess(found: np.ndarray, wanted: np.ndarray, dtype: str) -> float:
    """The largest difference, as a share of what rounding can make; some rows at a time, which stay in the cache."""
    found, wanted = (x.reshape(-1, x.shape[-1]) for x in (found, wanted))
    step = max(1, _TILE // found.shape[1])
    parts = (slice(at, at + step) for at in range(0, len(found), step))
    as_floats = ((found[part].astype(np.float32), wanted[part].astype(np.float32)) for part in parts)
    return float(np.max([_excess(x, y, dtype) for x, y in as_floats]))


def _excess(found: np.ndarray, wanted: np.ndarray, dtype: str) -> float:
    difference, allowed = np.abs(found - wanted), np.abs(wanted)
    if dtype in _BLOCKS:
        size, share = _BLOCKS[dtype]
        difference = difference.reshape(-1, size).max(1)
        allowed = allowed.reshape(-1, size).max(1) * share + _SMALLEST["float16"] * 127
    else:
        dtype = dtype if dtype in _ROUNDING else _STORED.get(dtype, "float32")
        allowed = allowed * (2 * _ROUNDING[dtype]) + (_SMALLEST[dtype] + 4 * _ROUNDING["float32"])
    return float((difference / allowed).max())
