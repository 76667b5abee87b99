"""The wheel works on its own: built from the repository, unpacked in an empty folder, used from another one."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


def run(*command, **kwargs):
    answer = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, **kwargs)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, REPO)
    return next(folder.glob("modelhub-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"modelhub", "-".join(wheel.name.split("-")[:2]) + ".dist-info"}
    for folder in ("presets", "finetune"):
        shipped = {name.split("_resources/")[1] for name in names if f"_resources/{folder}/" in name}
        here = [path for path in (REPO / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert shipped == {path.relative_to(REPO).as_posix() for path in here}
    modules = {name for name in names if name.endswith(".py") and "/_resources/" not in name}
    assert modules == {path.relative_to(REPO).as_posix() for path in (REPO / "modelhub").rglob("*.py")}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_no_framework_is_a_base_dependency(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode()
    base = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert base
    assert not [line for line in base if line.split()[1].startswith(("jax", "torch", "tensorflow", "keras"))]
    assert not [line for line in base if "==" in line]


def test_the_installed_package_finds_its_data(installed, tmp_path):
    script = f"""
import sys
# -S left out site-packages and its .pth files, which may lead to a checkout: only the folder itself is added.
sys.path += [{str(installed)!r}, {sysconfig.get_path("purelib")!r}]
import modelhub
from modelhub.hub.resources import resource
print(modelhub.__file__)
print(resource("presets"))
print(*(card.name for card in modelhub.list_presets()))
assert not any(path == {str(REPO)!r} for path in sys.path)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MODELHUB_"))}
    module, presets, names = run(sys.executable, "-S", "-c", script, cwd=tmp_path, env=environment).splitlines()
    assert Path(module).is_relative_to(installed)
    assert Path(presets) == installed / "modelhub" / "_resources" / "presets"
    assert names.split() == sorted(path.stem for path in (REPO / "presets").glob("*.toml"))


def test_the_command_is_installed(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = installed / "bin" / "modelhub"
    assert "usage" in run(sys.executable, command, "--help", cwd=tmp_path, env=environment).lower()


@pytest.mark.slow
def test_without_a_compiler(tmp_path):
    """The package is whole all the same, and says once what it lacks."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("modelhub", "presets", "finetune"):
        shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "hatch_build.py"):
        shutil.copy(REPO / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", tmp_path, copy]
    environment = {k: v for k, v in os.environ.items() if k != "CC"} | {"PATH": str(tmp_path)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("native kernels were not built: no C compiler") == 1 and "Install a C compiler" in said
    [wheel] = tmp_path.glob("modelhub-*-py3-none-any.whl")
    target = tmp_path / "installed"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    code = """
import numpy as np
from modelhub import CausalLM
from modelhub.core import kernels
assert kernels.library() is None and "were not built" in kernels.problem(), kernels.problem()
lm = CausalLM.from_preset("gemma3_tiny", backend="numpy", quantize="int4")
print(len(lm.generate("The cat", 4)) > 0)
"""
    empty = tmp_path / "empty"
    empty.mkdir()
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=empty, env=os.environ | {"PYTHONPATH": str(target)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert found.stdout.strip() == "True", found.stderr
    required = subprocess.run([*map(str, command)], env=environment | {"MODELHUB_KERNELS": "require"},
                              capture_output=True, text=True)  # fmt: skip
    assert required.returncode != 0 and "no C compiler was found" in required.stdout + required.stderr


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
def test_the_wheel_has_native_kernels(installed, tmp_path):
    code = "from modelhub.core import kernels; print(kernels.library().__file__, kernels.describe())"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert found.stdout.startswith(str(installed)) and "thread" in found.stdout, found.stderr
