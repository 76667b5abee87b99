"""GGUF reading: gguf-py wrote the files and is the oracle for every block type; then files that lie."""

import random
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType
from gguf.quants import dequantize, quantize
from gguf_blocks import SCALE_BYTES, random_blocks

from modelhub.errors import CheckpointError
from modelhub.hub.checkpoint import SPAN, TensorInfo
from modelhub.hub.gguf import open_gguf

LEGACY = [GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0]


def write(path, tensors=(), fill=None):
    """tensors: (name, array, ggml type or None) triples; `fill` adds metadata to the writer."""
    writer = gguf.GGUFWriter(path, "llama")
    if fill:
        fill(writer)
    for name, array, kind in tensors:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# Tensors


@pytest.mark.parametrize("kind", SCALE_BYTES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(256,), (3, 512), (2, 3, 256), (SPAN * 2 // 1024 + 3, 1024)])
def test_random_blocks_read_as_gguf_dequantises_them(tmp_path, kind, shape):
    blocks = random_blocks(shape, kind)
    expected = dequantize(blocks, kind)
    with open_gguf(write(tmp_path / "a.gguf", [("w", blocks, kind)])) as file:
        assert file.tensors == {"w": TensorInfo(kind.name, shape)}
        array = file.read("w")
        assert same_bits(array, expected)
        assert array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % 64 == 0
        assert same_bits(file.read("w", "bfloat16"), expected.astype(np.dtype("bfloat16")))


@pytest.mark.parametrize("kind", LEGACY, ids=lambda kind: kind.name)
def test_quantised_weights_come_back_close(tmp_path, kind):
    weights = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    with open_gguf(write(tmp_path / "a.gguf", [("w", quantize(weights, kind), kind)])) as file:
        error = np.abs(file.read("w") - weights).max()
    assert error < {8: 0.02, 5: 0.16, 4: 0.32}[int(kind.name[1])]


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
def test_plain_floats(tmp_path, target):
    weights = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    half = weights.astype(np.float16)
    brain = quantize(weights, GGMLType.BF16)
    path = write(tmp_path / "a.gguf", [("f32", weights, None), ("f16", half, None), ("bf16", brain, GGMLType.BF16)])
    with open_gguf(path) as file:
        for name, expected in [("f32", weights), ("f16", half), ("bf16", dequantize(brain, GGMLType.BF16))]:
            assert file.tensors[name] == TensorInfo(name.upper(), (8, 32))
            assert same_bits(file.read(name, target), expected.astype(np.dtype(target)))


def test_a_type_without_support_is_named_when_read(tmp_path):
    blocks = np.zeros((2, 66), np.uint8)
    tensors = [("odd", blocks, GGMLType.IQ2_XXS), ("w", np.ones(4, np.float32), None)]
    with open_gguf(write(tmp_path / "a.gguf", tensors)) as file:
        assert file.tensors["odd"] == TensorInfo("IQ2_XXS", (2, 256))
        assert file.read("w").sum() == 4
        with pytest.raises(CheckpointError, match="a.gguf: tensor 'odd' has type IQ2_XXS.*Q4_0.*Q6_K.*MXFP4"):
            file.read("odd")


def test_unknown_name_and_dtype_say_what_there_is(tmp_path):
    path = write(tmp_path / "a.gguf", [("token_embd.weight", np.zeros((2, 34), np.uint8), GGMLType.Q8_0)])
    with open_gguf(path) as file:
        with pytest.raises(CheckpointError, match="a.gguf.*'token_embed.weight'.*nearest: token_embd.weight"):
            file.read("token_embed.weight")
        for dtype in ("Q8_0", "int8"):
            with pytest.raises(CheckpointError, match=f"'{dtype}'. Ask for float32, float16, bfloat16"):
                file.read("token_embd.weight", dtype)


# Metadata


def test_metadata_values(tmp_path):
    integers = {"uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1, "int32": -(2**31)}
    integers |= {"uint64": 2**64 - 1, "int64": -(2**63)}

    def fill(writer):
        for kind, number in integers.items():
            getattr(writer, f"add_{kind}")(f"x.{kind}", number)
        writer.add_float32("x.float32", 1e-6)
        writer.add_float64("x.float64", 0.1)
        writer.add_bool("x.true", True)
        writer.add_bool("x.false", False)
        writer.add_string("x.string", "naïve \U0001f600")
        writer.add_array("x.floats", [0.5, -1.5])
        writer.add_array("x.ints", [1, -2, 3])
        writer.add_array("x.bools", [True, False])
        writer.add_array("x.strings", ["a", "", "▁the", "\n"])

    with open_gguf(write(tmp_path / "a.gguf", fill=fill)) as file:
        found = file.metadata
    assert found["general.architecture"] == "llama" and file.tensors == {}
    for kind, number in integers.items():
        assert found[f"x.{kind}"] == number and type(found[f"x.{kind}"]) is int
    assert found["x.float32"] == float(np.float32(1e-6)) and type(found["x.float32"]) is float
    assert found["x.float64"] == 0.1
    assert found["x.true"] is True and found["x.false"] is False
    assert found["x.string"] == "naïve \U0001f600"
    assert found["x.strings"] == ["a", "", "▁the", "\n"]
    for name, values, dtype in [("floats", [0.5, -1.5], "f4"), ("ints", [1, -2, 3], "i4"), ("bools", [1, 0], "?")]:
        array = found[f"x.{name}"]
        assert array.dtype == dtype and array.tolist() == values and array.flags.writeable


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def array(kind, count, body=b""):
    return struct.pack("<IQ", kind, count) + body


def pair(key, kind, body):
    return string(key) + struct.pack("<I", kind) + body


def tensor(name="w", dims=(2,), kind=0, offset=0, count=None):
    dim_count = len(dims) if count is None else count
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", dim_count, *dims, kind, offset)


def build(pairs=(), tensors=(), data=bytes(64), version=3, key_count=None, tensor_count=None, alignment=32):
    """A GGUF file by hand, so that it can lie."""
    counts = [
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if key_count is None else key_count,
    ]
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def opened(tmp_path, raw):
    path = tmp_path / "made.gguf"
    path.write_bytes(raw)
    with open_gguf(path) as file:
        return file


def test_version_2_alignment_and_shape_order(tmp_path):
    alignment = pair("general.alignment", 4, struct.pack("<I", 64))
    data = np.arange(6, dtype=np.float32).tobytes()
    tensors = [tensor("a", (3, 2)), tensor("b", (1,), offset=64)]
    path = tmp_path / "a.gguf"
    path.write_bytes(build([alignment], tensors, data.ljust(64, b"\0") + data, version=2, alignment=64))
    with open_gguf(path) as file:
        assert file.metadata == {"general.alignment": 64}
        assert file.read("a").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert file.read("b").tolist() == [0]


def test_bytes_that_are_not_utf8_survive(tmp_path):
    raw = [b"\xff", b"a\xe2\x96", "▁".encode(), b""]
    file = opened(tmp_path, build([pair("tokens", 9, array(8, 4, b"".join(map(string, raw))))]))
    assert [token.encode("utf-8", "surrogateescape") for token in file.metadata["tokens"]] == raw
    assert file.metadata["tokens"][2] == "▁"


def test_nested_arrays(tmp_path):
    inner = array(4, 2, struct.pack("<II", 1, 2)) + array(8, 1, string("x"))
    nested = opened(tmp_path, build([pair("n", 9, array(9, 2, inner))])).metadata["n"]
    assert nested[0].tolist() == [1, 2] and nested[1] == ["x"]


# Files that lie

MANY = 1 << 62
ALIGNED_24 = pair("general.alignment", 4, struct.pack("<I", 24))
LIES = {
    "empty": (b"", "the magic"),
    "magic": (b"GGML" + bytes(60), "begins with b'GGUF', found b'GGML'"),
    "version 1": (build(version=1), "version 1.*llama.cpp"),
    "version 0": (build(version=0), "version 0"),
    "big-endian": (build(version=3 << 24), "big-endian"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "tensor count": (build(tensor_count=MANY), f"{MANY} tensors"),
    "key count": (build(key_count=MANY), f"{MANY} keys"),
    "key length": (build([struct.pack("<Q", MANY) + bytes(40)]), "metadata key 0 has .* at most 65535"),
    "key beyond": (build([struct.pack("<Q", 60000) + bytes(40)]), "metadata key 0 needs 60000 bytes"),
    "key twice": (build([pair("k", 4, bytes(4))] * 2), "'k' is there twice"),
    "string length": (build([pair("k", 8, struct.pack("<Q", MANY))]), f"'k' needs {MANY} bytes"),
    "value type": (build([pair("k", 13, bytes(8))]), "'k' has value type 13"),
    "bool": (build([pair("k", 7, b"\2")]), "'k' holds a bool"),
    "bools": (build([pair("k", 9, array(7, 3, b"\0\2\1"))]), "'k' holds a bool"),
    "array count": (build([pair("k", 9, array(4, MANY))]), "'k' needs"),
    "array overflow": (build([pair("k", 9, array(10, (1 << 61) + 1, bytes(8)))]), "'k' needs"),
    "array type": (build([pair("k", 9, array(99, 1, bytes(8)))]), "'k' has value type 99"),
    "string count": (build([pair("k", 9, array(8, MANY))]), "'k' needs"),
    "string in array": (build([pair("k", 9, array(8, 2, string("a") + struct.pack("<Q", MANY)))]), "string 1 has"),
    "nested count": (build([pair("k", 9, array(9, MANY))]), "'k' needs"),
    "nested deep": (build([pair("k", 9, array(9, 1) * 1000)]), "'k' nests arrays more than 4 deep"),
    "alignment": (build([ALIGNED_24]), "alignment is 24, expected a power of two"),
    "alignment 0": (build([pair("general.alignment", 4, bytes(4))]), "alignment is 0"),
    "alignment type": (build([pair("general.alignment", 8, string("32"))]), "alignment is '32'"),
    "split": (build([pair("split.count", 2, struct.pack("<H", 3))]), "3 parts.*llama-gguf-split --merge"),
    "no dims": (build(tensors=[tensor(dims=())]), "'w' has 0 dimensions"),
    "five dims": (build(tensors=[tensor(dims=(1,) * 5)]), "'w' has 5 dimensions"),
    "dim count": (build(tensors=[tensor(count=1 << 31)]), "'w' has 2147483648 dimensions"),
    "zero dim": (build(tensors=[tensor(dims=(2, 0))]), r"'w' has dimensions \(2, 0\)"),
    "dims product": (build(tensors=[tensor(dims=(1 << 32, 1 << 32, 2))]), "'w' ends at byte"),
    "half a block": (build(tensors=[tensor(dims=(48, 2), kind=8)]), "rows of whole Q8_0 blocks"),
    "tensor type": (build(tensors=[tensor(kind=4)]), "'w' has ggml type 4.*F32, F16, BF16, Q4_0"),
    "offset": (build(tensors=[tensor(offset=96)]), "'w' ends at byte"),
    "offset overflow": (build(tensors=[tensor(offset=(1 << 64) - 32)]), "'w' ends at byte"),
    "misaligned": (build(tensors=[tensor(offset=4)]), "'w' begins at 4, expected a multiple of the alignment 32"),
    "tensor twice": (build(tensors=[tensor(), tensor(offset=32)]), "'w' is there twice"),
    "overlap": (build(tensors=[tensor("a", (12,)), tensor("b", (1,), offset=32)]), "'a' and 'b' overlap"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_file_that_does_not_hold_together(tmp_path, case):
    raw, message = LIES[case]
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            opened(tmp_path, raw)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert "made.gguf" in str(caught.value) and len(str(caught.value)) < 1000


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="none.gguf is not there"):
        open_gguf(tmp_path / "none.gguf")


def small_file(tmp_path):
    def fill(writer):
        writer.add_uint32("llama.block_count", 2)
        writer.add_array("tokens", [f"t{i}" for i in range(8)])
        writer.add_array("scores", [0.5] * 8)

    tensors = [(kind.name, random_blocks((2, 256), kind), kind) for kind in SCALE_BYTES]
    return write(tmp_path / "small.gguf", [("f32", np.ones((2, 4), np.float32), None), *tensors], fill)


def test_truncated_anywhere(tmp_path):
    path = small_file(tmp_path)
    raw = path.read_bytes()
    for length in range(0, len(raw) - 32, 7):  # the last 32 bytes may be padding
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match="small.gguf"):
            open_gguf(path)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
def test_mutated_files_load_or_say_why(tmp_path):
    path = small_file(tmp_path)
    raw = path.read_bytes()
    rng = random.Random(0)
    for _ in range(400):
        mutated = bytearray(raw)
        for _ in range(rng.randrange(1, 4)):
            mutated[rng.randrange(len(raw) if rng.random() < 0.2 else 900)] = rng.randrange(256)
        path.write_bytes(mutated)
        try:
            with open_gguf(path) as file:
                for name in file.tensors:
                    assert file.read(name).nbytes <= 32 * len(raw)
        except CheckpointError as error:
            assert "small.gguf" in str(error)
