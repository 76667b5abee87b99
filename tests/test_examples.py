"""Every script in examples/ runs, on a tiny model."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modelhub import CausalLM, ImageClassifier
from modelhub.core.backends import installed
from modelhub.hub.resources import resource

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUN_HERE = {}
TRAINING = [name for name in installed() if name != "numpy"]


def example(*names):
    """Says which scripts a test runs, so that none is forgotten."""

    def mark(test):
        RUN_HERE.update(dict.fromkeys(names, test))
        return test

    return mark


@pytest.fixture
def run_script(tmp_path, monkeypatch, capsys):
    """Run a script in this process; returns its names and what it printed."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__"), capsys.readouterr().out

    return run


@pytest.fixture
def run(run_script, tiny_preset):
    """Run a script for language models, on a tiny one."""
    return lambda name, *arguments: run_script(name, "--preset", tiny_preset, "--sequence-length", 64, *arguments)


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


def _loss(printed):
    return float(re.search(r"s a step, loss ([\d.]+)", printed)[1])


@pytest.fixture
def quickly_compiled():
    """XLA's optimizations take longer than the few steps here."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@example("torch_loop.py", "jax_loop.py", "tensorflow_loop.py")
def test_loops_of_the_frameworks_own(run, tiny_preset, quickly_compiled):
    """They learn the same, and the same as fit; afterwards the task is what was trained."""
    lm = CausalLM.from_preset(str(tiny_preset), backend="jax")
    curves = {}
    for name in ("torch", "jax", "tensorflow"):
        names, out = run(f"{name}_loop.py", "--steps", 10)
        assert out.startswith("mean loss of the first and of the last ten steps")
        curves[name], trained, rows = names["curve"], names["lm"], names["rows"]
        ids = rows[0]["input_ids"][None]
        assert trained.backend == name and np.abs(trained.logits(ids) - lm.logits(ids)).max() > 0.1
    lm.compile("adamw", learning_rate=1e-3, weight_decay=0.01)
    parts = [rows[first : first + 4] for first in range(0, 40, 4)]
    batches = [{key: np.stack([row[key] for row in part]) for key in rows[0]} for part in parts]
    fit = [step["loss"] for step in lm.fit(batches, verbose=False).steps]
    assert len(fit) == 10
    for name, curve in curves.items():
        assert curve == pytest.approx(fit, rel=1e-3), name


@example("vit_from_scratch.py")
def test_vit_from_scratch(run_script, quickly_compiled):
    tiny, near = ["--tiny", "--steps", 4, "--workers", 0], 0.02  # of a loss in bfloat16
    losses = [_loss(run_script("vit_from_scratch.py", *tiny, "--backend", name)[1]) for name in TRAINING]
    assert losses == pytest.approx([losses[0]] * len(TRAINING), rel=near)
    losses = [_loss(run_script("vit_from_scratch.py", *tiny, "--attention", name)[1]) for name in ("torch", "jax")]
    assert losses == pytest.approx([losses[0]] * 2, rel=near)
    with pytest.raises(SystemExit):
        run_script("vit_from_scratch.py", *tiny, "--backend", "tensorflow", "--attention", "torch")


def test_vit_from_scratch_with_workers(tmp_path):
    command = [sys.executable, EXAMPLES / "vit_from_scratch.py", "--tiny", "--steps", 2, "--workers", 1]
    command += ["--backend", "jax"]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert 6.5 < _loss(done.stdout) < 7.5  # of 1000 classes: ln 1000 = 6.9


def test_the_size_of_vit_base():
    clf = runpy.run_path(str(EXAMPLES / "vit_from_scratch.py"))["vit"]("numpy")
    assert clf.config.grid == (14, 14) and not clf.config.class_token and clf.config.pooling == "mean"
    assert sum(x.size for x in clf.params.values()) == pytest.approx(86.5e6, rel=0.002)


@example("photos.py")
def test_photos(run_script, tmp_path):
    rng = np.random.default_rng(0)
    for name, colour in {"leaf": (40, 200, 40), "rose": (220, 30, 60), "sky": (60, 120, 240)}.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            pixels = np.array(colour) + rng.integers(-30, 31, (45, 60, 3))
            picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            picture.save(tmp_path / "photos" / name / f"{number}.jpg")
    (tmp_path / "photos" / "sky" / "broken.jpg").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="broken.jpg is not an image"):
        names, out = run_script(
            "photos.py", "photos", "--preset", "vit_tiny_fashion", "--backend", "torch", "--learning-rate", 0.02
        )
    assert "held out: 100%" in out and re.search(r"^ *\d+\.\d%  leaf$", out, re.MULTILINE)
    assert out.rstrip().endswith("transformers says leaf")
    assert len(names["history"].epoch) == 20
    again = ImageClassifier.from_preset(tmp_path / "my_classifier", backend="numpy")
    assert again.labels == ["leaf", "rose", "sky"]
    found = [labels[0][0] for labels in again.predict([tmp_path / "photos" / name / "3.jpg" for name in again.labels])]
    assert found == again.labels
