"""Make the embedded preset: python presets/gemma3_tiny/train.py CORPUS OUTPUT [--epochs N] [--backend NAME].

CORPUS is what tokenizers/tiny/build.py makes. Its last documents, modelhub's own instruction rows, are left out: they
are for fine-tuning. A Gemma 3 of two million parameters learns the rest from random weights, by modelhub's own fit.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from modelhub import CausalLM, optim

ROOT = Path(__file__).resolve().parents[2]
ROWS = 250  # the instruction rows at the end of the corpus
TIME, BATCH = 256, 8
CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 2048,
    "hidden_size": 160,
    "intermediate_size": 480,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 40,
    "query_pre_attn_scalar": 40,
    "sliding_window": 128,
    "max_position_embeddings": 1024,
    "rope_theta": 10_000.0,
    "rope_local_base_freq": 10_000.0,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


class Windows:
    """Stretches of TIME tokens out of one long text, from another offset in every epoch, as ready batches."""

    def __init__(self, ids: np.ndarray, seed: int = 0):
        self.ids, self.draw = ids, np.random.default_rng(seed)

    def __iter__(self):
        first = int(self.draw.integers(TIME))
        rows = (len(self.ids) - first) // TIME
        windows = self.ids[first : first + rows * TIME].reshape(rows, TIME)[self.draw.permutation(rows)]
        for batch in np.array_split(windows, range(BATCH, rows, BATCH)):
            if len(batch) == BATCH:
                yield {"input_ids": batch, "labels": batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--backend", default="jax")
    args = parser.parse_args()
    start = args.output.with_name(args.output.name + "-start")
    start.mkdir(parents=True, exist_ok=True)
    (start / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tokenizers" / "tiny" / name, start)
    lm = CausalLM.from_preset(str(start), backend=args.backend, load_weights=False)
    documents = args.corpus.read_text(encoding="utf-8").split("\n\n")[:-ROWS]
    eos = lm.tokenizer.eos_token_id
    ids = np.array([i for ids in lm.tokenizer.encode_batch(documents) for i in [*ids, eos]], np.int32)
    held = ids[-len(ids) // 50 :]
    steps = (len(ids) - len(held)) // (TIME * BATCH)
    print(f"{len(documents)} documents, {len(ids):,} tokens, {steps} steps an epoch")
    schedule = optim.Cosine(warmup_steps=100, final_ratio=0.02)
    lm.compile(optim.Muon(3e-3), schedule=schedule, clip_norm=1.0)
    lm.fit(
        Windows(ids[: -len(held)]), steps=args.epochs * steps, batch_size=BATCH,
        validation_data=list(Windows(held)), resume=False,
        checkpoint_dir=args.output.with_name(args.output.name + "-run"),
    )  # fmt: skip
    lm.generation_config = {"bos_token_id": 2, "eos_token_id": [1, 5], "pad_token_id": 0}
    lm.save_to_preset(args.output, dtype="bfloat16")
    print(lm.generate("The little girl", max_new_tokens=100, temperature=0.7))


if __name__ == "__main__":
    main()
