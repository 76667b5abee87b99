"""CausalLM from a folder: text in, text out, the same on every backend; and what users do wrong."""

import json
import shutil

import numpy as np
import pytest

from modelhub import Backbone, CausalLM, Tokenizer, set_backend
from modelhub.core.backends import installed
from modelhub.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    InputError,
    MixedBackends,
    PresetNotFound,
    TokenizerError,
    UnknownBackend,
)

PROMPT = "In the morning"


@pytest.fixture(scope="module", params=installed())
def lm(request, tiny_preset):
    return CausalLM.from_preset(str(tiny_preset), backend=request.param, device="cpu")


@pytest.fixture(scope="module")
def reference(tiny_preset):
    return CausalLM.from_preset(str(tiny_preset), backend="numpy")


def test_the_same_text_on_every_backend(lm, reference):
    greedy = {"max_new_tokens": 24}
    sampled = {"max_new_tokens": 24, "temperature": 1.2, "top_k": 50, "top_p": 0.95, "min_p": 0.001, "seed": 3}
    for options in (greedy, sampled):
        assert lm.generate(PROMPT, **options) == reference.generate(PROMPT, **options)
    assert lm.generate(PROMPT, **greedy) != lm.generate(PROMPT, **sampled)
    assert lm.generate(PROMPT, **sampled) != lm.generate(PROMPT, **(sampled | {"seed": 4}))


def test_a_batch_gives_what_each_prompt_gives_alone(lm):
    prompts = ["The", "She wrote the letter twice, then burned both", "If it rains"]
    for options in ({}, {"temperature": 1.0, "seed": 5}):
        texts = lm.generate(prompts, max_new_tokens=12, **options)
        assert texts[0] == lm.generate(prompts[0], max_new_tokens=12, **options)
        assert len(texts) == 3
    assert lm.generate(prompts, max_new_tokens=12) == [lm.generate(p, max_new_tokens=12) for p in prompts]


def test_streaming_gives_the_same_text_in_pieces(lm):
    pieces = list(lm.generate(PROMPT, max_new_tokens=20, temperature=1.5, stream=True))
    assert len(pieces) > 3
    whole = lm.generate(PROMPT, max_new_tokens=20, temperature=1.5)
    assert "".join(pieces) == whole
    assert lm.generate(PROMPT, max_new_tokens=20, temperature=1.5, echo=True) == PROMPT + whole


def test_a_stop_string_ends_the_text_before_it(reference):
    whole = reference.generate(PROMPT, max_new_tokens=24)
    stop = whole[5:9]
    expected = whole[: whole.index(stop)]
    assert reference.generate(PROMPT, max_new_tokens=24, stop=stop) == expected
    assert "".join(reference.generate(PROMPT, max_new_tokens=24, stop=[stop], stream=True)) == expected


def test_generation_ends_at_any_of_the_end_tokens(tiny_preset, tmp_path, reference):
    prompt = reference.tokenizer.encode(PROMPT)
    first = int(reference.logits([prompt])[0, -1].argmax())
    second = int(reference.logits([[*prompt, first]])[0, -1].argmax())
    folder = shutil.copytree(tiny_preset, tmp_path / "stops")
    for ends, expected in (([1, first], 0), (first, 0), ([1, second], 1 if second != first else 0)):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        stopping = CausalLM.from_preset(str(folder), backend="numpy")
        text = stopping.generate(PROMPT, max_new_tokens=24)
        assert stopping.last_run.new_tokens == expected
        assert text == reference.tokenizer.decode([first][:expected])


def test_the_run_is_counted(lm):
    lm.generate(PROMPT, max_new_tokens=7)
    assert lm.last_run.prompt_tokens == len(lm.tokenizer.encode(PROMPT))
    assert lm.last_run.new_tokens == 7
    assert 0 < lm.last_run.seconds_to_first_token <= lm.last_run.seconds


def test_generation_stops_where_the_context_is_full(reference):
    long = "the bridge and the river " * 30
    ids = reference.tokenizer.encode(long)[:120]
    prompt = reference.tokenizer.decode(ids)
    reference.generate(prompt, max_new_tokens=500)
    assert reference.last_run.prompt_tokens + reference.last_run.new_tokens <= 128


def test_logits_have_batch_time_vocabulary(lm, reference):
    ids = [[2, 10, 20, 30], [2, 11, 21, 31]]
    logits = lm.logits(ids)
    assert logits.shape == (2, 4, 400) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, reference.logits(np.array(ids)), atol=1e-4 * np.abs(logits).max())


def test_random_weights_are_equal_on_every_backend(lm, tiny_preset):
    one = CausalLM.from_preset(str(tiny_preset), backend=lm.backend, device="cpu", load_weights=False, seed=11)
    other = CausalLM.from_preset(str(tiny_preset), backend="numpy", load_weights=False, seed=11)
    xp = one.backbone.xp
    assert one.params.keys() == other.params.keys()
    for name, array in one.params.items():
        np.testing.assert_array_equal(xp.get(array), other.params[name])
    again = CausalLM.from_preset(str(tiny_preset), backend="numpy", load_weights=False, seed=12)
    name = "model.embed_tokens.weight"
    assert np.abs(other.params[name] - again.params[name]).max() > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(lm, reference, tiny_preset, dtype):
    half = CausalLM.from_preset(str(tiny_preset), backend=lm.backend, device="cpu", dtype=dtype)
    assert {half.backbone.xp.dtype(array) for array in half.params.values()} == {dtype}
    ids = [[2, 10, 20, 30, 40]]
    exact = reference.logits(ids)
    assert np.abs(half.logits(ids) - exact).max() < 0.1 * np.abs(exact).max()
    assert isinstance(half.generate(PROMPT, max_new_tokens=3), str)


def test_backbone_and_tokenizer_alone(lm, tiny_preset):
    backbone = Backbone.from_preset(str(tiny_preset), backend=lm.backend, device="cpu")
    hidden = backbone([[2, 10, 20]])
    assert backbone.xp.owns(hidden) and tuple(hidden.shape) == (1, 3, 32)
    tokenizer = Tokenizer.from_preset(str(tiny_preset))
    assert tokenizer.decode(tokenizer.encode(PROMPT)) == PROMPT


def test_summary_counts_parameters(lm, capsys):
    lm.summary()
    printed = capsys.readouterr().out
    assert f"{lm.backbone.num_parameters:,}" in printed and "self_attn" in printed


def test_set_backend_decides_for_models_loaded_later(tiny_preset):
    set_backend("numpy")
    try:
        assert CausalLM.from_preset(str(tiny_preset)).backend == "numpy"
    finally:
        set_backend(None)


# --- what users do wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompt": ""}, "prompt 0 is empty"),
        ({"prompt": ["a", ""]}, "prompt 1 is empty"),
        ({"prompt": []}, "list of prompts is empty"),
        ({"prompt": [3]}, "prompt 0 is a int"),
        ({"prompt": "the bridge and the river " * 60}, "context holds 128"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"prompt": "a", "temperature": -1.0}, "temperature"),
        ({"prompt": "a", "top_p": 1.5}, "top_p must be between 0 and 1"),
        ({"prompt": "a", "top_k": -2}, "top_k"),
        ({"prompt": "a", "stop": ""}, "stop string is empty"),
        ({"prompt": ["a", "b"], "stream": True}, "stream=True takes one prompt"),
    ],
)
def test_bad_arguments_of_generate(reference, arguments, says):
    with pytest.raises(InputError, match=says):
        reference.generate(**arguments)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([[2, 400]], "token id 400 is outside the vocabulary: 0 to 399"),
        ([[-1, 3]], "token id -1"),
        ([2, 3], r"shape \(batch, time\)"),
        ([[]], "neither of them 0"),
        ([[0.5, 1.5]], "integers"),
        (np.zeros((1, 129), np.int32), "context holds 128"),
    ],
)
def test_bad_token_ids(lm, ids, says):
    with pytest.raises(InputError, match=says):
        lm.logits(ids)


@pytest.mark.slow
def test_weights_of_two_frameworks_are_refused(tiny_preset):
    if not {"torch", "jax"} <= set(installed()):
        pytest.skip("needs torch and jax")
    on_torch = CausalLM.from_preset(str(tiny_preset), backend="torch", device="cpu")
    on_jax = CausalLM.from_preset(str(tiny_preset), backend="jax", device="cpu")
    name = "model.norm.weight"
    with pytest.raises(MixedBackends, match="jax.*torch|torch.*jax"):
        on_torch.params = on_torch.params | {name: on_jax.params[name]}
    with pytest.raises(MixedBackends, match="the model is on torch"):
        on_torch.params = on_jax.params
    assert on_torch.generate(PROMPT, max_new_tokens=4) == on_jax.generate(PROMPT, max_new_tokens=4)


def test_bad_names_of_things(tiny_preset):
    with pytest.raises(PresetNotFound, match="gemma_2b_en"):
        CausalLM.from_preset("gemma_2b_em", backend="numpy")
    with pytest.raises(UnknownBackend, match="choose one of jax, torch, tensorflow, numpy"):
        CausalLM.from_preset(str(tiny_preset), backend="mxnet")
    assert CausalLM.from_preset(str(tiny_preset), backend="PyTorch").backend == "torch"
    with pytest.raises(DeviceError, match="numpy sees only: cpu"):
        CausalLM.from_preset(str(tiny_preset), backend="numpy", device="gpu")
    with pytest.raises(InputError, match="dtype must be one of"):
        CausalLM.from_preset(str(tiny_preset), backend="numpy", dtype="float8")


def test_config_and_weights_that_disagree_are_told_in_one_error(tiny_preset, tmp_path):
    folder = shutil.copytree(tiny_preset, tmp_path / "wrong")
    config = json.loads((folder / "config.json").read_text())
    config |= {"intermediate_size": 96, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        CausalLM.from_preset(str(folder), backend="numpy")
    text = str(caught.value)
    assert "missing: model.layers.2.self_attn.q_proj.weight" in text
    assert (
        "wrong shape: model.layers.0.mlp.up_proj.weight should be (96, 32) by the config, the file has (64, 32)" in text
    )


def test_damaged_folders(tiny_preset, tmp_path):
    no_config = shutil.copytree(tiny_preset, tmp_path / "no_config")
    (no_config / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        CausalLM.from_preset(str(no_config), backend="numpy")
    bad_json = shutil.copytree(tiny_preset, tmp_path / "bad_json")
    (bad_json / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        CausalLM.from_preset(str(bad_json), backend="numpy")
    other = shutil.copytree(tiny_preset, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ConfigError, match="'mamba' is not supported"):
        CausalLM.from_preset(str(other), backend="numpy")
    short = shutil.copytree(tiny_preset, tmp_path / "short")
    weights = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        CausalLM.from_preset(str(short), backend="numpy")
    pickled = shutil.copytree(tiny_preset, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        CausalLM.from_preset(str(pickled), backend="numpy")
    silent = shutil.copytree(tiny_preset, tmp_path / "silent")
    for file in silent.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(TokenizerError, match="tokenizer"):
        CausalLM.from_preset(str(silent), backend="numpy")


def test_an_attention_function_of_the_users_own(tiny_preset):
    import torch

    calls = []

    def own(q, k, v, mask, scale):
        calls.append(q.shape)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)

    ids = [[2, 5, 9, 17, 33, 6]]
    plain = CausalLM.from_preset(tiny_preset, backend="torch", device="cpu")
    mine = CausalLM.from_preset(tiny_preset, backend="torch", device="cpu", attention=own)
    np.testing.assert_allclose(mine.logits(ids), plain.logits(ids), atol=1e-4)
    assert len(calls) >= plain.config.num_hidden_layers
    assert mine.generate("the cat", max_new_tokens=6) == plain.generate("the cat", max_new_tokens=6)
