"""Images come out as transformers' Pillow-based processors and KerasHub's converters make them, or not at all."""

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, BitImageProcessorPil, DeiTImageProcessorPil, ViTImageProcessorPil

from modelhub.errors import ConfigError, InputError
from modelhub.processing.image import ImageProcessor, read_image, read_images

KINDS = (ViTImageProcessorPil, DeiTImageProcessorPil, BitImageProcessorPil)
MODES = ("RGB", "L", "RGBA", "LA", "P", "PA", "CMYK", "YCbCr", "HSV", "1")
SIZES = ((500, 400), (400, 500), (224, 224), (256, 256), (30, 40), (225, 223), (1, 1), (1, 40), (90, 3))
each_kind = pytest.mark.parametrize("kind", KINDS)


def photo(width, height, mode="RGB", seed=0):
    """Smooth areas, edges and noise."""
    rng = np.random.default_rng([seed, width, height])
    channels = 4 if mode in ("RGBA", "LA", "PA") else 3
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, channels), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels = (smooth + rng.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    return image.convert("LA").convert("PA") if mode == "PA" else image.convert(mode)


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def theirs(processor, image):
    return processor(image, return_tensors="np")["pixel_values"]


def levels_apart(ours, expected, processor):
    """The largest difference before normalisation, where 1 is 1/255 of white."""
    assert ours.shape == expected.shape
    return float((np.abs(ours - expected) * np.array(processor.image_std)[:, None, None] * 255).max())


# --- equal to transformers --------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("mode", MODES)
def test_pixels_are_those_of_transformers(kind, mode):
    reference = kind(do_convert_rgb=True)
    processor = ImageProcessor.from_config(reference.to_dict())
    for seed, size in enumerate(SIZES):
        image = photo(*size, mode, seed)
        ours = processor(image)
        assert ours.dtype == np.float32 and ours.flags.c_contiguous
        np.testing.assert_array_equal(ours, theirs(reference, image), err_msg=f"{size}")


@pytest.mark.slow
def test_a_strip_is_cropped_before_it_grows():
    reference = BitImageProcessorPil()
    processor = ImageProcessor.from_config(reference.to_dict())
    for size in ((1, 700), (900, 1), (7, 3000), (2999, 5)):
        assert levels_apart(processor(photo(*size)), theirs(reference, photo(*size)), processor) < 1.01
    assert processor(photo(1, 60_000)).shape == (1, 3, 224, 224)  # 9 GB if it were resized whole


CONFIGS = [
    {"image_processor_type": "ViTImageProcessor", "size": 48},
    {"image_processor_type": "ViTImageProcessor", "size": [40, 56], "resample": 0},
    {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 33, "width": 47}, "resample": 1, "do_rescale": None},
    {"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 40, "longest_edge": None}, "resample": 4},
    {"image_processor_type": "ViTImageProcessor", "size": 40, "do_center_crop": True, "crop_size": [30, 50]},
    {"image_processor_type": "ViTImageProcessor", "size": 40, "resample": 5, "do_normalize": False, "do_reduce_labels": False},
    {"image_processor_type": "ViTImageProcessor", "size": 40, "do_rescale": False, "image_mean": [127.5] * 3, "image_std": [60.0, 61.0, 62.0]},
    {"image_processor_type": "ViTImageProcessor", "size": 40, "rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
    {"image_processor_type": "ViTImageProcessor", "do_resize": False, "data_format": "channels_first", "_valid_processor_keys": ["images"]},
    {"image_processor_type": "DeiTImageProcessor", "size": 64, "crop_size": 56, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    {"image_processor_type": "DeiTImageProcessorPil", "do_center_crop": False, "size": {"height": 50, "width": 40}},
    {"image_processor_type": "BitImageProcessor", "size": 64, "crop_size": {"height": 56, "width": 56}, "do_convert_rgb": True},
    {"image_processor_type": "BitImageProcessorFast", "size": {"shortest_edge": 256}, "crop_size": 224, "device": None},
    {"image_processor_type": "BitImageProcessor", "do_resize": False, "crop_size": 60},
    {"feature_extractor_type": "DeiTFeatureExtractor", "size": 64, "crop_size": 56, "resample": 3},
    {"size": 64, "do_normalize": True, "model_type": "vit"},
    {"size": 64, "crop_size": 60, "model_type": "dinov2"},
    {"size": 70, "crop_size": 60, "model_type": "deit"},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_a_folder_says_the_same_to_both(config, tmp_path):
    config = dict(config)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": config.pop("model_type", "vit")}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    reference, processor = AutoImageProcessor.from_pretrained(tmp_path), ImageProcessor.from_folder(tmp_path)
    saved = tmp_path / "saved"
    saved.mkdir()
    processor.save(saved)
    again, read_back = AutoImageProcessor.from_pretrained(saved), ImageProcessor.from_folder(saved)
    assert read_back == processor
    assert type(again) is type(reference)
    for size in ((100, 80), (39, 201)):
        image = photo(*size)
        expected = theirs(reference, image)
        np.testing.assert_array_equal(processor(image), expected)
        np.testing.assert_array_equal(theirs(again, image), expected)


def test_a_processor_config_goes_before(tmp_path):
    nested = {"image_processor": ViTImageProcessorPil(size=48).to_dict()}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(ViTImageProcessorPil(size=32).to_dict()))
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert AutoImageProcessor.from_pretrained(tmp_path).size == {"height": 48, "width": 48}
    assert ImageProcessor.from_folder(tmp_path).output_size == (48, 48)
    (tmp_path / "processor_config.json").write_text("{}")
    assert ImageProcessor.from_folder(tmp_path).output_size == (32, 32)


# --- reading ----------------------------------------------------------------------------------------------------------

FILES = {
    "rgb.png": lambda: encoded(photo(70, 50), "PNG"),
    "rgba.png": lambda: encoded(photo(70, 50, "RGBA"), "PNG"),
    "grey.png": lambda: encoded(photo(70, 50, "L"), "PNG"),
    "transparent_grey.png": lambda: encoded(photo(70, 50, "L"), "PNG", transparency=7),
    "palette.png": lambda: encoded(photo(70, 50, "P"), "PNG"),
    "transparent_palette.png": lambda: encoded(photo(70, 50, "P"), "PNG", transparency=3),
    "two_colours.png": lambda: encoded(photo(70, 50, "1"), "PNG"),
    "photo.jpg": lambda: encoded(photo(70, 50), "JPEG", quality=90),
    "grey.jpg": lambda: encoded(photo(70, 50, "L"), "JPEG"),
    "cmyk.jpg": lambda: encoded(photo(70, 50, "CMYK"), "JPEG"),
    "progressive.jpg": lambda: encoded(photo(70, 50), "JPEG", progressive=True),
    "animation.gif": lambda: encoded(photo(70, 50), "GIF", save_all=True, append_images=[photo(70, 50, seed=1)]),
    "picture.bmp": lambda: encoded(photo(70, 50), "BMP"),
    "cmyk.tiff": lambda: encoded(photo(70, 50, "CMYK"), "TIFF"),
    "picture.webp": lambda: encoded(photo(70, 50, "RGBA"), "WEBP", lossless=True),
} | {f"turned{n}.jpg": lambda n=n: encoded(photo(70, 50), "JPEG", exif=turned(n)) for n in range(10)}  # fmt: skip


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_transformers_reads_them(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FILES[name]())
    reference = BitImageProcessorPil(size=40, crop_size=32)
    processor = ImageProcessor.from_config(reference.to_dict())
    expected = theirs(reference, str(path))
    with open(path, "rb") as file:
        for source in (path, str(path), path.read_bytes(), file):
            np.testing.assert_array_equal(processor(source), expected)


def test_a_pillow_image_is_turned_upright_like_its_file():
    data = FILES["turned6.jpg"]()
    with Image.open(io.BytesIO(data)) as image:
        assert read_image(image).size == (50, 70)
        assert read_image(image) == read_image(data)


def test_sixteen_bits_become_eight():
    grey = np.arange(0, 65536, 256 * 16, np.uint16).repeat(4).reshape(8, 8)
    expected = (grey >> 8).astype(np.uint8)
    for image in (Image.fromarray(grey), encoded(Image.fromarray(grey), "PNG"), encoded(Image.fromarray(grey), "TIFF")):
        np.testing.assert_array_equal(np.asarray(read_image(image, channels=1)), expected)
        np.testing.assert_array_equal(np.asarray(read_image(image))[:, :, 2], expected)


def test_arrays_of_every_layout_are_one_image():
    image = photo(20, 10)
    last = np.asarray(image)
    first = np.moveaxis(last, 2, 0)
    floats = last.astype(np.float32)
    torch = pytest.importorskip("torch")
    for array in (last, first, floats, floats / 255, np.float64(last) / 255, np.float16(last), last.astype(np.int64),
                  torch.from_numpy(first.copy()), torch.from_numpy(floats / 255)):  # fmt: skip
        assert read_image(array) == image
    np.testing.assert_array_equal(np.asarray(read_image(last[:, :, 0]))[:, :, 1], last[:, :, 0])
    assert read_image(last[:, :, 0]) == read_image(last[:, :, :1]) == read_image(first[:1])
    assert read_image(last, channels=1) == image.convert("L")
    assert read_image(last[:1, :1]).size == (1, 1)  # not a grey image of one by three


@each_kind
def test_arrays_come_out_as_in_transformers(kind):
    reference = kind(do_convert_rgb=True)
    processor = ImageProcessor.from_config(reference.to_dict())
    for mode in ("RGB", "L", "RGBA"):
        array = np.asarray(photo(300, 200, mode)).reshape(200, 300, -1)
        assert levels_apart(processor(array), theirs(reference, array), processor) < 1.01
        if mode == "RGBA":
            continue
        floats = np.random.default_rng(0).uniform(size=array.shape).astype(np.float32)
        expected = reference(floats, do_rescale=False, return_tensors="np")["pixel_values"]  # it would scale twice
        np.testing.assert_allclose(processor(floats), expected, atol=1e-5)


def test_a_batch_of_floats_has_one_range():
    batch = np.stack([np.full((8, 8, 3), 1.0), np.full((8, 8, 3), 200.0)]).astype(np.float32)
    processor = ImageProcessor(size=8, do_normalize=False, rescale_factor=1.0)
    assert processor(batch)[:, 0, 0, 0].tolist() == [1.0, 200.0]
    assert processor(batch[0])[0, 0, 0, 0] == 255.0


def test_batches_and_threads_change_nothing(tmp_path):
    images = [photo(60 + n, 50, seed=n) for n in range(7)]
    for n, image in enumerate(images):
        image.save(tmp_path / f"{n}.png")
    paths = sorted(tmp_path.iterdir())
    processor = ImageProcessor(size=32)
    alone = np.concatenate([processor(path) for path in paths])
    for workers in (1, 2, 5):
        pixels, kept = processor.load(paths, workers=workers)
        np.testing.assert_array_equal(pixels, alone)
        assert kept == list(range(7)) and pixels.flags.c_contiguous
    read, kept = read_images(paths, workers=3)
    assert [image.tobytes() for image in read] == [image.tobytes() for image in images] and kept == list(range(7))
    np.testing.assert_array_equal(processor(read), alone)
    np.testing.assert_array_equal(
        processor(np.stack([np.asarray(image.resize((60, 50))) for image in images]))[0], alone[0]
    )


def test_a_transform_takes_the_place_of_the_resize():
    processor = ImageProcessor(size=8, do_normalize=False, rescale_factor=1.0)
    images = [photo(20, 20)] * 3
    pixels, _ = processor.load(images, transform=lambda i, image: Image.new("RGB", (8, 8), (i, i, i)))
    assert pixels[:, 0, 0, 0].tolist() == [0, 1, 2]
    with pytest.raises(InputError, match=r"image 0.*\(20, 20\).*\(8, 8\)"):
        processor.load(images, transform=lambda i, image: image)


def test_one_channel():
    processor = ImageProcessor(size=28, image_mean=(0.5,), image_std=(0.5,))
    image = photo(40, 40, "L")
    expected = theirs(ViTImageProcessorPil(size=28, image_mean=[0.5], image_std=[0.5]), image)
    np.testing.assert_array_equal(processor(image), expected)
    assert processor(photo(40, 40)).shape == (1, 1, 28, 28)


def test_another_size_keeps_the_crops_share():
    vit, deit = ImageProcessor(), ImageProcessor.from_config({"image_processor_type": "DeiTImageProcessor"})
    bit = ImageProcessor.from_config({"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}})
    assert vit(photo(50, 40), size=98).shape == (1, 3, 98, 98)
    assert vit(photo(50, 40), size=(42, 70)).shape == (1, 3, 42, 70)
    assert deit.with_size(112).size == {"height": 128, "width": 128}
    assert bit.with_size(98).size == {"shortest_edge": 112}
    assert bit(photo(500, 400), size=(98, 42)).shape == (1, 3, 98, 42)
    with pytest.raises(ConfigError, match="size"):
        vit(photo(50, 40), size=0)


# --- bad input --------------------------------------------------------------------------------------------------------


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    )


BROKEN = {
    "notes.jpg": (b"no image at all", "not an image"),
    "empty.jpg": (b"", "not an image"),
    "cut.jpg": (encoded(photo(300, 200), "JPEG")[:5000], "cut off"),
    "cut.png": (encoded(photo(300, 200), "PNG")[:5000], "cut off"),
    "bomb.png": (png_header(60_000, 60_000), "decompression bomb"),
    "large.png": (png_header(10_000, 10_000), "decompression bomb"),
    "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) run\n", "PostScript"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name, tmp_path):
    data, what = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=what) as error:
        ImageProcessor()([photo(10, 10), tmp_path / name])
    assert str(tmp_path / name) in str(error.value)
    with pytest.raises(InputError, match=r"image 1 \(.* bytes\)"):
        read_images([FILES["photo.jpg"](), data])


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(InputError, match=r"nowhere\.jpg: there is no such file"):
        read_image(tmp_path / "nowhere.jpg")
    with pytest.raises(InputError, match="not an image: expected a path"):
        read_image(3)
    with pytest.raises(InputError, match="no images"):
        ImageProcessor()([])


ARRAYS = {
    "two channels": (np.zeros((9, 9, 2), np.uint8), "1, 3 or 4 channels"),
    "five channels": (np.zeros((5, 9, 9), np.float32), "1, 3 or 4 channels"),
    "either axis": (np.zeros((3, 9, 3), np.uint8), "either its first or its last"),
    "a vector": (np.zeros(9, np.uint8), r"\(H, W\)"),
    "no pixels": (np.zeros((0, 9, 3), np.uint8), "no pixels"),
    "NaN": (np.full((9, 9, 3), np.nan), "nan"),
    "infinity": (np.full((9, 9, 3), np.inf), "inf"),
    "negative": (np.full((9, 9, 3), -0.5), "-0.5"),
    "16 bits": (np.full((9, 9), 300, np.uint16), "300"),
    "complex": (np.zeros((9, 9), complex), "complex"),
    "text": (np.full((9, 9), "x"), "pixels are"),
    "booleans": (np.zeros((9, 9), bool), "bool"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_no_image(name):
    array, what = ARRAYS[name]
    with pytest.raises(InputError, match=what):
        ImageProcessor(size=8)([np.zeros((8, 8, 3), np.uint8), array])
    with pytest.raises(InputError):
        ImageProcessor(size=8)(array)


def test_a_tensor_that_numpy_cannot_read():
    torch = pytest.importorskip("torch")
    for shape in ((8, 8, 3), (2, 8, 8, 3)):
        with pytest.raises(InputError, match=r"an array of shape.*detach"):
            ImageProcessor(size=8)(torch.zeros(shape, requires_grad=True))


def test_broken_images_are_skipped_and_reported(tmp_path):
    sources = [FILES["photo.jpg"](), tmp_path / "missing.jpg", photo(9, 9), b"junk"]
    processor = ImageProcessor(size=16)
    with pytest.warns(UserWarning) as found:
        pixels, kept = processor.load(sources, on_error="skip")
    first, second = (str(warning.message) for warning in found)
    assert first.startswith(f"skipped: {tmp_path / 'missing.jpg'}") and second.startswith("skipped: image 3 (4 bytes)")
    assert kept == [0, 2]
    np.testing.assert_array_equal(pixels, processor([sources[0], sources[2]]))
    with pytest.warns(UserWarning):
        images, kept = read_images(sources, on_error="skip")
    assert kept == [0, 2] and [image.size for image in images] == [(70, 50), (9, 9)]
    with pytest.warns(UserWarning):
        assert processor.load([b"junk"], on_error="skip")[0].shape == (0, 3, 16, 16)
    with pytest.raises(InputError, match="'ignore'"):
        read_images(sources, on_error="ignore")


def test_sizes_that_make_no_batch():
    processor = ImageProcessor(size={"shortest_edge": 16})
    with pytest.raises(InputError, match=r"2 sizes.*\(16, 20\).*\(16, 24\).*give size"):
        processor([photo(20, 16), photo(24, 16)])
    assert processor([photo(20, 16), photo(40, 32)]).shape == (2, 3, 16, 20)
    with pytest.raises(InputError, match="would be resized to 16 x 8000000"):
        processor(Image.new("RGB", (500_000, 1)))


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what is wrong with them
def test_damaged_files_never_crash():
    rng = np.random.default_rng(0)
    image = photo(40, 30)
    for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"):
        data = encoded(image, format)
        for _ in range(30):
            damaged = bytearray(data[: rng.integers(1, len(data) + 1)])
            for _ in range(rng.integers(0, 8)):
                damaged[rng.integers(min(len(damaged), 200))] = rng.integers(256)
            with contextlib.suppress(InputError):
                assert read_image(bytes(damaged)).mode == "RGB"


# --- bad configs ------------------------------------------------------------------------------------------------------

CONFIG_ERRORS = {
    "CLIPImageProcessor": ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor.*BitImageProcessor"),
    "no class": ({"size": 224}, "no class"),
    "a key": ({"crop_pct": 0.9}, "crop_pct = 0.9"),
    "padding": ({"do_pad": True}, "do_pad = True"),
    "layout": ({"input_data_format": "channels_last"}, "input_data_format"),
    "longest edge": ({"size": {"longest_edge": 20}}, "longest_edge"),
    "two edges": ({"size": {"shortest_edge": 20, "longest_edge": 30}}, "longest_edge"),
    "no size": ({"size": 0}, "size is 0"),
    "endless": ({"size": 10**9}, "size is 1000000000"),
    "a word": ({"size": "large"}, "size is 'large'"),
    "crop": ({"do_center_crop": True}, "crop_size"),
    "filter": ({"resample": 9}, "resample is 9"),
    "mean": ({"image_mean": [0.5, 0.5]}, "image_mean"),
    "infinite": ({"image_mean": [0.5, 0.5, float("inf")]}, "image_mean"),
    "unequal": ({"image_mean": [0.5]}, "1 channels, image_std 3"),
    "zero": ({"image_std": [0.5, 0, 0.5]}, "divided by 0"),
    "flag": ({"do_resize": "yes"}, "do_resize is 'yes'"),
    "factor": ({"rescale_factor": "x"}, "rescale_factor"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIG_ERRORS)
def test_configs_that_cannot_be_followed(name, tmp_path):
    config, what = CONFIG_ERRORS[name]
    config = (
        config if name in ("CLIPImageProcessor", "no class") else {"image_processor_type": "ViTImageProcessor"} | config
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=what) as error:
        ImageProcessor.from_folder(tmp_path)
    assert "preprocessor_config.json" in str(error.value)


def test_folders_without_a_config(tmp_path):
    with pytest.raises(ConfigError, match="no preprocessor_config.json"):
        ImageProcessor.from_folder(tmp_path)
    for text in ("[1]", "{", ""):
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(ConfigError, match="preprocessor_config.json"):
            ImageProcessor.from_folder(tmp_path)


# --- KerasHub ---------------------------------------------------------------------------------------------------------

KERAS = [
    {"image_size": (24, 24), "scale": 1 / 127.5, "offset": -1},
    {"image_size": (24, 36), "scale": [0.01, 0.02, 0.03], "offset": [-1, 0, 1.0], "interpolation": "bicubic"},
    {"image_size": (24, 24), "crop_to_aspect_ratio": False, "interpolation": "bicubic", "scale": 1 / 255},
    {"image_size": (24, 24), "interpolation": "nearest", "offset": 3.0},
    {"image_size": (24, 30), "antialias": True, "scale": 1 / 255},
    {"scale": 1 / 255},
]
KERAS_SCRIPT = """
import sys, json, numpy, keras_hub
from pathlib import Path
folder = Path(sys.argv[1])
pictures = numpy.load(folder / "pictures.npz")
for n, options in enumerate(json.loads(sys.argv[2])):
    converter = keras_hub.layers.ViTImageConverter(**options)
    preprocessor = keras_hub.models.ViTImageClassifierPreprocessor(image_converter=converter)
    preprocessor.save_to_preset(str(folder / str(n)))
    made = {name: numpy.asarray(converter(pictures[name].astype("float32"))) for name in pictures}
    numpy.savez(folder / f"{n}.npz", **made)
"""


@pytest.mark.slow
def test_pixels_are_those_of_kerashub(tmp_path):
    pytest.importorskip("keras_hub")
    pictures = {f"{w}x{h}": np.asarray(photo(w, h)) for w, h in ((100, 80), (61, 133), (10, 7), (24, 24), (1, 40))}
    np.savez(tmp_path / "pictures.npz", **pictures)
    command = [sys.executable, "-c", KERAS_SCRIPT, str(tmp_path), json.dumps(KERAS)]
    done = subprocess.run(command, env=os.environ | {"KERAS_BACKEND": "numpy"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for n, options in enumerate(KERAS):
        files = {path.name for path in (tmp_path / str(n)).iterdir()}
        assert "image_converter.json" in files or "preprocessor.json" in files
        processor = ImageProcessor.from_folder(tmp_path / str(n))
        (saved := tmp_path / f"saved{n}").mkdir()
        processor.save(saved)
        assert ImageProcessor.from_folder(saved) == processor
        mean, std = np.array(processor.image_mean)[:, None, None], np.array(processor.image_std)[:, None, None]
        with np.load(tmp_path / f"{n}.npz") as made:
            for name in made:
                expected = np.clip(np.moveaxis(made[name], 2, 0), -mean / std, (1 - mean) / std)  # ours are 8 bits
                apart = levels_apart(processor(pictures[name])[0], expected, processor)
                assert apart <= (1 if options.get("antialias") else 0.51), f"{options}, {name}: {apart}"


@pytest.mark.parametrize(
    "config, what",
    [
        ({"pad_to_aspect_ratio": True}, "pad_to_aspect_ratio"),
        ({"interpolation": "lanczos5"}, "lanczos5"),
        ({"norm_mean": [0.5] * 3}, "norm_mean"),
        ({"scale": 0}, "make no image"),
        ({"scale": [1, 2]}, "make no image"),
        ({"image_size": "x"}, "make no image"),
        ({"image_size": [0, 5]}, "size"),
    ],
)
def test_converters_that_cannot_be_followed(config, what):
    with pytest.raises(ConfigError, match=what):
        ImageProcessor.from_keras({"class_name": "ViTImageConverter", "config": config})


def test_other_converters_are_refused():
    with pytest.raises(ConfigError, match="SAMImageConverter"):
        ImageProcessor.from_keras({"registered_name": "keras_hub>SAMImageConverter", "config": {"image_size": [8, 8]}})


def test_the_processor_needs_no_framework():
    code = "import sys, modelhub.processing.augment; print({'torch', 'jax', 'tensorflow', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "set()", done.stderr
