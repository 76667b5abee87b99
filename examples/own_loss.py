"""A loss of your own: cross entropy with label smoothing, in the framework's functions.

    python examples/own_loss.py --backend jax

A loss gets the logits (N, V), float32, and the labels (N,) of some positions, arrays of the model's backend, and
returns N losses. modelhub calls it for a few hundred positions at a time, so that no logits of a whole batch exist.
"""

import argparse

from modelhub import CausalLM
from modelhub.hub.resources import resource

parser = argparse.ArgumentParser()
parser.add_argument("--preset", default="smollm2_135m_instruct_q4")
parser.add_argument("--backend", choices=["jax", "torch"], default="torch")
parser.add_argument("--sequence-length", type=int, default=512)
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

SMOOTHING = 0.1

if args.backend == "torch":
    from torch.nn.functional import cross_entropy

    def smoothed(logits, labels):
        return cross_entropy(logits, labels, label_smoothing=SMOOTHING, reduction="none")

else:
    import jax

    def smoothed(logits, labels):
        target = jax.nn.one_hot(labels, logits.shape[-1]) * (1 - SMOOTHING) + SMOOTHING / logits.shape[-1]
        return -(target * jax.nn.log_softmax(logits)).sum(axis=-1)


lm = CausalLM.from_preset(args.preset, backend=args.backend)
lm.preprocessor.sequence_length = args.sequence_length
lm.enable_lora(rank=8)
lm.compile(learning_rate=1e-3, loss=smoothed)
history = lm.fit(resource("finetune") / "dolly_style.jsonl", steps=args.steps, batch_size=1)
print("smoothed loss of the first and of the last step:", history.steps[0]["loss"], history.steps[-1]["loss"])
