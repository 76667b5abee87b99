"""The cards of image presets, and what the command line shows of them."""

import json
import math
import re
import sys

import pytest

from modelhub.cli import main
from modelhub.core.tree import flatten
from modelhub.families import dinov2, family_of, vit
from modelhub.hub.registry import find_card, list_presets

# hidden_size, num_hidden_layers, num_attention_heads, as the papers have them
SIZES = {
    "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16), "giant": (1536, 40, 24),
}  # fmt: skip
CARDS = [
    card
    for card in list_presets()
    if card.task.startswith("image-") and card.name.startswith(("vit_", "deit_", "dinov2_")) and "tiny" not in card.name
]


def config_of(name):
    width, layers, heads = SIZES[re.search("|".join(SIZES), name)[0]]
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    if name.startswith("dinov2"):
        registers = "_with_registers" if "registers" in name else ""
        return dinov2.Config(
            "dinov2" + registers, **sizes, image_size=518, patch_size=14, use_swiglu_ffn="giant" in name,
            num_register_tokens=4 if registers else 0,
        )  # fmt: skip
    kind, patch, image = re.match(r"(vit|deit).*_patch(\d+)_(\d+)_", name).groups()
    return vit.Config(
        kind, **sizes, intermediate_size=4 * width, patch_size=int(patch), image_size=int(image),
        num_labels=1000 if name.endswith("_imagenet") else 0, distillation_head=kind == "deit",
    )  # fmt: skip


def test_there_are_these():
    assert len(CARDS) == 11 + 1 + 8
    assert find_card("vit_base_patch16_224_imagenet").addresses == (
        "hf://google/vit-base-patch16-224",
        "kaggle://keras/vit/keras/vit_base_patch16_224_imagenet/4",
        "hf://keras/vit_base_patch16_224_imagenet",
    )
    # The figures of transformers' models
    known = {"vit_base_patch16_224_imagenet": 86_567_656, "dinov2_small": 22_056_576, "dinov2_giant": 1_136_480_768}
    assert {name: find_card(name).parameters for name in known} == known


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_cards_say_what_the_models_have(card):
    config = config_of(card.name)
    model = family_of(config.model_type).Model.abstract(config)
    assert card.parameters == sum(math.prod(spec.shape) for spec in flatten(model).values())
    assert card.family == ("dinov2" if card.name.startswith("dinov2") else "vit")
    assert card.task == ("image-classification" if config.num_labels else "image-features")
    assert ("with" in card.description or "two heads" in card.description) and "head" in card.description
    assert not card.accept_licence and card.sources[0].verified >= (card.family == "vit")


@pytest.fixture
def run(capsys, monkeypatch):
    def command(*words):
        monkeypatch.setattr(sys, "argv", ["modelhub", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        return capsys.readouterr().out

    return command


def test_list(run):
    names = [card["name"] for card in json.loads(run("list", "--task", "image-features", "--json"))]
    assert "dinov2_with_registers_giant" in names and "vit_base_patch16_224_imagenet" not in names


def test_info(tmp_path, run):
    (tmp_path / "config.json").write_text(json.dumps(config_of("vit_base_patch16_224_imagenet").to_hf()))
    about = json.loads(run("info", str(tmp_path), "--json"))
    assert (about["parameters"], about["image_size"], about["classes"]) == (86_567_656, 224, 1000)
    (tmp_path / "config.json").write_text(json.dumps(config_of("dinov2_small").to_hf()))
    assert re.search(r"image size +518\nclasses +0\n", run("info", str(tmp_path)))
    assert "22,056,576" in run("info", "dinov2_small")
