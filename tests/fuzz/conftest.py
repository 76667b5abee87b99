"""Processes that may die of what they read; the tests that need them are skipped where memory cannot be limited."""

import json
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.worker import write_sound

LIMIT = 5.0  # seconds for one case
WORKERS = 2
RESTART = 1_000  # cases: what a process has gathered by then must not look like one case's doing
SCRIPT = Path(__file__).with_name("worker.py")


class Worker:
    def __init__(self, root: Path, work: Path):
        self.command = [sys.executable, str(SCRIPT), str(root), str(work)]
        self.work, self.log = work, work.with_suffix(".log")
        self.process: subprocess.Popen | None = None
        self.count = 0

    def start(self) -> subprocess.Popen:
        if self.process is None or self.count >= RESTART:
            self.stop()
            shutil.rmtree(self.work, ignore_errors=True)  # a process that died left its damage there
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
            assert self._answer(120) == b"ready\n", self.log.read_text()
            self.count = 0
        return self.process

    def run(self, name: str, case: int | Path, limit: float = LIMIT) -> dict:
        """case: the number of a damage, or a folder to read as it is."""
        process = self.start()
        self.count += 1
        assert process.stdin
        process.stdin.write(f"{name} {case}\n".encode())
        process.stdin.flush()
        line = self._answer(limit)
        if line:
            return json.loads(line)
        if line is None:
            self.stop()
            if limit == LIMIT:  # the machine may have been busy
                return self.run(name, case, 4 * LIMIT)
            return {"kind": "failed", "text": f"no end after {limit} s"}
        code = process.wait()
        self.stop()
        return {"kind": "failed", "text": f"the process died ({code}):\n{self.log.read_text()[-3000:]}"}

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _answer(self, limit: float) -> bytes | None:
        """One line; b"": the process died; None: no answer in time."""
        assert self.process and self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        return self.process.stdout.readline() if ready else None


@pytest.fixture(scope="session")
def workers(tmp_path_factory):
    if not Path("/proc/self/statm").is_file():
        pytest.skip("the memory limit is Linux's")
    root = tmp_path_factory.mktemp("fuzz")
    write_sound(root / "sound")
    workers = [Worker(root / "sound", root / f"work-{i}") for i in range(WORKERS)]
    yield workers
    for worker in workers:
        worker.stop()
