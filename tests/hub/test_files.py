"""Folders that are whole or not there: also where no system call swaps two of them, and where two processes write."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelhub.errors import InputError
from modelhub.hub import files
from modelhub.hub.files import MODEL_FILES, adding, check_new, place, replacing


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


def add(target):
    """A file and one that belongs beside it."""
    with adding(target) as file:
        file.write_text("file")
        file.with_name(f"{file.name}.data").write_text("data")


def test_a_file_and_what_belongs_to_it_appear_together(tmp_path, monkeypatch):
    for which in (1, 2):
        with monkeypatch.context() as patch:
            broken_rename(patch, which)
            with pytest.raises(OSError, match="Input/output error"):
                add(tmp_path / "a")
        assert not os.listdir(tmp_path)
    add(tmp_path / "a")
    assert contents(tmp_path) == {"a": "file", "a.data": "data"}


@pytest.mark.parametrize("name", ["a", "a.data"])
def test_what_appears_meanwhile_stays(tmp_path, name):
    with pytest.raises(InputError, match="is there already"), adding(tmp_path / "a") as file:
        file.write_text("file")
        file.with_name("a.data").write_text("data")
        (tmp_path / name).write_text("mine")
    assert contents(tmp_path) == {name: "mine"}


def test_a_link_that_leads_nowhere_is_something(tmp_path):
    (tmp_path / "a").symlink_to("nowhere")
    with pytest.raises(InputError, match="is there already"):
        check_new(tmp_path / "b", tmp_path / "a")
    check_new(tmp_path / "b")


def test_places(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert place("~/new/a") == place(Path("new/a")) == tmp_path / "new" / "a"
    assert os.listdir(tmp_path) == ["new"]
    (tmp_path / "file").touch()
    for path in ("file/a", "file/b/a"):
        with pytest.raises(InputError, match=f"{path} cannot be written, its folder cannot be made"):
            place(path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for root everything can be written to
    with pytest.raises(InputError, match="read-only to you"):
        place("a")
