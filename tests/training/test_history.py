"""History: Keras' numbers, whole over a resume, and a picture."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from modelhub.errors import InputError
from modelhub.training.history import History, _smoothed

LOSSES = [[4.0, 3.0, 1.0], [2.0, 1.0]]
TOKENS = [[10, 30, 60], [5, 15]]


def feed(history, epochs=(0, 1), skip=0, rates=None):
    """The hooks of LOSSES, without on_train_begin; skip: steps that were fed before."""
    step = 0
    for epoch in range(2):
        if epoch not in epochs:
            step += len(LOSSES[epoch])
            continue
        history.on_epoch_begin(epoch, {})
        for loss, tokens in zip(LOSSES[epoch], TOKENS[epoch], strict=True):
            step += 1
            if step > skip:
                history.on_train_batch_end(step, {"loss": loss, "accuracy": loss / 4, "tokens": tokens})
        history.on_epoch_end(epoch, {"val_loss": 1.0 - epoch / 2})


@pytest.fixture
def history():
    history = History()
    history.on_train_begin({})
    return history


def long_run(history, steps=60, rate=lambda step: 1e-4, loss=lambda step: 2 + 1 / step):
    history.on_epoch_begin(0, {})
    for step in range(1, steps + 1):
        history.on_train_batch_end(step, {"loss": loss(step), "learning_rate": rate(step), "tokens": 7})
    history.on_epoch_end(0, {"val_loss": 2.5})
    return history


def test_an_epochs_value_is_the_mean_over_its_tokens(history):
    feed(history)
    assert history.epoch == [0, 1]
    assert history.history["loss"] == [pytest.approx((40 + 90 + 60) / 100), pytest.approx((10 + 15) / 20)]
    assert history.history["accuracy"] == [value / 4 for value in history.history["loss"]]
    assert history.history["val_loss"] == [1.0, 0.5]
    assert history.steps[3] == {"step": 4, "epoch": 1, "loss": 2.0, "accuracy": 0.5, "tokens": 5}
    assert repr(history) == "History(2 epochs, 5 steps, val_loss=0.5, loss=1.25, accuracy=0.3125)"


def test_the_keys_and_lists_are_those_of_keras(history, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    theirs = pytest.importorskip("keras").callbacks.History()
    theirs.set_model(SimpleNamespace())
    theirs.on_train_begin()
    feed(history)
    for epoch in history.epoch:
        theirs.on_epoch_end(epoch, {name: values[epoch] for name, values in history.history.items()})
    assert (history.history, history.epoch) == (theirs.history, theirs.epoch)


def test_steps_without_tokens_or_accuracy(history):
    assert history.epoch_means() == {}
    history.on_train_batch_end(1, {"loss": math.nan, "tokens": 0})
    assert history.epoch_means() == {}
    history.on_train_batch_end(2, {"loss": 3.0, "tokens": 4})
    assert history.epoch_means() == {"loss": 3.0}


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_a_resumed_runs_history_is_whole(history, done):
    feed(history)
    first, second = History(), History()
    first.on_train_begin({})
    for step in history.steps[:done]:
        if step["epoch"] == 1 and not first.epoch:
            first.on_epoch_end(0, {"val_loss": 1.0})
        first.on_epoch_begin(int(step["epoch"]), {})
        logs = {name: value for name, value in step.items() if name not in ("step", "epoch")}
        first.on_train_batch_end(int(step["step"]), logs)
    state = json.loads(json.dumps(first.state_dict()))
    second.on_train_begin({})
    second.load_state_dict(state)
    feed(second, epochs=(0, 1) if done <= 3 else (1,), skip=done)
    assert second.state_dict() == history.state_dict()


class TestPlot:
    @pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
    def test_writes_each_format(self, history, tmp_path, monkeypatch, ending, magic):
        pytest.importorskip("matplotlib")
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # it chooses a backend, and may open a window
        path = tmp_path / "new" / f"curve.{ending}"
        assert long_run(history).plot(str(path)) == path
        assert path.read_bytes().startswith(magic) and path.stat().st_size > 2000

    @pytest.mark.parametrize(
        ("steps", "rate", "lines"),
        [
            (60, lambda step: 1e-4, ["loss of a step", "smoothed", "validation loss"]),
            (60, lambda step: 1e-4 / step, ["loss of a step", "smoothed", "validation loss", "learning rate"]),
            (5, lambda step: 1e-4, ["loss of a step", "validation loss"]),
            (1, lambda step: 1e-4, ["loss of a step", "validation loss"]),
        ],
    )
    def test_what_is_drawn(self, history, tmp_path, monkeypatch, steps, rate, lines):
        figure = pytest.importorskip("matplotlib.figure").Figure
        drawn = []
        save = figure.savefig
        monkeypatch.setattr(figure, "savefig", lambda self, *given, **named: (drawn.append(self), save(self, *given, **named)))  # fmt: skip
        long_run(history, steps, rate).plot(tmp_path / "a.png")
        axes = drawn[0].axes[0]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == lines
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss per token")
        raw, *_, validation = axes.get_lines()
        assert list(raw.get_xdata()) == list(range(1, steps + 1))
        assert list(raw.get_ydata()) == [2 + 1 / step for step in range(1, steps + 1)]
        assert (list(validation.get_xdata()), list(validation.get_ydata())) == ([steps], [2.5])

    def test_smoothing_has_no_bias_and_passes_over_nan(self, history, tmp_path):
        assert _smoothed([2.0] * 30) == pytest.approx([2.0] * 30)
        broken = _smoothed([math.nan, 3.0, math.inf, 3.0])
        assert math.isnan(broken[0]) and broken[1:] == pytest.approx([3.0] * 3)
        pytest.importorskip("matplotlib")
        long_run(history, loss=lambda step: math.nan if step > 40 else 2.0).plot(tmp_path / "a.png")

    def test_a_smoothed_curve_does_not_lag(self):
        """On a line, and in the middle of noise about one, it is the line; at the end of a steep fall it is there."""
        line = [5.0 - 0.02 * step for step in range(200)]
        assert _smoothed(line) == pytest.approx(line)
        noise = np.random.default_rng(0).normal(0, 0.1, 200)
        assert np.abs(np.array(_smoothed(list(np.array(line) + noise))) - line).max() < 0.1
        fall = [3 * math.exp(-step / 20) + 0.035 for step in range(120)]
        assert _smoothed(fall)[-1] == pytest.approx(fall[-1], abs=0.003)

    def test_without_a_path_the_figure_is_returned(self, history):
        matplotlib = pytest.importorskip("matplotlib.figure")
        figure = long_run(history).plot()
        assert isinstance(figure, matplotlib.Figure) and figure.axes
        assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows

    def test_errors(self, history, monkeypatch):
        with pytest.raises(InputError, match="no step was recorded"):
            history.plot("a.png")
        with pytest.raises(InputError, match=r"ends in '.bmp'; pictures can be written as .png, .svg, .pdf"):
            history.plot("a.bmp")
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match="History.plot needs matplotlib.* pip install matplotlib"):
            long_run(history).plot("a.png")
