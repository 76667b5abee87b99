"""Reads images of any kind into Pillow images of one kind, one or many at a time, and names what it cannot read."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from modelhub.errors import InputError

T = TypeVar("T")
OnError = Literal["raise", "skip"]

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def read_image(source: Any, channels: int = 3) -> Image.Image:
    """One image, upright, as a Pillow image of mode "RGB" (channels 3) or "L" (1).

    source: a path, bytes, an open binary file, a Pillow image, or an array (H, W), (H, W, C) or (C, H, W) with 1, 3 or
    4 channels: integers 0 to 255, or floats, which are 0 to 1 if none is above 1 and else 0 to 255. Transparent Pillow
    images and arrays are laid on white; files lose their alpha channel: both as in transformers.

    Raises InputError, which names the file, for everything that is no such image, is cut off, or has more pixels than
    `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    return read(source, channels, name_of(source))


def read_images(
    sources: Sequence[Any], on_error: OnError = "raise", workers: int | None = None, channels: int = 3
) -> tuple[list[Image.Image], list[int]]:
    """`read_image` of each, in threads, and the indices of those that could be read.

    on_error: "raise" the first InputError, or "skip" broken images, each with a warning that names it. workers: number
    of threads; default: one per core.
    """
    sources = as_list(sources)
    return each(len(sources), lambda i: read(sources[i], channels, name_of(sources[i], i)), on_error, workers)


def as_list(images: Any) -> list[Any]:
    """One image or several (a list, an array (B, H, W, C) or (B, C, H, W)) as a list of images."""
    if isinstance(images, list | tuple):
        return list(images)
    if getattr(images, "ndim", 0) != 4:
        return [images]
    name = name_of(images)
    return list(_to_uint8(_as_array(images, name), name))


def each(count: int, function: Callable[[int], T], on_error: str, workers: int | None) -> tuple[list[T], list[int]]:
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error is 'raise' or 'skip', not {on_error!r}")

    def guarded(index: int) -> T | InputError:
        try:
            return function(index)
        except InputError as error:
            if on_error == "raise":
                raise
            return error

    workers = min(workers or os.cpu_count() or 1, count)
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(guarded, range(count)))
    else:
        results = [guarded(index) for index in range(count)]
    for error in results:
        if isinstance(error, InputError):
            warnings.warn(f"skipped: {error}", stacklevel=3)
    kept = [(result, i) for i, result in enumerate(results) if not isinstance(result, InputError)]
    return [result for result, _ in kept], [i for _, i in kept]


def name_of(source: Any, index: int | None = None) -> str:
    """What error messages call an image."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    number = "the image" if index is None else f"image {index}"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{number} ({len(source)} bytes)"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"{number} (a Pillow image)"
    if shape := getattr(source, "shape", None):
        return f"{number} (an array of shape {tuple(shape)})"
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else f"{number} ({type(source).__name__})"


def read(source: Any, channels: int, name: str) -> Image.Image:
    try:
        if isinstance(source, Image.Image):
            return _upright(source, channels, name, on_white=True)
        if isinstance(source, bytes | bytearray | memoryview):
            source = io.BytesIO(source)
        if isinstance(source, str | os.PathLike) or hasattr(source, "read"):
            with Image.open(source) as image:
                return _upright(image, channels, name, on_white=False)
        if hasattr(source, "__array__"):
            return _upright(_from_array(_as_array(source, name), name), channels, name, on_white=True)
    except InputError:
        raise
    except FileNotFoundError:
        if "://" in name:
            raise InputError(f"{name} is an address; images are read from files: download it first") from None
        raise InputError(f"{name}: there is no such file") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} has more pixels than a photo has, and is not opened: {error}") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a folder, not an image: name the images in it") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is not an image, or of a format that Pillow does not read") from None
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise InputError(f"{name} cannot be read as an image; it may be cut off: {error}") from error
    raise InputError(f"{name} is not an image: expected a path, bytes, a file, a Pillow image or an array")


def _upright(image: Image.Image, channels: int, name: str, on_white: bool) -> Image.Image:
    """Decoded, turned as its EXIF data say, in the mode asked for."""
    width, height = image.size
    if not width or not height:
        raise InputError(f"{name} has no pixels: its size is {width} x {height}")
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise InputError(
            f"{name} claims {width} x {height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}: it may be a decompression "
            "bomb. If it is not, scale it down or raise PIL.Image.MAX_IMAGE_PIXELS."
        )
    if image.format == "EPS":
        raise InputError(f"{name} is PostScript, a program and not an image: convert it to PNG")
    orientation = image.getexif().get(_ORIENTATION)
    image.load()
    if image.mode.startswith("I;16"):  # the high byte, as Pillow itself reads 16-bit colour
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_to_uint8(np.asarray(image), name))
    elif on_white and ("A" in image.getbands() or image.info.get("transparency") is not None):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _as_array(source: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(source)
    except Exception as error:  # of the framework the array is of
        raise InputError(f"{name} cannot be read as a numpy array: {error}") from error


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    known = (1, 3, 4)
    if array.ndim == 3:
        first, last = array.shape[0] in known, array.shape[2] in known
        if first and last and array.shape[0] > 1 or array.shape[0] == array.shape[2] == 1:
            raise InputError(f"{name}: either its first or its last axis may be the channels; give a Pillow image")
        if not first and not last:
            raise InputError(f"{name}: neither its first nor its last axis has 1, 3 or 4 channels")
        array = array if last else np.moveaxis(array, 0, 2)
        array = array[:, :, 0] if array.shape[2] == 1 else array
    elif array.ndim != 2:
        raise InputError(f"{name}: an image has the shape (H, W), (H, W, C) or (C, H, W)")
    if not array.size:
        raise InputError(f"{name} has no pixels")
    return Image.fromarray(np.ascontiguousarray(_to_uint8(array, name)))


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8 or not array.size:
        return array.astype(np.uint8, copy=False)
    if array.dtype.kind not in "uif":
        raise InputError(f"{name} holds {array.dtype}; pixels are integers 0 to 255 or floats 0 to 1")
    low, high = array.min(), array.max()
    if not low >= 0 or not high <= 255:  # also where one is NaN
        raise InputError(
            f"{name} holds values from {low:g} to {high:g}; pixels are 0 to 255, or floats 0 to 1. Give the image "
            "before it was normalised; divide 16-bit values by 257."
        )
    if array.dtype.kind == "f":  # the steps of transformers, which cuts off fractions of 255
        array = (array.astype(np.float64) * 255).astype(np.float32) if high <= 1 else np.rint(array)
    return array.astype(np.uint8)
