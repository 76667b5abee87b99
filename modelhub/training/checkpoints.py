"""Checkpoints of a training run: whole or not there, whatever fails in between.

    directory/
      step-00000010/       state.safetensors, run.json
      step-00000020/
      finished             the step that the run ended with
      .lock, .lock.owner   held while a run writes here

A checkpoint is written beside (step-00000020.tmp-PID), synced to the disk, then renamed: what has the name is whole.
run.json has the SHA-256 of the state and of its own record: bytes that changed since are noticed, and the checkpoint
before is taken.
"""

import hashlib
import json
import os
import re
import reprlib
import shutil
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import ml_dtypes  # noqa: F401 (registers bfloat16 and the 8-bit floats with numpy)
import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from tqdm import tqdm

from modelhub.errors import CheckpointError, InputError, ResumeError
from modelhub.hub.checkpoint import SafetensorsCheckpoint
from modelhub.hub.files import replace_folder, save_arrays

_FORMAT = 1
_STATE, _RUN, _FINISHED = "state.safetensors", "run.json", "finished"
# SIGHUP: the terminal was closed, or the line to it broke; Windows has none.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_LEFTOVERS = "step-*.tmp-*"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk. meta: what `save` was given, as JSON returns it (tuples are lists, keys are strings)."""

    folder: Path
    step: int
    meta: dict[str, Any]

    def tensors(self) -> dict[str, np.ndarray]:
        """Every tensor in a new array of the shape and dtype it was saved with. Raises CheckpointError."""
        with SafetensorsCheckpoint(self.folder / _STATE) as state:
            return {name: state.read(name, info.dtype) for name, info in state.tensors.items()}


def save(
    directory: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write directory/step-… and return its path; the `keep` newest checkpoints stay.

    tensors: arrays of any shape, in a dtype that safetensors has (bfloat16 through ml_dtypes). meta: JSON values.
    A checkpoint of the same step is replaced. Those of later steps belong to a run that was given up, and go.

    Raises CheckpointError when the files cannot be written, such as on a full disk; the checkpoints from before are
    then as they were. TypeError where meta is not JSON.
    """
    if keep < 1:
        raise InputError(f"keep must be 1 or more checkpoints, got {keep}")
    directory = Path(directory)
    record = {"format": _FORMAT, "step": step, "meta": meta}
    text = json.dumps(record)
    target = directory / f"step-{step:08d}"
    work = directory / f"{target.name}.tmp-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(_LEFTOVERS):
            shutil.rmtree(leftover)
        work.mkdir()
        digest = hashlib.sha256()
        save_arrays(tensors, work / _STATE, digest=digest)
        sums = {"state": digest.hexdigest(), "run": hashlib.sha256(text.encode()).hexdigest()}
        (work / _RUN).write_text(json.dumps(record | {"sha256": sums}), encoding="utf-8")
        replace_folder(work, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        needed = sum(array.nbytes for array in tensors.values()) + len(text)
        raise CheckpointError(_not_written(directory, step, needed, error)) from error
    (directory / _FINISHED).unlink(missing_ok=True)
    steps = _steps(directory)
    stay = [number for number in steps if number <= step][-keep:]
    for number in steps:
        if number not in stay:
            _discard(directory / f"step-{number:08d}")
    return target


def latest(directory: str | os.PathLike[str]) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None. Warns of each newer one that is not."""
    for step in reversed(_steps(Path(directory))):
        folder = Path(directory) / f"step-{step:08d}"
        try:
            return _open(folder, step)
        except (CheckpointError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            reason = str(error).removesuffix(" Download it again.")  # it never came from anywhere
            warnings.warn(f"the checkpoint {folder} is damaged and is passed over: {reason}", stacklevel=2)
    return None


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ResumeError with every setting of `wanted` that the run of the checkpoint did not have.

    found: the checkpoint's; keys that `wanted` lacks altogether are ignored. Dicts inside are compared key by key, in
    both directions. Values are compared as JSON: a tuple equals a list, and a key that is missing equals None.
    """
    asked = _flat(json.loads(json.dumps(wanted)))
    had = _flat({key: found[key] for key in wanted if key in found})
    rows = [
        f"  {key}: {reprlib.repr(had.get(key))} in the checkpoint, {reprlib.repr(asked.get(key))} asked for"
        for key in asked | had
        if asked.get(key) != had.get(key)
    ]
    if rows:
        raise ResumeError(
            "the checkpoint is of a run with other settings:\n"
            + "\n".join(rows)
            + "\nTo start a new run, give another checkpoint_dir, or resume=False (--no-resume), which replaces these "
            "checkpoints; to go on with the old one, give its settings."
        )


def clear(directory: str | os.PathLike[str]) -> None:
    """Remove all checkpoints: a new run begins here."""
    directory = Path(directory)
    (directory / _FINISHED).unlink(missing_ok=True)
    for step in _steps(directory):
        _discard(directory / f"step-{step:08d}")


def mark_finished(directory: str | os.PathLike[str]) -> None:
    """Note that the run is over: its newest checkpoint is its end."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _FINISHED).write_text(str(_newest(directory)))


def is_finished(directory: str | os.PathLike[str]) -> bool:
    """Whether the newest checkpoint is the end of its run."""
    try:
        return (Path(directory) / _FINISHED).read_text() == str(_newest(Path(directory)))
    except (OSError, ValueError):  # damaged: no end is noted
        return False


@contextmanager
def lock(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the directory while a run writes into it; made if missing. Raises ResumeError if another run holds it.

    The lock is the operating system's and dies with its process. Whose it is stands in .lock.owner.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    owner = directory / ".lock.owner"  # a file of its own: on Windows nobody can read a locked one
    held = FileLock(directory / ".lock", timeout=0)
    try:
        held.acquire()
    except Timeout:
        try:
            process = json.loads(owner.read_text())
            holder = f"process {process['pid']} on {process['host']}"
        except (OSError, ValueError, LookupError, TypeError):  # it is only just being written
            holder = "another process"
        raise ResumeError(
            f"{directory} is in use: {holder} is writing its checkpoints there. Wait for that run, stop it, or give "
            "another checkpoint_dir."
        ) from None
    try:
        owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        owner.unlink(missing_ok=True)
        held.release()


@dataclass
class Interruption:
    """Set by the first Ctrl-C, SIGTERM or SIGHUP. received: which one; None: none yet."""

    received: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        return self.received is not None


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a flag, so that a step can end and be saved; the second raises
    KeyboardInterrupt at once.

    Outside the main thread, where Python cannot handle signals, nothing is changed. A signal that the process ignores
    (nohup, a shell's background job) stays ignored.
    """
    state = Interruption()

    def handle(number: int, frame: FrameType | None) -> None:
        if state.requested:
            raise KeyboardInterrupt
        state.received = signal.Signals(number)
        with suppress(OSError):  # the terminal may be gone
            # Not print: the signal may have come in the middle of another one.
            os.write(2, b"\nStopping after this step; press Ctrl-C again to stop at once.\n")

    previous = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    previous[number] = signal.signal(number, handle)
        yield state
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _discard(folder: Path) -> None:
    """Remove; a kill in the middle leaves nothing that looks like a checkpoint."""
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    with suppress(OSError):
        folder.rename(aside)
        shutil.rmtree(aside)


def _steps(directory: Path) -> list[int]:
    names = os.listdir(directory) if directory.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{8,})", name)))


def _newest(directory: Path) -> int | None:
    return max(_steps(directory), default=None)


def _open(folder: Path, step: int) -> Checkpoint:
    run = json.loads((folder / _RUN).read_text(encoding="utf-8"))
    if run["format"] != _FORMAT or run["step"] != step:
        raise CheckpointError(
            f"{folder / _RUN} is of step {run['step']} in format {run['format']}; expected step {step} in format "
            f"{_FORMAT}"
        )
    if not isinstance(run["meta"], dict):
        raise CheckpointError(f"{folder / _RUN} holds no record of a run; expected an object as meta")
    if (sums := run.pop("sha256", None)) is not None:  # earlier versions wrote none
        with open(folder / _STATE, "rb") as file:
            found = {"state": hashlib.file_digest(file, "sha256").hexdigest()}
        found["run"] = hashlib.sha256(json.dumps(run).encode()).hexdigest()
        if wrong := [name for name in found if found[name] != sums[name]]:
            changed = " and ".join({"state": _STATE, "run": _RUN}[name] for name in wrong)
            raise CheckpointError(f"{changed} changed after it was written: its SHA-256 is another")
    with SafetensorsCheckpoint(folder / _STATE):  # checks the header against the file's size
        return Checkpoint(folder, step, run["meta"])


def _not_written(directory: Path, step: int, needed: int, error: Exception) -> str:
    existing = next(path for path in [directory.absolute(), *directory.absolute().parents] if path.exists())
    free = tqdm.format_sizeof(shutil.disk_usage(existing).free, "B")
    newest = _newest(directory)
    before = "there was none before" if newest is None else f"step-{newest:08d} is intact and can be resumed"
    return (
        f"the checkpoint of step {step} cannot be written to {directory}: {error}. It needs "
        f"{tqdm.format_sizeof(needed, 'B')}, and {free} are free there; {before}. Free some space or give another "
        "checkpoint_dir."
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"adapter": {"rank": 4}} -> {"adapter.rank": 4}"""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
