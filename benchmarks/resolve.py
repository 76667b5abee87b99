"""How long a cached, pinned preset takes to resolve, imports included, in fresh processes that may not use a network.

python benchmarks/resolve.py [--code FOLDER_OF_ANOTHER_CHECKOUT]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
from stand_ins.hf_hub import Repo, commit_of, serve  # noqa: E402

RUNS = 20
FILES = {"config.json": b"{}", "tokenizer.json": bytes(1 << 20), "model.safetensors": bytes(1 << 22)}
FETCH = "import sys; from modelhub.hub.preset import resolve; resolve(sys.argv[1])"
MEASURE = """
import sys, time
import json, logging, pathlib, subprocess, urllib.request, numpy
def no_network(*args):
    raise AssertionError("the network was used")
import socket
socket.socket.connect = socket.getaddrinfo = no_network
start = time.perf_counter()
from modelhub.hub.preset import resolve
resolve(sys.argv[1], offline=len(sys.argv) > 2)
print(time.perf_counter() - start, "huggingface_hub" in sys.modules)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--code", type=Path, default=ROOT, help="the checkout to measure")
    code = parser.parse_args().code.resolve()
    hub = serve()
    hub.repos["google/tiny"] = Repo({"main": FILES})
    branch, pinned = "hf://google/tiny", f"hf://google/tiny@{commit_of(FILES)}"
    with tempfile.TemporaryDirectory() as home:
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment = os.environ | quiet | {"HF_ENDPOINT": hub.url, "HF_HOME": home, "PYTHONPATH": str(code)}
        environment.pop("MODELHUB_CACHE", None)

        def run(program: str, *args: str) -> str:
            command = [sys.executable, "-c", program, *args]
            return subprocess.run(command, env=environment, check=True, text=True, stdout=-1, cwd=home).stdout

        run(FETCH, branch)
        hub.close()
        cases = {"a commit": [pinned], "a commit, offline=True": [pinned, "1"], "main, offline=True": [branch, "1"]}
        for what, args in cases.items():
            answers = [run(MEASURE, *args).split() for _ in range(RUNS)]
            times = sorted(float(seconds) * 1e3 for seconds, _ in answers)
            client = "with" if answers[0][1] == "True" else "without"
            spread = f"[{times[0]:.1f} to {times[-1]:.1f}]"
            print(f"{what:<24} {statistics.median(times):6.1f} ms {spread}, {client} the client")


if __name__ == "__main__":
    main()
