"""Native kernels and quantised decoding against memory's speed and llama.cpp, in one run; writes a Markdown table.

    python benchmarks/quantized.py FILE.gguf [--kernels] [--decode] [--repeats 5] [--backends jax] [--schemes int4]

FILE.gguf: a quantised model, such as Gemma 3 270M in Q4_K_M. Every figure of decoding is the median of processes of
their own, which take turns. llama.cpp: llama-cpp-python, built with what the processor has except AMX; its system line
is printed. Share: bytes of weights a token times tokens a second, of the stream: a plain read on all threads of four
times the last cache and 300 MB at least, in the same minute.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

PROMPT = "The history of the world begins with"
SHAPES = ((16384, 640), (2048, 640), (640, 2048), (1024, 640))
BACKENDS = ("numpy", "jax", "torch", "tensorflow")


def processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        flags = next((line.split() for line in lines if line.startswith("flags")), [])
    known = [flag for flag in flags if flag.startswith(("avx", "amx", "fma", "sse4_2"))]
    return f"{name or platform.machine()}, {len(os.sched_getaffinity(0))} cores, {' '.join(known)}"


def stream(threads: int, seconds: float = 1.5) -> float:
    """Bytes a second, the best pass."""
    import numpy as np

    words = np.ones((400 << 20) // 8, np.int64)
    parts = np.array_split(words, threads)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        workers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, words.nbytes / (time.perf_counter() - start))
    return best


def kernels_alone(rows: int, isa: str | None) -> None:
    """One line of JSON: seconds a call by kind and shape, on weights that are not in any cache; and the stream."""
    import numpy as np

    from modelhub.core import kernels
    from modelhub.core.backends import get_backend
    from modelhub.core.leaves import nbytes
    from modelhub.core.quantized import SCHEMES, empty_tiles, tiles_of

    native, xp = kernels.library(), get_backend("numpy")
    if isa:
        assert native.isa(isa), isa
    found = {"isa": native.isa(), "stream": stream(kernels.threads()), "rates": {}}
    for kind in (*kernels.FLOATS, *SCHEMES):
        for outputs, width in SHAPES:
            if kind in kernels.FLOATS:
                make = lambda: np.full((outputs, width), 1, np.float32 if kind == "float32" else np.uint16)  # noqa: B023, E731
                number = kernels.FLOATS[kind]
            else:
                number = kernels.SCHEMES[kind]

                def make():
                    arrays = empty_tiles(kind, (outputs, width))  # noqa: B023
                    for x in arrays.values():
                        x[...] = 1
                    return tiles_of(xp, arrays, kind, (outputs, width), "float32")  # noqa: B023

            size = nbytes(make())
            copies = [make() for _ in range(max(2, (300 << 20) // size))]
            parts = [x.parts if kind in SCHEMES else (x, None, None) for x in copies]
            x, y = np.ones((rows, width), np.float32), np.empty((rows, outputs), np.float32)
            times = []
            for _ in range(3):
                for part in parts:
                    start = time.perf_counter()
                    native.linear(number, *part, x, y, rows, outputs, width, kernels.threads(), 0)
                    times.append(time.perf_counter() - start)
            found["rates"][f"{kind} {outputs}x{width}"] = size / sorted(times)[len(times) // 10]
            del copies, parts
    found["stream"] = max(found["stream"], stream(kernels.threads()))
    print(json.dumps(found))


def decode(path: str, backend: str, scheme: str | None, tokens: int) -> None:
    """One line of JSON: seconds to load and to the first token, tokens a second, bytes of weights, peak memory."""
    from modelhub import CausalLM
    from modelhub.core.backends.base import host_peak
    from modelhub.core.leaves import nbytes

    start = time.perf_counter()
    lm = CausalLM.from_preset(path, backend=backend, quantize=scheme)
    loaded = time.perf_counter()
    lm.generate(PROMPT, 1, temperature=0)
    first = time.perf_counter()
    lm.generate(PROMPT, tokens, temperature=0)  # programs are compiled
    rates = []
    for _ in range(3):
        stamps = [time.perf_counter() for _ in lm.generate(PROMPT, tokens, temperature=0, stream=True, stop=[])]
        rates.append((lm.last_run.new_tokens - 2) / (stamps[-1] - stamps[1]) if len(stamps) > 3 else 0.0)
    size = sum(nbytes(x) for x in {id(x): x for x in lm.params.values()}.values())
    print(json.dumps({
        "load": loaded - start, "first": first - start, "rate": max(rates), "bytes": size, "peak": host_peak(),
    }))  # fmt: skip


def llama(path: str, tokens: int, prompt_tokens: int) -> None:
    import llama_cpp

    start = time.perf_counter()
    lm = llama_cpp.Llama(path, n_ctx=1024, n_threads=len(os.sched_getaffinity(0)), verbose=False)
    loaded = time.perf_counter()
    lm.create_completion(PROMPT, max_tokens=1, temperature=0)
    first = time.perf_counter()
    rates = []
    for _ in range(3):
        lm.reset()
        lm.eval(lm.tokenize(PROMPT.encode()))
        token = lm.sample(temp=0)
        begin = time.perf_counter()
        for _ in range(tokens):
            lm.eval([token])
            token = lm.sample(temp=0)
        rates.append(tokens / (time.perf_counter() - begin))
    lm.reset()
    begin = time.perf_counter()
    lm.eval(list(range(100, 100 + prompt_tokens)))
    print(json.dumps({
        "load": loaded - start, "first": first - start, "rate": max(rates),
        "prompt": prompt_tokens / (time.perf_counter() - begin),
        "system": llama_cpp.llama_print_system_info().decode(),
    }))  # fmt: skip


def child(*args: str) -> dict | None:
    done = subprocess.run([sys.executable, __file__, *args], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        print(f"{' '.join(args)} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
    return json.loads(lines[-1]) if lines else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--schemes", nargs="+", default=["None", "int8", "int4", "keep"])
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, *rest = args.child
        if what == "kernels":
            kernels_alone(int(rest[0]), rest[1] if len(rest) > 1 else None)
        elif what == "decode":
            decode(rest[0], rest[1], None if rest[2] == "None" else rest[2], int(rest[3]))
        else:
            llama(rest[0], int(rest[1]), 512)
        return
    print(f"- {processor()}; load average at the start {os.getloadavg()[0]:.1f}")
    if args.kernels:
        one = {}
        for isa in ("", "avx2"):
            for rows in (1, 4, 8):
                found = child("--child", "kernels", str(rows), *([isa] if isa else []))
                if found is None:
                    continue
                print(f"\n{found['isa']}, {rows} rows: stream {found['stream'] / 1e9:.1f} GB/s\n")
                print("| kind | " + " | ".join(f"{n}x{k}" for n, k in SHAPES) + " | worst share | time of one row |")
                print("|---" * (len(SHAPES) + 3) + "|")
                for kind in dict.fromkeys(name.split()[0] for name in found["rates"]):
                    rates = [found["rates"][f"{kind} {n}x{k}"] for n, k in SHAPES]
                    one.setdefault((found["isa"], kind), rates)
                    slower = max(a / b for a, b in zip(one[found["isa"], kind], rates, strict=True))
                    print(f"| {kind} | " + " | ".join(f"{rate / 1e9:.1f}" for rate in rates)
                          + f" | {min(rates) / found['stream']:.2f} | {slower:.2f} |")  # fmt: skip
    if args.decode:
        jobs = [("llama",)] + [("decode", name, scheme) for name in args.backends for scheme in args.schemes]
        found: dict = {job: [] for job in jobs}
        streams = []
        for _ in range(args.repeats):
            streams.append(stream(len(os.sched_getaffinity(0))))
            for job in jobs:
                words = ["--child", job[0], str(Path(args.file).resolve()), *map(str, job[1:]), str(args.tokens)]
                if (row := child(*words)) is not None:
                    found[job].append(row)
        speed = max(streams)
        peer = statistics.median(row["rate"] for row in found[("llama",)])
        system = found[("llama",)][0]["system"]
        print(f"- stream {speed / 1e9:.1f} GB/s; llama.cpp: {system}\n")
        print("| what | MB | load s | first token s | tokens/s (each process) | share | of llama.cpp | peak MB |")
        print("|---|---|---|---|---|---|---|---|")
        for job, rows in found.items():
            if not rows:
                continue
            median = {key: statistics.median(row[key] for row in rows) for key in ("load", "first", "rate")}
            size = rows[0].get("bytes", Path(args.file).stat().st_size if job[0] == "llama" else 0)
            share = size * median["rate"] / speed
            every = ", ".join(f"{rate:.1f}" for rate in sorted(row["rate"] for row in rows))
            peak = statistics.median(row.get("peak", 0) for row in rows) / 1e6
            print(f"| {' '.join(map(str, job))} | {size / 1e6:,.0f} | {median['load']:.2f} | {median['first']:.2f} | "
                  f"{median['rate']:.1f} ({every}) | {share:.2f} | {median['rate'] / peer:.2f} | "
                  f"{peak:,.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()
