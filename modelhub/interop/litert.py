"""A task's forward pass as a LiteRT (TensorFlow Lite) file, for phones and other small devices."""

import os
from pathlib import Path
from typing import Any

import tensorflow as tf

from modelhub.core import leaves
from modelhub.errors import InputError
from modelhub.hub import files
from modelhub.interop.pieces import piece_for_file
from modelhub.interop.saved_model import image_signatures, text_signature
from modelhub.interop.tensorflow import variable, without_device

_LARGEST = 2**31 - 1  # bytes: the format's offsets are 32 bits wide


def to_litert(x: Any, path: str | os.PathLike[str], *, sequence_length: int = 128, batch_size: int = 1) -> Path:
    """See modelhub.to_litert."""
    target = files.place(path)
    files.check_new(target)
    piece = without_device(piece_for_file(x, "tensorflow"))
    _check_size("batch_size", batch_size)
    if not piece.reads_images:
        _check_size("sequence_length", sequence_length, piece.config.max_position_embeddings)
    size = sum(leaves.size(x.shape, "float32") for x in piece.params.values())
    if size > _LARGEST:
        raise InputError(f"a LiteRT file holds at most 2 GB; in float32 the weights are {size / 1e9:.1f} GB")
    module = tf.Module()
    params = {name: variable(name, piece.xp.cast(x, "float32"), trainable=False) for name, x in piece.params.items()}
    module.params = params  # the converter looks for the variables there
    if piece.reads_images:
        program = image_signatures(piece, params, batch_size)["serving_default"]
    else:
        program = text_signature(piece, params, batch_size, sequence_length)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([program.get_concrete_function()], module)
    data = converter.convert()
    with files.adding(target) as file:
        file.write_bytes(data)
    return target


def _check_size(name: str, value: int, largest: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise InputError(f"{name} must be a whole number from 1 to {largest}, got {value!r}")
