"""A tf.data pipeline over TFRecord files that feeds a model on torch.

    python examples/tfrecord_to_torch.py

`fit` takes any iterable of batches: dicts with input_ids and labels (Hugging Face's convention: not shifted, -100 where
nothing is to be learnt), in arrays of any framework.
"""

import argparse
import tempfile

import tensorflow as tf

from modelhub import CausalLM
from modelhub.hub.resources import resource
from modelhub.training.records import read_records

parser = argparse.ArgumentParser()
parser.add_argument("--preset", default="smollm2_135m_instruct_q4")
parser.add_argument("--sequence-length", type=int, default=256)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--learning-rate", type=float, default=1e-3)
args = parser.parse_args()

tf.config.set_visible_devices([], "GPU")  # TensorFlow only reads here; the accelerator is torch's

lm = CausalLM.from_preset(args.preset, backend="torch")

# One record an example: its token ids, and how many of them are the question.
path = tempfile.mkdtemp() + "/rows.tfrecord"
with tf.io.TFRecordWriter(path) as writer:
    for record in read_records(resource("finetune") / "dolly_style.jsonl"):
        question = lm.tokenizer.encode(f"Question: {record.fields['instruction']}\nAnswer:")
        answer = lm.tokenizer.encode(f" {record.fields['response']}", add_special_tokens=False)
        numbers = {"ids": question + answer + [lm.tokenizer.eos_token_id], "prompt": [len(question)]}
        features = {k: tf.train.Feature(int64_list=tf.train.Int64List(value=v)) for k, v in numbers.items()}
        writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())

SCHEMA = {"ids": tf.io.RaggedFeature(tf.int64), "prompt": tf.io.FixedLenFeature([], tf.int64)}


def read(serialized):
    row = tf.io.parse_single_example(serialized, SCHEMA)
    ids = row["ids"][: args.sequence_length]
    labels = tf.where(tf.range(tf.size(ids, tf.int64)) < row["prompt"], tf.constant(-100, tf.int64), ids)
    return {"input_ids": ids, "labels": labels, "attention_mask": tf.ones_like(ids)}


fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
data = (
    tf.data.TFRecordDataset(path)
    .map(read, num_parallel_calls=tf.data.AUTOTUNE)
    .shuffle(1000, seed=0)
    # One length for all batches: compiled backends compile once.
    .padded_batch(
        4,
        padded_shapes=dict.fromkeys(fill, [args.sequence_length]),
        padding_values={name: tf.constant(value, tf.int64) for name, value in fill.items()},
        drop_remainder=True,
    )
    .prefetch(tf.data.AUTOTUNE)
)

lm.enable_lora(rank=8)
lm.compile(learning_rate=args.learning_rate)
history = lm.fit(data, steps=args.steps)
print("loss of the first and of the last step:", history.steps[0]["loss"], history.steps[-1]["loss"])
