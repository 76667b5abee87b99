"""A torch DataLoader with worker processes that feeds a model on JAX.

    python examples/dataloader_to_jax.py

The workers are spawned: a forked process inherits locks of JAX's threads and may hang. They import this file, which is
why everything else is below the guard at its end.
"""

import argparse

import torch
from torch.utils.data import DataLoader, Dataset

from modelhub import CausalLM, Tokenizer
from modelhub.hub.resources import resource
from modelhub.training.records import read_records


class Questions(Dataset):
    def __init__(self, preset, length):
        self.preset, self.length = preset, length
        self.records = read_records(resource("finetune") / "dolly_style.jsonl")
        self.tokenizer = None

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        """One example, padded to one length for all, so that JAX compiles once."""
        if self.tokenizer is None:  # each worker loads its own
            self.tokenizer = Tokenizer.from_preset(self.preset)
        fields = self.records[index].fields
        question = self.tokenizer.encode(f"Question: {fields['instruction']}\nAnswer:")
        answer = self.tokenizer.encode(f" {fields['response']}", add_special_tokens=False)
        ids = torch.tensor([*question, *answer, self.tokenizer.eos_token_id][: self.length])
        padding = (0, self.length - len(ids))
        labels = torch.where(torch.arange(len(ids)) < len(question), -100, ids)  # only the answer is learnt
        return {
            "input_ids": torch.nn.functional.pad(ids, padding),
            "labels": torch.nn.functional.pad(labels, padding, value=-100),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), padding),
        }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="smollm2_135m_instruct_q4")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    lm = CausalLM.from_preset(args.preset, backend="jax")
    data = DataLoader(
        Questions(args.preset, args.sequence_length),
        batch_size=4,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        drop_last=True,
        num_workers=args.workers,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )
    lm.enable_lora(rank=8)
    lm.compile(learning_rate=args.learning_rate)
    history = lm.fit(data, steps=args.steps)
    print("loss of the first and of the last step:", history.steps[0]["loss"], history.steps[-1]["loss"])


if __name__ == "__main__":
    main()
