"""`modelhub demo`: what it promises in its first minutes."""

import json

import numpy as np
import pytest

from modelhub import CausalLM
from modelhub.cli.demo import HELD_OUT, LENGTH, MARK, QUESTIONS, TINY, demo, marked
from modelhub.core.backends import get_backend, installed
from modelhub.hub.resources import resource
from modelhub.training import products
from modelhub.training.products import TrainingChoice, best_trainer

ROWS = [
    json.loads(line) for line in (resource("finetune") / "captain_style.jsonl").read_text(encoding="utf-8").splitlines()
]
MOST_TOKENS = 6000  # in all: at 60 a second, which a slow machine makes, they fit in two minutes


def test_it_shows_both_answers_the_curve_the_times_and_what_comes_next(tmp_path, capsys):
    folder = tmp_path / "demo"
    lesson = demo(TINY, folder, "torch", "cpu", False)
    shown = capsys.readouterr()
    assert len(lesson.before) == len(lesson.after) == len(QUESTIONS) == 10
    assert f"{marked(lesson.before)} of 10 before, {marked(lesson.after)} after" in shown.out
    assert marked(lesson.before) <= 1 and marked(lesson.after) >= 8
    assert "before" in shown.out and "after" in shown.out and QUESTIONS[0].split()[0] in shown.out
    for phase in ("choosing the backend", "loading the model", "training", "answers after"):
        assert phase in shown.err
    assert "chat gemma3_tiny --adapter" in shown.err and "finetune --preset gemma3_tiny" in shown.err
    assert (folder / "adapter" / "adapter_config.json").is_file() and (folder / "curve.png").stat().st_size > 1000
    assert len(json.loads((folder / "history.json").read_text())["steps"]) == len(lesson.history.steps)


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model_learns_the_style_within_6000_tokens(tmp_path):
    lesson = demo("smollm2_135m_instruct_q4", tmp_path / "demo", None, None, False)
    assert marked(lesson.before) <= 1, lesson.before
    assert marked(lesson.after) >= 8, lesson.after
    assert len(lesson.history.steps) * LENGTH <= MOST_TOKENS  # padding included
    assert lesson.history.history["val_loss"][-1] < lesson.history.history["val_loss"][0]


@pytest.mark.slow
def test_what_is_chosen_is_what_it_learns_with(monkeypatch, tmp_path, capsys):
    rates(monkeypatch, {("torch", "float32"): 80, ("torch", "bfloat16"): 500})  # as with matrix units
    lesson = demo(TINY, tmp_path / "demo", "torch", "cpu", False)
    assert "torch in bfloat16" in " ".join(capsys.readouterr().err.split())
    run = json.loads((tmp_path / "demo" / "adapter" / "modelhub.json").read_text())["runs"][-1]
    assert run["settings"]["mixed_precision"] == "mixed_bfloat16"
    assert marked(lesson.before) <= 1 and marked(lesson.after) >= 8


def test_the_rows_have_one_style_and_none_of_the_questions():
    assert len(ROWS) == len({row["prompt"] for row in ROWS}) == len({row["completion"] for row in ROWS}) > 8 * HELD_OUT
    for row in ROWS:
        assert list(row) == ["prompt", "completion"] and row["prompt"].isascii() and row["completion"].isascii()
        assert row["completion"].startswith(f"{MARK} ") and row["completion"].endswith(". Fair winds!")
        assert row["prompt"] not in QUESTIONS and len(row["completion"].split()) <= 30


# --- the choice of the backend --------------------------------------------------------------------------------------


def rates(monkeypatch, table):
    """As if a machine had these GFLOP/s."""
    monkeypatch.setattr(products, "_rate", lambda xp, dtype: table[xp.name, dtype])


def table(**float32_and_bfloat16):
    return {
        (name, dtype): rate
        for name, pair in float32_and_bfloat16.items()
        for dtype, rate in zip(("float32", "bfloat16"), pair, strict=True)
    }


@pytest.mark.parametrize(
    "measured, backend, precision",
    [
        (table(jax=(90, 40), torch=(80, 2), tensorflow=(70, 30)), "jax", None),
        (table(jax=(90, 20), torch=(80, 500), tensorflow=(85, 400)), "torch", "mixed_bfloat16"),  # matrix units
        (table(jax=(90, 20), torch=(80, 100), tensorflow=(60, 85)), "jax", None),  # not worth 16 bits
    ],
)
def test_the_fastest_products_decide(monkeypatch, measured, backend, precision):
    if {"jax", "torch", "tensorflow"} - set(installed()):
        pytest.skip("needs all frameworks")
    rates(monkeypatch, measured)
    chosen = best_trainer(device="cpu")
    assert (chosen.backend, chosen.mixed_precision) == (backend, precision)
    assert "numpy" not in {name for name, _ in chosen.rates}, "it cannot train"


def test_a_named_backend_is_taken_and_only_its_precision_chosen(monkeypatch):
    rates(monkeypatch, table(jax=(90, 40), torch=(20, 400), tensorflow=(70, 30)))
    assert best_trainer("torch", "cpu") == TrainingChoice(
        "torch", "mixed_bfloat16", {("torch", "float32"): 20, ("torch", "bfloat16"): 400}
    )
    assert best_trainer("numpy", "cpu") == TrainingChoice("numpy", None, {})


def test_rates_are_measured(backend):
    for dtype in ("float32", "bfloat16"):
        assert 0 < products._rate(backend, dtype) < 1e5 and np.isfinite(products._rate(backend, dtype))


def test_auto_is_measured_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("MODELHUB_CACHE", str(tmp_path))
    name = next(name for name in installed() if name != "numpy")
    xp = get_backend(name, "cpu")
    rates(monkeypatch, {(name, "float32"): 20, (name, "bfloat16"): 400})
    assert products.best_precision(xp) == "mixed_bfloat16"
    rates(monkeypatch, {(name, "float32"): 20, (name, "bfloat16"): 2})
    assert products.best_precision(xp) == "mixed_bfloat16", "a kept choice is stable"
    lm = CausalLM.from_preset(TINY, backend=name)
    lm.compile(mixed_precision="auto")
    assert lm.trainer.compiled.settings.compute_dtype == "bfloat16"
    (kept,) = (tmp_path / "measured").iterdir()
    kept.write_text("{")
    assert products.best_precision(xp) is None
    assert products.best_precision(get_backend("numpy")) is None
