"""Killed at random moments, by the dozen: what was there before is whole, and the same command goes on.

MODELHUB_SOAK_KILLS: how many times each (default 20).
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_preset import write_preset

from modelhub import CausalLM
from modelhub.hub.gguf import open_gguf
from modelhub.hub.resources import resource

pytestmark = pytest.mark.soak
KILLS = int(os.environ.get("MODELHUB_SOAK_KILLS", 20))
TINY = str(resource("presets") / "gemma3_tiny")
ROWS = [{"instruction": f"Count to {n}.", "response": " ".join(map(str, range(n)))} for n in range(2, 26)]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from modelhub.cli import main; main()", *arguments]


def killed(arguments: list[str], folder: Path, after: float) -> bool:
    """Whether the command was still running `after` seconds, and was killed then."""
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(arguments, cwd=folder, stdout=log, stderr=log)
        try:
            code = process.wait(after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return True
    assert code == 0, (folder / "log.txt").read_text()[-3000:]
    return False


def whole(arguments: list[str], folder: Path) -> float:
    """The seconds that it takes when nothing kills it."""
    begun = time.perf_counter()
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return time.perf_counter() - begun


def same(folder: Path, other: Path) -> None:
    """Two adapters, tensor by tensor."""
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (folder, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_training_run(tmp_path, backend):
    """Killed again and again until it is through, it ends in the adapter of the unbroken run, bit for bit."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for folder in (unbroken, broken):
        folder.mkdir()
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    train = command(
        "finetune", "--preset", TINY, "--data", "rows.jsonl", "--backend", backend, "--output", "adapter", "--rank", "4",
        "--sequence-length", "64", "--batch-size", "1", "--epochs", "40", "--save-steps", "2",
    )  # fmt: skip
    seconds = whole(train, unbroken)
    chance, kills = random.Random(backend), 0
    while killed(train, broken, chance.uniform(0.1, 0.5) * seconds if kills < KILLS else 10 * seconds):
        kills += 1
    assert kills >= min(KILLS, 3), "the run was over before it could be killed: give it more epochs"
    same(unbroken / "adapter", broken / "adapter")


def overwritten(tmp_path: Path, script: str, check) -> None:
    """Run a program that replaces something over and over, kill it at random moments, and look at what is left.

    The program prints a line when it has begun.
    """
    chance = random.Random(0)
    for _ in range(KILLS):
        process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        assert process.stdout and process.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.8))
        assert process.poll() is None
        process.kill()
        process.wait()
        process.stdout.close()
        check()


def test_saving(tmp_path):
    script = f"""
from modelhub import CausalLM
lm = CausalLM.from_preset({TINY!r}, backend="numpy")
lm.save_to_preset("saved")
print("begun", flush=True)
while True:
    lm.save_to_preset("saved")
"""
    wanted = CausalLM.from_preset(TINY, backend="numpy").logits([[2, 5, 9]])

    def check():
        np.testing.assert_array_equal(
            CausalLM.from_preset(str(tmp_path / "saved"), backend="numpy").logits([[2, 5, 9]]), wanted
        )

    overwritten(tmp_path, script, check)
    CausalLM.from_preset(TINY, backend="numpy").save_to_preset(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"], "an unfinished copy was left"


def test_publishing(tmp_path):
    hub = (tmp_path / "hub").as_uri()
    script = f"""
import os
os.environ["MODELHUB_CACHE"] = {str(tmp_path / "cache")!r}
from modelhub import CausalLM
lm = CausalLM.from_preset({TINY!r}, backend="numpy")
lm.publish({hub + "/tiny"!r})
print("begun", flush=True)
name = "model.norm.weight"
for turn in range(10_000):
    lm.params = lm.params | {{name: lm.params[name] + 1e-3}}
    lm.publish({hub + "/tiny"!r})
"""

    def check():
        for listed in (tmp_path / "hub").rglob("SHA256SUMS"):
            subprocess.run(["sha256sum", "--check", "--strict", "--quiet", listed.name], cwd=listed.parent, check=True)
        CausalLM.from_preset(hub + "/tiny", backend="numpy", cache_dir=str(tmp_path / "reader"))

    overwritten(tmp_path, script, check)


def test_converting(tmp_path):
    script = f"""
from modelhub import CausalLM, convert
convert({str(tmp_path / "preset")!r}, "model.gguf", force=True)
print("begun", flush=True)
while True:
    convert({str(tmp_path / "preset")!r}, "model.gguf", force=True)
"""
    write_preset(tmp_path / "preset")

    def check():
        with open_gguf(tmp_path / "model.gguf") as file:
            for name in file.tensors:
                assert np.isfinite(file.read(name)).all()

    overwritten(tmp_path, script, check)
