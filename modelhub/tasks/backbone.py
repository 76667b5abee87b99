"""Backbone: a model's weights on a backend, without tokenizer and text."""

import functools
from typing import Any, Self

import numpy as np

from modelhub.core.backends import get_backend, of
from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Params
from modelhub.errors import InputError, MixedBackends
from modelhub.hub.preset import resolve
from modelhub.tasks.loading import choose_dtype, load_params, open_preset, random_params


class Backbone:
    """model: the abstract skeleton; params: {Hugging Face name: array}; xp: the backend they are on."""

    def __init__(self, model: Any, params: Params, xp: Backend, config: Any, dtype: str):
        self.model = model
        self.xp = xp
        self.config = config
        self.dtype = dtype
        self.params = params
        self._hidden = xp.compile(functools.partial(_hidden, xp), model, hot=False)

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
        source = open_preset(
            resolve(
                preset, revision=revision, offline=offline, token=token, cache_dir=cache_dir, weights=load_weights
            )
        )  # fmt: skip
        try:
            return cls.from_source(source, xp, dtype, load_weights, seed)
        finally:
            source.close()

    @classmethod
    def from_source(cls, source: Any, xp: Backend, dtype: str | None, load_weights: bool, seed: int) -> Self:
        dtype = choose_dtype(dtype, xp, source)
        params = load_params(source, xp, dtype) if load_weights else random_params(source.model, xp, dtype, seed)
        return cls(source.model, params, xp, source.config, dtype)

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
        return sum(int(np.prod(array.shape)) for array in self.params.values())

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

        parts: dict[str, tuple[int, int]] = {}
        for name, array in self.params.items():
            part = _part(name)
            tensors, count = parts.get(part, (0, 0))
            parts[part] = (tensors + 1, count + int(np.prod(array.shape)))
        width = {"float32": 4}.get(self.dtype, 2)
        table = Table("part", "tensors", "parameters", "memory", title=title)
        for column in table.columns[1:]:
            column.justify = "right"
        for part, (tensors, count) in parts.items():
            table.add_row(part, str(tensors), f"{count:,}", f"{count * width / 1e6:,.1f} MB")
        total = self.num_parameters
        table.add_section()
        table.add_row("total", str(len(self.params)), f"{total:,}", f"{total * width / 1e6:,.1f} MB")
        Console().print(table)


def _part(name: str) -> str:
    """ "model.layers.7.mlp.up_proj.weight" belongs to "model.layers.*.mlp"."""
    pieces = ["*" if piece.isdigit() else piece for piece in name.split(".")]
    return ".".join(pieces[:4] if "*" in pieces else pieces[:2])


def _hidden(xp: Backend, model: Any, ids: Array) -> Array:
    return model.model(xp, ids)
