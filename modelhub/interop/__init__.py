"""Models as the frameworks' own objects and files. A framework is imported when one of these is called."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelhub.core.backends import backend_class
from modelhub.core.tree import Params
from modelhub.habits import explained

if TYPE_CHECKING:
    import tensorflow as tf
    import torch

__all__ = ["to_jax", "to_litert", "to_onnx", "to_saved_model", "to_tensorflow", "to_torch"]


@explained
def to_torch(x: Any) -> "torch.nn.Module":
    """x as a torch.nn.Module: a CausalLM, an ImageClassifier, a Backbone, or a single Module.

    Its Parameters are the memory of x, which training them changes: lm.generate sees it. Of a single Module they are
    copies, but for those that are Parameters already, of a live to_torch of its model. A task on another backend is
    moved to torch first. Those that `fit` would train require gradients; where to_torch was called before they stay as
    they are, unless the task trains others now. state_dict() has Hugging Face's names; load_state_dict takes those of
    transformers' models too. What replaces weights of the task (lm.load_adapter, lm.merge_lora, lm.fit) asks for
    another to_torch.

    Called with, returning:
        CausalLM         forward(input_ids, attention_mask=None, position_ids=None, labels=None,
                         num_items_in_batch=None) -> Output(loss, logits): ids, mask, positions and labels (B, T),
                         labels -100 where there is no loss, not shifted; logits float32 (B, T, V)
        ImageClassifier  forward(pixel_values, labels=None, num_items_in_batch=None) -> Output(loss, logits): pixels
                         (B, C, H, W) normalised; logits float32 (B, classes); labels (B,), for several labels an image
                         and for regression floats (B, classes): the config's problem_type decides the loss
        Backbone         without labels, and with last_hidden_state (B, T, D) in place of logits
        Module           forward(*tensors) -> what the Module's own call returns

    Raises InputError for anything else, BackendNotInstalled without torch.
    """
    backend_class("torch")  # says how to install what is missing
    from modelhub.interop import torch as interop

    return interop.to_torch(x)


@explained
def to_jax(x: Any) -> tuple[Params, Callable[..., Any]]:
    """A model's parameters and its forward pass as a pure function, for jit, grad, vmap, shard_map, optax, flax.

    x: a CausalLM, an ImageClassifier, a Backbone, or a single Module, whose function is fn(params, *inputs); one on
    another backend is moved to JAX first. Returns (params, fn), params a dict {Hugging Face name: array}, with an
    active adapter those of the adapter too (NAME.lora.lora_A ...). The arrays are the task's own, which JAX does not
    change; who donates them takes them from the task. Those of a single Module are copies. lm.load_params puts trained
    ones back.

    Of text, fn(params, input_ids, attention_mask=None, position_ids=None, *, dropout_rng=None): ids (B, T);
    attention_mask (B, T), 1 for tokens and 0 for padding on either side; position_ids (B, T). Of images,
    fn(params, pixel_values, *, dropout_rng=None): normalised pixels (B, C, H, W). fn gives float32 logits (B, T, V) or
    (B, classes); for a backbone hidden states (B, T, D). dropout_rng: a JAX key, which turns the model's dropouts on;
    in shard_map give each shard its own (jax.random.fold_in), or all drop the same.

    Raises InputError for what is no model; BackendNotInstalled. fn raises InputError for parameters that are missing.
    """
    backend_class("jax")  # says how to install what is missing
    from modelhub.interop import jax as interop

    return interop.to_jax(x)


@explained
def to_tensorflow(x: Any) -> "tf.Module":
    """A tf.Module of a CausalLM, an ImageClassifier, a Backbone or a Module, for GradientTape loops.

    Its `params` are {Hugging Face name: tf.Variable}, and the Variables are the task's own weights: what trains them
    changes the task. Of a single Module they are copies, but for those that are Variables already, of a live
    to_tensorflow. `trainable_variables` are those that `fit` would train: an active adapter's, else all. Called with
    (input_ids, attention_mask=None, position_ids=None, training=False) or (pixel_values, training=False), a single
    Module with its own inputs; see __call__.

    A task on another backend is moved to TensorFlow first. What replaces the task's weights parts the two: after
    `fit`, `load_params`, `to`, enable_lora and its like, call to_tensorflow again. Raises InputError for anything else;
    BackendNotInstalled.
    """
    backend_class("tensorflow")  # says how to install what is missing
    from modelhub.interop import tensorflow as interop

    return interop.to_tensorflow(x)


@explained
def to_saved_model(x: Any, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a CausalLM, an ImageClassifier or a Backbone as a SavedModel, and return its folder.

    Signatures for text, B and T of any size, all ids and masks int32:
        serving_default(input_ids (B, T)) -> logits (B, T, V) float32
        serving_masked(input_ids, attention_mask) -> the same for padded rows, mask 1 for tokens and 0 for padding
        generate(input_ids, attention_mask, max_new_tokens ()) -> output_ids (B, max_new_tokens): the greedy answer of
            each row, padded on either side, with its end token, then the padding token; a CausalLM only
    For images: serving_default(pixel_values (B, C, H, W) float32, normalised as lm.preprocessor does it) ->
    probabilities and logits (B, classes), where problem_type says what probabilities are (of a regression the numbers
    themselves); assets/labels.json is the list of the classes' names. A Backbone gives
    hidden_states (B, T, D) instead. Tokenizer and image processing are not in it.

    An active adapter is applied as it is; merge_lora() first makes the file smaller. The task stays as it is, on
    whichever backend. Raises InputError for what is no task or backbone, and for a directory that is not empty: with
    overwrite=True a SavedModel with no other files beside it is replaced. When anything fails, the directory is what it
    was.
    """
    backend_class("tensorflow")  # says how to install what is missing
    from modelhub.interop import saved_model as interop

    return interop.to_saved_model(x, directory, overwrite=overwrite)


@explained
def to_litert(x: Any, path: str | os.PathLike[str], *, sequence_length: int = 128, batch_size: int = 1) -> Path:
    """Write the forward pass of a CausalLM, an ImageClassifier or a Backbone as a .tflite file, and return its path.

    The sizes in the file are fixed; weights and arithmetic are float32, all operations LiteRT's own. For text:
    input_ids (batch_size, sequence_length) int32 -> logits (.., V); shorter texts are filled up on the right with any
    id, which changes nothing before it. For images: pixel_values (batch_size, C, H, W) float32, normalised as
    lm.preprocessor does it -> logits and probabilities. A Backbone gives hidden_states instead.

    The converter holds the weights several times. The task stays as it is, on whichever backend. Raises InputError for
    what is no task or backbone, for a path that exists, sizes that make no sense, and more than 2 GB of weights.
    """
    backend_class("tensorflow")  # says how to install what is missing
    from modelhub.interop import litert as interop

    return interop.to_litert(x, path, sequence_length=sequence_length, batch_size=batch_size)


@explained
def to_onnx(x: Any, path: str | os.PathLike[str], *, opset: int | None = None) -> Path:
    """Write the forward pass of a CausalLM, an ImageClassifier or a Backbone as an ONNX file; returns where it is.

    Inputs and outputs are called as in Hugging Face Optimum's exports:
        text    input_ids, attention_mask (batch, sequence) int64, mask 1 for tokens and 0 for padding on either side
                -> logits (batch, sequence, vocabulary) float32
        images  pixel_values (batch, channels, height, width), normalised as the task's preprocessor does it, of the
                size in the config -> logits (batch, classes) float32
    A Backbone gives last_hidden_state (batch, tokens, width) instead. Batch and sequence may be of any size. There is
    no cache of keys and values, no tokenizer and no image processing in the file. Its weights have Hugging Face's names
    and the model's dtype; bfloat16, for which onnxruntime has few operations on CPUs, becomes float32. An active
    adapter stays beside the weights; merge_lora() first makes the file smaller. Its metadata: model_type, and config,
    which is config.json.

    opset: version of ONNX's operators; None: what torch.onnx takes, 18 or later. Weights of more than about 1.5 GB are
    in a second file, `path` with .data at its end, which belongs beside the first.

    The task stays as it is, on whichever backend; the files appear when they are complete. It takes torch, onnx and
    onnxscript. Raises InputError for what is no task or backbone, a path that exists, and an opset that torch cannot
    write; ConfigError for a layer or an attention function that torch cannot export; BackendNotInstalled.
    """
    backend_class("torch")  # says how to install what is missing
    from modelhub.interop import onnx as interop

    return interop.to_onnx(x, path, opset=opset)
