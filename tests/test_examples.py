"""Every script in examples/ runs, on a tiny random model."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from modelhub import CausalLM
from modelhub.hub.resources import resource

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUN_HERE = {}


def example(*names):
    """Says which scripts a test runs, so that none is forgotten."""

    def mark(test):
        RUN_HERE.update(dict.fromkeys(names, test))
        return test

    return mark


@pytest.fixture
def run(tiny_preset, tmp_path, monkeypatch, capsys):
    """Run a script in this process; returns its names and what it printed."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        small = ["--preset", str(tiny_preset), "--sequence-length", "64"]
        monkeypatch.setattr(sys, "argv", [name, *small, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__"), capsys.readouterr().out

    return run


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RUN_HERE)


@example("lora_gemma.py")
def test_lora_gemma(run):
    names, out = run("lora_gemma.py", "--backend", "torch", "--max-new-tokens", 8)
    assert "Before:\nInstruction:\nWhat should I do on a trip to Europe?\n\nResponse:\n" in out and "After:" in out
    assert "LoRA on 4 layers: q_proj, v_proj" in out and "rank 4" in out
    history, lm = names["history"], names["lm"]
    assert set(history.history) >= {"loss", "accuracy"} and len(history.steps) > 100
    assert lm.backbone.trainable_names() and float(abs(lm.params["model.layers.0.self_attn.q_proj.lora.lora_B"]).sum())


@example("own_loss.py")
def test_own_loss(run):
    torch, jax = (run("own_loss.py", "--steps", 8, "--backend", name)[0]["history"] for name in ("torch", "jax"))
    on_torch, on_jax = ([step["loss"] for step in history.steps] for history in (torch, jax))
    assert on_torch == pytest.approx(on_jax, rel=1e-4) and on_torch[-1] != on_torch[0]


@example("optax_optimizer.py")
def test_optax_optimizer(run):
    history = run("optax_optimizer.py", "--steps", 30)[0]["history"]
    losses = [step["loss"] for step in history.steps]
    assert len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5])


@example("resume_on_another_backend.py")
def test_resume_on_another_backend(run, tiny_preset):
    names, out = run("resume_on_another_backend.py")
    assert re.findall(r"^epoch (\d): loss", out, re.MULTILINE) == ["1", "2"]
    lm = CausalLM.from_preset(str(tiny_preset), backend="torch")
    lm.preprocessor.sequence_length = 64
    lm.enable_lora(rank=8)
    lm.compile("adamw", learning_rate=1e-3)
    unbroken = lm.fit(resource("finetune") / "dolly_style.jsonl", epochs=2, batch_size=4)
    losses = ([step["loss"] for step in history.steps] for history in (names["history"], unbroken))
    assert next(losses) == pytest.approx(next(losses), rel=1e-4)


@example("tfrecord_to_torch.py", "dataloader_to_jax.py")
@pytest.mark.parametrize("name", ["tfrecord_to_torch.py", "dataloader_to_jax.py"])
def test_pipelines_of_other_frameworks(name, tiny_preset, tmp_path):
    """In a process of its own: workers import the script by its path, and one sets TensorFlow's devices."""
    options = ["--preset", tiny_preset, "--sequence-length", 64, "--steps", 25, "--learning-rate", 0.05]
    options += ["--workers", 1] * name.startswith("dataloader")
    command = [sys.executable, EXAMPLES / name, *options]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    first, last = map(float, done.stdout.rpartition(":")[2].split())
    assert 0 < last < 0.95 * first
