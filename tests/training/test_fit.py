"""fit on a tiny preset: the same curves everywhere, runs that are broken off, data from other frameworks."""

import functools
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import optax
import pytest
import torch
from stop_at import StopAt
from tiny_preset import CONFIG, LINES, write_preset

from modelhub import CausalLM, optim
from modelhub.core.backends import installed
from modelhub.errors import CheckpointError, InputError, ResumeError, TrainingError
from modelhub.training import BestCheckpoint, Callback, EarlyStopping, checkpoints

TRAINING = [name for name in installed() if name != "numpy"]
OTHERS = [name for name in TRAINING if name != "torch"]
LENGTH = 48
TEXTS = sorted(set(LINES))
DATA = [
    {"instruction": first[: 5 + 3 * i], "context": "", "response": second[: 40 - 5 * i]}
    for i, first in enumerate(TEXTS)
    for second in TEXTS
]
QUIET = {"verbose": False, "batch_size": 2}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """JAX keeps its programs on disk: every fit here would compile the same ones again."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """One layer: there is less to compile."""
    config = CONFIG | {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    return write_preset(tmp_path_factory.mktemp("presets") / "one_layer", config, scale=0.1)


def make(preset, name="torch", rank=None, **options):
    lm = CausalLM.from_preset(str(preset), backend=name, device="cpu")
    lm.preprocessor.sequence_length = LENGTH
    if rank:
        lm.enable_lora(rank, targets="all-linear", **options)
    return lm


def weights(lm):
    return {name: np.array(lm.backbone.xp.get(x)) for name, x in lm.params.items()}


def losses(history):
    return [step["loss"] for step in history.steps]


def assert_same(found, wanted, exactly=True, tolerance=2e-3):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        if exactly:
            np.testing.assert_array_equal(found[name], x, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], x, atol=tolerance, err_msg=name)


# --- the same numbers everywhere ------------------------------------------------------------------------------

RUNS = {
    "packed": ({}, {"optimizer": optim.AdamW(), "learning_rate": 1e-3, "schedule": "cosine"}, {}),
    "accumulated, not packed": (
        {}, {"optimizer": "sgd", "learning_rate": 0.05, "clip_norm": 1.0}, {"grad_accum": 3, "packing": False}
    ),
    "adapter with dropout": (
        {"rank": 4, "dropout": 0.1, "alpha": 16}, {"learning_rate": 2e-3}, {"grad_accum": 2}
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_the_same_curve_on_every_backend(preset, run):
    model, how, fit = RUNS[run]
    found = {}
    for name in TRAINING:
        lm = make(preset, name, **model)
        lm.compile(**how)
        found[name] = lm.fit(DATA, steps=50, seed=3, **fit, **QUIET)
    wanted = found.pop("torch")
    assert len(wanted.steps) == 50 and wanted.steps[-1]["epoch"] > 0
    assert np.mean(losses(wanted)[-5:]) < np.mean(losses(wanted)[:5]) - 0.5
    for name, history in found.items():
        np.testing.assert_allclose(losses(history), losses(wanted), atol=1e-3, err_msg=name)
        for key in ("tokens", "epoch", "step", "learning_rate"):
            assert [step[key] for step in history.steps] == [step[key] for step in wanted.steps]


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_learns(preset, precision):
    lm = make(preset, rank=4)
    lm.compile(learning_rate=1e-2, mixed_precision=precision)
    history = lm.fit(DATA, steps=25, **QUIET)
    assert np.isfinite(losses(history)).all()
    assert np.mean(losses(history)[-3:]) < losses(history)[0] - 0.4
    assert all(lm.backbone.xp.dtype(x) == "float32" for x in lm.params.values())


@pytest.mark.slow
def test_native_optimizers(preset):
    """They give what ours gives; and go on exactly where they were broken off."""
    natives = {
        "torch": {"optimizer": torch.optim.AdamW, "learning_rate": 0.01},
        "jax": {"optimizer": optax.adamw(0.01, weight_decay=0.01)},
    }
    for name in TRAINING[:2]:
        lm = make(preset, name, rank=2)
        lm.compile("adamw", learning_rate=0.01, weight_decay=0.01)
        wanted = lm.fit(DATA, steps=8, **QUIET)
        lm = make(preset, name, rank=2)
        lm.compile(**natives[name])
        history = lm.fit(DATA, steps=8, **QUIET)
        np.testing.assert_allclose(losses(history), losses(wanted), atol=1e-4)
    lm = make(preset, rank=2)
    lm.compile(functools.partial(torch.optim.AdamW, lr=0.01))
    np.testing.assert_allclose(losses(lm.fit(DATA, steps=8, **QUIET)), losses(wanted), atol=1e-3)


def test_a_users_loss(preset):
    lm = make(preset)

    def focal(logits, labels):
        log_p = torch.log_softmax(logits, -1).gather(1, labels[:, None].long())[:, 0]
        return -((1 - log_p.exp()) ** 2) * log_p

    lm.compile(learning_rate=3e-3, loss=focal)
    history = lm.fit(DATA, steps=20, **QUIET)
    assert losses(history)[-1] < losses(history)[0] - 0.3
    found = lm.evaluate(DATA)
    lm.compile()
    assert found["loss"] < lm.evaluate(DATA)["loss"]  # focal is below cross entropy


# --- runs -----------------------------------------------------------------------------------------------------

SCRIPT = """
    import json, sys, time
    preset, backend, directory = sys.argv[1:]
    from modelhub import CausalLM
    from modelhub.training import Callback

    class Tell(Callback):
        def on_train_batch_end(self, step, logs):
            print(step, flush=True)
            time.sleep(0.02)

    lm = CausalLM.from_preset(preset, backend=backend, device="cpu")
    lm.preprocessor.sequence_length = 48
    lm.enable_lora(2, targets="all-linear", dropout=0.1)
    lm.compile(learning_rate=0.01, schedule="linear")
    data = json.load(sys.stdin)
    lm.fit(data, epochs=4, grad_accum=2, batch_size=2, verbose=False, checkpoint_dir=directory, save_steps=1,
           callbacks=[Tell()])
"""


def whole_run(preset, name, directory=None, callbacks=()):
    """What SCRIPT does, to its end."""
    lm = make(preset, name, rank=2, dropout=0.1)
    lm.compile(learning_rate=0.01, schedule="linear")
    history = lm.fit(DATA, epochs=4, grad_accum=2, checkpoint_dir=directory, save_steps=1, callbacks=callbacks, **QUIET)
    return lm, history


@pytest.fixture(scope="module")
def unbroken(preset):
    lm, history = whole_run(preset, "torch")
    return weights(lm), history


def begin(preset, directory):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(preset), "torch", str(directory)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdin.write(json.dumps(DATA))
    process.stdin.close()
    return process


@pytest.mark.slow
def test_killed_and_resumed(preset, unbroken, tmp_path, caplog):
    wanted, curve = unbroken
    total = len(curve.steps)
    at = int(np.random.default_rng().integers(2, total))
    process = begin(preset, tmp_path)
    for line in process.stdout:
        if int(line) == at:
            process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL
    done = checkpoints.latest(tmp_path).step
    assert at - 1 <= done < total and not checkpoints.is_finished(tmp_path)
    for name in OTHERS:
        other = tmp_path.with_name(f"{tmp_path.name}_{name}")
        subprocess.run(["cp", "-r", str(tmp_path), str(other)], check=True)
        lm, history = whole_run(preset, name, other)
        np.testing.assert_allclose(losses(history), losses(curve), atol=1e-3)
        assert_same(weights(lm), wanted, exactly=False)
    lm, history = whole_run(preset, "torch", tmp_path)
    assert f"after step {done}" in caplog.text
    assert_same(weights(lm), wanted)
    assert losses(history) == losses(curve)
    assert history.history["loss"] == curve.history["loss"]
    # Finished: the same call has nothing to do, and says so; the model is what the run made of it.
    caplog.clear()
    lm, again = whole_run(preset, "torch", tmp_path)
    assert "is finished" in caplog.text and f"{total} steps" in caplog.text
    assert_same(weights(lm), wanted)
    assert losses(again) == losses(curve)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_broken_off_and_resumed_on_the_same_backend(preset, name, tmp_path):
    lm, curve = whole_run(preset, name)
    with pytest.raises(RuntimeError, match="broken off"):
        whole_run(preset, name, tmp_path, [StopAt(6)])
    resumed, history = whole_run(preset, name, tmp_path)
    assert_same(weights(resumed), weights(lm))
    assert losses(history) == losses(curve)


STATES = {
    "float16": ("torch", {"mixed_precision": "mixed_float16", "learning_rate": 0.01}),
    "adafactor": ("torch", {"optimizer": "adafactor", "learning_rate": 0.05}),
    "torch's own": ("torch", {"optimizer": torch.optim.AdamW, "learning_rate": 0.01}),
    "torch's own, as a function": ("torch", {"optimizer": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9)}),
    "optax": ("jax", {"optimizer": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.01))}),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_state_is_resumed(preset, case, dtype, tmp_path):
    """Loss scales, master copies of 16-bit weights, what native optimizers remember."""
    name, how = STATES[case]
    if dtype == "bfloat16" and case in ("float16", "optax"):
        pytest.skip("nothing new")

    def run(*callbacks, directory=tmp_path):
        lm = CausalLM.from_preset(str(preset), backend=name, device="cpu", dtype=dtype)
        lm.preprocessor.sequence_length = LENGTH
        lm.compile(**how)
        return lm, lm.fit(DATA, checkpoint_dir=directory, callbacks=callbacks, save_steps=2, **QUIET)

    lm, curve = run(directory=None)
    assert np.ptp(losses(curve)) > 0.1
    with pytest.raises(RuntimeError, match="broken off"):
        run(StopAt(6))
    resumed, history = run()
    assert losses(history) == losses(curve)
    for key, x in lm.params.items():
        assert (resumed.backbone.xp.get(resumed.params[key]) == lm.backbone.xp.get(x)).all(), key


def test_a_longer_run_goes_on_as_if_it_had_been_asked_for_at_once(preset, tmp_path):
    """Also in the middle of an epoch, and where one ends."""
    epoch = len(make(preset, rank=2).fit(DATA, **QUIET).steps)
    stops = [3, 5, epoch, epoch + 2]
    wanted = make(preset, rank=2).fit(DATA, steps=stops[-1], **QUIET)
    for steps in stops:
        history = make(preset, rank=2).fit(DATA, steps=steps, checkpoint_dir=tmp_path, **QUIET)
        assert losses(history) == losses(wanted)[:steps]
        assert [step["epoch"] for step in history.steps] == [step["epoch"] for step in wanted.steps][:steps]
    assert history.epoch == [0, 1] and history.history["loss"] == wanted.history["loss"]


def test_a_users_schedule(preset, tmp_path):
    def fit(steps):
        def halving(step, total):  # another object each time, as in another process
            assert total == steps
            return 0.5**step

        lm = make(preset, rank=2)
        lm.compile(schedule=halving, learning_rate=0.01)
        return lm.fit(DATA, steps=steps, checkpoint_dir=tmp_path, **QUIET)

    fit(2)
    assert [step["learning_rate"] for step in fit(4).steps] == [0.01, 0.005, 0.0025, 0.00125]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_interrupted(preset, unbroken, tmp_path):
    process = begin(preset, tmp_path)
    for line in process.stdout:
        if line == "3\n":
            process.send_signal(signal.SIGINT)
    error = process.stderr.read()
    process.wait()
    assert "Stopping after this step" in error
    assert "KeyboardInterrupt: stopped after step" in error and f"checkpoint_dir={str(tmp_path)!r}" in error
    assert process.returncode in (-signal.SIGINT, 130)
    stopped = checkpoints.latest(tmp_path).step
    assert stopped >= 3 and f"step {stopped}: the same call" in error
    lm, history = whole_run(preset, "torch", tmp_path)
    assert_same(weights(lm), unbroken[0])
    assert losses(history) == losses(unbroken[1])


class Press(Callback):
    def on_train_batch_end(self, step, logs):
        if step == 2:
            signal.raise_signal(signal.SIGINT)


def test_interrupted_without_a_checkpoint_dir(preset):
    lm = make(preset, rank=2)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 2: the model has the weights of this step"):
        lm.fit(DATA, callbacks=[Press()], **QUIET)
    assert any(np.abs(x).max() > 0 for name, x in weights(lm).items() if name.endswith("lora_B"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "change", ["data", "rank", "learning_rate", "batch_size", "seed", "sequence_length", "optimizer"]
)
def test_resuming_another_run(preset, tmp_path_factory, change, shared={}):  # noqa: B006 (one run for all)
    def run(directory, **asked):
        asked = {"data": DATA[:6], "rank": 2, "learning_rate": 0.01, "batch_size": 2, "seed": 0} | asked
        lm = make(preset, rank=asked["rank"])
        lm.preprocessor.sequence_length = asked.get("sequence_length", LENGTH)
        lm.compile(asked.get("optimizer", "adamw"), learning_rate=asked["learning_rate"])
        return lm.fit(
            asked["data"], batch_size=asked["batch_size"], seed=asked["seed"], checkpoint_dir=directory, verbose=False
        )

    if "directory" not in shared:
        shared["directory"] = tmp_path_factory.mktemp("run")
        run(shared["directory"])
    other = {
        "data": DATA[1:7], "rank": 3, "learning_rate": 0.02, "batch_size": 3, "seed": 1, "sequence_length": 40,
        "optimizer": "lion",
    }  # fmt: skip
    before = checkpoints.latest(shared["directory"]).step
    with pytest.raises(ResumeError, match=rf"\b{change}") as info:
        run(shared["directory"], **{change: other[change]})
    if change == "learning_rate":
        assert "0.01" in str(info.value) and "0.02" in str(info.value)
    assert checkpoints.latest(shared["directory"]).step == before


def test_resume_true_and_false(preset, tmp_path):
    lm = make(preset, rank=2)
    with pytest.raises(InputError, match='holds no checkpoint; resume="auto" starts anew'):
        lm.fit(DATA, steps=2, checkpoint_dir=tmp_path, resume=True, **QUIET)
    first = lm.fit(DATA, steps=2, checkpoint_dir=tmp_path, **QUIET)
    more = lm.fit(DATA, steps=4, checkpoint_dir=tmp_path, resume=True, **QUIET)  # longer: it goes on
    assert losses(more)[:2] == losses(first) and len(more.steps) == 4
    anew = lm.fit(DATA, steps=3, checkpoint_dir=tmp_path, resume=False, **QUIET)
    assert len(anew.steps) == 3 and losses(anew) != losses(more)[:3]  # from the trained weights
    assert checkpoints.latest(tmp_path).step == 3


@pytest.mark.parametrize("name", TRAINING)
def test_a_loss_that_is_no_number(preset, name, tmp_path):
    lm = make(preset, name, rank=2)
    lm.compile("sgd", learning_rate=1e30)
    with pytest.raises(
        TrainingError, match=r"^step 2: the loss is (nan|inf).*the weights of step 1.*step 1 in "
    ) as info:
        lm.fit(DATA, checkpoint_dir=tmp_path, save_steps=1, **QUIET)
    assert "lower learning_rate" in str(info.value) and str(tmp_path) in str(info.value)
    assert all(np.isfinite(x).all() for x in weights(lm).values())
    found = checkpoints.latest(tmp_path)
    assert found.step == 1 and all(np.isfinite(x).all() for x in found.tensors().values())


def test_one_row_that_spoils_everything(preset):
    """A user's loss that is NaN for one label; nothing is lost."""
    lm = make(preset)
    end = lm.tokenizer.eos_token_id

    def loss(logits, labels):
        found = torch.nn.functional.cross_entropy(logits, labels.long(), reduction="none")
        return torch.where(labels == end, found * float("nan"), found)

    before = weights(lm)
    lm.compile(loss=loss)
    with pytest.raises(TrainingError, match="step 1: the loss is nan.*look at the rows"):
        lm.fit(DATA, **QUIET)
    assert_same(weights(lm), before)


def test_a_validation_loss_that_is_no_number_is_told(preset, caplog):
    lm = make(preset)

    def loss(logits, labels):
        found = torch.nn.functional.cross_entropy(logits, labels.long(), reduction="none")
        return found if logits.requires_grad else found * float("nan")

    lm.compile(loss=loss)
    lm.fit(DATA, validation_data=DATA, **QUIET)
    assert "epoch 1: the validation loss is nan" in caplog.text


def test_a_full_disk(preset, tmp_path, monkeypatch):
    class Fill(Callback):
        def on_train_batch_end(self, step, logs):
            if step == 4:
                monkeypatch.setattr(os, "fsync", full)

    def full(handle):
        raise OSError(28, "No space left on device")

    lm = make(preset, rank=2)
    with pytest.raises(CheckpointError, match="step 4 cannot be written.*No space left.*step-00000003 is intact"):
        lm.fit(DATA, checkpoint_dir=tmp_path, save_steps=1, callbacks=[Fill()], **QUIET)
    assert [path.name for path in sorted(tmp_path.glob("step*"))] == ["step-00000002", "step-00000003"]
    monkeypatch.undo()
    assert len(make(preset, rank=2).fit(DATA, checkpoint_dir=tmp_path, save_steps=1, **QUIET).steps) > 4


# --- epochs, validation, callbacks ----------------------------------------------------------------------------


def test_epochs_and_validation(preset):
    lm = make(preset, rank=4)
    lm.compile(learning_rate=5e-3)
    history = lm.fit(DATA, epochs=3, validation_split=0.2, **QUIET)
    assert history.epoch == [0, 1, 2] and len(history.history["val_loss"]) == 3
    assert history.history["val_loss"][-1] < history.history["val_loss"][0]
    for epoch, mean in enumerate(history.history["loss"]):
        steps = [step for step in history.steps if step["epoch"] == epoch]
        assert mean == pytest.approx(
            sum(step["loss"] * step["tokens"] for step in steps) / sum(step["tokens"] for step in steps)
        )
    assert {"loss", "accuracy", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"} <= steps[
        0
    ].keys()
    assert [step["step"] for step in history.steps] == list(range(1, len(history.steps) + 1))
    # What is held out is the same data each time, and it is not trained on.
    again = make(preset, rank=4)
    again.compile(learning_rate=5e-3)
    assert again.fit(DATA, epochs=3, validation_split=0.2, **QUIET).history == history.history
    shown = make(preset).fit(TEXTS, validation_data=DATA, steps=2, **QUIET)
    assert shown.history["val_loss"] and shown.history["val_accuracy"]


def test_validation_is_what_evaluate_says(preset):
    lm = make(preset, rank=2, dropout=0.2)
    history = lm.fit(DATA, validation_data=DATA[:7], **QUIET)
    found = lm.evaluate(DATA[:7], batch_size=2)
    assert history.history["val_loss"] == [pytest.approx(found["loss"], rel=1e-6)]
    assert history.history["val_accuracy"] == [pytest.approx(found["accuracy"])]


def test_steps_beyond_an_epoch_and_within_one(preset):
    lm = make(preset, rank=2)
    epoch = len(lm.fit(DATA, **QUIET).steps)
    history = lm.fit(DATA, steps=2 * epoch + 1, **QUIET)
    assert [step["epoch"] for step in history.steps] == [0] * epoch + [1] * epoch + [2]
    assert len(lm.fit(DATA, epochs=5, steps=2, **QUIET).steps) == 2


def test_early_stopping_and_the_best_model(preset, tmp_path):
    lm = make(preset)
    lm.compile(learning_rate=0.1)  # too much for it to go on well
    stop, best = EarlyStopping(patience=2), BestCheckpoint(tmp_path / "best")
    history = lm.fit(DATA, epochs=9, validation_split=0.2, callbacks=[stop, best], **QUIET)
    values = history.history["val_loss"]
    assert stop.stopped_epoch == len(values) - 1 == int(np.argmin(values)) + 2
    assert json.loads((tmp_path / "best" / "best.json").read_text())["epoch"] == int(np.argmin(values))
    kept = CausalLM.from_preset(str(tmp_path / "best"), backend="torch", device="cpu")
    if np.argmin(values) < len(values) - 1:
        assert any((x != weights(lm)[name]).any() for name, x in weights(kept).items())
    # A new fit begins afresh: the old wish to stop is forgotten.
    assert len(lm.fit(DATA, steps=1, **QUIET).steps) == 1


def test_the_best_adapter(preset, tmp_path):
    lm = make(preset, rank=2)
    lm.compile(learning_rate=1e-2)
    lm.fit(DATA, epochs=2, callbacks=[BestCheckpoint(tmp_path / "best", monitor="loss")], **QUIET)
    other = make(preset)
    other.load_adapter(tmp_path / "best")
    assert_same(weights(other), weights(lm))


def test_a_callback_sees_the_weights_of_its_step(preset):
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, step, logs):
            seen.append(self.model.logits([[2, 5, 6]]))
            self.model.stop_training = step == 3

    lm = make(preset, rank=2)
    lm.compile(learning_rate=0.01)
    history = lm.fit(DATA, callbacks=[Look()], **QUIET)
    assert len(history.steps) == 3
    assert np.abs(seen[0] - seen[1]).max() > 1e-5 and np.abs(seen[1] - seen[2]).max() > 1e-5
    np.testing.assert_array_equal(seen[2], lm.logits([[2, 5, 6]]))


def test_what_is_printed(preset, capsys):
    lm = make(preset, rank=2)
    lm.fit(DATA, steps=2, batch_size=2)
    printed = " ".join(capsys.readouterr().err.split())
    for part in ("(", "LoRA", " on torch, cpu, for 2 steps", "25 examples", "»", "memory: about", "loss"):
        assert part in printed
    lm.fit(DATA, steps=2, **QUIET)
    assert capsys.readouterr().err == ""


# --- data of other frameworks ---------------------------------------------------------------------------------


def ready(lm):
    """The texts as a user puts them into arrays, int64 (5, 24)."""
    ids = [lm.tokenizer.encode(text)[:24] for text in TEXTS]
    padded = np.zeros((len(ids), 24), np.int64)
    labels = np.full((len(ids), 24), -100)
    for row, tokens in enumerate(ids):
        padded[row, : len(tokens)], labels[row, : len(tokens)] = tokens, tokens
    return {"input_ids": padded, "labels": labels, "attention_mask": (labels >= 0).astype(np.int64)}


def in_twos(arrays):
    count = len(arrays["input_ids"])
    return [{name: x[i : i + 2] for name, x in arrays.items()} for i in range(0, count - 1, 2)]


def test_tfrecords_feed_torch(preset, tmp_path):
    import tensorflow as tf

    lm = make(preset)
    arrays = ready(lm)
    path = str(tmp_path / "train.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for row in range(len(arrays["input_ids"])):
            feature = {
                name: tf.train.Feature(int64_list=tf.train.Int64List(value=x[row])) for name, x in arrays.items()
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    spec = {name: tf.io.FixedLenFeature([24], tf.int64) for name in arrays}
    records = tf.data.TFRecordDataset(path).map(lambda record: tf.io.parse_single_example(record, spec))
    history = lm.fit(records.batch(2, drop_remainder=True), epochs=2, **QUIET)
    wanted = make(preset).fit(in_twos(arrays), epochs=2, **QUIET)
    assert len(history.steps) == 4 and losses(history) == losses(wanted)
    assert lm.evaluate(records.batch(2)) == pytest.approx(lm.evaluate([arrays]))


@pytest.mark.slow
def test_a_data_loader_with_workers_feeds_jax(preset):
    from torch.utils.data import DataLoader

    lm = make(preset, "jax", rank=2)
    arrays = ready(lm)
    rows = [{name: x[row] for name, x in arrays.items()} for row in range(len(arrays["input_ids"]))]
    loader = DataLoader(rows, batch_size=2, num_workers=1, multiprocessing_context="spawn", drop_last=True)
    history = lm.fit(loader, **QUIET)
    wanted = make(preset, "jax", rank=2).fit(in_twos(arrays), **QUIET)
    assert len(history.steps) == 2 and losses(history) == losses(wanted)


def test_a_generator_is_read_once(preset):
    lm = make(preset, rank=2)
    batches = in_twos(ready(lm))
    assert len(lm.fit((batch for batch in batches), **QUIET).steps) == len(batches)
    with pytest.raises(ValueError, match="a generator can be read once"):
        lm.fit((batch for batch in batches), epochs=2, **QUIET)
    with pytest.raises(ValueError, match="nothing to learn"):
        lm.fit([batches[0] | {"labels": np.full((2, 24), -100)}], **QUIET)


def test_ready_batches_resume(preset, tmp_path):
    batches = in_twos(ready(make(preset))) * 3
    lm = make(preset, rank=2)
    wanted = lm.fit(batches, epochs=2, **QUIET)
    with pytest.raises(RuntimeError):
        make(preset, rank=2).fit(
            iter_twice(batches), epochs=2, checkpoint_dir=tmp_path, save_steps=1, callbacks=[StopAt(8)], **QUIET
        )
    resumed = make(preset, rank=2)
    history = resumed.fit(iter_twice(batches), epochs=2, checkpoint_dir=tmp_path, save_steps=1, **QUIET)
    assert losses(history) == losses(wanted)
    assert_same(weights(resumed), weights(lm))


class iter_twice:
    """An iterable without a length."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)
