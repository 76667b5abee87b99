"""The format bitsandbytes: int8 with a scale for each row; nf4 and fp4, double quantisation too."""

import json
from dataclasses import dataclass

import numpy as np

from modelhub.errors import ConfigError
from modelhub.hub.checkpoint import empty
from modelhub.hub.quantized_modules import Folder, Grid, Module, Read, Scaled

_STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class _FourBit(Module):
    """Blocks of values in the order of a matrix's rows: one of 16 numbers times the block's largest.

    nested: the size of a block of these largest, which are themselves codes of 8 bits; None: they are floats.
    """

    module: str
    shape: tuple[int, ...]
    kind: str
    hidden: tuple[str, ...]
    block: int
    nested: int | None
    offset: float

    def weight(self, read: Read, dtype: str) -> np.ndarray:
        at = f"{self.module}.weight"
        largest = read(f"{at}.absmax").reshape(-1)
        if self.nested is not None:
            scales = np.repeat(read(f"{at}.nested_absmax").reshape(-1), self.nested)[: len(largest)]
            largest = read(f"{at}.nested_quant_map")[largest] * scales + np.float32(self.offset)
        numbers, bytes_ = read(f"{at}.quant_map"), read(at).reshape(-1)
        count = self.shape[0] * self.shape[1]
        out = empty(self.shape, dtype)
        flat = out.reshape(-1)
        step = self.block * (1 << 12)  # blocks have an even number of values
        for start in range(0, count, step):
            part = bytes_[start // 2 : (start + step) // 2]
            values = np.stack([numbers[part >> 4], numbers[part & 15]], axis=1).reshape(-1)[: count - start]
            scale = np.repeat(largest[start // self.block : (start + step) // self.block], self.block)
            flat[start : start + step] = values * scale[: len(values)]
        return out


def bitsandbytes(folder: Folder) -> dict[str, Module]:
    found: dict[str, Module] = {}
    for module in folder.ending("SCB"):
        info = folder.info(name := f"{module}.weight", ("int8",))
        if folder.info(f"{module}.SCB", ("float32",), (1, 2)).shape not in ((info.shape[0],), (info.shape[0], 1)):
            raise folder.wrong(name, f"a row for each number in {module}.SCB")
        if (layout := f"{module}.weight_format") in folder.tensors and folder.raw(layout).any():
            raise ConfigError(
                f"{folder.path}: {layout} is {folder.raw(layout).tolist()}; modelhub reads 0 (rows): the others are "
                "ordered for one kind of GPU. Save it again with a current bitsandbytes"
            )
        hidden = folder.names(module, "weight", "SCB", "weight_format")
        grid = Grid(info.shape, (1, info.shape[1]))
        found[name] = Scaled(module, info.shape, "bitsandbytes int8", hidden, f"{module}.SCB", grid, divisor=127.0)
    for kind in ("nf4", "fp4"):
        for module in folder.ending(_STATE + kind):
            found[f"{module}.weight"] = _four_bit(folder, module, kind)
    return found


def _four_bit(folder: Folder, module: str, kind: str) -> _FourBit:
    name = f"{module}.{_STATE}{kind}"
    folder.info(name, ("uint8",), (1,))
    try:
        state = json.loads(folder.raw(name).tobytes())
        shape, block = tuple(state["shape"]), state["blocksize"]
        nested, offset = state.get("nested_blocksize"), float(state.get("nested_offset", 0.0))
        sizes = [*shape, block, *([] if nested is None else [nested])]
        sound = len(shape) == 2 and all(type(x) is int and 0 < x < 1 << 31 for x in sizes) and block % 2 == 0
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise folder.wrong(name, "JSON with the shape of a matrix and an even blocksize")
    count, at = shape[0] * shape[1], f"{module}.weight"
    block = min(block, count + count % 2)
    blocks = -(-count // block)
    nested = nested and min(nested, blocks)
    expected = {at: (("uint8",), -(-count // 2)), f"{at}.quant_map": (("float32",), 16)}
    expected[f"{at}.absmax"] = (("float32",) if nested is None else ("uint8",), blocks)
    if nested is not None:
        expected[f"{at}.nested_absmax"] = (("float32",), -(-blocks // nested))
        expected[f"{at}.nested_quant_map"] = (("float32",), 256)
    for tensor, (dtypes, numbers) in expected.items():
        if np.prod(folder.info(tensor, dtypes, (1, 2)).shape) != numbers:
            raise folder.wrong(tensor, f"{numbers} numbers")
    hidden = tuple(expected) + (name,)
    return _FourBit(module, shape, f"bitsandbytes {kind}", hidden, block, nested, offset)
