"""Backbone: a model's weights on a backend, without tokenizer and text."""

import functools
import logging
import re
from typing import Any, Self

import numpy as np

from modelhub.core.backends import get_backend, of
from modelhub.core.backends.base import Array, Backend
from modelhub.core.lora import MARK
from modelhub.core.tree import Params
from modelhub.errors import CheckpointError, InputError, MixedBackends
from modelhub.generation.decode import hidden_states
from modelhub.hub.preset import Preset
from modelhub.hub.provenance import PRESET, Provenance, read_provenance
from modelhub.hub.sources import HubSource
from modelhub.tasks.adapters import Adapters
from modelhub.tasks.loading import choose_dtype, load_params, opened, random_params

log = logging.getLogger("modelhub")

RANDOM = Provenance(from_scratch=True)  # weights that nothing was loaded into


class Backbone(Adapters):
    """model: the abstract skeleton; params: {Hugging Face name: array}; xp: the backend they are on.

    provenance: where the weights come from, and what they were trained on.
    """

    def __init__(
        self, model: Any, params: Params, xp: Backend, config: Any, dtype: str,
        provenance: Provenance = RANDOM,
    ):  # fmt: skip
        self.xp = xp
        self.config = config
        self.dtype = dtype
        self.base_model = model
        self.provenance = provenance
        self.adapters, self.active_adapter, self._replaced = {}, None, {}
        self._use(model, params)

    def _use(self, model: Any, params: Params) -> None:
        self.model = model
        self.params = params
        self._hidden = self.xp.compile(functools.partial(hidden_states, self.xp), model, hot=False)

    @classmethod
    def from_preset(
        cls,
        preset: str,
        *,
        backend: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        offline: bool = False,
        token: str | None = None,
        cache_dir: str | None = None,
        load_weights: bool = True,
        seed: int = 0,
    ) -> Self:
        """As CausalLM.from_preset, without the tokenizer."""
        xp = get_backend(backend, device)
        with opened(preset, revision, offline, token, cache_dir, load_weights) as source:
            return cls.from_source(source, xp, dtype, load_weights, seed)

    @classmethod
    def from_source(cls, source: Any, xp: Backend, dtype: str | None, load_weights: bool, seed: int) -> Self:
        dtype = choose_dtype(dtype, xp, source)
        params = load_params(source, xp, dtype) if load_weights else random_params(source.model, xp, dtype, seed)
        provenance = provenance_of(source.preset) if load_weights else RANDOM
        return cls(source.model, params, xp, source.config, dtype, provenance)

    @property
    def params(self) -> Params:
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        found = of(params)
        if found != self.xp.name:
            raise MixedBackends(f"the model is on {self.xp.name} and the new weights are on {found}")
        self._params = params

    @property
    def num_parameters(self) -> int:
        return sum(map(self._count, self.params.values()))

    def __call__(self, token_ids: Any) -> Array:
        """Hidden states (batch, time, width), an array of the backend, of token ids (batch, time)."""
        return self._hidden(self.params, self.xp.array(self.check_ids(token_ids), "int32"))

    def check_ids(self, token_ids: Any) -> np.ndarray:
        """int32 (batch, time). Raises InputError for another shape or type, and for ids outside the vocabulary."""
        ids = np.asarray(token_ids)
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
            state = "merged" if self._replaced else "trainable"
            row(f"{state}: adapter {self.active_adapter!r}, rank {adapter.config.rank}", len(names), count, size)
            endings = sorted({module.rpartition(".")[2] for module in adapter.modules})
            table.caption = f"LoRA on {len(adapter.modules)} layers: {', '.join(endings)}"
        else:
            row("trainable", *map(sum, zip(*parts.values(), strict=True)))
        Console().print(table)

    @staticmethod
    def _count(array: Array) -> int:
        return int(np.prod(array.shape))


def provenance_of(preset: Preset) -> Provenance:
    """Of a folder or file, what it says itself; else the registry's card, or the address."""
    try:
        told = read_provenance(preset.path) if preset.path.is_dir() else None
    except CheckpointError as error:  # the model may be sound all the same
        log.warning("%s", error)
        told = None
    if (card := preset.card) is not None:
        base = preset.source if re.match("(hf|kaggle|https)://", preset.source) else PRESET + card.name
        return Provenance(base, card.base_model, card.licence)
    if preset.source.startswith("file://"):
        return told or Provenance()
    base_model = HubSource.parse(preset.source).repo if preset.source.startswith("hf://") else None
    return Provenance(preset.source, base_model, told.licence if told else None)


def _part(name: str) -> str:
    """ "model.layers.7.mlp.up_proj.weight" belongs to "model.layers.*.mlp"."""
    pieces = ["*" if piece.isdigit() else piece for piece in name.split(".")]
    part = ".".join(pieces[:4] if "*" in pieces else pieces[:2])
    return f"{part} (LoRA)" if MARK in name else part
