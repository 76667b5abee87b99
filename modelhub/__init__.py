"""modelhub: pretrained models and fine-tuning on numpy, JAX, PyTorch and TensorFlow.

Importing this package imports no framework; each name below is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Augment": "modelhub.processing.augment",
    "Backbone": "modelhub.tasks.backbone",
    "CausalLM": "modelhub.tasks.causal_lm",
    "ImageClassifier": "modelhub.tasks.image_classifier",
    "Tokenizer": "modelhub.tasks.tokenizer",
    "convert": "modelhub.conversion",
    "list_presets": "modelhub.hub.registry",
    "register": "modelhub.core.custom",
    "set_backend": "modelhub.core.backends",
    "to_jax": "modelhub.interop",
    "to_litert": "modelhub.interop",
    "to_onnx": "modelhub.interop",
    "to_saved_model": "modelhub.interop",
    "to_tensorflow": "modelhub.interop",
    "to_torch": "modelhub.interop",
}
_MODULES = {
    "errors": "modelhub.errors", "losses": "modelhub.core.losses", "metrics": "modelhub.core.metrics",
    "nn": "modelhub.core.nn", "optim": "modelhub.core.optim", "training": "modelhub.training",
}  # fmt: skip
__all__ = [
    "Augment",
    "Backbone",
    "CausalLM",
    "ImageClassifier",
    "Tokenizer",
    "__version__",
    "convert",
    "errors",
    "list_presets",
    "losses",
    "metrics",
    "nn",
    "optim",
    "register",
    "set_backend",
    "to_jax",
    "to_litert",
    "to_onnx",
    "to_saved_model",
    "to_tensorflow",
    "to_torch",
    "training",
]

if TYPE_CHECKING:
    from modelhub import errors, training
    from modelhub.conversion import convert
    from modelhub.core import losses, metrics, nn, optim
    from modelhub.core.backends import set_backend
    from modelhub.core.custom import register
    from modelhub.hub.registry import list_presets
    from modelhub.interop import to_jax, to_litert, to_onnx, to_saved_model, to_tensorflow, to_torch
    from modelhub.processing.augment import Augment
    from modelhub.tasks.backbone import Backbone
    from modelhub.tasks.causal_lm import CausalLM
    from modelhub.tasks.image_classifier import ImageClassifier
    from modelhub.tasks.tokenizer import Tokenizer


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name not in _PUBLIC:
        raise AttributeError(f"module 'modelhub' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
