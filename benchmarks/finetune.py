"""Time LoRA fine-tuning on every backend, PEFT and KerasHub in the same run; write a Markdown table.

Each process trains on the same rows of random tokens, of Dolly's lengths or full. README.md tells what is needed.
"""

import sys
import tempfile
from pathlib import Path

from bench import BACKENDS, KERAS, PEFT, Bench, Row, parser

TRAINING = tuple(name for name in BACKENDS if name != "numpy")
EVERY, RESPONSE = "Dolly-like rows, loss on every token", "Dolly-like rows, loss on the response"
FULL = "full rows of 512 tokens"


def cpu_rows(names: list[str]) -> list[Row]:
    peft = (PEFT, "torch")
    full_peers = {"torch": (peft, 1.25, None), "jax": ((KERAS, "jax"), 1.3, "packed"),
                  "tensorflow": ((KERAS, "tensorflow"), 1.0, "packed")}  # fmt: skip
    best, all_keras = " ".join(names), (KERAS, " ".join(names))
    keras = {name: (KERAS, name) for name in names}
    return [
        Row(f"{EVERY}; the best backends", "packed", "samples", "samples/s", best, all_keras, 2.75, True),
        Row(f"{EVERY}; the best backend", "packed", "samples", "samples/s", best, peft, 2.25, True),
        *(Row(EVERY, "packed", "samples", "samples/s", name, keras[name], 2.5, True) for name in names),
        *(Row(RESPONSE, "response", "samples", "samples/s", name) for name in names),
        # A time: ours over the peer's, so that 1.25 times as fast is 0.8x.
        *(
            Row(f"{FULL}, time of a row", "full", "row", "s", name, peer, 1 / target, True, measurement)
            for name, (peer, target, measurement) in full_peers.items()
            if name in names
        ),
        *(
            Row(f"{FULL}, of the machine's rate", "full", "flops", "GFLOP/s", name, ("product", " ".join(BACKENDS)),
                None, False, "matmul")
            for name in names
        ),
        *(
            Row("most memory of the process", "packed", "memory", "GB", name, peer, 3.5)
            for name in names
            for peer in ([keras[name], peft] if name == "torch" else [keras[name]])
        ),
        *(
            Row("first step, empty compilation cache", "packed", "first", "s", name, keras[name], 20)
            for name in names
            if name == "jax"
        ),
    ]  # fmt: skip


def cuda_rows(names: list[str]) -> list[Row]:
    peft = (PEFT, "torch")
    return [
        Row(title, measurement, field, unit, name, peft)
        for title, measurement in ((EVERY, "packed"), (FULL, "full"))
        for field, unit in (("samples", "samples/s"), ("flops", "% of 989 TFLOP/s"))
        for name in names
        if name != "tensorflow"
    ]


def main() -> None:
    options = parser(__doc__, ("packed", "response", "full"), folder=False)
    options.add_argument("--backends", nargs="+", choices=TRAINING, default=TRAINING)
    options.add_argument("--cuda", action="store_true", help="on a GPU: a model of Gemma 2B's shape, in bfloat16")
    args = options.parse_args()
    names = [name for name in TRAINING if name in args.backends]
    with tempfile.TemporaryDirectory() as made:
        environment = None
        if args.cuda:
            environment = {"BENCH_CUDA": "1"}
        elif not args.folder:
            options.error("--folder is needed without --cuda")
        args.folder = args.folder or Path(made, "gemma_2b_shape")
        args.folder.mkdir(exist_ok=True)
        bench = Bench(args, "train_worker.py", environment=environment)
        if not any(args.folder.iterdir()) and "error" in (failed := bench.run(("make", PEFT, "torch"))):
            sys.exit(f"the model could not be made: {failed['error']}")
        bench.report(cuda_rows(names) if args.cuda else cpu_rows(names))


if __name__ == "__main__":
    main()
