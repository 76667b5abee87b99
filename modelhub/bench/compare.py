"""Which backend is the fastest here, with this model: measured, and the verdict kept for backend="fastest"."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Unpack

from modelhub.bench.processes import Row, Workload, lengths, measure
from modelhub.core import custom, kernels
from modelhub.core.backends import FASTEST, NAMES, backend_name, get_backend, installed
from modelhub.core.backends.base import Backend
from modelhub.core.measured import processor
from modelhub.errors import ConfigError, DeviceError, InputError, UnknownBackend
from modelhub.hub.sources import cache_root
from modelhub.kinds import IMAGES, kind_named, kind_reading
from modelhub.model.loading import check_dtype
from modelhub.model.options import LoadOptions, takes
from modelhub.model.source import Source, open_source

_FOLDER = "fastest"  # in the cache
_PACKAGES = ("modelhub", *NAMES, "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "tensorflow-cpu")
# Variables that decide what the frameworks see and use.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "JAX_PLATFORMS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "XLA_FLAGS",
)  # fmt: skip


@dataclass(frozen=True)
class BenchReport:
    """unit: what is counted per second, "tokens" or "images"."""

    preset: str
    unit: str
    workload: Workload
    machine: dict[str, Any]
    rows: list[Row]

    @property
    def fastest(self) -> str | None:
        """The backend with the highest per_second; None: all failed."""
        best = max(self.rows, key=lambda row: row.per_second or 0.0)
        return best.backend if best.per_second else None

    @property
    def failures(self) -> dict[str, list[str]]:
        """{what went wrong: the backends that said so}."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if row.error is not None:
                found.setdefault(row.error, []).append(row.backend)
        return found

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"fastest": self.fastest}


@takes(LoadOptions)
def bench(
    preset: str | os.PathLike[str], *, backends: Sequence[str] | None = None, train: bool = False,
    batch_size: int | None = None, prompt_tokens: int | None = None, max_new_tokens: int | None = None, steps: int = 5,
    show: Callable[[str], object] = lambda doing: None, **options: Unpack[LoadOptions],
) -> BenchReport:  # fmt: skip
    """Measure backends on this machine with a preset, each in a fresh process.

    backends: their names; None: all that are installed. options: device, dtype and where the preset is found, as in
    CausalLM.from_preset.
    batch_size: rows of a batch; None: 1 for text, 8 for images. prompt_tokens, max_new_tokens: of text; None: 128 and
    64. train: also `steps` steps of training: LoRA of rank 4 on bundled instructions, packed into rows of 512 tokens;
    for images all weights on noise. show: is told what is being done.

    Backends that fail say why in their row. When all that are installed were measured with the usual batch, the verdict
    is kept for `fastest`. Raises InputError, UnknownBackend, DeviceError, and what opening the preset raises.
    """
    if FASTEST in (backends or ()):  # it is what the measurements are for
        raise UnknownBackend(f"unknown backend {FASTEST!r}; those that can be measured: {', '.join(NAMES)}")
    names = list(dict.fromkeys(installed() if backends is None else map(backend_name, backends)))
    if not names or steps < 1 or (batch_size is not None and batch_size < 1):
        raise InputError(f"backends={names}, steps={steps}, batch_size={batch_size}: give one or more of each")
    source = _look(preset, options)
    device, dtype, task = options.get("device"), check_dtype(options.get("dtype")), kind_reading(source.model.reads)
    workload = Workload(
        task.name, device, dtype, options.get("quantize"), batch_size or _usual_rows(source),
        *lengths(source, prompt_tokens, max_new_tokens, (128, 64)), train_steps=steps if train else 0,
    )  # fmt: skip
    report = _report(source, workload, names, show)
    if backends is None and batch_size is None and report.fastest:
        _Shelf(source, task.name, options).keep(report)
    return report


def fastest(preset: str | os.PathLike[str], *, task: str, **options: Unpack[LoadOptions]) -> str:
    """The name of the installed backend that is the fastest here with this model, and a line on stderr that says why.

    task: the name of a TaskKind. The others are from_preset's. Measured once, which takes
    some seconds for each backend, and kept in the cache for this model, task, device and dtype on this machine, until
    a framework changes; for a day only, where a backend failed for reasons that may pass. With one backend installed
    nothing is measured, nor with pieces of the user's own, which the processes that measure do not know.

    Raises InputError if no backend can run the model, and for pieces that are not for one backend alone; DeviceError;
    what opening the preset raises.
    """
    if len(names := installed()) == 1:
        return names[0]
    source = _look(preset, options)
    device, dtype, name = options.get("device"), check_dtype(options.get("dtype")), source.preset.name
    if source.model.reads not in kind_named(task).reads:
        return names[0]  # loading will tell what is wrong
    if pieces := _own(source, options.get("attention"), options.get("layers")):
        able = _able(pieces, names)
        _say(f"fastest: {able} for {name}, because of pieces of your own; nothing was measured")
        return able
    shelf = _Shelf(source, task, options)
    if (verdict := shelf.read()) is None:
        with shelf.alone():
            verdict = shelf.read()  # of another process, that was waited for
            if verdict is None:
                workload = Workload(
                    task, device, dtype, options.get("quantize"), _usual_rows(source),
                    *lengths(source, None, None, (64, 32)), load_weights=options.get("load_weights", True),
                    repeats=3, seconds=6.0,
                )  # fmt: skip
                with progress() as show:
                    report = _report(source, workload, names, show)
                if report.fastest is None:
                    failures = "; ".join(f"{', '.join(those)}: {error}" for error, those in report.failures.items())
                    raise InputError(f"backend={FASTEST!r} was asked for, but no backend can run {name}: {failures}")
                verdict = shelf.keep(report)
    _say(f"fastest: {verdict.line(name)}")
    return verdict.backend


def choose_backend(preset: str | os.PathLike[str], task: str, options: LoadOptions) -> Backend:
    """The backend that is asked for, with the user's own attention function if there is one.

    task: the name of what is loaded, which "fastest" is measured with.
    """
    name = options.get("backend")
    if name == FASTEST:
        name = fastest(preset, task=task, **options)
    return custom.with_attention(get_backend(name, options.get("device")), options.get("attention"))


def machine() -> dict[str, Any]:
    """What decides how fast backends are, besides the model: processor, cores, GPUs, variables, versions."""
    gpus: list[str] = []
    if found := shutil.which("nvidia-smi"):  # asking a framework means importing it
        command = [found, "--query-gpu=name", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            gpus = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": gpus,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "versions": versions,
        "kernels": kernels.describe(),
    }


def _look(preset: str | os.PathLike[str], options: LoadOptions) -> Source:
    """The preset's Source, closed again. Raises for what no backend can do, before each is started to say so.

    All files are fetched: the processes that are going to read them get no network, and no token.
    """
    check_dtype(options.get("dtype"))
    device = options.get("device")
    if device is not None and not re.fullmatch(r"cpu|(gpu|cuda|tpu|mps)(:\d+)?", device):
        raise DeviceError(f"device must be cpu, gpu, tpu, mps, or one of several, such as gpu:1; got {device!r}")
    with open_source(preset, options) as source:
        return source


def _usual_rows(source: Source) -> int:
    return 8 if source.model.reads == IMAGES else 1


def _report(
    source: Source, workload: Workload, names: Sequence[str], show: Callable[[str], object]
) -> BenchReport:  # fmt: skip
    unit = kind_reading(source.model.reads).unit
    return BenchReport(source.preset.name, unit, workload, machine(), measure(source, workload, names, show))


def _own(source: Source, attention: Any, layers: Any) -> list[tuple[str, Any]]:
    """Pieces of the user's own that the model is going to have: their kinds, and names or functions."""
    if layers is not None and not isinstance(layers, Mapping):
        return [("layer", layers)]  # loading will tell what is wrong
    attention = source.attention if attention is None else attention
    found = [("attention", attention)] if attention is not None else []
    found += [("layer", name) for name in (dict(source.layers) | dict(layers or {})).values()]
    return found + [("family", name) for name in custom.names("family") if name == source.config.model_type]


def _able(pieces: Sequence[tuple[str, Any]], names: Sequence[str]) -> str:
    """The one backend that the pieces are for."""
    able: list[str] = []
    for name in names:
        with contextlib.suppress(ConfigError):
            for kind, piece in pieces:
                (custom.given if kind == "attention" else custom.find)(kind, piece, name)
            able.append(name)
    if len(able) > 1:
        told = dict.fromkeys(f"the {kind} {getattr(piece, '__qualname__', piece)!r}" for kind, piece in pieces)
        raise InputError(
            f"backend={FASTEST!r} cannot measure pieces of your own ({', '.join(told)}), which the processes that "
            f"measure do not know; name a backend: {', '.join(able)}"
        )
    return (able or names)[0]  # none: loading will tell what is wrong


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], object]]:
    """A line on stderr, where that is a terminal, that says what is being measured."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda doing: None
        return
    with console.status("measuring") as status:
        yield lambda doing: status.update(f"measuring: {doing}")


def _say(line: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(line)


# --- verdicts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Verdict:
    """passing: the backends whose failures another day may not have."""

    backend: str
    device: str
    unit: str
    speeds: dict[str, float]
    measured: str  # a date
    failures: dict[str, str] = field(default_factory=dict)
    passing: list[str] = field(default_factory=list)
    kept: Path | None = None

    def line(self, preset: str) -> str:
        rest = sorted(self.speeds.keys() - {self.backend}, key=lambda name: -self.speeds[name])
        others = [f"{name} {_rounded(self.speeds[name])}" for name in rest]
        others += [f"{name} failed" for name in self.failures]
        beside = f" ({', '.join(others)})" if others else ""
        where = f", kept in {self.kept}" if self.kept else ""
        if where and self.passing:
            why = "; ".join(f"{name}: {textwrap.shorten(self.failures[name], 200)}" for name in self.passing)
            where += f", for this day only, as failures may pass: {why}"
        return (
            f"{self.backend} for {preset} on {self.device}: {_rounded(self.speeds[self.backend])} {self.unit}/s"
            f"{beside}; measured on {self.measured}{where}"
        )


class _Shelf:
    """Where one verdict is kept: a file of its own, so that who writes others is not in the way."""

    def __init__(self, source: Source, task: str, options: LoadOptions):
        asked = {name: options.get(name) for name in ("device", "quantize")} | {
            "dtype": check_dtype(options.get("dtype"))
        }
        self.key = {"model": _identity(source.preset.path), "task": task, **asked, **machine()}
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        self.path = cache_root(options.get("cache_dir")) / _FOLDER / f"{digest[:32]}.json"

    def read(self) -> _Verdict | None:
        """None: there is none, it is damaged, or its day is over."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            verdict = _Verdict(**data["verdict"], kept=self.path)
            fresh = verdict.measured == _today() or not verdict.passing
            sound = data["key"] == self.key and verdict.backend in installed() and fresh
            return verdict if sound and verdict.line("") else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def keep(self, report: BenchReport) -> _Verdict:
        """The verdict of a report in which a backend was measured; where the cache cannot be written it is not kept."""
        best = next(row for row in report.rows if row.backend == report.fastest)
        speeds = {row.backend: row.per_second for row in report.rows if row.per_second}
        failed = [row for row in report.rows if not row.per_second]
        failures = {row.backend: row.error or "" for row in failed}
        passing = [row.backend for row in failed if not row.refused]
        verdict = _Verdict(best.backend, best.device or "", report.unit, speeds, _today(), failures, passing)
        told = dataclasses.asdict(verdict)
        del told["kept"]
        work = self.path.with_name(f".{self.path.stem}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            work.write_text(json.dumps({"key": self.key, "verdict": told}, indent=1) + "\n", encoding="utf-8")
            work.replace(self.path)
        except OSError:
            return verdict
        return dataclasses.replace(verdict, kept=self.path)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Who else wants this verdict meanwhile waits: two that measure at once would measure each other."""
        from filelock import FileLock

        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a cache that cannot be written to
                self.path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(self.path.with_suffix(".lock"), mode=0o666))
            yield


def _identity(path: Path) -> str:
    """Of what decides the speed of a model: its config and the sizes of its files of weights."""
    digest = hashlib.sha256()
    if path.is_file():  # GGUF: the metadata is at the beginning
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
        weights = [path]
    else:
        digest.update((path / "config.json").read_bytes())
        weights = [file for file in path.iterdir() if file.suffix in (".safetensors", ".h5")]
    digest.update(str(sum(file.stat().st_size for file in weights)).encode())
    return digest.hexdigest()


def _today() -> str:
    return time.strftime("%Y-%m-%d")


def _rounded(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
