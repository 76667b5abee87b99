"""A task, a backbone or a single Module as a tf.Module, whose Variables are the task's own weights."""

import dataclasses
from typing import Any

import tensorflow as tf

from modelhub.core import custom
from modelhub.core.backends.base import Array
from modelhub.core.backends.tensorflow import TensorflowBackend
from modelhub.core.tree import bind
from modelhub.interop.pieces import Piece, piece_of

_as_written = tf.autograph.experimental.do_not_convert  # nothing here depends on a tensor's value


class _TFModule(tf.Module):
    """params: {Hugging Face name: tf.Variable}; `trainable_variables` are those that the task's `fit` would train."""

    def __init__(self, piece: Piece):
        super().__init__()
        self._skeleton, self._forward = piece.skeleton, piece.forward
        self._xp = without_device(piece).xp
        # A single Module's that are Variables stay what they are.
        kept = tf.Variable if piece.backbone is None else ()
        self.params = variables = {
            name: x if isinstance(x, kept) else variable(name, x, name in piece.trainable)
            for name, x in piece.params.items()
        }
        if piece.backbone is not None:
            piece.backbone.share(dict(variables))

    def _run(self, training: bool, first: Any, *more: Any) -> Any:
        xp = self._xp
        if training:
            rows = xp.shape(first)[:1]
            xp = xp.for_training(lambda: tf.random.uniform(rows, 0, 2**31 - 1, tf.int32))
        # The backend's custom gradients take tensors; a tape follows them back to the Variables.
        weights = {name: tf.convert_to_tensor(x) for name, x in self.params.items()}
        return self._forward(xp, bind(self._skeleton, weights), first, *more)


class _TextModule(_TFModule):
    @_as_written
    def __call__(
        self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, training: bool = False
    ) -> Array:  # fmt: skip
        """float32 logits (B, T, V), of a Backbone hidden states (B, T, D), of ids (B, T).

        attention_mask (B, T), 1 for tokens and 0 for padding on either side: what stands in padded places of the result
        means nothing. training: with dropout, where the model has any; what it drops, tf.random.set_seed decides.
        """
        return self._run(training, tf.convert_to_tensor(input_ids), attention_mask, position_ids)


class _ImageModule(_TFModule):
    @_as_written
    def __call__(self, pixel_values: Any, training: bool = False) -> Array:
        """float32 logits (B, classes), of a Backbone hidden states (B, T, D), of normalised pixels (B, C, H, W).

        training: as for text. In a graph only the batch can be of unknown size. Raises InputError for sizes that the
        model cannot take.
        """
        return self._run(training, tf.convert_to_tensor(pixel_values))


class _SingleModule(_TFModule):
    @_as_written
    def __call__(self, *inputs: Any, training: bool = False) -> Any:
        """What the Module returns for these tensors."""
        return self._run(training, *inputs)


def to_tensorflow(x: Any) -> tf.Module:
    """See modelhub.to_tensorflow."""
    piece = piece_of(x, "tensorflow")
    kind = _SingleModule if piece.kind is None else _ImageModule if piece.reads_images else _TextModule
    return kind(piece)


def variable(name: str, x: Array, trainable: bool) -> tf.Variable:
    """A Variable with the values of x; x itself where it is such a Variable already.

    No memory is copied now. TensorFlow copies before the first write what another tensor or, through DLPack, another
    framework holds as well: one Variable after the other, so that nobody's array is ever changed.
    """
    if isinstance(x, tf.Variable) and x.trainable == trainable:
        return x
    x = tf.convert_to_tensor(x)
    with tf.device(x.device):
        return tf.Variable(x, trainable=trainable, name=name)


def without_device(piece: Piece) -> Piece:
    """For graphs, which run where their caller puts them."""
    return dataclasses.replace(piece, xp=custom.moved(piece.xp, TensorflowBackend(None)))
