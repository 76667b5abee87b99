"""An opened preset: config, names, tokenizer and files of weights, of whichever format."""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modelhub.core import custom
from modelhub.core.lora import HEAD_WEIGHT, TABLE_WEIGHT
from modelhub.core.tree import flatten
from modelhub.errors import CheckpointError, ConfigError
from modelhub.families import family_of
from modelhub.families.config import check_kinds, unknown_keys
from modelhub.families.kerashub import BACKBONES, backbone_of
from modelhub.families.naming import NameMap
from modelhub.hub.checkpoint import Checkpoint, open_folder
from modelhub.hub.gguf import open_gguf
from modelhub.hub.gguf_settings import end_tokens, read_origin, read_settings
from modelhub.hub.kerashub import has_weights, is_kerashub, open_kerashub
from modelhub.hub.preset import Preset
from modelhub.hub.provenance import Provenance
from modelhub.hub.quantized_folders import QuantizedFolder, check_config, stored_dtype
from modelhub.hub.quantized_modules import KEY as QUANTIZATION
from modelhub.model.options import LoadOptions, resolve_preset
from modelhub.processing.guards import read_json
from modelhub.processing.tokenizer import Tokenizer

log = logging.getLogger("modelhub")

# In config.json, of the user's own: [[pattern, name of a layer], ...], in that order; the name of an attention function
LAYERS, ATTENTION = "modelhub_layers", "modelhub_attention"
# In its quantization_config: the head, which is quantised, is the table of the embeddings, of which the files have
# floats too, for other tools. A tool that changes one of the two writes a quantization_config of its own.
TIED = "modelhub_tied"


@dataclass(kw_only=True)
class Source:
    """An opened preset: everything that can be known of it without reading weights. Close it after loading.

    kind: of its names, as a family's `names` takes it. config: the family's; model: the abstract skeleton. tokenizer,
    checkpoint, settings: make the tokenizer, open the files of weights, once, for as long as the source is open, and
    read what is said of generation. metadata: of a GGUF file. told: what a file says of where the model comes from; of
    a folder, modelhub.json says it.

    layers: {pattern: name} of the user's own, which are in `model` once `with_layers` has put them there; new_layers:
    where those stand that the files know nothing of, so that their parameters may be missing there. new_parts: names of
    parts of the model whose parameters start anew, whatever the files have. attention: the name of the user's own.
    part_of: the model_type of the larger model that config.json describes. quantization: how its weights are quantised,
    where config.json says that they are.
    """

    kind: str
    preset: Preset
    config: Any
    model: Any
    names: NameMap
    tokenizer: Callable[[], Tokenizer]
    checkpoint: Callable[[], Checkpoint]
    settings: Callable[[], dict[str, Any]]
    opened: contextlib.ExitStack
    metadata: Mapping[str, Any] = field(default_factory=dict)
    told: Provenance | None = None
    layers: Mapping[str, str] = field(default_factory=dict)
    new_layers: tuple[str, ...] = ()
    new_parts: tuple[str, ...] = ()
    attention: str | None = None
    part_of: str | None = None
    quantization: Mapping[str, Any] | None = None

    @property
    def generation_config(self) -> dict[str, Any]:
        """Raises ConfigError for values of other kinds than their keys say."""
        found = self.settings()
        check_kinds(found, "GGUF metadata" if self.metadata else "generation_config.json")
        return found

    def close(self) -> None:
        self.opened.close()


@contextlib.contextmanager
def open_source(preset: str | os.PathLike[str], options: LoadOptions) -> Iterator[Source]:
    """A preset's Source for as long as the block lasts."""
    found = resolve_preset(preset, options)
    source = open_preset(found, strict=options.get("strict", False), weights=options.get("load_weights", True))
    with contextlib.closing(source):
        yield source


def open_preset(preset: Preset, *, strict: bool = False, weights: bool = False) -> Source:
    """Read config and metadata; build the skeleton. Raises ConfigError and CheckpointError.

    strict: as in LoadOptions. weights: whether they are going to be read, so that they are asked what head there is.
    """
    opened = contextlib.ExitStack()
    try:
        if preset.path.is_file():
            return _open_gguf(preset, opened)
        if (data := _read(preset.path / "config.json")) is None:
            found = ", ".join(sorted(p.name for p in preset.path.iterdir())[:10]) or "nothing"
            raise ConfigError(
                f"{preset.path} holds no config.json (found: {found}); a preset is a Hugging Face model folder, a "
                ".gguf file or a KerasHub preset's folder"
            )
        if is_kerashub(data):
            return _open_kerashub(preset, data, opened)
        source = _open_hf(preset, data, opened, strict)
        return _with_the_head_of_the_files(source, strict) if weights else source
    except BaseException:
        opened.close()
        raise


def _open_hf(preset: Preset, data: dict[str, Any], opened: contextlib.ExitStack, strict: bool) -> Source:
    layers, attention = data.pop(LAYERS, None) or [], data.pop(ATTENTION, None)
    if not isinstance(layers, list) or not all(map(_is_pair, layers)):
        raise ConfigError(f"{preset.path}: {LAYERS} must be [[pattern, name of a layer], ...], found {layers!r:.200}")
    if not isinstance(attention, str | None):
        raise ConfigError(f"{preset.path}: {ATTENTION} must be the name of a function, found {attention!r:.200}")
    quantization = _quantization(preset.path, data)
    if quantization is not None and quantization.get(TIED):
        data["tie_word_embeddings"] = True
    family = family_of(data.get("model_type"))
    config = family.Config.from_hf(data)
    if unknown := unknown_keys(config.extra):
        problem = f"{preset.path / 'config.json'} has keys that modelhub does not know: {', '.join(unknown)}"
        if strict:
            raise ConfigError(
                f"{problem}. If they change nothing, load it without strict=True: it is what they are for"
            )
        log.warning("%s. They are kept as they are; strict=True would refuse them", problem)
    return Source(
        kind="hf", preset=preset, config=config, model=family.Model.abstract(config), names=family.names("hf", config),
        tokenizer=lambda: Tokenizer.from_folder(preset.path),
        checkpoint=functools.cache(lambda: opened.enter_context(_open_folder(preset.path, quantization))),
        settings=lambda: _read(preset.path / "generation_config.json") or {},
        opened=opened, layers=dict(layers), attention=attention, quantization=quantization,
        part_of=data["model_type"] if "text_config" in data else None,
    )  # fmt: skip


def _quantization(folder: Path, data: dict[str, Any]) -> Mapping[str, Any] | None:
    """What config.json says of quantised weights, taken out of it: what is loaded and saved again says its own."""
    parts = [data, text] if isinstance(text := data.get("text_config"), dict) else [data]
    found = [entry for part in parts if (entry := part.pop(QUANTIZATION, None))]
    if not found:
        return None
    check_config(found[0], folder)
    return found[0]


def _open_folder(folder: Path, quantization: Mapping[str, Any] | None) -> Checkpoint:
    if quantization is None:
        return open_folder(folder)
    return QuantizedFolder(folder, quantization, {TABLE_WEIGHT: HEAD_WEIGHT} if quantization.get(TIED) else {})


def _with_the_head_of_the_files(source: Source, strict: bool) -> Source:
    """As transformers has it: a head in the files that is not the table counts, whatever the config says of it.

    And one that should be in the files, and is not, starts at random, with a warning.
    """
    tied = getattr(source.config, "tie_word_embeddings", None)
    if tied is None or any(custom.means(pattern, "lm_head") for pattern in source.layers):  # a head of the user's own
        return source
    untied = with_own_head(source) if tied else source
    if HEAD_WEIGHT not in flatten(untied.model):  # another kind of model
        return source
    try:
        checkpoint = source.checkpoint()
    except CheckpointError:  # loading will tell; before it something else may be refused
        return source
    found = {ours[0]: name for name in checkpoint.tensors if (ours := untied.names.to_ours(name)) is not None}
    if not tied and HEAD_WEIGHT not in found:
        problem = f"{source.preset.path}: config.json says that the head is not the table, and no file has one"
        if strict:
            raise CheckpointError(f"{problem}. If it is, write tie_word_embeddings=true into config.json")
        log.warning("%s: it starts at random, and needs training (or tie_word_embeddings=true there)", problem)
        return dataclasses.replace(source, new_parts=(*source.new_parts, "lm_head"))
    if not tied or HEAD_WEIGHT not in found or TABLE_WEIGHT not in found:
        return source
    names = (found[HEAD_WEIGHT], found[TABLE_WEIGHT])
    head, table = (checkpoint.read(name, stored_dtype(checkpoint.tensors[name])) for name in names)
    if head.shape == table.shape and np.array_equal(head, table):
        return source
    log.warning(
        "%s: config.json says that the head is the table, and the files have another one, which is taken; saved models "
        "say tie_word_embeddings=false", source.preset.path,
    )  # fmt: skip
    return untied


def with_own_head(source: Source) -> Source:
    """The same with a head that is not the table of the embeddings."""
    config = dataclasses.replace(source.config, tie_word_embeddings=False)
    names = family_of(config.model_type).names(source.kind, config)
    return dataclasses.replace(source, config=config, names=names, model=type(source.model).abstract(config))


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _open_gguf(preset: Preset, opened: contextlib.ExitStack) -> Source:
    gguf = opened.enter_context(open_gguf(preset.path))
    family = family_of(gguf.metadata.get("general.architecture"))
    config = family.Config.from_gguf(gguf)
    licence, base_model = read_origin(gguf.metadata)
    return Source(
        kind="gguf", preset=preset, config=config, model=family.Model.abstract(config),
        names=family.names("gguf", config), tokenizer=lambda: Tokenizer.from_gguf(gguf.metadata),
        checkpoint=lambda: gguf, settings=lambda: read_settings(gguf.metadata), opened=opened, metadata=gguf.metadata,
        told=Provenance(licence=licence, base_model=base_model),
    )  # fmt: skip


def _open_kerashub(preset: Preset, data: dict[str, Any], opened: contextlib.ExitStack) -> Source:
    family = family_of(BACKBONES[backbone_of(data)])
    data |= {"task": _read(preset.path / "task.json")}
    config = family.Config.from_keras(data)  # what it has to say is clearer than what the weights do
    has_head = bool(getattr(config, "num_labels", None))
    checkpoint = functools.cache(lambda: opened.enter_context(open_kerashub(preset.path, has_head)))
    config = family.Config.from_keras(data, checkpoint().tensors if has_weights(preset.path) else None)
    tokenizer = functools.cache(lambda: Tokenizer.from_folder(preset.path))
    return Source(
        kind="keras", preset=preset, config=config, model=family.Model.abstract(config),
        names=family.names("keras", config), tokenizer=tokenizer, checkpoint=checkpoint,
        settings=lambda: _keras_settings(tokenizer()), opened=opened,
    )  # fmt: skip


def _keras_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """What ends a text: KerasHub has it in the code of its tasks. Chat models end their turns otherwise."""
    found = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": end_tokens(tokenizer.token_to_id, [tokenizer.eos_token_id], tokenizer.special_ids),
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {key: value for key, value in found.items() if value is not None}


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path, ConfigError) if path.is_file() else None
