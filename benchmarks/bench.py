"""What the benchmarks share: each measurement is a process of its own, the libraries take turns, and the medians become
a Markdown table, with the smallest and largest value in brackets. Linux only."""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS, TRANSFORMERS, KERAS, PEFT = "modelhub", "transformers", "keras_hub", "peft"
BACKENDS = ("jax", "torch", "tensorflow", "numpy")
H200_BFLOAT16 = 989e12  # a second, dense; the H100 has the same
UNITS = {  # how it is shown, and what one is
    "s": ("{:.3g}", 1.0),
    "%": ("{:.1f}", 1.0),
    "tokens": ("{:.0f}", 1.0),
    "tokens/s": ("{:.1f}", 1.0),
    "samples/s": ("{:.3g}", 1.0),
    "images/s": ("{:.3g}", 1.0),
    "MB": ("{:.0f}", 1e6),
    "GB": ("{:.2f}", 1e9),
    "GFLOP/s": ("{:.0f}", 1e9),
    "% of 989 TFLOP/s": ("{:.1f}", H200_BFLOAT16 / 100),
}
Job = tuple[str, str, str]  # measurement, library, backend
Results = dict[Job, list[dict[str, Any]]]


@dataclass(frozen=True)
class Row:
    """One line of the table: a field of a measurement, ours and a peer's; the target is for ours or for ours / peer.

    A side with several backends, between spaces, is the best of them. peer_measurement: where it is another one.
    """

    title: str
    measurement: str
    field: str
    unit: str
    backend: str
    peer: tuple[str, str] | None = None
    target: float | None = None
    target_of_ratio: bool = False
    peer_measurement: str | None = None

    @property
    def more_is_better(self) -> bool:
        return "/s" in self.unit

    def jobs(self) -> tuple[list[Job], list[Job]]:
        """Ours and the peer's."""
        ours = [(self.measurement, OURS, backend) for backend in self.backend.split(" ")]
        library, backends = self.peer or ("", "")
        measurement = self.peer_measurement or self.measurement
        return ours, [(measurement, library, backend) for backend in backends.split(" ") if self.peer]


class Bench:
    """Runs jobs with a worker script. models: what a measurement gets in place of --folder; None: it is left out.

    keeps_cache: measurements that use the user's own cache of models; the others get an empty one.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        worker: str = "worker.py",
        models: Mapping[str, Any] | None = None,
        keeps_cache: str | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self.args, self.worker, self.keeps_cache = args, HERE / worker, keeps_cache
        self.models = models or {}
        cores = sorted(os.sched_getaffinity(0))[: args.threads]
        os.sched_setaffinity(0, cores)  # the processes inherit it: XLA starts a thread for each core it may use
        threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
        self.environment = {
            **os.environ,
            **dict.fromkeys(threads, str(len(cores))),
            "HF_HUB_OFFLINE": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **({"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"} if environment is None else environment),
        }
        self.environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        if args.warm_memory:
            self.environment["BENCH_WARM_MEMORY"] = str(4 * weights_bytes(args.folder))

    def skips(self, job: Job) -> bool:
        measurement, library, _ = job
        return (library == KERAS and self.args.skip_keras) or self.models.get(measurement, "") is None

    def run(self, job: Job) -> dict[str, Any]:
        """The measurement's values, or {"error": reason}."""
        measurement, library, backend = job
        worker = HERE / "worker.py" if measurement == "versions" else self.worker
        model = self.models.get(measurement, self.args.folder)
        with tempfile.TemporaryDirectory() as cache:
            environment = self.environment | ({"MODELHUB_CACHE": cache} if measurement != self.keeps_cache else {})
            done = subprocess.run(
                [self.args.peer_python if library == KERAS else sys.executable, worker, *job, model],
                env=environment, capture_output=True, text=True,
            )  # fmt: skip
        if done.returncode:
            return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
        return json.loads(done.stdout.splitlines()[-1])

    def report(self, rows: list[Row]) -> None:
        """Measure all that the rows show; write the table."""
        args = self.args
        warm_disk_cache([*args.folder.iterdir(), *(Path(model) for model in self.models.values() if model)])
        if args.only:
            rows = [row for row in rows if row.measurement in args.only]
        lines = [*self.facts(rows), ""]
        lines += ["| figure | backend | modelhub | peer | ratio | target | met |", "|---|---|---|---|---|---|---|"]
        results = self.measure(rows)
        text = "\n".join([*lines, *(line(row, results) for row in rows)]) + "\n"
        if args.output:
            args.output.write_text(text, encoding="utf-8")
        else:
            print(text, end="")

    def measure(self, rows: list[Row]) -> Results:
        results: Results = {job: [] for row in rows for jobs in row.jobs() for job in jobs if not self.skips(job)}
        for repeat in range(self.args.repeats):
            for job in results:
                print(
                    f"[{repeat + 1}/{self.args.repeats}] {' '.join(job).strip()}: ", end="", file=sys.stderr, flush=True
                )
                begun = time.monotonic()
                found = self.run(job)
                results[job].append(found)
                shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())
                print(f"{shown} ({time.monotonic() - begun:.0f} s)", file=sys.stderr)
        return results

    def facts(self, rows: list[Row]) -> list[str]:
        args = self.args
        cpu = next((x.split(":")[1].strip() for x in read("/proc/cpuinfo") if x.startswith("model name")), "unknown")
        memory = next(int(x.split()[1]) for x in read("/proc/meminfo") if x.startswith("MemTotal")) / 2**20
        lines = [
            f"- {cpu}, {len(os.sched_getaffinity(0))} cores used, {memory:.0f} GiB memory; {platform.platform()}; "
            f"load average at the start {os.getloadavg()[0]:.1f}",
            f"- Model: {args.folder.name}, {weights_bytes(args.folder) / 1e6:.0f} MB of weights in float32; medians of "
            f"{args.repeats} (smallest to largest)"
            + ("; free memory touched before each clock" if args.warm_memory else ""),
        ]
        libraries = {job[1] for row in rows for jobs in row.jobs() for job in jobs if not self.skips(job)}
        for library in (OURS, KERAS):
            if library in libraries:
                found = ", ".join(f"{k} {v}" for k, v in self.run(("versions", library, "")).items())
                lines.append(f"- Python of {'KerasHub' if library == KERAS else 'the others'}: {found}")
        return lines


def summary(row: Row, jobs: list[Job], results: Results) -> tuple[float, str, str]:
    """The best job's median, how it is shown, and its backend; NaN and the reason where there is none."""
    found = [job for job in jobs if results.get(job)]
    errors = [next((r["error"] for r in results[job] if "error" in r), "") for job in found]
    form, one = UNITS[row.unit]
    values = [
        (sorted(r[row.field] / one for r in results[job]), job[2])
        for job, error in zip(found, errors, strict=True)
        if not error
    ]
    if not values:
        return math.nan, f"failed: {errors[0][:100].replace('|', '/')}" if found else "skipped", jobs[0][2]
    best = max if row.more_is_better else min
    run, backend = best(values, key=lambda value: statistics.median(value[0]))
    spread = f" ({form.format(run[0])} to {form.format(run[-1])})" if len(run) > 1 else ""
    median = statistics.median(run)
    return median, f"{form.format(median)} {row.unit}{spread}", backend


def line(row: Row, results: Results) -> str:
    """The row in Markdown."""
    mine, theirs = row.jobs()
    ours, shown, backend = summary(row, mine, results)
    peer, peer_shown = math.nan, "-"
    if theirs:
        peer, peer_shown, peer_backend = summary(row, theirs, results)
        peer_shown = f"{theirs[0][1]} {peer_backend}: {peer_shown}"
    ratio = f"{ours / peer:.2f}x" if ours / peer > 0 else "-"
    goal = met = "-"
    if row.target is not None:
        judged = ours / peer if row.target_of_ratio else ours
        unit = "x" if row.target_of_ratio else " " + row.unit
        goal = f"{'at least' if row.more_is_better else 'at most'} {row.target:.4g}{unit}"
        if not math.isnan(judged):
            met = "yes" if (judged >= row.target if row.more_is_better else judged <= row.target) else "**no**"
    if frameworks := {name for job in mine for result in results.get(job, ()) for name in result.get("frameworks", ())}:
        met = f"**no**, it imports {', '.join(sorted(frameworks))}"
    return f"| {row.title} | {backend or '-'} | {shown} | {peer_shown} | {ratio} | {goal} | {met} |"


def read(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


def weights_bytes(folder: Path) -> int:
    """What the folder's weights take in float32."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        count += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return 4 * count


def warm_disk_cache(paths: list[Path]) -> None:
    for path in paths:
        if path.is_file():
            with path.open("rb") as file, open(os.devnull, "wb") as sink:
                shutil.copyfileobj(file, sink, 1 << 20)


def parser(doc: str | None, only: tuple[str, ...], keras: bool = True, folder: bool = True) -> argparse.ArgumentParser:
    """The options that all benchmarks have. only: the measurements; keras: whether KerasHub is a peer."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--folder", type=Path, required=folder, help="Hugging Face folder, safetensors and tokenizer")
    found.set_defaults(peer_python=sys.executable, skip_keras=not keras)
    if keras:
        found.add_argument("--peer-python", help="a Python that KerasHub is installed in")
        found.add_argument("--skip-keras", action="store_true")
    found.add_argument("--repeats", type=int, default=3)
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--warm-memory", action="store_true", help="touch free memory before each clock; see README.md")
    found.add_argument("--only", nargs="+", choices=only, help="measurements")
    found.add_argument("--output", type=Path, help="default: standard output")
    return found
