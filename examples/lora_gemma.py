"""LoRA on Gemma with Dolly's questions and answers, as the Keras guide to fine-tuning Gemma does it.

python examples/lora_gemma.py                              # Gemma 2B on an accelerator; needs its licence accepted
python examples/lora_gemma.py --preset gemma3_270m_q4      # on a laptop, without an account
python examples/lora_gemma.py --data databricks-dolly-15k.jsonl
"""

import argparse
import json

from modelhub import CausalLM, optim
from modelhub.hub.resources import resource

parser = argparse.ArgumentParser()
parser.add_argument("--preset", default="gemma_2b_en")
parser.add_argument("--backend")
parser.add_argument("--data", default=resource("finetune") / "dolly_style.jsonl")
parser.add_argument("--sequence-length", type=int, default=512)
parser.add_argument("--max-new-tokens", type=int, default=128)
args = parser.parse_args()

TEMPLATE = "Instruction:\n{instruction}\n\nResponse:\n{response}"

with open(args.data, encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
data = [TEMPLATE.format(**row) for row in rows if not row["context"]][:1000]

lm = CausalLM.from_preset(args.preset, backend=args.backend)
prompt = TEMPLATE.format(instruction="What should I do on a trip to Europe?", response="")
before = lm.generate(prompt, args.max_new_tokens)
print(f"Before:\n{prompt}{before}\n")

lm.backbone.enable_lora(rank=4)
lm.summary()
lm.preprocessor.sequence_length = args.sequence_length
lm.compile(optimizer=optim.SGD(5e-5), metrics=["accuracy"], mixed_precision="mixed_bfloat16")
history = lm.fit(data, epochs=1, batch_size=1)

after = lm.generate(prompt, args.max_new_tokens)
print(f"After:\n{prompt}{after}\n")
