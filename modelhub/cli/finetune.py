"""`modelhub finetune` and `modelhub evaluate`: recipes, and a run from loading to saving."""

import contextlib
import dataclasses
import difflib
import json
import os
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from rich.console import Console

from modelhub import CausalLM, optim
from modelhub.errors import BackendNotInstalled, InputError
from modelhub.hub import adapters
from modelhub.hub.resources import resource
from modelhub.tasks import saving
from modelhub.training import Callback, History, checkpoints
from modelhub.training.records import read_records

Settings = dict[str, dict[str, Any]]  # {table: {key: value}}; the table "" is what stands above all others

TOP = {
    "preset": str, "backend": str, "device": str, "dtype": str, "data": str, "validation_data": str, "output": str,
    "sequence_length": int,
}  # fmt: skip
# What a file cannot say, what stands at the top, and LoRA's seed, which is the run's.
_NOT_IN_RECIPES = {
    "lora": {"name", "seed"}, "compile": {"loss"}, "fit": {"data", "validation_data", "callbacks", "verbose"},
}  # fmt: skip
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Sequence: "a list of texts"}

err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def recipe_keys() -> dict[str, dict[str, Any]]:
    """{table: {key: type}}: the parameters of the methods that the tables are named after."""
    methods: dict[str, Callable] = {"lora": CausalLM.enable_lora, "compile": CausalLM.compile, "fit": CausalLM.fit}
    return {"": TOP} | {
        table: {k: hint for k, hint in get_type_hints(method).items() if k not in {"return"} | _NOT_IN_RECIPES[table]}
        for table, method in methods.items()
    }


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
    if get_origin(hint) is Sequence:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else get_origin(hint) or hint)


def _described(hint: Any) -> str:
    if hint is Any:
        return 'a name, or a table as in { name = "cosine", warmup_steps = 10 }'
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
    top, fit, lora = settings[""], settings.get("fit", {}), settings.get("lora")
    needed = ("preset", "data") if dry_run else ("preset", "data", "output")
    if missing := [f"--{key}" for key in needed if not top.get(key)]:
        raise InputError(f"finetune needs {', '.join(missing)}, or a recipe that says it")
    if options.get("validation_data"):  # goes before the recipe's split
        fit.pop("validation_split", None)
    output = Path(top.get("output", "")).expanduser()
    run = Path(fit.get("checkpoint_dir") or output.parent / f"{output.name}_run").expanduser()
    # Mistakes in the data and in the output's place should not cost the time that loading a model takes.
    data, validation_data = (_checked_data(top.get(key), fit.get("kind")) for key in ("data", "validation_data"))
    if not dry_run:
        _check_output(output, run, lora is not None)
    lm = load(top["preset"], top, offline=offline)
    if lora is not None:
        lm.enable_lora(**lora, seed=fit.get("seed", 0))
    lm.compile(**settings.get("compile", {}))
    fit = fit | {"validation_data": validation_data, "checkpoint_dir": run}
    if dry_run:
        with contextlib.suppress(_Stopped):
            lm.fit(data, **fit | {"checkpoint_dir": None, "resume": False, "callbacks": [_StopAtOnce()]})
        return None
    _make_folders(output.parent, run)
    try:
        history = lm.fit(data, **fit)
    except KeyboardInterrupt:
        found = checkpoints.latest(run)
        again = "the same command" + (" with --resume" if fit.get("resume") is False else "")
        err.print(f"stopped: {again} goes on after step {found.step}" if found else "stopped before the first step")
        raise
    (lm.save_adapter if lora is not None else lm.save_to_preset)(output)
    write_history(history, run)
    what = output if lora is None else f"{top['preset']} --adapter {output}"
    command = f"chat {what}" if fit.get("template") == "chat" else f'generate {what} "..."'
    err.print(f"history and checkpoints: {run}\ntry it: modelhub {command}")
    return output


def evaluate(preset: str, data: str, options: dict[str, Any], adapter: str | None, offline: bool) -> dict[str, float]:
    """What CausalLM.evaluate finds. options: its parameters, and load's."""
    path = _checked_data(data, options.get("kind"))
    loading = {key: options.pop(key) for key in TOP if key in options}
    return load(preset, loading, offline=offline, adapter=adapter).evaluate(path, **options)


def load(preset: str, options: dict[str, Any], *, offline: bool, adapter: str | None = None) -> CausalLM:
    """options: backend, device, dtype and sequence_length, as far as they are given; others mean nothing here."""
    placed = {key: options[key] for key in ("backend", "device", "dtype") if key in options}
    lm = CausalLM.from_preset(preset, offline=offline, **placed)
    if adapter is not None:
        lm.load_adapter(adapter)
    if "sequence_length" in options:
        lm.preprocessor.sequence_length = options["sequence_length"]
    return lm


def _checked_data(data: str | None, kind: str | None) -> Path | None:
    """Raises DataError for a missing file and for bad records."""
    if data is None:
        return None
    path = _data_path(data, Path())
    read_records(path, kind)
    return path


def _check_output(output: Path, run: Path, lora: bool) -> None:
    """Saving refuses these folders too, but only after the training."""
    others = ["a file"] if output.is_file() else adapters.strangers(output) if lora else saving.strangers(output)
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
