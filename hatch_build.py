"""Compiles the native kernels (modelhub/core/kernels) with the system's C compiler, when modelhub is built or installed
from source. Without a compiler the package is whole all the same: the frameworks' own products are used.

MODELHUB_KERNELS=off leaves them out, =require makes it an error that they cannot be built. CC: the compiler, with
options if need be ("zig cc -target x86_64-linux-gnu.2.17"); LDFLAGS: options of the linker;
MODELHUB_BUILD_PLATFORM: what it compiles for, if not this machine, as a wheel's name says it ("win_amd64",
"manylinux_2_17_aarch64", "macosx_11_0_arm64"), and MODELHUB_BUILD_PYTHON: the folder of that system's Python.h, if it
is not this one's. .ci/release builds for all of them.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # only pip's build environment has it
    BuildHookInterface = object  # type: ignore[assignment,misc]

KERNELS = "modelhub/core/kernels"
_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512"
SETS = {  # the instruction sets that rows.c, round.c and attention.c are compiled for, and how
    "x86_64": {
        "sse": "-msse4.2 -mssse3",
        "avx2": "-mavx2 -mfma -mf16c",
        "avxvnni": "-mavx2 -mfma -mf16c -mavxvnni",
        "avx512": _AVX512,
        "avx512vnni": f"{_AVX512} -mavx512vnni",
    },
    "aarch64": {"neon": "", "dotprod": "-march=armv8.2-a+dotprod"},
}
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}  # the same under another name
OPTIONS = "-O3 -std=gnu11 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=fast -Wall -Wextra -Wno-psabi"


def compiler() -> list[str] | None:
    """The command, without arguments but those of $CC."""
    if given := shlex.split(os.environ.get("CC", "")):
        return given
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def goal() -> tuple[str, str]:
    """The system ("linux", "darwin" or "windows") and the kind of machine that is built for."""
    asked = os.environ.get("MODELHUB_BUILD_PLATFORM", "")
    machine = next((name for name in ("x86_64", "aarch64", *_MACHINES) if asked.endswith(name)), "")
    system = {"win": "windows", "mac": "darwin", "man": "linux", "lin": "linux"}.get(asked[:3], "")
    machine, system = machine or platform.machine().lower(), system or platform.system().lower()
    return system, _MACHINES.get(machine, machine)


def library(root: Path) -> Path:
    """The file that Python looks for."""
    return root / KERNELS / ("_kernels.pyd" if goal()[0] == "windows" else "_kernels.abi3.so")


def build(root: Path, target: Path, options: str = OPTIONS) -> None:
    """Compile the kernels into `target`, all instruction sets of the machine's kind in one library.

    Raises OSError without a compiler, or for a kind of machine that there are no kernels for;
    subprocess.CalledProcessError, whose stderr says what the compiler says.
    """
    system, machine = goal()
    sets = SETS.get(machine)
    if (cc := compiler()) is None:
        raise OSError("no C compiler was found (cc, gcc, clang or $CC)")
    if sets is None:
        raise OSError(f"there are no kernels for {machine}")
    units = {
        f"{file}_{name}": (file, f"{flags} -DISA={name}")
        for name, flags in sets.items()
        for file in ("rows", "round", "attention")
    }
    units |= {name: (name, "") for name in ("dispatch", "pool", "pack", "xla", "tf")}
    units["module"] = ("module", f"-I{os.environ.get('MODELHUB_BUILD_PYTHON') or sysconfig.get_paths()['include']}")
    source = root / KERNELS / "src"
    with tempfile.TemporaryDirectory() as work:
        objects = {unit: str(Path(work, f"{unit}.o")) for unit in units}

        def compile_unit(unit: str) -> None:
            file, flags = units[unit]
            if "zig" in " ".join(cc):  # which has its own names for these
                flags = flags.replace("-march=armv8.2-a", "-mcpu=generic")
            command = [*cc, *options.split(), *flags.split(), "-c", str(source / f"{file}.c"), "-o", objects[unit]]
            subprocess.run(command, check=True, capture_output=True, text=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_unit, units))
        extra = {
            "darwin": f"-undefined dynamic_lookup -Wl,-install_name,{target.name}",
            "windows": f"-L{sys.base_prefix}/libs -lpython3",
        }
        extra_words = shlex.split(os.environ.get("LDFLAGS", "")) + extra.get(system, "-lpthread -lm").split()
        made = Path(work, target.name)
        link = [*cc, "-shared", "-o", str(made), *objects.values(), *extra_words]
        subprocess.run(link, check=True, capture_output=True, text=True)
        beside = target.with_suffix(f".{os.getpid()}.new")
        shutil.copyfile(made, beside)
        os.replace(beside, target)  # at once: a process may be loading the one before


class KernelsHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        wanted = os.environ.get("MODELHUB_KERNELS", "")
        if self.target_name != "wheel":
            return
        target = library(Path(self.root))
        for old in target.parent.glob("_kernels.*"):  # of another build: not into this wheel
            if wanted == "off" or old != target:
                old.unlink()
        if wanted == "off":
            return
        try:
            build(Path(self.root), target)
        except (OSError, subprocess.CalledProcessError) as error:
            if wanted == "require":
                raise
            target.unlink(missing_ok=True)
            said = getattr(error, "stderr", None) or error
            self.app.display_warning(
                f"modelhub's native kernels were not built: {said}\nmodelhub works without them, through the products "
                "of numpy, JAX, PyTorch and TensorFlow; quantised models are slower then. Install a C compiler and "
                "install modelhub again to have them"
            )
            return
        from packaging.tags import platform_tags

        build_data["pure_python"] = False
        build_data["tag"] = f"cp311-abi3-{os.environ.get('MODELHUB_BUILD_PLATFORM') or next(platform_tags())}"


if __name__ == "__main__":  # for who works on the kernels: into the checkout
    here = Path(__file__).resolve().parent
    build(here, library(here))
