"""Language models with adapters against transformers and PEFT: what their tests have in common."""

import numpy as np
import torch
import transformers

IDS = np.random.default_rng(0).integers(4, 400, (2, 20))


def base_model(preset):
    return transformers.AutoModelForCausalLM.from_pretrained(preset, dtype=torch.float32)


def peft_logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(IDS)).logits.numpy()


def assert_close(found, wanted):
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
