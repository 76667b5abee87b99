"""The native kernels on processors that are not at hand: AVX512, its products of bytes and AVX-VNNI in plain C (Debian's
libsimde-dev), NEON under qemu-aarch64 (a Python for it: .ci/arm-python DIR, then MODELHUB_ARM_PYTHON=DIR/python), and what
a processor says of itself from a table."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import modelhub

REPO = Path(modelhub.__file__).parents[1]
SUPPORT = Path(__file__).parents[1] / "support"
EMULATED = Path("/usr/include/simde/x86/avx512.h")
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g"
pytestmark = pytest.mark.soak
emulated = pytest.mark.skipif(
    platform.machine() != "x86_64" or not EMULATED.exists() or not shutil.which("gcc"),
    reason="needs gcc and libsimde-dev on x86",
)


def checkout(folder, cc, built_for="", options=""):
    """A copy of the package and its tests whose library another compiler made."""
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("modelhub", "tests", "presets", "finetune", "tokenizers"):
        shutil.copytree(REPO / name, folder / name, ignore=skip)
    for name in ("pyproject.toml", "hatch_build.py"):
        shutil.copy(REPO / name, folder)
    code = f"""
import hatch_build as h, pathlib
here = pathlib.Path(".").resolve()
try:
    h.build(here, here / h.KERNELS / "_kernels.abi3.so", h.OPTIONS + {" " + options!r})
except Exception as error:
    raise SystemExit(getattr(error, "stderr", None) or repr(error))
"""
    env = clean() | {"CC": cc} | ({"MODELHUB_BUILD_PLATFORM": built_for} if built_for else {})
    run([sys.executable, "-c", code], folder, env)
    return folder


def clean():
    return {k: v for k, v in os.environ.items() if not k.startswith(("MODELHUB_", "PYTEST_")) and k != "PYTHONPATH"}


def run(command, folder, env):
    done = subprocess.run([*map(str, command)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def emulating():
    return shlex.join([sys.executable, str(SUPPORT / "emulating_cc.py"), "gcc"])


PYTEST = ("-m", "pytest", "-c", "pyproject.toml", "-q", "--no-header", "-rA", "-m", "slow or not slow")


@emulated
def test_emulated_instruction_sets(tmp_path):
    """Every set on every backend: the best one there is decides, so each is the best in its turn."""
    folder = checkout(tmp_path / "copy", emulating())
    said = run([sys.executable, *PYTEST, "tests/core/test_kernels.py"], folder, clean())
    for isa in ("avx512-vnni", "avx512", "avx-vnni", "avx2", "sse4.2"):
        assert f"PASSED tests/core/test_kernels.py::test_sums_of_integers_are_exact[{isa}-int4m]" in said
    for isa in ("avx512-vnni", "avx512", "avx-vnni"):
        env = clean() | {"MODELHUB_ISA": isa, "MODELHUB_KERNELS": "require"}
        said = run([sys.executable, *PYTEST, "-k", "native", "tests/core/test_quantized.py"], folder, env)
        assert "[native-numpy-int8h]" in said and "skipped" not in said


@emulated
def test_sanitizers_find_nothing(tmp_path):
    folder = checkout(tmp_path / "copy", emulating(), options=SANITIZERS)
    libraries = [run(["gcc", f"-print-file-name=lib{name}.so"], folder, clean()).strip() for name in ("asan", "ubsan")]
    env = clean() | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    run([sys.executable, *PYTEST, "-k", "not at_once", "tests/core/test_kernels.py"], folder, env)


# (leaf, subleaf, register, bit) as cpuid numbers them; eax, ebx, ecx, edx are 0 to 3.
SSSE3, SSE41, SSE42, OSXSAVE, FMA, F16C = ((1, 0, 2, bit) for bit in (9, 19, 20, 27, 12, 29))
AVX2, F, DQ, BW, VL = ((7, 0, 1, bit) for bit in (5, 16, 17, 30, 31))
VNNI512, VNNI = (7, 0, 2, 11), (7, 1, 0, 4)
NEHALEM = [SSSE3, SSE41, SSE42]
HASWELL = [*NEHALEM, OSXSAVE, FMA, F16C, AVX2]
SKYLAKE_X = [*HASWELL, F, DQ, BW, VL]
ICE_LAKE = [*SKYLAKE_X, VNNI512]
SAPPHIRE_RAPIDS = [*ICE_LAKE, VNNI]


def without(bits, *missing):
    return [bit for bit in bits if bit not in missing]


PROCESSORS = {
    "Core 2": ([SSSE3], 0, ""),
    "Penryn": ([SSSE3, SSE41], 0, ""),
    "Nehalem": (NEHALEM, 0, "sse4.2"),
    "Sandy Bridge": ([*NEHALEM, OSXSAVE], 0x7, "sse4.2"),
    "Haswell, Zen 3": (HASWELL, 0x7, "avx2"),
    "Haswell, no AVX in the system": (HASWELL, 0x3, "sse4.2"),
    "Haswell, no XSAVE in the system": (without(HASWELL, OSXSAVE), 0, "sse4.2"),
    "Haswell, no FMA under a hypervisor": (without(HASWELL, FMA), 0x7, "sse4.2"),
    "Alder Lake": ([*HASWELL, VNNI], 0x7, "avx-vnni"),
    "Knights Landing": ([*HASWELL, F], 0xE7, "avx2"),
    "Skylake-X": (SKYLAKE_X, 0xE7, "avx512"),
    "Ice Lake, Zen 4": (ICE_LAKE, 0xE7, "avx512-vnni"),
    "Ice Lake, no AVX512 in the system": (ICE_LAKE, 0x7, "avx2"),
    "Ice Lake, no BW under a hypervisor": (without(ICE_LAKE, BW), 0xE7, "avx2"),
    "Ice Lake, no VL under a hypervisor": (without(ICE_LAKE, VL), 0xE7, "avx2"),
    "Sapphire Rapids, Zen 5": (SAPPHIRE_RAPIDS, 0x600E7, "avx512-vnni"),
    "Sapphire Rapids, no AVX512 in the system": (SAPPHIRE_RAPIDS, 0x7, "avx-vnni"),
    "Sapphire Rapids, half of zmm in the system": (SAPPHIRE_RAPIDS, 0x67, "avx-vnni"),
}


@emulated
def test_which_set_a_processor_gets(tmp_path):
    folder = checkout(tmp_path / "copy", emulating())
    show = "from modelhub.core import kernels as k; x = k.library(); print(x.isa() if x else '', '|', k.problem())"
    for name, (bits, saved, wanted) in PROCESSORS.items():
        said = "".join(f"{leaf}.{sub}.{reg}.{bit} " for leaf, sub, reg, bit in bits) + f"saved={saved:x}"
        isa, problem = run([sys.executable, "-c", show], folder, clean() | {"EMULATED_PROCESSOR": said}).split("|")
        assert isa.strip() == wanted, name
        assert wanted or "below all instruction sets" in problem, name


@pytest.mark.skipif(
    not os.environ.get("MODELHUB_ARM_PYTHON") or not shutil.which("aarch64-linux-gnu-gcc"),
    reason="needs aarch64-linux-gnu-gcc and MODELHUB_ARM_PYTHON, see .ci/arm-python",
)
def test_arm(tmp_path):
    """All but forks of processes with threads, which end qemu 7.2, and processes that start others of theirs."""
    folder = checkout(tmp_path / "copy", "aarch64-linux-gnu-gcc", "linux_aarch64")
    env = clean() | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "MODELHUB_KERNELS": "require"}
    which = ("-k", "not fork and not environment and not another_version", "tests/core/test_kernels.py")
    said = run([os.environ["MODELHUB_ARM_PYTHON"], *PYTEST, *which], folder, env)
    for isa in ("neon-dotprod", "neon"):
        assert f"PASSED tests/core/test_kernels.py::test_sums_of_integers_are_exact[{isa}-int4m]" in said
