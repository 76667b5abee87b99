"""A training loop of PyTorch's own around a model of modelhub: DataLoader, autograd, torch.optim.

    python examples/torch_loop.py

jax_loop.py and tensorflow_loop.py are the same loop in JAX and TensorFlow; their losses are the same.
"""

import argparse
import itertools

import numpy as np
import torch
from torch.utils.data import DataLoader

from modelhub import CausalLM, to_torch
from modelhub.hub.resources import resource
from modelhub.training.records import read_records

parser = argparse.ArgumentParser()
parser.add_argument("--preset", default="gemma3_tiny")
parser.add_argument("--sequence-length", type=int, default=128)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--learning-rate", type=float, default=1e-3)
args = parser.parse_args()

lm = CausalLM.from_preset(args.preset, backend="torch")


def example(record):
    """One question and its answer, of which only the answer is learnt, padded to one length for all."""
    question = lm.tokenizer.encode(f"Question: {record.fields['instruction']}\nAnswer:")
    answer = lm.tokenizer.encode(f" {record.fields['response']}", add_special_tokens=False)
    ids = np.array([*question, *answer, lm.tokenizer.eos_token_id][: args.sequence_length])
    padding = (0, args.sequence_length - len(ids))
    labels = np.where(np.arange(len(ids)) < len(question), -100, ids)
    return {
        "input_ids": np.pad(ids, padding),
        "labels": np.pad(labels, padding, constant_values=-100),
        "attention_mask": np.pad(np.ones_like(ids), padding),
    }


rows = [example(record) for record in read_records(resource("finetune") / "dolly_style.jsonl")]

net = to_torch(lm).train()
optimizer = torch.optim.AdamW(net.parameters(), args.learning_rate, weight_decay=0.01)
curve = []
for batch in itertools.islice(DataLoader(rows, batch_size=4), args.steps):
    loss = net(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    curve.append(loss.item())

# The parameters were the task's own: it is trained.
print("mean loss of the first and of the last ten steps:", np.mean(curve[:10]), np.mean(curve[-10:]))
print(lm.generate("Question: How do I boil an egg?\nAnswer:", max_new_tokens=32))
