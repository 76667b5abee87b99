"""From one file format to another: whatever `from_preset` loads becomes a GGUF file or a Hugging Face folder."""

import difflib
import os
from pathlib import Path
from typing import Unpack

from modelhub.conversion.checking import check_written
from modelhub.conversion.gguf import gguf_metadata, write_gguf
from modelhub.core.backends import get_backend
from modelhub.errors import ConfigError, InputError
from modelhub.habits import dtype_name, explained, near
from modelhub.hub import gguf_writer
from modelhub.hub.model_folder import MAX_SHARD_SIZE
from modelhub.model.loading import DTYPES
from modelhub.model.options import LoadOptions, SourceOptions, takes
from modelhub.model.source import Source, open_source
from modelhub.publishing.publishing import write_model
from modelhub.quantizing.quantizer import EXACT
from modelhub.tasks.backbone import Backbone
from modelhub.tasks.causal_lm import CausalLM

# As files call them; what is quantised in blocks becomes float32, which loses nothing.
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"} | {dtype: dtype for dtype in DTYPES}


@explained
@takes(SourceOptions)
def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: str | None = None,
    *,
    adapter: str | os.PathLike[str] | None = None,
    force: bool = False,
    **options: Unpack[SourceOptions],
) -> Path:
    """Write the model `source` in another format, tokenizer and chat template included; returns where it is.

    source: anything that `CausalLM.from_preset` takes. target: a .gguf file, for llama.cpp and what stands on it, or a
        folder for Hugging Face's format.
    dtype: of the weights in a GGUF file "float16" (the default), "bfloat16", "float32", "q8_0", "q6_k", "q5_k_m",
        "q4_k_m", "q4_1" or "q4_0", where vectors and norms are float32 always, and the quantised ones are llama.cpp's
        mixtures of these names; in a folder "float32", "bfloat16" or "float16", by default what they are in `source`.
    adapter: a PEFT folder; it is merged into the weights. force: replace what is at `target`; a folder takes no file's
        place. options: those of SourceOptions; offline and token hold for the adapter too.

    It takes the memory of the weights as they are stored; in float32 where they are of several dtypes, where quantised
    ones become floats, and to merge an adapter, whose small changes would drown in 16 bits. `target` appears when it is
    complete, and was read again and compared: config, tokenizer and every weight.

    Raises InputError for a target that is there already or cannot be; ConfigError and TokenizerError for a model that
    llama.cpp cannot run as it is, before any weight is read; and what `from_preset` and `load_adapter` raise.
    """
    return convert_files(source, target, dtype, adapter, force, options)[0]


def convert_files(
    source: str | os.PathLike[str], target: str | os.PathLike[str], dtype: str | None,
    adapter: str | os.PathLike[str] | None, force: bool, options: SourceOptions,
) -> tuple[Path, Path]:  # fmt: skip
    """As `convert`; the files of the source, too."""
    target = Path(target).expanduser().absolute()
    check_name(target)
    to_gguf = target.suffix.lower() == ".gguf"
    dtype = dtype_name(dtype)
    if dtype is not None and dtype not in (allowed := gguf_writer.DTYPES if to_gguf else DTYPES):
        kind = "a GGUF file" if to_gguf else "a folder"
        raise InputError(f"dtype must be one of {', '.join(allowed)} for {kind}, got {dtype!r}{near(dtype, allowed)}")
    if to_gguf and target.is_dir():
        raise InputError(f"{target} is a folder; give the GGUF file another name")
    if not to_gguf and target.is_file():
        raise InputError(f"{target} is a file; give a folder, or for a GGUF file a name that ends in .gguf")
    if not force and (target.is_file() or (target.is_dir() and any(target.iterdir()))):
        raise InputError(f"{target} is there already; give another place, or replace it with force=True (--force)")
    try:  # now, and not after all weights are read
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error}; give another place") from None
    name = os.fspath(source)
    with open_source(name, {**options}) as preset:
        tokenizer = preset.tokenizer()
        if to_gguf:
            if not hasattr(preset.config, "to_gguf"):
                raise ConfigError(f"{name}: models of type {preset.config.model_type} cannot be written as GGUF files")
            if own := [*preset.layers.values(), *filter(None, [preset.attention])]:
                raise ConfigError(f"{name} has layers of its own, or attention ({', '.join(own)}): no GGUF has them")
            gguf_metadata(preset.config, tokenizer)  # raises before any weight is read
        exact, usual, packed = _dtypes(preset)
        dtype = dtype or ("float16" if to_gguf else usual)
        loading: LoadOptions = {"dtype": "float32" if adapter else exact}
        if packed and adapter is None and dtype not in DTYPES:  # what is rounded anew need not be in float32 before
            loading["quantize"] = "keep"
        backbone = Backbone.from_source(preset, get_backend("numpy"), loading)
        lm = CausalLM(backbone, tokenizer, preset.generation_config, name)
    if adapter is not None:
        lm.load_adapter(adapter, offline=options.get("offline", False), token=options.get("token"))

    def check(work: Path) -> None:
        check_written(work, backbone, tokenizer, dtype, target)

    if to_gguf:
        write_gguf(lm, tokenizer, target, dtype, check)
    else:
        write_model(lm, target.resolve(), dtype, MAX_SHARD_SIZE, check=check)
    return target, preset.preset.path


# What other ways out write, what nobody writes, and what is none of a folder's name.
WAYS_OUT = {".onnx": ("to_onnx", ("float32", "float16")), ".tflite": ("to_litert", ("float32",))}  # and its dtypes
_OTHERS = {
    ".bin", ".ckpt", ".h5", ".keras", ".mlmodel", ".pb", ".pt", ".pth", ".safetensors", ".zip", ".tar", ".gz", ".tgz",
    ".bz2", ".xz", ".7z", ".rar", ".ggml", ".json",
}  # fmt: skip


def check_name(target: Path) -> None:
    """Raise InputError for a target whose name says that it is a file of a kind that is not written, or that looks like
    a slip of the keys; a folder that is there may have any name."""
    ending = target.suffix.lower()
    if target.is_dir() or ending == ".gguf":
        return
    if ending in WAYS_OUT:
        raise InputError(
            f"{target}: {ending} files are written by modelhub.{WAYS_OUT[ending][0]}, and by modelhub convert"
        )
    slip = difflib.get_close_matches(ending, [".gguf", *WAYS_OUT], 1, 0.7) if ending not in _OTHERS else []
    if ending in _OTHERS or slip:
        hint = f"did you mean {target.with_suffix(slip[0]).name}? Else " if slip else ""
        raise InputError(
            f"{target}: no {ending} files are written; {hint}give a name that ends in .gguf, .onnx or .tflite, or a "
            "folder for Hugging Face's format. modelhub.to_saved_model writes SavedModels"
        )


def _dtypes(source: Source) -> tuple[str, str, bool]:
    """The dtype in which nothing is lost, and that of the matrices: GGUF keeps vectors in float32 beside them; and
    whether some of them are quantised in a way that can be kept as it is."""
    infos = source.checkpoint().tensors.values()
    kinds = {info.dtype for info in infos}, {info.dtype for info in infos if len(info.shape) > 1}
    exact, usual = (_STORED.get(next(iter(kind)), "float32") if len(kind) == 1 else "float32" for kind in kinds)
    return exact, usual, bool(kinds[0] & EXACT.keys()) and kinds[0] <= EXACT.keys() | _STORED.keys()
