"""What is common to all ways out: what was given, on the backend that is wanted, and its forward pass."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Any

from modelhub.core import custom
from modelhub.core.backends import backend_class, get_backend, of
from modelhub.core.backends.base import Array, Backend
from modelhub.core.leaves import check_plain
from modelhub.core.tree import Module, Params, Spec, flatten, initial_value
from modelhub.errors import BackendNotInstalled, InputError
from modelhub.families import family_of
from modelhub.families.naming import NameMap
from modelhub.kinds import IMAGES, Forward, TaskKind

# What the ways out into one file take: a backend, and packages besides.
_NEEDS = {"to_onnx": ("torch", "onnx", "onnxscript"), "to_litert": ("tensorflow",)}


@dataclass
class Piece:
    """A task, a backbone or a single Module, opened up.

    kind: None for a single Module. skeleton: what `params`, under
    Hugging Face's names, are bound into. trainable: the names of those that `fit` would train. backbone: the Backbone
    that the arrays belong to, None for a single Module. config: the family's, names: between the names in memory and
    transformers'; None for a single Module.
    """

    kind: TaskKind | None
    skeleton: Any
    params: Params
    xp: Backend
    trainable: frozenset[str]
    backbone: Any = None
    config: Any = None
    names: NameMap | None = None

    @property
    def reads_images(self) -> bool:
        return self.kind is not None and self.skeleton.reads == IMAGES

    def owned(self, live: type | tuple[()] = ()) -> Params:
        """`params`, which may then be written to and donated: a task's as `Backbone.owned` gives them, of a single
        Module copies, as it does not know who else has its arrays; `live`: but for arrays of this class."""
        if self.backbone is not None:
            return self.backbone.owned()
        return {name: x if isinstance(x, live) else self.xp.copy(x) for name, x in self.params.items()}

    @property
    def forward(self) -> Forward:
        """forward(xp, bound skeleton, *inputs): the task's, and the Module's own for a single one."""
        return _call if self.kind is None else self.kind.forward

    @property
    def head(self) -> str | None:
        return None if self.kind is None else self.kind.head

    @property
    def output(self) -> str:
        """What `forward` gives, as files call it."""
        return "output" if self.kind is None else self.kind.output


def check_installed(way_out: str) -> None:
    """Raise BackendNotInstalled for what is missing here. way_out: "to_onnx" or "to_litert"."""
    backend, *others = _NEEDS[way_out]
    backend_class(backend)
    if missing := [name for name in others if importlib.util.find_spec(name) is None]:
        raise BackendNotInstalled(
            f"{way_out} takes {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}"
        )


def piece_of(x: Any, backend: str) -> Piece:
    """x: a CausalLM, an ImageClassifier, a Backbone, or a Module with arrays or Specs in it.

    A task or backbone on another backend is moved to `backend` (see `lm.to`); so are a Module's arrays, as copies.
    Raises InputError for anything else; ConfigError for a layer of the user's that is for another framework;
    BackendNotInstalled.
    """
    backend_class(backend)  # says what is missing before anything is moved
    if isinstance(x, Module):
        check_plain(flatten(x), "a way out", "give one with arrays")
        return _single(x, backend)
    kind, backbone = getattr(x, "kind", None), getattr(x, "backbone", x)
    if not isinstance(kind, TaskKind):
        raise InputError(
            f"expected a CausalLM, an ImageClassifier, a Backbone or a Module, got {type(x).__module__}."
            f"{type(x).__qualname__}; load one with CausalLM.from_preset(...)"
        )
    check_plain(backbone.params, "a way out", "load the model unpacked")
    if backbone.xp.name != backend:
        x.to(backend=backend)
    config = backbone.config
    return Piece(
        kind, backbone.model, backbone.params, backbone.xp, frozenset(backbone.trainable_names()), backbone, config,
        family_of(config.model_type).names("hf", config),
    )  # fmt: skip


def piece_for_file(x: Any, backend: str) -> Piece:
    """`piece_of`, for files: the task stays on its backend, and `backend`, on the CPU, reads its weights or a copy.

    Errors as for `piece_of`; InputError for a single Module, ConfigError for an attention function of the user's that
    is for another framework.
    """
    xp = getattr(getattr(x, "backbone", x), "xp", None)
    piece = piece_of(x, getattr(xp, "name", backend))
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
    return Piece(None, module, params, xp, frozenset(params))


def _call(xp: Backend, module: Any, *inputs: Array) -> Any:
    return module(xp, *inputs)
