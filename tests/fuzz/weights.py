"""Files of tensors, adapters, and the checkpoints of runs."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import gguf as gguf_py
import h5py
import numpy as np
from fuzz import mutations
from fuzz.target import TARGETS, Target, write_json
from safetensors.numpy import save_file
from tiny_preset import write_preset

from modelhub.errors import CheckpointError, ConfigError
from modelhub.hub.adapters import AdapterFiles, write_adapter
from modelhub.hub.checkpoint import open_folder
from modelhub.hub.files import save_arrays
from modelhub.hub.gguf import open_gguf
from modelhub.hub.kerashub import open_kerashub
from modelhub.hub.quantized_folders import QuantizedFolder
from modelhub.processing.guards import read_json
from modelhub.quantizing.integer_codes import held
from modelhub.tasks.backbone import Backbone
from modelhub.training import checkpoints


def _tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    kinds = ["float32", "float16", "float64", "bfloat16", "float8_e4m3fn", "int64", "int8", "uint8", "bool"]
    return {kind: rng.integers(0, 2, (3, 4)).astype(np.dtype(kind)) for kind in kinds} | {
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.ones((), np.float32),
    }


def _read_all(checkpoint: Any) -> None:
    with checkpoint:
        for name, info in checkpoint.tensors.items():
            assert checkpoint.read(name).shape == info.shape


def _write_shards(folder: Path) -> None:
    tensors = _tensors()
    shard_of = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        save_file({name: x for name, x in tensors.items() if shard_of[name] == shard}, folder / shard)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": shard_of})


TARGETS["safetensors"] = Target(
    lambda folder: save_file(_tensors(), folder / "model.safetensors"),
    lambda folder: _read_all(open_folder(folder)),
    {"model.safetensors": mutations.safetensors},
)
TARGETS["shards"] = Target(
    _write_shards,
    lambda folder: _read_all(open_folder(folder)),
    {"model.safetensors.index.json": mutations.json_text, "model-0.safetensors": mutations.safetensors},
)

_BLOCK_TYPES = [
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
]  # fmt: skip


def _write_gguf(folder: Path) -> None:
    writer = gguf_py.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_uint32("general.alignment", 32)
    writer.add_uint8("a.u8", 1)
    writer.add_int64("a.i64", -1)
    writer.add_float64("a.f64", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "naïve")
    writer.add_array("a.floats", [0.5, 1.5])
    writer.add_array("a.strings", ["a", "", "bc"])
    writer.add_array("a.nested", [[1, 2], [3]])
    rng = np.random.default_rng(0)
    for name in _BLOCK_TYPES:
        kind = gguf_py.GGMLQuantizationType[name]
        elements, nbytes = gguf_py.constants.GGML_QUANT_SIZES[kind]
        writer.add_tensor(name, rng.integers(0, 256, (2, 256 // elements * nbytes), np.uint8), raw_dtype=kind)
    for dtype in (np.float32, np.float16):
        writer.add_tensor(np.dtype(dtype).name, rng.standard_normal((3, 8)).astype(dtype))
    finish(writer)


def finish(writer: gguf_py.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


TARGETS["gguf"] = Target(
    _write_gguf, lambda folder: _read_all(open_gguf(folder / "model.gguf")), {"model.gguf": mutations.gguf}, 1.5
)


def _write_h5(folder: Path) -> None:
    with h5py.File(folder / "model.weights.h5", "w") as file:
        file["layers/reversible_embedding/vars/0"] = np.ones((6, 4), np.float32)
        file["layers/norm/vars/0"] = np.ones(4, np.float16)
        brain = file.create_dataset("layers/dense/vars/0", data=np.zeros((3, 4), np.uint16).view("V2"))
        brain.attrs["dtype"] = "bfloat16"
        file.create_dataset(
            "layers/zipped/vars/0", data=np.arange(64.0).reshape(8, 8), chunks=(4, 8), compression="gzip"
        )
        file["scalar"] = np.float64(1)


TARGETS["kerashub-h5"] = Target(
    _write_h5, lambda folder: _read_all(open_kerashub(folder)), {"model.weights.h5": mutations.raw}, 1.5
)

# Adapters and runs


def _write_adapter(folder: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}.lora.lora_A": np.ones((2, 32), np.float32),
        f"{module}.lora.lora_B": np.ones((32, 2), np.float32),
    }
    tensors[f"{module}.lora.lora_magnitude_vector"] = np.ones(32, np.float32)
    write_adapter(folder, AdapterFiles(2, 8.0, 0.1, False, True, ["q_proj"], {}, {}, "base", tensors))
    config = json.loads((folder / "adapter_config.json").read_text())
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r".*layers\.[0-9]+\.self_attn\.(q|k)_proj": 2.0}}
    write_json(folder / "adapter_config.json", config | patterns)


@functools.cache
def _tiny() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return Backbone.from_preset(str(write_preset(Path(folder) / "tiny")), backend="numpy", device="cpu")


def _load_adapter(folder: Path) -> None:
    _tiny().load_adapter(folder, name=f"damaged-{len(_tiny().adapters)}")
    _tiny().set_adapter(None)
    for name in list(_tiny().adapters):
        del _tiny().adapters[name]


TARGETS["adapter"] = Target(
    _write_adapter,
    _load_adapter,
    {"adapter_config.json": mutations.json_text, "adapter_model.safetensors": mutations.safetensors},
)


def _write_run(folder: Path) -> None:
    meta = {"settings": {"seed": 0, "lora": {"rank": 4}}, "history": [{"loss": 1.0}], "position": 3}
    checkpoints.save(folder, 7, {"a": np.ones((2, 3), np.float32), "step": np.array(7)}, meta)
    checkpoints.mark_finished(folder)


def _load_run(folder: Path) -> None:
    found = checkpoints.latest(folder)
    checkpoints.is_finished(folder)
    if found is None:
        raise CheckpointError("the damage was noticed, and the checkpoint passed over")
    np.testing.assert_array_equal(found.tensors()["a"], np.ones((2, 3), np.float32))
    checkpoints.check_same(found.meta, {"settings": {"seed": 0, "lora": {"rank": 4}}})


TARGETS["run"] = Target(
    _write_run,
    _load_run,
    {
        "step-00000007/run.json": mutations.json_text,
        "step-00000007/state.safetensors": mutations.safetensors,
        "finished": mutations.raw,
    },
)


# Quantised folders

_LAYERS = [f"model.layers.{i}.q_proj" for i in range(2)]
_GROUPS = {"a": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}, "targets": ["Linear"]}}
_NF4 = {"quant_type": "nf4", "blocksize": 64, "shape": [16, 32], "nested_blocksize": 256, "nested_offset": 0.5}
_NF4_STATE = np.frombuffer(json.dumps(_NF4).encode(), np.uint8)
_QUANTIZED: dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq", "pack_dtype": "int32"},
        {
            "qweight": np.ones((4, 16), "int32"), "qzeros": np.ones((1, 2), "int32"),
            "scales": np.ones((1, 16), "float16"), "g_idx": np.zeros(32, "int32"),
        },
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        {
            "qweight": np.ones((32, 2), "int32"), "qzeros": np.ones((1, 2), "int32"),
            "scales": np.ones((1, 16), "float16"),
        },
    ),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": _GROUPS},
        {
            "weight_packed": np.ones((16, 4), "int32"), "weight_scale": np.ones((16, 1), "float16"),
            "weight_shape": np.array([16, 32]), "weight_zero_point": np.ones((2, 1), "int32"),
            "weight_g_idx": np.zeros(32, "int32"),
        },
    ),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [8, 16], "fmt": "e4m3"},
        {"weight": np.ones((16, 32), "float8_e4m3fn"), "weight_scale_inv": np.ones((2, 2), "float32")},
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {
            "weight": np.ones((256, 1), "uint8"), "weight.absmax": np.ones(8, "uint8"),
            "weight.quant_map": np.ones(16, "float32"), "weight.nested_absmax": np.ones(1, "float32"),
            "weight.nested_quant_map": np.ones(256, "float32"),
            "weight.quant_state.bitsandbytes__nf4": _NF4_STATE,
        },
    ),
}  # fmt: skip


def _write_quantized(folder: Path, method: str) -> None:
    config, tensors = _QUANTIZED[method]
    save_arrays(
        {f"{layer}.{name}": x for layer in _LAYERS for name, x in tensors.items()}, folder / "model.safetensors"
    )
    write_json(folder / "quantization.json", config)


def _read_quantized(folder: Path) -> None:
    with QuantizedFolder(folder, read_json(folder / "quantization.json", ConfigError)) as found:
        for name in found.tensors:
            found.read(name)
            if (codes := found.codes(name)) is not None:
                held(codes, None)


for _method in _QUANTIZED:
    TARGETS[f"quantized-{_method}"] = Target(
        functools.partial(_write_quantized, method=_method),
        _read_quantized,
        {"quantization.json": mutations.json_text, "model.safetensors": mutations.safetensors},
        weight=0.3,
    )
