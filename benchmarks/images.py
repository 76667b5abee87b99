"""How many JPEGs a second are decoded, resized and normalised: by ImageProcessor and by transformers' Pillow-based one.

python benchmarks/images.py [PHOTO ...] [--size 500x400] [--count 512] [--workers 2] [--repeats 5]

Without photos a picture of smooth areas and noise is made. Per second of CPU time says more than per second where
others use the machine too.
"""

import argparse
import io
import os
import statistics
import time

import numpy as np
from PIL import Image

from modelhub.processing.augment import Augment
from modelhub.processing.image import ImageProcessor, read_image


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 15, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return Image.fromarray(
        (np.asarray(coarse).astype(int) + rng.integers(-8, 9, (height, width, 3))).clip(0, 255).astype(np.uint8)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*")
    parser.add_argument("--size", default="500x400")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    files = []
    for image in [read_image(path).resize((width, height)) for path in args.photos] or [picture(width, height)]:
        image.save(file := io.BytesIO(), "JPEG", quality=90)
        files.append(file.getvalue())
    batch = [files[n % len(files)] for n in range(64)]
    vit, augment = ImageProcessor(), Augment()
    dino = ImageProcessor.from_config({"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}})
    keras = ImageProcessor.from_keras({"image_size": [224, 224], "scale": 1 / 127.5, "offset": -1})
    cases = {
        "ViT (bilinear to 224 x 224)": lambda: vit.load(batch, workers=args.workers),
        "ViT, random crops and flips": lambda: vit.load(
            batch, lambda i, image: augment.image(image, vit, i), workers=args.workers
        ),
        "DINOv2 (bicubic to 256, crop 224)": lambda: dino.load(batch, workers=args.workers),
        "KerasHub's ViT (no antialiasing)": lambda: keras.load(batch, workers=args.workers),
    }
    try:
        from transformers import ViTImageProcessorPil
    except ImportError:
        pass
    else:
        peer = ViTImageProcessorPil()
        cases["transformers' ViTImageProcessorPil"] = lambda: peer(
            [Image.open(io.BytesIO(file)).convert("RGB") for file in batch], return_tensors="np"
        )
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(args.repeats + 1):
        for name, run in cases.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(args.count // len(batch)):
                run()
            count = args.count // len(batch) * len(batch)
            figures[name].append((count / (time.perf_counter() - wall), count / (time.process_time() - cpu)))
    print(
        f"JPEGs of {width} x {height}, {sum(map(len, files)) // len(files):,} bytes; {args.workers} threads; medians\n"
    )
    print("| what | images a second | per second of CPU time |\n|---|---|---|")
    for name, values in figures.items():
        walls, cpus = zip(*values[1:], strict=True)  # the first warms up
        spread = f"{min(walls):.0f} to {max(walls):.0f}"
        print(f"| {name} | {statistics.median(walls):.0f} ({spread}) | {statistics.median(cpus):.0f} |")


if __name__ == "__main__":
    main()
