"""An optimizer of the framework's own: any optax transformation for a model on JAX. It brings its own learning rate.

    python examples/optax_optimizer.py

On torch, give the class: lm.compile(optimizer=torch.optim.NAdam, learning_rate=1e-3).
"""

import argparse

import optax

from modelhub import CausalLM
from modelhub.hub.resources import resource

parser = argparse.ArgumentParser()
parser.add_argument("--preset", default="smollm2_135m_instruct_q4")
parser.add_argument("--sequence-length", type=int, default=512)
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

lm = CausalLM.from_preset(args.preset, backend="jax")
lm.preprocessor.sequence_length = args.sequence_length
lm.enable_lora(rank=8)
schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, warmup_steps=2, decay_steps=args.steps)
lm.compile(optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.nadamw(schedule)))
history = lm.fit(resource("finetune") / "dolly_style.jsonl", steps=args.steps, batch_size=1)
print("loss of the first and of the last step:", history.steps[0]["loss"], history.steps[-1]["loss"])
