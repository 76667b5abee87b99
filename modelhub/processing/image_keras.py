"""KerasHub's image converters: what their files say, and their way to resize.

Pixels are rounded to 0 to 255 before they are normalised, which KerasHub does for integer images and not for floats.

Format and maths: keras_hub/src/layers/preprocessing/image_converter.py of https://github.com/keras-team/keras-hub and
keras/src/backend/numpy/image.py of https://github.com/keras-team/keras
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from modelhub.errors import ConfigError

_CLASSES = {"ImageConverter", "ViTImageConverter", "DeiTImageConverter", "DINOV2ImageConverter"}
_FILTERS = {"nearest": 0, "bilinear": 2, "bicubic": 3}
_DEFAULTS: dict[str, Any] = {
    "image_size": None, "scale": None, "offset": None, "crop_to_aspect_ratio": True, "pad_to_aspect_ratio": False,
    "interpolation": "bilinear", "antialias": False,
}  # fmt: skip
_COSMETIC = {"name", "trainable", "dtype", "data_format", "bounding_box_format"}


def keras_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """ImageProcessor's fields, from image_converter.json or a preprocessor.json with one inside. Raises ConfigError."""
    config = data.get("config", data)
    if isinstance(config, dict) and isinstance(config.get("image_converter"), dict):
        data = config["image_converter"]
        config = data.get("config", data)
    name = str(data.get("registered_name") or data.get("class_name") or "ImageConverter").rpartition(">")[2]
    if not isinstance(config, dict) or name not in _CLASSES:
        raise ConfigError(f"images are prepared by KerasHub's {name!r}; modelhub has {', '.join(sorted(_CLASSES))}")
    given = _DEFAULTS | config
    unknown = sorted(given.keys() - _DEFAULTS.keys() - _COSMETIC)
    unknown += [key for key in ("pad_to_aspect_ratio",) if given[key]]
    unknown += [key for key in ("interpolation",) if given[key] not in _FILTERS]
    if unknown:
        wrong = ", ".join(f"{key} = {given[key]!r}" for key in unknown)
        raise ConfigError(f"{name} has settings that modelhub does not know: {wrong}")
    try:
        size = None if given["image_size"] is None else tuple(map(int, given["image_size"]))
        scale = np.broadcast_to(np.float64(1 if given["scale"] is None else given["scale"]), 3).tolist()
        offset = np.broadcast_to(np.float64(0 if given["offset"] is None else given["offset"]), 3).tolist()
        std = [1 / (255 * factor) for factor in scale]
    except (TypeError, ValueError, ZeroDivisionError) as error:
        values = {key: given[key] for key in ("image_size", "scale", "offset")}
        raise ConfigError(f"{name} has settings that make no image: {values}: {error}") from error
    crops = size is not None and bool(given["crop_to_aspect_ratio"])
    return {
        "do_resize": size is not None,
        "size": {"shortest_edge": max(size)} if size and crops else size or 224,
        "do_center_crop": crops,
        "crop_size": size if crops else None,
        "crop_to_aspect_ratio": crops,
        "antialias": bool(given["antialias"]),
        "resample": _FILTERS[given["interpolation"]],
        # x * scale + offset is (x / 255 - mean) / std
        "image_mean": [-shift * deviation for shift, deviation in zip(offset, std, strict=True)],
        "image_std": std,
    }


def largest_part(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest part in the middle of the image that has the aspect of height x width."""
    tall = max(min(image.height, int(image.width * height / width)), 1)
    wide = max(min(image.width, int(image.height * width / height)), 1)
    left, top = (image.width - wide) // 2, (image.height - tall) // 2
    return image.crop((left, top, left + wide, top + tall))


def interpolate(image: Image.Image, height: int, width: int, cubic: bool) -> Image.Image:
    """Resizes without antialiasing: between the 2 x 2 nearest pixels, or the 4 x 4 with Keys' cubic (a = -0.5)."""
    pixels = np.asarray(image)
    for axis, size in ((0, height), (1, width)):
        old, shape = pixels.shape[axis], [1] * pixels.ndim
        shape[axis] = size
        position = (np.arange(size) + 0.5) * old / size - 0.5
        taps = np.arange(-1, 3)[:, None] if cubic else np.arange(2)[:, None]
        source = np.floor(position).astype(int) + taps
        x = np.abs(position - source)
        weights = 1 - x
        if cubic:
            near, far = ((1.5 * x - 2.5) * x) * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
            weights = np.where(x < 1, near, far)
        weights = np.where((source < 0) | (source >= old), 0, weights)
        weights = (weights / weights.sum(axis=0)).astype(np.float32)
        parts = [np.take(pixels, row, axis, mode="clip") for row in source]
        pixels = parts[0] * weights[0].reshape(shape)
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            pixels += part * weight.reshape(shape)
    return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))
