"""One measurement of fine-tuning in one process: `python train_worker.py MEASUREMENT LIBRARY BACKEND MODEL`; the result
is a line of JSON. finetune.py starts it anew for each. With BENCH_CUDA set: on a GPU, in bfloat16, with larger batches.
"""

import functools
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from worker import resident, seconds

CUDA = "BENCH_CUDA" in os.environ
DTYPE = "bfloat16" if CUDA else "float32"
LENGTH = 512
EXAMPLES = 256 if CUDA else 32  # that a peer trains on
POOL = 512  # that we pack: real data has enough examples for full rows
STEPS = 10  # that we train of it
FULL_ROWS = 80 if CUDA else 3
MEDIAN, SIGMA = 125, 0.703  # of Dolly's lengths: a mean of 160 and a 90th percentile of 310 tokens
RESPONSE = 0.6  # the share of a row that the response takes
RANK, RATE = 4, 5e-5
SEED = 2  # of a few tried, one with which padding is what it is on average, within 2%


@dataclass
class Steps:
    """The lengths of each step's examples; when it began and each step ended; the losses. The first is not counted.

    samples: None: as many as there are lengths."""

    lengths: list[list[int]]
    samples: float | None = None
    times: list[float] = field(default_factory=lambda: [time.perf_counter()])
    losses: list[float] = field(default_factory=list)

    def end(self, loss: float) -> None:
        self.losses.append(loss)
        self.times.append(time.perf_counter())


class Modelhub:
    def __init__(self, backend: str, model: str):
        from modelhub import CausalLM

        self.lm = CausalLM.from_preset(model, backend=backend, device="gpu" if CUDA else "cpu", dtype=DTYPE)
        self.lm.enable_lora(rank=RANK)
        self.lm.compile("adamw", learning_rate=RATE)
        self.lm.preprocessor.sequence_length = LENGTH

    def train(self, rows: Sequence[np.ndarray], response: bool) -> Steps:
        from modelhub.training.batches import Batches
        from modelhub.training.callbacks import Callback
        from modelhub.training.examples import Example

        # What fit does with records, here with token ids: packed into rows. A row holds three of Dolly's examples, so
        # that a step on one row is as much as a peer's on four examples.
        examples = [Example(ids, learnt(len(ids), response)) for ids in rows]
        batches = list(itertools.islice(Batches(examples, LENGTH, 8 if CUDA else 1).epoch(0), STEPS))
        lengths = [[int(n) for row in b["segment_ids"] for n in np.bincount(row)[1:]] for b in batches]
        samples = sum(map(sum, lengths)) / np.mean([len(ids) for ids in rows])

        class Clock(Callback):
            def on_train_batch_end(self, step: int, logs: dict[str, float]) -> None:
                steps.end(logs["loss"])

        steps = Steps(lengths[:1] + lengths, samples)
        self.lm.fit(batches[:1] + batches, callbacks=[Clock()], verbose=False)
        return steps


class Peft:
    """A plain loop: the batch padded to its longest row."""

    def __init__(self, backend: str, model: str):
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        lm = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, DTYPE)).to("cuda" if CUDA else "cpu")
        lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self.lm = get_peft_model(lm, lora).train()

    def train(self, rows: Sequence[np.ndarray], response: bool) -> Steps:
        import torch

        full = min(map(len, rows)) == LENGTH
        batches = groups(rows, 8 if CUDA else 1 if full else 4)  # one full row is where this loop is fastest on a CPU
        optimizer = torch.optim.AdamW([p for p in self.lm.parameters() if p.requires_grad], lr=RATE)
        steps = Steps([[len(ids) for ids in batch] for batch in batches])
        for batch in batches:
            ids, mask = (torch.from_numpy(x).to(self.lm.device) for x in padded(batch, max(map(len, batch))))
            loss = self.lm(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.end(loss.item())
        return steps


class KerasHub:
    """All rows padded to LENGTH; two steps are enough, because each takes the same time."""

    def __init__(self, backend: str, model: str):
        os.environ["KERAS_BACKEND"] = backend
        import keras
        import keras_hub

        self.keras, self.batch = keras, 1 if backend == "tensorflow" else 4
        self.lm = keras_hub.models.CausalLM.from_preset(model, dtype=DTYPE)
        self.lm.preprocessor = None  # it is given token ids
        self.lm.backbone.enable_lora(rank=RANK)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.lm.compile(optimizer=keras.optimizers.AdamW(RATE), loss=loss)

    def train(self, rows: Sequence[np.ndarray], response: bool) -> Steps:
        batches = groups(rows, self.batch)[:3]
        ids, mask = padded([ids for batch in batches for ids in batch], LENGTH + 1)
        steps = Steps([[len(ids) for ids in batch] for batch in batches])
        clock = self.keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: steps.end(float(logs["loss"]))
        )
        self.lm.fit(
            {"token_ids": ids[:, :-1], "padding_mask": mask[:, :-1]}, ids[:, 1:], sample_weight=mask[:, 1:],
            batch_size=self.batch, shuffle=False, verbose=0, callbacks=[clock],
        )  # fmt: skip
        return steps


LIBRARIES: dict[str, type[Any]] = {"modelhub": Modelhub, "peft": Peft, "keras_hub": KerasHub}


def groups(rows: Sequence[np.ndarray], size: int) -> list[list[np.ndarray]]:
    """The rows in batches; the first batch comes twice, because the first step is not counted."""
    batches = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
    return batches[:1] + batches


def padded(rows: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 ids and mask (rows, width)."""
    ids, mask = np.zeros((2, len(rows), width), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


def learnt(length: int, response: bool) -> np.ndarray:
    """Which tokens of an example have a loss."""
    return np.arange(length) >= max(1, length - round(length * (RESPONSE if response else 1)))


def examples(vocabulary: int, count: int) -> list[np.ndarray]:
    """Random token ids, always the same: the quantiles of Dolly's lengths in a random order."""
    draw = np.random.default_rng(SEED)
    normal = statistics.NormalDist(math.log(MEDIAN), SIGMA)
    lengths = [math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    return [draw.integers(5, vocabulary, min(LENGTH, round(n)), np.int32) for n in draw.permutation(lengths)]


def useful_flops(config: dict[str, Any], lengths: list[int], response: bool) -> float:
    """Of a step with frozen weights: each product runs forward and backward, 4 operations for each weight.

    Padding, recomputing and what is above the diagonal of attention do not count.
    """
    width, inner = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    layer = 2 * width * inner * (1 + config["num_key_value_heads"] / config["num_attention_heads"])
    layer += 3 * width * config["intermediate_size"]
    head = 4 * config["vocab_size"] * width * sum(int(learnt(n, response).sum()) for n in lengths)
    attention = 6 * inner * sum(n * n for n in lengths)
    return config["num_hidden_layers"] * (4 * layer * sum(lengths) + attention) + head


def measure(measurement: str, library: str, backend: str, model: str) -> dict[str, Any]:
    """first: seconds of the first step; of those after it samples (per second), row (seconds of an example), flops
    (useful ones per second); memory: the most that the process had; loss: of the first step."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    if measurement == "full":
        draw = np.random.default_rng(0)
        rows = list(draw.integers(5, config["vocab_size"], (FULL_ROWS, LENGTH), np.int32))
    else:
        rows = examples(config["vocab_size"], POOL if library == "modelhub" else EXAMPLES)
    response = measurement == "response"
    steps = LIBRARIES[library](backend, model).train(rows, response)
    if len(steps.times) != len(steps.lengths) + 1:
        raise RuntimeError(f"{len(steps.times) - 1} steps were made of {len(steps.lengths)} batches")
    durations = [after - before for before, after in itertools.pairwise(steps.times)]
    steady, count = sum(durations[1:]), steps.samples or sum(map(len, steps.lengths[1:]))
    flops = sum(useful_flops(config, lengths, response) for lengths in steps.lengths[1:])
    return {
        "first": durations[0], "samples": count / steady, "row": steady / count, "flops": flops / steady,
        "memory": resident("VmHWM"), "loss": steps.losses[0], "steps": len(durations),
    }  # fmt: skip


def measure_matmul(_: str, backend: str, model: str) -> dict[str, Any]:
    """flops: float32 operations per second of the fastest plain product."""
    array, product = products(backend)
    best = 0.0
    for n, k, m in ((512, 640, 8192), (512, 8192, 640), (512, 640, 4096), (2048, 640, 8192)):
        draw = np.random.default_rng(0)
        x, w = (array(draw.standard_normal(shape, np.float32)) for shape in ((n, k), (m, k)))
        multiply = functools.partial(product, x, w)
        multiply()
        best = max(best, 2 * n * k * m / min(seconds(multiply) for _ in range(20)))
    return {"flops": best}


def products(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A function that makes an array of a numpy one, and x @ w.T."""
    if backend == "jax":
        import jax

        times = jax.jit(lambda x, w: x @ w.T)
        return jax.numpy.asarray, lambda x, w: times(x, w).block_until_ready()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.constant, lambda x, w: tf.matmul(x, w, transpose_b=True)
    if backend == "torch":
        import torch

        return torch.from_numpy, lambda x, w: x @ w.T
    return np.asarray, lambda x, w: x @ w.T


def make(_: str, backend: str, folder: str) -> dict[str, Any]:
    """A model of Gemma 2B's shape with random weights, for a machine without its files."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, GemmaConfig

    config = GemmaConfig(
        vocab_size=256000, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256,
    )  # fmt: skip
    with torch.device("cuda"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = models.WordLevel({"<unk>": 0}, unk_token="<unk>")  # token ids are all that is used
    Tokenizer(words).save(str(Path(folder) / "tokenizer.json"))
    return {}


if __name__ == "__main__":
    others = {"matmul": measure_matmul, "make": make}
    name, *operands = sys.argv[1:]
    print("\n" + json.dumps(others[name](*operands) if name in others else measure(name, *operands)))
