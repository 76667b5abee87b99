"""Finding, choosing and opening backends. A framework is imported only when it is asked for."""

import functools
import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelhub.core.backends.base import Array, Backend
from modelhub.errors import BackendNotInstalled, InputError, MixedBackends, UnknownBackend

# Preference order. Value: the class; its module has the framework's name and is imported on first use.
NAMES = {"jax": "JaxBackend", "torch": "TorchBackend", "tensorflow": "TensorflowBackend", "numpy": "NumpyBackend"}

__all__ = ["NAMES", "Array", "Backend", "backend_class", "get_backend", "installed", "of", "set_backend"]

_default: str | None = None


def set_backend(name: str | None) -> None:
    """Choose the backend of models loaded from now on; None goes back to choosing automatically."""
    global _default
    if name is not None:
        _check_name(name)
    _default = name


def installed() -> list[str]:
    """Names of the importable backends in order of preference. Imports none of them."""
    return [name for name in NAMES if importlib.util.find_spec(name)]


def get_backend(name: str | None = None, device: str | None = None) -> Backend:
    """The backend `name` on `device`.

    name None: what set_backend() chose, else $MODELHUB_BACKEND, else an installed backend that sees an accelerator,
    else the first installed of jax, torch, tensorflow, numpy. device None: the best that the backend sees.
    """
    name = name or _default or os.environ.get("MODELHUB_BACKEND") or _automatic()
    cls = backend_class(name)
    return _open(name, cls.pick_device(device))


@functools.cache
def _open(name: str, device: str) -> Backend:
    return backend_class(name)(device)


def backend_class(name: str) -> type[Backend]:
    """Import the framework and return its Backend class."""
    _check_name(name)
    try:
        module = importlib.import_module(f"modelhub.core.backends.{name}")
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] != name:
            raise  # the framework is there; one of its own requirements is missing
        others = ", ".join(installed())
        raise BackendNotInstalled(
            f"backend {name!r} was asked for, but {name} is not installed (installed here: {others}). "
            f"Install it with: pip install 'modelhub[{name}]'"
        ) from None
    return getattr(module, NAMES[name])


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise UnknownBackend(
            f"unknown backend {name!r}; choose one of {', '.join(NAMES)}, or None for the best installed"
        )


@functools.cache
def _automatic() -> str:
    candidates = installed()
    if _machine_has_accelerator():
        for name in candidates:
            if backend_class(name).devices()[0] != "cpu":
                return name
    return candidates[0]


def _machine_has_accelerator() -> bool:
    # Asking a framework means importing it, which takes seconds: first look for signs of a device.
    signs = [Path("/dev/nvidia0"), Path("/dev/kfd"), Path("/dev/accel0"), Path("/dev/vfio/0")]
    apple = sys.platform == "darwin" and os.uname().machine == "arm64"
    return apple or any(sign.exists() for sign in signs) or shutil.which("nvidia-smi") is not None


def of(arrays: Mapping[str, Any]) -> str:
    """The name of the backend that all the arrays belong to. Considers only frameworks that are already imported.

    Raises MixedBackends, naming an array of each, if there are several, and InputError for what is no array.
    """
    loaded = [backend_class(name) for name in NAMES if sys.modules.get(name)]
    first: dict[str, str] = {}
    for path, array in arrays.items():
        owner = next((cls.name for cls in loaded if cls.owns(array)), None)
        if owner is None:
            raise InputError(f"{path} is a {type(array).__name__}, not an array of {', '.join(c.name for c in loaded)}")
        first.setdefault(owner, path)
    if len(first) > 1:
        found = " and ".join(f"{path} is on {name}" for name, path in first.items())
        raise MixedBackends(f"arrays of two frameworks in one call: {found}. Move the model with lm.to(backend=...).")
    if not first:
        raise InputError("no arrays were given, so they belong to no backend")
    return next(iter(first))
