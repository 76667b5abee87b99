"""Safetensors reading: values, memory, and files that lie."""

import json
import os
import random
import struct
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from modelhub.errors import CheckpointError
from modelhub.hub.checkpoint import SPAN, SafetensorsCheckpoint, TensorInfo, empty, open_folder

ROOT = Path(__file__).parents[2]
STORED = ["float64", "float32", "float16", "bfloat16", "bool", "int64", "int32", "int16", "int8"]
STORED += ["uint64", "uint32", "uint16", "uint8"]


def values(shape, dtype, seed=0):
    drawn = np.random.default_rng(seed).uniform(0 if dtype.startswith("u") else -100, 100, shape)
    return np.asarray(drawn).astype(np.dtype(dtype))


def write(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# Reading


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16", "stored"])
def test_every_dtype_reads_as_numpy_casts_it(tmp_path, stored, target):
    target = stored if target == "stored" else target
    tensor = values((5, 7), stored)
    save_file({"w": tensor}, tmp_path / "a.safetensors")
    with SafetensorsCheckpoint(tmp_path / "a.safetensors") as checkpoint:
        assert checkpoint.tensors == {"w": TensorInfo(stored, (5, 7))}
        assert same_bits(checkpoint.read("w", target), tensor.astype(np.dtype(target)))


def test_float8_reads_as_ml_dtypes_casts_it(tmp_path):
    codes = np.arange(256, dtype=np.uint8)
    header = {"a": entry("F8_E4M3", [256], [0, 256]), "b": entry("F8_E5M2", [256], [256, 512])}
    checkpoint = SafetensorsCheckpoint(write(tmp_path / "f8.safetensors", header, codes.tobytes() * 2))
    np.testing.assert_array_equal(checkpoint.read("a"), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    np.testing.assert_array_equal(checkpoint.read("b"), codes.view(ml_dtypes.float8_e5m2).astype(np.float32))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (3, 1, 2), (SPAN * 2 + 13,), (3, SPAN + 1)])
@pytest.mark.parametrize("target", ["float32", "bfloat16"])
def test_every_shape(tmp_path, shape, target):
    tensor = values(shape, "float32")
    save_file({"first": values((3,), "int8"), "w": tensor}, tmp_path / "a.safetensors")
    with SafetensorsCheckpoint(tmp_path / "a.safetensors") as checkpoint:
        assert same_bits(checkpoint.read("w", target), tensor.astype(np.dtype(target)))


def test_the_caller_owns_what_it_reads(tmp_path):
    tensors = {f"t{i}": values((i * 7 + 1,), "float32", i) for i in range(20)}
    save_file(tensors, tmp_path / "a.safetensors")
    with SafetensorsCheckpoint(tmp_path / "a.safetensors") as checkpoint:
        first = {name: checkpoint.read(name) for name in tensors}
        for array in first.values():
            assert array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % 64 == 0
            array[...] = 0
        second = {name: checkpoint.read(name) for name in tensors}
    assert all(same_bits(second[name], tensors[name]) for name in tensors)
    assert not any(array.any() for array in first.values())


def test_reads_from_many_threads(tmp_path):
    tensors = {f"t{i}": values((3, 100 + i), "float32", i) for i in range(64)}
    save_file(tensors, tmp_path / "a.safetensors")
    with SafetensorsCheckpoint(tmp_path / "a.safetensors") as checkpoint, ThreadPoolExecutor(8) as pool:
        for name, array in zip(tensors, pool.map(checkpoint.read, tensors), strict=True):
            assert same_bits(array, tensors[name])


def test_unknown_name_and_dtype_say_what_there_is(tmp_path):
    save_file({"model.norm.weight": values((2,), "float32")}, tmp_path / "a.safetensors")
    with SafetensorsCheckpoint(tmp_path / "a.safetensors") as checkpoint:
        with pytest.raises(CheckpointError, match="a.safetensors.*'norm.weight'.*nearest: model.norm.weight"):
            checkpoint.read("norm.weight")
        with pytest.raises(CheckpointError, match="'model.norm.weight'.*'int4'.*float32, float16, bfloat16"):
            checkpoint.read("model.norm.weight", "int4")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_peak_memory_is_the_result_and_a_few_megabytes(tmp_path, stored):
    save_file({f"t{i}": np.zeros((4096, 1024), stored) for i in range(4)}, tmp_path / "a.safetensors")
    script = """
import sys
from modelhub.hub.checkpoint import SafetensorsCheckpoint
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
checkpoint = SafetensorsCheckpoint(sys.argv[1])
before = peak()
tensors = [checkpoint.read(name) for name in checkpoint.tensors]
print(peak() - before)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "a.safetensors")]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert 60 < grown < 64 + 8


# Memory


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1 << 20,), (5 << 20,)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_empty_is_aligned_and_its_own(shape, dtype):
    arrays = [empty(shape, dtype) for _ in range(3)]
    for i, array in enumerate(arrays):
        assert array.shape == shape and array.dtype == np.dtype(dtype) and array.ctypes.data % 64 == 0
        array[...] = i + 1
    for i, array in enumerate(arrays):
        assert (array == i + 1).all()


def test_empty_gives_its_memory_back():
    arrays = [empty((1 << 20,), "float32") for _ in range(40)]  # 160 MB: several shared blocks
    blocks = [weakref.ref(array.base) for array in arrays]
    assert len({id(block()) for block in blocks}) < len(arrays)
    del arrays
    assert not any(block() is not None for block in blocks)


# Files that lie


HEADERS = {
    "no object": (b"[1]", "JSON object"),
    "no JSON": (b"{", "not JSON"),
    "no UTF-8": (b'{"\xff": 1}', "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "long integer": (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    "twice": (b'{"a": 1, "a": 2}', "'a' twice"),
    "no fields": ({"w": {"dtype": "F32"}}, "dtype, shape and data_offsets"),
    "not a dict": ({"w": [1, 2]}, "dtype, shape and data_offsets"),
    "unknown dtype": ({"w": entry("F4")}, "'F4'.*modelhub reads F64, F32"),
    "dtype no string": ({"w": entry(["F32"])}, "has dtype"),
    "negative size": ({"w": entry(shape=[-2])}, "shape"),
    "fractional size": ({"w": entry(shape=[2.0])}, "shape"),
    "true as size": ({"w": entry(shape=[True, 2])}, "shape"),
    "too many sizes": ({"w": entry(shape=[1] * 40 + [2])}, "shape"),
    "huge beside zero": ({"w": entry(shape=[0, 1 << 61, 8], offsets=(0, 0))}, "found 0"),
    "beyond the end": ({"w": entry(shape=[3], offsets=(0, 12))}, "data_offsets within 8 bytes"),
    "backwards": ({"w": entry(offsets=(8, 0))}, "data_offsets"),
    "negative": ({"w": entry(offsets=(-8, 0))}, "data_offsets"),
    "three offsets": ({"w": entry(offsets=(0, 4, 8))}, "data_offsets"),
    "wrong size": ({"w": entry(shape=[3])}, r"\[3\] is 12 bytes, found 8"),
    "overlap": ({"a": entry(), "b": entry(shape=[1], offsets=(4, 8))}, "'a' and 'b' overlap"),
    "hole": ({"a": entry(shape=[1], offsets=(4, 8))}, "expected 4 bytes of tensors.*found 8"),
    "long name": ({"w" * 1_000_000: entry("F4")}, "'F4'"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_does_not_hold_together(tmp_path, case):
    header, message = HEADERS[case]
    path = write(tmp_path / "bad.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsCheckpoint(path)
    assert "bad.safetensors" in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("raw", [b"", b"\0" * 7, struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 3) + b"{}"])
def test_a_header_length_that_the_file_does_not_hold(tmp_path, raw):
    (tmp_path / "bad.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="bad.safetensors.*header.*Download it again"):
        SafetensorsCheckpoint(tmp_path / "bad.safetensors")


def test_metadata_is_skipped(tmp_path):
    path = write(tmp_path / "a.safetensors", {"__metadata__": {"format": "pt"}, "w": entry()}, bytes(8))
    assert list(SafetensorsCheckpoint(path).tensors) == ["w"]


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_folder(tmp_path)


@pytest.mark.parametrize("target", ["float32", "float16"])
def test_a_file_that_shrinks_while_open(tmp_path, target):
    path = write(tmp_path / "a.safetensors", {"w": entry(shape=[1000], offsets=(0, 4000))}, bytes(4000))
    with SafetensorsCheckpoint(path) as checkpoint:
        os.truncate(path, 2000)
        with pytest.raises(CheckpointError, match="a.safetensors.*ended at byte 2000"):
            checkpoint.read("w", target)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_mutated_files_load_or_say_why(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": values((4, 3), "float32"), "b": values((5,), "float16")}, path)
    raw = path.read_bytes()
    rng = random.Random(0)
    for _ in range(400):
        mutated = bytearray(raw[: rng.randrange(len(raw))] if rng.random() < 0.3 else raw)
        for _ in range(rng.randrange(4)):
            if mutated:
                mutated[rng.randrange(min(len(mutated), 200))] = rng.randrange(256)
        path.write_bytes(mutated)
        try:
            with SafetensorsCheckpoint(path) as checkpoint:
                for name in checkpoint.tensors:
                    assert checkpoint.read(name, "bfloat16").nbytes <= len(raw)
        except CheckpointError as error:
            assert "a.safetensors" in str(error)


# Folders


def shards(folder, **weight_map):
    for i, names in enumerate([("a", "b"), ("c",)]):
        save_file({name: values((2, 3), "float32", ord(name)) for name in names}, folder / f"m-{i}.safetensors")
    index = {"weight_map": {"a": "m-0.safetensors", "b": "m-0.safetensors", "c": "m-1.safetensors"} | weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_folder_with_one_file(tmp_path):
    save_file({"w": values((2, 3), "float32")}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with open_folder(tmp_path) as checkpoint:
        assert same_bits(checkpoint.read("w"), values((2, 3), "float32"))


def test_a_folder_with_shards(tmp_path):
    shards(tmp_path)
    with open_folder(tmp_path) as checkpoint:
        assert checkpoint.tensors == {name: TensorInfo("float32", (2, 3)) for name in "abc"}
        for name in "abc":
            assert same_bits(checkpoint.read(name), values((2, 3), "float32", ord(name)))
        with pytest.raises(CheckpointError, match="index.json has no tensor 'd'"):
            checkpoint.read("d")


def test_shards_may_be_links_as_in_the_hugging_face_cache(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shards(snapshot)
    for shard in snapshot.glob("*.safetensors"):
        shard.rename(blobs / shard.stem)
        shard.symlink_to(Path("../../blobs") / shard.stem)
    with open_folder(snapshot) as checkpoint:
        assert same_bits(checkpoint.read("c"), values((2, 3), "float32", ord("c")))


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "a/../../x.safetensors", "/etc/x.safetensors", "C:\\x.safetensors", "C:x.safetensors"]
    + ["\\\\host\\x.safetensors", "..\\x.safetensors", "pytorch_model.bin", "", "x\0.safetensors", 7, None],
)
def test_an_index_that_leaves_the_folder(tmp_path, shard):
    save_file({"c": values((2, 3), "float32")}, tmp_path / "x.safetensors")
    (tmp_path / "folder").mkdir()
    shards(tmp_path / "folder", c=shard)
    with pytest.raises(CheckpointError, match="index.json: tensor 'c'.*inside the folder"):
        open_folder(tmp_path / "folder")


def test_missing_shards_are_named_together(tmp_path):
    shards(tmp_path, d="m-2.safetensors", e="m-3.safetensors")
    with pytest.raises(CheckpointError, match="4 shards and 2 .*m-2.safetensors, m-3.safetensors"):
        open_folder(tmp_path)


def test_missing_tensors_are_named_together(tmp_path):
    shards(tmp_path, d="m-0.safetensors", e="m-1.safetensors")
    with pytest.raises(CheckpointError, match="2 tensors.*'d' in m-0.safetensors, 'e' in m-1.safetensors"):
        open_folder(tmp_path)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="model.safetensors.index.json is damaged"):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "gemma.ckpt"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match=rf"{name}.*run any code.*save_pretrained"):
        open_folder(tmp_path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    with pytest.raises(CheckpointError, match="an empty folder"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected model.safetensors.*found config.json"):
        open_folder(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_folder(tmp_path / "nowhere")
