"""`import modelhub` is cheap: people import it in every script, and pay for a framework only when they use one."""

import subprocess
import sys

HEAVY = ("jax", "torch", "tensorflow", "numpy", "tokenizers", "sentencepiece", "transformers", "huggingface_hub")
SCRIPT = f"""
import sys, time
start = time.perf_counter()
import modelhub
print(time.perf_counter() - start, *(name for name in {HEAVY} if name in sys.modules))
"""


def run(script: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()


def test_import_is_fast_and_loads_nothing_heavy():
    answers = [run(SCRIPT) for _ in range(3)]
    assert [loaded for _, *loaded in answers] == [[], [], []]
    assert min(float(seconds) for seconds, *_ in answers) < 0.5


def test_public_names_load_no_framework():
    script = """
import sys, modelhub
for name in modelhub.__all__:
    getattr(modelhub, name)
modelhub.list_presets()
print(*{"jax", "torch", "tensorflow", "transformers", "huggingface_hub"} & sys.modules.keys())
"""
    assert run(script) == []


def test_an_unknown_name_is_an_attribute_error():
    script = "import modelhub\ntry: modelhub.nothing\nexcept AttributeError as error: print(error)"
    assert "nothing" in run(script)[-1]
