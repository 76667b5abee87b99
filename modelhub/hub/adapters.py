"""PEFT's adapter folders, both ways: adapter_config.json and adapter_model.safetensors.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modelhub.errors import CheckpointError, InputError
from modelhub.hub.checkpoint import SafetensorsCheckpoint, WeightFile, shown
from modelhub.hub.files import COMPANIONS, rewriting, save_arrays, write_json

log = logging.getLogger("modelhub")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
MARK = ".lora."
# Older files have the adapter's name inside, and DoRA's vector with or without .weight; some writers omit the prefix.
_TENSOR = re.compile(
    rf"(?:{re.escape(_PREFIX)})?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
# A whole parameter: of modules_to_save, or PEFT's copy of the base's, which it makes of an embedding and a head.
_WHOLE = re.compile(
    rf"(?:{re.escape(_PREFIX)})?(?!.*\.lora_)(.+?)(\.base_layer)?(?:\.modules_to_save(?:\.default)?)?\.(weight|bias)"
)
_STORED = ("float32", "float16", "bfloat16")
_LARGEST_CONFIG = 10_000_000
_PLAIN = re.compile(r"[\w.\\^-]*")  # expressions that repeat nothing
_QUICK = 1_000_000  # matches of plain expressions, about a second
_LONGEST_NAME = 1_000
_PATIENCE = 3  # seconds
_LISTED = 20


@dataclass
class AdapterFiles:
    """A LoRA or DoRA adapter as plain data.

    rank, alpha, dropout, use_rslora, use_dora: as PEFT's r, lora_alpha, ... rank_pattern, alpha_pattern: other values
    of single modules, by their full names. targets: PEFT's target_modules; of an adapter read, the full names. base:
    the base model's name or ""; revision: its commit, branch or tag, where known. tensors: MODULE.lora.lora_A (r, in),
    MODULE.lora.lora_B (out, r) and, with DoRA, MODULE.lora.lora_magnitude_vector (out,), float32. whole: parameters by
    their full names (MODULE.weight), in place of the base's, in a float dtype; modules_to_save: names of the modules
    that they are all of, as PEFT matches them. copies: names in `whole` that PEFT puts into its files wherever a head
    or an embedding is adapted: mostly what the base has.
    """

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    targets: list[str]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    base: str
    tensors: dict[str, np.ndarray]
    task_type: str | None = "CAUSAL_LM"  # PEFT's; None: a model of any kind
    whole: dict[str, np.ndarray] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    copies: frozenset[str] = frozenset()
    revision: str | None = None


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFiles:
    """The adapter in a folder that PEFT, or write_adapter, wrote.

    Which modules it adapts is what the tensors say; target_modules is not consulted.

    Raises CheckpointError for files that are missing, damaged or pickled, for tensors that disagree with each other or
    with the config, and once for all settings that change the maths in ways modelhub does not have.
    """
    folder = Path(folder)
    _check_files(folder)
    config = _read_config(folder / CONFIG)
    with SafetensorsCheckpoint(folder / WEIGHTS) as file:
        theirs = {name: _TENSOR.fullmatch(name) for name in file.tensors}
        entire = {name: match for name in theirs if not theirs[name] and (match := _WHOLE.fullmatch(name))}
        _refuse(
            folder,
            [*_unknown_settings(config), *_unknown_tensors(n for n in theirs if not theirs[n] and n not in entire)],
        )
        tensors: dict[str, np.ndarray] = {}
        whole: dict[str, np.ndarray] = {}
        copies = set()
        for name, match in theirs.items():
            part = entire.get(name)
            found, ours = tensors, f"{match[1]}{MARK}{match[2]}" if match else ""
            if part:
                found, ours = whole, f"{part[1]}.{part[3]}"
            if ours in found:
                raise CheckpointError(
                    f"{folder / WEIGHTS} holds {shown(ours)} twice, the second time as {shown(name)}."
                )
            stored = file.tensors[name].dtype
            found[ours] = file.read(name, stored if part and stored in _STORED else "float32")
            if part and part[2]:
                copies.add(ours)
    values, mistakes = _read_settings(config)
    _complain(folder / CONFIG, mistakes)
    modules = _modules(tensors)
    files = AdapterFiles(
        rank=values["r"],
        alpha=values["lora_alpha"],
        dropout=values["lora_dropout"],
        use_rslora=values["use_rslora"],
        use_dora=values["use_dora"],
        targets=modules,
        rank_pattern=_by_module(folder / CONFIG, values["rank_pattern"], modules, values["r"]),
        alpha_pattern=_by_module(folder / CONFIG, values["alpha_pattern"], modules, values["lora_alpha"]),
        base=values["base_model_name_or_path"],
        tensors=tensors,
        whole=whole,
        modules_to_save=values["modules_to_save"],
        copies=frozenset(copies),
        revision=values["revision"] or None,
    )
    _complain(folder, _misfits(files))
    if files.modules_to_save and not whole:
        listed = ", ".join(sorted(files.modules_to_save))
        log.warning("%s should have its own %s, and has no such weights: the base model's are used", folder, listed)
    return files


def write_adapter(
    folder: str | os.PathLike[str], files: AdapterFiles, beside: Callable[[Path], None] | None = None
) -> None:
    """Write a folder that PEFT loads; an adapter that was there is replaced as a whole.

    beside: writes more files into the new folder, before it takes its place.

    Raises InputError if the folder holds anything else than an adapter, and CheckpointError if it cannot be written or
    the tensors do not fit together; what was there before is then as it was.
    """
    target = Path(folder).resolve()
    if (others := strangers(target)) or target.is_file():
        found = ", ".join(others[:_LISTED]) or "a file"
        raise InputError(f"{target} is not an adapter's folder: it holds {found}. Give a new or an empty folder.")
    _complain(target, _misfits(files))
    config = {
        "base_model_name_or_path": files.base or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _whole(files.alpha),
        "lora_dropout": files.dropout,
        "modules_to_save": sorted(files.modules_to_save) or None,
        "peft_type": "LORA",
        "r": files.rank,
        "rank_pattern": files.rank_pattern,
        "revision": files.revision,
        "alpha_pattern": {module: _whole(alpha) for module, alpha in files.alpha_pattern.items()},
        "target_modules": sorted(files.targets),
        "task_type": files.task_type,
        "use_dora": files.use_dora,
        "use_rslora": files.use_rslora,
    }
    tensors = {_peft_name(name): np.asarray(array, np.float32, order="C") for name, array in files.tensors.items()}
    tensors |= {f"{_PREFIX}{name}": np.ascontiguousarray(array) for name, array in files.whole.items()}
    with rewriting(target) as work:
        write_json(work / CONFIG, config)
        save_arrays(tensors, work / WEIGHTS, {"format": "pt"})
        if beside is not None:
            beside(work)


def strangers(folder: Path) -> list[str]:
    """What is in the folder that writing an adapter there would remove and does not write."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(name for name in names if name not in (CONFIG, WEIGHTS) and not COMPANIONS.fullmatch(name))


def _peft_name(name: str) -> str:
    module, _, kind = name.rpartition(MARK)
    return f"{_PREFIX}{module}.{kind}" + ("" if kind == "lora_magnitude_vector" else ".weight")


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value  # vLLM, for one, expects an integer


# What is in the folder


def _check_files(folder: Path) -> None:
    found = set(os.listdir(folder)) if folder.is_dir() else None
    if found is None:
        raise CheckpointError(f"{folder} is not a folder. Give the folder that holds {CONFIG} and {WEIGHTS}.")
    if {CONFIG, WEIGHTS} <= found:
        return
    if CONFIG in found and "adapter_model.bin" in found:
        raise CheckpointError(
            f"{folder} holds its tensors only as a pickle (adapter_model.bin), and opening a pickle can run any code "
            f"that its author put in it. Take a version with {WEIGHTS}, or, if you trust the author, convert once with "
            "PEFT: PeftModel.from_pretrained(base_model, folder).save_pretrained(new_folder)."
        )
    if "config.json" in found and CONFIG not in found:
        raise CheckpointError(f"{folder} holds a whole model, not an adapter. Load it with from_preset.")
    listed = ", ".join(sorted(found)[:_LISTED]) or "an empty folder"
    raise CheckpointError(f"{folder} holds no adapter: expected {CONFIG} and {WEIGHTS}, found {listed}.")


def _read_config(path: Path) -> dict[str, Any]:
    with closing(WeightFile(path)) as file:
        if file.size > _LARGEST_CONFIG:
            raise file.damaged(f"expected a config of at most {_LARGEST_CONFIG} bytes, found {file.size}")
        try:
            config = json.loads(file.read(0, file.size))
        except (ValueError, RecursionError) as error:
            raise file.damaged(f"it is not JSON ({shown(str(error))})") from error
        if not isinstance(config, dict):
            raise file.damaged(f"expected a JSON object, found {shown(config)}")
        return config


# What the config says

# Read elsewhere; or said by the tensors; or of use to training alone.
_ACCEPTED = {
    "auto_mapping", "corda_config", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
    "runtime_config", "target_modules", "task_type",
}  # fmt: skip
# The other ways to start (pissa, olora, corda, loftq, lora_ga) take the first update out of the base's weights.
_BASE_INTACT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def _unknown_settings(config: Mapping[str, Any]) -> list[str]:
    # Everything that PEFT adds to LoRA is off when it is null, false or empty.
    if config.get("peft_type") != "LORA":
        return [f"peft_type {shown(config.get('peft_type'))}; modelhub has LORA"]
    asked = {key: value for key, value in config.items() if value and key not in _ACCEPTED and key not in _SETTINGS}
    harmless = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": _BASE_INTACT}
    return [f"{shown(key)}: {shown(value)}" for key, value in asked.items() if value not in harmless.get(key, ())]


def _unknown_tensors(names: Iterable[str]) -> list[str]:
    embedded = ", but of an embedding; as one of modules_to_save it is trained whole"
    return [
        f"the tensor {shown(name)}: not LoRA or DoRA of a linear layer{embedded if '.lora_embedding_' in name else ''}"
        for name in names
    ]


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(
            f"{folder}: this adapter does more than modelhub has:\n  {_lines(problems)}\nMerge it into its base with "
            "PEFT, PeftModel.from_pretrained(base_model, folder).merge_and_unload().save_pretrained(new_folder), and "
            "load the result with from_preset; or train it without these."
        )


def _complain(path: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(f"{path} does not hold together:\n  {_lines(problems)}\nSave or download it again.")


def _lines(problems: list[str]) -> str:
    more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    return "\n  ".join([*problems[:_LISTED], *more])


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 1 << 31  # type: ignore[operator]


def _is_dropout(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 1  # type: ignore[operator]


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


# key: PEFT's default, what a value must be, in words and as a test
_SETTINGS: dict[str, tuple[Any, str, Callable[[Any], bool]]] = {
    "r": (8, "a whole number above 0", _is_rank),
    "lora_alpha": (8, "a number above 0", _is_alpha),
    "lora_dropout": (0.0, "a number, at least 0 and below 1", _is_dropout),
    "use_rslora": (False, "true or false", _is_bool),
    "use_dora": (False, "true or false", _is_bool),
    "rank_pattern": ({}, "whole numbers by pattern", lambda x: isinstance(x, dict) and all(map(_is_rank, x.values()))),
    "alpha_pattern": ({}, "numbers by pattern", lambda x: isinstance(x, dict) and all(map(_is_alpha, x.values()))),
    "base_model_name_or_path": ("", "text", lambda x: isinstance(x, str)),
    "revision": ("", "text", lambda x: isinstance(x, str)),
    "modules_to_save": ([], "a list of names", lambda x: isinstance(x, list) and all(isinstance(n, str) for n in x)),
}


def _read_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values, and what is wrong with them."""
    values = {key: rule[0] if config.get(key) is None else config[key] for key, rule in _SETTINGS.items()}
    return values, [
        f"{key}: expected {words}, found {shown(values[key])}"
        for key, (_, words, test) in _SETTINGS.items()
        if not test(values[key])
    ]


def _by_module(path: Path, pattern: Mapping[str, Any], modules: list[str], default: Any) -> dict[str, Any]:
    """{module: value} where it is not the default. As in PEFT, a regular expression for the name's end; first match."""
    rules, values = list(pattern), list(pattern.values())
    if any(len(name) > _LONGEST_NAME for name in (*rules, *modules) if rules):
        raise CheckpointError(f"{path}: names and patterns of modules may have {_LONGEST_NAME} characters, not more.")
    if all(map(_PLAIN.fullmatch, rules)) and len(rules) * len(modules) <= _QUICK:
        first = _first_matches(path, rules, modules)
    else:
        first = _guarded_matches(path, rules, modules)
    found = {module: values[i] for module, i in zip(modules, first, strict=True) if i is not None}
    return {module: value for module, value in found.items() if value != default}


def _first_matches(path: Path, rules: list[str], modules: list[str]) -> list[int | None]:
    try:
        compiled = [re.compile(rf"(.*\.)?({rule})$") for rule in rules]
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: a pattern is not a regular expression: {shown(str(error))}.") from error
    return [next((i for i, rule in enumerate(compiled) if rule.match(module)), None) for module in modules]


# A stranger's expression may take forever, and in a process nothing can stop it.
_MATCHER = r"""
import json, re, sys
rules, modules = json.load(sys.stdin)
rules = [re.compile(rf"(.*\.)?({rule})$") for rule in rules]
json.dump([next((i for i, rule in enumerate(rules) if rule.match(module)), None) for module in modules], sys.stdout)
"""


def _guarded_matches(path: Path, rules: list[str], modules: list[str]) -> list[int | None]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=json.dumps([rules, modules]).encode(), capture_output=True, timeout=_PATIENCE, check=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"{path}: finding out which modules its patterns mean took over {_PATIENCE} s. Write plain names there."
        ) from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.decode(errors="replace").strip().splitlines() or [f"exit {error.returncode}"])[-1]
        raise CheckpointError(f"{path}: a pattern is not a regular expression: {shown(reason)}.") from None
    first: list[int | None] = json.loads(done.stdout)
    return first


# What the tensors say


def _modules(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(MARK)[0] for name in names))


def _misfits(files: AdapterFiles) -> list[str]:
    problems = [] if files.tensors or files.whole else ["there are no tensors"]
    problems += [
        f"{shown(module)} is there as a whole, and has an adapter"
        for module in _modules(files.tensors)
        if f"{module}.weight" in files.whole and f"{module}.weight" not in files.copies
    ]
    for module in _modules(files.tensors):
        a, b, magnitude = (
            files.tensors[name].shape if (name := f"{module}{MARK}{kind}") in files.tensors else None
            for kind in ("lora_A", "lora_B", "lora_magnitude_vector")
        )
        rank = files.rank_pattern.get(module, files.rank)
        where = shown(module)
        if a is None or b is None:
            problems.append(f"{where} lacks {'lora_A' if a is None else 'lora_B'}")
        elif len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
            problems.append(f"{where}: expected lora_A (r, in) and lora_B (out, r), found {a} and {b}")
        elif a[0] != rank:
            problems.append(f"{where}: rank {rank} by the config, {a[0]} by the tensors")
        elif (magnitude is not None) != files.use_dora:
            has = "lacks" if files.use_dora else "has"
            problems.append(f"{where} {has} lora_magnitude_vector, and use_dora is {files.use_dora}")
        elif magnitude is not None and magnitude != b[:1]:
            problems.append(f"{where}: expected lora_magnitude_vector {b[:1]}, found {magnitude}")
    return problems
