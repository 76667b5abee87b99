"""Callbacks as a loop calls them: stop, keep the best, log through a kill and a resume, show progress."""

import io
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from modelhub.errors import InputError
from modelhub.training import callbacks
from modelhub.training.callbacks import (
    BestCheckpoint,
    Callback,
    EarlyStopping,
    JSONLogger,
    ProgressBar,
    TensorBoardLogger,
    WandbLogger,
)


class Model:
    """What callbacks see of a task."""

    def __init__(self, has_adapter=True):
        self.stop_training = False
        self.saves_adapter = has_adapter
        self.version = 0

    def save_adapter(self, folder):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "adapter_model.safetensors").write_text(str(self.version))

    def save_to_preset(self, folder):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "model.safetensors").write_text(str(self.version))


def epochs_until_stopped(callback, values, name="val_loss"):
    """How many epochs run when the monitored value is values[epoch]."""
    model = Model()
    callback.set_model(model)
    callback.on_train_begin({})
    for epoch, value in enumerate(values):
        callback.on_epoch_begin(epoch, {})
        callback.on_epoch_end(epoch, {"loss": 0.0, name: value})
        if model.stop_training:
            return epoch + 1
    return None


def run_steps(callback, steps, *, epoch=0, begin=True, state=None, end=True):
    """The hooks of these steps, all in one epoch; end=False: killed there."""
    if begin:
        callback.set_model(Model())
        callback.on_train_begin({})
    if state is not None:
        callback.load_state_dict(json.loads(json.dumps(state)))
    callback.on_epoch_begin(epoch, {})
    for step in steps:
        callback.on_train_batch_begin(step, {})
        logs = {"loss": 10.0 / step, "accuracy": 0.5, "tokens": 100, "tokens_per_second": 1234.5, "memory": 2.5e9}
        callback.on_train_batch_end(step, logs)
    if end:
        callback.on_epoch_end(epoch, {"loss": 1.5, "val_loss": 2.25})
        callback.on_train_end({})


def test_every_hook_may_be_left_out():
    run_steps(Callback(), range(1, 4), state={})
    assert Callback().state_dict() == {}


class TestEarlyStopping:
    @pytest.mark.parametrize("patience", [0, 1, 3])
    @pytest.mark.parametrize("min_delta", [0.0, 0.0625, -0.0625])
    @pytest.mark.parametrize(("monitor", "mode"), [("val_loss", "auto"), ("val_loss", "min"), ("val_accuracy", "max")])
    def test_stops_where_keras_does(self, monkeypatch, patience, min_delta, monitor, mode):
        monkeypatch.setenv("KERAS_BACKEND", "jax")  # else it takes TensorFlow, which takes longer to import
        keras = pytest.importorskip("keras")
        theirs = keras.callbacks.EarlyStopping(monitor, min_delta, patience, mode=mode)
        rng = np.random.default_rng(0)
        stops = set()
        for _ in range(50):
            # In sixteenths, which are exact also in Keras' float32: ties are ties in both.
            values = ((np.cumsum(rng.normal(-0.02, 0.1, 12)) + 2) * 16).round() / 16
            values = values.tolist()
            found = epochs_until_stopped(EarlyStopping(monitor, patience, min_delta, mode), values, monitor)
            assert found == epochs_until_stopped(theirs, values, monitor), values
            stops.add(found)
        assert len(stops) > 2

    def test_nan_is_never_the_best(self):
        nan = math.nan
        stopping = EarlyStopping(patience=2)
        assert epochs_until_stopped(stopping, [nan, 2.0, nan, nan, 1.0]) == 4
        assert (stopping.best, stopping.stopped_epoch) == (2.0, 3)
        assert epochs_until_stopped(stopping, [3.0, 2.0, 1.0]) is None and stopping.stopped_epoch is None  # used again

    def test_a_resumed_run_goes_on_counting(self):
        first, second = EarlyStopping(patience=2), EarlyStopping(patience=2)
        assert epochs_until_stopped(first, [1.0, 1.5]) is None
        second.set_model(model := Model())
        second.on_train_begin({})
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        second.on_epoch_end(2, {"val_loss": 1.2})
        assert model.stop_training and second.best == 1.0

    def test_errors(self):
        with pytest.raises(InputError, match="asked to monitor 'val_loss', and the epoch has only accuracy, loss; give fit validation_data"):  # fmt: skip
            EarlyStopping().on_epoch_end(0, {"loss": 1.0, "accuracy": 0.5})
        with pytest.raises(InputError, match="'bleu' is better low or high must be said"):
            EarlyStopping("bleu")
        with pytest.raises(InputError, match="mode must be auto, min or max, got 'low'"):
            EarlyStopping("loss", mode="low")


class TestBestCheckpoint:
    @pytest.mark.parametrize(
        ("has_adapter", "file"), [(True, "adapter_model.safetensors"), (False, "model.safetensors")]
    )
    def test_holds_the_best_epoch(self, tmp_path, has_adapter, file):
        folder = tmp_path / "runs" / "best"
        callback, model = BestCheckpoint(folder), Model(has_adapter)
        callback.set_model(model)
        callback.on_train_begin({})
        held = []
        for epoch, value in enumerate([3.0, math.nan, 2.0, 2.5, 2.0, 1.0]):
            model.version = epoch
            callback.on_epoch_end(epoch, {"val_loss": value})
            held.append(int((folder / file).read_text()))
            assert sorted(path.name for path in folder.iterdir()) == sorted([file, "best.json"])
        assert held == [0, 0, 2, 2, 2, 5]
        assert json.loads((folder / "best.json").read_text()) == {"epoch": 5, "val_loss": 1.0}
        assert [path.name for path in folder.parent.iterdir()] == ["best"]

    def test_a_resumed_run_does_not_replace_a_better_one(self, tmp_path):
        first, second, model = BestCheckpoint(tmp_path / "best", "accuracy"), BestCheckpoint(tmp_path / "best", "accuracy"), Model()  # fmt: skip
        for callback, epoch, accuracy in ((first, 0, 0.8), (second, 1, 0.7)):
            callback.set_model(model)
            callback.on_train_begin({})
            if callback is second:
                second.load_state_dict(first.state_dict())
            callback.on_epoch_end(epoch, {"accuracy": accuracy})
        assert json.loads((tmp_path / "best" / "best.json").read_text())["epoch"] == 0

    def test_a_save_that_fails_leaves_the_best_one_alone(self, tmp_path):
        callback, model = BestCheckpoint(tmp_path / "best"), Model()
        callback.set_model(model)
        callback.on_train_begin({})
        callback.on_epoch_end(0, {"val_loss": 2.0})

        def full(folder):
            Path(folder).mkdir(exist_ok=True)
            (Path(folder) / "adapter_config.json").write_text("{")
            raise OSError(28, "No space left on device")

        model.save_adapter = full
        with pytest.raises(OSError, match="No space left"):
            callback.on_epoch_end(1, {"val_loss": 1.0})
        assert (tmp_path / "best" / "adapter_model.safetensors").read_text() == "0"
        assert [path.name for path in tmp_path.iterdir()] == ["best"]

    def test_never_removes_the_users_files(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(InputError, match="holds files that BestCheckpoint did not write"):
            BestCheckpoint(tmp_path).on_train_begin({})
        (tmp_path / "thesis.tex").unlink()
        BestCheckpoint(tmp_path).on_train_begin({})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestJSONLogger:
    def test_one_run(self, tmp_path):
        path = tmp_path / "logs" / "run.jsonl"
        logger = JSONLogger(path)
        run_steps(logger, [1, 2], end=False)
        assert [line["step"] for line in lines(path)] == [1, 2]  # there before the run ends
        logger.on_train_batch_end(3, {"loss": math.nan, "grad_norm": math.inf})
        logger.on_epoch_end(0, {"val_loss": 2.25})
        logger.on_train_end({})
        assert lines(path)[2:] == [
            {"step": 3, "epoch": 0, "loss": None, "grad_norm": None},
            {"epoch": 0, "val_loss": 2.25},
        ]

    @pytest.mark.parametrize("torn", ["", "{", '{"step": 8, "epo'])
    def test_a_resumed_run_repeats_nothing(self, tmp_path, torn):
        whole, path = tmp_path / "whole.jsonl", tmp_path / "run.jsonl"
        run_steps(JSONLogger(whole), range(1, 6))
        run_steps(JSONLogger(whole), range(6, 11), epoch=1)
        assert [line.get("step", "end") for line in lines(whole)] == [1, 2, 3, 4, 5, "end", 6, 7, 8, 9, 10, "end"]

        run_steps(JSONLogger(path), range(1, 6))
        run_steps(JSONLogger(path), [6, 7], epoch=1, end=False)
        path.write_text(path.read_text() + torn)
        run_steps(JSONLogger(path), range(4, 6))  # the checkpoint was of step 3
        run_steps(JSONLogger(path), range(6, 11), epoch=1)
        assert path.read_text() == whole.read_text()

    def test_resumed_between_the_last_step_and_the_end_of_the_epoch(self, tmp_path):
        path = tmp_path / "run.jsonl"
        for _ in range(2):
            run_steps(JSONLogger(path), range(1, 4))
        run_steps(JSONLogger(path), [])
        assert [line.get("step", "end") for line in lines(path)] == [1, 2, 3, "end"]

    def test_a_run_that_starts_anew(self, tmp_path):
        path = tmp_path / "run.jsonl"
        run_steps(JSONLogger(path), range(1, 9))
        run_steps(JSONLogger(path), range(1, 3))
        assert [line.get("step", "end") for line in lines(path)] == [1, 2, "end"]

    @pytest.mark.parametrize(
        "text", ['{"instruction": "Add"}\n', '{"instruction": "Add"}', "text", '{"epoch": 0.5}\n', "[]\n"]
    )
    def test_never_cuts_another_file(self, tmp_path, text):
        path = tmp_path / "train.jsonl"
        path.write_text(text)
        with pytest.raises(InputError, match="train.jsonl holds lines that JSONLogger did not write"):
            JSONLogger(path).on_train_begin({})
        assert path.read_text() == text


class TestTensorBoardLogger:
    def test_a_resumed_run_as_tensorboard_reads_it(self, tmp_path, monkeypatch):
        pytest.importorskip("tensorboardX")
        # TensorBoard's own switch to read without TensorFlow, which takes seconds to import.
        monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", ModuleType("notf"))
        reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        run_steps(TensorBoardLogger(tmp_path), range(1, 8))
        run_steps(second := TensorBoardLogger(tmp_path), range(4, 6), state={"step": 3})
        assert second.state_dict() == {"step": 5}
        events = reading.EventAccumulator(str(tmp_path)).Reload()
        assert "train/accuracy" in events.Tags()["scalars"]
        found = [(event.step, event.value) for event in events.Scalars("train/loss")]
        assert found == [(step, pytest.approx(10 / step)) for step in range(1, 6)]
        assert [(event.step, event.value) for event in events.Scalars("epoch/val_loss")] == [(5, 2.25)]

    def test_the_error_says_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
        with pytest.raises(ImportError, match="TensorBoardLogger needs tensorboardX.* pip install tensorboardX"):
            TensorBoardLogger(tmp_path)


class FakeWandb:
    """wandb as far as the logger uses it: one active run, whose steps only go up."""

    def __init__(self):
        self.run = None
        self.runs = {}

    def init(self, *, id, resume, **settings):
        assert resume == (id and "allow")
        self.run = self.runs.setdefault(id or f"id{len(self.runs)}", SimpleNamespace(rows={}, open=False))
        self.run.settings, self.run.open = settings, True
        self.run.id = next(name for name, run in self.runs.items() if run is self.run)
        self.run.log = self.log
        self.run.finish = self.finish
        return self.run

    def log(self, values, step):
        assert self.run.open
        if step >= max(self.run.rows, default=0):
            self.run.rows.setdefault(step, {}).update(values)

    def finish(self):
        self.run.open, self.run = False, None


class TestWandbLogger:
    @pytest.fixture
    def wandb(self, monkeypatch):
        fake = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    def test_a_resumed_run_is_the_same_run(self, wandb):
        first = WandbLogger("gemma", name="r4", config={"rank": 4}, mode="offline")
        run_steps(first, range(1, 8))
        run_steps(WandbLogger("gemma"), range(6, 10), state=first.state_dict())
        (run,) = wandb.runs.values()
        assert list(run.rows) == list(range(1, 10)) and not run.open
        assert run.rows[8]["train/loss"] == 10 / 8 and run.rows[9]["epoch/val_loss"] == 2.25

    def test_settings_reach_init(self, wandb):
        run_steps(WandbLogger("gemma", "r4", "team", {"rank": 4}, "offline"), [1])
        assert wandb.runs["id0"].settings == {"project": "gemma", "name": "r4", "entity": "team", "config": {"rank": 4}, "mode": "offline"}  # fmt: skip

    def test_the_users_own_run_is_used_and_left_open(self, wandb):
        own = wandb.init(id="mine", resume="allow")
        run_steps(WandbLogger("gemma"), [1, 2])
        assert list(wandb.runs) == ["mine"] and list(own.rows) == [1, 2] and own.open

    def test_a_second_run_is_another_run(self, wandb):
        logger = WandbLogger("gemma")
        run_steps(logger, [1, 2])
        run_steps(logger, [1])
        assert [list(run.rows) for run in wandb.runs.values()] == [[1, 2], [1]]

    def test_the_error_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ImportError, match="WandbLogger needs wandb.* pip install wandb"):
            WandbLogger()


class Terminal(io.StringIO):
    def isatty(self):
        return True


class TestProgressBar:
    def test_a_bar_on_a_terminal(self):
        screen = Terminal()
        bar = ProgressBar(total=10, file=screen)
        run_steps(bar, range(1, 5), end=False)
        bar.on_test_begin({})
        assert screen.getvalue().split("\r")[-1].startswith("validation: ")
        bar.on_test_end({})
        bar.on_epoch_end(0, {"loss": 1.5, "val_loss": 2.25, "val_accuracy": 0.25, "seconds": 3.0})
        bar.on_train_end({})
        assert "epoch 1: loss 1.5000, val_loss 2.2500, val_accuracy 0.2500\n" in screen.getvalue()
        last = screen.getvalue().split("\r")[-1]
        for part in ("4/10 ", "40%", "loss 2.5000, accuracy 0.5000, 1,234 tokens/s, 2.50GB"):
            assert part in last
        assert last.endswith("\n")

    def test_a_resumed_bar_begins_where_it_was(self):
        screen = Terminal()
        run_steps(ProgressBar(total=10, file=screen), range(9, 11))
        assert " 8/10 " in screen.getvalue() and "10/10 " in screen.getvalue().split("\r")[-1]

    def test_lines_elsewhere(self, monkeypatch, capsys):
        now = iter(np.arange(0, 1000, 4).tolist())  # each look at the clock is 4 s later
        monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: next(now)))
        run_steps(ProgressBar(total=100), range(11, 18))
        printed = capsys.readouterr().err.splitlines()
        assert [line.split(":")[0] for line in printed] == ["step 11/100", "step 14/100", "step 17/100", "epoch 1"]
        assert printed[1] == "step 14/100: loss 0.7143, accuracy 0.5000, 1,234 tokens/s, 2.50GB, 05:44 left"  # 86 * 4 s
        assert printed[3] == "epoch 1: loss 1.5000, val_loss 2.2500"

    def test_total_unknown(self):
        screen, plain = Terminal(), io.StringIO()
        for file in (screen, plain):
            run_steps(ProgressBar(file=file), range(1, 4))
        assert "3step [" in screen.getvalue().split("\r")[-1]
        first, last, _ = plain.getvalue().splitlines()
        assert first.startswith("step 1: loss 10.0000") and last.startswith("step 3: ") and "left" not in last
