"""One measurement in one process: `python worker.py MEASUREMENT LIBRARY BACKEND MODEL`; the result is a line of JSON.

benchmarks/generate.py starts it anew for each measurement, with the Python that the library is installed in. Clocks
start when everything is imported that the library lets one import by a public name.
"""

import importlib
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ONE = "The capital of France is"
NEW = 128  # tokens that decoding is timed over
NEW_OF_EIGHT = 64  # for each of the eight prompts
EIGHT = (  # 4 to 60 of Gemma's tokens, the begin-of-sequence token counted
    "Once upon a",
    "The three primary colours are",
    "To bake a loaf of bread at home, you first",
    "The history of the steam engine begins in the seventeenth century, when",
    "In a small village by the sea there lived an old fisherman who owned nothing but a boat, a net and a dog that",
    "Photosynthesis is the process by which green plants, algae and some bacteria turn light into chemical energy. In "
    "plants it takes place in the chloroplasts, where",
    "A good index makes a database answer quickly, but every index has its price: it takes room on the disk, and each "
    "insert and each update has to change it too. Before you add one, ask yourself whether",
    "The committee met on Tuesday to discuss the budget for the coming year. After a long debate about the roof of the "
    "library, which has been leaking since the storm in March, and about the wages of the two gardeners, the chairman "
    "asked the members to vote. The result was",
)


class Modelhub:
    def __init__(self, backend: str, model: str):
        import modelhub

        importlib.import_module(f"modelhub.core.backends.{backend}")
        self.backend, self.model, self.load_task = backend, model, modelhub.CausalLM.from_preset

    def load(self) -> None:
        self.lm = self.load_task(self.model, backend=self.backend, device="cpu", dtype="float32")
        self.lm.generation_config = {"eos_token_id": []}  # greedy, and never ends early

    def generate(self, prompts: list[str], new_tokens: int) -> None:
        self.lm.generate(prompts, max_new_tokens=new_tokens)
        check(self.lm.last_run.new_tokens, len(prompts) * new_tokens)

    def decode_seconds(self) -> float:
        return decode_seconds(self.generate)


class Transformers:
    def __init__(self, backend: str, model: str):
        import transformers

        self.transformers, self.model = transformers, Path(model)
        for name in ("AutoTokenizer", "AutoModelForCausalLM", "GenerationConfig", *class_names(self.model)):
            getattr(transformers, name)  # these modules are imported when first named

    def load(self) -> None:
        import torch

        folder, options = self.model, {}
        if folder.suffix == ".gguf":
            folder, options = folder.parent, {"gguf_file": folder.name}
        self.tokenizer = self.transformers.AutoTokenizer.from_pretrained(folder, padding_side="left", **options)
        self.lm = self.transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        self.lm.generation_config.eos_token_id = None

    def generate(self, prompts: list[str], new_tokens: int) -> None:
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True)
        out = self.lm.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        self.tokenizer.batch_decode(out)
        check(out.numel() - inputs["input_ids"].numel(), len(prompts) * new_tokens)

    def decode_seconds(self) -> float:
        return decode_seconds(self.generate)


class KerasHub:
    def __init__(self, backend: str, model: str):
        os.environ["KERAS_BACKEND"] = backend
        import keras
        import keras_hub

        self.keras, self.model, self.load_task = keras, model, keras_hub.models.CausalLM.from_preset

    def load(self) -> None:
        self.lm = self.load_task(self.model, dtype="float32")
        self.lm.compile(sampler="greedy")

    def generate(self, prompts: list[str], new_tokens: int) -> None:
        self.lm.generate(prompts, max_length=self.longest(prompts) + new_tokens, stop_token_ids=None)

    def longest(self, prompts: list[str]) -> int:
        """Tokens of the longest prompt, with the begin-of-sequence token."""
        return 1 + max(len(ids) for ids in self.lm.preprocessor.tokenizer(prompts))

    def decode_seconds(self) -> float:
        # generate is one program over a buffer of max_length tokens. How much of its time is not decoding is told by
        # the same program on the same buffer with room for a single token.
        length = self.longest([ONE]) + NEW + 1
        inputs = self.lm.preprocessor.generate_preprocess([ONE], sequence_length=length)
        places = self.keras.ops.arange(length)[None, :]
        filled = {**inputs, "padding_mask": places < length - 1}
        program = self.lm.make_generate_function()

        def run(inputs: dict[str, Any]) -> None:
            self.keras.ops.convert_to_numpy(program(inputs, stop_token_ids=None)["token_ids"])

        run(inputs)
        run(filled)
        return seconds(lambda: run(inputs)) - seconds(lambda: run(filled))


LIBRARIES: dict[str, type[Any]] = {"modelhub": Modelhub, "transformers": Transformers, "keras_hub": KerasHub}


def class_names(model: Path) -> list[str]:
    """The classes that a Hugging Face folder's files name."""
    names = []
    for file, key in (("config.json", "architectures"), ("tokenizer_config.json", "tokenizer_class")):
        if (model / file).is_file():
            value = json.loads((model / file).read_text(encoding="utf-8")).get(key) or []
            names += [value] if isinstance(value, str) else value
    return names


def check(made: int, wanted: int) -> None:
    if made != wanted:
        raise RuntimeError(f"{made} tokens were generated, {wanted} were asked for")


def seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def decode_seconds(generate: Callable[[list[str], int], None]) -> float:
    """For NEW tokens after the first one."""
    generate([ONE], NEW + 1)
    generate([ONE], 1)
    return seconds(lambda: generate([ONE], NEW + 1)) - seconds(lambda: generate([ONE], 1))


def resident(field: str) -> int:
    """Bytes: VmRSS is now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def warm_memory() -> None:
    """Let another process touch free memory and give it back, if generate.py asked for it (README.md says why)."""
    if size := os.environ.get("BENCH_WARM_MEMORY"):
        subprocess.run([sys.executable, __file__, "touch", size], check=True, stdout=subprocess.DEVNULL)


def touch(size: str) -> dict[str, Any]:
    memory = mmap.mmap(-1, int(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for place in range(0, len(memory), mmap.PAGESIZE):
        memory[place] = 1
    return {}


def measure_import() -> dict[str, Any]:
    """The package, which loads its names when they are first used, and then with the main one."""
    bare = seconds(lambda: importlib.import_module("modelhub"))
    frameworks = [name for name in ("jax", "torch", "tensorflow") if name in sys.modules]
    return {
        "bare": bare,
        "with_task": bare + seconds(lambda: sys.modules["modelhub"].CausalLM),
        "frameworks": frameworks,
    }


def measure_versions() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("numpy", "jax", "torch", "tensorflow", "transformers", "keras", "keras-hub"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def measure_one(library: str, backend: str, model: str) -> dict[str, Any]:
    """One prompt: loading, first token, decoding, memory."""
    importlib.import_module(backend)
    before = resident("VmRSS")
    task = LIBRARIES[library](backend, model)
    warm_memory()
    load = seconds(task.load)
    first = seconds(lambda: task.generate([ONE], 1))
    speed = NEW / task.decode_seconds()
    return {"load": load, "ready": load + first, "speed": speed, "memory": resident("VmHWM") - before}


def measure_eight(library: str, backend: str, model: str) -> dict[str, Any]:
    """Eight prompts at once: new tokens a second over the whole call, prompts included."""
    task = LIBRARIES[library](backend, model)
    task.load()
    task.generate([*reversed(EIGHT)], NEW_OF_EIGHT)  # another batch of the same shape: no cache of prompts helps
    return {"speed": len(EIGHT) * NEW_OF_EIGHT / seconds(lambda: task.generate(list(EIGHT), NEW_OF_EIGHT))}


def measure_load(library: str, backend: str, model: str) -> dict[str, Any]:
    task = LIBRARIES[library](backend, model)
    warm_memory()
    return {"seconds": seconds(task.load)}


def measure_start(library: str, backend: str, model: str) -> dict[str, Any]:
    """When the first piece of text was there; generate.py knows when the process was started."""
    import modelhub

    lm = modelhub.CausalLM.from_preset(model, backend=backend, device="cpu", dtype="float32")
    next(lm.generate(ONE, stream=True))
    return {"time": time.time()}


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "touch": touch,
    "import": measure_import,
    "versions": measure_versions,
    "one": measure_one,
    "eight": measure_eight,
    "load": measure_load,
    "start": measure_start,
}

if __name__ == "__main__":
    print("\n" + json.dumps(MEASUREMENTS[sys.argv[1]](*sys.argv[2:])))
