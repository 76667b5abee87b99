"""Runs cases in a process that may die of them. A case is a target and a number; all of its damage follows from these.

    python tests/fuzz/worker.py TARGET NUMBER     runs one case again, with its traceback, and keeps the damaged files

With two folders (the sound files, and room for damaged ones) it is what the tests start: it reads cases from standard
input, one a line, and answers likewise.
"""

import faulthandler
import json
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

MEMORY = 1 << 30  # bytes of address space that a case may take beyond what the process has when all is imported
LONGEST_MESSAGE = 20_000  # characters

os.environ |= {
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "2",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "support")]

from fuzz import presets, texts, weights  # noqa: E402, F401 (they fill TARGETS)
from fuzz.target import TARGETS  # noqa: E402

from modelhub.errors import ModelhubError  # noqa: E402


def write_sound(root: Path) -> None:
    for name, target in TARGETS.items():
        (root / name).mkdir(parents=True)
        target.write(root / name)


class Cases:
    """root: the sound folders. work: where the damaged ones lie, for this process alone."""

    def __init__(self, root: Path, work: Path):
        self.root, self.work = root, work

    def prepare(self, name: str) -> None:
        if not (self.work / name).is_dir():
            shutil.copytree(self.root / name, self.work / name)

    def damage(self, name: str, number: int) -> dict[str, bytes | None]:
        """Puts the damaged files into the work folder."""
        self.prepare(name)
        files = TARGETS[name].damaged(self.root / name, random.Random(f"{name} {number}"))
        for file, data in files.items():
            path = self.work / name / file
            path.unlink()
            if data is not None:
                path.write_bytes(data)
        return files

    def run(self, name: str, number: int) -> dict[str, str]:
        files = self.damage(name, number)
        try:
            return outcome(name, self.work / name)
        finally:
            for file in files:
                shutil.copyfile(self.root / name / file, self.work / name / file)


def outcome(name: str, folder: Path) -> dict[str, str]:
    """kind: "loaded", "refused" (with a ModelhubError) or "failed"; text: the error."""
    try:
        TARGETS[name].load(folder)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # panics of Rust libraries are no Exceptions
        text = str(error)
        causes = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        if not isinstance(error, ModelhubError) or any(isinstance(cause, MemoryError) for cause in causes):
            return {"kind": "failed", "text": "".join(traceback.format_exception(error))[-6000:]}
        if not text or len(text) > LONGEST_MESSAGE or re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff]", text):
            trace = "".join(traceback.format_tb(error.__traceback__))
            return {"kind": "failed", "text": f"a message of {len(text)} characters: {text[:300]!r}\n{trace}"}
        return {"kind": "refused", "text": f"{type(error).__name__}: {text}"}
    return {"kind": "loaded", "text": ""}


def limit_memory() -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def serve(root: Path, work: Path) -> None:
    cases = Cases(root, work)
    for name, target in TARGETS.items():  # imports and caches must not count, and sound files must load
        cases.prepare(name)
        target.load(work / name)
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes elsewhere
    os.dup2(2, 1)
    limit_memory()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        name, case = line.rstrip("\n").split(" ", 1)
        found = cases.run(name, int(case)) if case.isdigit() else outcome(name, Path(case))
        print(json.dumps(found), file=answers, flush=True)


def replay(name: str, number: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (folder / "sound" / name).mkdir(parents=True)
    TARGETS[name].write(folder / "sound" / name)
    cases = Cases(folder / "sound", folder / "damaged")
    cases.prepare(name)
    TARGETS[name].load(folder / "damaged" / name)
    for file, data in cases.damage(name, number).items():
        print(f"{folder / 'damaged' / name / file}: {'gone' if data is None else f'{len(data)} bytes, {data[:200]!r}'}")
    limit_memory()
    found = outcome(name, folder / "damaged" / name)
    print(found["kind"], found["text"], sep="\n")


if __name__ == "__main__":
    faulthandler.enable()
    warnings.simplefilter("ignore")
    if len(sys.argv) == 3 and sys.argv[2].isdigit():
        replay(sys.argv[1], int(sys.argv[2]))
    else:
        serve(Path(sys.argv[1]), Path(sys.argv[2]))
