"""Models as torch.nn.Module trees, over the same memory as the task they come from.

Each Module class gets a twin that is a torch.nn.Module too: the model's code, written with `xp`, runs with the twin as
its `self`, whose fields are Parameters and child modules. A child is called as child(xp, x); the twin's __call__ takes
`xp` out of sight, so that hooks, wrappers and replaced layers see what they know: module(x).
"""

import dataclasses
import functools
import inspect
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from modelhub.core import custom, lora, losses, nn, problems, vision
from modelhub.core.backends import backend_of
from modelhub.core.backends.base import Backend
from modelhub.core.tree import Module, children, is_leaf
from modelhub.errors import InputError
from modelhub.families import family_of
from modelhub.families.naming import KEEP
from modelhub.interop.pieces import Piece, piece_of
from modelhub.kinds import Forward

# Tools look for these by isinstance.
_TORCH: dict[Any, type] = {
    nn.Linear: torch.nn.Linear, nn.Embedding: torch.nn.Embedding, nn.LayerNorm: torch.nn.LayerNorm,
}  # fmt: skip

_meant: Any = WeakIdKeyDictionary()  # Parameters, and whether `fit` would train them
_IDS_ALONE = "to_torch models take ids: no embeddings or caches (PEFT's prompt and prefix tuning), insides or tuples"


def to_torch(x: Any) -> torch.nn.Module:
    """See modelhub.to_torch."""
    if isinstance(x, TorchModule):
        return x
    piece = piece_of(x, "torch")
    piece.params = piece.owned(torch.nn.Parameter)
    params = {name: _parameter(array, name in piece.trainable) for name, array in piece.params.items()}
    root = None if piece.kind is None else _Image if piece.reads_images else _Text
    net: TorchModule = _built(piece.skeleton, params, "", root)
    if isinstance(net, _Root):
        net._start(piece)
        piece.backbone.share(params)
    return net.eval()


class Output(OrderedDict):
    """What a whole model returns: by name, as an attribute, or by number, as transformers' ModelOutput.

    loss is None, and no item, without labels.
    """

    def __getattr__(self, name: str) -> Any:
        if name in self or name in ("loss", "logits", "last_hidden_state"):
            return self.get(name)
        raise AttributeError(name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.values())


pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: Output(zip(names, values, strict=True)),
    serialized_type_name="modelhub.interop.torch.Output",
)


class _Slots(torch.nn.Module):
    """Modules of somebody else's can be put into it."""

    def __setattr__(self, name: str, value: Any) -> None:
        torch.nn.Module.__setattr__(self, name, _fitted(value))

    def add_module(self, name: str, module: Any) -> None:
        torch.nn.Module.add_module(self, name, _fitted(module))


class Modules(_Slots, torch.nn.ModuleList):
    """A list of modules in a model."""


class TorchModule(_Slots):
    """Base of the twins; `_source` is the Module class that one is a twin of."""

    _source: type
    _root: type | None = None
    _xp: Any = None  # of a whole model: the task's own backend
    is_gradient_checkpointing = False

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    # Those of dataclasses and of torch's own layers stand before torch.nn.Module's in the order of bases.
    __repr__ = torch.nn.Module.__repr__
    __hash__ = torch.nn.Module.__hash__
    __eq__ = torch.nn.Module.__eq__

    def __call__(self, *args: Any, **named: Any) -> Any:
        if args and isinstance(args[0], Backend):
            return torch.nn.Module.__call__(self, *args[1:], xp=args[0], **named)
        return torch.nn.Module.__call__(self, *args, **named)

    def forward(self, *args: Any, xp: Backend | None = None, **named: Any) -> Any:
        if xp is None:
            xp = _working(self, _checked(args[0] if args else None, type(self).__name__))
        return self._source.__call__(self, xp, *args, **named)

    def __reduce_ex__(self, protocol: Any) -> Any:  # a twin's class is found by its source's
        return _new, (self._source, self._root), self.__getstate__()


class _Field:
    """A dataclass field with a default, which would hide what torch.nn.Module keeps under that name."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            raise AttributeError(self.name)
        return torch.nn.Module.__getattr__(module, self.name)


@functools.cache
def _twin(source: Any, root: type | None) -> type:
    defaults = [field.name for field in dataclasses.fields(source) if field.default is not dataclasses.MISSING]
    bases = (root or TorchModule, source, *(theirs for ours, theirs in _TORCH.items() if issubclass(source, ours)))
    more = {"_source": source, "_root": root, "__module__": __name__}
    return type(source.__name__, bases, {name: _Field(name) for name in defaults} | more)


def _new(source: Any, root: type | None) -> Any:
    return _twin(source, root)()


def _parameter(array: torch.Tensor, trainable: bool) -> torch.nn.Parameter:
    """Another to_torch's, where there was one: frozen as the user has it, unless the task trains others now."""
    trainable = trainable and array.is_floating_point()
    parameter = array if isinstance(array, torch.nn.Parameter) else torch.nn.Parameter(array, requires_grad=False)
    if _meant.get(parameter) != trainable:
        parameter.requires_grad_(trainable)
        _meant[parameter] = trainable
    return parameter


def _built(node: Any, params: Mapping[str, torch.nn.Parameter], prefix: str, root: type | None = None) -> Any:
    if is_leaf(node):
        return params[prefix]
    items = [(name, _built(child, params, f"{prefix}.{name}" if prefix else name)) for name, child in children(node)]
    if isinstance(node, Module):
        module = _new(type(node), root)
        for name, value in (vars(node) | dict(items)).items():
            setattr(module, name, value)
        _describe(module)
        return module
    values = [value for _, value in items]
    if any(isinstance(value, torch.nn.Module) for value in values):
        return Modules(values)
    return torch.nn.ParameterList(values) if any(map(is_leaf, values)) else node


def _describe(module: Any) -> None:
    """What torch's own layers say of themselves."""
    if isinstance(module, torch.nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, torch.nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
        module.padding_idx = module.max_norm = None
        module.norm_type, module.scale_grad_by_freq, module.sparse = 2.0, False, False
    elif isinstance(module, torch.nn.LayerNorm):
        module.normalized_shape, module.elementwise_affine = tuple(module.weight.shape), True


def _fitted(value: Any) -> Any:
    """A module of somebody else's that is put into a slot will be called as ours are: with `xp` first."""
    if isinstance(value, torch.nn.Module) and not isinstance(value, (_Slots, _Guest, torch.nn.ParameterList)):
        kind: Any = type(value)
        value.__class__ = _guest(kind)
    return value


class _Guest:
    """Mixed into the class of a module that is not ours."""

    takes_xp: bool

    def __call__(self, *args: Any, **named: Any) -> Any:
        if args and isinstance(args[0], Backend):
            if self.takes_xp:
                named["xp"] = args[0]
            args = args[1:]
        return super().__call__(*args, **named)  # type: ignore[misc]

    def unembed(self, xp: Backend, x: torch.Tensor) -> torch.Tensor:  # in an Embedding's place
        return xp.linear(x, self.weight)  # type: ignore[attr-defined]


@functools.cache
def _guest(kind: type) -> type:
    wanted = inspect.signature(kind.forward).parameters.values()  # type: ignore[attr-defined]
    takes = any(parameter.kind is parameter.VAR_KEYWORD or parameter.name == "xp" for parameter in wanted)
    return type(kind.__name__, (_Guest, kind), {"takes_xp": takes, "__module__": kind.__module__})


def _working(module: TorchModule, x: torch.Tensor) -> Backend:
    """The backend of a call from outside: where x is, and as module.train() or eval() has it."""
    own = module._xp
    xp = own if own is not None and own.device == own.device_of(x) else backend_of(x)
    if not module.training:
        return xp
    # torch's own generator, so that torch.manual_seed decides; untouched where nothing drops.
    keys = functools.partial(torch.randint, -(2**31), 2**31 - 1, x.shape[:1], dtype=torch.int32, device=x.device)
    return xp.for_training(keys, module.is_gradient_checkpointing)


def _checked(x: Any, what: str) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise InputError(f"{what} must be called with tensors of torch, got a {type(x).__module__}.{type(x).__name__}")
    return x


class Config:
    """A family's config as PEFT and transformers' Trainer read one; what they set on it the task does not see."""

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # while it is being copied
            raise AttributeError(name)
        return getattr(self._config, name)

    def to_dict(self) -> dict[str, Any]:
        """config.json."""
        return self._config.to_hf()

    def get(self, key: str, default: Any = None) -> Any:
        return self.to_dict().get(key, default)

    def __contains__(self, key: str) -> bool:
        return key in self.to_dict()

    def get_text_config(self, decoder: bool = False) -> "Config":
        if decoder:  # a cache of transformers' asks
            raise InputError(_IDS_ALONE)
        return self

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


class _Root(TorchModule):
    """What whole models have in common."""

    accepts_loss_kwargs = True  # the Trainer is to say num_items_in_batch
    supports_gradient_checkpointing = True
    _backbone: Any
    _compute: Forward
    _kind: Any  # the TaskKind

    def _start(self, piece: Piece) -> None:
        self._backbone, self._compute = piece.backbone, piece.forward
        self._xp, self._kind = piece.xp, piece.kind
        self.config = Config(piece.config)
        self.register_load_state_dict_pre_hook(_with_our_names)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:  # fmt: skip
        """While training keep only the inputs of blocks for the backward pass, which computes the rest again.

        The arguments are those that the Trainer passes on; it is always done without reentering autograd.
        """
        others = {key: x for key, x in (activation_checkpointing_kwargs or {}).items() if key != "use_reentrant" or x}
        if others:
            raise InputError(f"blocks are recomputed without reentering autograd: leave {others} out")
        if every_n_layers != 1 or offload:
            raise InputError("blocks are recomputed one by one, all of them, and nothing is offloaded")
        self.is_gradient_checkpointing = True

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """The same, as transformers called it before 5.2x."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.is_gradient_checkpointing = False

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        """What half() and to() do: the task goes with its memory."""
        before = list(self.parameters())
        torch.nn.Module._apply(self, fn, recurse)
        now = {id(old): new for old, new in zip(before, self.parameters(), strict=True)}
        if self.device.type == "meta":
            return self
        first = next(self.parameters())
        if self._xp.device != self._xp.device_of(first):
            self._xp = custom.moved(self._xp, backend_of(first))
        mine = {} if self._backbone is None else self._backbone.params
        if any(id(x) in now for x in mine.values()):
            # What it has got since goes along; an adapter stays in float32.
            params = {
                name: now[id(x)] if id(x) in now else x.to(first.device, None if lora.MARK in name else first.dtype)
                for name, x in mine.items()
            }
            self._backbone.share(params, self._xp, self._xp.dtype(first))
        return self

    def _output(self, y: torch.Tensor) -> Output:
        name = self._kind.output
        return Output({"last_hidden_state" if name == "hidden_states" else name: y})

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_backbone": None}  # a copy is nobody's


class _Text(_Root):
    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None, labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None, inputs_embeds: None = None, past_key_values: None = None,
        output_attentions: bool | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Output:  # fmt: skip
        """See to_torch. The last five are there because PEFT passes them on; nothing can be asked for with them."""
        asked = inputs_embeds is not None or past_key_values is not None or output_attentions or output_hidden_states
        if asked or return_dict is False:
            raise InputError(_IDS_ALONE)
        ids = _checked(input_ids, "input_ids")
        y = self._compute(_working(self, ids), self, ids, attention_mask, position_ids)
        if self._kind.head is None or labels is None:
            return self._output(y)
        return Output(loss=losses.causal_lm_loss(y, labels, num_items_in_batch), logits=y)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **more: Any) -> dict[str, Any]:
        """PEFT wants it to be there; it is the task that generates, with lm.generate."""
        return {"input_ids": input_ids, "attention_mask": more.get("attention_mask")}

    def get_input_embeddings(self) -> torch.nn.Module:
        found: Any = self.model
        return found.embed_tokens

    def get_output_embeddings(self) -> torch.nn.Module | None:
        """None where they are the input's."""
        return getattr(self, "lm_head", None)

    def _get_name(self) -> str:
        """By the architecture's the Trainer knows, with label smoothing, that labels are to be shifted."""
        return self.config.to_dict()["architectures"][0]


class _Image(_Root):
    def forward(  # type: ignore[override]
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Output:  # fmt: skip
        """See to_torch."""
        pixels = _checked(pixel_values, "pixel_values")
        y = self._compute(_working(self, pixels), self, pixels)
        if self._kind.head is None or labels is None:
            return self._output(y)
        problem = problems.problem_of(self.config)
        if num_items_in_batch is None:
            return Output(loss=losses.classification_loss(y, labels, problem), logits=y)
        total = losses.classification_loss(y, labels, problem, reduction="sum")
        return Output(loss=total / num_items_in_batch, logits=y)


def _with_our_names(module: _Root, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before weights are loaded: names of transformers' models in memory become those of files."""
    names = family_of(module.config.model_type).names("hf", module.config)
    for name in [name for name in state if name.startswith(prefix)]:
        value, renamed = state.pop(name), names.to_ours(name[len(prefix) :])
        if renamed is not None:
            ours, via = renamed
            state[prefix + ours] = value if via is KEEP else torch.from_numpy(via.to_ours(value.cpu().numpy().copy()))


# Computed by numpy while a program is compiled, and not again when it runs.
for _table in (nn.Rope.values, vision.bicubic):
    torch.compiler.assume_constant_result(_table)
