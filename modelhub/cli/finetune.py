"""`modelhub finetune` and `modelhub evaluate`: recipes, and a run from loading to saving."""

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import json
import os
import tomllib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Console

import modelhub
from modelhub import Augment, optim
from modelhub.core.lora import LoRAConfig
from modelhub.core.problems import REGRESSION
from modelhub.errors import BackendNotInstalled, DataError, InputError, PresetNotFound
from modelhub.hub import adapters, model_folder
from modelhub.hub.preset import as_address, resolve
from modelhub.hub.registry import find_card
from modelhub.hub.resources import resource
from modelhub.kinds import CAUSAL_LM, IMAGES, TASKS, TEXT, TaskKind, kind_reading
from modelhub.model.source import open_preset
from modelhub.training import Callback, History, checkpoints
from modelhub.training.arguments import check_whole
from modelhub.training.fit import Plan
from modelhub.training.image_examples import Examples, read_examples
from modelhub.training.records import read_records

Settings = dict[str, dict[str, Any]]  # {table: {key: value}}; the table "" is what stands above all others

TOP = {
    "preset": str, "backend": str, "device": str, "dtype": str, "quantize": str, "data": str, "validation_data": str,
    "output": str, "sequence_length": int, "problem_type": str,
}  # fmt: skip
PLACED = ("backend", "device", "dtype", "quantize")
# What a file cannot say, what stands at the top, and LoRA's seed, which is the run's.
_NOT_IN_RECIPES = {
    "lora": {"name", "seed"}, "compile": {"loss", "objective"},
    "fit": {"task", "data", "validation_data", "callbacks", "verbose"},
}  # fmt: skip
_HEAD: Settings = {
    "compile": {"learning_rate": 1e-3},
    "fit": {"epochs": 10},
}  # where a head is trained and nothing else is said
_WORDS = {
    Mapping: "a table",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Sequence: "a list of texts",
}

err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def recipe_keys(*tasks: Any) -> dict[str, dict[str, Any]]:
    """{table: {key: type}}: the parameters of the methods that the tables are named after; of all tasks or of some."""
    keys: dict[str, dict[str, Any]] = {"": TOP}
    for task in tasks or [task_class(kind) for kind in TASKS.values() if kind.head is not None]:
        for table, method in {"lora": "enable_lora", "compile": "compile", "fit": "fit"}.items():
            hints = get_type_hints(getattr(task, method))
            lacking = {"metrics", "label_smoothing"} - inspect.signature(task.objective).parameters.keys()
            own = {k: hint for k, hint in hints.items() if k not in {"return"} | _NOT_IN_RECIPES[table] | lacking}
            keys[table] = keys.get(table, {}) | own
    return keys


# --- recipes --------------------------------------------------------------------------------------------------------


def read_recipe(name: str) -> Settings:
    """A recipe's settings, with paths made absolute and optimizer and schedule made objects where they are tables.

    name: a file, or the bare name of a bundled recipe. Raises InputError, once for everything that is wrong.
    """
    path = _find_recipe(name)
    try:
        written = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # TOML and Unicode errors are ValueErrors
        raise InputError(f"the recipe {path} cannot be read: {error}") from None
    settings: Settings = {"": {}}
    problems = []
    for name, value in written.items():
        table, entries = (name, value) if isinstance(value, dict) else ("", {name: value})
        for key, entry in entries.items() or [("", None)]:
            if problem := _problem(table, key, entry):
                problems.append(f"\n  {problem}")
        settings.setdefault(table, {}).update(entries)
    if problems:
        raise InputError(f"the recipe {path} has settings that cannot be used:{''.join(problems)}")
    for key, get in (("optimizer", optim.get), ("schedule", optim.get_schedule)):
        if isinstance(value := settings.get("compile", {}).get(key), dict):
            settings["compile"][key] = _made(key, value, get, path)
    if isinstance(value := settings.get("fit", {}).get("augment"), dict):
        settings["fit"]["augment"] = _made("augment", value | {"name": ""}, lambda _: Augment(), path)
    _locate(settings, path.resolve().parent)
    return settings


def _find_recipe(name: str) -> Path:
    path, bundled = Path(name).expanduser(), resource("finetune")
    if path.is_file():
        return path
    if (bundled / f"{name}.toml").is_file():
        return bundled / f"{name}.toml"
    names = sorted(recipe.stem for recipe in bundled.glob("*.toml"))
    raise InputError(f"there is no recipe {name}{_near(path.stem, names)}; bundled are {', '.join(names)}")


def _problem(table: str, key: str, value: Any) -> str | None:
    """What is wrong with a key and its value; key "": an empty table."""
    known = recipe_keys()
    here = f" in [{table}]" if table else ""
    if table not in known:
        return f"[{table}] is no table of a recipe{_near(table, known)}"
    if not key or (key in known[table] and _fits(value, known[table][key])):
        return None
    if key in known[table]:
        return f"{key}{here} must be {_described(known[table][key])}, found {value!r}"
    places = {name: place for place, keys in known.items() for name in keys}
    if key in places:
        return f"{key}{here} belongs {f'into [{places[key]}]' if places[key] else 'above all tables'}"
    if key in known:
        return f"{key} must be a table: [{key}]"
    return f"{key}{here} is unknown{_near(key, [*known[table], *places])}"


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, dict.fromkeys(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is Any:  # optimizer and schedule: a name, or a table with a name and its settings
        return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("name"), str))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    if get_origin(hint) is Sequence:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else get_origin(hint) or hint)


def _described(hint: Any) -> str:
    if hint is Any:
        return 'a name, or a table as in { name = "cosine", warmup_steps = 10 }'
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kinds = [get_origin(part) or part for part in parts]
    return " or ".join(_WORDS[kind] for kind in kinds if kind in _WORDS)


def _made(key: str, table: dict[str, Any], get: Callable[[str], Any], path: Path) -> Any:
    """The object of modelhub.optim that { name = "cosine", warmup_steps = 10 } describes."""
    kind = type(get(table["name"]))
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items() if k != "name"}
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    for name in values:
        if name not in known:
            raise InputError(f"{path}: {kind.__name__}, the {key}, has no setting {name}{_near(name, known)}")
    try:
        return kind(**values)
    except TypeError as error:  # from comparing text with numbers
        raise InputError(f"{path}: the {key} cannot be made of {values}: {error}") from None


def _locate(settings: Settings, folder: Path) -> None:
    """Relative paths mean places beside the recipe; but a bundled recipe writes where the user is."""
    writes = Path() if folder == resource("finetune").resolve() else folder
    top, fit = settings[""], settings.get("fit", {})
    for table, key, base in ((top, "output", writes), (fit, "checkpoint_dir", writes)):
        if key in table:
            table[key] = str(base / os.path.expanduser(table[key]))
    for key in {"data", "validation_data"} & top.keys():
        top[key] = str(_data_path(top[key], folder))
    preset = top.get("preset", "")
    beside = folder / preset
    is_path = "/" in preset or os.sep in preset or preset.endswith(".gguf")  # as modelhub.hub.preset reads names
    if is_path and not beside.exists() and "://" in as_address(preset):
        return  # owner/name, on the Hub
    if "://" not in preset and not preset.startswith("~") and (is_path or os.path.isfile(beside / "config.json")):
        top["preset"] = str(beside)


def _data_path(name: str, folder: Path) -> Path:
    """Below the folder, else, for a bare name, among the bundled files."""
    path, bundled = folder / os.path.expanduser(name), resource("finetune") / name
    return bundled if not os.path.exists(path) and Path(name).name == name and os.path.isfile(bundled) else path


# --- runs -----------------------------------------------------------------------------------------------------------


class _Stopped(Exception):
    """A dry run is at its end."""


class _StopAtOnce(Callback):
    def on_train_begin(self, logs: dict[str, float]) -> None:
        raise _Stopped


def finetune(recipe: str | None, options: dict[str, Any], *, offline: bool, dry_run: bool) -> Path | None:
    """Train as the recipe and the options say, of which the options win; returns the folder with the result.

    The adapter or model is all that is in it. Checkpoints, history.json and curve.png are in checkpoint_dir, by default
    beside it: OUTPUT_run. dry_run: say what would be done, and return None.
    """
    settings = read_recipe(recipe) if recipe else {"": {}}
    places = {key: table for table, keys in recipe_keys().items() for key in keys}
    for key, value in options.items():
        settings.setdefault(places[key], {})[key] = value
    top, fit, lora = settings[""], settings.setdefault("fit", {}), settings.get("lora")
    needed = ("preset", "data") if dry_run else ("preset", "data", "output")
    if missing := [f"--{key}" for key in needed if not top.get(key)]:
        raise InputError(f"finetune needs {', '.join(missing)}, or a recipe that says it")
    if options.get("validation_data"):  # goes before the recipe's split
        fit.pop("validation_split", None)
    output = Path(top.get("output", "")).expanduser()
    run = Path(fit.get("checkpoint_dir") or output.parent / f"{output.name}_run").expanduser()
    _check_values(settings)
    for key in ("data", "validation_data"):
        if top.get(key) and not (path := _data_path(top[key], Path())).exists():
            raise DataError(f"{path}: no such file or folder")
    kind, config = kind_of(top["preset"], offline)
    _check_keys(settings, kind)
    # Mistakes in the data and in the output's place should not cost the time that loading a model takes.
    images = IMAGES in kind.reads
    data, validation_data = (_checked_data(top.get(key), fit, images) for key in ("data", "validation_data"))
    as_adapter = lora is not None and not images  # which has no place for a new head
    if not dry_run:
        _check_output(output, run, as_adapter)
    task: Any
    if images:
        task = _load_images(top, config, read_examples(data)[0], fit.get("seed", 0), offline)
        if fit.setdefault("freeze_backbone", lora is None):
            for table, values in _HEAD.items():
                settings[table] = values | settings.get(table, {})
            fit = settings["fit"]
    else:
        task = load(top["preset"], top, offline=offline)
    if lora is not None:
        task.enable_lora(**lora, seed=fit.get("seed", 0))
    task.compile(**settings.get("compile", {}))
    fit = fit | {"validation_data": validation_data, "checkpoint_dir": run}
    if dry_run:
        with contextlib.suppress(_Stopped):
            task.fit(data, **fit | {"checkpoint_dir": None, "resume": False, "callbacks": [_StopAtOnce()]})
        return None
    _make_folders(output.parent, run)
    try:
        history = task.fit(data, **fit)
    except KeyboardInterrupt:
        found = checkpoints.latest(run)
        again = "the same command" + (" with --resume" if fit.get("resume") is False else "")
        with contextlib.suppress(OSError):  # the terminal may be gone
            err.print(f"stopped: {again} goes on after step {found.step}" if found else "stopped before the first step")
        raise
    (task.save_adapter if as_adapter else task.save_to_preset)(output)
    write_history(history, run)
    what = f"{top['preset']} --adapter {output}" if as_adapter else output
    command = f"chat {what}" if fit.get("template") == "chat" else f'generate {what} "..."'
    command = f"classify photo.jpg --preset {output}" if images else command
    err.print(f"history and checkpoints: {run}\ntry it: modelhub {command}")
    return output


def evaluate(preset: str, data: str, options: dict[str, Any], adapter: str | None, offline: bool) -> dict[str, float]:
    """What the task's `evaluate` finds. options: its parameters, and load's."""
    kind, _ = kind_of(preset, offline)
    _check_keys({"fit": options}, kind)
    path = _checked_data(data, options, IMAGES in kind.reads)
    loading = {key: options.pop(key) for key in TOP if key in options}
    return load(preset, loading, offline=offline, adapter=adapter, kind=kind).evaluate(path, **options)


def load(
    preset: str, options: dict[str, Any], *, offline: bool, adapter: str | None = None, kind: TaskKind = CAUSAL_LM
) -> Any:
    """A task of that kind.

    options: backend, device, dtype, quantize and sequence_length, as far as they are given; others mean nothing here.
    """
    placed = {key: options[key] for key in PLACED if key in options}
    task = task_class(kind).from_preset(preset, offline=offline, **placed)
    if adapter is not None:
        task.load_adapter(adapter)
    if "sequence_length" in options:
        task.preprocessor.sequence_length = options["sequence_length"]
    return task


def kind_of(preset: str, offline: bool, revision: str | None = None) -> tuple[TaskKind, Any]:
    """What a preset is loaded as, and its config; None where it need not be opened to know. No weights are fetched."""
    if not os.path.isfile(os.path.join(preset, "config.json")):
        if preset.lower().endswith(".gguf"):
            return kind_reading(TEXT), None
        with contextlib.suppress(PresetNotFound):  # an address, or an error for others to tell
            kind = None if "://" in preset else TASKS.get(find_card(preset).task)
            if kind is not None and IMAGES not in kind.reads:
                return kind, None
    source = open_preset(resolve(preset, revision=revision, offline=offline, weights=False))
    try:
        return kind_reading(source.model.reads), source.config
    finally:
        source.close()


def task_class(kind: TaskKind) -> Any:
    return getattr(importlib.import_module(kind.module), kind.class_name)


def _load_images(top: dict[str, Any], config: Any, examples: Examples | None, seed: int, offline: bool) -> Any:
    """With a new head, unless the preset's own knows all classes of the data."""
    placed = {key: top[key] for key in PLACED if key in top}
    assert examples is not None  # a path holds no ready batches
    head = _head(examples, config, top.get("problem_type"))
    return modelhub.ImageClassifier.from_preset(top["preset"], offline=offline, seed=seed, **placed, **head)


def _head(examples: Examples, config: Any, problem_type: str | None) -> dict[str, Any]:
    """What from_preset is told of the head that these labels need; nothing of the preset's own, if it will do."""
    problem, labels, names = problem_type or examples.told, examples.labels, examples.classes
    known = set((config.id2label or {}).values())
    if names is None and examples.written is not None and known.issuperset(examples.written):
        names = examples.written
    head: dict[str, Any]
    if problem == REGRESSION:
        count = labels.shape[1] if labels.ndim == 2 else 1
        head = {} if (config.num_labels, config.problem_type) == (count, REGRESSION) else {"num_classes": count}
    elif names is not None:
        head = {} if known.issuperset(names) else {"labels": names}
    else:
        count = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
        head = {} if count <= config.num_labels else {"num_classes": count}
        if head and examples.written is not None and len(found := sorted(set(examples.written))) < count:
            head = {"labels": found}  # names that are numbers, such as 1, 2 and 10
    return head | ({"problem_type": problem} if problem and (head or problem_type) else {})


def _check_keys(settings: Settings, kind: TaskKind) -> None:
    """Raise InputError for settings that belong to another task."""
    own = recipe_keys(task_class(kind))
    wrong = [key for table, entries in settings.items() for key in entries if key not in own[table] | TOP]
    other = "sequence_length" if IMAGES in kind.reads else "problem_type"
    wrong += [other] if other in settings.get("", {}) else []
    if wrong:
        what = " and ".join(sorted(kind.reads))
        raise InputError(f"the preset reads {what}, for which there is no {', '.join(wrong)}: leave it out")


def _check_values(settings: Settings) -> None:
    """What makes no sense for any model is told before one is fetched and loaded."""
    fit, trained, adapter = (settings.get(table, {}) for table in ("fit", "compile", "lora"))
    _made_of(Plan, fit)
    _made_of(LoRAConfig, adapter)
    check_whole("batch_size", fit.get("batch_size", 1))
    optim.get_schedule(trained.get("schedule"))
    optim.get(trained.get("optimizer", "adamw"), trained.get("learning_rate"), trained.get("weight_decay"))


def _made_of(kind: Any, values: dict[str, Any]) -> None:
    names = {field.name for field in dataclasses.fields(kind)}
    kind(**{key: value for key, value in values.items() if key in names})


def _checked_data(data: str | None, fit: dict[str, Any], images: bool) -> Path | None:
    """Raises DataError for a missing file and for bad records."""
    if data is None:
        return None
    path = _data_path(data, Path())
    if images:
        read_examples(path)
    else:
        with warnings.catch_warnings():  # of rows that are skipped: it comes when they are read to be used
            warnings.simplefilter("ignore")
            read_records(path, fit.get("kind"), fit.get("on_error", "raise"))
    return path


def _check_output(output: Path, run: Path, lora: bool) -> None:
    """Saving refuses these folders too, but only after the training."""
    kept = [name for name in (adapters.CONFIG, "config.json") if (output / name).is_file()]
    if kept and not any(run.glob("step-*")):
        raise InputError(
            f"the output {output} holds {'an adapter' if lora else 'a model'} already, and {run} holds no run that it "
            f"could come from: give another output, or remove it"
        )
    others = ["a file"] if output.is_file() else adapters.strangers(output) if lora else model_folder.strangers(output)
    if others:
        what = "an adapter" if lora else "a model"
        raise InputError(
            f"the output {output} holds {', '.join(others[:5])}, which saving {what} there would remove; "
            "give a new or an empty folder"
        )
    if run.resolve().is_relative_to(output.resolve()):
        raise InputError(
            f"checkpoint_dir {run} is inside the output {output}, which is replaced as a whole and published as it is; "
            f"give another, or none for {output}_run"
        )


def _make_folders(*folders: Path) -> None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made: {error.strerror}; give another place") from None


def write_history(history: History, folder: Path) -> None:
    """history.json and, with matplotlib, curve.png."""
    # JSON has no NaN and no infinity: null.
    numbers = json.loads(json.dumps(history.state_dict()), parse_constant=lambda _: None)
    (folder / "history.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    try:
        history.plot(folder / "curve.png")
    except BackendNotInstalled:
        err.print("no curve.png: pip install matplotlib")
