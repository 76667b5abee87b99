"""ImageClassifier against transformers and torch, on every backend against itself, and from photos to a published model."""

import json
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from modelhub import Augment, Backbone, CausalLM, ImageClassifier, cli, optim
from modelhub.core.backends import installed
from modelhub.errors import ConfigError, DataError, InputError, NoGradients
from modelhub.processing.image import ImageProcessor
from modelhub.training import BestCheckpoint, Callback

TRAINING = [name for name in installed() if name != "numpy"]
TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
COLOURS = {"blue": (20, 30, 220), "green": (30, 210, 40), "red": (230, 40, 20)}
QUIET = {"verbose": False, "batch_size": 6}


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """XLA's optimizations take half of the time here."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder per colour: pictures of it, with some noise."""
    folder, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(6):
            pixels = np.array(colour) + rng.integers(-20, 21, (20, 24, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """As transformers saves it, with three classes and larger weights than at the start of training."""
    folder = tmp_path_factory.mktemp("presets") / "tiny_vit"
    torch.manual_seed(0)
    config = transformers.ViTConfig(**TINY, id2label={0: "cat", 1: "dog", 2: "fish"})
    model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    ImageProcessor(size=16).save(folder)
    return folder


def theirs(folder, images):
    """Logits by transformers' own classes for model and processor."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        return model(**processor(images, return_tensors="pt")).logits.numpy()


def pictures(count=5, size=(20, 24)):
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for _ in range(count)]


def weights(clf):
    return {name: np.array(clf.backbone.xp.get(x)) for name, x in clf.params.items()}


def losses(history):
    return [step["loss"] for step in history.steps]


def load(preset, name="torch", **options):
    return ImageClassifier.from_preset(preset, backend=name, device="cpu", **options)


def fresh(name="torch", classes=3, **options):
    return ImageClassifier.from_config(classes, **TINY, backend=name, device="cpu", **options)


# --- prediction -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", installed())
def test_logits_and_features_equal_transformers(preset, name, tmp_path):
    images = pictures()
    clf = load(preset, name)
    wanted = theirs(preset, images)
    np.testing.assert_allclose(clf.logits(images), wanted, atol=1e-4)
    with torch.no_grad():
        model = transformers.ViTModel.from_pretrained(preset, add_pooling_layer=False)
        hidden = model(torch.tensor(clf.preprocessor(images))).last_hidden_state.numpy()
    np.testing.assert_allclose(clf.features(images), hidden[:, 0], atol=1e-4)
    backbone = Backbone.from_preset(str(preset), backend=name, device="cpu")
    np.testing.assert_allclose(backbone.xp.get(backbone(clf.preprocessor(images))), hidden, atol=1e-4)

    images[0].save(tmp_path / "photo.png")
    shares = torch.tensor(wanted).softmax(1).numpy()
    found = clf.predict([tmp_path / "photo.png", *images[1:]], top=2)
    for row, labels in zip(shares, found, strict=True):
        order = np.argsort(-row)[:2]
        assert [label for label, _ in labels] == [("cat", "dog", "fish")[i] for i in order]
        np.testing.assert_allclose([share for _, share in labels], row[order], atol=1e-4)
    one = clf.predict(str(tmp_path / "photo.png"))
    assert [label for label, _ in one[:2]] == [label for label, _ in found[0]] and len(one) == 3
    assert sum(share for _, share in one) == pytest.approx(1)
    assert len(clf.predict(np.zeros((2, 20, 20, 3), np.uint8))) == 2
    ready = {"pixel_values": torch.tensor(clf.preprocessor(images[1:]))}
    np.testing.assert_allclose(clf.logits(ready), wanted[1:], atol=1e-4)


def test_many_images_go_in_parts(preset, monkeypatch):
    from modelhub.tasks import image_classifier

    clf = load(preset)
    wanted = clf.logits(images := pictures(7))
    monkeypatch.setattr(image_classifier, "ROWS", 3)
    np.testing.assert_allclose(clf.logits(images), wanted, atol=1e-5)


def test_bad_images_are_named(preset, tmp_path):
    clf = load(preset)
    (tmp_path / "text.jpg").write_text("this is no image")
    for images, message in (
        (tmp_path / "absent.jpg", "absent.jpg: there is no such file"),
        ([*pictures(1), tmp_path / "text.jpg"], "text.jpg is not an image"),
        (tmp_path, "is a folder, not an image"),
        ([], "no images were given"),
    ):
        with pytest.raises(InputError, match=message):
            clf.predict(images)
    with pytest.raises(InputError, match="top must be a whole number, 1 or more"):
        clf.predict(pictures(1), top=0)


def test_attention_of_the_users_own(preset):
    images, calls = pictures(), []

    def attention(*args, **options):
        calls.append(args[0].shape)
        return torch.nn.functional.scaled_dot_product_attention(*args, **options)

    clf = load(preset, attention=attention)
    np.testing.assert_allclose(clf.logits(images), load(preset).logits(images), atol=1e-5)
    assert calls == [(5, 2, 5, 8)] * 2  # one for each layer
    clf.fit([(np.zeros((2, 3, 16, 16)), [0, 1])], verbose=False)
    assert len(calls) == 4
    clf = fresh(attention=attention, attention_probs_dropout_prob=0.1)
    with pytest.raises(ConfigError, match="attention_probs_dropout_prob"):
        clf.fit([(np.zeros((2, 3, 16, 16)), [0, 1])], verbose=False)


# --- construction ---------------------------------------------------------------------------------------------


def test_a_new_head_on_the_same_encoder(preset):
    before, clf = weights(load(preset)), load(preset, labels=["a", "b"], seed=3)
    assert clf.labels == ["a", "b"] and clf.logits(pictures()).shape == (5, 2)
    after = weights(clf)
    for name, x in before.items():
        if name.startswith("vit."):
            np.testing.assert_array_equal(after[name], x)
    assert after["classifier.weight"].shape == (2, 16)
    assert load(preset, num_classes=7).labels == [f"LABEL_{i}" for i in range(7)]
    np.testing.assert_array_equal(
        weights(load(preset, "numpy", num_classes=2, seed=3))["classifier.weight"], after["classifier.weight"]
    )
    np.testing.assert_array_equal(load(preset).features(pictures()), clf.features(pictures()))


@pytest.mark.parametrize("kind", ["ViTModel", "Dinov2Model", "Dinov2ForImageClassification", "DeiTModel", "teacher"])
def test_heads_on_other_encoders(kind, tmp_path):
    kind = "DeiTForImageClassificationWithTeacher" if kind == "teacher" else kind
    sizes = {key: value for key, value in TINY.items() if key != "intermediate_size" or "Dino" not in kind}
    cls = getattr(transformers, kind)
    cls(cls.config_class(**sizes, num_labels=4)).save_pretrained(tmp_path)
    ImageProcessor(size=16).save(tmp_path)
    clf = load(tmp_path, num_classes=3)
    assert clf.logits(pictures()).shape == (5, 3)
    history = clf.fit((np.zeros((4, 16, 16, 3), np.uint8), [0, 1, 2, 0]), freeze_backbone=True, **QUIET)
    assert len(history.steps) == 1
    if kind.endswith("Model"):
        with pytest.raises(InputError, match="no classification head: give num_classes= or labels="):
            load(tmp_path)
    else:
        assert load(tmp_path).logits(pictures()).shape == (5, 4)


def test_what_makes_no_head(preset, tiny_preset):
    for options, message in (
        ({"num_classes": 3, "labels": ["a", "b"]}, "num_classes=3 was given beside 2 labels"),
        ({"labels": ["a", "a"]}, "labels must all be different"),
        ({"labels": "ab"}, "labels must be a list of texts"),
        ({"num_classes": 1}, "num_classes must be a whole number, 2 or more"),
    ):
        with pytest.raises(InputError, match=message):
            load(preset, **options)
    with pytest.raises(InputError, match="is a gemma3_text, which reads no images; load it as CausalLM"):
        load(tiny_preset)
    with pytest.raises(ConfigError, match="image_size 16 is no multiple of patch_size 7"):
        ImageClassifier.from_config(3, **TINY | {"patch_size": 7}, backend="torch")


def test_from_a_config_alone():
    """The scenario of those who build their own: no class token, the mean of all patches, dropout everywhere."""
    options = {
        "class_token": False, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "classifier_dropout": 0.5
    }  # fmt: skip
    first, second = fresh("torch", 10, **options), fresh("jax", 10, **options)
    assert first.config.pooling == "mean" and "vit.embeddings.cls_token" not in first.params
    np.testing.assert_allclose(first.logits(pictures()), second.logits(pictures()), atol=1e-5)
    assert first.preprocessor.output_size == (16, 16) and len(first.labels) == 10
    assert np.abs(fresh(seed=1).logits(pictures()) - fresh().logits(pictures())).max() > 1e-3


# --- training -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_curve_on_every_backend(photos):
    """Twenty steps of full training, with dropout in the blocks, in attention and before the head."""
    found = {}
    for name in TRAINING:
        clf = fresh(
            name, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, classifier_dropout=0.3
        )  # fmt: skip
        clf.compile(learning_rate=3e-3, label_smoothing=0.1, clip_norm=1.0)
        found[name] = clf.fit(photos, steps=20, augment=True, validation_split=0.3, seed=5, **QUIET)
    wanted = found.pop("torch")
    assert len(wanted.steps) == 20 and np.mean(losses(wanted)[-4:]) < losses(wanted)[0] - 0.05
    for name, history in found.items():
        np.testing.assert_allclose(losses(history), losses(wanted), atol=1e-3, err_msg=name)
        np.testing.assert_allclose(history.history["val_loss"], wanted.history["val_loss"], atol=1e-3, err_msg=name)
        assert [step["images"] for step in history.steps] == [step["images"] for step in wanted.steps]
    assert {"images_per_second", "seconds", "top5_accuracy", "accuracy"} <= set(wanted.steps[0])


@pytest.mark.parametrize("name", TRAINING)
def test_from_photos_to_a_published_model(name, photos, tmp_path):
    """Three colours are told apart; what is published is loaded by path, and by transformers."""
    clf = fresh(name)
    clf.compile(learning_rate=5e-3)
    history = clf.fit(photos, epochs=8, **QUIET)
    assert clf.labels == ["blue", "green", "red"]
    found = clf.evaluate(photos)
    assert found["accuracy"] == found["top5_accuracy"] == 1.0 and found["images"] == 18
    assert found["loss"] < losses(history)[0] / 2
    clf.publish(f"file://{tmp_path}/published", licence="apache-2.0", from_scratch=True)
    again = ImageClassifier.from_preset(f"file://{tmp_path}/published", backend=name, device="cpu")
    assert again.predict(photos / "red" / "0.png")[0][0] == "red"
    images = pictures()
    np.testing.assert_allclose(again.logits(images), clf.logits(images), atol=1e-5)
    clf.save_to_preset(tmp_path / "saved")
    np.testing.assert_allclose(theirs(tmp_path / "saved", images), clf.logits(images), atol=1e-4)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["id2label"] == {"0": "blue", "1": "green", "2": "red"} and config["label2id"]["red"] == 2
    assert 'clf.predict(["cat.jpg"], top=5)' in (tmp_path / "saved" / "README.md").read_text()


def test_steps_equal_torch(preset):
    """transformers' model, torch's AdamW and its cross entropy with smoothed labels; also with soft ones."""
    clf = load(preset)
    clf.compile(optim.AdamW(weight_decay=0.1), learning_rate=1e-3, label_smoothing=0.2)
    model = transformers.ViTForImageClassification.from_pretrained(preset)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(4, 6, 3, 16, 16)).astype(np.float32)
    hard, soft = rng.integers(0, 3, (2, 6)), rng.dirichlet(np.ones(3), (2, 6)).astype(np.float32)
    labels = [*hard, *soft]
    history = clf.fit(list(zip(pixels, labels, strict=True)), **QUIET)
    wanted = []
    for x, y in zip(pixels, labels, strict=True):
        adamw.zero_grad()
        logits = model(torch.tensor(x)).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(y), label_smoothing=0.2)
        loss.backward()
        adamw.step()
        right = (logits.argmax(1).numpy() == (y if y.ndim == 1 else y.argmax(1))).mean()
        wanted.append((loss.item(), right))
    np.testing.assert_allclose(losses(history), [loss for loss, _ in wanted], rtol=1e-4)
    np.testing.assert_allclose([step["accuracy"] for step in history.steps], [right for _, right in wanted])


def test_a_batch_cut_up_in_any_way_is_the_same(photos, monkeypatch):
    from modelhub.training.engine import TrainingEngine

    found = []
    for at_once, accumulated in ((18, 1), (4, 1), (5, 3)):
        monkeypatch.setattr(TrainingEngine, "_at_once", lambda *shape, rows=at_once: rows)
        clf = fresh(hidden_dropout_prob=0.2)
        clf.compile("sgd", learning_rate=0.05)
        history = clf.fit(photos, 2, 18 // accumulated, grad_accum=accumulated, verbose=False)
        found.append(losses(history)[0] if accumulated > 1 else losses(history))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert found[2] == pytest.approx(found[0][0], rel=0.05)  # other masks, as these are other batches


def test_the_head_alone(preset, photos):
    """The encoder sees each image once: the same numbers as going through it in every epoch."""
    runs = {}
    for how, augment in (("once", None), ("every epoch", Augment(flip=0, crop=None))):
        clf = load(preset, labels=sorted(COLOURS))
        before = weights(clf)
        clf.compile(learning_rate=0.02)
        history = clf.fit(photos, 5, freeze_backbone=True, augment=augment, validation_data=photos, **QUIET)
        changed = [name for name, x in weights(clf).items() if not np.array_equal(x, before[name])]
        assert changed == ["classifier.weight", "classifier.bias"]
        runs[how] = losses(history) + history.history["val_loss"]
    np.testing.assert_allclose(runs["once"], runs["every epoch"], rtol=1e-4)
    assert runs["once"][-1] < runs["once"][0]
    clf.freeze_backbone()
    clf.fit(photos, **QUIET)
    assert [n for n, x in weights(clf).items() if not np.array_equal(x, before[n])] == changed
    clf.freeze_backbone(False)
    clf.fit(photos, **QUIET)
    assert len([n for n, x in weights(clf).items() if not np.array_equal(x, before[n])]) == len(before)


def test_lora_with_a_new_head(preset, photos, tmp_path):
    clf = load(preset, labels=sorted(COLOURS))
    before = weights(clf)
    clf.enable_lora(2, dropout=0.1)
    assert {module.rpartition(".")[2] for module in clf.backbone.adapter.modules} == {"query", "value"}
    clf.compile(learning_rate=0.02)
    history = clf.fit(photos, 6, **QUIET)
    assert losses(history)[-1] < losses(history)[0]
    changed = {n for n, x in weights(clf).items() if n in before and not np.array_equal(x, before[n])}
    assert changed == {"classifier.weight", "classifier.bias"}
    clf.save_adapter(tmp_path / "adapter")
    again = load(preset, num_classes=len(COLOURS))
    again.load_adapter(tmp_path / "adapter")
    assert again.labels == sorted(COLOURS)
    np.testing.assert_allclose(again.logits(pictures()), clf.logits(pictures()), atol=1e-5)
    clf.save_to_preset(tmp_path / "merged")
    images = pictures()
    np.testing.assert_allclose(theirs(tmp_path / "merged", images), clf.logits(images), atol=1e-4)
    with_own_head = load(preset)
    with_own_head.enable_lora(2, targets="all-linear")
    assert not any("classifier" in module for module in with_own_head.backbone.adapter.modules)


def test_metrics_and_the_confusion_matrix(preset, photos, tmp_path):
    clf = load(preset, labels=sorted(COLOURS))
    images = [path for name in sorted(COLOURS) for path in sorted((photos / name).iterdir())]
    labels, logits = np.repeat(np.arange(3), 6), clf.logits(images)
    own = np.take_along_axis(logits, labels[:, None], 1)
    clf.compile(metrics=["accuracy", "top2_accuracy"])
    found = clf.evaluate(photos, batch_size=4)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert found["top2_accuracy"] == pytest.approx(((logits > own).sum(1) < 2).mean())
    wanted = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item()
    assert found["loss"] == pytest.approx(wanted, rel=1e-5) and found["images"] == 18
    matrix = clf.confusion_matrix(photos, tmp_path / "confusion.png", batch_size=4)
    wanted = np.zeros((3, 3), int)
    np.add.at(wanted, (labels, logits.argmax(1)), 1)
    np.testing.assert_array_equal(matrix, wanted)
    assert Image.open(tmp_path / "confusion.png").size[0] > 300
    with pytest.raises(ConfigError, match="metrics can be"):
        clf.compile(metrics=["precision"])
    with pytest.raises(ConfigError, match="label_smoothing must be at least 0 and below 1"):
        clf.compile(label_smoothing=1.0)


class Stop(Callback):
    def on_train_batch_end(self, step, logs):
        if step == 5:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_broken_off(photos, tmp_path):
    """In the middle of an epoch, with augmentation and dropout; also on another backend."""

    def run(name, **options):
        clf = fresh(name, hidden_dropout_prob=0.1)
        clf.compile(learning_rate=3e-3)
        augment = Augment(mixup=0.3, seed=2)
        return clf.fit(photos, 4, augment=augment, seed=1, save_steps=1, **QUIET | {"batch_size": 7}, **options)

    whole = losses(run("torch"))
    for name in ("torch", "jax"):
        folder = tmp_path / name
        with pytest.raises(KeyboardInterrupt):
            run("torch", checkpoint_dir=folder, callbacks=[Stop()])
        assert len(list(folder.glob("step-*"))) == 2
        found = losses(run(name, checkpoint_dir=folder))
        assert len(found) == 12
        np.testing.assert_allclose(found, whole, atol=1e-6 if name == "torch" else 1e-3)


def test_broken_photos_and_other_mistakes(photos, tmp_path, preset):
    clf = fresh()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "a" / f"{number}.png")
    (tmp_path / "b" / "broken.jpg").write_bytes(b"\xff\xd8\xff not much of a JPEG")
    two = fresh(classes=2)
    with pytest.raises(InputError, match="broken.jpg"):
        two.fit(tmp_path, **QUIET)
    for frozen in (False, True):
        with pytest.warns(UserWarning, match="skipped: .*broken.jpg"):
            history = two.fit(tmp_path, 2, on_error="skip", freeze_backbone=frozen, **QUIET)
        assert [step["images"] for step in history.steps] == [3, 3]
    images = np.zeros((4, 16, 16, 3), np.uint8)
    for data, message in (
        ((images, [0, 1, 2, 3]), "row 4: label 3 is out of range, the model has 3 classes, 0 to 2"),
        ([(np.zeros((2, 3, 16, 16)), ["a", "b"])], "labels must be numbers, found 'a'"),
        ((images, [1, 1, 1, 1]), "images of one class only .1."),
        ([(np.zeros((2, 3, 16, 16)), [0, 7])], "label 7 is out of range: the model has 3 classes"),
        (tmp_path, r"the 2 classes a, b, and the model has 3 without names"),
        ([], "the data holds no rows"),
    ):
        with pytest.raises(DataError, match=message):
            clf.fit(data, **QUIET)
    with pytest.raises(DataError, match="the model has cat, dog, fish, ...: a, b cannot be learnt"):
        load(preset).fit(tmp_path, **QUIET)
    with pytest.raises(InputError, match="18 x 18 pixels, which patches of 8 x 8 do not divide"):
        clf.fit([(np.zeros((2, 3, 18, 18)), [0, 1])], **QUIET)
    with pytest.raises(InputError, match="ready batches are taken as they come"):
        clf.fit([(np.zeros((2, 3, 16, 16)), [0, 1])], augment=True, **QUIET)
    with pytest.raises(NoGradients):
        fresh("numpy").fit(photos, **QUIET)
    clf.preprocessor = None
    with pytest.raises(InputError, match="no preprocessor_config.json"):
        clf.predict(pictures())


def test_the_best_epoch_is_kept(photos, tmp_path):
    best = BestCheckpoint(tmp_path / "model", "loss")
    fresh().fit(photos, 2, callbacks=[best], **QUIET)
    assert load(tmp_path / "model").labels == sorted(COLOURS)

    clf = fresh()
    clf.enable_lora(2)
    clf.fit(photos, 2, callbacks=[BestCheckpoint(tmp_path / "adapter", "loss")], **QUIET)
    again = fresh()
    again.load_adapter(tmp_path / "adapter")  # it holds the new head
    assert again.labels == sorted(COLOURS)
    np.testing.assert_allclose(again.logits(pictures()), clf.logits(pictures()), atol=1e-5)


def test_own_losses_and_mixed_precision(photos):
    def loss(logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels.long(), reduction="none")

    runs = []
    for settings in ({}, {"loss": loss}, {"mixed_precision": "mixed_bfloat16"}, {"remat": True}):
        clf = fresh()
        clf.compile(learning_rate=3e-3, **settings)
        runs.append(losses(clf.fit(photos, 2, **QUIET)))
    np.testing.assert_allclose(runs[1], runs[0], atol=1e-5)
    np.testing.assert_allclose(runs[2], runs[0], atol=0.05)
    np.testing.assert_allclose(runs[3], runs[0], atol=1e-5)
    assert runs[2] != runs[0]
    clf.compile(loss=lambda logits, labels: loss(logits, labels).mean())
    with pytest.raises(InputError, match="must return one loss for each image"):
        clf.fit(photos, **QUIET)


# --- the command line -----------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["modelhub", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
            raise SystemExit(0)
        shown = capsys.readouterr()
        return stopped.value.code or 0, shown.out, shown.err

    return run


@pytest.mark.slow
def test_a_folder_of_photos_in_one_command(run, preset, photos, tmp_path):
    options = ("--preset", preset, "--data", photos, "--backend", "torch")
    code, out, err = run("finetune", *options, "--output", "mine", "--learning-rate", 0.02)
    assert (code, out) == (0, "mine\n"), err
    assert "the head) on torch, cpu, for 10 steps" in err and "classify photo.jpg --preset mine" in err
    before, after = weights(load(preset)), weights(load(tmp_path / "mine"))
    assert all(np.array_equal(after[name], x) for name, x in before.items() if name.startswith("vit."))
    code, out, _ = run("classify", photos / "red" / "0.png", photos / "blue" / "1.png", "--preset", "mine", "--json")
    rows = json.loads(out)
    assert code == 0 and [len(row["labels"]) for row in rows] == [3, 3] and rows[1]["image"].endswith("1.png")
    code, out, _ = run("classify", photos / "red" / "0.png", "--preset", tmp_path / "mine", "--top", 1)
    assert code == 0 and "%" in out and rows[0]["labels"][0]["label"] in out
    address = f"file://{tmp_path}/hub/mine"
    code, out, err = run("publish", "mine", address, "--licence", "apache-2.0", "--base-model", "me/tiny")
    assert code == 0 and out.strip() == address, err
    code, out, _ = run("classify", photos / "red" / "0.png", "--preset", address, "--json")
    for found, wanted in zip(json.loads(out)[0]["labels"], rows[0]["labels"], strict=True):
        assert found["label"] == wanted["label"] and found["probability"] == pytest.approx(wanted["probability"])
    code, out, _ = run("evaluate", "--preset", "mine", "--data", photos, "--json")
    assert code == 0 and json.loads(out) == pytest.approx(load(tmp_path / "mine").evaluate(photos), rel=1e-5)
    # Its own classes are the data's: the head is kept and goes on learning.
    code, _, err = run("finetune", "--preset", "mine", "--data", photos, "--output", "more", "--full", "--steps", 1)
    assert code == 0 and "100.00%, all weights" in err
    assert np.abs(weights(load(tmp_path / "more"))["classifier.weight"] - after["classifier.weight"]).max() < 1e-3
    code, _, err = run("finetune", *options, "--output", "lora", "--rank", 2, "--steps", 1)
    assert code == 0 and load(tmp_path / "lora").labels == sorted(COLOURS)


def test_what_is_mistyped_for_images(run, preset, photos, tmp_path):
    code, _, err = run(
        "finetune", "--preset", preset, "--data", photos, "--output", "x", "--packing", "--kind", "dolly"
    )
    assert code == 1 and "the preset reads images, for which there is no packing, kind" in err
    code, _, err = run("finetune", "--preset", preset, "--data", photos / "red", "--output", "x")
    assert code == 1 and "holds no folders" in err
    code, _, err = run("classify", "absent.jpg")
    assert code == 1 and "absent.jpg: there is no such file" in err
    (tmp_path / "recipe.toml").write_text(
        f'preset = "{preset}"\noutput = "r"\n[fit]\non_error = "skip"\nsteps = 1\n'
        "augment = { crop = [0.5, 1.0], mixup = 0.2 }\n[compile]\nlabel_smoothing = 0.1\n"
    )
    code, out, err = run("finetune", "recipe.toml", "--data", photos, "--backend", "torch")
    assert (code, out) == (0, f"{tmp_path / 'r'}\n"), err
    assert json.loads((tmp_path / "r" / "modelhub.json").read_text())["runs"][0]["settings"]["augment"]["mixup"] == 0.2
    (tmp_path / "recipe.toml").write_text('[fit]\non_error = "ignore"\naugment = { crops = 1 }\n')
    code, _, err = run("finetune", "recipe.toml")
    assert code == 1 and "on_error in [fit] must be raise or skip, found 'ignore'" in err


def test_the_bundled_recipe(run, preset, photos):
    code, out, err = run("finetune", "vit_head", "--preset", preset, "--data", photos, "--backend", "torch")
    assert (code, out) == (0, "vit_head\n"), err
    assert "for 20 steps" in err and "val_accuracy" in err


def test_text_keeps_its_own(tiny_preset):
    lm = CausalLM.from_preset(tiny_preset, backend="torch", device="cpu")
    assert lm.fit(["The river runs past the old mill."], verbose=False).steps[0]["tokens"] > 5
