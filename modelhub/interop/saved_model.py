"""A task or backbone as a SavedModel, which TensorFlow runs without modelhub."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from modelhub.core import problems
from modelhub.core.backends.base import Array
from modelhub.core.tree import Params, bind, flatten
from modelhub.errors import InputError
from modelhub.hub.files import place, replacing
from modelhub.interop.pieces import Piece, piece_for_file
from modelhub.interop.tensorflow import variable, without_device
from modelhub.kinds import CLASSES, VOCABULARY

Signature = Callable[..., dict[str, Array]]

# What a SavedModel is made of.
_FILES = {"saved_model.pb", "variables", "assets", "assets.extra", "fingerprint.pb", "keras_metadata.pb"}


def to_saved_model(x: Any, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """See modelhub.to_saved_model."""
    target = place(directory)
    _check_free(target, overwrite)
    piece = without_device(piece_for_file(x, "tensorflow"))
    module = tf.Module()
    module.params = params = {name: variable(name, x, trainable=False) for name, x in piece.params.items()}
    signatures = image_signatures(piece, params) if piece.reads_images else _text_signatures(x, piece, params)
    with tempfile.TemporaryDirectory() as beside, replacing(target.resolve()) as work:
        if piece.head == CLASSES:
            labels = Path(beside) / "labels.json"
            labels.write_text(json.dumps(list(piece.config.id2label.values())), encoding="utf-8")
            module.labels = tf.saved_model.Asset(str(labels))
        tf.saved_model.save(module, str(work), signatures=signatures)
        _check_free(target, overwrite)  # it may have taken minutes
    return target


def _check_free(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file, or a link that leads nowhere; give a new or empty folder")
    if not (found := set(os.listdir(target))):
        return
    if not overwrite:
        raise InputError(f"{target} is not empty; give a new folder, or overwrite=True to replace a SavedModel there")
    if not (target / "saved_model.pb").is_file():
        raise InputError(f"{target} is not empty, and what it holds is no SavedModel, which overwrite=True is for")
    if strangers := sorted(found - _FILES):
        raise InputError(
            f"beside a SavedModel {target} holds {', '.join(strangers[:5])}, which overwrite=True would remove; "
            "give another folder, or move it away"
        )


def image_signatures(piece: Piece, params: Params, batch: int | None = None) -> dict[str, Any]:
    config = piece.config
    pixels = tf.TensorSpec((batch, config.num_channels, *config.size), tf.float32, "pixel_values")

    @tf.function(input_signature=[pixels], autograph=False)
    def serving_default(pixel_values: Array) -> dict[str, Array]:
        y = piece.forward(piece.xp, bind(piece.skeleton, params), pixel_values)
        outputs = {piece.output: tf.identity(y)}
        if piece.head != CLASSES:
            return outputs
        return outputs | {"probabilities": tf.identity(problems.scores(piece.xp, y, config.problem_type))}

    return {"serving_default": serving_default}


def text_signature(piece: Piece, params: Params, batch: int | None = None, time: int | None = None) -> Any:
    ids = tf.TensorSpec((batch, time), tf.int32, "input_ids")

    @tf.function(input_signature=[ids], autograph=False)
    def serving_default(input_ids: Array) -> dict[str, Array]:
        return {piece.output: piece.forward(piece.xp, bind(piece.skeleton, params), input_ids)}

    return serving_default


def _text_signatures(x: Any, piece: Piece, params: Params) -> dict[str, Any]:
    ids, mask = (tf.TensorSpec((None, None), tf.int32, name) for name in ("input_ids", "attention_mask"))

    @tf.function(input_signature=[ids, mask], autograph=False)
    def serving_masked(input_ids: Array, attention_mask: Array) -> dict[str, Array]:
        return {piece.output: piece.forward(piece.xp, bind(piece.skeleton, params), input_ids, attention_mask)}

    signatures = {"serving_default": text_signature(piece, params), "serving_masked": serving_masked}
    if piece.head == VOCABULARY:
        count = tf.TensorSpec((), tf.int32, "max_new_tokens")
        signatures["generate"] = tf.function(
            _greedy(piece, params, *_end_and_padding(x)), input_signature=[ids, mask, count], autograph=False
        )
    return signatures


def _end_and_padding(x: Any) -> tuple[list[int], int]:
    """The ids that end an answer, as for lm.generate, and the one that fills up what comes after."""

    def named(key: str) -> Any:
        told = x.generation_config.get(key), x.config.extra.get(key), getattr(x.tokenizer, key, None)
        return next((found for found in told if found is not None), None)

    ends = named("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if x.tokenizer is not None:
        ends = sorted(x.stop_ids)
    padding = named("pad_token_id")
    return ends, padding if padding is not None else ends[0] if ends else 0


def _greedy(piece: Piece, params: Params, ends: list[int], padding: int) -> Signature:
    """The loop of lm.generate as one graph."""
    xp, context = piece.xp, piece.config.max_position_embeddings

    def generate(input_ids: Array, attention_mask: Array, max_new_tokens: Array) -> dict[str, Array]:
        model = bind(piece.skeleton, params)
        lengths = tf.reduce_sum(attention_mask, 1)
        longest = tf.reduce_max(lengths)
        tf.debugging.assert_less(longest, context, "there is no room for an answer in the model's context")
        # Each row's tokens from the first place on, in their order.
        order = tf.argsort(1 - attention_mask, stable=True)[:, :longest]
        prompts = tf.gather(input_ids, order, batch_dims=1)

        def step(ids: Array, start: Array, last: Array, cache: Params) -> tuple[Array, Params]:
            """The tokens (B,) after those at index last (B,) of ids (B, T), which take the slots from start (B,) on."""
            buffers = bind(model.new_cache(1, 1), cache)
            hidden = tf.gather(model.model(xp, ids, start, buffers), last, batch_dims=1)
            return xp.argmax(model.logits(xp, hidden)), flatten(buffers)

        def going_on(i: Array, token: Array, ended: Array, ids: Array, cache: Params) -> Array:
            return (i < tf.minimum(max_new_tokens, context - longest)) & ~tf.reduce_all(ended)

        def advance(i: Array, token: Array, ended: Array, ids: Array, cache: Params) -> tuple:
            token, cache = step(token[:, None], lengths + i - 1, first, cache)
            return i + 1, *chosen(i, token, ended, ids), cache

        def chosen(i: Array, token: Array, ended: Array, ids: Array) -> tuple[Array, Array, Array]:
            token = tf.where(ended, padding, token)
            ids = tf.where(tf.range(max_new_tokens) == i, token[:, None], ids)
            return token, ended | tf.reduce_any(token[:, None] == tf.constant(ends, tf.int32), 1), ids

        first = tf.zeros_like(lengths)
        specs = flatten(model.new_cache(xp.shape(prompts)[0], longest + max_new_tokens))
        cache = {name: xp.zeros(spec.shape, piece.backbone.dtype) for name, spec in specs.items()}
        token, cache = step(prompts, first, lengths - 1, cache)
        nothing = tf.fill((tf.shape(lengths)[0], max_new_tokens), padding)
        state = (1, *chosen(0, token, tf.zeros_like(lengths, tf.bool), nothing), cache)
        *_, ids, _ = tf.while_loop(going_on, advance, state, parallel_iterations=1)
        return {"output_ids": ids}

    return generate
