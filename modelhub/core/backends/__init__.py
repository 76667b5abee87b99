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

from modelhub.core import leaves
from modelhub.core.backends.base import Array, Backend
from modelhub.errors import BackendNotInstalled, InputError, MixedBackends, UnknownBackend
from modelhub.habits import explained

# Preference order. Value: the class; its module has the framework's name and is imported on first use.
NAMES = {"jax": "JaxBackend", "torch": "TorchBackend", "tensorflow": "TensorflowBackend", "numpy": "NumpyBackend"}
_OTHER_NAMES = {"pytorch": "torch", "tf": "tensorflow", "np": "numpy", "flax": "jax"}
FASTEST = "fastest"  # in place of a name, where there is a model to measure them with

__all__ = [
    "FASTEST", "NAMES", "Array", "Backend", "backend_class", "backend_name", "backend_of", "get_backend", "installed",
    "of", "set_backend",
]  # fmt: skip

_default: str | None = None


@explained
def set_backend(name: str | None) -> None:
    """Choose the backend of models loaded from now on; None goes back to choosing automatically."""
    global _default
    _default = None if name is None else backend_name(name)


def installed() -> list[str]:
    """Names of the importable backends in order of preference. Imports none of them."""
    return [name for name in NAMES if importlib.util.find_spec(name)]


def get_backend(name: str | None = None, device: str | None = None) -> Backend:
    """The backend `name` on `device`.

    name None: what set_backend() chose, else $MODELHUB_BACKEND, else an installed backend that sees an accelerator,
    else the first installed of jax, torch, tensorflow, numpy. device None: the best that the backend sees.
    """
    name = backend_name(name or _default or os.environ.get("MODELHUB_BACKEND") or _automatic())
    cls = backend_class(name)
    return _open(name, cls.pick_device(device))


@functools.cache
def _open(name: str, device: str | None) -> Backend:
    return backend_class(name)(device)


def backend_class(name: str) -> type[Backend]:
    """Import the framework and return its Backend class."""
    name = backend_name(name)
    try:
        where = f"modelhub.core.backends.{name}"
        module = sys.modules.get(where) or importlib.import_module(where)  # AutoGraph warns of the latter
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] != name:
            raise  # the framework is there; one of its own requirements is missing
        others = ", ".join(installed())
        raise BackendNotInstalled(
            f"backend {name!r} was asked for, but {name} is not installed (installed here: {others}). "
            f"Install it with: pip install 'modelhub[{name}]'"
        ) from None
    return getattr(module, NAMES[name])


def backend_name(name: str) -> str:
    """One of NAMES, of how people write it: "PyTorch", "tf". Raises UnknownBackend."""
    found = name.lower() if isinstance(name, str) else name
    found = _OTHER_NAMES.get(found, found)
    if found not in NAMES:
        raise UnknownBackend(
            f"unknown backend {name!r}; choose one of {', '.join(NAMES)}, or None for the best installed; from_preset "
            f'also takes "{FASTEST}"'
        )
    return found


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
    for path, array in ((path, x) for path, leaf in arrays.items() for x in leaves.arrays_of(leaf)):
        owner = next((cls.name for cls in loaded if cls.owns(array)), None)
        if owner is None:
            raise InputError(f"{path} is a {type(array).__name__}, not an array of {', '.join(c.name for c in loaded)}")
        first.setdefault(owner, path)
    if len(first) > 1:
        found = " and ".join(f"{path} is on {name}" for name, path in first.items())
        raise MixedBackends(
            f"arrays of two frameworks in one call: {found}. Convert those of one; lm.to(backend=...) moves a model."
        )
    if not first:
        raise InputError("no arrays were given, so they belong to no backend")
    return next(iter(first))


def backend_of(*arrays: Any, **named: Any) -> Backend:
    """The backend of arrays that a user holds, on the device of the first: for functions called in loops of their own.

    Of a tracer, in jax.jit or tf.function, one that leaves the device to the framework. Errors as for `of`, where
    arrays without a name are called "array 1", "array 2" ...
    """
    arrays = *arrays, *named.values()
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_dynamo_compiling():
        device = str(arrays[0].device)
        _prepare_torch(device)
        return _in_torch_compile[device]
    name = of(named or {f"array {number}": array for number, array in enumerate(arrays, 1)})
    return _open(name, backend_class(name).device_of(arrays[0]))


# torch.compile can follow neither imports nor the questions of other frameworks: it runs this while it traces, and
# finds the backend, with what its guards need, in a dict.
_in_torch_compile: dict[str, Backend] = {}


def _prepare_torch(device: str) -> None:
    _in_torch_compile[device] = _open("torch", device.replace("cuda", "gpu"))


_prepare_torch._dynamo_marked_constant = True  # type: ignore[attr-defined] # torch.compiler.assume_constant_result
