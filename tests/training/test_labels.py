"""One rule for labels in every reader: a text is a name, a number a position; what is missing or out of range is said."""

import datasets
import numpy as np
import pandas
import pytest
import tensorflow as tf
import torch
from PIL import Image

from modelhub import ImageClassifier
from modelhub.core.backends import installed
from modelhub.errors import DataError
from modelhub.training.image_examples import read_examples
from modelhub.training.labels import read_labels

TINY = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "image_size": 8,
    "patch_size": 8,
}  # fmt: skip


def fresh(labels=None, classes=None, name="torch"):
    return ImageClassifier.from_config(classes, labels=labels, **TINY, backend=name, device="cpu")


NAMES = ["1", "10", "2"]  # as folders are sorted: the place of "2" is 2, of "10" 1, and of "1" 0


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder per class; the label of each image can be told from its first pixel."""
    folder = tmp_path_factory.mktemp("data")
    for place, name in enumerate(NAMES):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8), (place * 100, 0, 0)).save(folder / "photos" / name / f"{number}.png")
    return folder


def everywhere(folder):
    """The same images and names, from every reader."""
    rows = [{"image": f"photos/{name}/{i}.png", "label": name} for name in NAMES for i in range(2)]
    frame = pandas.DataFrame(rows)
    frame.to_csv(folder / "rows.csv", index=False)
    frame.to_csv(folder / "rows.tsv", index=False, sep="\t")
    frame.to_json(folder / "rows.jsonl", orient="records", lines=True)
    frame.to_json(folder / "rows.json", orient="records")
    frame.to_parquet(folder / "rows.parquet")
    whole = [row | {"image": str(folder / row["image"])} for row in rows]
    paths, names = [row["image"] for row in whole], [row["label"] for row in whole]
    label = datasets.ClassLabel(names=["2", "1", "10"])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    declared = datasets.Dataset.from_dict({"image": paths, "label": label.str2int(names)}, features=features)
    return {
        "folder": folder / "photos", "csv": folder / "rows.csv", "tsv": folder / "rows.tsv",
        "jsonl": folder / "rows.jsonl", "json": folder / "rows.json", "parquet": folder / "rows.parquet",
        "frame": pandas.DataFrame(whole), "list": whole, "pairs": list(zip(paths, names, strict=True)),
        "arrow": datasets.Dataset.from_list(whole).data.table, "dataset": datasets.Dataset.from_list(whole),
        "declared": declared, "arrays": (images, names), "series": (images, pandas.Series(names)),
        "numpy's texts": (images, np.array(names)), "positions": (images, [NAMES.index(name) for name in names]),
        "batches": [(images[:4], names[:4]), (images[4:], names[4:])],
        "loader": torch.utils.data.DataLoader(list(zip(images, names, strict=True)), batch_size=4),
        "tf.data": tf.data.Dataset.from_tensor_slices((images, names)).batch(4),
    }  # fmt: skip


def test_classes_named_by_numbers_are_the_same_from_every_reader(photos):
    clf = fresh(NAMES)
    for name, data in everywhere(photos).items():
        if name == "positions":
            with pytest.raises(DataError, match=r"label 1 may be the class named '1', at position 0, or position 1"):
                clf.evaluate(data)
            continue
        matrix = clf.confusion_matrix(data)
        assert matrix.sum(1).tolist() == [2, 2, 2], name
        # The images of a class are all alike, and so is what they are taken for.
        wanted = np.zeros((3, 3), int)
        logits = clf.logits([np.full((8, 8, 3), (place * 100, 0, 0), np.uint8) for place in range(3)])
        np.add.at(wanted, (np.arange(3), logits.argmax(1)), 2)
        np.testing.assert_array_equal(matrix, wanted, err_msg=name)


def test_names_that_are_numbers_are_learnt_by_a_model_without_names(photos):
    data = everywhere(photos)
    for name in ("folder", "csv", "jsonl", "frame"):
        clf = fresh(classes=3)
        clf.fit(data[name], verbose=False)
        assert clf.labels == NAMES, name
    clf = fresh(classes=11)  # ten is a position here
    clf.fit(data["csv"], verbose=False)
    assert clf.labels[10] == "LABEL_10"


def test_digits_in_files_of_text_are_positions_where_no_class_has_such_a_name(photos):
    (photos / "digits.csv").write_text("image,label\n" + "".join(f"photos/10/0.png,{i}\n" for i in (2, 0, 1)))
    for labels in (["a", "b", "c"], ["0", "1", "2"]):
        assert fresh(labels).confusion_matrix(photos / "digits.csv").sum(1).tolist() == [1, 1, 1]
    with pytest.raises(DataError, match=r"digits.csv has the 3 classes 0, 1, 2, and the model has 1, 10, 2"):
        fresh(NAMES).evaluate(photos / "digits.csv")


def test_positions_of_tensors_stand_and_are_warned_of(photos, caplog):
    images = np.zeros((3, 8, 8, 3), np.uint8)
    clf = fresh(NAMES)
    caplog.set_level("WARNING", "modelhub")
    assert clf.confusion_matrix([(images, torch.tensor([0, 1, 2]))]).sum(1).tolist() == [1, 1, 1]
    assert "1 is the class '10', not '1'; give names as texts" in caplog.text
    caplog.clear()
    clf.confusion_matrix([(images, torch.tensor([0, 0, 0]))])
    fresh(["0", "1", "2"]).confusion_matrix([(images, torch.tensor([0, 1, 2]))])
    assert not caplog.text


@pytest.mark.parametrize("name", installed())
def test_out_of_range_is_an_error_before_anything_is_looked_up(photos, name):
    clf = fresh(["cat", "dog", "eel"], name=name)
    images, floats = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 3, 8, 8), np.float32)
    label = datasets.ClassLabel(names=["cat", "dog", "eel"])
    path = str(photos / "photos" / "1" / "0.png")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    table = pandas.DataFrame({"image": [path] * 2, "label": [0, 7]})
    table.to_csv(photos / "seven.csv", index=False)
    table.to_parquet(photos / "seven.parquet")
    dataset = datasets.Dataset.from_dict({"image": [path] * 2, "label": [1, -1]}, features=features)
    wrong = {
        "row 2: label 3 is out of range, the model has 3 classes, 0 to 2; load it with num_classes=4": (images, [2, 3]),
        r"0 to 2. The data have 2 different labels, up to 7.*labels=\[...\], and the labels as texts": (images, [0, 7]),
        "row 2: label -1 is out of range.*0 to 2; -1 means no label in many data sets": (images, [0, -1]),
        r"the data, row 1 .counted from 0.: label -1": [{"image": path, "label": x} for x in (0, -1)],
        r"the data, row 2: label 7": table,
        r"seven.csv, row 2: label 7.*: if they are names, load the model with labels=\['0', '7'\]": photos
        / "seven.csv",
        "seven.parquet, row 2: label 7": photos / "seven.parquet",
        r"dataset, row 1 .counted from 0.: label -1 is none of its 3 classes.*leave those rows out": dataset,
        "batch 1 of epoch 1: label 3 is out of range: the model has 3 classes": [(floats, np.array([0, 3]))],
        "batch 1 of epoch 1: label -1 is out of range": [(floats, torch.tensor([0, -1]))],
        "label -100 is out of range": [(floats, tf.constant([0, -100]))],
        "label 4294967296 is out of range": [(floats, np.array([0, 2**32]))],  # 0 as int32
        "soft labels of 2 classes": [(floats, np.full((2, 2), 0.5))],
    }
    for message, data in wrong.items():
        for use in (clf.evaluate, clf.confusion_matrix):
            with pytest.raises(DataError, match=message):
                use(data)
        if name != "numpy":
            with pytest.raises(DataError, match=message):
                clf.fit(data, verbose=False)


@pytest.mark.parametrize("empty", [None, float("nan"), pandas.NA, pandas.NaT, np.float32("nan"), "", "  "])
def test_a_missing_label_is_told_with_its_row(tmp_path, empty):
    rows = [{"image": f"{name}.png", "label": label} for name, label in zip("abc", ("cat", "dog", empty), strict=True)]
    frame = pandas.DataFrame(rows)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    for data, message in (
        (frame, "^row 3 has no label"),
        (rows, r"^row 2 has no label .rows are counted from 0."),
        ((row for row in rows), "^row 3 has no label"),
        ((["a", "b", "c"], [row["label"] for row in rows]), "the labels, row 3 has no label"),
        (tmp_path / "rows.csv", r"rows.csv, row 3 .line 4. has no label"),
    ):
        with pytest.raises(DataError, match=message):
            read_examples(data)
    frame["label"] = frame["image"]
    frame.loc[1, "image"] = None
    with pytest.raises(DataError, match="^row 2 has no image"):
        read_examples(frame)


def test_a_missing_label_among_numbers_is_told_with_its_row(tmp_path):
    frame = pandas.DataFrame({"image": ["a.png", "b.png", "c.png"], "label": [0, None, 2]})  # pandas makes it floats
    frame.to_parquet(tmp_path / "rows.parquet")
    datasets_own = datasets.Dataset.from_pandas(frame)
    for data, message in (
        (frame, "^row 2 has no label"),
        (tmp_path / "rows.parquet", "rows.parquet, row 2 has no label"),
        (datasets_own, r"the dataset, row 1.* has no label"),
        ((["a", "b", "c"], np.array([0, np.nan, 2])), "the labels, row 2 has no label"),
    ):
        with pytest.raises(DataError, match=message):
            read_examples(data)
    assert read_examples(frame.dropna())[0].numbered(3, None).labels.tolist() == [0, 2]


def test_the_odd_label_is_shown():
    def place(row):
        return f"row {row}"

    for values, message in (
        (["red", "blue", 1], "row 0 has 'red', row 2 has 1"),
        ([[0.5, 0.5], [1.0]], r"row 0 has \[0.5, 0.5\], row 1 has \[1.0\]"),
        ([["red"], "blue"], r"row 0 has \['red'\], row 1 has 'blue'"),
        ([[], []], r"row 0 has \[\]"),
    ):
        with pytest.raises(DataError, match=f"labels must all be texts, all be numbers.*{message}"):
            read_labels(values, "the data", place)
    assert read_labels([True, False], "the data", place).values.tolist() == [1, 0]
    assert read_labels([b"red", b"blue"], "the data", place).classes == ["blue", "red"]
