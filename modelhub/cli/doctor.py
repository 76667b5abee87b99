"""What `modelhub doctor` finds out."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import modelhub
from modelhub.core import kernels
from modelhub.core.backends import NAMES, backend_class, get_backend, installed
from modelhub.hub.sources import cache_root


def examine() -> dict[str, Any]:
    """Plain data: versions, cache, and per backend its version, devices and advice. Imports every framework."""
    cache = cache_root()
    sizes = (os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(cache) for name in names)
    return {
        "modelhub": modelhub.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "kernels": kernels.describe(),
        "cache": str(cache),
        "cache_bytes": sum(sizes),
        "backends": [_backend(name) for name in NAMES],
        "default_backend": get_backend().name,
    }


def _backend(name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "version": None, "devices": [], "advice": ""}
    if name not in installed():
        return row | {"advice": f"pip install 'modelhub[{name}]'"}
    row["version"] = _version(name)
    try:
        row["devices"] = backend_class(name).devices()
    except Exception as error:  # a broken framework is a finding here, whatever it raises
        return row | {"advice": f"does not import: {type(error).__name__}: {error}; reinstall it"}
    if row["devices"] == ["cpu"] and name != "numpy" and os.path.exists("/dev/nvidia0"):
        row["advice"] = f"there is an NVIDIA GPU that it does not see: install {name}'s CUDA build"
    return row


def _version(name: str) -> str | None:
    for package in (name, f"{name}-cpu", f"{name}_cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None
