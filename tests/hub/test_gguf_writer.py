"""GGUF writing: gguf-py reads what we wrote, and its own conversions are the oracle for the values."""

import resource
import signal
import subprocess
import sys
import threading
import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from modelhub.errors import BackendNotInstalled, CheckpointError
from modelhub.hub.gguf import open_gguf
from modelhub.hub.gguf_writer import write_gguf

ARCH = {"general.architecture": "llama"}
Q8 = gguf.GGMLQuantizationType.Q8_0


def tensors(dtype=np.float32) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (50, 64), "blk.0.attn_norm.weight": (64,), "blk.0.attn_q.bias": (7,),
        "blk.0.attn_q.weight": (7, 64), "blk.0.odd.weight": (5, 40), "blk.0.ffn_norm.weight": (2, 32),
    }  # fmt: skip
    return {name: draw.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(path, arrays, dtype="float16", metadata=ARCH):
    write_gguf(path, metadata, {name: x.shape for name, x in arrays.items()}, arrays.__getitem__, dtype)
    return path


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_gguf_py_reads_the_values(tmp_path, dtype, source):
    arrays = tensors(source)
    read = gguf.GGUFReader(write(tmp_path / "a.gguf", arrays, dtype))
    assert [tensor.name for tensor in read.tensors] == list(arrays)
    for tensor in read.tensors:
        x = arrays[tensor.name].astype(np.float32)
        kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
        if x.ndim == 1 or "_norm" in tensor.name:
            kind = "F32"
        elif dtype == "q8_0" and x.shape[-1] % 32:
            kind = "F16"
        wanted = {
            "F32": lambda x: x,
            "F16": lambda x: x.astype(np.float16),
            "BF16": lambda x: x.astype(ml_dtypes.bfloat16),
            "Q8_0": lambda x: dequantize(quantize(x, Q8), Q8),
        }[kind](x)
        assert (tensor.name, tensor.tensor_type.name) == (tensor.name, kind)
        assert tensor.shape.tolist() == list(x.shape[::-1])
        found = dequantize(tensor.data, tensor.tensor_type).reshape(x.shape)
        np.testing.assert_array_equal(found, wanted.astype(np.float32), err_msg=tensor.name)
    assert read.fields["general.file_type"].contents() == {"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7}[dtype]


def test_metadata_comes_back(tmp_path):
    metadata = ARCH | {
        "llama.context_length": 8192, "llama.rope.freq_base": 5e5, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.tokens": ["<s>", "▁né", "\udcff raw byte", "🚀"], "llama.pattern": [True, False, True],
        "tokenizer.ggml.scores": np.array([0, -1, 2.5, -1e6], np.float32), "general.name": "né\n",
        "tokenizer.ggml.token_type": np.array([3, 1, 1, 6], np.int32), "tokenizer.ggml.merges": [],
    }  # fmt: skip
    path = write(tmp_path / "a.gguf", tensors(), metadata=metadata)
    with open_gguf(path) as file:
        assert file.metadata.pop("general.file_type") == 1
        assert file.metadata.pop("general.quantization_version") == 2
        del metadata["tokenizer.ggml.merges"]  # the format has no empty lists
        assert file.metadata.keys() == metadata.keys()
        for key, value in metadata.items():
            assert np.array_equal(file.metadata[key], value), key
    kinds = {key: field.types for key, field in gguf.GGUFReader(path).fields.items()}
    types = gguf.GGUFValueType
    assert kinds["llama.context_length"] == [types.UINT32]
    assert kinds["tokenizer.ggml.token_type"] == [types.ARRAY, types.INT32]
    assert kinds["tokenizer.ggml.scores"] == [types.ARRAY, types.FLOAT32]
    assert kinds["llama.pattern"] == [types.ARRAY, types.BOOL]


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path):
    path = write(tmp_path / "a.gguf", tensors())
    before = path.read_bytes()
    for value, dtype, message in (
        (70000.0, "float16", "'blk.0.attn_q.weight' does not fit F16.*70000; take bfloat16 or float32"),
        (3.4e38, "bfloat16", "does not fit BF16.*3.4e.38"),
        (np.nan, "float32", "nan; the model is broken"),
        (np.inf, "q8_0", "inf; the model is broken"),
    ):
        arrays = tensors()
        arrays["blk.0.attn_q.weight"][3, 5] = value
        with pytest.raises(CheckpointError, match=message):
            write(path, arrays, dtype)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, ARCH, {"a": (4, 4)}, lambda name: (_ for _ in ()).throw(KeyboardInterrupt))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_impossible_place_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="x.gguf could not be written.*ile exists"):
        write(tmp_path / "file" / "x.gguf", tensors())


def test_two_at_once_do_not_mix(tmp_path):
    path, second = tmp_path / "a.gguf", {"w": np.full((4, 32), 2, np.float32)}
    thread = threading.Thread(target=write, args=(path, second))

    def read(name):
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()  # it waits for the first
        return np.ones((4, 32), np.float32)

    write_gguf(path, ARCH, {"v": (4, 32)}, read, check=lambda work: open_gguf(work).read("v"))
    thread.join(20)
    with open_gguf(path) as file:
        np.testing.assert_array_equal(file.read("w"), second["w"])
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_gone(tmp_path):
    path = tmp_path / "a.gguf"
    killed = (
        "import os, sys, pathlib, numpy as np; from modelhub.hub.gguf_writer import write_gguf; "
        "write_gguf(pathlib.Path(sys.argv[1]), {'general.architecture': 'llama'}, {'a': (4, 32), 'b': (4, 32)}, "
        "lambda name: np.ones((4, 32)) if name == 'a' else os.kill(os.getpid(), 9))"
    )
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", killed, str(path)]).returncode == -9
        assert not path.exists() and len(list(tmp_path.glob(".a.gguf*.saving"))) == 1
    write(path, tensors())
    assert [*tmp_path.iterdir()] == [path]


def test_what_a_check_refuses_takes_no_place(tmp_path):
    path = write(tmp_path / "a.gguf", tensors())
    before = path.read_bytes()

    def refuse(work):
        assert open_gguf(work).tensors.keys() == {"w"}  # whole by then
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no"):
        write_gguf(path, ARCH, {"w": (4, 32)}, lambda name: np.ones((4, 32), np.float32), check=refuse)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = write(tmp_path / "a.gguf", tensors())
    before = path.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(CheckpointError, match="a.gguf could not be written.*as it was"):
            write(path, {"w": np.ones((1000, 64), np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_memory_is_that_of_one_tensor(tmp_path):
    shapes = {f"blk.{i}.w.weight": (1024, 4096) for i in range(6)}  # 17 MB each
    write_gguf(tmp_path / "warm.gguf", ARCH, {"w": (32, 32)}, lambda name: np.ones((32, 32), np.float32), "q8_0")
    tracemalloc.start()
    try:
        write_gguf(tmp_path / "a.gguf", ARCH, shapes, lambda name: np.ones(shapes[name], np.float32), "q8_0")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * 17_000_000


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BackendNotInstalled, match=r'pip install "modelhub\[gguf\]"'):
        write(tmp_path / "a.gguf", tensors())
    assert not list(tmp_path.iterdir())
