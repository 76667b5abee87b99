"""Adapters that replace whole modules, and adapters of heads: the same numbers as PEFT in both directions."""

import copy
import json

import numpy as np
import peft
import pytest
import torch
import transformers
from peft_parity import IDS, assert_close, base_model, peft_logits
from safetensors.numpy import load_file
from tiny_preset import CONFIG, write_preset

from modelhub import CausalLM
from modelhub.core import leaves
from modelhub.core.backends import installed
from modelhub.errors import CheckpointError
from modelhub.hub.adapters import read_adapter
from modelhub.hub.gguf import open_gguf

CASES = {
    "head-whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding-whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both-whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "norms-whole": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "head-lora": {"target_modules": ["q_proj", "lm_head"]},
    "head-dora": {"target_modules": ["v_proj", "lm_head"], "use_dora": True},
}
BACKENDS = [name for name in installed() if name != "numpy"]


def weights(model):
    return {name: np.array(model.backbone.xp.get(x)) for name, x in model.params.items()}


def shake(model):
    """Give the active adapter values as training would."""
    draw, xp = np.random.default_rng(5), model.backbone.xp
    model.params = model.params | {
        name: xp.array(np.asarray(xp.get(x)) * 1.2 + draw.normal(0.0, 0.2, x.shape), "float32")
        for name, x in model.params.items()
        if ".lora." in name
    }


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def preset(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("presets") / f"tied-{request.param}"
    return write_preset(folder, CONFIG | {"tie_word_embeddings": request.param})


@pytest.fixture
def plain(preset):
    return CausalLM.from_preset(str(preset), backend="numpy")


def made_by_peft(preset, case, folder):
    """The logits of a PEFT model in which everything that is trained is random, and whose adapter is in the folder."""
    torch.manual_seed(1)
    model = peft.get_peft_model(base_model(preset), peft.LoraConfig(task_type="CAUSAL_LM", r=4, **CASES[case]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3) if "magnitude" in key else parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return peft_logits(model)


@pytest.mark.parametrize("case", CASES)
def test_adapters_made_by_peft(preset, plain, case, tmp_path):
    wanted = made_by_peft(preset, case, tmp_path / "theirs")
    before, base = weights(plain), plain.logits(IDS)
    plain.load_adapter(tmp_path / "theirs", "theirs")
    assert np.abs(wanted - base).max() > 0.01 * np.abs(base).max()
    assert_close(plain.logits(IDS), wanted)
    plain.merge_lora()
    assert_close(plain.logits(IDS), wanted)
    plain.unmerge_lora()
    assert_close(plain.logits(IDS), wanted)
    plain.save_adapter(tmp_path / "ours")
    assert_close(peft_logits(peft.PeftModel.from_pretrained(base_model(preset), tmp_path / "ours")), wanted)
    plain.save_to_preset(tmp_path / "merged")
    assert_close(peft_logits(base_model(tmp_path / "merged")), wanted)
    assert_close(CausalLM.from_preset(tmp_path / "merged", backend="numpy").logits(IDS), wanted)
    plain.set_adapter(None)
    after = weights(plain)
    assert after.keys() == before.keys() and all(after[name].tobytes() == before[name].tobytes() for name in before)


@pytest.mark.parametrize(("backend", "case"), zip(BACKENDS, ["both-whole", "head-lora", "head-lora"], strict=False))
def test_trained_on_every_backend_and_moved(preset, backend, case, tmp_path):
    """Training, moving, a second adapter, saving: PEFT computes the same with what comes out."""
    lm = CausalLM.from_preset(str(preset), backend=backend, device="cpu")
    base, before = lm.logits(IDS), weights(lm)
    options = CASES[case]
    lm.enable_lora(2, targets=options["target_modules"], modules_to_save=options.get("modules_to_save", ()))
    assert_close(lm.logits(IDS), base)
    lm.preprocessor.sequence_length = 32
    lm.compile(learning_rate=0.01)
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS[:, None].tolist() * 3]
    losses = [step["loss"] for step in lm.fit(rows, epochs=2, verbose=False).steps]
    assert losses[-1] < losses[0]
    trained = lm.logits(IDS)
    lm.enable_lora(2, name="other")
    assert_close(lm.logits(IDS), base)
    lm.set_adapter("default")
    lm.to("numpy")
    assert_close(lm.logits(IDS), trained)
    lm.save_adapter(tmp_path / "adapter")
    assert_close(peft_logits(peft.PeftModel.from_pretrained(base_model(preset), tmp_path / "adapter")), trained)
    lm.set_adapter(None)
    assert all(np.array_equal(x, before[name]) for name, x in weights(lm).items())


def test_a_run_goes_on_with_whole_modules(preset, tmp_path):
    ids = IDS[:, None].tolist() * 3
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def run(steps, folder):
        lm = CausalLM.from_preset(str(preset), backend="torch", device="cpu")
        lm.enable_lora(2, targets=["q_proj"], modules_to_save=["lm_head"])
        lm.compile(learning_rate=0.01)
        lm.fit(rows, steps=steps, epochs=9, checkpoint_dir=folder, save_steps=2, verbose=False)
        return lm

    whole = run(6, tmp_path / "whole")
    run(4, tmp_path / "broken")
    again = run(6, tmp_path / "broken")
    assert all(np.allclose(x, weights(again)[name], atol=1e-6) for name, x in weights(whole).items())


def test_a_final_merge_keeps_the_head_apart(preset, plain, tmp_path):
    wanted = made_by_peft(preset, "head-lora", tmp_path / "theirs")
    plain.enable_lora(2, name="other")
    shake(plain)
    other = plain.logits(IDS)
    plain.load_adapter(tmp_path / "theirs", "theirs")
    plain.merge_lora()
    plain.backbone.keep_merged()
    assert not plain.config.tie_word_embeddings
    assert_close(plain.logits(IDS), wanted)
    plain.set_adapter("other")
    assert np.abs(plain.logits(IDS) - other).max() > 0.01 * np.abs(other).max()
    plain.set_adapter(None)
    assert_close(plain.logits(IDS), wanted)


def test_the_head_is_no_second_copy_of_the_table(preset, plain):
    count = plain.backbone.num_parameters
    plain.enable_lora(2, targets=["lm_head"])
    added = sum(x.size for x in plain.backbone.adapter.params.values())
    assert plain.backbone.num_parameters == count + added
    if plain.config.tie_word_embeddings:
        assert plain.params["lm_head.weight"] is plain.params["model.embed_tokens.weight"]


def test_peft_resized_the_vocabulary(preset, plain, tmp_path):
    base = base_model(preset)
    base.resize_token_embeddings(500)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="(?s)this model needs .*vocabulary was resized before training"):
        plain.load_adapter(tmp_path)
    assert not plain.backbone.adapters


@pytest.mark.slow
def test_dropout_before_the_head(preset):
    """Half of the head's input is dropped: what it learns in a step differs from what it learns without, and by chance.

    With a rate of 0 it must be the same, and with one seed on every backend.
    """
    rows = [{"input_ids": row, "labels": row} for row in IDS[:, None].tolist()]

    def trained(dropout, seed, backend="torch"):
        lm = CausalLM.from_preset(str(preset), backend=backend, device="cpu")
        lm.enable_lora(2, dropout=dropout, targets=["lm_head"])
        lm.compile(optimizer="sgd", learning_rate=0.1)
        lm.fit(rows, steps=1, seed=seed, verbose=False)
        return weights(lm)["lm_head.lora.lora_B"]

    without = trained(0.0, 0)
    assert np.array_equal(without, trained(0.0, 1))
    dropped = trained(0.5, 0)
    assert np.abs(dropped - without).max() > 0.05 * np.abs(without).max()
    assert np.abs(dropped - trained(0.5, 1)).max() > 0.05 * np.abs(without).max()
    for backend in BACKENDS:
        np.testing.assert_allclose(trained(0.5, 0, backend), dropped, atol=1e-5 * np.abs(dropped).max() + 1e-7)


def test_gguf_with_a_head_of_its_own(tmp_path):
    from tiny_families import CONFIGS
    from tiny_families import write_preset as write_family

    from modelhub.conversion import convert
    from modelhub.errors import ConfigError

    ids = IDS[:, :10]
    for name, works in (("llama3", True), ("gemma3", True), ("gemma", False)):
        folder = write_family(tmp_path / name, CONFIGS[name], "gemma" if "gemma" in name else "smollm")
        lm = CausalLM.from_preset(folder, backend="numpy")
        lm.enable_lora(2, targets=["lm_head", "q_proj"])
        shake(lm)
        lm.save_adapter(tmp_path / f"{name}-adapter")
        target = tmp_path / f"{name}.gguf"
        if not works:
            with pytest.raises(ConfigError, match="the embedding as its head"):
                convert(folder, target, "float32", adapter=tmp_path / f"{name}-adapter")
            continue
        convert(folder, target, "float32", adapter=tmp_path / f"{name}-adapter")
        with open_gguf(target) as file:
            assert "output.weight" in file.tensors
        assert_close(CausalLM.from_preset(target, backend="numpy").logits(ids), lm.logits(ids))


@pytest.fixture(scope="module", params=["vit", "deit-teacher", "dinov2"])
def image_preset(request, tmp_path_factory):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    torch.manual_seed(0)
    if request.param == "vit":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, intermediate_size=40, **labels))
    elif request.param == "dinov2":
        model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**sizes, **labels))
    else:
        config = transformers.DeiTConfig(**sizes, intermediate_size=40, **labels)
        model = transformers.DeiTForImageClassificationWithTeacher(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    folder = tmp_path_factory.mktemp("images") / request.param
    model.save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder, type(model)


PIXELS = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)


def image_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(PIXELS)).logits.numpy()


def test_image_classifiers_with_heads_of_peft(image_preset, tmp_path):
    from modelhub import ImageClassifier

    folder, cls = image_preset
    base = cls.from_pretrained(folder)
    heads = [name for name, part in base.named_children() if isinstance(part, torch.nn.Linear)]
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=heads)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    wanted = image_logits(model)
    model.save_pretrained(tmp_path / "theirs")
    clf = ImageClassifier.from_preset(folder, backend="numpy")
    before = clf.logits({"pixel_values": PIXELS})
    clf.load_adapter(tmp_path / "theirs", "theirs")
    assert_close(clf.logits({"pixel_values": PIXELS}), wanted)
    clf.merge_lora()
    assert_close(clf.logits({"pixel_values": PIXELS}), wanted)
    clf.unmerge_lora()
    clf.save_adapter(tmp_path / "ours")
    assert_close(image_logits(peft.PeftModel.from_pretrained(cls.from_pretrained(folder), tmp_path / "ours")), wanted)
    clf.save_to_preset(tmp_path / "merged")
    assert_close(image_logits(cls.from_pretrained(tmp_path / "merged")), wanted)
    clf.set_adapter(None)
    assert_close(clf.logits({"pixel_values": PIXELS}), before)


def test_a_new_head_of_an_image_classifier_in_peft(image_preset, tmp_path):
    from modelhub import ImageClassifier

    folder, cls = image_preset
    labels = [f"class {index}" for index in range(5)]
    clf = ImageClassifier.from_preset(folder, labels=labels, backend="torch", device="cpu")
    clf.enable_lora(2)
    shake(clf)
    head = {name: x + 0.1 for name, x in clf.params.items() if name in clf.backbone.adapter.whole}
    assert head
    clf.params = clf.params | head
    wanted = clf.logits({"pixel_values": PIXELS})
    clf.save_adapter(tmp_path / "adapter")
    theirs = cls.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert_close(image_logits(model), wanted)
    assert model.peft_config["default"].base_model_name_or_path == str(folder)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "num_labels=5, ignore_mismatched_sizes=True" in card and "num_classes=5" in card
    again = ImageClassifier.from_preset(folder, num_classes=5, backend="numpy", seed=9)
    again.load_adapter(tmp_path / "adapter")
    assert again.labels == labels
    assert_close(again.logits({"pixel_values": PIXELS}), wanted)
    other = ImageClassifier.from_preset(folder, backend="numpy")
    with pytest.raises(CheckpointError, match="Its head has 5 classes: load the base model with num_classes=5"):
        other.load_adapter(tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").whole.keys() == load_heads(tmp_path / "adapter")


def load_heads(folder):
    names = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.") for name in names if "lora_" not in name}


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_whole_modules_of_packed_weights_are_trained_as_floats(is_tied, module, tmp_path):
    wide = CONFIG | {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": is_tied}
    preset = write_preset(tmp_path / "preset", wide)
    lm = CausalLM.from_preset(preset, backend="torch", quantize="int8")
    lm.enable_lora(2, targets="q_proj", modules_to_save=[module])
    (whole,) = lm.backbone.adapters["default"].whole
    assert not isinstance(lm.params[whole], leaves.Packed)
    packed_before = {name for name, x in lm.params.items() if isinstance(x, leaves.Packed)}
    before = np.array(lm.backbone.xp.get(lm.params[whole]))
    lm.compile(learning_rate=1e-2)
    lm.fit(["The river is cold."], epochs=2, verbose=False)
    assert np.abs(lm.backbone.xp.get(lm.params[whole]) - before).max() > 1e-3
    wanted = lm.logits(IDS)
    lm.save_adapter(tmp_path / "adapter")
    fresh = CausalLM.from_preset(preset, backend="torch", quantize="int8")
    fresh.load_adapter(tmp_path / "adapter")
    np.testing.assert_allclose(fresh.logits(IDS), wanted, atol=1e-4)
    lm.quantize("int8")  # what the adapter trains stays as it is
    assert {name for name, x in lm.params.items() if isinstance(x, leaves.Packed)} == packed_before
    lm.set_adapter(None)
    np.testing.assert_allclose(
        lm.logits(IDS), CausalLM.from_preset(preset, backend="torch", quantize="int8").logits(IDS), atol=1e-4
    )
