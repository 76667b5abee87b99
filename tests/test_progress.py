"""Where bars appear: terminals and notebooks."""

import io
import sys
import types

import numpy as np
import pytest

from modelhub import CausalLM, ImageClassifier, progress
from modelhub.training.callbacks import ProgressBar


@pytest.fixture
def notebook(monkeypatch):
    """As in a Jupyter kernel without ipywidgets."""
    shell = type("ZMQInteractiveShell", (), {})
    own = type("Shell", (shell,), {})  # Colab's
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=own))
    monkeypatch.setitem(sys.modules, "tqdm.notebook", None)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_no_bar_in_pipes_and_files(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not progress.in_notebook()
    assert list(progress.bar(range(3), delay=0)) == [0, 1, 2] and sys.stderr.getvalue() == ""


def test_a_bar_on_a_terminal_after_two_seconds(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.bar(range(3))) == [0, 1, 2] and sys.stderr.getvalue() == ""
    list(progress.bar(range(3), desc="counting", delay=0))
    assert "counting" in sys.stderr.getvalue()


def test_a_bar_in_notebooks(notebook, capsys):
    assert progress.in_notebook()
    list(progress.bar(range(3), desc="counting", delay=0))
    said = capsys.readouterr()
    assert "counting" in said.out and said.err == ""  # what is on stderr has a red background there
    assert list(progress.bar(range(3), disable=True, delay=0)) == [0, 1, 2] and capsys.readouterr().out == ""


def test_fit_shows_one_bar_in_notebooks(notebook, capsys):
    shown = ProgressBar(total=2)
    shown.on_train_begin({})
    for step in (1, 2):
        shown.on_train_batch_begin(step, {})
        shown.on_train_batch_end(step, {"loss": 1.0})
    shown.on_epoch_end(0, {"loss": 1.0})
    shown.on_train_end({})
    said = capsys.readouterr()
    assert "2/2" in said.out and "epoch 1: loss 1.0000" in said.out and "step 1/2:" not in said.out and said.err == ""


@pytest.fixture
def bars(monkeypatch):
    """(desc, total, how many there were) of all bars that have come to an end."""
    seen = []

    def bar(items, desc, unit, total=None):
        done = 0
        try:
            for item in items:
                done += 1
                yield item
        finally:
            seen.append((desc, total or len(items), done))

    for module in ("generation.decode", "tasks.causal_lm", "tasks.image_classifier", "training.image_fit"):
        monkeypatch.setattr(f"modelhub.{module}.bar", bar)
    return seen


def test_bars_for_lists_of_texts(bars, monkeypatch):
    lm = CausalLM.from_preset("gemma3_tiny", backend="numpy")
    lm.score(["The river runs.", "The old mill."])
    assert bars.pop() == ("scoring", 2, 2) and not bars
    lm.generation_config = {"eos_token_id": []}
    lm.generate(["The river", "The"], 6, num_beams=2)
    assert bars.pop()[:2] == ("generating", 6) and not bars
    told = []
    monkeypatch.setattr("modelhub.generation.answers.bar", lambda steps, **options: told.append(options) or steps)
    assert "".join(lm.generate("The river", 6, stream=True)) and not told  # it shows by itself how far it is
    assert len(lm.generate(["The river", "The"], 6)) == 2
    assert told == [{"desc": "generating", "total": 6, "unit": "token"}]


def test_bars_for_images(bars):
    clf = ImageClassifier.from_config(
        3, image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        backend="numpy",
    )  # fmt: skip
    images = np.zeros((70, 8, 8, 3), np.uint8)
    assert len(clf.predict([*images])) == 70 and bars.pop() == ("images", 3, 3)
    assert clf.features({"pixel_values": np.zeros((33, 3, 8, 8), np.float32)}).shape == (33, 16)
    assert bars.pop() == ("images", 2, 2)
    assert clf.confusion_matrix((images, [0] * 70)).sum() == 70 and bars.pop() == ("evaluating", 3, 3)
    assert clf.evaluate((images, [0] * 70))["images"] == 70 and bars.pop() == ("evaluating", 3, 3)


def test_evaluate_shows_how_far_it_is(monkeypatch):
    seen = []

    def bar(items, **options):
        seen.append(options)
        return items

    monkeypatch.setattr("modelhub.training.text_fit.bar", bar)
    lm = CausalLM.from_preset("gemma3_tiny", backend="numpy")
    lm.preprocessor.sequence_length = 32
    rows = [f"The river runs past the old mill, number {i}." for i in range(9)]
    found = lm.evaluate(rows, batch_size=2, packing=False)
    assert found["tokens"] > 9 and seen == [{"desc": "evaluating", "total": 5, "unit": "batch"}]
