"""Thousands of damaged files for every reader: it loads them, or says what is wrong with a ModelhubError.

Never another exception, a crash, more than 5 s, or 1 GB more memory. MODELHUB_FUZZ_CASES: how many cases in all (default
CASES, of the soak tests SOAK_CASES); MODELHUB_FUZZ_START: the first one's number, for damage that nobody has seen yet.
"""

import os
import queue
import threading
from pathlib import Path

import pytest
from fuzz.target import TARGETS

CASES, SOAK_CASES = 24_000, 400_000
SCRIPT = Path(__file__).with_name("worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files(workers, name):
    damage(workers, name, int(os.environ.get("MODELHUB_FUZZ_CASES", CASES)), 0)


@pytest.mark.soak
@pytest.mark.parametrize("name", TARGETS)
def test_many_damaged_files(workers, name):
    damage(workers, name, int(os.environ.get("MODELHUB_FUZZ_CASES", SOAK_CASES)), CASES)


def damage(workers, name, total, first):
    first = int(os.environ.get("MODELHUB_FUZZ_START", first))
    share = TARGETS[name].weight / sum(target.weight for target in TARGETS.values())
    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(first, first + max(1, round(total * share))):
        numbers.put(number)
    outcomes: dict[int, dict] = {}

    def work(worker) -> None:
        while True:
            try:
                number = numbers.get_nowait()
            except queue.Empty:
                return
            outcomes[number] = worker.run(name, number)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = {number: found["text"] for number, found in outcomes.items() if found["kind"] == "failed"}
    report = [f"python {SCRIPT} {name} {number}\n{text}" for number, text in sorted(failed.items())[:5]]
    assert not failed, f"{len(failed)} of {len(outcomes)} cases; to run one again:\n" + "\n\n".join(report)
    assert any(found["kind"] == "refused" for found in outcomes.values()) or len(outcomes) < 50
