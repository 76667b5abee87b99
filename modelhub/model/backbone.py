"""Backbone: a model's weights on a backend, without tokenizer and text."""

import dataclasses
import functools
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, Unpack
from urllib.parse import urlsplit
from urllib.request import url2pathname
from weakref import WeakValueDictionary

import numpy as np

from modelhub.core import custom
from modelhub.core.backends import of
from modelhub.core.backends.base import Array, Backend
from modelhub.core.lora import MARK
from modelhub.core.tree import Params, bind, flatten
from modelhub.errors import CheckpointError, InputError, MixedBackends
from modelhub.hub.card import inherited
from modelhub.hub.files import licence_files
from modelhub.hub.preset import Preset
from modelhub.hub.provenance import PRESET, Provenance, read_provenance
from modelhub.hub.sources import HubSource
from modelhub.kinds import BACKBONE, IMAGES
from modelhub.model.loading import (
    Source,
    choose_dtype,
    load_params,
    open_source,
    random_params,
    try_layers,
    with_layers,
)
from modelhub.model.moving import Movable
from modelhub.model.options import LoadOptions, choose_backend, takes

log = logging.getLogger("modelhub")


@dataclass(frozen=True)
class Origin:
    """Where weights come from.

    provenance: what they were made from. identity: what they are, for an adapter that goes on them: base is an address,
    a preset (modelhub:NAME) or a path, base_model a repository on the Hub; None: they are nowhere but in memory.
    licence_files: name -> text of what is to go with every copy. part_of: the model_type of a larger model, such as one
    that sees, if this one is a part of what is there.
    """

    provenance: Provenance
    identity: Provenance | None = None
    licence_files: Mapping[str, bytes] = field(default_factory=dict)
    part_of: str | None = None


RANDOM = Origin(Provenance(from_scratch=True))  # weights that nothing was loaded into


class Backbone(Movable):
    """model: the abstract skeleton; params: {Hugging Face name: array}; xp: the backend they are on.

    provenance: where the weights come from, and what they were trained on. identity, licence_files: see Origin.
    untouched: the folder or file that they were loaded from, for as long as nothing has replaced them.
    layers: {pattern: name} of the user's own in it; see CausalLM.from_preset. new_layers: where those stand that came
    into the model as it was loaded, and not out of its files.
    """

    kind = BACKBONE
    untouched: Path | None = None
    layers: Mapping[str, str] = MappingProxyType({})
    new_layers: tuple[str, ...] = ()

    def __init__(
        self, model: Any, params: Params, xp: Backend, config: Any, dtype: str,
        origin: Origin = RANDOM,
    ):  # fmt: skip
        self.xp = xp
        self.config = config
        self.dtype = dtype
        self.base_model = model
        self.provenance, self.identity = origin.provenance, origin.identity
        self.licence_files = dict(origin.licence_files)
        self.adapters, self.active_adapter, self.merged, self._replaced = {}, None, False, {}
        self.part_of = origin.part_of
        self._borrowed, self._outside = WeakValueDictionary(), WeakValueDictionary()
        self._params: Params = {}
        self._use(model, params)

    def _use(self, model: Any, params: Params) -> None:
        """The same weights, with or without an adapter."""
        self.model = model
        self._put(params)
        self._compile()

    def _compile(self) -> None:
        hot = None if self.model.reads == IMAGES else False  # images mostly have one size, texts have any
        self._hidden = self.xp.compile(functools.partial(_hidden, self.xp), self.model, hot=hot)

    @classmethod
    @takes(LoadOptions)
    def from_preset(cls, preset: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> Self:
        """As CausalLM.from_preset, without the tokenizer."""
        xp = choose_backend(preset, cls.kind.name, options)
        with open_source(preset, options) as source:
            return cls.from_source(source, xp, options)

    @classmethod
    def from_source(cls, source: Source, xp: Backend, options: LoadOptions) -> Self:
        """dtype, load_weights, seed and layers of the options are what counts here."""
        load_weights, seed = options.get("load_weights", True), options.get("seed", 0)
        if xp.own_attention is None:
            xp = custom.with_attention(xp, source.attention)
        source, before = with_layers(source, options.get("layers"), xp)
        dtype = choose_dtype(options.get("dtype"), xp, source)
        params = load_params(source, xp, dtype, seed) if load_weights else random_params(source.model, xp, dtype, seed)
        try_layers(source, xp, params, before)
        origin = origin_of(source.preset) if load_weights else RANDOM
        changed = bool(source.new_layers or source.new_parts)
        if source.new_layers:  # as they are now they are nowhere else; a new head goes with the adapters
            origin = dataclasses.replace(origin, identity=None)
        origin = dataclasses.replace(origin, part_of=source.part_of)
        backbone = cls(source.model, params, xp, source.config, dtype, origin)
        backbone.untouched = source.preset.path if load_weights and not changed else None
        backbone.layers, backbone.new_layers = source.layers, source.new_layers
        return backbone

    @property
    def params(self) -> Params:
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        before = self._params
        self._put(params)
        if not self.has_adapter and any(params.get(name) is not x for name, x in before.items()):
            self.identity = None  # trained, or put there by the user
        self.optimizer = None

    def _put(self, params: Params) -> None:
        found = of(params)
        if found != self.xp.name:
            raise MixedBackends(f"the model is on {self.xp.name} and the new weights are on {found}")
        self._params, self.untouched = params, None

    def __repr__(self) -> str:
        count = sum(math.prod(spec.shape) for spec in flatten(self.base_model).values())
        return f"Backbone({self.config.model_type!r}, {count:,} parameters, {self.placed()})"

    def placed(self) -> str:
        """For reprs: backend, device, dtype, and the adapter if there is one."""
        where = f"backend={self.xp.name!r}, device={self.xp.device!r}, dtype={self.dtype!r}"
        state = " (merged)" if self._replaced else ""
        return where if self.active_adapter is None else f"{where}, adapter={self.active_adapter!r}{state}"

    @property
    def module(self) -> Any:
        """The model with its arrays: a tree of Modules, called as module(xp, ...)."""
        return bind(self.model, self.params)

    @property
    def num_parameters(self) -> int:
        return sum(map(self._count, {id(x): x for x in self.params.values()}.values()))  # a head may be the embeddings

    def __call__(self, inputs: Any) -> Array:
        """Hidden states (batch, time, width), an array of the backend, of token ids (batch, time).

        Of an image encoder: (batch, tokens, width) of pixels (batch, channels, height, width), normalised floats as
        modelhub.processing.image.ImageProcessor makes them.
        """
        if self.model.reads == IMAGES:
            return self._hidden(self.params, self.xp.array(inputs, self.dtype))
        return self._hidden(self.params, self.xp.array(self.check_ids(inputs), "int32"))

    def collect(self, pixels: Any) -> dict[str, list[Array]]:
        """What an image encoder computes on its way, as transformers' output_hidden_states and output_attentions do.

        "hidden_states": (batch, tokens, width) before each block and after the last; "attentions": (batch, heads,
        tokens, tokens) of each block. Not compiled. Raises InputError for models of text.
        """
        if self.model.reads != IMAGES:
            kind = self.config.model_type
            raise InputError(f"hidden states and attention maps are there for image encoders, not for {kind}")
        collected: dict[str, list[Array]] = {"hidden_states": [], "attentions": []}
        bind(self.model, self.params).encode(self.xp, self.xp.array(pixels, self.dtype), collected)
        return collected

    def check_ids(self, token_ids: Any) -> np.ndarray:
        """int32 (batch, time). Raises InputError for another shape or type, and for ids outside the vocabulary."""
        try:
            ids = np.asarray(token_ids)
        except ValueError:  # numpy's word for rows of different lengths
            raise InputError(
                "token ids must be integers of shape (batch, time): all rows of one length; give rows of different "
                "lengths one by one"
            ) from None
        if ids.ndim != 2 or 0 in ids.shape or ids.dtype.kind not in "iu":
            raise InputError(
                f"token ids must be integers of shape (batch, time), neither of them 0; got {ids.dtype} {ids.shape}"
            )
        low, high, size = int(ids.min()), int(ids.max()), self.config.vocab_size
        if low < 0 or high >= size:
            raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary: 0 to {size - 1}")
        if ids.shape[1] > self.config.max_position_embeddings:
            raise InputError(
                f"{ids.shape[1]} tokens were given and the model's context holds {self.config.max_position_embeddings}"
            )
        return ids.astype(np.int32)

    def summary(self, title: str = "Backbone") -> None:
        """Print the model's parts with their shapes, parameters and memory."""
        from rich.console import Console
        from rich.table import Table

        parts: dict[str, tuple[int, int, int]] = {}
        for name, array in self.params.items():
            part, more = _part(name), self._count(array)
            tensors, count, size = parts.get(part, (0, 0, 0))
            width = 4 if self.xp.dtype(array) == "float32" else 2
            parts[part] = (tensors + 1, count + more, size + more * width)
        table = Table("part", "tensors", "parameters", "memory", title=title)
        for column in table.columns[1:]:
            column.justify = "right"

        def row(title: str, tensors: int, count: int, size: int) -> None:
            table.add_row(title, str(tensors), f"{count:,}", f"{size / 1e6:,.1f} MB")

        for part, (tensors, count, size) in parts.items():
            row(part, tensors, count, size)
        table.add_section()
        row("total", *map(sum, zip(*parts.values(), strict=True)))
        if (adapter := self.adapter) is not None:
            names = adapter.params
            count, size = sum(map(self._count, names.values())), 4 * sum(map(self._count, names.values()))
            state = "merged" if self.merged else "trainable"
            row(f"{state}: adapter {self.active_adapter!r}, rank {adapter.config.rank}", len(names), count, size)
            endings = sorted({module.rpartition(".")[2] for module in adapter.modules})
            table.caption = f"LoRA on {len(adapter.modules)} layers: {', '.join(endings)}"
        else:
            row("trainable", *map(sum, zip(*parts.values(), strict=True)))
        Console().print(table)

    @staticmethod
    def _count(array: Array) -> int:
        return int(np.prod(array.shape))


def _hidden(xp: Backend, model: Any, inputs: Array) -> Array:
    return model.hidden(xp, inputs)


def origin_of(preset: Preset) -> Origin:
    """Of a folder or file, what it says itself; else the registry's card, or the address.

    What a stranger's README calls its base model is the parent, and never what the folder's own weights are.
    """
    try:
        told = read_provenance(preset.path) if preset.path.is_dir() else None
    except CheckpointError as error:  # the model may be sound all the same
        log.warning("%s", error)
        told = None
    if (card := preset.card) is not None:
        base = preset.source if re.match("(hf|kaggle|https)://", preset.source) else PRESET + card.name
        identity = Provenance(base, card.base_model)
        provenance = dataclasses.replace(identity, licence=card.licence)
    elif preset.source.startswith("file://"):
        identity, provenance = at_address(preset.source), told or Provenance()
    else:
        identity = at_address(preset.source)
        provenance = identity
        if told is not None:
            provenance = dataclasses.replace(identity, licence=told.licence, base_licence=inherited(told))
    return Origin(provenance, identity, licence_files(preset.path))


def at_address(address: str) -> Provenance:
    """The identity of weights at an address; of file:///folder the path."""
    if address.startswith("file://"):
        return Provenance(url2pathname(urlsplit(address).path))
    return Provenance(address, HubSource.parse(address).repo if address.startswith("hf://") else None)


def _part(name: str) -> str:
    """ "model.layers.7.mlp.up_proj.weight" belongs to "model.layers.*.mlp"."""
    pieces = ["*" if piece.isdigit() else piece for piece in name.split(".")]
    part = ".".join(pieces[:4] if "*" in pieces else pieces[:2])
    return f"{part} (LoRA)" if MARK in name else part
