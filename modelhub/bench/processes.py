"""Measuring backends, each in a process of its own: load time and peak memory are true, and none disturbs another.

Where all of a small model's fit into memory they take turns, so that what else the machine does hits all alike.
"""

import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from subprocess import PIPE, Popen
from typing import Any

from modelhub.core import leaves
from modelhub.core.backends.base import host_memory
from modelhub.core.tree import flatten
from modelhub.errors import InputError
from modelhub.kinds import CLASSES, IMAGES, kind_named
from modelhub.model.source import Source

_SMALL = 500_000_000  # parameters
_PATIENCE = 600.0  # seconds for an answer, and one more for each token: longer means that the process hangs
# The modules that this process would find, whatever is in the working directory.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.stdin.readline()); from modelhub.bench.worker import main; main()"
)


@dataclass(frozen=True)
class Workload:
    """What each backend is given to do. seconds: a backend whose repeats have taken that long makes no more."""

    task: str
    device: str | None = None
    dtype: str | None = None
    quantize: Any = None
    batch_size: int = 1
    prompt_tokens: int = 128
    max_new_tokens: int = 64
    load_weights: bool = True  # False: random ones
    train_steps: int = 0  # 0: training is not measured
    repeats: int = 5
    seconds: float = 60.0


@dataclass
class Row:
    """One backend's figures, None where there are none. Seconds and rates are medians, memory is in bytes.

    first_seconds: of the first call, to its first token or to the logits of its first batch: programs are compiled
    then, or found in the frameworks' caches. first_seconds_warm: of later calls. per_second: tokens (of all rows, after
    the second) or images. peak_memory: of the device, on a CPU of the whole process. train_*: absent on a backend that
    only does inference; the tokens are those that are no padding. refused: the error is modelhub's own, and another try
    would end alike.
    """

    backend: str
    version: str | None = None
    device: str | None = None
    dtype: str | None = None
    load_seconds: float | None = None
    load_seconds_with_imports: float | None = None
    first_seconds: float | None = None
    first_seconds_warm: float | None = None
    per_second: float | None = None
    peak_memory: int | None = None
    train_step_seconds: float | None = None
    train_samples_per_second: float | None = None
    train_tokens_per_second: float | None = None
    train_peak_memory: int | None = None
    error: str | None = None
    refused: bool = False


def lengths(
    source: Source, prompt_tokens: int | None, max_new_tokens: int | None, usual: tuple[int, int]
) -> tuple[int, int]:
    """prompt_tokens and max_new_tokens of the workload, as asked for or as usual where the context allows it."""
    if source.model.reads == IMAGES:
        return 0, 0
    context = source.config.max_position_embeddings
    prompt = min(usual[0], context // 2) if prompt_tokens is None else prompt_tokens
    new = min(usual[1], context // 2) if max_new_tokens is None else max_new_tokens
    if prompt < 1 or new < 3 or prompt + new > context:
        raise InputError(
            f"prompt_tokens={prompt} and max_new_tokens={new} cannot be measured: give 1 or more of the first and "
            f"3 or more of the second (the speed counts from the second on), together at most {context}, the model's "
            "context"
        )
    return prompt, new


class Worker:
    """A process of worker.py. After its first failure, which the row tells, it is asked nothing any more."""

    def __init__(self, name: str, patience: float):
        self.row = Row(name)
        self._patience = patience
        self._firsts: list[float] = []
        self._speeds: list[float] = []
        self._spent = 0.0
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (see `end`)
        self._process = Popen(
            [sys.executable, "-P", "-c", _START], stdin=PIPE, stdout=PIPE, stderr=self._stderr,
            text=True, encoding="utf-8",
        )  # fmt: skip
        self._send([str(place) for place in sys.path])

    def ask(self, command: str, times: int = 1, **details: Any) -> dict[str, Any] | None:
        """The answer, None for a failure. Figures that a Row has a place for are put there.

        times: of the time that an answer may take.
        """
        if self.row.error is not None:
            return None
        self._send({"command": command, **details})
        line, late = self._read(times * self._patience)
        answer = json.loads(line) if line.endswith("\n") else {"error": late or self._last_words()}
        for key in answer.keys() & Row.__dataclass_fields__:
            setattr(self.row, key, answer[key])
        return answer if self.row.error is None else None

    def repeat(self, seconds: float) -> None:
        if self._speeds and self._spent > seconds:
            return
        begun = time.monotonic()
        if answer := self.ask("repeat"):
            self._spent += time.monotonic() - begun
            self._firsts.append(answer["first"])
            self._speeds.append(answer["speed"])
            self.row.first_seconds_warm = statistics.median(self._firsts)
        self.row.per_second = statistics.median(self._speeds) if answer else None

    def train(self, steps: int) -> None:
        before = self.row.peak_memory
        if self.ask("train", steps + 1, steps=steps) and self.row.train_step_seconds is not None:
            self.row.train_peak_memory = self.row.peak_memory
        self.row.peak_memory = before

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def _send(self, message: Any) -> None:
        assert self._process.stdin
        with contextlib.suppress(OSError):  # it has died: the answer that does not come tells
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _read(self, seconds: float) -> tuple[str, str | None]:
        """A line, and what went wrong if the process had to be killed, which ends the line."""
        late: list[str] = []

        def stop() -> None:
            late.append(f"no answer within {seconds / 60:.3g} minutes, so the process was killed")
            self._process.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            assert self._process.stdout
            return self._process.stdout.readline(), next(iter(late), None)
        finally:
            timer.cancel()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        words = self._stderr.read().strip().splitlines()[-1:] or ["it said nothing"]
        why = f"signal {-code}; memory may have run out" if code < 0 else f"exit {code}"
        return f"the process ended ({why}): {words[0][:500]}"


def measure(source: Source, workload: Workload, names: Sequence[str], show: Callable[[str], object]) -> list[Row]:
    """A row for each backend, in their order. source: may be closed. show: is told what is being done."""
    request = dataclasses.asdict(workload) | {"path": str(source.preset.path)}
    if kind_named(workload.task).head == CLASSES:  # an encoder alone gets a head
        request["num_classes"] = None if getattr(source.config, "num_labels", None) else 10
    parameters = sum(map(leaves.count, flatten(source.model).values()))
    # Weights in float32, and as much for all else.
    together = parameters < _SMALL and 8 * parameters * len(names) < (host_memory() or 0)
    patience = _PATIENCE + workload.batch_size * (workload.prompt_tokens + workload.max_new_tokens)
    rows: list[Row] = []
    for group in [list(names)] if together else [[name] for name in names]:
        with contextlib.ExitStack() as stack:
            workers: list[Worker] = []
            for name in group:
                show(f"{name} loads")
                workers.append(Worker(name, patience))
                stack.callback(workers[-1].end)
                workers[-1].ask("load", backend=name, **request)
            for _ in range(workload.repeats):
                for worker in workers:
                    show(f"{worker.row.backend} runs")
                    worker.repeat(workload.seconds)
            for worker in workers if workload.train_steps else []:
                show(f"{worker.row.backend} trains")
                worker.train(workload.train_steps)
            rows += [worker.row for worker in workers]
    return rows
