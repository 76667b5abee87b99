"""Time loading and generating on every backend, transformers and KerasHub in the same run; write a Markdown table.

Each measurement is a process of its own (worker.py). The libraries take turns, --repeats times; the table shows medians
and, in brackets, the smallest and largest value. Linux only. README.md tells what is needed.
"""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
OURS, TRANSFORMERS, KERAS = "modelhub", "transformers", "keras_hub"
BACKENDS = ("jax", "torch", "tensorflow", "numpy")
FORMATS = {"s": "{:.3g}", "tokens/s": "{:.1f}", "MB": "{:.0f}"}
Job = tuple[str, str, str]  # measurement, library, backend
Results = dict[Job, list[dict[str, Any]]]


@dataclass(frozen=True)
class Row:
    """One line of the table: a field of a measurement, ours and a peer's; the target is for ours or for ours / peer."""

    title: str
    measurement: str
    field: str
    unit: str
    backend: str
    peer: tuple[str, str] | None = None
    target: float | None = None
    target_of_ratio: bool = False


def table_rows(weights: int) -> list[Row]:
    """weights: bytes, in float32."""
    memory = (1.3 * weights + 300e6) / 1e6
    peers = {
        "jax": (KERAS, "jax"),
        "torch": (TRANSFORMERS, "torch"),
        "tensorflow": (KERAS, "tensorflow"),
        "numpy": (TRANSFORMERS, "torch"),
    }
    speed_ratio = {"jax": 1.15, "torch": 3, "tensorflow": 1.75, "numpy": 2}
    gguf_peer = {"torch": (TRANSFORMERS, "torch")}
    ready, gguf = "from_preset and first token, HF folder", "from_preset, GGUF with tokenizer"
    start, eight = "process start to first token, {} compilation cache", "8 prompts of mixed length at once"
    torch = (TRANSFORMERS, "torch")
    return [
        Row("`import modelhub`", "import", "bare", "s", "", None, 0.5),
        Row("`from modelhub import CausalLM`", "import", "with_task", "s", "", None, 0.5),
        *(Row(ready, "one", "ready", "s", name, peers[name], 1 / 3, True) for name in BACKENDS),
        *(Row(gguf, "load", "seconds", "s", name, gguf_peer.get(name), 6) for name in BACKENDS),
        Row(start.format("empty"), "start", "empty", "s", "jax", None, 9),
        Row(start.format("warm"), "start", "warm", "s", "jax", None, 5),
        *(Row("decode", "one", "speed", "tokens/s", name, peers[name], speed_ratio[name], True) for name in BACKENDS),
        Row("decode", "one", "speed", "tokens/s", "torch", (KERAS, "torch")),
        *(Row(eight, "eight", "speed", "tokens/s", name, torch, 2.2, True) for name in ("jax", "torch")),
        *(
            Row("peak memory, loading and generating", "one", "memory", "MB", name, peers[name], memory)
            for name in BACKENDS
        ),
    ]


class Bench:
    def __init__(self, args: argparse.Namespace, weights: int):
        self.args = args
        self.pythons = {OURS: sys.executable, TRANSFORMERS: sys.executable, KERAS: args.peer_python}
        cores = sorted(os.sched_getaffinity(0))[: args.threads]
        os.sched_setaffinity(0, cores)  # the processes inherit it: XLA starts a thread for each core it may use
        threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
        self.environment = {
            **os.environ,
            **dict.fromkeys(threads, str(len(cores))),
            "CUDA_VISIBLE_DEVICES": "",
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        self.environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        if args.warm_memory:
            self.environment["BENCH_WARM_MEMORY"] = str(4 * weights)

    def skips(self, job: Job) -> bool:
        measurement, library, _ = job
        return (
            (library == KERAS and self.args.skip_keras)
            or (measurement == "load" and self.args.gguf is None)
            or (measurement == "load" and library != OURS and not self.args.gguf_peer)
        )

    def run(self, job: Job) -> dict[str, Any]:
        """The measurement's values, or {"error": reason}."""
        with tempfile.TemporaryDirectory() as cache:
            if job[0] != "start":
                return self.process(job, cache)
            found = {}
            for state in ("empty", "warm"):
                begun = time.time()
                values = self.process(job, cache)
                if "error" in values:
                    return values
                found[state] = values["time"] - begun
            return found

    def process(self, job: Job, cache: str) -> dict[str, Any]:
        """cache: where JAX keeps compiled programs."""
        measurement, library, backend = job
        model = self.args.gguf if measurement == "load" else self.args.folder
        operands = [] if measurement in ("import", "versions") else [library, backend, str(model)]
        done = subprocess.run(
            [self.pythons[library], str(WORKER), measurement, *operands],
            env={**self.environment, "MODELHUB_CACHE": cache},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
        return json.loads(done.stdout.splitlines()[-1])


def measure(bench: Bench, rows: list[Row], repeats: int) -> Results:
    sides = [(row.measurement, *side) for row in rows for side in ((OURS, row.backend), row.peer) if side]
    results: Results = {job: [] for job in sides if not bench.skips(job)}
    for repeat in range(repeats):
        for job in results:
            print(f"[{repeat + 1}/{repeats}] {' '.join(job).strip()}: ", end="", file=sys.stderr, flush=True)
            begun = time.monotonic()
            found = bench.run(job)
            results[job].append(found)
            shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())
            print(f"{shown} ({time.monotonic() - begun:.0f} s)", file=sys.stderr)
    return results


def summary(row: Row, results: list[dict[str, Any]]) -> tuple[float, str]:
    """The median and how it is shown; NaN and the reason where there is none."""
    if not results:
        return math.nan, "skipped"
    if error := next((result["error"] for result in results if "error" in result), None):
        return math.nan, f"failed: {error[:100].replace('|', '/')}"
    values = [result[row.field] / (1e6 if row.unit == "MB" else 1) for result in results]
    text = FORMATS[row.unit].format
    spread = f" ({text(min(values))} to {text(max(values))})" if len(values) > 1 else ""
    return statistics.median(values), f"{text(statistics.median(values))} {row.unit}{spread}"


def line(row: Row, results: Results) -> str:
    """The row in Markdown."""
    mine = results.get((row.measurement, OURS, row.backend), [])
    ours, shown = summary(row, mine)
    peer, peer_shown = math.nan, "-"
    if row.peer:
        peer, peer_shown = summary(row, results.get((row.measurement, *row.peer), []))
        peer_shown = f"{' '.join(row.peer)}: {peer_shown}"
    ratio = f"{ours / peer:.2f}x" if ours / peer > 0 else "-"
    goal = met = "-"
    if row.target is not None:
        judged = ours / peer if row.target_of_ratio else ours
        at_least = row.unit == "tokens/s"
        unit = "x" if row.target_of_ratio else " " + row.unit
        goal = f"{'at least' if at_least else 'at most'} {row.target:.4g}{unit}"
        if judged > 0:
            met = "yes" if (judged >= row.target if at_least else judged <= row.target) else "**no**"
    if frameworks := {name for result in mine for name in result.get("frameworks", ())}:
        met = f"**no**, it imports {', '.join(sorted(frameworks))}"
    return f"| {row.title} | {row.backend or '-'} | {shown} | {peer_shown} | {ratio} | {goal} | {met} |"


def facts(bench: Bench, weights: int) -> list[str]:
    cpu = next((x.split(":")[1].strip() for x in read("/proc/cpuinfo") if x.startswith("model name")), "unknown")
    memory = next(int(x.split()[1]) for x in read("/proc/meminfo") if x.startswith("MemTotal")) / 2**20
    lines = [
        f"- {cpu}, {len(os.sched_getaffinity(0))} cores used, {memory:.0f} GiB memory; {platform.platform()}; "
        f"load average at the start {os.getloadavg()[0]:.1f}",
        f"- Model: {bench.args.folder.name}, {weights / 1e6:.0f} MB of weights in float32; medians of "
        f"{bench.args.repeats} (smallest to largest)"
        + ("; free memory touched before each clock" if bench.args.warm_memory else ""),
    ]
    for library in (OURS, KERAS):
        job = ("versions", library, "")
        if not bench.skips(job):
            found = ", ".join(f"{name} {version}" for name, version in bench.run(job).items())
            lines.append(f"- Python of {'modelhub and transformers' if library == OURS else 'KerasHub'}: {found}")
    return lines


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
        with path.open("rb") as file, open(os.devnull, "wb") as sink:
            shutil.copyfileobj(file, sink, 1 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="Hugging Face folder with safetensors and tokenizer")
    parser.add_argument("--gguf", type=Path, help="the GGUF rows need it")
    parser.add_argument(
        "--gguf-peer", action="store_true", help="load the GGUF with transformers too (a minute each time)"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that KerasHub is installed in")
    parser.add_argument("--skip-keras", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm-memory", action="store_true", help="touch free memory before each clock; see README.md")
    parser.add_argument("--only", nargs="+", choices=("import", "one", "load", "start", "eight"), help="measurements")
    parser.add_argument("--output", type=Path, help="default: standard output")
    args = parser.parse_args()

    weights = weights_bytes(args.folder)
    bench = Bench(args, weights)
    warm_disk_cache([*(path for path in args.folder.iterdir() if path.is_file()), *filter(None, [args.gguf])])
    rows = [row for row in table_rows(weights) if not args.only or row.measurement in args.only]
    lines = [*facts(bench, weights), ""]
    lines += ["| figure | backend | modelhub | peer | ratio | target | met |", "|---|---|---|---|---|---|---|"]
    results = measure(bench, rows, args.repeats)
    text = "\n".join([*lines, *(line(row, results) for row in rows)]) + "\n"
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
