"""A fine-tune made, published and used by commands alone, each in a process of its own, as people do it: to a shared
folder and to stand-ins for the hubs, read by another backend, by transformers and by PEFT."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins import hf_hub, kaggle

TESTS = Path(__file__).parent
ROWS = TESTS.parent / "finetune" / "dolly_style.jsonl"
PROMPT = "The little girl"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("share")


@pytest.fixture(scope="module")
def hubs():
    both = hf_hub.serve(), kaggle.serve()
    yield both
    for hub in both:
        hub.close()


@pytest.fixture(scope="module")
def run(place, hubs):
    """Runs Python, or a modelhub command, where the hubs are the stand-ins; what it prints."""
    hf, kg = hubs
    environment = os.environ | {
        "HF_ENDPOINT": hf.url, "HF_HOME": str(place / "hf"), "HF_TOKEN": "hf_tester", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "MODELHUB_CACHE": str(place / "cache"), "PYTHONPATH": str(TESTS / "support"),
        "KAGGLE_API_TOKEN": "KGAT_tester", "KAGGLEHUB_CACHE": str(place / "kaggle"),
    }  # fmt: skip

    def run(*command, program=None):
        program = program or (
            f"from stand_ins.kaggle import redirect; redirect({kg.url!r}); from modelhub.cli import main; main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, command)],
            env=environment,
            cwd=place,
            text=True,
            stdout=-1,
            stderr=-1,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture(scope="module")
def tuned(run, place):
    """The folder of an adapter, and what the tuned model says."""
    options = ["--rank", 8, "--steps", 3, "--batch-size", 2, "--learning-rate", 1e-2, "--targets", "all-linear"]
    run("finetune", "--preset", "gemma3_tiny", "--data", ROWS, *options, "--backend", "jax", "--output", "tuned")
    said = run("generate", "gemma3_tiny", PROMPT, "--adapter", "tuned", "--backend", "jax", "--max-new-tokens", 12)
    assert said and said != run("generate", "gemma3_tiny", PROMPT, "--backend", "jax", "--max-new-tokens", 12)
    return place / "tuned", said


TRANSFORMERS = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
base, *adapters = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
if adapters:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapters[0])
tokenizer = AutoTokenizer.from_pretrained(base)
inputs = tokenizer({PROMPT!r}, return_tensors="pt")
made = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(made, skip_special_tokens=True).strip())
"""


def test_a_shared_folder(run, place, tuned):
    adapter, said = tuned
    address = (place / "hub" / "me" / "tuned").as_uri()
    assert run("publish", adapter, address, "--preset", "gemma3_tiny") == address
    assert run("generate", address, PROMPT, "--backend", "numpy", "--max-new-tokens", 12) == said
    assert run("generate", address, PROMPT, "--backend", "torch", "--max-new-tokens", 12, "--offline") == said


def test_the_hugging_face_hub(run, hubs, tuned):
    adapter, said = tuned
    address = run("publish", adapter, "hf://tester/tuned", "--preset", "gemma3_tiny")
    assert address.startswith("hf://tester/tuned@") and hubs[0].repos["tester/tuned"].private
    assert run("generate", address, PROMPT, "--backend", "torch", "--max-new-tokens", 12) == said
    assert run("tester/tuned", program=TRANSFORMERS) == said


def test_an_adapter_on_the_hugging_face_hub(run, tuned):
    adapter, said = tuned
    run("publish", "gemma3_tiny", "hf://tester/base")
    run(
        "publish", adapter, "hf://tester/adapter", "--preset", "gemma3_tiny", "--adapter-only", "--base-model",
        "tester/base",
    )  # fmt: skip
    assert run("tester/base", "tester/adapter", program=TRANSFORMERS) == said
    again = run(
        "generate", "hf://tester/base", PROMPT, "--adapter", "hf://tester/adapter", "--backend", "numpy",
        "--max-new-tokens", 12,
    )  # fmt: skip
    assert again == said


def test_kaggle(run, tuned):
    adapter, said = tuned
    address = run("publish", adapter, "kaggle://tester/tuned/transformers/tiny", "--preset", "gemma3_tiny")
    assert address == "kaggle://tester/tuned/transformers/tiny/1"
    assert run("generate", address, PROMPT, "--backend", "tensorflow", "--max-new-tokens", 12) == said
    run("publish", adapter, "kaggle://tester/tuned/transformers/tiny", "--preset", "gemma3_tiny")
    assert run("generate", address, PROMPT, "--backend", "numpy", "--max-new-tokens", 12, "--offline") == said
