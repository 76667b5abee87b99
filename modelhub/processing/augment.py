"""Random changes to training images, the same on every backend, in any number of threads and after a resume.

Every draw comes from numpy's generator seeded by (seed, epoch, index of the example, or number of the batch).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from modelhub.errors import InputError
from modelhub.habits import explained
from modelhub.processing.image import Box, ImageProcessor

_ASPECT = (3 / 4, 4 / 3)  # of random crops, as in Szegedy et al. 2014, arXiv:1409.4842
_STRONGEST = 30  # RandAugment's magnitude


@explained
@dataclass(frozen=True)
class Augment:
    """What is done to training images; None and 0 switch a part off.

    To images (uint8, before they are normalised), in this order:
      crop         a random part with an area of (smallest, largest) share of the image's, stretched to the model's size
      flip         probability of mirroring left and right
      jitter       brightness, contrast, saturation, hue: factors 1 - x to 1 + x, hue shifted by up to x (0.5: half the
                   circle) either way, in random order
      randaugment  number of operations and their magnitude, 0 to 30: Cubuk et al. 2019, arXiv:1909.13719
    To batches (after it), which makes labels soft; one of the two is chosen per batch where both are set:
      mixup        alpha of the Beta distribution: Zhang et al. 2017, arXiv:1710.09412
      cutmix       alpha of the Beta distribution: Yun et al. 2019, arXiv:1905.04899
    """

    flip: float = 0.5
    crop: tuple[float, float] | None = (0.6, 1.0)
    jitter: tuple[float, float, float, float] | None = None
    randaugment: tuple[int, float] | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        crop, jitter, randaugment = self.crop or (1.0, 1.0), self.jitter or (0.0,) * 4, self.randaugment or (0, 0)
        rules = {
            "flip": 0 <= self.flip <= 1,
            "crop": len(crop) == 2 and 0 < crop[0] <= crop[1] <= 1,
            "jitter": len(jitter) == 4 and min(jitter) >= 0 and jitter[3] <= 0.5,
            "randaugment": len(randaugment) == 2 and randaugment[0] >= 0 and 0 <= randaugment[1] <= _STRONGEST,
            "mixup": self.mixup >= 0,
            "cutmix": self.cutmix >= 0,
            "seed": self.seed >= 0,
        }
        if wrong := [
            f"{field.name} = {getattr(self, field.name)!r}" for field in fields(self) if not rules[field.name]
        ]:
            raise InputError(
                f"augmentation with {', '.join(wrong)}: flip is 0 to 1, crop two shares of the area in rising order, "
                f"jitter four numbers from 0 on (hue to 0.5), randaugment a count and a magnitude to {_STRONGEST}, "
                "the others 0 or more"
            )

    @property
    def mixes(self) -> bool:
        """Whether `batch` does anything."""
        return self.mixup > 0 or self.cutmix > 0

    def image(self, image: Image.Image, processor: ImageProcessor, index: int, epoch: int = 0) -> Image.Image:
        """The image at the processor's output_size, changed as example `index` of the data is in this epoch."""
        rng = self._rng(epoch, index, 0)
        image = processor.resized(image, _random_part(image, self.crop, rng) if self.crop else None)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.jitter:
            factors = [rng.uniform(max(0.0, 1 - x), 1 + x) for x in self.jitter[:3]]
            shift = rng.uniform(-self.jitter[3], self.jitter[3])
            for i in rng.permutation(4):
                image = _shift_hue(image, shift) if i == 3 else _ENHANCERS[i](image).enhance(factors[i])
        if self.randaugment:
            count, magnitude = self.randaugment
            for i in rng.integers(len(_OPERATIONS), size=count):
                image = _OPERATIONS[i](image, magnitude / _STRONGEST * (1 if rng.random() < 0.5 else -1))
        return image

    def batch(
        self, pixels: np.ndarray, labels: np.ndarray, num_classes: int, step: int, epoch: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pixels and soft labels, float32 (B, num_classes) whose rows sum to 1, of batch number `step` of the epoch.

        pixels: float32 (B, C, H, W), not written to. labels: integers from 0 on (B,), or soft already (B, num_classes).
        Every image is mixed with another of the batch, all by one share: leave out rows that only fill up a batch.
        """
        labels = np.asarray(labels)
        soft = np.eye(num_classes, dtype=np.float32)[labels] if labels.ndim == 1 else labels.astype(np.float32)
        if not self.mixes or not len(pixels):
            return pixels, soft
        rng = self._rng(epoch, step, 1)
        cuts = rng.random() < 0.5 if self.mixup and self.cutmix else bool(self.cutmix)
        alpha = self.cutmix if cuts else self.mixup
        share = rng.beta(alpha, alpha)
        others = rng.permutation(len(pixels))
        if cuts:
            height, width = pixels.shape[2:]
            top, bottom = _random_range(height, (1 - share) ** 0.5, rng)
            left, right = _random_range(width, (1 - share) ** 0.5, rng)
            mixed = pixels.copy()
            mixed[:, :, top:bottom, left:right] = pixels[others, :, top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            mixed = pixels * np.float32(share) + pixels[others] * np.float32(1 - share)
        return mixed, soft * np.float32(share) + soft[others] * np.float32(1 - share)

    def _rng(self, epoch: int, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, index, stream])


def _random_part(image: Image.Image, area: tuple[float, float], rng: np.random.Generator) -> Box:
    """A part with a share of the area and an aspect drawn at random; in the middle where none of ten draws fits in."""
    for _ in range(10):
        pixels = image.width * image.height * rng.uniform(*area)
        aspect = np.exp(rng.uniform(*np.log(_ASPECT)))
        width, height = round((pixels * aspect) ** 0.5), round((pixels / aspect) ** 0.5)
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
            return int(left), int(top), int(left) + width, int(top) + height
    narrow = min(max(image.width / image.height, _ASPECT[0]), _ASPECT[1])
    width, height = min(image.width, round(image.height * narrow)), min(image.height, round(image.width / narrow))
    width, height = max(width, 1), max(height, 1)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return left, top, left + width, top + height


def _random_range(length: int, share: float, rng: np.random.Generator) -> tuple[int, int]:
    """A range around a random centre, cut off at the edges."""
    size, centre = int(length * share), int(rng.integers(length))
    return max(centre - size // 2, 0), min(centre + (size + 1) // 2, length)


_ENHANCERS: tuple[Callable[[Image.Image], Any], ...] = (
    ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color,
)  # fmt: skip


def _shift_hue(image: Image.Image, shift: float) -> Image.Image:
    steps = round(shift * 255)
    if image.mode == "L" or not steps:
        return image
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(i + steps) % 256 for i in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


# --- RandAugment ------------------------------------------------------------------------------------------------------
# An operation takes an image and a strength, -1 to 1; those whose effect has no direction use its size only. The
# strongest effects are those of torchvision's RandAugment.


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    grey = 128 if image.mode == "L" else (128, 128, 128)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=grey)


def _rotate(image: Image.Image, strength: float) -> Image.Image:
    grey = 128 if image.mode == "L" else (128, 128, 128)
    return image.rotate(30 * strength, Image.Resampling.BILINEAR, fillcolor=grey)


def _enhance(enhancer: Callable[[Image.Image], Any]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, strength: enhancer(image).enhance(1 + 0.9 * strength)


_OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, strength: image,
    lambda image, strength: ImageOps.autocontrast(image),
    lambda image, strength: ImageOps.equalize(image),
    lambda image, strength: ImageOps.solarize(image, round(256 * (1 - abs(strength)))),
    lambda image, strength: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
    lambda image, strength: _affine(image, 1, 0.3 * strength, 0, 0, 1, 0),
    lambda image, strength: _affine(image, 1, 0, 0, 0.3 * strength, 1, 0),
    lambda image, strength: _affine(image, 1, 0, 0.45 * strength * image.width, 0, 1, 0),
    lambda image, strength: _affine(image, 1, 0, 0, 0, 1, 0.45 * strength * image.height),
    _rotate,
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
)
