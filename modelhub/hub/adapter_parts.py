"""Layers that are one here and several in PEFT's files, their outputs side by side: gate and input of a SwiGLU."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from modelhub.errors import CheckpointError
from modelhub.hub.adapters import MARK, AdapterFiles

T = TypeVar("T")
Parts = Mapping[str, Sequence[str]]  # {end of our module: ends of theirs, in the order of the rows}


def spelled(module: str, parts: Parts) -> list[str]:
    """The modules that one of ours is there: mostly itself."""
    for ours, theirs in parts.items():
        if module.endswith(f".{ours}"):
            return [module.removesuffix(ours) + name for name in theirs]
    return [module]


def split(files: AdapterFiles, parts: Parts) -> AdapterFiles:
    """With each such layer as its parts: they share A, and have B's rows each."""

    def apart(arrays: Mapping[str, np.ndarray], mark: str) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for name, array in arrays.items():
            module, _, kind = name.rpartition(mark)
            names = spelled(module, parts)
            rows = [array] * len(names) if kind == "lora_A" else np.split(array, len(names))
            found |= {f"{part}{mark}{kind}": x for part, x in zip(names, rows, strict=True)}
        return found

    def patterns(values: Mapping[str, T]) -> dict[str, T]:
        return {part: value for module, value in values.items() for part in spelled(module, parts)}

    return dataclasses.replace(
        files, tensors=apart(files.tensors, MARK), whole=apart(files.whole, "."),
        rank_pattern=patterns(files.rank_pattern), alpha_pattern=patterns(files.alpha_pattern),
    )  # fmt: skip


def joined(files: AdapterFiles, parts: Parts) -> AdapterFiles:
    """With such parts as the one layer. Where they share no A, its rank is the sum of theirs; a part without an adapter
    gets zeros.

    Raises CheckpointError for whole parameters, or DoRA, of some of the parts alone.
    """
    tensors, whole = dict(files.tensors), dict(files.whole)
    ranks, alphas = dict(files.rank_pattern), dict(files.alpha_pattern)
    modules = {name.rpartition(MARK)[0] for name in tensors} | {name.rpartition(".")[0] for name in whole}
    starts = {
        (module.removesuffix(theirs), ours)
        for module in modules
        for ours, names in parts.items()
        for theirs in names
        if module.endswith(f".{theirs}")
    }
    if not starts:
        return files
    for start, end in sorted(starts):
        ours, theirs = start + end, [start + name for name in parts[end]]
        for kind in ("weight", "bias"):
            _join(whole, ours, f".{kind}", theirs)
        adapted = [part for part in theirs if f"{part}{MARK}lora_A" in tensors]
        if not adapted:
            continue
        _join(tensors, ours, f"{MARK}lora_magnitude_vector", theirs)
        down = [tensors.pop(f"{part}{MARK}lora_A") for part in adapted]
        up = {part: tensors.pop(f"{part}{MARK}lora_B") for part in adapted}
        scales = {part: _scale(files, part) for part in adapted}
        scale = scales[adapted[0]]
        shared = len(adapted) == len(theirs) and all(np.array_equal(x, down[0]) for x in down)
        rank, column, blocks = len(down[0]) if shared else sum(map(len, down)), 0, []
        for part in theirs:
            own = up.get(part, up[adapted[0]])
            blocks.append(np.zeros((len(own), rank), np.float32))
            if part in up:
                blocks[-1][:, column : column + own.shape[1]] = own * (scales[part] / scale)
                column += 0 if shared else own.shape[1]
        tensors[f"{ours}{MARK}lora_A"] = down[0] if shared else _stacked(down, ours)
        tensors[f"{ours}{MARK}lora_B"] = np.concatenate(blocks)
        ranks[ours], alphas[ours] = rank, scale * (rank**0.5 if files.use_rslora else rank)
        for part in theirs:
            ranks.pop(part, None)
            alphas.pop(part, None)
    return dataclasses.replace(
        files, tensors=tensors, whole=whole, targets=list(dict.fromkeys(name.rpartition(MARK)[0] for name in tensors)),
        rank_pattern={module: rank for module, rank in ranks.items() if rank != files.rank},
        alpha_pattern={module: alpha for module, alpha in alphas.items() if alpha != files.alpha},
    )  # fmt: skip


def _scale(files: AdapterFiles, module: str) -> float:
    rank, alpha = files.rank_pattern.get(module, files.rank), files.alpha_pattern.get(module, files.alpha)
    return alpha / (rank**0.5 if files.use_rslora else rank)


def _join(arrays: dict[str, np.ndarray], ours: str, kind: str, theirs: Sequence[str]) -> None:
    """Put what the parts have in the place of ours, if they have any."""
    found = [arrays.pop(part + kind) for part in theirs if part + kind in arrays]
    if found and len(found) < len(theirs):
        raise CheckpointError(
            f"this adapter changes a part of {ours} as a whole, or its lengths (DoRA), and not the other, which "
            "modelhub has no adapters for. Merge it into its base with PEFT, and load the result"
        )
    if found:
        arrays[ours + kind] = _stacked(found, ours)


def _stacked(arrays: Sequence[np.ndarray], module: str) -> np.ndarray:
    if len({x.shape[1:] for x in arrays}) > 1:
        shapes = " and ".join(str(x.shape) for x in arrays)
        raise CheckpointError(f"the parts of {module} in this adapter do not fit each other: {shapes}")
    return np.concatenate(arrays)
