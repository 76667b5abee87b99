"""One measurement of ViT-Base in one process: `python vit_worker.py MEASUREMENT LIBRARY BACKEND MODEL`; the result is a
line of JSON. vit.py starts it anew for each. With BENCH_CUDA set: on a GPU, batch 128, mixed bfloat16.

All have the same shape (patch 16, 224 px, 12 layers, 768 wide, MLP 3072, 1000 classes), random weights and no dropout.
"""

import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from train_worker import measure_matmul
from worker import resident, seconds

CUDA = "BENCH_CUDA" in os.environ
BATCH = 128 if CUDA else 8
SIZE, CLASSES, RATE = 224, 1000, 1e-3
CALLS = 30 if CUDA else 6  # timed, after two that are not


class Modelhub:
    def __init__(self, backend: str):
        from modelhub import ImageClassifier

        self.clf = ImageClassifier.from_config(
            num_classes=CLASSES, image_size=SIZE, backend=backend, device="gpu" if CUDA else "cpu"
        )

    def forward(self, pixels: np.ndarray) -> Callable[[], Any]:
        backbone = self.clf.backbone  # without the head, which is a thousandth of it: it takes pixels as they are
        return lambda: backbone.xp.get(backbone(pixels))

    def train(self, pixels: np.ndarray, labels: np.ndarray) -> list[float]:
        from modelhub import optim

        self.clf.compile(optim.SGD(RATE), mixed_precision="mixed_bfloat16" if CUDA else None)
        batches = [{"pixel_values": pixels, "labels": labels}] * (CALLS + 2)
        return [step["seconds"] for step in self.clf.fit(batches, verbose=False).steps[2:]]


class Transformers:
    def __init__(self, backend: str):
        import torch
        from transformers import ViTConfig, ViTForImageClassification

        self.torch = torch
        self.model = ViTForImageClassification(ViTConfig(num_labels=CLASSES)).eval().to("cuda" if CUDA else "cpu")
        self.cast = torch.autocast("cuda" if CUDA else "cpu", torch.bfloat16, enabled=CUDA)

    def forward(self, pixels: np.ndarray) -> Callable[[], Any]:
        def call() -> Any:
            with self.torch.inference_mode(), self.cast:
                return self.model(self.torch.from_numpy(pixels).to(self.model.device)).logits.float().cpu().numpy()

        return call

    def train(self, pixels: np.ndarray, labels: np.ndarray) -> list[float]:
        torch = self.torch
        self.model.train()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
        x, y = torch.from_numpy(pixels).to(self.model.device), torch.from_numpy(labels).to(self.model.device)

        def step() -> float:
            with self.cast:
                loss = self.model(pixel_values=x, labels=y).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        return [seconds(step) for _ in range(CALLS + 2)][2:]


class KerasHub:
    def __init__(self, backend: str):
        os.environ["KERAS_BACKEND"] = backend
        import keras
        import keras_hub

        backbone = keras_hub.models.ViTBackbone(
            image_shape=(SIZE, SIZE, 3), patch_size=(16, 16), num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072
        )
        self.keras = keras
        self.model = keras_hub.models.ViTImageClassifier(backbone=backbone, num_classes=CLASSES, preprocessor=None)

    def forward(self, pixels: np.ndarray) -> Callable[[], Any]:
        x = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        return lambda: self.model.predict_on_batch(x)

    def train(self, pixels: np.ndarray, labels: np.ndarray) -> list[float]:
        keras = self.keras
        self.model.compile(keras.optimizers.SGD(RATE), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        x = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        return [seconds(lambda: self.model.train_on_batch(x, labels)) for _ in range(CALLS + 2)][2:]


LIBRARIES: dict[str, type[Any]] = {"modelhub": Modelhub, "transformers": Transformers, "keras_hub": KerasHub}


def measure(measurement: str, library: str, backend: str, model: str) -> dict[str, Any]:
    """images: per second, of the median call; memory: the most that the process had."""
    draw = np.random.default_rng(0)
    pixels = draw.standard_normal((BATCH, 3, SIZE, SIZE), np.float32)
    labels = draw.integers(0, CLASSES, BATCH)
    subject = LIBRARIES[library](backend)
    if measurement == "train":
        times = subject.train(pixels, labels)
    else:
        call = subject.forward(pixels)
        times = [seconds(call) for _ in range(CALLS + 2)][2:]
    return {"images": BATCH / statistics.median(times), "memory": resident("VmHWM")}


if __name__ == "__main__":
    name, *operands = sys.argv[1:]
    print("\n" + json.dumps(measure_matmul(*operands) if name == "matmul" else measure(name, *operands)))
