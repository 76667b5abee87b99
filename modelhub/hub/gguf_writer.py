"""Writing GGUF files, through the gguf library (`pip install "modelhub[gguf]"`).

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
What stays float32 is what llama.cpp's converter (convert_hf_to_gguf.py) keeps so: its CPU code reads norms in nothing
else.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from modelhub.errors import BackendNotInstalled, CheckpointError, InputError
from modelhub.hub.checkpoint import shown
from modelhub.hub.files import replacing_file
from modelhub.hub.gguf import BLOCKS
from modelhub.progress import bar

# dtype -> ggml type of most matrices, general.file_type
DTYPES = {
    "float32": ("F32", 0), "float16": ("F16", 1), "bfloat16": ("BF16", 32), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2),
    "q4_1": ("Q4_1", 3), "q4_k_m": ("Q4_K", 15), "q5_k_m": ("Q5_K", 17), "q6_k": ("Q6_K", 18),
}  # fmt: skip
_FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# For rows that are no whole blocks of 256.
_OF_32 = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LARGEST = 65504.0  # of float16, which the scales of blocks are
_TILE = 1 << 20  # elements encoded at a time: what it takes in memory beside a tensor stays at some MB


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: str = "float16",
    check: Callable[[Path], None] | None = None,
    encode: Callable[[str, np.ndarray], np.ndarray] | None = None,
) -> None:
    """Write a .gguf file tensor by tensor; it is whole, or what was there before stays as it was.

    metadata: key -> str, bool, int (uint32 in the file, int32 below 0), float (float32), or a list or array of str,
        bool, int (int32) or float (float32). general.architecture must be there; general.file_type is added.
    shapes: GGUF's name of each tensor -> its shape, outermost first. read(name): that tensor, in any float dtype.
    dtype: of the matrices, one of DTYPES; vectors and norms are float32. The quantised ones are mixtures as llama.cpp
        makes them: see `kinds_of`.
    check: is given the finished file before it takes its name; what it raises leaves things as they were.
    encode: (ggml type, rows float32 (N, K)) -> blocks uint8 (N, bytes of a row); for the quantised dtypes but "q8_0".

    Raises CheckpointError for values that the dtype cannot hold, and when writing fails; BackendNotInstalled without
    the gguf library.
    """
    gguf = _library()
    kinds = {name: gguf.GGMLQuantizationType[kind] for name, kind in kinds_of(metadata, shapes, dtype).items()}
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
                    writer.write_tensor_data(_encoded(gguf, name, read(name), kinds[name], encode))
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


def kinds_of(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, str]:
    """The ggml type of each tensor of a file, as llama_tensor_get_type of llama.cpp's src/llama-quant.cpp chooses it.

    Vectors and norms are float32. In quantised files what is head, or head and embeddings in one, has 6 bits at least;
    the "_m" mixtures give attn_v and ffn_down 6 bits in the first and the last eighth of the layers, and in every third
    between. Rows that are no whole blocks of 256 take a type with blocks of 32, and those that are none of these take
    float16.
    """
    kind = DTYPES[dtype][0]
    if BLOCKS[kind][0] == 1:
        return {name: "F32" if _stays(name, shape) else kind for name, shape in shapes.items()}
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    values = sorted(_layer(name) for name in shapes if name.endswith("attn_v.weight"))
    layers = metadata.get(f"{metadata['general.architecture']}.block_count", 0)
    found = {}
    for name, shape in shapes.items():
        new = kind
        if name == head:
            new = "Q8_0" if kind == "Q8_0" or shape[-1] % BLOCKS[kind][0] else "Q6_K"
        elif name.endswith("attn_v.weight"):
            if dtype.endswith("_m") and _more_bits(values.index(_layer(name)), len(values)):
                new = "Q6_K"
            elif kind == "Q4_K" and _is_70b(metadata):
                new = "Q5_K"
        elif "ffn_down" in name and dtype.endswith("_m") and _more_bits(_layer(name), layers):
            new = "Q6_K"
        if shape[-1] % BLOCKS[new][0]:
            new = _OF_32.get(new, "F16")
        found[name] = "F32" if _stays(name, shape) else "F16" if shape[-1] % BLOCKS[new][0] else new
    return found


def _stays(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) < 2 or name.endswith("_norm.weight")


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else 0


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _is_70b(metadata: Mapping[str, Any]) -> bool:
    """Llama's largest: 8 query heads share a value head, so that more bits for it take little."""
    heads = [metadata.get(f"llama.attention.head_count{end}") for end in ("", "_kv")]
    return metadata.get("llama.block_count") == 80 and heads[1] is not None and heads[0] != heads[1]


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


def _encoded(
    gguf: Any, name: str, x: np.ndarray, kind: Any, encode: Callable[[str, np.ndarray], np.ndarray] | None
) -> np.ndarray:  # fmt: skip
    """The bytes of x as the file has them. Raises CheckpointError for what is not finite, or not after rounding."""
    rows = x.reshape(-1, x.shape[-1])
    out = np.empty((len(rows), _nbytes(gguf, kind, rows.shape) // len(rows)), np.uint8)
    step = max(1, _TILE // rows.shape[1])
    for at in range(0, len(rows), step):
        part = rows[at : at + step].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            found, fits = _in_kind(gguf, part, kind, encode)
        if not fits:
            largest = np.abs(part).max()
            advice = "the model is broken" if not np.isfinite(largest) else "take bfloat16 or float32"
            raise CheckpointError(
                f"tensor {shown(name)} does not fit {kind.name}: its largest value is {largest:g}; {advice}"
            )
        out[at : at + step] = found.view(np.uint8)
    return out


def _in_kind(
    gguf: Any, x: np.ndarray, kind: Any, encode: Callable[[str, np.ndarray], np.ndarray] | None
) -> tuple[np.ndarray, bool]:  # fmt: skip
    """And whether what is in it is finite."""
    if kind.name in _FLOATS:
        found = x.astype(_FLOATS[kind.name])
        return found, bool(np.isfinite(found).all())
    if kind.name == "Q8_0":
        return gguf.quants.quantize(x, kind), bool(np.abs(x).max() <= 127 * _LARGEST)
    if encode is None:
        raise InputError(f"write_gguf needs encode= for blocks of {kind.name}")
    fits = bool(np.abs(x).max() <= _LARGEST)
    return encode(kind.name, x) if fits else x, fits
