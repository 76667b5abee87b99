"""Quantised weights in Hugging Face folders: what config.json's quantization_config says of the safetensors beside it.

| quant_method | weights | source of the layout |
|---|---|---|
| compressed-tensors | pack-quantized, int-quantized, naive-quantized, float-quantized (fp8) | compressed-tensors |
| awq | 4 bits, version gemm | AutoAWQ's WQLinear_GEMM |
| gptq | 2, 3, 4 and 8 bits, checkpoint_format gptq and gptq_v2, any order of columns (desc_act) | GPTQModel |
| fp8 | float8 with a scale for each block, row or matrix | transformers' FineGrainedFP8Config, DeepSeek-V3 |
| bitsandbytes | int8 with a scale for each row; nf4, fp4, double quantisation | bitsandbytes' QuantState |

A quantised module is several tensors there and one here, MODULE.weight, whole and in float32 or what is asked for.
What a model does with its activations or its cache when it runs elsewhere (input_activations, activation_scheme,
kv_cache_scheme) changes no weight and is not done here.
"""

import dataclasses
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from modelhub.errors import CheckpointError, ConfigError
from modelhub.hub.bitsandbytes import bitsandbytes
from modelhub.hub.checkpoint import DTYPES, Checkpoint, TensorInfo, find, open_folder, shown
from modelhub.hub.quantized_formats import awq, compressed_tensors, fp8, gptq
from modelhub.hub.quantized_modules import KEY, Codes, Folder, Module

_FORMATS: dict[str, Callable[[Folder], dict[str, Module]]] = {
    "compressed-tensors": compressed_tensors,
    "awq": awq,
    "gptq": gptq,
    "fp8": fp8,
    "bitsandbytes": bitsandbytes,
}
_CODES = ("int8", "uint8", "int32", "uint32")  # mean nothing without what is beside them


class QuantizedFolder(Checkpoint):
    """The weights of a folder whose config.json has a quantization_config.

    tensors: as those of other checkpoints; the dtype of a quantised matrix is its format's name, such as "gptq 4 bits".

    same: {name: another}, tensors that are one: what is read is the second, which is quantised, under the first's name.

    Raises ConfigError for a config that cannot be read exactly, naming the key; CheckpointError for tensors that are
    not what the config says.
    """

    def __init__(self, folder: Path, config: Any, same: Mapping[str, str] = MappingProxyType({})):
        self._where = folder
        method = check_config(config, folder)
        self._files = open_folder(folder)
        try:
            self._modules = _FORMATS[method](Folder(folder, config, self._files.tensors, self._raw))
            for name, other in same.items():
                if other not in self._modules:
                    raise CheckpointError(f"{folder}: {KEY} says that {other} is quantised, and no file has it so")
                module = self._modules.pop(other)
                self._modules[name] = dataclasses.replace(module, hidden=(*module.hidden, name))  # type: ignore[type-var]
            self.tensors = self._shown()
        except BaseException:
            self._files.close()
            raise

    def _shown(self) -> dict[str, TensorInfo]:
        hidden = {name for module in self._modules.values() for name in module.hidden}
        first = {next(iter(module.hidden)): weight for weight, module in self._modules.items()}
        found: dict[str, TensorInfo] = {}
        for name, info in self._files.tensors.items():
            if name in first:
                module = self._modules[first[name]]
                found[first[name]] = TensorInfo(module.kind, module.shape)
            elif name not in hidden:
                found[name] = info
        if odd := [name for name, info in found.items() if name.endswith(".weight") and info.dtype in _CODES]:
            raise CheckpointError(
                f"{self._where}: {shown(odd[0])} is {found[odd[0]].dtype}, and has none of the tensors that "
                f"{KEY} speaks of beside it. The folder is of several versions: download it again"
            )
        return found

    def read(self, name: str, dtype: str = "float32") -> np.ndarray:
        info = find(self.tensors, name, self._where)
        if (module := self._modules.get(name)) is None:
            return self._files.read(name, dtype)
        if dtype not in ("float32", "float16", "bfloat16"):
            raise CheckpointError(
                f"{self._where}: tensor {shown(name)} is {info.dtype} and cannot be read as {shown(dtype)}. "
                "Ask for float32, float16, bfloat16."
            )
        return module.weight(self._raw, dtype)

    @property
    def quantized(self) -> Container[str]:
        return self._modules.keys()

    def codes(self, name: str) -> Codes | None:
        module = self._modules.get(name)
        return None if module is None else module.codes(self._raw)

    def _raw(self, name: str) -> np.ndarray:
        return self._files.read(name, self._files.tensors[name].dtype)

    def close(self) -> None:
        self._files.close()


def stored_dtype(info: TensorInfo) -> str:
    """The dtype in which reading a tensor loses nothing."""
    return info.dtype if info.dtype in DTYPES.values() else "float32"


def check_config(config: Any, folder: Path) -> str:
    """The quant_method of a quantization_config; ConfigError for one that is not read."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"{folder}: {KEY} must be an object, found {shown(config)}")
    method = config.get("quant_method")
    if method is None and (config.get("load_in_8bit") or config.get("load_in_4bit")):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in _FORMATS:
        raise ConfigError(
            f"{folder}: {KEY} has quant_method={shown(method)}; modelhub reads {', '.join(_FORMATS)}. Its weights mean "
            "nothing without that library's decoding: take the model's own floats, or a version in one of these"
        )
    return method
