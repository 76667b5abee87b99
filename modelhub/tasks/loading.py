"""From a resolved preset to a model on a backend: config, names, shapes checked, then weights tensor by tensor."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from modelhub.core.backends.base import Backend
from modelhub.core.tree import Module, Params, check, flatten, initial_value
from modelhub.errors import CheckpointError, ConfigError, InputError
from modelhub.families import family_of
from modelhub.families.naming import KEEP, NameMap
from modelhub.hub.checkpoint import Checkpoint, open_folder
from modelhub.hub.gguf import GGUFFile, open_gguf
from modelhub.hub.preset import Preset, resolve
from modelhub.processing.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Source:
    """An opened preset: everything that can be known of it without reading weights. Close it after loading."""

    preset: Preset
    config: Any  # the family's Config
    model: Any  # the abstract skeleton of the family's Model
    generation_config: dict[str, Any]
    names: NameMap
    gguf: GGUFFile | None

    def tokenizer(self) -> Tokenizer:
        if self.gguf is not None:
            return Tokenizer.from_gguf(self.gguf.metadata)
        return Tokenizer.from_folder(self.preset.path)

    def checkpoint(self) -> Checkpoint:
        return self.gguf if self.gguf is not None else open_folder(self.preset.path)

    def close(self) -> None:
        if self.gguf is not None:
            self.gguf.close()


@contextlib.contextmanager
def opened(
    name: str, revision: str | None, offline: bool, token: str | None, cache_dir: str | None, weights: bool
) -> Iterator[Source]:
    """A preset's Source for as long as the block lasts; the arguments are those of modelhub.hub.preset.resolve."""
    source = open_preset(
        resolve(name, revision=revision, offline=offline, token=token, cache_dir=cache_dir, weights=weights)
    )
    try:
        yield source
    finally:
        source.close()


def open_preset(preset: Preset) -> Source:
    """Read config and metadata; build the skeleton. Raises ConfigError and CheckpointError."""
    if preset.path.is_file():
        gguf = open_gguf(preset.path)
        family = family_of(gguf.metadata.get("general.architecture"))
        config = family.Config.from_gguf(gguf)
        return Source(preset, config, family.Model.abstract(config), {}, family.names("gguf", config), gguf)
    data = _read_json(preset.path / "config.json")
    if data is None:
        found = ", ".join(sorted(p.name for p in preset.path.iterdir())[:10]) or "nothing"
        raise ConfigError(
            f"{preset.path} holds no config.json (found: {found}); a preset is a Hugging Face model folder"
        )
    family = family_of(data.get("model_type"))
    config = family.Config.from_hf(data)
    generation = _read_json(preset.path / "generation_config.json") or {}
    return Source(preset, config, family.Model.abstract(config), generation, family.names("hf", config), None)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object, found {type(data).__name__}")
    return data


def choose_dtype(dtype: str | None, xp: Backend, source: Source) -> str:
    """None: float32 on CPU, the checkpoint's own elsewhere."""
    if dtype is None:
        stored = source.config.extra.get("dtype") or source.config.extra.get("torch_dtype") or "bfloat16"
        dtype = "float32" if xp.device == "cpu" or stored not in DTYPES else stored
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


def load_params(source: Source, xp: Backend, dtype: str) -> Params:
    """All weights, read one tensor at a time; nothing is read before all names and shapes are checked."""
    where = str(source.preset.path)
    checkpoint = source.checkpoint()
    try:
        plan: dict[str, tuple[str, Any]] = {}
        for theirs in checkpoint.tensors:
            if (renamed := source.names.to_ours(theirs)) is None:
                continue
            ours, via = renamed
            if ours in plan:
                raise CheckpointError(f"{where}: tensors {plan[ours][0]!r} and {theirs!r} are both {ours!r}")
            plan[ours] = (theirs, via)
        check(source.model, {ours: checkpoint.tensors[theirs].shape for ours, (theirs, _) in plan.items()}, where)

        def read(theirs: str, via: Any) -> np.ndarray:
            if via is KEEP:
                return checkpoint.read(theirs, dtype)
            return via.to_ours(checkpoint.read(theirs, "float32")).astype(dtype, copy=False)

        progress = tqdm(
            plan.items(), desc=f"loading {source.preset.name}", unit="tensor", delay=2, leave=False, disable=None
        )
        return {ours: xp.put(read(theirs, via)) for ours, (theirs, via) in progress}
    finally:
        checkpoint.close()


def random_params(model: Module, xp: Backend, dtype: str, seed: int) -> Params:
    """Start values drawn from (seed, name): equal on every backend."""
    specs: Mapping[str, Any] = flatten(model)
    return {name: xp.put(initial_value(name, spec, seed).astype(dtype, copy=False)) for name, spec in specs.items()}
