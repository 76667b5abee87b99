"""`modelhub bench` as a shell sees it."""

import json
import subprocess
import sys

import pytest

ENTRY = [sys.executable, "-c", "from modelhub.cli import main; main()"]


def run(*arguments):
    return subprocess.run([*ENTRY, "bench", *arguments], capture_output=True, text=True, timeout=120)


def test_json():
    done = run("vit_tiny_fashion", "--backends", "numpy", "--batch-size", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    [row] = found["rows"]
    assert found["fastest"] == row["backend"] == "numpy" and found["unit"] == "images"
    assert found["workload"]["batch_size"] == 2 and row["per_second"] > 0 and row["error"] is None


def test_tables():
    lengths = ("--max-new-tokens", "4", "--prompt-tokens", "8")
    done = run("--preset", "gemma3_tiny", "--backends", "numpy", "--train", "--steps", "1", *lengths)
    assert done.returncode == 0, done.stderr
    assert "gemma3_tiny on " in done.stderr and "prompts of 8 tokens, answers of 4" in done.stderr
    speed, training = done.stdout.split("training")
    assert all(title in speed for title in ("version", "load s", "token s", "tokens/s", "peak MB"))
    assert all(title in training for title in ("step s", "samples/s", "tokens/s", "peak MB"))
    assert speed.splitlines()[-1].startswith("numpy") and "-" not in speed.splitlines()[-1]
    assert training.split()[-4:] == ["-"] * 4  # numpy has no gradients, and that is no failure
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give one preset"),
        (("gemma3_tiny", "--preset", "gemma3_tiny"), "give one preset"),
        (("gemma3_tiny", "--backends", "numpy,mxnet"), "unknown backend 'mxnet'"),
        (("gemma3_tiny", "--backends", "numpy", "--device", "gpu"), "numpy failed: device 'gpu' was asked for"),
        (("gemma3_tiny", "--dtype", "int8"), "dtype must be one of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_errors(arguments, says):
    done = run(*arguments)
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout  # no table of nothing
