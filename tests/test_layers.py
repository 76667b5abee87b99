"""The layers hold: imports go down only, and frameworks stay behind the backends."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "modelhub"

# What each layer may import of modelhub, besides itself, modelhub.errors, .habits and .progress.
LOWEST = {"families", "hub", "processing", "core", "kinds"}
ALLOWED = {
    "habits": set(),
    "progress": set(),
    "kinds": set(),
    "core": set(),
    "families": {"core"},
    "hub": {"kinds"},
    "processing": set(),
    "generation": LOWEST,
    "quantizing": LOWEST,
    "model": LOWEST | {"quantizing"},
    "training": LOWEST | {"model"},
    "interop": LOWEST,
    "publishing": LOWEST | {"model", "training"},
    "tasks": LOWEST | {"generation", "model", "training", "publishing", "bench"},
    "bench": LOWEST | {"generation", "model", "training"},
    "conversion": LOWEST | {"quantizing", "model", "publishing", "tasks"},
    "cli": LOWEST | {"generation", "model", "training", "interop", "tasks", "bench", "conversion", "modelhub"},
    "__main__": {"cli"},
    "modelhub": LOWEST | {"model", "tasks", "training", "interop", "conversion"},  # __init__.py: the lazy public names
}
FRAMEWORKS = {"jax", "jaxlib", "optax", "flax", "torch", "torchvision", "tensorflow", "keras"}
BACKENDS = {"jax", "torch", "tensorflow", "numpy"}
NEAR_FRAMEWORKS = ("core/backends/", "interop/")
NAMES_BACKENDS = {"cli/doctor.py"}  # it reports on the frameworks' packages; nothing is computed there

FILES = sorted(PACKAGE.rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())


def layer_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem if path.stem != "__init__" else "modelhub"


def near_frameworks(path: Path) -> bool:
    return path.relative_to(PACKAGE).as_posix().startswith(NEAR_FRAMEWORKS)


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported, at the top or inside a function, also by import_module."""
    package = ["modelhub", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            text = node.args[0]
            if isinstance(text, ast.JoinedStr) and text.values:
                text = text.values[0]  # f"modelhub.families.{name}"
            if isinstance(text, ast.Constant):
                yield node.lineno, str(text.value)


def layer_imported(name: str) -> str | None:
    """The layer that a full name belongs to; None: not of modelhub."""
    first, *rest = name.split(".")
    if first != "modelhub":
        return None
    inner = PACKAGE / rest[0] if rest else PACKAGE
    return rest[0] if rest and (inner.is_dir() or inner.with_suffix(".py").is_file()) else "modelhub"


def test_every_layer_is_known():
    folders = {
        path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name not in ("__pycache__", "_resources")
    }
    assert folders <= ALLOWED.keys()
    known = {"__init__", "__main__", "errors", "habits", "progress", "kinds"}
    assert {path.stem for path in PACKAGE.glob("*.py")} == known


@each_file
def test_imports_go_down_only(path):
    layer = layer_of(path)
    wrong = []
    for line, name in imports(path, ast.parse(path.read_text())):
        used = layer_imported(name)
        if used is not None and used not in {layer, "errors", "habits", "progress"} | ALLOWED.get(layer, set()):
            wrong.append(f"{path}:{line} {layer} must not import {name}")
    assert not wrong, "\n".join(wrong)


@each_file
def test_frameworks_stay_behind_the_backends(path):
    if near_frameworks(path):
        return
    tree = ast.parse(path.read_text())
    wrong = [f"{path}:{line} imports {name}" for line, name in imports(path, tree) if name.split(".")[0] in FRAMEWORKS]
    assert not wrong, "\n".join(wrong)


@each_file
def test_no_branch_on_a_backends_name(path):
    if near_frameworks(path) or path.relative_to(PACKAGE).as_posix() in NAMES_BACKENDS:
        return
    wrong = []
    for node in ast.walk(ast.parse(path.read_text())):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        constants = {
            item.value
            for side in sides
            for item in (side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side])
            if isinstance(item, ast.Constant)
        }
        if constants & BACKENDS:
            wrong.append(f"{path}:{node.lineno} branches on a backend's name: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_the_page_says_what_holds():
    """docs/architecture.md has the table that is tested here."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    told = {}
    for line in page.splitlines():
        if line.startswith("| `modelhub/"):
            room, _, allowed = (cell.strip() for cell in line.strip("|").split("|"))
            told[room.strip("`").removeprefix("modelhub/").rstrip("/").removesuffix(".py")] = allowed
    assert told == {layer: ", ".join(sorted(may)) for layer, may in ALLOWED.items() if layer != "modelhub"}


def test_the_checks_see_what_they_forbid():
    here = PACKAGE / "hub" / "sources.py"
    code = (
        "import a.b\nfrom ..core import nn\nfrom . import x\ndef f():\n  importlib.import_module(f'modelhub.tasks.{y}')"
    )
    names = [name for _, name in imports(here, ast.parse(code))]
    assert names == ["a.b", "modelhub.core.nn", "modelhub.hub.x", "modelhub.tasks."]
    assert [layer_imported(name) for name in names] == [None, "core", "hub", "tasks"]
    assert layer_imported("modelhub.CausalLM") == layer_imported("modelhub") == "modelhub"
    assert layer_imported("modelhub.errors.InputError") == "errors"
    assert layer_of(here) == "hub"
    assert layer_of(PACKAGE / "__init__.py") == "modelhub"
