"""Images as a model takes them: what preprocessor_config.json says, in numpy and Pillow.

Pixels equal those of transformers' Pillow-based processors (the `...Pil` classes) bit for bit, but for images of
extreme aspect. Two things differ on purpose: EXIF orientation is applied to Pillow images too, as transformers'
pipelines do and its processors do not; and 16-bit grey is brought to 8 bits, where transformers clips it to white.

Format: https://huggingface.co/docs/transformers/main_classes/image_processor
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from modelhub.errors import ConfigError, InputError
from modelhub.processing.guards import read_json
from modelhub.processing.image_keras import interpolate, keras_settings, largest_part
from modelhub.processing.image_reading import OnError, as_list, each, name_of, read
from modelhub.processing.image_reading import read_image as read_image
from modelhub.processing.image_reading import read_images as read_images

Box = tuple[int, int, int, int]  # left, top, right, bottom; as Pillow counts
_LARGE = 1 << 24  # pixels; what is resized to more is not made whole if it is then cropped

_HALF = (0.5, 0.5, 0.5)
# What transformers fills in where a file is silent, by class. Files of older and newer releases name the same classes
# with other endings: ViTFeatureExtractor, ViTImageProcessorFast, ViTImageProcessorPil.
_KINDS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": 224},
    "DeiTImageProcessor": {"size": 256, "crop_size": 224, "do_center_crop": True, "resample": 3},
    "BitImageProcessor": {
        "size": 224, "default_to_square": False, "crop_size": 224, "do_center_crop": True, "resample": 3,
        "image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
}  # fmt: skip
_KIND_OF_MODEL = {
    "vit": "ViTImageProcessor", "deit": "DeiTImageProcessor",
    "dinov2": "BitImageProcessor", "dinov2_with_registers": "BitImageProcessor",
}  # fmt: skip
# Keys that change no pixel of what we return.
_COSMETIC = {
    "auto_map", "data_format", "default_to_square", "device", "disable_grouping", "feature_extractor_type",
    "image_processor_type", "image_seq_length", "pad_size", "processor_class", "return_tensors",
}  # fmt: skip
_NO_ANTIALIAS = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_LONGEST_EDGE = 16_384  # of a size in a config: beyond it stands a mistake or malice


@dataclass(frozen=True)
class ImageProcessor:
    """Images to pixels: resize, centre crop, rescale, normalise, each if its `do_` flag is set. Safe between threads.

    size: {"height", "width"} or {"shortest_edge"} in pixels; an int is both edges. crop_size: {"height", "width"}; what
    is smaller is padded with black. resample: Pillow's number of a filter (0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic,
    4 box, 5 Hamming). rescale_factor: multiplies pixels 0 to 255. image_mean, image_std: one number for each of 3
    channels or of 1, and every image is converted to as many. do_convert_rgb: only written back.

    Two more, of KerasHub's: antialias False: a downscaled pixel is interpolated between its neighbours instead of
    averaged over its area. crop_to_aspect_ratio: the largest part of crop_size's shape is cut out first and resized,
    instead of cutting after the resize; transformers does not know it and does the latter.
    """

    image_processor_type: str = "ViTImageProcessor"
    do_convert_rgb: bool | None = None
    do_resize: bool = True
    size: Any = 224
    resample: int = Image.Resampling.BILINEAR.value
    do_center_crop: bool = False
    crop_size: Any = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = _HALF
    image_std: tuple[float, ...] = _HALF
    antialias: bool = True
    crop_to_aspect_ratio: bool = False

    def __post_init__(self) -> None:
        problems = []
        for key in ("size", "crop_size"):
            try:
                object.__setattr__(self, key, _size(getattr(self, key)))
            except (TypeError, ValueError):
                problems.append(f"{key} is {getattr(self, key)!r}; known are an int, (height, width), "
                                f"height and width, and shortest_edge, from 1 to {_LONGEST_EDGE} pixels")  # fmt: skip
        for key in ("image_mean", "image_std"):
            value = getattr(self, key)
            value = (value,) * 3 if isinstance(value, int | float) else value
            numbers = isinstance(value, list | tuple) and all(isinstance(x, int | float) for x in value)
            if not numbers or len(value) not in (1, 3) or not all(map(math.isfinite, value)):
                problems.append(f"{key} is {value!r}; it is one number for each of 3 channels, or 1")
            else:
                object.__setattr__(self, key, tuple(map(float, value)))
        if not problems and len(self.image_mean) != len(self.image_std):
            problems.append(f"image_mean has {len(self.image_mean)} channels, image_std {len(self.image_std)}")
        if not problems and 0.0 in self.image_std:
            problems.append(f"image_std is {self.image_std}; nothing can be divided by 0")
        for field in fields(self):
            if field.name.startswith("do_") and getattr(self, field.name) not in (True, False, None):
                problems.append(f"{field.name} is {getattr(self, field.name)!r}, neither true nor false")
        if not isinstance(self.rescale_factor, int | float) or not math.isfinite(self.rescale_factor):
            problems.append(f"rescale_factor is {self.rescale_factor!r}, not a number")
        if self.resample not in list(Image.Resampling):
            problems.append(f"resample is {self.resample!r}; Pillow's filters are 0 to 5")
        if not self.antialias and self.resample not in _NO_ANTIALIAS:
            problems.append(f"resample {self.resample!r} without antialiasing; known are 0, 2 and 3")
        if self.do_resize and not self.size:
            problems.append("do_resize is set, and size is not")
        if self.do_center_crop and (not self.crop_size or "height" not in self.crop_size):
            problems.append("do_center_crop is set, and crop_size has no height and width")
        if self.crop_to_aspect_ratio and not (self.do_resize and self.do_center_crop):
            problems.append("crop_to_aspect_ratio is set, and do_resize and do_center_crop are not both")
        if problems:
            raise ConfigError("the image processor cannot work:\n" + "\n".join(problems))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """From a preset's preprocessor_config.json, processor_config.json, or KerasHub's files. Raises ConfigError."""
        folder = Path(folder)
        for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
            if (folder / name).is_file():
                content = read_json(folder / name, ConfigError)
                data = content.get(key) if key else content
                if isinstance(data, dict):
                    model = folder / "config.json"
                    model_type = read_json(model, ConfigError).get("model_type") if model.is_file() else None
                    with _naming(folder / name):
                        return cls.from_config(data, model_type)
        for name in ("image_converter.json", "preprocessor.json"):
            if (folder / name).is_file():
                with _naming(folder / name):
                    return cls.from_keras(read_json(folder / name, ConfigError))
        raise ConfigError(f"{folder} has no preprocessor_config.json, which says how its model takes images")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], model_type: str | None = None) -> Self:
        """From what preprocessor_config.json holds. model_type: the model's, for files that name no class of their own.

        Raises ConfigError for classes and keys whose maths are not here.
        """
        named = config.get("image_processor_type") or config.get("feature_extractor_type")
        kind = str(named).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
        kind = kind if named else _KIND_OF_MODEL.get(str(model_type), "")
        if kind not in _KINDS:
            raise ConfigError(
                f"images are prepared by {named or 'no class that is named'} (model_type {model_type!r}); modelhub has "
                f"{', '.join(_KINDS)}"
            )
        # As in transformers: null switches a flag off, and elsewhere leaves the default.
        config = {key: False if value is None and key.startswith("do_") else value for key, value in config.items()}
        given = _KINDS[kind] | {key: value for key, value in config.items() if value is not None}
        if isinstance(given["size"], int) and not given.get("default_to_square", True):
            given["size"] = {"shortest_edge": given["size"]}
        ours = {field.name for field in fields(cls)} - {"image_processor_type"}
        others = given.keys() - ours - _COSMETIC
        if unknown := sorted(key for key in others if not key.startswith("_") and given[key] is not False):
            wrong = ", ".join(f"{key} = {given[key]!r}" for key in unknown)
            raise ConfigError(f"the image processor's config has keys that modelhub does not know: {wrong}")
        return cls(kind, **{key: given[key] for key in ours & given.keys()})

    @classmethod
    def from_keras(cls, data: Mapping[str, Any]) -> Self:
        """From KerasHub's image_converter.json, or a preprocessor.json with one inside. Raises ConfigError."""
        return cls(**keras_settings(data))

    def to_config(self) -> dict[str, Any]:
        """What preprocessor_config.json holds; `from_config` and transformers' AutoImageProcessor read it."""
        config = {field.name: getattr(self, field.name) for field in fields(self)}
        unset = {"do_convert_rgb": None, "crop_size": None, "antialias": True, "crop_to_aspect_ratio": False}
        config = {key: value for key, value in config.items() if key not in unset or value != unset[key]}
        return config | {"image_mean": list(self.image_mean), "image_std": list(self.image_std)}

    def save(self, folder: str | Path) -> None:
        """Writes preprocessor_config.json into the folder, which is there."""
        text = json.dumps(self.to_config(), indent=2, sort_keys=True) + "\n"
        Path(folder, "preprocessor_config.json").write_text(text, encoding="utf-8")

    @property
    def channels(self) -> int:
        """Of every image that comes out: 3 or 1."""
        return len(self.image_mean)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(H, W) of every image that comes out; None: it depends on the image."""
        size = self.crop_size if self.do_center_crop else self.size if self.do_resize else None
        return (size["height"], size["width"]) if size and "height" in size else None

    def with_size(self, size: int | tuple[int, int]) -> Self:
        """The same for another output_size (H, W); a resize before a crop keeps its ratio to the crop."""
        height, width = (size, size) if isinstance(size, int) else size
        if not self.do_center_crop:
            return replace(self, do_resize=True, size=(height, width))
        ratio = max(height / self.crop_size["height"], width / self.crop_size["width"])
        resized = {key: round(pixels * ratio) for key, pixels in (self.size or {}).items()}
        return replace(self, size=resized or None, crop_size=(height, width))

    def __call__(self, images: Any, size: int | tuple[int, int] | None = None) -> np.ndarray:
        """Pixels, float32 (B, C, H, W), contiguous. images: one or several of what `read_image` takes.

        size: the output's in place of the config's. Raises InputError.
        """
        return (self if size is None else self.with_size(size)).load(images)[0]

    def load(
        self,
        images: Any,
        transform: Callable[[int, Image.Image], Image.Image] | None = None,
        on_error: OnError = "raise",
        workers: int | None = None,
    ) -> tuple[np.ndarray, list[int]]:
        """Reads, resizes and normalises in threads: pixels, float32 (B, C, H, W), and the indices of their images.

        transform: takes the index of an image and the image, and does what is else left to `resized` (`Augment.image`).
        on_error, workers: as in `read_images`. No more full-size images than threads are held at a time.
        """
        images, table, size = as_list(images), self._table(), self.output_size
        if not images:
            raise InputError("no images were given")
        batch = None if size is None else np.empty((len(images), self.channels, *size), np.float32)

        def one(index: int) -> np.ndarray:
            name = name_of(images[index], index)
            image = read(images[index], self.channels, name)
            try:
                image = self.resized(image) if transform is None else transform(index, image)
                shape = (self.channels, image.height, image.width)
                if size and shape[1:] != size:
                    raise InputError(f"transform made it {shape[1:]} (H, W); it has to be {size}")
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
            out = np.empty(shape, np.float32) if batch is None else batch[index]
            pixels = np.asarray(image)
            for channel in range(self.channels):
                np.take(
                    table[channel], pixels[..., channel] if pixels.ndim == 3 else pixels, out=out[channel], mode="clip"
                )
            return out

        rows, kept = each(len(images), one, on_error, workers)
        if batch is not None:
            return (batch if len(kept) == len(images) else batch[kept]), kept
        if len(shapes := {row.shape: name_of(images[i], i) for row, i in zip(rows, kept, strict=True)}) > 1:
            found = "; ".join(f"{name}: {shape[1:]}" for shape, name in list(shapes.items())[:2])
            raise InputError(
                f"the images come out in {len(shapes)} sizes (H, W), and a batch has one ({found}): give size"
            )
        return np.stack(rows) if rows else np.empty((0, self.channels, 0, 0), np.float32), kept

    def resized(self, image: Image.Image, box: Box | None = None) -> Image.Image:
        """The image resized and cropped as the config says; or that part of it, stretched to output_size."""
        if box is not None:
            if self.output_size is None:
                raise InputError(
                    "the size of the output depends on the image: give the processor a size with with_size"
                )
            return image.resize(self.output_size[::-1], self._filter, box)
        if not self.do_center_crop:
            return self._resize(image, *self._target(image))
        crop_height, crop_width = self.crop_size["height"], self.crop_size["width"]
        if self.crop_to_aspect_ratio:
            return self._resize(largest_part(image, crop_height, crop_width), crop_height, crop_width)
        height, width = self._target(image)
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        if height * width > _LARGE:  # a strip of 1 x 5000 pixels would become 256 x 1280000
            x, y = image.width / width, image.height / height
            x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + crop_width, width), min(top + crop_height, height)
            # Pillow rounds a box to float32: small numbers keep it exact.
            margin = 4 + int(3 * max(x, y, 1))  # no filter reaches further
            dx, dy = max(int(x0 * x) - margin, 0), max(int(y0 * y) - margin, 0)
            image = image.crop(
                (dx, dy, min(int(x1 * x) + margin, image.width), min(int(y1 * y) + margin, image.height))
            )
            # In two steps, or Pillow may take the axes the other way round than for the whole image.
            image = image.resize((x1 - x0, image.height), self._filter, (x0 * x - dx, 0, x1 * x - dx, image.height))
            image = image.resize((x1 - x0, y1 - y0), self._filter, (0, y0 * y - dy, x1 - x0, y1 * y - dy))
            left, top = left - x0, top - y0
        else:
            image = self._resize(image, height, width)
        return image.crop((left, top, left + crop_width, top + crop_height))

    @property
    def _filter(self) -> Image.Resampling:
        return Image.Resampling(self.resample)

    def _target(self, image: Image.Image) -> tuple[int, int]:
        """(H, W) that the image is resized to."""
        if not self.do_resize:
            return image.height, image.width
        if "height" in self.size:
            return self.size["height"], self.size["width"]
        short, long = sorted(image.size)
        new = self.size["shortest_edge"], int(self.size["shortest_edge"] * long / short)
        return new if image.height <= image.width else new[::-1]

    def _resize(self, image: Image.Image, height: int, width: int) -> Image.Image:
        if image.size == (width, height):
            return image
        if Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS:
            raise InputError(
                f"{image.height} x {image.width} pixels would be resized to {height} x {width}; crop it first"
            )
        if self.antialias or self.resample == Image.Resampling.NEAREST:
            return image.resize((width, height), self._filter)
        return interpolate(image, height, width, cubic=self.resample == Image.Resampling.BICUBIC)

    def _table(self) -> np.ndarray:
        """What becomes of the pixels 0 to 255: float32 (C, 256), rounded where transformers rounds."""
        values = np.arange(256) * (self.rescale_factor if self.do_rescale else 1.0)
        table = np.tile(values.astype(np.float32), (self.channels, 1))
        if self.do_normalize:
            mean, std = np.array([self.image_mean, self.image_std], np.float32)[:, :, None]
            table = (table - mean) / std
        return table


def _size(value: Any) -> dict[str, int] | None:
    """A size as transformers writes it; raises ValueError or TypeError for what is none."""
    if value is None:
        return None
    if isinstance(value, int):
        value = (value, value)
    if isinstance(value, list | tuple):
        height, width = value
        value = {"height": height, "width": width}
    value = {key: pixels for key, pixels in dict(value).items() if pixels is not None}
    if value.keys() not in ({"height", "width"}, {"shortest_edge"}):
        raise ValueError
    if any(pixels != int(pixels) or not 1 <= pixels <= _LONGEST_EDGE for pixels in value.values()):
        raise ValueError
    return {key: int(pixels) for key, pixels in value.items()}


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
