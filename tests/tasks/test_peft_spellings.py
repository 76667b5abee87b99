"""Adapters of models whose layers transformers has elsewhere: read in every spelling, written in the one PEFT needs."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from modelhub import Backbone, CausalLM
from modelhub.errors import CheckpointError
from modelhub.hub.adapters import CONFIG, WEIGHTS

IDS = np.array([[2, 40, 50, 60, 7, 8]])
TEXT = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def assert_close(found, wanted):
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def randomised(model, scale=0.2):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, scale)
    return model.eval()


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=300, boi_token_index=301,
        eoi_token_index=302,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("multimodal")
    randomised(transformers.Gemma3ForConditionalGeneration(config)).save_pretrained(folder)
    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(folder / "tokenizer.json"))
    return folder


def base_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def shake(model):
    draw = np.random.default_rng(3)
    own = model.backbone.trainable_names()
    model.params = model.params | {
        n: np.float32(x + draw.normal(0, 0.2, x.shape)) for n, x in model.params.items() if n in own
    }


@pytest.fixture(scope="module")
def theirs(multimodal, tmp_path_factory):
    """An adapter made by PEFT, and the logits with it. In the image tower it adapts layers of the same names."""
    folder = tmp_path_factory.mktemp("theirs")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], modules_to_save=["embed_tokens"])
    model = randomised(peft.get_peft_model(base_model(multimodal), config), 0.1)
    model.save_pretrained(folder)
    return folder, logits(model)


def test_an_adapter_of_a_model_that_sees(multimodal, theirs, caplog):
    folder, wanted = theirs
    assert any("model.language_model.layers.0" in name for name in load_file(folder / WEIGHTS))
    lm = CausalLM.from_preset(multimodal, backend="numpy")
    assert np.abs(lm.logits(IDS) - wanted).max() > 0.01 * np.abs(wanted).max()
    lm.load_adapter(folder, "theirs")
    assert_close(lm.logits(IDS), wanted)
    assert "2 layers of parts that are not loaded here, such as model.vision_tower" in caplog.text


SPELLINGS = {
    "transformers 4.50": lambda name: name.replace("model.language_model.", "language_model.model.").replace(
        "model.lm_head", "model.language_model.lm_head"
    ),
    "the text model alone": lambda name: name.replace("model.language_model.", "model."),
    "no head": lambda name: name.replace("base_model.model.model.", "base_model.model."),
    "the text model without its head": lambda name: name.replace("model.language_model.", ""),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read(multimodal, theirs, spelling, tmp_path):
    folder, wanted = theirs
    tensors = {n: x for n, x in load_file(folder / WEIGHTS).items() if "vision_tower" not in n}
    renamed = {SPELLINGS[spelling](name): x for name, x in tensors.items()}
    assert len(renamed) == len(tensors) and renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text((folder / CONFIG).read_text())
    lm = CausalLM.from_preset(multimodal, backend="numpy")
    lm.load_adapter(tmp_path, "theirs")
    assert_close(lm.logits(IDS), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"targets": "all-linear", "use_dora": True}, {"targets": ["q_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["default", "dora", "head", "whole"],
)  # fmt: skip
def test_it_is_written_for_the_base_that_it_names(multimodal, options, tmp_path):
    lm = CausalLM.from_preset(multimodal, backend="numpy")
    lm.enable_lora(4, **options)
    shake(lm)
    wanted = lm.logits(IDS)
    lm.save_adapter(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(base_model(multimodal), tmp_path / "adapter")
    assert_close(logits(model), wanted)
    assert not any("vision_tower" in name for name, x in model.named_parameters() if "lora_" in name)
    again = CausalLM.from_preset(multimodal, backend="numpy")
    again.load_adapter(tmp_path / "adapter")
    assert_close(again.logits(IDS), wanted)
    # Saved as a model of text alone, it is the base of adapters as such models have them.
    lm.set_adapter(None)
    lm.save_to_preset(tmp_path / "text")
    text = CausalLM.from_preset(tmp_path / "text", backend="numpy")
    text.load_adapter(tmp_path / "adapter", "old")
    assert_close(text.logits(IDS), wanted)
    text.save_adapter(tmp_path / "of text")
    assert_close(logits(peft.PeftModel.from_pretrained(base_model(tmp_path / "text"), tmp_path / "of text")), wanted)


def test_trained_weights_are_a_model_of_text(multimodal, tmp_path):
    """They are nowhere but in memory, and are going to be saved as what they are here."""
    lm = CausalLM.from_preset(multimodal, backend="numpy")
    lm.params = {name: x * np.float32(1.1) for name, x in lm.params.items()}
    lm.save_to_preset(tmp_path / "text")
    lm.enable_lora(4)
    shake(lm)
    lm.save_adapter(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"] == ["q_proj", "v_proj"]
    model = peft.PeftModel.from_pretrained(base_model(tmp_path / "text"), tmp_path / "adapter")
    assert_close(logits(model), lm.logits(IDS))


@pytest.mark.parametrize("spelling", ["old", "older", "new"])
def test_checkpoints_of_models_that_see(multimodal, spelling, tmp_path):
    """Published files have the names of transformers 4.49; later ones write those that they have in memory."""
    for file in multimodal.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    in_memory = base_model(multimodal).state_dict()
    in_memory.pop("lm_head.weight")
    tensors = {name: x.numpy().copy() for name, x in in_memory.items()}
    if spelling != "new":
        tensors = {
            n.replace("model.language_model.", "language_model.model.").removeprefix("model."): x
            for n, x in tensors.items()
        }
    if spelling == "older":
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    wanted = logits(base_model(multimodal))
    assert_close(CausalLM.from_preset(tmp_path, backend="numpy").logits(IDS), wanted)


DINOV2 = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
BARE = {
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(
        vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True)),
    "gemma": lambda: transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**TEXT)),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**VISION | {"num_hidden_layers": 2})),
    "deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**VISION | {"num_hidden_layers": 2})),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2)),
}  # fmt: skip


@pytest.mark.parametrize("name", BARE)
def test_models_without_a_head(name, tmp_path):
    """PEFT's names have no prefix there; images come back the same way, text has its head by then."""
    randomised(BARE[name]()).save_pretrained(tmp_path / "base")
    image = name in ("vit", "deit", "dinov2")
    given = np.random.default_rng(0).normal(size=(2, 3, 28, 28)).astype(np.float32) if image else IDS

    def hidden(model):
        with torch.no_grad():
            return model.eval()(torch.tensor(given)).last_hidden_state.numpy()

    base = transformers.AutoModel.from_pretrained(tmp_path / "base")
    model = randomised(
        peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"])), 0.1
    )
    wanted = hidden(model)
    model.save_pretrained(tmp_path / "theirs")
    backbone = Backbone.from_preset(str(tmp_path / "base"), backend="numpy")
    before = backbone(given)
    backbone.load_adapter(tmp_path / "theirs")
    assert_close(backbone(given), wanted)
    assert np.abs(wanted - before).max() > 0.01 * np.abs(before).max()
    backbone.save_adapter(tmp_path / "ours")
    if image:
        base = transformers.AutoModel.from_pretrained(tmp_path / "base")
        assert_close(hidden(peft.PeftModel.from_pretrained(base, tmp_path / "ours")), wanted)


SWIGLU = {
    "both": {"target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"]},
    "one": {"target_modules": ["up_proj"]},
    "ranks of their own": {
        "target_modules": ["gate_proj", "up_proj"], "rank_pattern": {"layer.0.mlp.up_proj": 5},
        "alpha_pattern": {"layer.1.mlp.gate_proj": 7}, "use_rslora": True,
    },
    "dora": {"target_modules": ["gate_proj", "up_proj"], "use_dora": True},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["gate_proj", "up_proj"]},
}  # fmt: skip


@pytest.fixture(scope="module", params=[transformers.Dinov2Model, transformers.Dinov2ForImageClassification])
def swiglu(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swiglu")
    config = transformers.Dinov2Config(**DINOV2, use_swiglu_ffn=True)
    randomised(request.param(config)).save_pretrained(folder)
    return request.param, folder


def encoded(model):
    x = torch.tensor(np.random.default_rng(0).normal(size=(2, 3, 28, 28)).astype(np.float32))
    with torch.no_grad():
        found = model.eval()(x, output_hidden_states=True)
    return found[0].numpy()


def encoded_here(backbone):
    x = np.random.default_rng(0).normal(size=(2, 3, 28, 28)).astype(np.float32)
    hidden = backbone(x)
    return backbone.module.logits(backbone.xp, hidden) if backbone.config.num_labels else hidden


@pytest.mark.parametrize("case", SWIGLU)
def test_swiglu_whose_gate_and_input_are_apart_in_peft(swiglu, case, tmp_path):
    cls, folder = swiglu
    model = randomised(peft.get_peft_model(cls.from_pretrained(folder), peft.LoraConfig(r=2, **SWIGLU[case])), 0.4)
    wanted = encoded(model)
    model.save_pretrained(tmp_path / "theirs")
    backbone = Backbone.from_preset(str(folder), backend="numpy")
    before = encoded_here(backbone)
    backbone.load_adapter(tmp_path / "theirs")
    found = encoded_here(backbone)
    assert_close(found, wanted)
    assert np.abs(found - before).max() > 0.01 * np.abs(before).max()
    backbone.save_adapter(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(cls.from_pretrained(folder), tmp_path / "ours")
    assert_close(encoded(again), wanted)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"targets": ["weights_in"]}], ids=str)
def test_swiglu_is_written_as_peft_has_it(swiglu, options, tmp_path):
    cls, folder = swiglu
    backbone = Backbone.from_preset(str(folder), backend="numpy")
    backbone.enable_lora(3, **{"targets": "all-linear"} | options)
    draw, own = np.random.default_rng(3), backbone.trainable_names()
    backbone.params = backbone.params | {
        n: np.float32(x + draw.normal(0, 0.1, x.shape)) for n, x in backbone.params.items() if n in own
    }
    wanted = encoded_here(backbone)
    backbone.save_adapter(tmp_path / "ours")
    targets = json.loads((tmp_path / "ours" / CONFIG).read_text())["target_modules"]
    assert {"gate_proj", "up_proj"} <= {*targets} and "weights_in" not in targets
    assert_close(encoded(peft.PeftModel.from_pretrained(cls.from_pretrained(folder), tmp_path / "ours")), wanted)
    again = Backbone.from_preset(str(folder), backend="numpy")
    again.load_adapter(tmp_path / "ours")
    assert again.adapters["ours"].params.keys() == {n: 0 for n in own}.keys()
    assert_close(encoded_here(again), wanted)


def test_half_of_what_cannot_be_halved(tmp_path):
    randomised(transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2, use_swiglu_ffn=True))).save_pretrained(
        tmp_path / "base"
    )
    for options in ({"use_dora": True}, {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]}):
        config = peft.LoraConfig(r=2, **{"target_modules": ["up_proj"]} | options)
        peft.get_peft_model(transformers.Dinov2Model.from_pretrained(tmp_path / "base"), config).save_pretrained(
            tmp_path / "theirs"
        )
        backbone = Backbone.from_preset(str(tmp_path / "base"), backend="numpy")
        with pytest.raises(
            CheckpointError, match="a part of .*weights_in as a whole.*Merge it into its base with PEFT"
        ):
            backbone.load_adapter(tmp_path / "theirs")


def test_parts_that_do_not_fit_each_other(tmp_path):
    base = transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2, use_swiglu_ffn=True))
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "up_proj"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    backbone = Backbone.from_preset(str(tmp_path / "base"), backend="numpy")
    for kind, shape, says in (("lora_A", (2, 5), "do not fit each other"), ("lora_B", (9, 2), "another base model")):
        name = f"base_model.model.encoder.layer.0.mlp.up_proj.{kind}.weight"
        assert name in tensors
        save_file(tensors | {name: np.zeros(shape, np.float32)}, tmp_path / "theirs" / WEIGHTS)
        with pytest.raises(CheckpointError, match=says):
            backbone.load_adapter(tmp_path / "theirs")
