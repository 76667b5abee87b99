"""What users see of training beside the numbers: evaluation, saving for transformers, what cannot be, what they mistype."""

import functools
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny_preset import CONFIG, LINES, write_preset

from modelhub import CausalLM, optim
from modelhub.core.backends import installed
from modelhub.core.tree import flatten, initial_value
from modelhub.errors import CheckpointError, ConfigError, DataError, InputError, ModelhubError, NoGradients, ResumeError
from modelhub.families import llama

TEXTS = sorted(set(LINES))
DATA = [{"instruction": text[:20], "response": text[20:50]} for text in TEXTS]
OTHERS = [name for name in installed() if name not in ("numpy", "torch")]
QUIET = {"verbose": False, "batch_size": 2}
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip


def load(preset, name="torch"):
    lm = CausalLM.from_preset(str(preset), backend=name, device="cpu")
    lm.preprocessor.sequence_length = 48
    return lm


@pytest.fixture
def lm(tiny_preset):
    return load(tiny_preset)


def trained(lm, rank=2, **settings):
    if rank:
        lm.enable_lora(rank, targets="all-linear")
    lm.compile(learning_rate=0.02, **settings)
    lm.fit(DATA, steps=3, **QUIET)
    return lm


# --- evaluation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", installed())
def test_evaluate_equals_score(tiny_preset, name):
    """Perplexity over all tokens of plain strings, the end token included; packed or not, whatever the batch."""
    lm = load(tiny_preset, name)
    scores = load(tiny_preset).score([f"{text}<eos>" for text in TEXTS])
    tokens = sum(len(score.logprobs) for score in scores)
    mean = -sum(score.total for score in scores) / tokens
    for options in ({}, {"packing": False, "batch_size": 3}) if name == "torch" else ({},):
        found = lm.evaluate(TEXTS, **options)
        assert found["tokens"] == tokens and 0 <= found["accuracy"] <= 1
        assert found["loss"] == pytest.approx(mean, rel=1e-5)
        assert found["perplexity"] == pytest.approx(np.exp(mean), rel=1e-4)


def test_only_responses_count(lm):
    response = lm.evaluate(DATA)
    everything = lm.evaluate(DATA, loss_on="all")
    assert response["tokens"] < everything["tokens"]
    ends = sum(len(lm.tokenizer.encode(row["response"], False)) + 1 for row in DATA)
    assert response["tokens"] == pytest.approx(ends, abs=len(DATA))  # tokens may differ at the border


def test_numpy_evaluates_and_does_not_train(tiny_preset):
    lm = load(tiny_preset, "numpy")
    assert lm.evaluate(DATA) == pytest.approx(load(tiny_preset).evaluate(DATA), rel=1e-4)
    lm.enable_lora(2)
    for call in (lambda: lm.fit(DATA, **QUIET), lambda: lm.fit([], epochs=0)):
        with pytest.raises(NoGradients, match='backend="jax", "torch" or "tensorflow"'):
            call()


def test_an_adapter_is_part_of_the_evaluation(lm):
    before = lm.evaluate(DATA)
    lm.enable_lora(4, targets="all-linear")
    assert lm.evaluate(DATA)["loss"] == before["loss"]
    lm.compile(learning_rate=0.02)
    lm.fit(DATA, epochs=5, **QUIET)
    after = lm.evaluate(DATA)
    assert after["loss"] < before["loss"] - 0.5 and after["accuracy"] > before["accuracy"]
    lm.merge_lora()
    assert lm.evaluate(DATA) == pytest.approx(after, rel=1e-4)
    lm.set_adapter(None)
    assert lm.evaluate(DATA) == before


# --- generation and training in turn --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_generation_follows_the_weights(tiny_preset, name):
    """What was compiled or cached for the weights of before is not used again."""
    lm = load(tiny_preset, name)
    before = lm.generate("In the morning", max_new_tokens=8)
    ids = [lm.tokenizer.encode("In the morning")]
    logits = lm.logits(ids)
    trained(lm)
    after = lm.logits(ids)
    assert np.abs(after - logits).max() > 1e-3
    text = lm.generate("In the morning", max_new_tokens=8)
    lm.merge_lora()
    np.testing.assert_allclose(lm.logits(ids), after, atol=1e-4)
    if name == "torch":  # others would compile it once more
        assert lm.generate("In the morning", max_new_tokens=8) == text
    lm.set_adapter(None)
    np.testing.assert_array_equal(lm.logits(ids), logits)
    assert lm.generate("In the morning", max_new_tokens=8) == before


def test_only_the_adapter_is_trained(lm):
    before = {name: np.array(lm.backbone.xp.get(x)) for name, x in lm.params.items()}
    trained(lm)
    for name, x in before.items():
        np.testing.assert_array_equal(lm.backbone.xp.get(lm.params[name]), x)
    with pytest.raises(InputError, match="no adapter is merged"):
        lm.unmerge_lora()
    lm.set_adapter(None)
    trained(lm, rank=None)
    moved = [name for name, x in before.items() if (lm.backbone.xp.get(lm.params[name]) != x).any()]
    assert moved == list(before)


def test_a_merged_adapter_stays_as_it_is(lm):
    """With the adapter merged, all weights are what is trained."""
    trained(lm)
    lm.merge_lora()
    trained(lm, rank=None)
    assert not lm.has_adapter


# --- saving ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma2", "llama"])
@pytest.mark.parametrize("adapter", [False, True])
def test_transformers_loads_what_was_trained(tmp_path, kind, adapter):
    import transformers

    before = write_preset(tmp_path / "before", CONFIG | {"model_type": "gemma2" if kind == "gemma2" else "gemma3_text"})
    if kind == "llama":  # with a head of its own
        sizes = {key: CONFIG[key] for key in SIZES if key in CONFIG}
        config = {"model_type": kind, "tie_word_embeddings": False} | sizes
        (before / "config.json").write_text(json.dumps(config))
        skeleton = llama.Model.abstract(llama.Config.from_hf(config))
        arrays = {name: initial_value(name, spec, 0) for name, spec in flatten(skeleton).items()}
        save_file(arrays, before / "model.safetensors")
    lm = trained(load(before), 2 if adapter else None)
    lm.save_to_preset(tmp_path / "after")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "after", attn_implementation="eager")
    assert type(theirs).__name__.lower().startswith(kind.split("_")[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "after")
    ids = [lm.tokenizer.encode(TEXTS[0])]
    assert tokenizer(TEXTS[0])["input_ids"] == ids[0] and tokenizer.eos_token_id == lm.tokenizer.eos_token_id
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == TEXTS[0]
    wanted = lm.logits(ids)
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(ids)).logits.numpy(), wanted, atol=1e-4)
    # And ours, on another backend.
    np.testing.assert_allclose(load(tmp_path / "after", "numpy").logits(ids), wanted, atol=1e-4)
    assert lm.has_adapter == adapter  # saving has merged nothing here


def test_saving_replaces_only_models(lm, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(CheckpointError, match="holds diary.txt, which saving a model there would remove"):
        lm.save_to_preset(tmp_path / "mine")
    assert (tmp_path / "mine" / "diary.txt").read_text() == "dear diary"
    lm.save_to_preset(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("modelhub.hub.files.replace_folder", lambda *args: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(CheckpointError, match="could not be written.*as it was"):
            trained(lm).save_to_preset(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    lm.save_to_preset(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]


def test_large_models_are_saved_in_shards(lm, tmp_path):
    lm.save_to_preset(tmp_path / "model", max_shard_size=20_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and index["weight_map"].keys() == lm.params.keys()
    np.testing.assert_array_equal(load(tmp_path / "model").logits([[2, 5]]), lm.logits([[2, 5]]))


def test_a_16_bit_model_stays_one(tiny_preset, tmp_path):
    lm = CausalLM.from_preset(str(tiny_preset), backend="torch", device="cpu", dtype="bfloat16")
    lm.preprocessor.sequence_length = 48
    trained(lm, None)
    assert {lm.backbone.xp.dtype(x) for x in lm.params.values()} == {"bfloat16"}
    lm.save_to_preset(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    again = CausalLM.from_preset(str(tmp_path / "model"), backend="torch", device="cpu", dtype="bfloat16")
    np.testing.assert_array_equal(again.logits([[2, 5, 6]]), lm.logits([[2, 5, 6]]))


# --- mistakes -------------------------------------------------------------------------------------------------

BAD_FIT = {
    "batch_size 0": ({"batch_size": 0}, "batch_size must be .*1 or more, got 0"),
    "batch_size -1": ({"batch_size": -1}, "batch_size must be .*1 or more, got -1"),
    "batch_size 2.5": ({"batch_size": 2.5}, "batch_size must be a whole number.*got 2.5"),
    "epochs 0": ({"epochs": 0}, "epochs must be a whole number, 1 or more, got 0"),
    "epochs 1.5": ({"epochs": 1.5}, "epochs must be a whole number, 1 or more, got 1.5"),
    "steps 0": ({"steps": 0}, "steps must be a whole number, 1 or more, got 0"),
    "grad_accum 0": ({"grad_accum": 0}, "grad_accum must be a whole number, 1 or more, got 0"),
    "save_steps 0": ({"save_steps": 0}, "save_steps must be a whole number, 1 or more, got 0"),
    "resume": ({"resume": "yes"}, 'resume must be "auto", True or False, got \'yes\''),
    "split 1.5": ({"validation_split": 1.5}, "validation_split between 0 and 1"),
    "split -0.1": ({"validation_split": -0.1}, "validation_split between 0 and 1"),
    "split and data": ({"validation_split": 0.1, "validation_data": DATA}, "not both"),
    "split of all": ({"validation_split": 0.99}, "leaves nothing of 5 records to train on"),
    "loss_on": ({"loss_on": "answer"}, 'loss_on must be "response" or "all", got \'answer\''),
    "kind": ({"kind": "sharegpt"}, "kind must be one of dolly.*got 'sharegpt'"),
    "template": ({"template": "{question}"}, "the template must have"),
    "chat without a template": ({"template": "chat"}, "needs a chat template, and the preset has none"),
    "seed": ({"seed": -1}, "seed must be"),
    "verbose": ({"verbose": 7}, "verbose must be True or False, got 7"),
    "packing": ({"packing": "no"}, "packing must be True or False, got 'no'"),
    "callback": ({"callbacks": [print]}, "callbacks"),
    "callback class": ({"callbacks": optim.AdamW}, "callbacks"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FIT)
def test_arguments_of_fit_that_cannot_be(lm, case):
    arguments, message = BAD_FIT[case]
    with pytest.raises(ModelhubError, match=message):
        lm.fit(DATA, **{"verbose": False} | arguments)


BAD_DATA = {
    "an empty list": ([], "holds no rows"),
    "a missing file": ("nowhere.jsonl", "nowhere.jsonl: no such file"),
    "a file of an unknown kind": ("data.txt", "cannot tell the format"),
    "a number": (3, "the data is a int"),
    "None": (None, "the data is a NoneType"),
    "a dict": ({"train": DATA}, 'data\\["train"\\]'),
    "unknown keys": ([{"query": "a", "reply": "b"}], "no known kind, it has query, reply"),
    "a missing response": ([DATA[0], {"instruction": "a"}], "row 2: response missing"),
    "numbers as text": ([{"text": 3}], "text must be text, found int"),
    "nothing to learn": ([{"instruction": "a", "response": " "}], "none of the 1 rows has a token to learn"),
    "empty strings": ([""], "none of the 1 rows has a token to learn"),
    "answers that are cut off": ([{"instruction": "word " * 80, "response": "b"}], "answer begins after sequence_length=48"),
    "batches of floats": ([{"input_ids": np.ones((1, 4)), "labels": np.ones((1, 4))}], "must be integers, found float64"),
    "batches without labels": ([{"input_ids": np.ones((1, 4), int)}], "a dict with input_ids and labels, found input_ids"),
    "ids outside the vocabulary": ([{"input_ids": [[1, 400]], "labels": [[1, 400]]}], "400.*outside the vocabulary: 0 to 399"),
    "labels outside the vocabulary": ([{"input_ids": [[1, 3]], "labels": [[1, 400]]}], "400.*outside the vocabulary"),
    "rows longer than the context": ([{"input_ids": np.ones((1, 200), int), "labels": np.ones((1, 200), int)}], "200.*128"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_cannot_be(lm, case):
    data, message = BAD_DATA[case]
    with pytest.raises(ModelhubError, match=message):
        lm.fit(data, **QUIET)
    with pytest.raises(ModelhubError, match=message):
        lm.evaluate(data)


def test_a_preprocessor_that_cannot_be(lm):
    with pytest.raises(InputError, match="cannot be None: set lm.preprocessor.sequence_length. Token ids need nothing"):
        lm.preprocessor = None
    assert lm.preprocessor.sequence_length


BAD_COMPILE = {
    "optimizer": ({"optimizer": "adamv"}, "optimizer 'adamv' is unknown: pass one of sgd"),
    "optimizer class": ({"optimizer": optim.AdamW}, "optimizer .* is neither a name, nor an object such as optim.AdamW"),
    "optimizer None": ({"optimizer": None}, "optimizer None is neither a name"),
    "learning rate": ({"learning_rate": -1.0}, "learning_rate must be"),
    "learning rate nan": ({"learning_rate": float("nan")}, "learning_rate must be"),
    "learning rate as text": ({"learning_rate": "1e-4"}, "learning_rate must be"),
    "schedule": ({"schedule": "cosines"}, "schedule 'cosines' is unknown"),
    "weight decay": ({"weight_decay": -0.1}, "weight_decay must be"),
    "weight decay twice": ({"optimizer": optim.SGD(weight_decay=0.1), "weight_decay": 0.2}, "in one place"),
    "clip_norm": ({"clip_norm": 0}, "clip_norm must be above 0, got 0"),
    "loss": ({"loss": "mse"}, "there is no loss 'mse'"),
    "metrics": ({"metrics": ["f1"]}, "metrics can only be \"accuracy\", got 'f1'"),
    "mixed precision": ({"mixed_precision": "fp8"}, "mixed_precision must be one of .*'mixed_bfloat16'.*got 'fp8'"),
    "matmul precision": ({"matmul_precision": "low"}, "matmul_precision must be"),
    "a live torch optimizer": ({"optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)])}, "functools.partial"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_COMPILE)
def test_arguments_of_compile_that_cannot_be(lm, case):
    arguments, message = BAD_COMPILE[case]
    with pytest.raises(ConfigError, match=message):
        lm.compile(**arguments)


def test_an_optimizer_of_another_backend(tiny_preset):
    with pytest.raises(ConfigError, match="AdamW'> is neither .* nor an optimizer of jax"):
        load(tiny_preset, "jax").compile(torch.optim.AdamW)
    import optax

    with pytest.raises(ConfigError, match="nor an optimizer of torch"):
        load(tiny_preset, "torch").compile(optax.adamw(1e-3))


@pytest.mark.parametrize("length", [0, 1, 129, 64.5, "64"])
def test_sequence_lengths_that_cannot_be(lm, length):
    lm.preprocessor.sequence_length = length
    with pytest.raises(InputError, match="sequence_length must be 2 to 128, the model's context; got"):
        lm.fit(DATA, **QUIET)


def test_a_checkpoint_dir_that_is_a_file(lm, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ModelhubError, match="file"):
            lm.fit(DATA, checkpoint_dir=path, **QUIET)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_dir_in_use(lm, tmp_path):
    from modelhub.training.checkpoints import lock

    with lock(tmp_path), pytest.raises(ResumeError, match="is in use"):
        lm.fit(DATA, checkpoint_dir=tmp_path, **QUIET)


def test_without_a_tokenizer(lm, tmp_path):
    lm.tokenizer = None
    with pytest.raises(DataError, match="no tokenizer: set lm.tokenizer, or give ready batches"):
        lm.fit(TEXTS, **QUIET)
    batch = {"input_ids": [[2, 5, 6, 7]], "labels": [[2, 5, 6, 7]]}
    assert len(lm.fit([batch], **QUIET).steps) == 1
    lm.save_to_preset(tmp_path / "saved")
    assert not [path for path in (tmp_path / "saved").iterdir() if path.name.startswith("tokenizer")]


def test_a_loss_of_another_shape(lm):
    """The mean over all positions, where one loss for each is asked for."""
    lm.compile(loss=lambda logits, labels: torch.nn.functional.cross_entropy(logits, labels.long()))
    with pytest.raises(ModelhubError, match=r"loss.*one .*for each"):
        lm.fit(DATA, **QUIET)


def test_partial_optimizers_are_described(lm, tmp_path):
    """A run with another native optimizer is another run."""
    lm.compile(functools.partial(torch.optim.SGD, lr=0.1))
    lm.fit(DATA, checkpoint_dir=tmp_path, **QUIET)
    lm.compile(functools.partial(torch.optim.SGD, lr=0.2))
    with pytest.raises(ResumeError, match="optimizer"):
        lm.fit(DATA, epochs=2, checkpoint_dir=tmp_path, **QUIET)
