"""docs/add-a-family.md is enough: a family written by it, registered as it runs, passes the tests of all text models."""

import numpy as np
import pytest
import qwen
import text_parity as parity
import transformers
from text_suite import SIZES, TextSuite
from tiny_families import SIZES as LLAMA_CPP_SIZES
from tiny_families import write_preset

import modelhub
from modelhub import CausalLM
from modelhub.conversion import convert
from modelhub.core import custom
from modelhub.core.backends import get_backend, installed
from modelhub.core.decoder import GLOBAL, LOCAL
from modelhub.core.tree import flatten
from modelhub.families import family_of
from modelhub.interop.conformance import Case

# Qwen/Qwen3-0.6B's config.json.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


@pytest.fixture(scope="module", autouse=True)
def registered():
    """For these tests only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(custom, "_registered", list(custom._registered))
        for kind in qwen.Config.KINDS:
            modelhub.register("family", kind)(qwen)
        yield


@pytest.fixture(params=[name for name in installed() if name in ("numpy", "torch")], scope="module")
def backend(request):
    """Not all: its layers are the core's, which the families of modelhub compare on every backend."""
    return get_backend(request.param, "cpu")


class TestQwen(TextSuite):
    cases = {
        "qwen3": Case("Qwen3ForCausalLM", SIZES | {"tie_word_embeddings": True}),
        "qwen3-windows-biased": Case("Qwen3ForCausalLM", SIZES | WINDOWS | {"attention_bias": True}),
        "qwen2": Case("Qwen2ForCausalLM", SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
        "qwen2-layer-types": Case(
            "Qwen2ForCausalLM",
            SIZES | {"use_sliding_window": True, "sliding_window": 8, "layer_types": [LOCAL, GLOBAL, LOCAL]},
        ),
    }
    features = {"window": ("qwen3-windows-biased", {"sliding_window": 64}), "act": ("qwen2", {"hidden_act": "gelu"})}
    published = {"qwen3-0.6b": QWEN3}
    refused_from = QWEN3
    refused = {
        "no window": ({"use_sliding_window": True, "layer_types": [LOCAL] * 28}, "need a sliding_window"),
        "a flag as text": ({"use_sliding_window": "yes"}, "use_sliding_window must be true or false"),
    }
    not_gguf = {
        "qwen3-windows-biased": "only global layers; no biases",
        "qwen2-layer-types": "only global layers",
    }


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_no_number_of_key_heads(kind):
    data = {"num_attention_heads": 8, "num_key_value_heads": None}
    theirs = transformers.AutoConfig.for_model(kind, **data)
    assert family_of(kind).Config.from_hf({"model_type": kind} | data).num_key_value_heads == 8
    assert theirs.num_key_value_heads == 8


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_defaults_are_those_of_transformers(kind):
    theirs = transformers.AutoConfig.for_model(kind)
    ours = family_of(kind).Config.from_hf({"model_type": kind})
    shared = [key for key in vars(ours) if hasattr(theirs, key)]
    assert len(shared) >= 12
    assert {key: getattr(ours, key) for key in shared} == {key: getattr(theirs, key) for key in shared}


def test_parameters_of_a_published_model():
    shapes = flatten(qwen.Model.abstract(qwen.Config.from_hf(QWEN3))).values()
    assert sum(np.prod(spec.shape) for spec in shapes) == 596_049_920


def test_it_trains_and_is_saved_for_transformers_and_as_gguf(tmp_path):
    folder = write_preset(tmp_path / "qwen3", LLAMA_CPP_SIZES | {"model_type": "qwen3"}, "gpt-2")
    lm = CausalLM.from_preset(folder, backend="torch")
    lm.preprocessor.sequence_length = 16
    lm.compile(learning_rate=1e-3)
    losses = lm.fit(["The river runs past the old mill."] * 4, steps=4, batch_size=2).history["loss"]
    assert losses[-1] < losses[0]
    lm.save_to_preset(tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32")
    assert type(theirs) is transformers.Qwen3ForCausalLM
    ids = [[5, 6, 7, 8]]
    parity.assert_close(lm.logits(ids), parity.reference_logits(theirs, ids))
    convert(tmp_path / "saved", tmp_path / "qwen3.gguf", "float32")
    again = CausalLM.from_preset(tmp_path / "qwen3.gguf", backend="numpy")
    assert again.config.model_type == "qwen3"
    parity.assert_close(again.logits(ids), lm.logits(ids))
