"""A training loop of JAX's own around a model of modelhub: jit, value_and_grad, optax.

    python examples/jax_loop.py

torch_loop.py and tensorflow_loop.py are the same loop in PyTorch and TensorFlow; their losses are the same.
"""

import argparse

import jax
import numpy as np
import optax

from modelhub import CausalLM, losses, to_jax
from modelhub.hub.resources import resource
from modelhub.training.records import read_records

parser = argparse.ArgumentParser()
parser.add_argument("--preset", default="gemma3_tiny")
parser.add_argument("--sequence-length", type=int, default=128)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--learning-rate", type=float, default=1e-3)
args = parser.parse_args()

lm = CausalLM.from_preset(args.preset, backend="jax")


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

params, fn = to_jax(lm)
optimizer = optax.adamw(args.learning_rate, weight_decay=0.01)
state = optimizer.init(params)


def loss_of(params, batch):
    return losses.causal_lm_loss(fn(params, batch["input_ids"], batch["attention_mask"]), batch["labels"])


@jax.jit
def step(params, state, batch):
    loss, gradients = jax.value_and_grad(loss_of)(params, batch)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


curve = []
for first in range(0, len(rows) - 3, 4)[: args.steps]:
    batch = {name: np.stack([row[name] for row in rows[first : first + 4]]) for name in rows[0]}
    params, state, loss = step(params, state, batch)
    curve.append(float(loss))

lm.load_params(params)  # arrays of JAX do not change: the task gets the new ones
print("mean loss of the first and of the last ten steps:", np.mean(curve[:10]), np.mean(curve[-10:]))
print(lm.generate("Question: How do I boil an egg?\nAnswer:", max_new_tokens=32))
