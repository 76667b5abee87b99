"""Train on JAX, stop, go on on torch: a run's checkpoints hold the weights and the optimizer's state of no framework.

python examples/resume_on_another_backend.py
"""

import argparse

from modelhub import CausalLM
from modelhub.hub.resources import resource

parser = argparse.ArgumentParser()
parser.add_argument("--preset", default="smollm2_135m_instruct_q4")
parser.add_argument("--sequence-length", type=int, default=512)
parser.add_argument("--run", default="resumed_run", help="folder of the checkpoints")
args = parser.parse_args()


def train(backend, epochs):
    lm = CausalLM.from_preset(args.preset, backend=backend)
    lm.preprocessor.sequence_length = args.sequence_length
    lm.enable_lora(rank=8)
    lm.compile("adamw", learning_rate=1e-3)
    data = resource("finetune") / "dolly_style.jsonl"
    return lm.fit(data, epochs=epochs, batch_size=4, checkpoint_dir=args.run)


train("jax", epochs=1)
history = train("torch", epochs=2)  # of these the first is done
print(*(f"epoch {number + 1}: loss {loss:.4f}" for number, loss in enumerate(history.history["loss"])), sep="\n")
