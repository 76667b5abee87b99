"""From a resolved preset to a model on a backend: config, names, shapes checked, then weights tensor by tensor."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from modelhub.core import custom, leaves
from modelhub.core.backends.base import Backend, host_memory
from modelhub.core.tree import Module, Params, check, flatten, initial_value
from modelhub.errors import CheckpointError, ConfigError, InputError, ModelhubError, OutOfMemory
from modelhub.families import family_of
from modelhub.families.config import check_kinds, unknown_keys
from modelhub.families.kerashub import BACKBONES, backbone_of
from modelhub.families.naming import NameMap
from modelhub.habits import dtype_name
from modelhub.hub.checkpoint import Checkpoint, open_folder
from modelhub.hub.gguf import GGUFFile, open_gguf
from modelhub.hub.gguf_settings import end_tokens, read_origin, read_settings
from modelhub.hub.kerashub import H5Checkpoint, has_weights, is_kerashub, open_kerashub
from modelhub.hub.preset import Preset
from modelhub.hub.provenance import Provenance
from modelhub.kinds import IMAGES
from modelhub.model.options import LoadOptions, resolve_preset
from modelhub.model.origin import RANDOM, origin_of
from modelhub.model.quantizing import Quantizer, is_matrix
from modelhub.model.weights import Weights
from modelhub.processing.tokenizer import Tokenizer
from modelhub.progress import bar

log = logging.getLogger("modelhub")

LARGEST_JSON = 10_000_000  # bytes of a config
DTYPES = ("float32", "bfloat16", "float16")
# In config.json, of the user's own: [[pattern, name of a layer], ...], in that order; the name of an attention function
LAYERS, ATTENTION = "modelhub_layers", "modelhub_attention"


@dataclass
class Source(ABC):
    """An opened preset: everything that can be known of it without reading weights. Close it after loading.

    layers: {pattern: name} of the user's own, which are in `model` once `with_layers` has put them there; new_layers:
    where those stand that the files know nothing of, so that their parameters may be missing there. new_parts: names of
    parts of the model whose parameters start anew, whatever the files have. attention: the name of the user's own.
    part_of: the model_type of the larger model that config.json describes.
    """

    kind: ClassVar[str]  # of its names, as a family's `names` takes it

    preset: Preset
    config: Any  # the family's Config
    model: Any  # the abstract skeleton of the family's Model
    names: NameMap
    layers: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    new_layers: tuple[str, ...] = field(default=(), kw_only=True)
    new_parts: tuple[str, ...] = field(default=(), kw_only=True)
    attention: str | None = field(default=None, kw_only=True)
    part_of: str | None = field(default=None, kw_only=True)

    @property
    def generation_config(self) -> dict[str, Any]:
        return {}

    @property
    def told(self) -> Provenance | None:
        """What the file says of where the model comes from; of a folder, modelhub.json says it."""
        return None

    @abstractmethod
    def tokenizer(self) -> Tokenizer: ...

    @abstractmethod
    def checkpoint(self) -> Checkpoint: ...

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        pass


SourceT = TypeVar("SourceT", bound=Source)


class HuggingFaceSource(Source):
    kind = "hf"

    @property
    def generation_config(self) -> dict[str, Any]:
        generation = _read_json(self.preset.path / "generation_config.json") or {}
        check_kinds(generation, "generation_config.json")
        return generation

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.preset.path)

    def checkpoint(self) -> Checkpoint:
        return open_folder(self.preset.path)


@dataclass
class GGUFSource(Source):
    kind = "gguf"
    gguf: GGUFFile

    @property
    def generation_config(self) -> dict[str, Any]:
        generation = read_settings(self.gguf.metadata)
        check_kinds(generation, "GGUF metadata")
        return generation

    @property
    def told(self) -> Provenance | None:
        licence, base_model = read_origin(self.gguf.metadata)
        return Provenance(licence=licence, base_model=base_model)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self.gguf.metadata)

    def checkpoint(self) -> Checkpoint:
        return self.gguf

    def close(self) -> None:
        self.gguf.close()


@dataclass
class KerasHubSource(Source):
    kind = "keras"
    weights: Checkpoint | None

    @property
    def generation_config(self) -> dict[str, Any]:
        """What ends a text: KerasHub has it in the code of its tasks. Chat models end their turns otherwise."""
        tokenizer = self._tokenizer
        found = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": end_tokens(tokenizer.token_to_id, [tokenizer.eos_token_id], tokenizer.special_ids),
            "pad_token_id": tokenizer.pad_token_id,
        }
        return {key: value for key, value in found.items() if value is not None}

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.preset.path)

    def checkpoint(self) -> Checkpoint:
        return self.weights or open_kerashub(self.preset.path)

    def close(self) -> None:
        if self.weights is not None:
            self.weights.close()


@contextlib.contextmanager
def open_source(preset: str | os.PathLike[str], options: LoadOptions) -> Iterator[Source]:
    """A preset's Source for as long as the block lasts."""
    found = resolve_preset(preset, options)
    source = open_preset(found, strict=options.get("strict", False), weights=options.get("load_weights", True))
    try:
        yield source
    finally:
        source.close()


def open_preset(preset: Preset, *, strict: bool = False, weights: bool = False) -> Source:
    """Read config and metadata; build the skeleton. Raises ConfigError and CheckpointError.

    strict: as in LoadOptions. weights: whether they are going to be read, so that they are asked what head there is.
    """
    if preset.path.is_file():
        return _open_gguf(preset)
    data = _read_json(preset.path / "config.json")
    if data is None:
        found = ", ".join(sorted(p.name for p in preset.path.iterdir())[:10]) or "nothing"
        raise ConfigError(
            f"{preset.path} holds no config.json (found: {found}); a preset is a Hugging Face model folder, a .gguf "
            "file or a KerasHub preset's folder"
        )
    return _open_kerashub(preset, data) if is_kerashub(data) else _open_hf(preset, data, strict, weights)


def _open_hf(preset: Preset, data: dict[str, Any], strict: bool, weights: bool) -> Source:
    layers, attention = data.pop(LAYERS, None) or [], data.pop(ATTENTION, None)
    if not isinstance(layers, list) or not all(map(_is_pair, layers)):
        raise ConfigError(f"{preset.path}: {LAYERS} must be [[pattern, name of a layer], ...], found {layers!r:.200}")
    if not isinstance(attention, str | None):
        raise ConfigError(f"{preset.path}: {ATTENTION} must be the name of a function, found {attention!r:.200}")
    family = family_of(data.get("model_type"))
    config = family.Config.from_hf(data)
    if unknown := unknown_keys(config.extra):
        problem = f"{preset.path / 'config.json'} has keys that modelhub does not know: {', '.join(unknown)}"
        if strict:
            raise ConfigError(
                f"{problem}. If they change nothing, load it without strict=True: it is what they are for"
            )
        log.warning("%s. They are kept as they are; strict=True would refuse them", problem)
    names = family.names("hf", config)
    model = family.Model.abstract(config)
    source = HuggingFaceSource(
        preset, config, model, names, layers=dict(layers), attention=attention,
        part_of=data["model_type"] if "text_config" in data else None,
    )  # fmt: skip
    return _with_the_head_of_the_files(source, strict) if weights else source


_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"


def _with_the_head_of_the_files(source: Source, strict: bool) -> Source:
    """As transformers has it: a head in the files that is not the table counts, whatever the config says of it.

    And one that should be in the files, and is not, starts at random, with a warning.
    """
    tied = getattr(source.config, "tie_word_embeddings", None)
    if tied is None or any(custom.means(pattern, "lm_head") for pattern in source.layers):  # a head of the user's own
        return source
    untied = _untied(source) if tied else source
    if _HEAD not in flatten(untied.model):  # another kind of model
        return source
    try:
        opened = source.checkpoint()
    except CheckpointError:  # loading will tell; before it something else may be refused
        return source
    with contextlib.closing(opened) as checkpoint:
        found = {ours[0]: name for name in checkpoint.tensors if (ours := untied.names.to_ours(name)) is not None}
        if not tied and _HEAD not in found:
            problem = f"{source.preset.path}: config.json says that the head is not the table, and no file has one"
            if strict:
                raise CheckpointError(f"{problem}. If it is, write tie_word_embeddings=true into config.json")
            log.warning("%s: it starts at random, and needs training (or tie_word_embeddings=true there)", problem)
            return dataclasses.replace(source, new_parts=(*source.new_parts, "lm_head"))
        if not tied or _HEAD not in found or _TABLE not in found:
            return source
        head, table = (checkpoint.read(found[name], checkpoint.tensors[found[name]].dtype) for name in (_HEAD, _TABLE))
    if head.shape == table.shape and np.array_equal(head, table):
        return source
    log.warning(
        "%s: config.json says that the head is the table, and the files have another one, which is taken; saved models "
        "say tie_word_embeddings=false", source.preset.path,
    )  # fmt: skip
    return untied


def _untied(source: SourceT) -> SourceT:
    """The same with a head of its own."""
    config = dataclasses.replace(source.config, tie_word_embeddings=False)
    names = family_of(config.model_type).names(source.kind, config)
    return dataclasses.replace(source, config=config, names=names, model=type(source.model).abstract(config))


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _open_gguf(preset: Preset) -> Source:
    gguf = open_gguf(preset.path)
    try:
        family = family_of(gguf.metadata.get("general.architecture"))
        config = family.Config.from_gguf(gguf)
        return GGUFSource(preset, config, family.Model.abstract(config), family.names("gguf", config), gguf)
    except BaseException:
        gguf.close()
        raise


class _WithHead(Checkpoint):
    """The weights of a KerasHub backbone, and those of its task under "task/"."""

    def __init__(self, backbone: Checkpoint, head: Checkpoint):
        self._backbone, self._head = backbone, head
        self.tensors = backbone.tensors | {f"task/{name}": info for name, info in head.tensors.items()}

    def read(self, name: str, dtype: str = "float32") -> np.ndarray:
        part = self._head if name.startswith("task/") else self._backbone
        return part.read(name.removeprefix("task/"), dtype)

    def close(self) -> None:
        self._backbone.close()
        self._head.close()


def _open_kerashub(preset: Preset, data: dict[str, Any]) -> Source:
    family = family_of(BACKBONES[backbone_of(data)])
    data |= {"task": _read_json(preset.path / "task.json")}
    config = family.Config.from_keras(data)  # what it has to say is clearer than what the weights do
    weights = open_kerashub(preset.path) if has_weights(preset.path) else None
    try:
        head = preset.path / "task.weights.h5"
        if weights is not None and getattr(config, "num_labels", None) and head.is_file():
            weights = _WithHead(weights, H5Checkpoint(head))
        config = family.Config.from_keras(data, weights and weights.tensors)
        return KerasHubSource(preset, config, family.Model.abstract(config), family.names("keras", config), weights)
    except BaseException:
        if weights is not None:
            weights.close()
        raise


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ConfigError(f"{path} has {size} bytes; expected at most {LARGEST_JSON}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object, found {type(data).__name__}")
    return data


def stored_dtype(config: Any) -> str | None:
    """What the config says of the files' weights."""
    stored: str | None = config.extra.get("dtype") or config.extra.get("torch_dtype")
    return stored


def check_dtype(dtype: Any) -> str | None:
    """Its name, of how people write it, such as "bf16" or torch.bfloat16. Raises InputError for others."""
    name = dtype_name(dtype)
    if name not in (None, *DTYPES):
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return name


def choose_dtype(dtype: str | None, xp: Backend, source: Source) -> str:
    """None: float32 on CPU, the checkpoint's own elsewhere."""
    if (name := check_dtype(dtype)) is not None:
        return name
    stored = stored_dtype(source.config) or "bfloat16"
    return "float32" if xp.device == "cpu" or stored not in DTYPES else stored


def with_layers(source: Source, asked: Mapping[str, str] | None, xp: Backend) -> tuple[Source, dict[str, Module]]:
    """The source with its own layers and those that are asked for in its model, and what they are in place of.

    Raises ConfigError: see custom.replaced.
    """
    if asked is not None and not isinstance(asked, Mapping):
        raise ConfigError(f"layers must be {{pattern: name of a registered layer}}, got {asked!r}")
    new = {pattern: name for pattern, name in (asked or {}).items() if source.layers.get(pattern) != name}
    layers = {pattern: name for pattern, name in source.layers.items() if pattern not in new} | new
    if not layers:
        return source, {}
    if getattr(source.config, "tie_word_embeddings", False) and any(custom.means(at, "lm_head") for at in layers):
        # A head of its own needs a place of its own: it starts from the table of the embeddings.
        source = _untied(source)
    model, before = custom.replaced(source.model, layers, xp.name)
    fresh = tuple(place for place in before if any(custom.means(pattern, place) for pattern in new))
    return dataclasses.replace(source, model=model, layers=layers, new_layers=fresh), before


def try_layers(source: Source, xp: Backend, params: Params, before: Mapping[str, Module]) -> None:
    """Run the model once on next to nothing, for what is wrong with layers of the user's own: a ConfigError."""
    if not before:
        return
    try:
        _run_once(source.config, xp, params, custom.watched(xp, source.model, params, before))
    except ModelhubError:
        raise
    except Exception as error:  # what the rest of the model asks of the user's layers may fail in any way
        own = ", ".join(f"{name!r} for {pattern!r}" for pattern, name in source.layers.items())
        raise ConfigError(
            f"the model with layers of your own ({own}) raised {type(error).__name__}: {error}. A layer needs what the "
            f"rest of the model reads of the one that it replaces"
        ) from error


def _run_once(config: Any, xp: Backend, params: Params, model: Any) -> None:
    if model.reads != IMAGES:
        model.logits(xp, model.hidden(xp, xp.array([[0, 1]], "int32")))
        return
    pixels = xp.zeros((1, config.num_channels, *config.size), leaves.dtype_of(next(iter(params.values()))))
    hidden = model.hidden(xp, pixels)
    if config.num_labels:
        model.logits(xp, hidden)


def load_weights(source: Source, xp: Backend, options: LoadOptions) -> Weights:
    """A preset's weights. dtype, load_weights, seed and layers of the options are what counts here."""
    read, seed = options.get("load_weights", True), options.get("seed", 0)
    if xp.own_attention is None:
        xp = custom.with_attention(xp, source.attention)
    source, before = with_layers(source, options.get("layers"), xp)
    dtype = choose_dtype(options.get("dtype"), xp, source)
    quantize = options.get("quantize")
    if read:
        params = load_params(source, xp, dtype, seed, quantize)
    else:
        params = random_params(source.model, xp, dtype, seed, quantize)
    try_layers(source, xp, params, before)
    origin = dataclasses.replace(origin_of(source.preset, source.told) if read else RANDOM, part_of=source.part_of)
    if source.new_layers:  # as they are now they are nowhere else; a new head goes with the adapters
        origin = dataclasses.replace(origin, identity=None)
    if read and not source.new_layers and not source.new_parts and quantize is None:
        origin = dataclasses.replace(origin, untouched=source.preset.path)
    return Weights(source.model, params, xp, source.config, dtype, origin, source.layers, source.new_layers)


def load_params(source: Source, xp: Backend, dtype: str, seed: int = 0, quantize: Any = None) -> Params:
    """All weights, read one tensor at a time; nothing is read before all names and shapes are checked.

    Parameters of new layers that the files do not have, or have in another shape, start from (seed, name), and so do
    those of new parts.
    """
    where = str(source.preset.path)
    checkpoint = source.checkpoint()
    anew = tuple(f"{part}." for part in source.new_parts)
    try:
        plan: dict[str, tuple[str, Any]] = {}
        for theirs in checkpoint.tensors:
            if (renamed := source.names.to_ours(theirs)) is None:
                continue
            ours, via = renamed
            if ours.startswith(anew):
                continue
            if ours in plan:
                raise CheckpointError(f"{where}: tensors {plan[ours][0]!r} and {theirs!r} are both {ours!r}")
            plan[ours] = (theirs, via)
        shapes = {ours: via.our_shape(checkpoint.tensors[theirs].shape) for ours, (theirs, via) in plan.items()}
        wanted: dict[str, Any] = flatten(source.model)
        new = {name: spec for name, spec in wanted.items() if name.startswith(anew)}
        new |= _new_params(source, {name: spec for name, spec in wanted.items() if name not in new}, plan, shapes)
        check(source.model, shapes | {name: spec.shape for name, spec in new.items()}, where)

        quantizer = Quantizer(quantize, {n: s.shape for n, s in wanted.items() if is_matrix(n, s)})
        progress = bar(plan.items(), desc=f"loading {source.preset.name}", unit="tensor")
        params = {
            ours: quantizer.from_file(xp, ours, checkpoint, theirs, via, dtype) for ours, (theirs, via) in progress
        }
        quantizer.tell(source.preset.name)
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        size = sum(leaves.size(shape, dtype) for shape in shapes.values())
        free = host_memory()
        there = "more than this process can have" if free is None else f"and {free / 1e6:,.0f} MB are free"
        raise OutOfMemory(
            f"{source.preset.name}: its weights take {size / 1e6:,.0f} MB in {dtype}, {there}. Take a smaller model or "
            f"dtype, close other programs, or raise the limit of the process (ulimit -v)"
        ) from error
    finally:
        checkpoint.close()
    for name, spec in new.items():
        table = params.get(_TABLE)
        if name == _HEAD and not name.startswith(anew) and table is not None and tuple(table.shape) == spec.shape:
            params[name] = xp.copy(table)  # the head was tied to it
        else:
            value = initial_value(name, spec, seed).astype(dtype, copy=False)
            params[name] = quantizer.leaf(xp, name, value, dtype)
    return params


def _new_params(
    source: Source, wanted: dict[str, Any], plan: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Specs of what the files lack, or have otherwise, of new layers; what those leave over goes from the plan."""
    if not source.new_layers:
        return {}
    inside = tuple(f"{place}." for place in source.new_layers)
    for name in [name for name in plan if name.startswith(inside)]:
        if name not in wanted or wanted[name].shape != shapes[name]:
            del plan[name], shapes[name]
    theirs = [name for name in wanted if name.startswith(inside)]
    new = {name: wanted[name] for name in theirs if name not in plan}
    if new:
        log.warning(
            "%d of the %d parameters in layers of your own are not in the checkpoint and start anew: train all "
            "weights, or these first, as an adapter alone leaves them as they are", len(new), len(theirs),
        )  # fmt: skip
    return new


def random_params(model: Module, xp: Backend, dtype: str, seed: int, quantize: Any = None) -> Params:
    """Start values drawn from (seed, name): equal on every backend."""
    specs: Mapping[str, Any] = flatten(model)
    quantizer = Quantizer(quantize, {name: spec.shape for name, spec in specs.items() if is_matrix(name, spec)})
    return {
        name: quantizer.leaf(xp, name, initial_value(name, spec, seed).astype(dtype, copy=False), dtype)
        for name, spec in specs.items()
    }
