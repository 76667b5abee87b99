"""Images and labels out of whatever users have: folders, tables, arrays, datasets, loaders of other frameworks."""

import csv
import io
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import datasets
import numpy as np
import pytest
import tensorflow as tf
import torch
from PIL import Image

from modelhub import Augment
from modelhub.errors import DataError, InputError
from modelhub.processing.image import ImageProcessor
from modelhub.training.image_examples import read_examples
from modelhub.training.images import ImageBatches, ReadyImages, prefetched

PROCESSOR = ImageProcessor(size=8)
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder per colour with five pictures each, of different sizes, and what else lies about."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (9 + number, 12), colour).save(folder / name / f"{number}.png")
    (folder / "red" / ".hidden.png").write_bytes(b"")
    (folder / "red" / "notes.txt").write_text("not an image")
    (folder / ".cache").mkdir()
    return folder


def batches(data, size=4, **options):
    examples, _ = read_examples(data)
    classes = len(examples.classes) if examples.classes else int(examples.labels.max()) + 1
    return ImageBatches(examples.numbered(classes, None), PROCESSOR, classes, size, **options)


def colour_of(pixels):
    """Which channel is the brightest, of each image; blue is 0."""
    return 2 - pixels.mean(axis=(2, 3)).argmax(1)


# --- examples -------------------------------------------------------------------------------------------------


def test_a_folder_per_class(photos):
    examples, _ = read_examples(photos)
    assert examples.classes == ["blue", "green", "red"] and len(examples) == 15
    assert np.bincount(examples.labels).tolist() == [5, 5, 5]
    assert all(
        f"/{examples.classes[label]}/" in path for path, label in zip(examples.sources, examples.labels, strict=True)
    )
    for batch in batches(photos).epoch(0):
        real = batch["weights"] > 0
        np.testing.assert_array_equal(colour_of(batch["pixels"][real]), batch["labels"][real])


def test_what_is_wrong_with_a_folder_is_said(tmp_path, photos):
    with pytest.raises(DataError, match="holds no folders: images of one class belong into a folder"):
        read_examples(photos / "red")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train holds no images.*it holds folders such as cat: give .*train itself"):
        read_examples(tmp_path)
    with pytest.raises(DataError, match=r"train.cat holds no images: an empty class cannot be learnt"):
        read_examples(tmp_path / "train")
    with pytest.raises(DataError, match="no such file"):
        read_examples(tmp_path / "absent.csv")


def test_tables_of_paths(tmp_path, photos):
    rows = [{"path": f"photos/{name}/{i}.png", "label": name} for name in COLOURS for i in range(2)]
    (tmp_path / "photos").symlink_to(photos)
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label"])
        writer.writeheader()
        writer.writerows(rows)
    numbers = {name: number for number, name in enumerate(COLOURS)}
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"file_name": row["path"], "class": numbers[row["label"]]}) for row in rows)
    )
    named, _ = read_examples(tmp_path / "rows.csv")
    counted, _ = read_examples(str(tmp_path / "rows.jsonl"))
    assert named.classes == sorted(COLOURS) and counted.classes is None
    np.testing.assert_array_equal(named.labels, counted.labels)
    for data in ("rows.csv", "rows.jsonl"):
        (batch,) = batches(tmp_path / data, 6).epoch(0)
        np.testing.assert_array_equal(colour_of(batch["pixels"]), batch["labels"])
    (tmp_path / "digits.csv").write_text("path,label\na.png,0\nb.png,10\n")  # numbers, not names
    digits, _ = read_examples(tmp_path / "digits.csv")
    assert digits.classes is None and digits.labels.tolist() == [0, 10]
    with pytest.raises(
        DataError, match=r"digits.csv, row 2: label 10 is out of range, the model has 3 classes, 0 to 2"
    ):
        digits.numbered(3, None)
    (tmp_path / "odd.csv").write_text("photo,label\na.png,0\n")
    with pytest.raises(DataError, match=r"odd.csv, row 1 .line 2. has the columns photo, label; one of image, path"):
        read_examples(tmp_path / "odd.csv")


def test_labels_by_the_models_names():
    rows = [("a.png", name) for name in ("red", "blue", "red")]
    examples, _ = read_examples(rows)
    assert examples.numbered(2, None).labels.tolist() == [1, 0, 1]
    assert examples.numbered(3, ["red", "green", "blue"]).labels.tolist() == [0, 2, 0]
    with pytest.raises(DataError, match=r"the 2 classes blue, red, and the model has red, .*: blue cannot be learnt"):
        examples.numbered(2, ["red", "green"])
    with pytest.raises(DataError, match="the model has 3 without names"):
        examples.numbered(3, None)
    with pytest.raises(DataError, match=r"labels must all be texts, all be numbers.*row 0 has 'red'"):
        read_examples([("a.png", "red"), ("b.png", 1)])
    with pytest.raises(DataError, match="row 1 has no label"):
        read_examples([{"image": "a.png", "label": 0}, {"image": "b.png", "label": None}])


@pytest.mark.parametrize("kind", ["numpy", "channels first", "torch", "list of dicts", "pairs", "generator"])
def test_images_in_memory(kind):
    labels = np.array([0, 1, 2, 2, 1])
    images = np.zeros((5, 10, 10, 3), np.uint8)
    images[np.arange(5), :, :, 2 - labels] = 255
    data = {
        "numpy": (images, labels),
        "channels first": (np.moveaxis(images, 3, 1), labels.tolist()),
        "torch": (torch.tensor(images), torch.tensor(labels)),
        "list of dicts": [{"image": Image.fromarray(x), "label": int(y)} for x, y in zip(images, labels, strict=True)],
        "pairs": list(zip(images, labels, strict=True)),
        "generator": ({"image": x, "label": y} for x, y in zip(images, labels, strict=True)),
    }[kind]
    (batch,) = batches(data, 5, shuffle=False).epoch(0)
    np.testing.assert_array_equal(batch["labels"], labels)
    np.testing.assert_array_equal(colour_of(batch["pixels"]), labels)
    assert batch["pixels"].dtype == np.float32 and batch["labels"].dtype == np.int32


def test_hugging_face_datasets(photos):
    rows = {"image": [str(photos / name / "1.png") for name in COLOURS], "label": [2, 0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["g", "r", "b"])})
    data = datasets.Dataset.from_dict(rows, features=features)
    examples, _ = read_examples(data)
    assert examples.classes == ["g", "r", "b"] and examples.labels.tolist() == [2, 0, 1]
    assert examples.fingerprint is not None
    (batch,) = batches(data, 3, shuffle=False).epoch(0)
    np.testing.assert_array_equal(colour_of(batch["pixels"]), [0, 1, 2])
    streamed, _ = read_examples(data.to_iterable_dataset())
    assert streamed.labels.tolist() == [2, 0, 1]
    rows = {"image": [{"bytes": b"no image", "path": None}] * 4, "label": [0, 1, 2, 0]}
    broken = datasets.Dataset.from_dict(rows, features=features)
    with pytest.raises(InputError, match=r"row \d of the dataset is not an image"):
        list(batches(broken).epoch(0))


def test_a_share_of_each_class_is_held_out(photos):
    examples, _ = read_examples(photos)
    train, held = examples.split(0.4, seed=1)
    assert np.bincount(train.labels).tolist() == [3, 3, 3] and np.bincount(held.labels).tolist() == [2, 2, 2]
    paths = [[part.sources[i] for i in range(len(part))] for part in (train, held)]
    assert sorted(sum(paths, [])) == sorted(examples.sources)
    again = examples.split(0.4, seed=1)[1]
    assert [again.sources[i] for i in range(6)] == paths[1] and again.fingerprint == held.fingerprint
    assert held.fingerprint != train.fingerprint != examples.fingerprint
    with pytest.raises(InputError, match=r"validation_split=0.01 of 15 images leaves one of the two parts empty"):
        examples.split(0.01, seed=0)


# --- batches --------------------------------------------------------------------------------------------------


def test_order_and_shapes(photos):
    source = batches(photos, 4, seed=3)
    assert source.steps(0) == 4
    epochs = [list(source.epoch(n)) for n in (0, 0, 1)]
    for batch in epochs[0]:
        assert batch["pixels"].shape == (4, 3, 8, 8) and batch["weights"].shape == batch["labels"].shape == (4,)
    assert [batch["weights"].sum() for batch in epochs[0]] == [4, 4, 4, 3]  # the last one is filled up
    order = [np.concatenate([batch["labels"] for batch in epoch]).tolist() for epoch in epochs]
    assert order[0] == order[1] != order[2]
    later = list(source.epoch(1, start=2))
    assert len(later) == 2
    for found, wanted in zip(later, epochs[2][2:], strict=True):
        np.testing.assert_array_equal(found["pixels"], wanted["pixels"])
    assert "15 images of 3 classes, at least 5 of each" in str(source.report())


def test_broken_images_are_named(tmp_path, photos):
    rows = [(str(photos / "red" / "1.png"), 0), (str(tmp_path / "cut.png"), 1), (str(photos / "blue" / "1.png"), 1)]
    whole = (photos / "red" / "2.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut.png"):
        list(batches(rows).epoch(0))
    with pytest.warns(UserWarning, match="skipped: .*cut.png"):
        (batch,) = batches(rows, shuffle=False, on_error="skip").epoch(0)
    assert batch["weights"].tolist() == [1, 1, 0, 0] and batch["labels"][:2].tolist() == [0, 1]
    assert not batch["pixels"][2:].any()


def test_augmentation_depends_on_seed_and_epoch_alone(photos):
    options = {"augment": Augment(crop=(0.3, 0.6), jitter=(0.4, 0.4, 0.4, 0.1), mixup=0.4), "seed": 1}
    source = batches(photos, 15, **options)
    (first,), (again,), (other,) = source.epoch(0), batches(photos, 15, **options).epoch(0), source.epoch(1)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert first["labels"].shape == (15, 3)
    np.testing.assert_allclose(first["labels"].sum(1), 1, atol=1e-6)
    assert np.abs(first["pixels"] - other["pixels"]).max() > 0.1
    (plain,) = batches(photos, 15, seed=1).epoch(0)
    assert np.abs(first["pixels"] - plain["pixels"]).max() > 0.1


def test_features_in_place_of_pixels(photos):
    source = batches(photos, 4, seed=3)
    pooled = np.arange(15, dtype=np.float32)[:, None]
    other = ImageBatches(source.examples, PROCESSOR, 3, 4, seed=3, pooled=pooled)
    for found, wanted in zip(other.epoch(2), source.epoch(2), strict=True):
        np.testing.assert_array_equal(found["labels"], wanted["labels"])
        np.testing.assert_array_equal(found["weights"], wanted["weights"])
        real = found["weights"] > 0
        np.testing.assert_array_equal(
            source.examples.labels[found["pooled"][real, 0].astype(int)], found["labels"][real]
        )


def test_prefetching_works_ahead_and_lets_go():
    made = []

    def items():
        for number in range(6):
            made.append(number)
            yield number
        raise DataError("the end of it")

    stream = prefetched(items())
    assert next(stream) == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [0, 1, 2]  # two are made while the caller works on the first
    with pytest.raises(DataError, match="the end of it"):
        list(stream)
    stream = prefetched(items())
    next(stream)
    stream.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


# --- ready batches --------------------------------------------------------------------------------------------


def ready(data, channels=3):
    examples, data = read_examples(data)
    assert examples is None
    return list(ReadyImages(data, PROCESSOR, channels).epoch(0))


LABELS = np.array([0, 1, 2, 2, 1, 0, 1])
PIXELS = np.random.default_rng(0).normal(size=(7, 3, 8, 8)).astype(np.float32)


def test_batches_of_every_framework_are_the_same():
    import jax.numpy as jnp

    last = np.ascontiguousarray(np.moveaxis(PIXELS, 1, 3))
    dataset = torch.utils.data.TensorDataset(torch.tensor(PIXELS), torch.tensor(LABELS))
    cut = [slice(0, 3), slice(3, 6), slice(6, 7)]
    sources = {
        "torch": torch.utils.data.DataLoader(dataset, batch_size=3),
        "tensorflow": tf.data.Dataset.from_tensor_slices((last, LABELS)).batch(3),
        "jax": [(jnp.asarray(PIXELS[part]), jnp.asarray(LABELS[part])) for part in cut],
        "dicts": ({"pixel_values": PIXELS[part], "labels": LABELS[part]} for part in cut),
        "float64, labels in columns": [(PIXELS[part].astype(float), LABELS[part, None]) for part in cut],
    }
    for name, data in sources.items():
        found = ready(data)
        assert [batch["weights"].tolist() for batch in found] == [[1, 1, 1], [1, 1, 1], [1, 0, 0]], name
        for batch, part in zip(found, cut, strict=True):
            count = len(LABELS[part])
            np.testing.assert_allclose(batch["pixels"][:count], PIXELS[part], atol=1e-6, err_msg=name)
            np.testing.assert_array_equal(batch["labels"][:count], LABELS[part], err_msg=name)
            assert batch["pixels"].dtype == np.float32 and batch["labels"].dtype == np.int32


def test_integers_go_through_the_processor():
    grey = np.random.default_rng(0).integers(0, 256, (4, 10, 10), np.uint8)
    wanted = PROCESSOR([Image.fromarray(image) for image in grey])
    for images in (grey, grey[..., None], grey[:, None], torch.tensor(grey)):
        (batch,) = ready([(images, np.arange(4))])
        np.testing.assert_array_equal(batch["pixels"], wanted)
    (batch,) = ready([([Image.fromarray(image) for image in grey], [0, 1, 2, 3])])
    np.testing.assert_array_equal(batch["pixels"], wanted)


def test_the_users_memory_is_not_kept():
    """A loader may fill the same array again while the batch before is trained on."""
    buffer = np.empty((2, 3, 8, 8), np.float32)

    def loader():
        for number in range(4):
            buffer.fill(number)
            yield buffer, np.zeros(2, int)

    assert [batch["pixels"][0, 0, 0, 0] for batch in ready(loader())] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "batch, message",
    [
        ((np.zeros((2, 3, 8, 3)), [0, 1]), r"its first or its last axis may be the channels"),
        ((np.zeros((2, 5, 8, 8)), [0, 1]), r"no axis has 3 channels"),
        ((np.zeros((2, 3, 8, 8)), [0, 1, 2]), r"2 images and 3 labels"),
        ((np.zeros((2, 3, 8, 8)), [0.5, 1.5]), r"labels must all be texts, all be numbers, or soft"),
        ({"pixel_values": np.zeros((2, 3, 8, 8))}, r"has the columns pixel_values; one of label"),
        ({"x": np.zeros((2, 3, 8, 8)), "label": [0, 1]}, r"has the columns x, label; one of image"),
    ],
)
def test_batches_that_cannot_be_used(batch, message):
    with pytest.raises(DataError, match=message):
        list(ReadyImages([batch], PROCESSOR, 3).epoch(0))


def test_a_loaders_own_state_is_that_of_the_batch_at_hand():
    """Batches are drawn ahead; a run that is resumed must not miss those."""

    class Loader:
        position = 0

        def __iter__(self):
            while self.position < 6:
                self.position += 1
                yield np.full((1, 3, 8, 8), float(self.position)), [0]

        def state_dict(self):
            return {"position": self.position}

        def load_state_dict(self, state):
            self.position = state["position"]

    source = ReadyImages(Loader(), PROCESSOR, 3)
    stream = source.epoch(0)
    seen = [next(stream)["pixels"][0, 0, 0, 0] for _ in range(3)]
    time.sleep(0.05)
    state = source.state_dict()
    stream.close()
    resumed = ReadyImages(Loader(), PROCESSOR, 3)
    resumed.load_state_dict(state)
    assert seen + [batch["pixels"][0, 0, 0, 0] for batch in resumed.epoch(0, start=3)] == [1, 2, 3, 4, 5, 6]


WORKERS = """
    import multiprocessing
    import numpy as np
    import jax.numpy as jnp
    import torch

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            # In a forked worker this waits for ever: XLA's threads are not there.
            return torch.full((3, 8, 8), float(jnp.dot(jnp.ones((300, 300)), jnp.ones((300, 300))).sum())), index % 2

    if __name__ == "__main__":
        from modelhub import ImageClassifier

        clf = ImageClassifier.from_config(
            2, image_size=8, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=8, backend="jax", device="cpu",
        )
        clf.logits(np.zeros((1, 8, 8, 3), np.uint8))
        assert multiprocessing.get_start_method() == "fork"
        loader = torch.utils.data.DataLoader(Pictures(), batch_size=4, num_workers=2)
        print(len(clf.fit(loader, epochs=2, verbose=False).steps))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not forked")
def test_workers_beside_other_frameworks_threads(tmp_path):
    """Forked they would hang; the time limit is what fails then."""
    (tmp_path / "train.py").write_text(textwrap.dedent(WORKERS))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0 and done.stdout.split() == ["4"], done.stderr


def test_what_new_workers_ask_for_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", sys.modules.get("jax", io))
    loader = torch.utils.data.DataLoader([(torch.zeros(3, 8, 8), 0)], num_workers=1, collate_fn=lambda rows: rows)
    with pytest.raises(DataError, match=r"(?s)workers could not be started.*must be picklable.*num_workers=0"):
        read_examples(loader)
    chosen = torch.utils.data.DataLoader([0], num_workers=1, multiprocessing_context="spawn")
    from modelhub.training.loaders import start_workers_safely

    assert start_workers_safely(chosen) is None and start_workers_safely([1, 2]) is None


def test_a_broken_image_is_told_of_once_in_many_epochs(tmp_path, photos):
    (tmp_path / "cut.png").write_bytes(b"no image")
    rows = [(str(photos / "red" / "1.png"), 0), (str(tmp_path / "cut.png"), 1), (str(photos / "blue" / "1.png"), 1)]
    source = batches(rows, 2, on_error="skip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [sum(int(batch["weights"].sum()) for batch in source.epoch(epoch)) for epoch in range(3)]
    assert found == [2, 2, 2]
    assert len([warning for warning in caught if "cut.png" in str(warning.message)]) == 1
