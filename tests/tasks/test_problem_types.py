"""problem_type decides activation, loss and metrics: everything against transformers and its pipeline."""

import ast
import re

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import modelhub
from modelhub import ImageClassifier, losses
from modelhub.core.backends import installed
from modelhub.errors import ConfigError, DataError, InputError

TRAINING = [name for name in installed() if name != "numpy"]
MULTI, REGRESSION, SINGLE = "multi_label_classification", "regression", "single_label_classification"
NAMES = ["cat", "dog", "indoor"]
TINY = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
CASES = {
    "several": (NAMES, MULTI), "one yes or no": (["defect"], MULTI), "one, not said": (["defect"], None),
    "numbers": (["x", "y"], REGRESSION), "one number": (["age"], REGRESSION), "one label": (NAMES, SINGLE),
    "not said": (NAMES, None),
}  # fmt: skip
PIXELS = np.random.default_rng(0).normal(size=(5, 3, 16, 16)).astype(np.float32)
LABELS = {
    "several": np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]], np.float32),
    "one yes or no": np.array([[1], [0], [0], [1], [1]], np.float32),
    "one, not said": np.array([0.5, 1.5, -1.0, 2.0, 0.0], np.float32),
    "numbers": np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32),
    "one number": np.array([0.5, 1.5, -1.0, 2.0, 0.0], np.float32),
    "one label": np.array([0, 2, 1, 1, 0]),
    "not said": np.array([0, 2, 1, 1, 0]),
}


@pytest.fixture(scope="module")
def presets(tmp_path_factory):
    folders = {}
    for case, (names, problem) in CASES.items():
        folders[case] = tmp_path_factory.mktemp("presets") / "vit"
        torch.manual_seed(0)
        labels = dict(enumerate(names))
        config = transformers.ViTConfig(
            **TINY, id2label=labels, label2id={name: i for i, name in labels.items()}, problem_type=problem
        )
        model = transformers.ViTForImageClassification(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3)
        model.save_pretrained(folders[case])
        transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folders[case])
    return folders


def load(folder, name="torch", **options):
    return ImageClassifier.from_preset(folder, backend=name, device="cpu", **options)


def theirs(folder):
    return transformers.AutoModelForImageClassification.from_pretrained(folder)


def test_the_cards_code_shows_what_the_model_means(presets, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / "cat.jpg")
    for case, folder in presets.items():
        clf = load(folder)
        clf.save_to_preset(tmp_path / case)
        card = (tmp_path / case / "README.md").read_text()
        ours, theirs = (
            code.replace("path/to/this/folder", str(tmp_path / case)).replace("cat.jpg", str(tmp_path / "cat.jpg"))
            for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        )
        exec(ours, {})
        shown = dict(ast.literal_eval(capsys.readouterr().out)[0])
        exec(theirs, {})
        said = capsys.readouterr().out.strip()
        if clf.config.problem_type == REGRESSION:
            np.testing.assert_allclose(ast.literal_eval(said), [shown[label] for label in clf.labels], atol=1e-4)
        elif clf.config.problem_type == MULTI:
            found = ast.literal_eval(said)
            assert found.keys() == shown.keys()
            np.testing.assert_allclose([*found.values()], [shown[label] for label in found], atol=1e-4)
        else:
            assert said == max(shown, key=shown.get)


def test_an_adapters_card_asks_for_a_head_of_its_kind(presets, tmp_path):
    clf = load(presets["several"], labels=["a", "b", "c"], problem_type=MULTI)
    clf.enable_lora(rank=2)
    clf.save_adapter(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert 'num_classes=3, problem_type="multi_label_classification")' in card and ".sigmoid()" in card


@pytest.mark.parametrize("name", installed())
def test_what_is_shown_and_the_loss_equal_transformers(presets, name):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    for case, folder in presets.items():
        clf, model = load(folder, name), theirs(folder)
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        pipeline = transformers.pipeline("image-classification", model=model, image_processor=processor)
        found = clf.predict(image)
        wanted = pipeline(image)
        assert [label for label, _ in found] == [entry["label"] for entry in wanted], case
        np.testing.assert_allclose(
            [score for _, score in found], [entry["score"] for entry in wanted], atol=1e-4, err_msg=case
        )
        labels = LABELS[case]
        with torch.no_grad():
            output = model(torch.tensor(PIXELS), labels=torch.tensor(labels))
        # Two batches of other sizes, the second filled up: the same mean.
        measured = clf.evaluate([(PIXELS[:3], labels[:3]), (PIXELS[3:], labels[3:])])
        assert measured["loss"] == pytest.approx(output.loss.item(), rel=1e-4), case
        logits = output.logits.numpy()
        if clf.config.problem_type == MULTI:
            right = (logits > 0) == (labels >= 0.5)
            assert measured["accuracy"] == pytest.approx(right.mean())
            assert measured["exact_match"] == pytest.approx(right.all(1).mean())
        elif case in ("one label", "not said"):
            assert measured["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
        else:
            error = abs(logits - labels.reshape(logits.shape))
            assert measured["mae"] == pytest.approx(error.mean(), rel=1e-4)


@pytest.mark.parametrize("case", ["several", "numbers", "one number"])
def test_steps_equal_torch_on_every_backend(presets, case):
    model, labels = theirs(presets[case]), LABELS[case]
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    wanted = []
    for _ in range(3):
        adamw.zero_grad()
        loss = model(torch.tensor(PIXELS), labels=torch.tensor(labels)).loss
        loss.backward()
        adamw.step()
        wanted.append(loss.item())
    for name in TRAINING:
        clf = load(presets[case], name)
        clf.compile(learning_rate=1e-3)
        history = clf.fit([(PIXELS, labels)] * 3, verbose=False)
        np.testing.assert_allclose([step["loss"] for step in history.steps], wanted, rtol=1e-3, err_msg=name)


def test_losses_of_ones_own_loop_equal_transformers(presets):
    for case, folder in presets.items():
        names, problem = CASES[case]
        model = theirs(folder)
        problem = problem or (REGRESSION if len(names) == 1 else SINGLE)
        logits, labels = model(torch.tensor(PIXELS)).logits.detach(), torch.tensor(LABELS[case])
        wanted = model(torch.tensor(PIXELS), labels=labels).loss.item()
        assert float(losses.classification_loss(logits, labels, problem)) == pytest.approx(wanted, rel=1e-5), case
        assert float(losses.classification_loss(logits.numpy(), labels.numpy(), problem)) == pytest.approx(wanted)
        rows = losses.classification_loss(logits, labels, problem, reduction="none")
        assert rows.shape == (5,) and float(rows.mean()) == pytest.approx(wanted, rel=1e-5)
        net = modelhub.to_torch(load(folder))
        assert net(torch.tensor(PIXELS), labels=labels).loss.item() == pytest.approx(wanted, rel=1e-4)
        halves = net(torch.tensor(PIXELS), labels=labels, num_items_in_batch=10).loss.item()
        assert halves == pytest.approx(wanted / 2, rel=1e-4)
    with pytest.raises(InputError, match="problem_type must be one of"):
        losses.classification_loss(logits, labels, "several")
    with pytest.raises(InputError, match="labels must have the logits' shape"):
        losses.classification_loss(np.zeros((2, 3)), np.zeros((2, 2)), MULTI)


def test_smoothed_labels_of_several_are_keras(presets):
    import keras

    logits, labels = np.random.default_rng(0).normal(size=(4, 3)), LABELS["several"][:4]
    wanted = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.2)(labels, logits)
    assert float(losses.classification_loss(logits, labels, MULTI, label_smoothing=0.2)) == pytest.approx(float(wanted))


@pytest.mark.skipif("tensorflow" not in installed(), reason="needs tensorflow")
def test_exported_probabilities(presets, tmp_path):
    import tensorflow as tf

    for case in ("several", "one, not said", "numbers", "one label"):
        clf = load(presets[case], "tensorflow")
        folder = modelhub.to_saved_model(clf, tmp_path / case)
        found = tf.saved_model.load(str(folder)).signatures["serving_default"](pixel_values=tf.constant(PIXELS))
        shown = clf.predict({"pixel_values": PIXELS})
        for row, labels in zip(found["probabilities"].numpy(), shown, strict=True):
            np.testing.assert_allclose(row, [dict(labels)[name] for name in clf.labels], atol=1e-5, err_msg=case)


# --- data -----------------------------------------------------------------------------------------------------


def fresh(problem=None, **options):
    classes = {"labels": NAMES} | options
    return ImageClassifier.from_config(**classes, **TINY, problem_type=problem, backend="torch", device="cpu")


IMAGES = [Image.fromarray(x) for x in np.random.default_rng(2).integers(0, 255, (4, 16, 16, 3), np.uint8)]
HOT = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]], np.float32)
LISTS = [["cat", "dog"], ["indoor", "dog"], [], ["cat", "dog", "indoor"]]


def test_several_labels_from_every_reader(tmp_path):
    import datasets
    import pandas

    for number, image in enumerate(IMAGES):
        image.save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    rows = [{"image": path, "labels": names} for path, names in zip(paths, LISTS, strict=True)]
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    pandas.DataFrame(rows).to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    label = datasets.ClassLabel(names=["indoor", "dog", "cat"])  # in another order than the model's
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.List(label)})
    numbers = [[label.str2int(name) for name in names] for names in LISTS]
    data = {
        "lists": rows,
        "frame": pandas.DataFrame(rows),
        "parquet": tmp_path / "rows.parquet",
        "jsonl": tmp_path / "rows.jsonl",
        "dataset": datasets.Dataset.from_dict({"image": paths, "labels": numbers}, features=features),
        "arrays": (IMAGES, HOT),
        "whole numbers": (IMAGES, HOT.astype(int).tolist()),
        "batches": [(IMAGES, HOT)],
        "batches of names": [(IMAGES, LISTS)],
    }
    clf = fresh(MULTI)
    wanted = clf.evaluate(data["arrays"])
    assert wanted["images"] == 4
    for name, given in data.items():
        assert clf.evaluate(given) == pytest.approx(wanted), name
    matrix = clf.confusion_matrix(data["lists"])
    logits = clf.logits(IMAGES)
    for column in range(3):
        yes, taken = HOT[:, column] > 0, logits[:, column] > 0
        counts = [[(~yes & ~taken).sum(), (~yes & taken).sum()], [(yes & ~taken).sum(), (yes & taken).sum()]]
        np.testing.assert_array_equal(matrix[column], counts)


def test_the_first_data_decide_where_nothing_is_said(tmp_path):
    clf = fresh()
    with pytest.raises(DataError, match="several labels a row, or none, and the model has one.*multi_label"):
        clf.evaluate((IMAGES, HOT))
    clf.fit((IMAGES, HOT), verbose=False, validation_data=(IMAGES, HOT))
    assert clf.config.problem_type == MULTI
    clf.save_to_preset(tmp_path / "saved")
    assert theirs(tmp_path / "saved").config.problem_type == MULTI
    assert load(tmp_path / "saved").config.problem_type == MULTI
    assert load(tmp_path / "saved", labels=["a", "b"]).config.problem_type is None  # a new head begins anew
    # Shares that sum to 1 stay what they were: one label, softly.
    clf = fresh()
    clf.fit((IMAGES, np.full((4, 3), 1 / 3, np.float32)), verbose=False, steps=1)
    assert clf.config.problem_type is None
    one = fresh(REGRESSION, labels=None, num_classes=1)
    history = one.fit((IMAGES, [20, 31.5, 47, 8]), epochs=2, verbose=False)
    assert history.history["mae"][1] < history.history["mae"][0] and len(one.predict(IMAGES[0])) == 1


def test_what_makes_no_sense_is_said():
    cases = [
        (MULTI, (IMAGES, HOT[:, :2]), "labels for 2 classes, and the model has 3"),
        (MULTI, (IMAGES, HOT * 2), "several labels are 0 or 1 for each class"),
        (MULTI, (IMAGES, [["cat"], ["fish"], [], []]), "fish cannot be learnt"),
        (MULTI, [(IMAGES, HOT[:, :2])], "labels for 2 classes"),
        (SINGLE, (IMAGES, HOT), "several labels a row, or none"),
        (SINGLE, [(IMAGES, HOT)], "several labels a row, or none"),
        (SINGLE, (IMAGES, [0.5, 1, 2, 0]), "label 0.5 is no class.*problem_type='regression'"),
        (REGRESSION, (IMAGES, [1.0, 2.0, 3.0, 4.0]), "1 numbers a row, and the model has 3 outputs"),
        (REGRESSION, (IMAGES, [["cat"], [], [], []]), "lists of names as labels; regression learns numbers"),
        (REGRESSION, (IMAGES, [[1, 2, np.inf]] * 4), "is no finite number"),
    ]
    for problem, data, message in cases:
        with pytest.raises(DataError, match=message):
            fresh(problem).fit(data, verbose=False)
    with pytest.raises(InputError, match="problem_type must be one of"):
        fresh("multi")
    with pytest.raises(InputError, match="2 or more, got 1; one output is for a number, problem_type='regression'"):
        fresh(labels=None, num_classes=1)
    with pytest.raises(ConfigError, match="metrics can be 'accuracy' and 'exact_match' for problem_type"):
        fresh(MULTI).compile(metrics=["top5_accuracy"])
    with pytest.raises(ConfigError, match="label_smoothing is for classes"):
        fresh(REGRESSION).compile(label_smoothing=0.1)
    with pytest.raises(InputError, match="a confusion matrix counts classes"):
        fresh(REGRESSION).confusion_matrix((IMAGES, np.zeros((4, 3))))


def test_mixed_images_of_several_labels_learn_on(tmp_path):
    clf = fresh(MULTI)
    history = clf.fit((IMAGES, HOT), epochs=2, augment=modelhub.Augment(mixup=0.4), verbose=False)
    assert all(np.isfinite(step["loss"]) for step in history.steps)
    head = fresh(MULTI)
    head.fit((IMAGES, HOT), epochs=3, freeze_backbone=True, verbose=False)  # through the features, kept once
    assert head.config.problem_type == MULTI
