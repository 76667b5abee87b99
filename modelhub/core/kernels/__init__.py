"""Native products with few rows, for float and for quantised weights; modelhub is whole without them.

The library is built with the package where there is a C compiler (hatch_build.py, src/). It picks the best instruction
set of the processor at hand. Two variables of the environment change that: MODELHUB_KERNELS ("off": never use it;
"require": an error where it cannot be) and MODELHUB_ISA (one of ISAS, for tests and comparisons).
"""

import ctypes
import functools
import importlib
import os
import sys
from typing import Any

from modelhub.errors import ConfigError

ABI = 3  # of the library that this code goes with: MHK_ABI in src/mhk.h
ISAS = ("avx512-vnni", "avx512", "avx-vnni", "avx2", "sse4.2", "neon-dotprod", "neon")
FLOATS = {"float32": 0, "bfloat16": 1, "float16": 2}  # dtype of weights -> kind, as src/mhk.h numbers them
SCHEMES = {"int8": 3, "int8m": 4, "int8h": 5, "int4": 6, "int4m": 7}
# Rows of x up to which a kernel for float weights is as fast as memory; beyond, the frameworks' products are better.
FEW = 8
SMALL = 1 << 15  # numbers up to which a thread of ours is as fast as the frameworks' own, once they are called


@functools.cache
def library() -> Any:
    """The module modelhub.core.kernels._kernels, None where it cannot be used; `problem` says why.

    Raises ConfigError: with MODELHUB_KERNELS=require for want of it, and for unknown values of the two variables.
    """
    found, why = _loaded()
    if found is None and wanted() == "require":
        raise ConfigError(f"MODELHUB_KERNELS=require: {why}")
    return found


def problem() -> str | None:
    """Why there is no library."""
    return _loaded()[1]


def describe() -> str:
    """For people: the instruction set and the threads, or why there is no library."""
    if (found := library()) is None:
        return f"not used: {problem()}"
    return f"{found.isa()}, {threads()} {'thread' if threads() == 1 else 'threads'}"


def wanted() -> str:
    """What $MODELHUB_KERNELS asks for: "", "off" or "require". Raises ConfigError for anything else."""
    value = os.environ.get("MODELHUB_KERNELS", "")
    if value not in ("", "on", "off", "require"):
        raise ConfigError(f'MODELHUB_KERNELS must be "off" or "require", or not set; found {value!r}')
    return value


@functools.cache
def _loaded() -> tuple[Any, str | None]:
    if wanted() == "off":
        return None, "MODELHUB_KERNELS=off"
    try:
        found = importlib.import_module("modelhub.core.kernels._kernels")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        return None, "they were not built: install modelhub again where there is a C compiler" if missing else (
            f"the library cannot be loaded: {error}"
        )
    if (theirs := getattr(found, "ABI", None)) != ABI:
        return (
            None,
            f"the library is of another version (ABI {theirs}, modelhub has {ABI}): install modelhub again",
        )
    if not found.isa():
        return None, "this processor is below all instruction sets that they are built for (x86: SSE4.2)"
    if isa := os.environ.get("MODELHUB_ISA"):
        if isa not in ISAS:
            raise ConfigError(f"MODELHUB_ISA must be one of {', '.join(ISAS)}, found {isa!r}")
        if found.isa(isa) is None:
            raise ConfigError(f"MODELHUB_ISA={isa}: this processor does not have it; left alone it takes {found.isa()}")
    found.set_threads(threads())
    return found, None


@functools.cache
def threads() -> int:
    """How many threads a product may use: those of the affinity mask, or fewer if OMP_NUM_THREADS says so."""
    mask = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return min(len(mask), int(asked)) if asked.isdigit() and int(asked) else len(mask)


@functools.cache
def openmp(package: str) -> bool:
    """Let calls that ask for it run on the threads of the OpenMP of a package (its folder); False if it has another or
    none.

    Two pools in one process take each other's cores: a step of torch's then takes twice the time (docs/decisions.md).
    """
    if library() is None or sys.platform != "linux":
        return False
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "libgomp" in line}
    for path in sorted(paths, key=lambda path: not path.startswith(package)):
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        library().use_openmp(ctypes.cast(function, ctypes.c_void_p).value)
        return True
    return False
