"""Folders that are whole or not there: also where no system call swaps two of them, and where two processes write."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelhub.hub import files
from modelhub.hub.files import MODEL_FILES, replacing


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def save(target, text):
    with replacing(target) as work:
        (work / "file").write_text(text)


@pytest.fixture
def target(tmp_path):
    save(tmp_path / "model", "old")
    return tmp_path / "model"


@pytest.fixture
def no_exchange(monkeypatch):
    """As on macOS, Windows and network shares."""
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)


def broken_rename(monkeypatch, which):
    """The rename of that number fails."""
    real, calls = Path.rename, []

    def rename(path, to):
        calls.append(path)
        if len(calls) == which:
            raise OSError(5, "Input/output error")
        return real(path, to)

    monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("which", [1, 2])
def test_a_rename_that_fails_leaves_the_old_folder(target, no_exchange, monkeypatch, which):
    with monkeypatch.context() as patch:
        broken_rename(patch, which)
        with pytest.raises(OSError, match="Input/output error"):
            save(target, "new")
    assert contents(target) == {"file": "old"}
    assert os.listdir(target.parent) == ["model"]
    save(target, "new")
    assert contents(target) == {"file": "new"}


@pytest.mark.parametrize("step", ["aside", "swapped"])
def test_after_a_kill_between_two_renames_saving_goes_on(target, no_exchange, step):
    aside = target.with_name(".model.saving-old")
    if step == "aside":  # killed after the first rename
        target.rename(aside)
        target.with_name(".model.saving").mkdir()
    else:  # after the second
        aside.mkdir()
        (aside / "file").write_text("older")
    with pytest.raises(ZeroDivisionError), replacing(target):
        raise ZeroDivisionError
    assert contents(target) == {"file": "old"}
    save(target, "new")
    assert contents(target) == {"file": "new"}
    assert os.listdir(target.parent) == ["model"]


def test_two_processes_do_not_mix(target):
    script = f"""
import sys
from pathlib import Path
from modelhub.hub.files import replacing
with replacing(Path({str(target)!r})) as work:
    for name in "ab":
        (work / f"{{name}}-{{sys.argv[1]}}").write_text(sys.argv[1])
        print("written", flush=True)
        sys.stdin.readline()
"""
    both = [
        subprocess.Popen([sys.executable, "-c", script, mark], stdin=-1, stdout=-1, stderr=-1, text=True)
        for mark in "12"
    ]
    for one in both:
        one.stdin.write("\n\n")
        one.stdin.flush()
    for one in both:
        assert one.wait(60) == 0, one.stderr.read()
    assert contents(target) in ({"a-1": "1", "b-1": "1"}, {"a-2": "2", "b-2": "2"})
    assert os.listdir(target.parent) == ["model"]


def test_a_second_process_waits_for_the_first(target):
    script = f"""
from pathlib import Path
from modelhub.hub.files import replacing
print("begins", flush=True)
with replacing(Path({str(target)!r})) as work:
    print("writes", flush=True)
    (work / "file").write_text("second")
"""
    with replacing(target) as work:
        (work / "file").write_text("first")
        other = subprocess.Popen([sys.executable, "-c", script], stdout=-1, text=True)
        assert other.stdout.readline() == "begins\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.5)
        assert contents(work) == {"file": "first"}
    assert other.wait(60) == 0
    assert contents(target) == {"file": "second"}
    assert os.listdir(target.parent) == ["model"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_weights_that_saving_replaces(name):
    assert MODEL_FILES.fullmatch(name)


@pytest.mark.parametrize("name", ["model_best.safetensors", "model-ema.safetensors", "models.safetensors", "model.bin"])
def test_weights_of_the_users_own(name):
    assert not MODEL_FILES.fullmatch(name)
