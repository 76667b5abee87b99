"""What is common to all ways out: what was given, on the backend that is wanted, and its forward pass."""

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modelhub.core import custom
from modelhub.core.backends import backend_class, get_backend, of
from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Module, Params, Spec, flatten, initial_value
from modelhub.errors import BackendNotInstalled, InputError
from modelhub.families import family_of
from modelhub.families.naming import NameMap

Forward = Callable[..., Array]

# What the ways out into one file take: a backend, and packages besides.
_NEEDS = {"to_onnx": ("torch", "onnx", "onnxscript"), "to_litert": ("tensorflow",)}


@dataclass
class Piece:
    """A task, a backbone or a single Module, opened up.

    kind: "text" and "image" for tasks, "text-backbone" and "image-backbone", "module". skeleton: what `params`, under
    Hugging Face's names, are bound into. trainable: the names of those that `fit` would train. backbone: the Backbone
    that the arrays belong to, None for a single Module. config: the family's, names: between the names in memory and
    transformers'; None for a single Module.
    """

    kind: str
    skeleton: Any
    params: Params
    xp: Backend
    trainable: frozenset[str]
    backbone: Any = None
    config: Any = None
    names: NameMap | None = None

    @property
    def reads_images(self) -> bool:
        return self.kind.startswith("image")

    def owned(self, live: type | tuple[()] = ()) -> Params:
        """`params`, which may then be written to and donated: a task's as `Backbone.owned` gives them, of a single
        Module copies, as it does not know who else has its arrays; `live`: but for arrays of this class."""
        if self.backbone is not None:
            return self.backbone.owned()
        return {name: x if isinstance(x, live) else self.xp.copy(x) for name, x in self.params.items()}

    @property
    def forward(self) -> Forward:
        """forward(xp, bound skeleton, *inputs); see the functions below, and the Module's own for a single one."""
        return _FORWARD.get(self.kind, _call)


def check_installed(way_out: str) -> None:
    """Raise BackendNotInstalled for what is missing here. way_out: "to_onnx" or "to_litert"."""
    backend, *others = _NEEDS[way_out]
    backend_class(backend)
    if missing := [name for name in others if importlib.util.find_spec(name) is None]:
        raise BackendNotInstalled(
            f"{way_out} takes {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}"
        )


def opened(x: Any, backend: str) -> Piece:
    """x: a CausalLM, an ImageClassifier, a Backbone, or a Module with arrays or Specs in it.

    A task or backbone on another backend is moved to `backend` (see `lm.to`); so are a Module's arrays, as copies.
    Raises InputError for anything else; ConfigError for a layer of the user's that is for another framework;
    BackendNotInstalled.
    """
    backend_class(backend)  # says what is missing before anything is moved
    if isinstance(x, Module):
        return _single(x, backend)
    backbone = getattr(x, "backbone", x)
    if not hasattr(backbone, "base_model") or not hasattr(backbone, "trainable_names"):
        raise InputError(
            f"expected a CausalLM, an ImageClassifier, a Backbone or a Module, got {type(x).__module__}."
            f"{type(x).__qualname__}; load one with CausalLM.from_preset(...)"
        )
    if backbone.xp.name != backend:
        x.to(backend=backend)
    kind = "image" if hasattr(backbone.model, "encode") else "text"
    config = backbone.config
    return Piece(
        kind if backbone is not x else f"{kind}-backbone", backbone.model, backbone.params, backbone.xp,
        frozenset(backbone.trainable_names()), backbone, config, family_of(config.model_type).names("hf", config),
    )  # fmt: skip


def apart(x: Any, backend: str) -> Piece:
    """`opened`, for files: the task stays on its backend, and `backend`, on the CPU, reads its weights or a copy.

    Errors as for `opened`; InputError for a single Module, ConfigError for an attention function of the user's that is
    for another framework.
    """
    xp = getattr(getattr(x, "backbone", x), "xp", None)
    piece = opened(x, getattr(xp, "name", backend))
    if piece.backbone is None:
        raise InputError("a single Module does not say what its inputs are; give a task or a Backbone")
    custom.check_backend(piece.skeleton, backend)
    if (piece.xp.name, piece.xp.device) == (backend, "cpu"):
        return piece
    xp = custom.moved(piece.xp, get_backend(backend, "cpu"))
    return dataclasses.replace(
        piece, xp=xp, params={name: xp.adopt(array, piece.xp) for name, array in piece.params.items()}
    )


def _single(module: Module, backend: str) -> Piece:
    custom.check_backend(module, backend)
    xp = get_backend(backend)
    leaves = flatten(module)
    if any(isinstance(leaf, Spec) for leaf in leaves.values()):
        params = {
            name: xp.put(initial_value(name, leaf, 0)) if isinstance(leaf, Spec) else leaf
            for name, leaf in leaves.items()
        }
    else:
        params = dict(leaves)
    if params and (found := of(params)) != backend:
        other = get_backend(found)
        params = {name: xp.array(other.get(x), other.dtype(x)) for name, x in params.items()}
    return Piece("module", module, params, xp, frozenset(params))


def text_hidden(
    xp: Backend, model: Any, input_ids: Array, attention_mask: Array | None = None, position_ids: Array | None = None
) -> Array:
    """Hidden states (B, T, D) of ids (B, T) after the final norm.

    attention_mask (B, T), 1 for tokens and 0 for padding on either side, as in transformers: what stands in padded
    places of the result means nothing. position_ids (B, T): None: 0 ... T - 1 in each row.
    Raises InputError for other ranks, and for ids that are no integers.
    """
    if "int" not in str(input_ids.dtype):
        raise InputError(f"input_ids must be integers of shape (batch, time), got {input_ids.dtype}")
    ids = _rows(xp, "input_ids", input_ids)
    segments = None if attention_mask is None else _rows(xp, "attention_mask", attention_mask)
    positions = None if position_ids is None else _rows(xp, "position_ids", position_ids)
    hidden: Array = model.model(xp, ids, positions=positions, segments=segments)
    return hidden


def _rows(xp: Backend, name: str, x: Array) -> Array:
    x = xp.cast(x, "int32")
    known = getattr(x.shape, "rank", 2) is not None  # in a tf.function it may be
    if not known or len(x.shape) != 2:
        raise InputError(f"{name} must be of shape (batch, time), got {tuple(x.shape) if known else 'an unknown one'}")
    return x


def text_logits(
    xp: Backend, model: Any, input_ids: Array, attention_mask: Array | None = None, position_ids: Array | None = None
) -> Array:
    """float32 logits (B, T, V); the rest as for `text_hidden`."""
    return model.logits(xp, text_hidden(xp, model, input_ids, attention_mask, position_ids))


def image_hidden(xp: Backend, model: Any, pixel_values: Array) -> Array:
    """Hidden states (B, T, D) after the final norm, of pixels (B, C, H, W)."""
    return model.encode(xp, xp.cast(pixel_values, _dtype_of(xp, model)))


def image_logits(xp: Backend, model: Any, pixel_values: Array) -> Array:
    """float32 logits (B, classes) of pixels (B, C, H, W)."""
    return model.logits(xp, image_hidden(xp, model, pixel_values))


def _call(xp: Backend, module: Any, *inputs: Array) -> Any:
    return module(xp, *inputs)


def _dtype_of(xp: Backend, model: Any) -> str:
    encoder = getattr(model, model.config.model_type)
    return xp.dtype(encoder.embeddings.patch_embeddings.projection.weight)


_FORWARD: dict[str, Forward] = {
    "text": text_logits, "text-backbone": text_hidden, "image": image_logits, "image-backbone": image_hidden,
}  # fmt: skip
