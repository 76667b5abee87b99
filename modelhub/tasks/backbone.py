"""Backbone: a model's weights on a backend, without tokenizer and text."""

import os
from collections.abc import Mapping
from typing import Any, Self, Unpack

import numpy as np

from modelhub.bench.compare import choose_backend
from modelhub.core.backends.base import Array, Backend
from modelhub.core.leaves import count, nbytes
from modelhub.core.lora import MARK
from modelhub.core.tree import Params, bind, flatten
from modelhub.errors import InputError
from modelhub.habits import Habits
from modelhub.hub.provenance import Provenance
from modelhub.kinds import BACKBONE, IMAGES
from modelhub.model import placement
from modelhub.model.adapters import AdapterSet
from modelhub.model.delegate import attribute, delegate
from modelhub.model.loading import load_weights
from modelhub.model.options import LoadOptions, takes
from modelhub.model.origin import RANDOM, Origin
from modelhub.model.source import Source, open_source
from modelhub.model.weights import PARAMS, Change, Snapshot, Weights


class Backbone(Habits):
    """A model on a backend: its weights, and the adapters on them.

    weights: the owner of all arrays; adapters: by name. The rest is short for what these two have: model (the skeleton
    of `params`), base_model (without adapters), xp (the backend), config, dtype, provenance (where the weights come
    from, and what they were trained on), identity, licence_files, untouched: see Origin, layers and new_layers: see
    Weights.
    """

    kind = BACKBONE

    def __init__(
        self, model: Any, params: Params, xp: Backend, config: Any, dtype: str, origin: Origin = RANDOM
    ):  # fmt: skip
        self.weights = Weights(model, params, xp, config, dtype, origin)
        self.adapters = AdapterSet(self.weights)

    @classmethod
    def of(cls, weights: Weights) -> Self:
        backbone = cls.__new__(cls)
        backbone.weights, backbone.adapters = weights, AdapterSet(weights)
        return backbone

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
        return cls.of(load_weights(source, xp, options))

    xp: Backend = attribute("weights.xp")
    dtype: str = attribute("weights.dtype")
    model: Any = attribute("weights.layout.skeleton")
    base_model: Any = attribute("weights.layout.base")
    identity: Provenance | None = attribute("weights.origin.identity")
    licence_files: Mapping[str, bytes] = attribute("weights.origin.licence_files")
    untouched: Any = attribute("weights.origin.untouched")
    layers: Mapping[str, str] = attribute("weights.layers")
    new_layers: tuple[str, ...] = attribute("weights.new_layers")
    shared: bool = attribute("weights.shared")
    has_adapter: bool = attribute("weights.has_adapter", "Whether an adapter is active, and not merged.")
    merged: bool = attribute("weights.layout.merged", "Whether the active adapter is in the weights.")
    adapter: Any = attribute("adapters.active", "The active Adapter, merged or not, or None.")
    active_adapter: str | None = attribute("weights.layout.active", "Its name.")

    @property
    def config(self) -> Any:
        return self.weights.config

    @config.setter
    def config(self, config: Any) -> None:
        self.weights.change(Change.TOLD, config=config)

    @property
    def params(self) -> Params:
        """{Hugging Face name: array of the backend}."""
        return self.weights.params

    @params.setter
    def params(self, params: Params) -> None:
        self.weights.change(Change.OVERWRITTEN, {PARAMS: params})

    @property
    def provenance(self) -> Provenance:
        return self.weights.origin.provenance

    @provenance.setter
    def provenance(self, provenance: Provenance) -> None:
        self.weights.describe(provenance=provenance)

    # --- adapters -----------------------------------------------------------------------------------------------

    enable_lora = delegate("adapters", AdapterSet.enable_lora)
    set_adapter = delegate("adapters", AdapterSet.set_adapter)
    merge_lora = delegate("adapters", AdapterSet.merge_lora)
    unmerge_lora = delegate("adapters", AdapterSet.unmerge_lora)
    keep_merged = delegate("adapters", AdapterSet.keep_merged)
    load_adapter = delegate("adapters", AdapterSet.load_adapter)
    save_adapter = delegate("adapters", AdapterSet.save_adapter)
    trainable_names = delegate("adapters", AdapterSet.trainable_names)
    plain_param = delegate("weights", Weights.plain_param)
    plain_names = delegate("weights", Weights.plain_names)
    plain_config = delegate("weights", Weights.plain_config)

    # --- where the arrays are -----------------------------------------------------------------------------------

    quantize = delegate("weights", Weights.quantize)
    own = delegate("weights", placement.own)
    owned = delegate("weights", placement.owned)

    def to(self, backend: str | None = None, device: str | None = None, dtype: str | None = None) -> Self:
        """Move the weights, all adapters and what the optimizer remembers to another backend or device; returns self.

        backend: None: the same. device: None: the same where the other backend sees it, else the best that it sees.
        dtype: "float32", "bfloat16" or "float16" for the base weights, None: as they are. Adapters stay in float32;
        what the optimizer remembers is dropped with another dtype, and both are in memory until all are made. Where
        both backends use the same memory, arrays are handed over without a copy (DLPack), apart from those that one of
        them has to have otherwise, such as JAX and TensorFlow aligned to 64 bytes; else one after the other, so that no
        more than one is there twice. Arrays that were given away (`params`, or to a module of to_torch) keep their
        values whatever is trained after the move, and are not written to by it.

        Raises UnknownBackend, BackendNotInstalled, DeviceError (a device that is not there, or has too little free
        memory), ConfigError (an attention function or a layer written for the old backend alone). The model is then
        where it was.
        """
        placement.to(self.weights, backend, device, dtype, self.trainable_names() if self.has_adapter else ())
        return self

    def share(self, params: Params, xp: Backend | None = None, dtype: str | None = None) -> None:
        """See placement.share. A merge is final from then on: what is trained from outside cannot be taken out of the
        weights again."""
        self.keep_merged()
        placement.share(self.weights, params, xp, dtype)

    def load_params(self, params: Mapping[str, Any]) -> None:
        """Take over weights from a training loop of the user's own: arrays of any framework under the names of
        `params`, all of them or those of trainable_names() alone. They are copied, in the model's dtype (an adapter's
        in float32). What the optimizer remembers of the last `fit` is dropped.

        Raises InputError, with every name and shape that does not fit, before anything is changed, and for arrays that
        are sharded over processes; MixedBackends.
        """
        taken, before = placement.take(self.weights, params, self.trainable_names()), self.params
        of_adapter = self.trainable_names() if self.has_adapter else []
        base = [name for name in taken if name not in of_adapter]
        as_it_was = all(
            params[name] is before[name] or placement.same(self.xp, taken[name], before[name]) for name in base
        )
        if base:
            self.keep_merged()
        change = Change.RELOADED if as_it_was else Change.LOADED
        self.weights.change(change, {PARAMS: self.params | taken})

    # --- the model ----------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        numbers = sum(map(count, flatten(self.base_model).values()))
        return f"Backbone({self.config.model_type!r}, {numbers:,} parameters, {self.placed()})"

    def placed(self) -> str:
        """For reprs: backend, device, dtype, and the adapter if there is one."""
        where = f"backend={self.xp.name!r}, device={self.xp.device!r}, dtype={self.dtype!r}"
        state = " (merged)" if self.merged else ""
        return where if self.active_adapter is None else f"{where}, adapter={self.active_adapter!r}{state}"

    @property
    def module(self) -> Any:
        """The model with its arrays: a tree of Modules, called as module(xp, ...)."""
        return bind(self.model, self.params)

    @property
    def num_parameters(self) -> int:
        return sum(map(count, {id(x): x for x in self.params.values()}.values()))  # a head may be the embeddings

    def __call__(self, inputs: Any) -> Array:
        """Hidden states (batch, time, width), an array of the backend, of token ids (batch, time).

        Of an image encoder: (batch, tokens, width) of pixels (batch, channels, height, width), normalised floats as
        modelhub.processing.image.ImageProcessor makes them.
        """
        if self.model.reads == IMAGES:
            x = self.xp.array(inputs, self.dtype)
        else:
            x = self.xp.array(self.check_ids(inputs), "int32")
        return self.weights.snapshot().run("hidden", _hidden_program, x)

    def collect(self, pixels: Any) -> dict[str, list[Array]]:
        """What an image encoder computes on its way, as transformers' output_hidden_states and output_attentions do.

        "hidden_states": (batch, tokens, width) before each block and after the last; "attentions": (batch, heads,
        tokens, tokens) of each block. Not compiled. Raises InputError for models of text.
        """
        if self.model.reads != IMAGES:
            kind = self.config.model_type
            raise InputError(f"hidden states and attention maps are there for image encoders, not for {kind}")
        collected: dict[str, list[Array]] = {"hidden_states": [], "attentions": []}
        self.module.encode(self.xp, self.xp.array(pixels, self.dtype), collected)
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

        table = Table("part", "tensors", "parameters", "memory", title=title)
        for column in table.columns[1:]:
            column.justify = "right"

        def row(what: str, params: Params) -> None:
            numbers, size = (sum(map(measure, params.values())) for measure in (count, nbytes))
            table.add_row(what, str(len(params)), f"{numbers:,}", f"{size / 1e6:,.1f} MB")

        parts: dict[str, Params] = {}
        for name, array in self.params.items():
            parts.setdefault(_part(name), {})[name] = array
        for part, params in parts.items():
            row(part, params)
        table.add_section()
        row("total", self.params)
        if (adapter := self.adapter) is not None:
            state = "merged" if self.merged else "trainable"
            row(f"{state}: adapter {adapter.name!r}, rank {adapter.config.rank}", adapter.params)
            endings = sorted({module.rpartition(".")[2] for module in adapter.modules})
            table.caption = f"LoRA on {len(adapter.modules)} layers: {', '.join(endings)}"
        else:
            row("trainable", self.params)
        Console().print(table)


def _hidden_program(now: Snapshot) -> Any:
    xp = now.xp

    def hidden(model: Any, inputs: Array) -> Array:
        return model.hidden(xp, inputs)

    hot = None if now.skeleton.reads == IMAGES else False  # images mostly have one size, texts have any
    return xp.compile(hidden, now.skeleton, hot=hot)


def _part(name: str) -> str:
    """ "model.layers.7.mlp.up_proj.weight" belongs to "model.layers.*.mlp"."""
    pieces = ["*" if piece.isdigit() else piece for piece in name.split(".")]
    part = ".".join(pieces[:4] if "*" in pieces else pieces[:2])
    return f"{part} (LoRA)" if MARK in name else part
