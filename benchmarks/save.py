"""What saving a model costs beside writing and syncing as many bytes: save_to_preset alone, and with the checksums that
publishing makes. The three take turns.

python benchmarks/save.py PRESET [--backend torch] [--repeats 5]
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from modelhub import CausalLM
from modelhub.model.saving import MAX_SHARD_SIZE


def write_and_sync(source: Path, target: Path) -> None:
    """The same bytes, out of memory, in one piece per file."""
    target.mkdir()
    for path in source.iterdir():
        data = path.read_bytes()
        begun = time.perf_counter()
        with open(target / path.name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        write_and_sync.seconds += time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    lm = CausalLM.from_preset(args.preset, backend=args.backend, device="cpu")
    times: dict[str, list[float]] = {"written": [], "saved": [], "saved and hashed": []}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        saved, plain = Path(folder, "saved"), Path(folder, "plain")
        for _ in range(args.repeats + 1):
            shutil.rmtree(saved, ignore_errors=True)
            begun = time.perf_counter()
            lm.save_to_preset(saved)
            times["saved"].append(time.perf_counter() - begun)
            shutil.rmtree(saved)
            begun = time.perf_counter()
            lm._save(saved, None, MAX_SHARD_SIZE, {})  # as publish calls it
            times["saved and hashed"].append(time.perf_counter() - begun)
            write_and_sync.seconds = 0.0
            write_and_sync(saved, plain)
            times["written"].append(write_and_sync.seconds)
            shutil.rmtree(plain)
        size = sum(path.stat().st_size for path in saved.iterdir())
    medians = {what: statistics.median(values[1:]) for what, values in times.items()}  # the first warms up
    print(f"{args.preset} on {args.backend}: {size / 1e9:.2f} GB, {args.repeats} repeats, medians\n")
    print("| what | seconds | of writing and syncing |\n|---|---|---|")
    for what, seconds in medians.items():
        spread = f"{min(times[what][1:]):.2f} to {max(times[what][1:]):.2f}"
        print(f"| {what} | {seconds:.2f} ({spread}) | {seconds / medians['written']:.2f}x |")


if __name__ == "__main__":
    main()
