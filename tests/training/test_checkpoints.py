"""Checkpoints survive kills, full disks and damage; runs do not mix; signals are kept until the step ends."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from modelhub.errors import CheckpointError, InputError, ResumeError
from modelhub.hub import files
from modelhub.hub.files import replace_folder
from modelhub.training.checkpoints import (
    check_same,
    interruptible,
    is_finished,
    latest,
    lock,
    mark_finished,
    save,
)

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="uses fork, audit order or namespaces of Linux")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def state(step: int) -> dict[str, np.ndarray]:
    return {f"w{i}": np.full((3, 5), step, np.float32) for i in range(3)}


def assert_whole(folder: Path, step: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that bears a checkpoint's name may be damaged
        found = latest(folder)
    assert found is not None and found.step == step and found.meta == {"step": step}
    tensors = found.tensors()
    assert tensors.keys() == state(0).keys()
    assert all((array == step).all() for array in tensors.values())


class TestSave:
    def test_every_dtype_and_shape_comes_back(self, tmp_path):
        rng = np.random.default_rng(0)
        tensors = {
            "bfloat16": rng.normal(size=(3, 4)).astype(ml_dtypes.bfloat16),
            "float8": rng.normal(size=7).astype(ml_dtypes.float8_e4m3fn),
            "float64": rng.normal(size=(2, 1, 2)),
            "transposed": rng.normal(size=(4, 6)).astype(np.float32).T,
            "strided": np.arange(20, dtype=np.int32)[::3],
            "big_endian": np.arange(4, dtype=">f4"),
            "scalar": np.array(2**40, np.int64),
            "counter": np.array([2**64 - 1], np.uint64),
            "flag": np.array([True, False]),
            "empty": np.zeros((0, 3), np.float16),
        }
        meta = {"epoch": 1, "rng": {"state": 2**127}, "loss": [1.5, float("inf")], "name": "Ω"}
        folder = save(tmp_path, 10, tensors, meta)
        assert folder == tmp_path / "step-00000010" and names(folder) == ["run.json", "state.safetensors"]
        found = latest(tmp_path)
        assert (found.step, found.meta) == (10, meta)
        back = found.tensors()
        assert back.keys() == tensors.keys()
        for name, array in tensors.items():
            assert back[name].shape == array.shape and back[name].dtype == array.dtype.newbyteorder("=")
            np.testing.assert_array_equal(back[name].astype(np.float64), array.astype(np.float64), err_msg=name)
            assert back[name].flags.writeable  # optimizers write in place

    def test_the_safetensors_library_reads_it(self, tmp_path):
        tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.ones(3, ml_dtypes.bfloat16)}
        path = save(tmp_path, 1, tensors, {}) / "state.safetensors"
        with safe_open(path, "np") as file:
            assert file.get_slice("b").get_dtype() == "BF16"
        np.testing.assert_array_equal(
            load_file(save(tmp_path, 2, {"a": tensors["a"]}, {}) / path.name)["a"], tensors["a"]
        )

    def test_keeps_the_newest(self, tmp_path):
        (tmp_path / "notes.txt").write_text("the user's")
        for step in (5, 10, 100_000_000):
            save(tmp_path, step, state(step), {"step": step})
        assert names(tmp_path) == ["notes.txt", "step-00000010", "step-100000000"]
        assert_whole(tmp_path, 100_000_000)
        save(tmp_path, 100_000_001, state(1), {}, keep=1)
        assert names(tmp_path) == ["notes.txt", "step-100000001"]
        with pytest.raises(InputError, match="keep must be 1 or more checkpoints, got 0"):
            save(tmp_path, 3, state(3), {}, keep=0)

    def test_a_step_saved_again_is_replaced(self, tmp_path):
        save(tmp_path, 4, {"old": np.zeros(3)}, {})
        save(tmp_path, 4, state(4), {"step": 4})
        assert_whole(tmp_path, 4)
        assert names(tmp_path) == ["step-00000004"]

    def test_a_new_run_replaces_the_one_before(self, tmp_path):
        for step in (90, 100):
            save(tmp_path, step, state(step), {"step": step})
        mark_finished(tmp_path)
        save(tmp_path, 10, state(10), {"step": 10})
        assert names(tmp_path) == ["step-00000010"]

    def test_meta_that_is_not_json_changes_nothing(self, tmp_path):
        save(tmp_path, 1, state(1), {"step": 1})
        with pytest.raises(TypeError, match="not JSON serializable"):
            save(tmp_path, 2, state(2), {"loss": np.float32(1)})
        assert names(tmp_path) == ["step-00000001"]

    @pytest.mark.parametrize("exchange", [True, False])
    def test_replace_folder(self, tmp_path, monkeypatch, exchange):
        if not exchange:  # as on systems without it
            monkeypatch.setattr(files, "_exchange", lambda first, second: False)
        target = tmp_path / "best"
        for number in range(3):
            source = tmp_path / "new"
            (source / "deep").mkdir(parents=True)
            (source / "deep" / f"{number}.txt").write_text(str(number))
            replace_folder(source, target)
            assert names(tmp_path) == ["best"] and names(target / "deep") == [f"{number}.txt"]


class TestDamage:
    def test_nothing_there(self, tmp_path):
        assert latest(tmp_path) is None and latest(tmp_path / "missing") is None

    @pytest.mark.parametrize("file", ["state.safetensors", "run.json"])
    def test_every_truncation_is_noticed(self, tmp_path, file):
        save(tmp_path, 1, state(1), {"step": 1})
        path = save(tmp_path, 2, state(2), {"step": 2}) / file
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with pytest.warns(UserWarning, match=r"step-00000002 is damaged and is passed over: \S"):
                assert latest(tmp_path).step == 1

    @pytest.mark.parametrize("record", ["[]", "{}", "3", '{"format": 1, "step": 7, "meta": {}}', '{"format": 9, "step": 2, "meta": {}}', "\xff"])  # fmt: skip
    def test_a_wrong_record(self, tmp_path, record):
        folder = save(tmp_path, 2, state(2), {})
        (folder / "run.json").write_bytes(record.encode("latin-1"))
        with pytest.warns(UserWarning, match="step-00000002 is damaged"):
            assert latest(tmp_path) is None

    @pytest.mark.parametrize("file", ["state.safetensors", "run.json"])
    def test_a_missing_file_and_then_a_new_save(self, tmp_path, file):
        for step in (1, 2):
            folder = save(tmp_path, step, state(step), {"step": step})
        (folder / file).unlink()
        with pytest.warns(UserWarning, match="step-00000002 is damaged"):
            assert latest(tmp_path).step == 1
        save(tmp_path, 2, state(2), {"step": 2})
        assert_whole(tmp_path, 2)


# Saves step after step until it is killed.
ENDLESS = """
import sys
import numpy as np
from modelhub.training.checkpoints import latest, save
found = latest(sys.argv[1])
step = found.step if found else 0
print("ready", flush=True)
while True:
    step += 1
    save(sys.argv[1], step, {f"w{i}": np.full((512, 512), step, np.float32) for i in range(3)}, {"step": step})
"""

# Kills a save at each of its system-level events in turn, and after every kill looks and saves again.
EVERY_EVENT = """
import os, shutil, signal, sys, warnings
from pathlib import Path
import numpy as np
from modelhub.training.checkpoints import latest, save
warnings.simplefilter("error")
folder = Path(sys.argv[1])
tensors = lambda step, run: {"w": np.array([step, run])}
for again in (False, True):  # a new step, then a step that was saved before
    run = 0
    while True:
        run += 1
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, 1, tensors(1, 0), {})
        save(folder, 2, tensors(2, 0), {})
        step = 2 if again else 3
        child = os.fork()
        if child == 0:
            seen = 0
            def hook(event, args):
                global seen
                seen += event.startswith(("os.", "open", "shutil.", "ctypes."))
                if seen == run:
                    os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
            save(folder, step, tensors(step, run), {})
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        found = latest(folder)
        w = found.tensors()["w"].tolist()
        assert found.step == w[0] and w in ([2, 0], [step, run]), (run, w)
        if status:
            assert os.WTERMSIG(status) == signal.SIGKILL
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0 and w == [step, run]
            break
        for named in folder.glob("step-????????"):  # also the old ones that are being removed
            assert len(os.listdir(named)) == 2, (run, named)
        save(folder, 4, tensors(4, run), {})
        left = sorted(path.name for path in folder.iterdir())
        assert latest(folder).step == 4 and len(left) == 2 and not any("tmp" in name for name in left), left
    print(run)
"""

FULL_DISK = """
import sys
import numpy as np
from modelhub.errors import CheckpointError
from modelhub.training.checkpoints import latest, save
save(sys.argv[1], 1, {"w": np.full(50_000, 1, np.float32)}, {})
try:
    save(sys.argv[1], 2, {"w": np.full(500_000, 2, np.float32)}, {})
except CheckpointError as error:
    print(error)
print(latest(sys.argv[1]).tensors()["w"].sum())
save(sys.argv[1], 2, {"w": np.full(50_000, 2, np.float32)}, {})
print(latest(sys.argv[1]).tensors()["w"].sum())
"""


class TestKills:
    def test_killed_at_any_moment(self, tmp_path):
        rng = np.random.default_rng()
        last = 0
        for _ in range(6):
            process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], stdout=subprocess.PIPE)
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.08))
            process.kill()
            process.communicate()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = latest(tmp_path)
            if found is None:
                assert last == 0
                continue
            assert found.step >= last and found.meta == {"step": found.step}
            assert all((array == found.step).all() for array in found.tensors().values())
            last = found.step
        save(tmp_path, last + 1, state(last + 1), {"step": last + 1}, keep=1)
        assert names(tmp_path) == [f"step-{last + 1:08d}"]

    @LINUX
    def test_killed_at_every_event(self, tmp_path):
        ran = subprocess.run([sys.executable, "-c", EVERY_EVENT, str(tmp_path / "run")], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert all(int(events) > 15 for events in ran.stdout.split()), ran.stdout


class TestFullDisk:
    @LINUX
    def test_a_real_full_disk(self, tmp_path):
        mount = f"mount -t tmpfs -o size=1m none {tmp_path}"
        new_space = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
        if not shutil.which("unshare") or subprocess.run([*new_space, mount], capture_output=True).returncode:
            pytest.skip("this machine lets tests mount nothing")
        (script := tmp_path.with_suffix(".py")).write_text(FULL_DISK)
        ran = subprocess.run(
            [*new_space, f"{mount} && exec {sys.executable} {script} {tmp_path}/run"], capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        message, before, after = ran.stdout.splitlines()
        for part in ("step 2", "No space left on device", "needs 2.00MB", "kB are free", "step-00000001 is intact"):
            assert part in message
        assert (float(before), float(after)) == (50_000, 100_000)

    def test_full_when_the_disk_syncs(self, tmp_path, monkeypatch):
        def full(handle):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        save(tmp_path, 1, state(1), {"step": 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(
                CheckpointError, match=r"No space left.* needs 2\d\dB, .*step-00000001 is intact"
            ) as info:
                save(tmp_path, 2, state(2), {"step": 2})
            assert info.value.__cause__.errno == errno.ENOSPC
            with pytest.raises(CheckpointError, match="there was none before"):
                save(tmp_path / "a" / "b", 2, state(2), {"step": 2})
        assert names(tmp_path) == ["a", "step-00000001"]
        assert_whole(tmp_path, 1)


class TestCheckSame:
    SETTINGS = {"data": "ab12", "batch_size": 4, "adapter": {"rank": 4, "targets": ["q_proj"]}, "clip_norm": None}

    def test_same(self):
        asked = {"adapter": {"targets": ("q_proj",), "rank": 4}, "data": "ab12", "batch_size": 4, "seed": None}
        check_same(self.SETTINGS | {"history": [1, 2]}, asked)

    def test_all_differences_at_once(self):
        asked = {"data": "ff" * 50, "batch_size": 4, "adapter": {"rank": 8, "dora": True}, "clip_norm": 1.0}
        with pytest.raises(ResumeError) as info:
            check_same(self.SETTINGS, asked)
        lines = str(info.value).splitlines()
        assert [line.split(":")[0].strip() for line in lines[1:-1]] == ["data", "adapter.rank", "adapter.dora", "clip_norm", "adapter.targets"]  # fmt: skip
        assert "  adapter.rank: 4 in the checkpoint, 8 asked for" in lines
        assert "  clip_norm: None in the checkpoint, 1.0 asked for" in lines
        assert "  adapter.targets: ['q_proj'] in the checkpoint, None asked for" in lines
        assert max(map(len, lines[:-1])) < 90
        assert "checkpoint_dir" in lines[-1] and "resume=False" in lines[-1]

    @pytest.mark.parametrize(("found", "asked"), [(None, {"rank": 4}), ({"rank": 4}, None), ({"rank": 4}, {})])
    def test_with_and_without_an_adapter(self, found, asked):
        with pytest.raises(ResumeError, match="adapter.rank: (4|None) in the checkpoint, (4|None) asked"):
            check_same({"adapter": found}, {"adapter": asked})


class TestFinished:
    def test_the_mark_is_of_the_newest_checkpoint(self, tmp_path):
        assert not is_finished(tmp_path / "missing")
        save(tmp_path, 5, state(5), {})
        assert not is_finished(tmp_path)
        mark_finished(tmp_path)
        assert is_finished(tmp_path)
        save(tmp_path, 6, state(6), {})
        assert not is_finished(tmp_path)
        mark_finished(tmp_path)
        assert is_finished(tmp_path)

    def test_a_run_without_checkpoints(self, tmp_path):
        mark_finished(tmp_path / "run")
        assert is_finished(tmp_path / "run")


HOLDER = """
import sys, time
from modelhub.training.checkpoints import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


class TestLock:
    def test_one_run_at_a_time_and_a_dead_ones_lock_is_taken_over(self, tmp_path):
        folder = tmp_path / "run"
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE)
        try:
            assert holder.stdout.readline() == b"held\n"
            with (
                pytest.raises(ResumeError, match=rf"run is in use: process {holder.pid} on \S+ is writing"),
                lock(folder),
            ):
                pass
        finally:
            holder.kill()
            holder.communicate()
        with lock(folder):
            assert json.loads((folder / ".lock.owner").read_text())["pid"] == os.getpid()
        assert latest(folder) is None

    def test_twice_in_one_process(self, tmp_path):
        with lock(tmp_path):
            with pytest.raises(ResumeError, match=f"process {os.getpid()} on"), lock(tmp_path):
                pass
            (tmp_path / ".lock.owner").write_text("")
            with pytest.raises(ResumeError, match="another process is writing"), lock(tmp_path):
                pass
        with lock(tmp_path), lock(tmp_path / "other"):
            pass


class TestInterruptible:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_the_first_is_a_flag_the_second_is_at_once(self, number, capfd):
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), interruptible() as interruption:
            assert not interruption.requested
            signal.raise_signal(number)
            assert interruption.requested and interruption.received is number
            assert "Stopping after this step" in capfd.readouterr().err
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second was not raised")
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    def test_an_ignored_signal_stays_ignored(self):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with interruptible() as interruption:
                signal.raise_signal(signal.SIGINT)
                assert not interruption.requested
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, before)

    def test_other_threads_change_nothing(self):
        before, seen = signal.getsignal(signal.SIGINT), []

        def work():
            with interruptible() as interruption:
                seen.append((signal.getsignal(signal.SIGINT), interruption.requested))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [(before, False)]
