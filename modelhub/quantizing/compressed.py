"""Quantised weights as compressed-tensors has them in files: pack-quantized, which transformers and vLLM load.

| scheme | there |
|---|---|
| int4, int8 | 4 or 8 bits, symmetric, groups of 32: the same codes and scales |
| int8h | 8 bits, symmetric, groups of 16 |
| int4m | 4 bits with zero points, if all minima are -zero * scale, as in models that come from AWQ or GPTQ |
| int8m | none |

Format: https://github.com/vllm-project/compressed-tensors
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from modelhub.core.quantized import GROUP, Tiles, bits, has_minima, scales_of_group, untiled
from modelhub.errors import ConfigError
from modelhub.hub.quantized_modules import packed

_WAYS = (
    "Save floats with dequantize=True; or quantise the floats again, as int4 or int8, which have no minima: "
    'lm.quantize("int4") of a model that was loaded with quantize=None'
)


class Compressed:
    """What stands in files for quantised matrices.

    packed: {our name: matrix of a layer}. linears: the names of all layers that other tools might take to be quantised.
    is_tied: whether the head among them is the table of the embeddings.

    Raises ConfigError for a matrix that the format has no form for.
    """

    def __init__(self, xp: Any, packed: Mapping[str, Tiles], linears: Iterable[str], is_tied: bool):
        self._xp, self.packed, self.is_tied = xp, packed, is_tied
        self._leaves = {name.removesuffix(".weight"): leaf for name, leaf in packed.items()}
        self._linears = [*linears, "lm_head"] if is_tied else list(linears)
        for module, leaf in self._leaves.items():
            if len(leaf.shape) != 2:
                raise ConfigError(
                    f"{module} is a packed stack of {leaf.shape[0]} matrices, which compressed-tensors has no form "
                    "for: load the model with quantize=None, or with None for this pattern, and save that"
                )
            if has_minima(leaf.scheme):
                self._zero_points(module)

    @property
    def config(self) -> dict[str, Any]:
        """The quantization_config."""
        by_scheme: dict[str, list[str]] = {}
        for module, leaf in self._leaves.items():
            by_scheme.setdefault(leaf.scheme, []).append(module)
        left = [name for name in self._linears if name not in self._leaves]
        groups = {}
        for number, (scheme, modules) in enumerate(by_scheme.items()):
            # What transformers and vLLM have kernels for is told by the kind of a layer, where that says it all.
            plain = len(by_scheme) == 1
            weights = {
                "num_bits": bits(scheme), "type": "int", "symmetric": scheme != "int4m", "strategy": "group",
                "group_size": GROUP // scales_of_group(scheme), "dynamic": False, "actorder": None,
                "block_structure": None, "observer": "minmax", "observer_kwargs": {},
            }  # fmt: skip
            groups[f"group_{number}"] = {
                "targets": ["Linear"] if plain else modules, "weights": weights, "input_activations": None,
                "output_activations": None,
            }  # fmt: skip
        return {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": groups, "ignore": left, "kv_cache_scheme": None, "global_compression_ratio": None,
        }  # fmt: skip

    @property
    def schemes(self) -> dict[str, int]:
        """{scheme: how many matrices}."""
        found: dict[str, int] = {}
        for leaf in self._leaves.values():
            found[leaf.scheme] = found.get(leaf.scheme, 0) + 1
        return found

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """{name in the file: (shape, dtype)}."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for module, leaf in self._leaves.items():
            (rows, columns), size = leaf.shape, bits(leaf.scheme)
            groups = columns // GROUP * scales_of_group(leaf.scheme)
            found[f"{module}.weight_packed"] = (rows, columns * size // 32), "int32"
            found[f"{module}.weight_scale"] = (rows, groups), "float16"
            found[f"{module}.weight_shape"] = (2,), "int64"
            if leaf.scheme == "int4m":
                found[f"{module}.weight_zero_point"] = (-(-rows * size // 32), groups), "int32"
        return found

    def read(self, name: str) -> np.ndarray:
        """One of `tensors`."""
        module, _, what = name.rpartition(".")
        leaf = self._leaves[module]
        rows, columns = leaf.shape
        if what == "weight_shape":
            return np.array(leaf.shape, np.int64)
        if what == "weight_zero_point":
            return np.ascontiguousarray(packed(self._zero_points(module).T, 4).T)
        codes, scales, _ = untiled(self._arrays(leaf), leaf.scheme, rows)
        if what == "weight_scale":
            return np.ascontiguousarray(scales.reshape(rows, -1))
        least = 0 if leaf.scheme == "int4m" else -(1 << bits(leaf.scheme) - 1)
        return packed((codes - np.int16(least)).astype(np.uint8).reshape(rows, columns), bits(leaf.scheme))

    def _arrays(self, leaf: Tiles) -> dict[str, np.ndarray]:
        return {name: np.asarray(self._xp.get(x)) for name, x in leaf.arrays.items()}

    def _zero_points(self, module: str) -> np.ndarray:
        """uint8 (N, G), such that each minimum is -zero * scale, in float16; ConfigError if there are none."""
        leaf = self._leaves[module]
        arrays = self._arrays(leaf)
        _, scales, minima = untiled(arrays, leaf.scheme, leaf.shape[0])
        if leaf.scheme == "int4m" and minima is not None:
            scale = scales[..., 0].astype(np.float32)
            with np.errstate(divide="ignore", invalid="ignore"):
                zeros = np.nan_to_num(np.rint(-minima.astype(np.float32) / scale), nan=0.0).clip(0, 15)
            if np.array_equal((-zeros * scale).astype(np.float16), minima):
                return zeros.astype(np.uint8)
        raise ConfigError(
            f"{module}.weight is {leaf.scheme}: each group of 32 columns has a minimum of its own, and "
            "compressed-tensors has none, but whole zero points of as many bits as a code. Rounding minima to those "
            f"would change the weights by up to half a step. {_WAYS}"
        )
