"""From an opened preset to a model on a backend: names and shapes checked, then weights tensor by tensor."""

import dataclasses
import errno
from collections.abc import Mapping
from typing import Any

from modelhub.core import custom, leaves
from modelhub.core.backends.base import Backend, host_memory
from modelhub.core.lora import HEAD_WEIGHT, TABLE_WEIGHT
from modelhub.core.tree import Module, Params, check, flatten, initial_value
from modelhub.errors import CheckpointError, InputError, OutOfMemory
from modelhub.habits import dtype_name
from modelhub.model.options import LoadOptions
from modelhub.model.origin import RANDOM, origin_of
from modelhub.model.own_layers import new_params, try_layers, with_layers
from modelhub.model.source import Source
from modelhub.model.weights import Weights
from modelhub.progress import bar
from modelhub.quantizing.quantizer import Quantizer, is_matrix

DTYPES = ("float32", "bfloat16", "float16")


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
    if read and not source.new_layers and not source.new_parts and quantize is None and source.quantization is None:
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
        new |= new_params(source, {name: spec for name, spec in wanted.items() if name not in new}, plan, shapes)
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
    for name, spec in new.items():
        table = params.get(TABLE_WEIGHT)
        if name == HEAD_WEIGHT and not name.startswith(anew) and table is not None and tuple(table.shape) == spec.shape:
            params[name] = xp.copy(table)  # the head was tied to it
        else:
            value = initial_value(name, spec, seed).astype(dtype, copy=False)
            params[name] = quantizer.leaf(xp, name, value, dtype)
    return params


def random_params(model: Module, xp: Backend, dtype: str, seed: int, quantize: Any = None) -> Params:
    """Start values drawn from (seed, name): equal on every backend."""
    specs: Mapping[str, Any] = flatten(model)
    quantizer = Quantizer(quantize, {name: spec.shape for name, spec in specs.items() if is_matrix(name, spec)})
    return {
        name: quantizer.leaf(xp, name, initial_value(name, spec, seed).astype(dtype, copy=False), dtype)
        for name, spec in specs.items()
    }
