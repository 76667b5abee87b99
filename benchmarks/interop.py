"""What the ways out cost: to_torch beside the transformers class of the same weights, to_jax under jit beside the
task's own logits, and lm.to from framework to framework. float32 on the CPU; the two sides of a row take turns, and the
figures are medians (smallest to largest).

python benchmarks/interop.py --folder gemma3 [--only torch jax move] [--repeats 30] [--threads 2]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TEXT, IMAGES = (1, 128), (8, 3, 224, 224)
STOPS = ("torch", "jax", "tensorflow", "numpy", "jax", "torch", "numpy", "tensorflow", "torch")


def in_turns(repeats: int, *calls: Callable[[], Any]) -> list[list[float]]:
    """Seconds of each call, after two that are not counted."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 2):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if repeat > 1:
                found.append(time.perf_counter() - start)
    return times


def shown(seconds: list[float]) -> str:
    low, middle, high = (1e3 * value for value in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"{middle:.1f} ms ({low:.1f} to {high:.1f})"


def row(title: str, ours: list[float], theirs: list[float]) -> str:
    ratio = statistics.median(ours) / statistics.median(theirs)
    return f"| {title} | {shown(ours)} | {shown(theirs)} | {ratio:.3f}x | {'yes' if ratio <= 1.05 else '**no**'} |"


def measure_torch(folder: Path, repeats: int) -> list[str]:
    import torch
    import transformers

    from modelhub import CausalLM, ImageClassifier, to_torch

    lines = ["| to_torch | modelhub | transformers | ratio | at most 1.05x |", "|---|---|---|---|---|"]

    def compare(title: str, ours: torch.nn.Module, theirs: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        def forward(net: torch.nn.Module) -> torch.Tensor:
            with torch.no_grad():
                return net(**inputs).logits

        gap = (forward(ours) - forward(theirs)).abs().max() / forward(theirs).abs().max()
        assert gap < 1e-3, f"{title}: not the same model, logits differ by {gap:.2g} of the largest"
        lines.append(row(title, *in_turns(repeats, lambda: forward(ours), lambda: forward(theirs))))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = to_torch(CausalLM.from_preset(str(folder), backend="torch", device="cpu", dtype="float32"))
    for rows, time_ in (TEXT, (4, 128)):
        ids = torch.randint(4, theirs.config.get_text_config().vocab_size, (rows, time_))
        compare(f"{folder.name}, {rows} x {time_} tokens", ours, theirs, {"input_ids": ids})
    clf = ImageClassifier.from_config(num_classes=1000, image_size=224, backend="torch", device="cpu")
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)).eval()
    net = to_torch(clf)
    net.load_state_dict(vit.state_dict())
    compare("ViT-Base, 8 images", net, vit, {"pixel_values": torch.randn(IMAGES)})
    return lines


def measure_jax(folder: Path, repeats: int) -> list[str]:
    import jax

    from modelhub import CausalLM, ImageClassifier, to_jax

    lines = ["| to_jax under jit | to_jax | the task's own | ratio | at most 1.05x |", "|---|---|---|---|---|"]
    lm = CausalLM.from_preset(str(folder), backend="jax", device="cpu", dtype="float32")
    params, fn = to_jax(lm)
    ids, run = np.random.default_rng(0).integers(4, lm.config.vocab_size, TEXT).astype(np.int32), jax.jit(fn)
    np.testing.assert_allclose(run(params, ids), lm.logits(ids), atol=1e-2)
    title = f"{folder.name}, {TEXT[0]} x {TEXT[1]} tokens"
    lines.append(row(title, *in_turns(repeats, lambda: np.asarray(run(params, ids)), lambda: lm.logits(ids))))
    backbone = ImageClassifier.from_config(num_classes=1000, image_size=224, backend="jax", device="cpu").backbone
    encoder, encode = to_jax(backbone)
    pixels, run = np.random.default_rng(0).standard_normal(IMAGES).astype(np.float32), jax.jit(encode)
    ours, theirs = lambda: np.asarray(run(encoder, pixels)), lambda: np.asarray(backbone(pixels))
    lines.append(row("ViT-Base, 8 images", *in_turns(repeats, ours, theirs)))
    return lines


def measure_move(folder: Path, repeats: int) -> list[str]:
    """In fresh processes, where the frameworks have been imported and have computed something."""
    lines = ["| lm.to | time | most memory beyond what there was |", "|---|---|---|"]
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(max(1, repeats // 10)):
        done = subprocess.run([sys.executable, __file__, "--move", str(folder)], check=True, text=True, stdout=-1)
        for hop, seconds, size in json.loads(done.stdout.splitlines()[-1]):
            found.setdefault(hop, []).append((seconds, size))
    for hop, figures in found.items():
        times, sizes = zip(*figures, strict=True)
        lines.append(f"| {hop} | {shown(list(times))} | {max(sizes) / 1e6:.0f} MB |")
    return lines


def move(folder: Path) -> None:
    from modelhub import CausalLM
    from modelhub.core.backends import get_backend

    for name in set(STOPS):
        xp = get_backend(name, "cpu")
        xp.get(xp.matmul(xp.zeros((8, 8)), xp.zeros((8, 8))))
    lm = CausalLM.from_preset(str(folder), backend=STOPS[0], device="cpu", dtype="float32")
    wanted, found = lm.generate("The", max_new_tokens=4), []
    for old, new in zip(STOPS, STOPS[1:], strict=False):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start = resident("VmRSS"), time.perf_counter()
        lm.to(backend=new)
        found.append((f"{old} to {new}", time.perf_counter() - start, max(0, resident("VmHWM") - before)))
        assert lm.generate("The", max_new_tokens=4) == wanted
    print(json.dumps(found))


def resident(key: str) -> int:
    """Bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main() -> None:
    measures = {"torch": measure_torch, "jax": measure_jax, "move": measure_move}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Hugging Face folder, safetensors and tokenizer")
    parser.add_argument("--only", nargs="+", choices=measures, default=list(measures))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=measures, help=argparse.SUPPRESS)
    parser.add_argument("--move", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.move:
        return move(args.move)
    if args.folder is None:
        parser.error("--folder is needed")
    if args.part:  # one framework to a process: the threads of several would be in each other's way
        print("\n".join(measures[args.part](args.folder, args.repeats)))
        return None
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    os.sched_setaffinity(0, cores)
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
    quiet = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | dict.fromkeys(threads, str(len(cores))) | quiet
    print(
        f"{len(cores)} cores, load average at the start {os.getloadavg()[0]:.1f}, {args.repeats} repeats\n", flush=True
    )
    for part in args.only:
        command = [
            sys.executable,
            __file__,
            "--part",
            part,
            "--folder",
            str(args.folder),
            "--repeats",
            str(args.repeats),
        ]
        subprocess.run(command, env=environment, check=True)
        print(flush=True)
    return None


if __name__ == "__main__":
    main()
