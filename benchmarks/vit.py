"""Time ViT-Base, forward and training, on every backend, with transformers and KerasHub in the same run; write a
Markdown table. README.md tells what is needed.
"""

import tempfile
from pathlib import Path

from bench import BACKENDS, KERAS, TRANSFORMERS, Bench, Row, parser

TRAINING = tuple(name for name in BACKENDS if name != "numpy")
# Of the forward pass of one image: 12 layers of 12 D^2 weights for 197 tokens, attention, patches and head.
FLOPS = 2 * (12 * (12 * 768**2 * 197 + 2 * 197 * 197 * 768) + 196 * 768 * 768 + 768 * 1000)


def rows(names: list[str]) -> list[Row]:
    found: list[Row] = []
    for measurement, title in (("forward", "forward"), ("train", "training step")):
        for name in names:
            keras = (KERAS, name)
            found.append(Row(f"{title}, batch 8", measurement, "images", "images/s", name, keras, 1.0, True))
            if name == "torch":
                peer = (TRANSFORMERS, name)
                found.append(Row(f"{title}, batch 8", measurement, "images", "images/s", name, peer, 1.0, True))
        found += [
            Row(f"{title}, most memory", measurement, "memory", "GB", name, (KERAS, name)) for name in names
        ]  # fmt: skip
    found += [Row("the machine's rate of products", "matmul", "flops", "GFLOP/s", name) for name in names]
    return found


def cuda_rows(names: list[str]) -> list[Row]:
    return [
        Row(f"{measurement}, batch 128, bfloat16", measurement, "images", "images/s", name, (TRANSFORMERS, "torch"))
        for measurement in ("forward", "train")
        for name in names
        if name != "tensorflow"
    ]


def main() -> None:
    options = parser(__doc__, ("forward", "train", "matmul"), folder=False)
    options.add_argument("--backends", nargs="+", choices=TRAINING, default=TRAINING)
    options.add_argument("--cuda", action="store_true", help="on a GPU: batch 128, mixed bfloat16")
    args = options.parse_args()
    names = [name for name in TRAINING if name in args.backends]
    with tempfile.TemporaryDirectory() as nothing:
        args.folder = Path(nothing)  # the weights are random
        bench = Bench(args, "vit_worker.py", environment={"BENCH_CUDA": "1"} if args.cuda else None)
        bench.report(cuda_rows(names) if args.cuda else rows(names))
        print(f"\nOne image takes {FLOPS / 1e9:.1f} GFLOP forward, about three times that in training.")


if __name__ == "__main__":
    main()
