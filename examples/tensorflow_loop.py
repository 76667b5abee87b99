"""A training loop of TensorFlow's own around a model of modelhub: tf.data, GradientTape, an optimizer of Keras.

    python examples/tensorflow_loop.py

torch_loop.py and jax_loop.py are the same loop in PyTorch and JAX; their losses are the same.
"""

import argparse

import numpy as np
import tensorflow as tf

from modelhub import CausalLM, losses, to_tensorflow
from modelhub.hub.resources import resource
from modelhub.training.records import read_records

parser = argparse.ArgumentParser()
parser.add_argument("--preset", default="gemma3_tiny")
parser.add_argument("--sequence-length", type=int, default=128)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--learning-rate", type=float, default=1e-3)
args = parser.parse_args()

lm = CausalLM.from_preset(args.preset, backend="tensorflow")


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
data = tf.data.Dataset.from_tensor_slices({name: np.stack([row[name] for row in rows]) for name in rows[0]})
data = data.batch(4, drop_remainder=True).prefetch(tf.data.AUTOTUNE)

net = to_tensorflow(lm)
optimizer = tf.keras.optimizers.AdamW(args.learning_rate, weight_decay=0.01, epsilon=1e-8)
optimizer.build(net.trainable_variables)


@tf.function
def step(batch):
    with tf.GradientTape() as tape:
        logits = net(batch["input_ids"], batch["attention_mask"], training=True)
        loss = losses.causal_lm_loss(logits, batch["labels"])
    gradients = tape.gradient(loss, net.trainable_variables)
    optimizer.apply_gradients(zip(gradients, net.trainable_variables, strict=True))
    return loss


curve = [float(step(batch)) for batch in data.take(args.steps)]

# The variables were the task's own: it is trained.
print("mean loss of the first and of the last ten steps:", np.mean(curve[:10]), np.mean(curve[-10:]))
print(lm.generate("Question: How do I boil an egg?\nAnswer:", max_new_tokens=32))
