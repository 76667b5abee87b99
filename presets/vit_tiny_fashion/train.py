"""Make the embedded preset: python presets/vit_tiny_fashion/train.py DATA OUTPUT [--epochs N] [--backend NAME].

DATA is the folder of Fashion-MNIST's four files (https://github.com/zalandoresearch/fashion-mnist, MIT licence), which
Debian's package dataset-fashion-mnist has in /usr/share/datasets/fashion-mnist. A ViT of 290,000 parameters learns its
60,000 training images from random weights, by modelhub's own fit, in about 8 minutes on two cores. The 10,000 held-out
images are only measured. OUTPUT-pictures gets the first three of them of each class: examples/clothes.
"""

import argparse
import dataclasses
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

from modelhub import Augment, ImageClassifier, optim

LABELS = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
NOTE = """
## Data

Trained on the 60,000 training images of [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) (copyright
2017 Zalando SE, MIT licence, which allows this), half of them in random colours; measured on its 10,000 held-out ones
as they are. The weights are modelhub's own work, under Apache-2.0; the data set is not part of them. It knows ten kinds
of clothes, each alone, upright and in the middle of a plain background: for trying things out, not for use.
`train.py` beside this file made it.
"""


def read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) uint8, light on black, and classes (N,) uint8 of "train" or "t10k"."""
    found = []
    for kind, head in (("images-idx3", 16), ("labels-idx1", 8)):
        content = gzip.decompress((folder / f"{part}-{kind}-ubyte.gz").read_bytes())
        found.append(np.frombuffer(content, np.uint8, offset=head))
    return found[0].reshape(-1, 28, 28), found[1]


def coloured(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N, 28, 28, 3): every second one between two random colours, so that photos, often dark on white, are no news."""
    ends = np.zeros((2, len(images), 1, 1, 3), np.float32)
    ends[1] = 255
    drawn = rng.uniform(0, 255, ends[:, ::2].shape)
    far = np.abs(drawn[1] - drawn[0]).max(-1, keepdims=True) > 80  # else nothing could be seen
    ends[:, ::2] = np.where(far, drawn, ends[::-1, ::2])  # black on white
    share = images[..., None] / np.float32(255)
    return np.rint(ends[0] + (ends[1] - ends[0]) * share).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--backend", default="torch")
    args = parser.parse_args()
    (images, classes), (held_images, held_classes) = read(args.data, "train"), read(args.data, "t10k")
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    images, classes = coloured(images[order], rng), classes[order]
    clf = ImageClassifier.from_config(
        labels=LABELS, image_size=28, patch_size=4, hidden_size=96, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=288, backend=args.backend,
    )  # fmt: skip
    clf.compile(optim.Muon(1e-2), schedule=optim.Cosine(warmup_steps=100), clip_norm=1.0)
    clf.fit(
        [{"image": image, "label": LABELS[index]} for image, index in zip(images, classes, strict=True)],
        epochs=args.epochs, batch_size=64, augment=Augment(crop=None),
        validation_data=(held_images, held_classes),
    )  # fmt: skip
    clf.backbone.provenance = dataclasses.replace(clf.backbone.provenance, licence="apache-2.0", from_scratch=True)
    clf.save_to_preset(args.output)
    with open(args.output / "README.md", "a", encoding="utf-8") as card:
        card.write(NOTE)
    for index, label in enumerate(LABELS):
        folder = args.output.with_name(args.output.name + "-pictures") / label
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(held_images[held_classes == index][:3], 1):
            Image.fromarray(image).save(folder / f"{number}.png", optimize=True)


if __name__ == "__main__":
    main()
