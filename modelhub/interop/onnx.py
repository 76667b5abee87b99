"""A task's forward pass as an ONNX file."""

import contextlib
import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from modelhub.core.tree import Params, bind
from modelhub.errors import ConfigError, InputError
from modelhub.hub import files
from modelhub.interop.pieces import Piece, check_installed, piece_for_file

_OLDEST = 18  # opset that torch.onnx writes


def to_onnx(x: Any, path: str | os.PathLike[str], *, opset: int | None = None) -> Path:
    """See modelhub.to_onnx."""
    target = files.place(path)
    files.check_new(target, target.with_name(f"{target.name}.data"))
    check_installed("to_onnx")
    _check_opset(opset)
    piece = piece_for_file(x, "torch")
    wide = {n: piece.xp.cast(a, "float32") if piece.xp.dtype(a) == "bfloat16" else a for n, a in piece.params.items()}
    exported = _exported(dataclasses.replace(piece, params=wide), opset)
    with files.adding(target) as file:  # under its own name: it names the one beside it
        exported.save(file)
    return target


def _check_opset(opset: int | None) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and (type(opset) is not int or not _OLDEST <= opset <= newest):
        raise InputError(f"opset must be a whole number from {_OLDEST} to {newest}, or None, got {opset!r}")


class _Program(torch.nn.Module):
    """The forward pass, with its weights as Parameters under their names."""

    def __init__(self, piece: Piece):
        super().__init__()
        self.piece = piece
        for name, array in piece.params.items():
            *parents, last = name.split(".")
            module: torch.nn.Module = self
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, torch.nn.Module())
                module = module.get_submodule(parent)
            module.register_parameter(last, torch.nn.Parameter(array, requires_grad=False))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        params: Params = {name: self.get_parameter(name) for name in self.piece.params}
        return self.piece.forward(self.piece.xp, bind(self.piece.skeleton, params), *inputs)


def _exported(piece: Piece, opset: int | None) -> Any:
    """A torch.onnx.ONNXProgram."""
    config = piece.config
    if piece.reads_images:
        inputs = {"pixel_values": torch.zeros(2, config.num_channels, *config.size)}
        axes = {0: "batch"}
    else:
        inputs = {name: torch.ones(2, 8, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
        axes = {0: "batch", 1: "sequence"}
    output = "last_hidden_state" if piece.output == "hidden_states" else piece.output  # as Optimum calls it
    try:
        with _quiet():
            program = torch.onnx.export(
                _Program(piece).eval(), tuple(inputs.values()), dynamo=True, dynamic_shapes=((axes,) * len(inputs),),
                input_names=list(inputs), output_names=[output], opset_version=opset, optimize=False, verbose=False,
            )  # fmt: skip
            assert program is not None
            _finish(program.model, piece)
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(
            f"torch cannot export this {config.model_type} model to ONNX: {_reason(error)}. Layers and attention "
            f"functions of your own must be made of operations that torch.export can follow"
        ) from error
    if opset not in (None, found := program.model.opset_imports[""]):
        raise InputError(f"opset {opset} was asked for, and torch.onnx writes {found} for this model; leave opset out")
    return program


def _finish(model: Any, piece: Piece) -> None:
    """Fold constants, but none of the weights, which would lose their names and, where tied, be there twice."""
    from onnxscript import optimizer

    def folded(node: Any) -> bool | None:
        return False if any(value is not None and value.name in piece.params for value in node.inputs) else None

    optimizer.optimize_ir(model, should_fold=folded)
    # What torch notes there are the names of this machine's source files.
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.producer_name, model.producer_version = "modelhub", sys.modules["modelhub"].__version__
    model.metadata_props.update(
        model_type=piece.config.model_type, config=json.dumps(piece.config.to_hf(), ensure_ascii=False)
    )


def _reason(error: BaseException) -> str:
    """What the first of the errors that led to `error` says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of torch.onnx and onnxscript about themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
