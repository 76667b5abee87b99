"""A process that works for an hour takes no more memory than one that has just begun.

MODELHUB_SOAK_SECONDS: how long for all backends together (default 3600).
"""

import json
import os
import subprocess
import sys

import pytest

from modelhub.core.backends import installed
from modelhub.hub.resources import resource

pytestmark = pytest.mark.soak
SECONDS = float(os.environ.get("MODELHUB_SOAK_SECONDS", 3600))
TINY = str(resource("presets") / "gemma3_tiny")
# Every round is the same work, so whatever is kept from one round to the next shows; what caches hold is there after
# the first rounds.
SCRIPT = """
import gc, json, sys, time
import psutil
from modelhub import CausalLM

backend, seconds = sys.argv[1], float(sys.argv[2])
rows = [{"instruction": "Say it.", "response": "The river runs past the mill. " * n} for n in (1, 2, 3, 4)]
trains = backend != "numpy"
memory, rounds, begun = [], 0, time.monotonic()
lm = CausalLM.from_preset(sys.argv[3], backend=backend)
lm.preprocessor.sequence_length = 64
if trains:
    lm.enable_lora(rank=2)
while time.monotonic() - begun < seconds or rounds < 12:
    lm.generate(["Once upon a time", "The"], max_new_tokens=16, seed=rounds, temperature=1.0)
    for piece in lm.generate("Once", max_new_tokens=8, stream=True):
        break  # an answer that nobody waits for
    lm.score("The river runs past the old mill.")
    lm.logits([[2, 5, 9, 7]])
    if trains:
        lm.fit(rows, steps=2, batch_size=1, verbose=False)
        lm.merge_lora()
        lm.unmerge_lora()
    other = CausalLM.from_preset(sys.argv[3], backend=backend)
    other.generate("Once", max_new_tokens=4)
    del other
    gc.collect()
    rounds += 1
    memory.append(psutil.Process().memory_info().rss)
print(json.dumps([rounds, memory]))
"""


@pytest.mark.parametrize("backend", installed())
def test_memory_stays(backend):
    seconds = SECONDS / len(installed())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend, str(seconds), TINY],
        capture_output=True,
        text=True,
        timeout=4 * seconds + 600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rounds, memory = json.loads(done.stdout.splitlines()[-1])
    early, late = max(memory[rounds // 4 : rounds // 2]), max(memory[3 * rounds // 4 :])
    print(f"{backend}: {rounds} rounds, {early / 1e6:.0f} MB in the second quarter, {late / 1e6:.0f} MB in the last")
    assert late <= 1.02 * early, f"{backend}: {(late - early) / 1e6:.0f} MB more after {rounds} rounds"
