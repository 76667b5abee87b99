"""Between adapters and PEFT's folders: names, shapes, and what a folder has to fit."""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from modelhub.core import custom, lora
from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Params
from modelhub.errors import CheckpointError
from modelhub.families import family_of
from modelhub.families.naming import NameMap
from modelhub.hub.adapter_parts import joined, spelled, split
from modelhub.hub.adapters import AdapterFiles
from modelhub.hub.provenance import Provenance
from modelhub.kinds import TaskKind
from modelhub.model.weights import Weights

if TYPE_CHECKING:
    from modelhub.model.adapters import Adapter

log = logging.getLogger("modelhub")


def names_in_files(weights: Weights) -> NameMap:
    """Between our names of layers and those in PEFT's files, where they differ."""
    config, origin = weights.config, weights.origin
    names = getattr(family_of(config.model_type), "adapter_names", None)
    # Weights that are nowhere else are going to be saved as what they are here.
    return names(config, None if origin.identity is None else origin.part_of) if names else NameMap()


def as_files(adapter: "Adapter", kind: TaskKind, base: str, revision: str | None) -> AdapterFiles:
    """What a PEFT folder of the adapter holds, under PEFT's names.

    kind: what it is for. base, revision: of the base model.
    """
    config, arrays, weights = adapter.config, adapter.params, adapter.weights
    xp, names = weights.xp, names_in_files(weights)

    def theirs_of(module: str) -> str:
        name = names.to_theirs(module)[0]
        return name.removeprefix("model.") if kind.auto_class == "AutoModel" else name  # it has no head beside it

    theirs = {module: theirs_of(module) for module in lora.linears(lora.with_own_head(weights.layout.base))}
    full = {module: spelled(name, names.parts) for module, name in theirs.items()}
    short = {module: {name.rpartition(".")[2] for name in found} for module, found in full.items()}
    targets = sorted({name for module in adapter.modules for name in short[module]})
    # PEFT looks for short names in the parts of a model that are not here, too.
    alone = weights.origin.identity is None or weights.origin.part_of is None
    if not alone or [module for module in theirs if short[module] & {*targets}] != adapter.modules:
        targets = [name for module in adapter.modules for name in full[module]]
    parts = [name.rpartition(".") for name in adapter.whole]
    whole = {f"{module}.{kind}": f"{theirs_of(module)}.{kind}" for module, _, kind in parts}
    saved = {found for name in whole.values() for found in spelled(name.rpartition(".")[0], names.parts)}
    files = AdapterFiles(
        rank=config.rank,
        alpha=config.rank if config.alpha is None else config.alpha,
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        targets=targets,
        rank_pattern={theirs[module]: rank for module, rank in config.rank_pattern.items()},
        alpha_pattern={theirs[module]: alpha for module, alpha in config.alpha_pattern.items()},
        base=base,
        tensors={
            f"{theirs[module]}{mark}{kind}": xp.get(arrays[f"{module}{mark}{kind}"])
            for module, mark, kind in (key.partition(lora.MARK) for key in arrays if key not in whole)
        },
        whole={theirs: xp.get(arrays[ours]) for ours, theirs in whole.items()},
        modules_to_save=sorted(saved if not alone else {name.rpartition(".")[2] for name in saved}),
        revision=revision,
        task_type=kind.peft,
    )
    return split(files, names.parts)


def with_our_names(files: AdapterFiles, names: NameMap, folder: str | os.PathLike[str]) -> AdapterFiles:
    """names: between ours and those in the files. What is of parts that are not loaded is left out, with a warning."""
    modules = {key.partition(lora.MARK)[0] for key in files.tensors} | {k.rpartition(".")[0] for k in files.whole}
    ours = {module: found[0] for module in modules if (found := names.to_ours(module))}
    if unused := sorted(modules - ours.keys()):
        log.warning(
            "%s adapts %d layers of parts that are not loaded here, such as %s: they are left out, also where this "
            "adapter is saved", folder, len(unused), unused[0],
        )  # fmt: skip

    def renamed(table: Mapping[str, Any], module_of: Callable[[str], str]) -> dict[str, Any]:
        kept = {key: value for key, value in table.items() if module_of(key) in ours}
        return {ours[module_of(key)] + key[len(module_of(key)) :]: value for key, value in kept.items()}

    def of_parameter(key: str) -> str:
        return key.rpartition(".")[0]

    files = dataclasses.replace(
        files,
        rank_pattern=renamed(files.rank_pattern, str),
        alpha_pattern=renamed(files.alpha_pattern, str),
        tensors=renamed(files.tensors, lambda key: key.partition(lora.MARK)[0]),
        whole=renamed(files.whole, of_parameter),
        copies=frozenset(renamed(dict.fromkeys(files.copies), of_parameter)),
    )
    return joined(files, names.parts)


def without_copies(xp: Backend, files: AdapterFiles, params: Params) -> dict[str, np.ndarray]:
    """The whole parameters of an adapter, but for those that say what the base model says."""
    head, table = lora.HEAD_WEIGHT, lora.TABLE_WEIGHT
    wanted = {name.rpartition(".")[2] for name in files.modules_to_save}
    found: dict[str, np.ndarray] = {}
    for name, array in files.whole.items():
        tied = name == head and head not in params and table in params
        base = params.get(table if tied else name)
        copied = name in files.copies or name.split(".")[-2] not in wanted
        if copied and base is not None and tuple(base.shape) == array.shape:
            stored = xp.get(own_copy(xp, base))
            if np.array_equal(stored, array.astype(stored.dtype)):
                continue
        found[name] = array
        if tied and name in files.copies:  # there it is one array with the table, and so it stays
            found.setdefault(table, array)
    return found


def check_pieces(weights: Weights, made: Provenance | None, folder: str | os.PathLike[str]) -> None:
    """What an adapter's maker had in the base model of their own must be in this one."""
    layers, xp = weights.layers, weights.xp
    if made and made.layers and made.layers != tuple(layers.items()):
        raise CheckpointError(
            f"{folder}: this adapter is for a base model with layers of its maker's own, and this model has "
            f"{dict(layers) or 'none'}. Load the base model with layers={dict(made.layers)}, where they are "
            f"registered, and the adapter on it"
        )
    own = custom.attention_name(xp)
    if made and made.attention and made.attention != own:
        log.warning(
            "%s was trained with the attention function %r, and this model has %s: its answers may differ. Load "
            "the base model with attention=%r, where it is registered", folder, made.attention,
            f"{own!r}" if own else "the usual one", made.attention,
        )  # fmt: skip


def own_copy(xp: Backend, x: Any) -> Array:
    """What an adapter trains whole starts from: of packed weights the numbers that they stand for."""
    return xp.copy(xp.stop_gradient(xp.values(x)))


def in_order(base: Any, modules: Iterable[str], folder: str | os.PathLike[str]) -> list[str]:
    layers = lora.linears(lora.with_own_head(base))
    wanted = set(modules)
    if unknown := sorted(wanted - layers.keys()):
        raise CheckpointError(
            f"{folder}: this adapter is for another base model: it changes {len(unknown)} layers that this model does "
            f"not have, the first {unknown[0]}; this model has layers such as {next(iter(layers))}"
        )
    return [name for name in layers if name in wanted]


def check_shapes(
    specs: Mapping[str, Any], plain: Mapping[str, Any], whole: Mapping[str, np.ndarray], files: AdapterFiles,
    folder: str | os.PathLike[str],
) -> None:  # fmt: skip
    """specs: of the adapter's own tensors; plain: of the parameters of the model that it is for."""
    found = {name: files.tensors[name] for name in specs if name in files.tensors} | dict(whole)
    needed = {**plain, **specs}
    problems = [f"{name} {x.shape} is no parameter of this model" for name, x in found.items() if name not in needed]
    problems += [
        f"{name} is {array.shape}, this model needs {needed[name].shape}"
        for name, array in found.items()
        if name in needed and array.shape != needed[name].shape
    ]
    problems += [f"{name} is missing" for name in specs if name not in files.tensors]
    if not problems:
        return
    advice = ""
    for name, array in whole.items():
        module = name.partition(".")[0]
        if name in needed and array.shape[1:] == needed[name].shape[1:] and array.shape != needed[name].shape:
            if module in (lora.HEAD, lora.TABLE.partition(".")[0]):
                advice = "\nThe vocabulary was resized before training: merge it with PEFT, and load the result"
            elif module in lora.HEADS:
                advice = f"\nIts head has {len(array)} classes: load the base model with num_classes={len(array)}"
    raise CheckpointError(
        f"{folder}: this adapter is for another base model{f' ({files.base})' if files.base else ''}:\n  "
        + "\n  ".join(problems[:10]) + advice
    )  # fmt: skip
