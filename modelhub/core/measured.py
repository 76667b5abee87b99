"""Choices that are measured on this machine and kept: what is the fastest on one processor loses on another."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from modelhub.core import kernels


def choice(question: str, options: Sequence[str], measure: Callable[[], str]) -> str:
    """One of options: the kept answer to a question, or that of measure(), which is kept from then on.

    The question names the versions that the answer depends on; it holds for this processor and this number of threads.
    Once kept it does not change with what else the machine does; to measure again remove $MODELHUB_CACHE/measured.
    A folder that cannot be written to costs a measurement in each process.
    """
    key = [question, processor(), kernels.threads()]
    path = Path(cache_folder(), "measured", hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32] + ".json")
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        if (kept := json.loads(path.read_text(encoding="utf-8")))["key"] == key and kept["answer"] in options:
            return kept["answer"]
    answer = measure()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump({"key": key, "answer": answer}, file)
        os.replace(file.name, path)
    return answer


def cache_folder() -> str:
    """Where what is kept of this machine lies, of which each kind has a folder of its own."""
    return os.environ.get("MODELHUB_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "modelhub")


@functools.cache
def processor() -> str:
    """Its name, as the system tells it."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()
