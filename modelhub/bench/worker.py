"""One backend in a process of its own, started by modelhub.bench.compare: lines of JSON in, lines of JSON out.

The first line is the request, of which the model is loaded and run once; then "repeat" and "train", as often as they
come. Nothing heavy is imported before the clock runs: what a framework takes to import belongs to the figures.
"""

import importlib
import itertools
import json
import os
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from modelhub.kinds import IMAGES, kind_named

if TYPE_CHECKING:
    import numpy as np

ROWS = 512  # tokens of a row in training, at most
RANK = 4
_SHORTEST = 0.25  # seconds that calls of a fraction of it are repeated for


class Subject(ABC):
    """A model under measurement. task: an object of the class that the request's task has."""

    def __init__(self, request: dict[str, Any]):
        import numpy as np

        keys = ("backend", "device", "dtype", "quantize", "load_weights", "num_classes")
        options = {key: request[key] for key in keys if key in request}
        self.request = request
        self.task = task_class(request["task"]).from_preset(request["path"], offline=True, **options)
        self.backbone = getattr(self.task, "backbone", self.task)
        self.draw = np.random.default_rng(0)

    @property
    def pixels(self) -> "np.ndarray":
        """Noise as it comes out of preprocessing: float32 (B, C, H, W)."""
        config = self.backbone.config
        shape = (self.request["batch_size"], config.num_channels, *config.size)
        return self.draw.standard_normal(shape, "float32")

    @abstractmethod
    def once(self) -> tuple[float, float]:
        """Seconds to the first result, and tokens or images a second."""

    def batches(self) -> Iterator[tuple[Any, int, int | None]]:
        """To train on: batch, the samples in it and their tokens; endlessly."""
        raise NotImplementedError

    def train(self, steps: int) -> dict[str, Any]:
        """Figures of the steps after the first, which compiles."""
        wanted = list(itertools.islice(self.batches(), steps + 1))
        history = self.task.fit([batch for batch, *_ in wanted], steps=steps + 1, verbose=False)
        seconds = [step["seconds"] for step in history.steps[1:]]
        _, samples, tokens = zip(*wanted[1:], strict=True)
        return {
            "train_step_seconds": statistics.median(seconds),
            "train_samples_per_second": sum(samples) / sum(seconds),
            "train_tokens_per_second": None if None in tokens else sum(tokens) / sum(seconds),
        }


class Text(Subject):
    """Prompts of random tokens, no two alike, and greedy answers of full length."""

    def once(self) -> tuple[float, float]:
        from modelhub.generation.sampling import Sampler

        rows, prompt, new = (self.request[key] for key in ("batch_size", "prompt_tokens", "max_new_tokens"))
        ids = self.draw.integers(0, self.task.config.vocab_size, (rows, prompt)).tolist()
        begun = time.perf_counter()
        # Below `generate`, which would stop where the model ends its text.
        arrived = [time.perf_counter() for _ in self.task._engine.run(self.task.params, ids, new, Sampler())]
        # From the second step on: what comes before may be compiled then.
        return arrived[0] - begun, rows * (new - 2) / (arrived[-1] - arrived[1])

    def batches(self) -> Iterator[tuple[Any, int, int | None]]:
        from modelhub.hub.resources import resource
        from modelhub.training import text_fit

        self.task.enable_lora(rank=RANK)
        self.task.preprocessor.sequence_length = min(ROWS, self.task.config.max_position_embeddings)
        options: dict[str, Any] = {"packing": True, "loss_on": "response", "template": None, "kind": None, "seed": 0}
        data = text_fit.batches(
            self.task, resource("finetune") / "dolly_style.jsonl", self.request["batch_size"], **options
        )
        for epoch in itertools.count():
            for batch in data.epoch(epoch):
                segments = batch["segment_ids"]
                yield batch, int(segments.max(1).sum()), int((segments > 0).sum())


class Images(Subject):
    def once(self) -> tuple[float, float]:
        images = {"pixel_values": self.pixels}
        return _calls(lambda: self.task.logits(images), self.request["batch_size"])

    def batches(self) -> Iterator[tuple[Any, int, int | None]]:
        count = self.request["batch_size"]
        while True:
            labels = self.draw.integers(0, self.task.config.num_labels, count)
            yield {"pixel_values": self.pixels, "labels": labels}, count, None


class Encoder(Subject):
    """Hidden states of random tokens, or of noise."""

    def once(self) -> tuple[float, float]:
        shape = self.request["batch_size"], self.request["prompt_tokens"]
        images = self.backbone.model.reads == IMAGES
        inputs = self.pixels if images else self.draw.integers(0, self.backbone.config.vocab_size, shape)
        return _calls(lambda: self.backbone.xp.get(self.backbone(inputs)), len(inputs) if images else inputs.size)


SUBJECTS: dict[str, type[Subject]] = {"causal-lm": Text, "image-classification": Images}  # and all others: Encoder


def _calls(call: Any, count: int) -> tuple[float, float]:
    """Seconds of the first call, and how many of the `count` of each are done in a second."""
    times = [time.perf_counter()]
    while times[-1] - times[0] < _SHORTEST:
        call()
        times.append(time.perf_counter())
    return times[1] - times[0], count * (len(times) - 1) / (times[-1] - times[0])


def task_class(name: str) -> Any:
    kind = kind_named(name)
    return getattr(importlib.import_module(kind.module), kind.class_name)


def load(request: dict[str, Any]) -> tuple[Subject, dict[str, Any]]:
    begun = time.perf_counter()
    from modelhub.core.backends import get_backend

    task_class(request["task"])
    xp = get_backend(request["backend"], request["device"])  # imports the framework
    imported = time.perf_counter()
    subject = SUBJECTS.get(request["task"], Encoder)(request)
    loaded = time.perf_counter()
    return subject, {
        "version": getattr(sys.modules.get(xp.name), "__version__", None),
        "device": xp.device,
        "dtype": subject.backbone.dtype,
        "load_seconds": loaded - imported,
        "load_seconds_with_imports": loaded - begun,
        "first_seconds": subject.once()[0],
    }


def main() -> None:
    """Serve until standard input ends."""
    from modelhub.errors import BackendNotInstalled, ModelhubError, NoGradients

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    subject: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if request["command"] == "load":
                subject, answer = load(request)
            elif request["command"] == "repeat":
                first, speed = subject.once()
                answer = {"first": first, "speed": speed}
            else:
                try:
                    answer = subject.train(request["steps"])
                except NoGradients:  # no failure: such a backend only does inference
                    answer = {}
            answer["peak_memory"] = subject.backbone.xp.peak_memory()
        except ModelhubError as error:
            # Those that are measured are on the path: one that cannot be imported is broken, which can be repaired.
            answer = {"error": str(error), "refused": not isinstance(error, BackendNotInstalled)}
        except Exception as error:  # whatever a framework raises is a finding
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
