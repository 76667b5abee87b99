"""Writing GGUF files, through the gguf library (`pip install "modelhub[gguf]"`).

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
What stays float32 is what llama.cpp's converter (convert_hf_to_gguf.py) keeps so: its CPU code reads norms in nothing
else.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from modelhub.errors import BackendNotInstalled, CheckpointError
from modelhub.hub.checkpoint import shown
from modelhub.hub.files import replacing_file
from modelhub.progress import bar

# dtype -> ggml type of the matrices, general.file_type
DTYPES = {"float32": ("F32", 0), "float16": ("F16", 1), "bfloat16": ("BF16", 32), "q8_0": ("Q8_0", 7)}
_FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_TILE = 1 << 20  # elements encoded at a time: what it takes in memory beside a tensor stays at some MB


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: str = "float16",
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a .gguf file tensor by tensor; it is whole, or what was there before stays as it was.

    metadata: key -> str, bool, int (uint32 in the file, int32 below 0), float (float32), or a list or array of str,
        bool, int (int32) or float (float32). general.architecture must be there; general.file_type is added.
    shapes: GGUF's name of each tensor -> its shape, outermost first. read(name): that tensor, in any float dtype.
    dtype: of the matrices, one of DTYPES; vectors and norms are float32. In "q8_0" a matrix whose rows are no multiple
        of 32 is float16.
    check: is given the finished file before it takes its name; what it raises leaves things as they were.

    Raises CheckpointError for values that the dtype cannot hold, and when writing fails; BackendNotInstalled without
    the gguf library.
    """
    gguf = _library()
    kinds = {name: _kind(gguf, name, shape, dtype) for name, shape in shapes.items()}
    sizes = {name: _nbytes(gguf, kinds[name], shape) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(None, metadata["general.architecture"])
    for key, value in {**metadata, "general.file_type": DTYPES[dtype][1]}.items():
        if key != "general.architecture":
            _add(gguf, writer, key, value)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], kinds[name])

    shown = bar(total=sum(sizes.values()), desc=f"writing {path.name}", unit="B", unit_scale=True)
    try:
        with replacing_file(path) as work:
            try:
                writer.write_header_to_file(work)
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for name in shapes:
                    writer.write_tensor_data(_encoded(gguf, name, read(name), kinds[name]))
                    shown.update(sizes[name])
            finally:
                writer.close()
            if check is not None:
                check(work)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}. What was there before is as it was") from error
    finally:
        shown.close()


def _library() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise BackendNotInstalled(
            'writing GGUF files takes the gguf library, which is not installed: pip install "modelhub[gguf]"'
        ) from None
    return gguf


def _kind(gguf: Any, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    kind = gguf.GGMLQuantizationType[DTYPES[dtype][0]]
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _nbytes(gguf: Any, kind: Any, shape: tuple[int, ...]) -> int:
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // elements * nbytes


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    types = gguf.GGUFValueType
    if isinstance(value, str):
        writer.add_key_value(key, _bytes(value), types.STRING)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        items = value.tolist() if isinstance(value, np.ndarray) else value
        writer.add_array(key, [_bytes(item) if isinstance(item, str) else item for item in items])


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # tokens that are no UTF-8, as GGUFFile reads them


def _encoded(gguf: Any, name: str, x: np.ndarray, kind: Any) -> np.ndarray:
    """The bytes of x as the file has them. Raises CheckpointError for what is not finite, or not after rounding."""
    rows = x.reshape(-1, x.shape[-1])
    out = np.empty((len(rows), _nbytes(gguf, kind, rows.shape) // len(rows)), np.uint8)
    step = max(1, _TILE // rows.shape[1])
    for at in range(0, len(rows), step):
        part = rows[at : at + step].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            found = part.astype(_FLOATS[kind.name]) if kind.name in _FLOATS else gguf.quants.quantize(part, kind)
        if not np.isfinite(found if kind.name in _FLOATS else part).all():
            largest = np.abs(part).max()
            advice = "the model is broken" if not np.isfinite(largest) else "take bfloat16 or float32"
            raise CheckpointError(
                f"tensor {shown(name)} does not fit {kind.name}: its largest value is {largest:g}; {advice}"
            )
        out[at : at + step] = found.view(np.uint8)
    return out
