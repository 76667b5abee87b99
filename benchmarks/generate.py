"""Time loading and generating on every backend, transformers and KerasHub in the same run; write a Markdown table.

README.md tells what is needed.
"""

from pathlib import Path

from bench import BACKENDS, KERAS, OURS, TRANSFORMERS, Bench, Job, Row, parser, weights_bytes


class GenerateBench(Bench):
    def skips(self, job: Job) -> bool:
        measurement, library, _ = job
        return super().skips(job) or (measurement == "load" and library != OURS and not self.args.gguf_peer)


def table_rows(weights: int) -> list[Row]:
    """weights: bytes, in float32."""
    memory = (1.3 * weights + 300e6) / 1e6
    peers = {
        "jax": (KERAS, "jax"),
        "torch": (TRANSFORMERS, "torch"),
        "tensorflow": (KERAS, "tensorflow"),
        "numpy": (TRANSFORMERS, "torch"),
    }
    speed_ratio = {"jax": 1.15, "torch": 3, "tensorflow": 1.75, "numpy": 2}
    gguf_peer = {"torch": (TRANSFORMERS, "torch")}
    ready, gguf = "from_preset and first token, HF folder", "from_preset, GGUF with tokenizer"
    start, eight = "process start to first token, {} compilation cache", "8 prompts of mixed length at once"
    torch = (TRANSFORMERS, "torch")
    return [
        Row("`import modelhub`", "import", "bare", "s", "", None, 0.5),
        Row("`from modelhub import CausalLM`", "import", "with_task", "s", "", None, 0.5),
        *(Row(ready, "one", "ready", "s", name, peers[name], 1 / 3, True) for name in BACKENDS),
        *(Row(gguf, "load", "seconds", "s", name, gguf_peer.get(name), 6) for name in BACKENDS),
        Row(start.format("empty"), "start", "empty", "s", "jax", None, 9),
        Row(start.format("warm"), "start", "warm", "s", "jax", None, 5),
        *(Row("decode", "one", "speed", "tokens/s", name, peers[name], speed_ratio[name], True) for name in BACKENDS),
        Row("decode", "one", "speed", "tokens/s", "torch", (KERAS, "torch")),
        *(Row(eight, "eight", "speed", "tokens/s", name, torch, 2.2, True) for name in ("jax", "torch")),
        *(
            Row("peak memory, loading and generating", "one", "memory", "MB", name, peers[name], memory)
            for name in BACKENDS
        ),
    ]


def main() -> None:
    options = parser(__doc__, ("import", "one", "load", "start", "eight"))
    options.add_argument("--gguf", type=Path, help="the GGUF rows need it")
    options.add_argument(
        "--gguf-peer", action="store_true", help="load the GGUF with transformers too (a minute each time)"
    )
    args = options.parse_args()
    bench = GenerateBench(args, models={"load": args.gguf})
    bench.report(table_rows(weights_bytes(args.folder)))


if __name__ == "__main__":
    main()
