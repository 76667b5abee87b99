"""One measurement in one process: `python worker.py MEASUREMENT LIBRARY BACKEND MODEL`; the result is a line of JSON.

bench.py starts it anew for each measurement, with the Python that the library is installed in. Clocks start when
everything is imported that the library lets one import by a public name.
"""

import importlib
import json
import mmap
import os
import statistics
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
TURN = 64  # tokens of an answer at most
QUESTIONS = (  # two conversations
    (EIGHT[7] + " not in the minutes. What do you think it was?", "And what would you have voted for, and why?"),
    (
        EIGHT[5] + " light is absorbed. What else does a plant need to grow?",
        "Which of these can a desert plant do without?",
    ),
)


class Modelhub:
    def __init__(self, backend: str, model: str):
        import modelhub

        importlib.import_module(f"modelhub.core.backends.{backend}")
        self.backend, self.model, self.load_task = backend, model, modelhub.CausalLM.from_preset

    def load(self) -> None:
        self.lm = self.load_task(self.model, backend=self.backend, device="cpu", dtype="float32")
        self.lm.generation_config = {"eos_token_id": []}  # greedy, and never ends early
        tokenizer = self.lm.tokenizer
        self.template, tokenizer.chat_template = tokenizer.chat_template, None  # its end of a turn would end it too

    def generate(self, prompts: list[str], new_tokens: int) -> None:
        self.lm.generate(prompts, max_new_tokens=new_tokens)
        check(self.lm.last_run.new_tokens, len(prompts) * new_tokens)

    def decode_seconds(self) -> float:
        return decode_seconds(self.generate)

    def chat(self, messages: list[dict[str, str]]) -> tuple[str, dict[str, Any]]:
        self.lm.tokenizer.chat_template = self.template
        answer = self.lm.chat(messages, max_new_tokens=TURN)
        run = self.lm.last_run
        computed = run.prompt_tokens - run.reused_tokens
        left = run.prompt_tokens + run.new_tokens - 1  # the last token was not fed
        return answer, {
            "seconds": run.seconds_to_first_token,
            "computed": computed,
            "left": left,
            "reused": run.reused_tokens,
        }


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

    def chat(self, messages: list[dict[str, str]]) -> tuple[str, dict[str, Any]]:
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        size = inputs["input_ids"].shape[1]
        first = seconds(lambda: self.lm.generate(**inputs, max_new_tokens=1, do_sample=False))
        end = self.tokenizer.eos_token_id
        out = self.lm.generate(**inputs, max_new_tokens=TURN, do_sample=False, eos_token_id=end)[0, size:]
        answer = self.tokenizer.decode(out, skip_special_tokens=True)
        return answer, {"seconds": first, "computed": size, "left": size + len(out) - 1, "reused": 0}


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


def measure_import(*_: str) -> dict[str, Any]:
    """The package, which loads its names when they are first used, and then with the main one."""
    bare = seconds(lambda: importlib.import_module("modelhub"))
    frameworks = [name for name in ("jax", "torch", "tensorflow") if name in sys.modules]
    return {
        "bare": bare,
        "with_task": bare + seconds(lambda: sys.modules["modelhub"].CausalLM),
        "frameworks": frameworks,
    }


def measure_versions(*_: str) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("numpy", "jax", "torch", "tensorflow", "transformers", "peft", "keras", "keras-hub"):
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
    """From the start of a process to its first piece of text, with an empty and a warm compilation cache."""
    found = {}
    for state in ("empty", "warm"):
        begun = time.time()
        done = subprocess.run(
            [sys.executable, __file__, "first", library, backend, model], check=True, stdout=subprocess.PIPE
        )
        found[state] = json.loads(done.stdout.splitlines()[-1])["time"] - begun
    return found


def measure_first(library: str, backend: str, model: str) -> dict[str, Any]:
    """When the first piece of text was there."""
    import modelhub

    lm = modelhub.CausalLM.from_preset(model, backend=backend, device="cpu", dtype="float32")
    next(lm.generate(ONE, stream=True))
    return {"time": time.time()}


def measure_stream(library: str, backend: str, model: str) -> dict[str, Any]:
    """How much longer a call takes with stream=True; the two take turns."""
    task = Modelhub(backend, model)
    task.load()
    calls: list[Callable[[], Any]] = [
        lambda: task.generate([ONE], NEW),
        lambda: sum(1 for _ in task.lm.generate(ONE, max_new_tokens=NEW, stream=True)),
    ]
    runs = [[seconds(call) for call in calls] for _ in range(6)][1:]
    whole, streamed = (statistics.median(times) for times in zip(*runs, strict=True))
    return {"cost": 100 * (streamed / whole - 1), "whole": whole, "streamed": streamed}


def measure_chat(library: str, backend: str, model: str) -> dict[str, Any]:
    """Two turns: seconds to the first token and tokens computed for it; again: those of them that turn 1 had left."""
    task = LIBRARIES[library](backend, model)
    task.load()
    found: dict[str, Any] = {}
    for questions in QUESTIONS * 2:  # the first round compiles, the last conversation counts
        messages: list[dict[str, str]] = []
        for turn, question in enumerate(questions, 1):
            messages.append({"role": "user", "content": question})
            answer, about = task.chat(messages)
            messages.append({"role": "assistant", "content": answer})
            found |= {f"{name}_{turn}": value for name, value in about.items()}
        found["again"] = max(found["left_1"] - found["reused_2"], 0)
    return found


def measure_command(library: str, backend: str, preset: str) -> dict[str, Any]:
    """From the start of `modelhub chat` to the first byte of its answer; the second time, so with warm caches."""
    command = [str(Path(sys.executable).with_name("modelhub")), "chat", preset, "--backend", backend]
    for _ in range(2):
        begun = time.perf_counter()
        with subprocess.Popen(
            [*command, "--max-new-tokens", "16"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdin and process.stdout and process.stderr
            process.stdin.write(b"What is the capital of France?\n")
            process.stdin.close()
            first = process.stdout.read(1)
            elapsed = time.perf_counter() - begun
            process.stdout.read()
            if not first.strip():
                raise RuntimeError(f"{' '.join(command)}: {process.stderr.read().decode()}")
    return {"seconds": elapsed}


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "touch": touch,
    "import": measure_import,
    "versions": measure_versions,
    "one": measure_one,
    "eight": measure_eight,
    "load": measure_load,
    "start": measure_start,
    "first": measure_first,
    "stream": measure_stream,
    "chat": measure_chat,
    "command": measure_command,
}

if __name__ == "__main__":
    print("\n" + json.dumps(MEASUREMENTS[sys.argv[1]](*sys.argv[2:])))
