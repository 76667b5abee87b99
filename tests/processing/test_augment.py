"""Augmentation is reproducible, stays within its bounds, and keeps labels and pixels in step."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from modelhub.errors import InputError
from modelhub.processing import augment as module
from modelhub.processing.augment import Augment
from modelhub.processing.image import ImageProcessor

PROCESSOR = ImageProcessor(size=(24, 32))
EVERYTHING = Augment(jitter=(0.4, 0.4, 0.4, 0.1), randaugment=(2, 9), mixup=0.4, cutmix=1.0, seed=3)
NOTHING = Augment(flip=0.0, crop=None)


def picture(width=40, height=30, mode="RGB"):
    """Red grows to the right, green downwards; blue is noise."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    blue = np.random.default_rng(0).integers(0, 256, (height, width))
    return Image.fromarray(np.stack([red, green, blue], 2).astype(np.uint8)).convert(mode)


def same(image, other):
    return image.mode == other.mode and image.size == other.size and image.tobytes() == other.tobytes()


def batch(rows=16, size=20):
    """Each image holds its own number."""
    return np.broadcast_to(np.arange(rows, dtype=np.float32)[:, None, None, None], (rows, 3, size, size)).copy()


# --- reproducible -----------------------------------------------------------------------------------------------------


def test_nothing_is_the_processor():
    assert same(NOTHING.image(picture(), PROCESSOR, 0), PROCESSOR.resized(picture()))
    pixels, labels = NOTHING.batch(batch(), np.arange(16), 16, step=0)
    np.testing.assert_array_equal(pixels, batch())
    np.testing.assert_array_equal(labels, np.eye(16))
    assert not NOTHING.mixes and EVERYTHING.mixes


def test_images_depend_on_seed_epoch_and_index_only():
    order = np.random.default_rng(0).permutation(40)

    def made(index, epoch=1):
        return EVERYTHING.image(picture(), PROCESSOR, int(index), epoch).tobytes()

    alone = {int(index): made(index) for index in range(40)}
    with ThreadPoolExecutor(4) as pool:
        assert dict(zip(order.tolist(), pool.map(made, order), strict=True)) == alone
    assert len(set(alone.values())) > 35  # a crop may come out alike
    assert made(5, epoch=2) != alone[5]
    assert (
        Augment(seed=4).image(picture(), PROCESSOR, 5, 1).tobytes()
        != Augment(seed=3).image(picture(), PROCESSOR, 5, 1).tobytes()
    )


def test_batches_depend_on_seed_epoch_and_step_only():
    first, labels = EVERYTHING.batch(batch(), np.arange(16), 16, step=2, epoch=1)
    EVERYTHING.batch(batch(), np.arange(16), 16, step=0, epoch=1)
    again, _ = EVERYTHING.batch(batch(), np.arange(16), 16, step=2, epoch=1)
    other, _ = EVERYTHING.batch(batch(), np.arange(16), 16, step=3, epoch=1)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_another_process_makes_the_same():
    code = (
        "import sys, json; sys.path.insert(0, 'tests')\n"
        "from processing.test_augment import *\n"
        "print(json.dumps([EVERYTHING.image(picture(), PROCESSOR, i, 1).tobytes().hex() for i in range(5)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [EVERYTHING.image(picture(), PROCESSOR, i, 1).tobytes().hex() for i in range(5)]


# --- images -----------------------------------------------------------------------------------------------------------


def test_flip_is_exact_and_as_often_as_asked():
    plain = PROCESSOR.resized(picture())
    mirrored = ImageOps.mirror(plain)
    made = [Augment(flip=0.25, crop=None).image(picture(), PROCESSOR, index) for index in range(400)]
    flipped = sum(same(image, mirrored) for image in made)
    assert flipped + sum(same(image, plain) for image in made) == 400
    assert 70 <= flipped <= 130
    assert same(Augment(flip=1.0, crop=None).image(picture(), PROCESSOR, 0), mirrored)


@pytest.mark.parametrize("size", [(500, 400), (90, 30), (7, 200), (1, 1)])
def test_crops_keep_to_their_bounds(size, monkeypatch):
    boxes = []
    resized = ImageProcessor.resized
    monkeypatch.setattr(
        ImageProcessor, "resized", lambda self, image, box: boxes.append(box) or resized(self, image, box)
    )
    image = Image.new("RGB", size)
    for index in range(200):
        assert Augment(crop=(0.3, 0.7)).image(image, PROCESSOR, index).size == (32, 24)
    widths, heights = np.array([(right - left, bottom - top) for left, top, right, bottom in boxes]).T
    boxes = np.array(boxes)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= size).all() and (widths > 0).all() and (heights > 0).all()
    if size == (500, 400):
        area, aspect = widths * heights / (500 * 400), widths / heights
        assert 0.295 < area.min() < 0.33 and 0.67 < area.max() < 0.705
        assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.35
        assert len({tuple(box) for box in boxes.tolist()}) == 200
        corners = boxes[:, :2] / (500 - widths, 400 - heights)[0][:, None]
        assert corners.std() > 0.2  # all over the image


def test_a_crop_shows_that_part_of_the_image():
    image = picture(200, 100)
    box = (20, 10, 120, 60)
    ours = PROCESSOR.resized(image, box)
    expected = image.crop(box).resize((32, 24), Image.Resampling.BILINEAR)
    inside = np.abs(np.asarray(ours, int) - np.asarray(expected, int))[3:-3, 3:-3]
    assert inside.max() <= 1  # at its edge the filter sees what is beside it
    with pytest.raises(InputError, match="with_size"):
        Augment().image(image, ImageProcessor(size={"shortest_edge": 20}), 0)


def test_jitter_stays_within_its_factors():
    image = Image.new("RGB", (40, 30), (100, 100, 100))
    values = [
        Augment(0.0, None, jitter=(0.2, 0, 0, 0)).image(image, PROCESSOR, n).getpixel((5, 5))[0] for n in range(300)
    ]
    assert 79 <= min(values) <= 82 and 118 <= max(values) <= 120
    dull = Augment(0.0, None, jitter=(0, 0, 1.0, 0))
    reference = PROCESSOR.resized(picture())
    spread = [np.ptp(np.asarray(dull.image(picture(), PROCESSOR, n), int), axis=2).mean() for n in range(100)]
    assert min(spread) < np.ptp(np.asarray(reference, int), axis=2).mean() / 4
    assert same(
        Augment(0.0, None, jitter=(0, 0, 0, 0)).image(picture(), PROCESSOR, 0).convert("L"), reference.convert("L")
    )


def test_hue_turns_the_circle_of_colours():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert same(module._shift_hue(red, 0.0), red)
    assert module._shift_hue(red, 1 / 3).getpixel((0, 0)) == pytest.approx((0, 255, 0), abs=8)
    assert module._shift_hue(red, -1 / 3).getpixel((0, 0)) == pytest.approx((0, 0, 255), abs=8)
    assert module._shift_hue(red, 0.5).getpixel((0, 0)) == pytest.approx((0, 255, 255), abs=8)
    grey = Image.new("L", (4, 4), 9)
    assert module._shift_hue(grey, 0.3) is grey


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_operation_of_randaugment(mode):
    image = picture(mode=mode)
    changed = 0
    for operation in module._OPERATIONS:
        for strength in (-1.0, -0.5, 0.0, 0.5, 1.0):
            made = operation(image, strength)
            assert made.size == image.size and made.mode == mode
            changed += not same(made, image)
        at_rest = operation(image, 0.0)
        if operation not in module._OPERATIONS[1:3]:  # autocontrast and equalize have no strength
            np.testing.assert_array_equal(np.asarray(at_rest), np.asarray(image))
    assert changed > 40
    assert len(module._OPERATIONS) == 14


def test_operations_do_what_they_are_named_for():
    image = picture()
    _, contrast, equal, solar, poster, shear, _, slide, _, turn, *_ = module._OPERATIONS
    assert same(contrast(image, 0.3), ImageOps.autocontrast(image)) and same(
        equal(image, 0.3), ImageOps.equalize(image)
    )
    assert same(solar(image, 1.0), ImageOps.invert(image)) and same(solar(image, -0.5), ImageOps.solarize(image, 128))
    assert same(poster(image, 1.0), ImageOps.posterize(image, 4))
    assert same(module._OPERATIONS[12](image, -1.0), ImageEnhance.Brightness(image).enhance(1 - 0.9))
    moved = np.asarray(slide(image, 0.5))  # by 9 of 40 columns
    np.testing.assert_array_equal(moved[:, :31], np.asarray(image)[:, 9:])
    assert (moved[:, 31:] == 128).all()
    assert np.asarray(turn(image, 1.0))[0, 0].tolist() == [128] * 3
    sheared = np.asarray(shear(image, 1.0))[:, :, 0].astype(int)
    assert abs(sheared[0, 20] - np.asarray(image)[0, 20, 0]) <= 2
    assert sheared[29, 10] == pytest.approx(np.asarray(image)[29, 10, 0] + 0.3 * 29.5 * 255 / 39, abs=2)


def test_randaugment_uses_all_operations_and_both_directions(monkeypatch):
    calls = []
    spies = [lambda image, strength, n=n: calls.append((n, strength)) or image for n in range(14)]
    monkeypatch.setattr(module, "_OPERATIONS", tuple(spies))
    for index in range(200):
        Augment(randaugment=(3, 15)).image(picture(), PROCESSOR, index)
    assert len(calls) == 600 and {n for n, _ in calls} == set(range(14))
    assert {strength for _, strength in calls} == {0.5, -0.5}


def test_grey_images():
    processor = ImageProcessor(size=16, image_mean=(0.5,), image_std=(0.5,))
    images = [picture(mode="L")] * 20
    pixels, _ = processor.load(images, transform=lambda i, image: EVERYTHING.image(image, processor, i))
    assert pixels.shape == (20, 1, 16, 16)
    assert not np.array_equal(pixels[0], pixels[1])


def test_any_number_of_threads_loads_the_same():
    images = [picture(60 + n) for n in range(9)]
    first, *others = (
        PROCESSOR.load(images, lambda i, image: EVERYTHING.image(image, PROCESSOR, i), workers=n)[0] for n in (1, 2, 4)
    )
    for other in others:
        np.testing.assert_array_equal(first, other)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_mixup_mixes_labels_like_pixels():
    shares = []
    for step in range(200):
        pixels, labels = Augment(mixup=0.8).batch(batch(), np.arange(16), 16, step)
        assert pixels.dtype == labels.dtype == np.float32
        np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(pixels[:, 0, 0, 0], labels @ np.arange(16), rtol=1e-5, atol=1e-4)
        assert np.ptp(pixels, axis=(1, 2, 3)).max() == 0
        rows = labels[(labels > 0).sum(axis=1) == 2]
        shares.append(rows.max(axis=1)[0] if len(rows) else 1.0)
    assert min(shares) < 0.55 and max(shares) > 0.95


def test_cutmix_labels_are_the_shares_of_the_area():
    areas = []
    for step in range(200):
        pixels, labels = Augment(cutmix=1.0).batch(batch(), np.arange(16), 16, step)
        np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
        for row in range(16):
            numbers, counts = np.unique(pixels[row, 0], return_counts=True)
            expected = np.zeros(16)
            expected[numbers.astype(int)] = counts / 400
            np.testing.assert_allclose(labels[row], expected, atol=1e-6)
        np.testing.assert_array_equal(pixels[:, 0], pixels[:, 2])
        changed = np.argwhere((pixels[:, 0] != batch()[:, 0]).any(axis=0))
        if len(changed):  # one rectangle, the same in all images
            assert len(changed) == np.prod(np.ptp(changed, axis=0) + 1)
        areas.append(len(changed) / 400)
    assert min(areas) < 0.05 and max(areas) > 0.7


def test_one_of_the_two_is_chosen():
    both = Augment(mixup=1.0, cutmix=1.0)
    mixed = [np.ptp(both.batch(batch(), np.arange(16), 16, step)[0], axis=(1, 2, 3)).max() == 0 for step in range(100)]
    assert 30 < sum(mixed) < 75  # a cut may be empty


def test_soft_labels_and_untouched_input():
    pixels = batch()
    soft = np.full((16, 4), 0.25)
    mixed, labels = Augment(cutmix=1.0, seed=1).batch(pixels, soft, 4, step=1)
    np.testing.assert_array_equal(pixels, batch())
    np.testing.assert_allclose(labels, soft)
    assert mixed is not pixels
    assert Augment(mixup=1.0).batch(pixels[:0], np.arange(0), 16, step=0)[1].shape == (0, 16)


@pytest.mark.parametrize(
    "options",
    [
        {"flip": 1.5}, {"crop": (0.0, 1.0)}, {"crop": (0.9, 0.5)}, {"crop": (0.5, 1.1)}, {"jitter": (0.1, 0.1)},
        {"jitter": (0, 0, 0, 0.6)}, {"jitter": (-1, 0, 0, 0)}, {"randaugment": (2, 31)}, {"randaugment": (-1, 3)},
        {"mixup": -0.1}, {"cutmix": float("nan")}, {"seed": -1},
    ],
)  # fmt: skip
def test_settings_out_of_range(options):
    (name,) = options
    with pytest.raises(InputError, match=f"{name} = "):
        Augment(**options)
