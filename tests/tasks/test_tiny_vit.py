"""The embedded image preset: there without a network, alike everywhere, and right about pictures it has not seen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from modelhub import Backbone, ImageClassifier, cli
from modelhub.core.backends import installed
from modelhub.hub.registry import find_card
from modelhub.hub.resources import resource

PRESET = "vit_tiny_fashion"
CLOTHES = Path(__file__).parents[2] / "examples" / "clothes"  # of the held-out images


@pytest.fixture(scope="module")
def pictures():
    """[(path, label)]"""
    found = [(path, path.parent.name) for path in sorted(CLOTHES.glob("*/*.png"))]
    assert len(found) == 30 and len({label for _, label in found}) == 10
    return found


def load(name="numpy"):
    return ImageClassifier.from_preset(PRESET, backend=name, device="cpu", offline=True)


def share_right(clf, images, labels):
    return np.mean([best[0][0] == label for best, label in zip(clf.predict(images), labels, strict=True)])


def test_pictures_are_named_right_and_alike_on_every_backend(pictures):
    paths, labels = zip(*pictures, strict=True)
    reference = load().predict(paths, top=10)
    assert np.mean([best[0][0] == label for best, label in zip(reference, labels, strict=True)]) >= 0.8
    for name in installed():
        for found, wanted in zip(load(name).predict(paths, top=10), reference, strict=True):
            wanted = dict(wanted)
            np.testing.assert_allclose([share for _, share in found], [wanted[label] for label, _ in found], atol=1e-4)


def test_photos_need_not_be_grey_nor_light_on_black(pictures):
    """Larger, in colour, on white: as from a shop."""
    images = [ImageOps.colorize(Image.open(path).resize((240, 200)), "white", "navy") for path, _ in pictures]
    assert share_right(load(), images, [label for _, label in pictures]) >= 0.7


def test_transformers_reads_it(pictures):
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    folder = resource("presets") / PRESET
    images = [Image.open(path).convert("RGB") for path, _ in pictures]
    model = AutoModelForImageClassification.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    clf = load()
    with torch.no_grad():
        np.testing.assert_allclose(clf.logits(images), model(**pixels).logits.numpy(), atol=1e-4)
    assert list(model.config.id2label.values()) == clf.labels


def test_features_alone(pictures):
    images, clf = [path for path, _ in pictures[:2]], load()
    hidden = Backbone.from_preset(PRESET, backend="numpy")(clf.preprocessor(images))
    assert hidden.shape == (2, 1 + 7 * 7, 96)
    np.testing.assert_allclose(hidden[:, 0], clf.features(images), atol=1e-5)


def test_its_card_is_true():
    folder, clf = resource("presets") / PRESET, load()
    assert find_card(PRESET).parameters == sum(x.size for x in clf.params.values())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000
    (run,) = json.loads((folder / "modelhub.json").read_text())["runs"]
    assert run["examples"] == 60_000 and run["metrics"]["val_accuracy"] > 0.85
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Fashion-MNIST" in card and "license: apache-2.0" in card and "Trained from scratch" in card


def test_the_command_line(pictures, monkeypatch, capsys):
    path, label = pictures[0]
    monkeypatch.setattr(
        "sys.argv", ["modelhub", "classify", str(path), "--preset", PRESET, "--backend", "numpy", "--json"]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    (row,) = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0 and row["image"] == str(path) and row["labels"][0]["label"] == label


def test_a_new_head_in_a_moment(pictures):
    """Which of the pictures show something for the feet."""
    shoes = {"Sandal", "Sneaker", "Ankle boot"}
    clf = ImageClassifier.from_preset(PRESET, labels=["other", "shoe"], backend="torch", device="cpu")
    clf.compile(learning_rate=1e-2)
    rows = [{"image": str(path), "label": "shoe" if label in shoes else "other"} for path, label in pictures]
    clf.fit(rows[::2], epochs=20, freeze_backbone=True, verbose=False)
    assert clf.evaluate(rows[1::2])["accuracy"] >= 0.9


def test_mistakes_are_told(tmp_path):
    from modelhub import CausalLM
    from modelhub.errors import DataError, InputError

    with pytest.raises(InputError, match="reads images; load it as ImageClassifier"):
        CausalLM.from_preset(PRESET, backend="numpy")
    clf = ImageClassifier.from_preset(PRESET, labels=["red", "blue"], backend="torch", device="cpu")
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"no picture")
    for frozen in (True, False):
        with pytest.raises(DataError, match="none of the 2 images of .* can be read"):
            clf.fit(tmp_path, freeze_backbone=frozen, on_error="skip", verbose=False)
    with pytest.raises(DataError, match="none of the 2 images"):
        clf.evaluate(tmp_path, on_error="skip")
    pixels = np.zeros((2, 3, 28, 28), np.float32)
    for shares in ([[2.0, 0.0], [0.5, 0.5]], [[-0.5, 1.5], [1.0, 0.0]], [[np.nan, 1.0], [1.0, 0.0]]):
        with pytest.raises(DataError, match="soft labels must be shares"):
            clf.fit([(pixels, np.array(shares, np.float32))], verbose=False)


def test_hidden_states_and_attention_maps():
    import transformers

    pixels = np.random.default_rng(0).standard_normal((2, 3, 28, 28), np.float32)
    encoder = Backbone.from_preset(PRESET, backend="jax", device="cpu")
    found = encoder.collect(pixels)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(
        resource("presets") / PRESET, attn_implementation="eager"
    )(torch.from_numpy(pixels), output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        assert len(found[name]) == len(theirs[name])
        for ours, other in zip(found[name], theirs[name], strict=True):
            np.testing.assert_allclose(np.asarray(ours), other.detach().numpy(), atol=1e-4)


def test_an_adapter_goes_through_peft(tmp_path):
    import peft
    import transformers

    clf = ImageClassifier.from_preset(PRESET, backend="torch", device="cpu")
    pixels = np.random.default_rng(0).standard_normal((4, 3, 28, 28), np.float32)
    plain = clf.logits({"pixel_values": pixels})
    clf.enable_lora(rank=4, targets="all-linear")
    clf.compile("sgd", learning_rate=1.0)
    clf.fit([(pixels, np.array([1, 2, 3, 4]))], epochs=3, verbose=False)
    tuned = clf.logits({"pixel_values": pixels})
    assert np.abs(tuned - plain).max() > 0.01
    clf.save_adapter(tmp_path / "adapter")
    base = transformers.AutoModelForImageClassification.from_pretrained(resource("presets") / PRESET)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.from_numpy(pixels)).logits.numpy(), tuned, atol=1e-4)
    theirs.save_pretrained(str(tmp_path / "again"))
    again = ImageClassifier.from_preset(PRESET, backend="numpy")
    again.load_adapter(tmp_path / "again")
    np.testing.assert_allclose(again.logits({"pixel_values": pixels}), tuned, atol=1e-4)
