"""Where bars appear: terminals and notebooks."""

import io
import sys
import types

import pytest

from modelhub import CausalLM, progress
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
