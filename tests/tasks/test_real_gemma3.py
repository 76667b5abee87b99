"""The real Gemma 3 270M on all backends in one process."""

import pytest

from modelhub import CausalLM
from modelhub.core.backends import installed

EXPECTED = (
    " the capital of the country of France. It is the largest city in France and the second largest city in Europe. "
    "It is located in the middle of the country and is the capital of the region of"
)


@pytest.mark.real
@pytest.mark.slow
def test_the_same_known_text_on_every_backend_in_one_process(gemma3_gguf):
    models = {}
    for name in installed():
        models[name] = CausalLM.from_preset(str(gemma3_gguf), backend=name, device="cpu")
        text = models[name].generate("The capital of France is", max_new_tokens=40)
        assert text == EXPECTED, name
    # All of them are still alive: none has taken the others' memory or settings.
    again = {name: lm.generate("The capital of France is", max_new_tokens=8) for name, lm in models.items()}
    assert set(again.values()) == {" the capital of the country of France."}
