"""Leaves that are more than an array go wherever params go, and are refused by name where they cannot.

The kind of packed leaf that stands for all lives here alone: int8 codes with a scale a row.
"""

import ast
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from tiny_preset import CONFIG, write_preset

import modelhub
from modelhub import CausalLM
from modelhub.core import head, leaves, nn, optim
from modelhub.core.backends import get_backend, installed, of
from modelhub.core.tree import bind, flatten
from modelhub.errors import ConfigError, MixedBackends
from modelhub.training.ready_batches import complete

PACKAGE = Path(__file__).resolve().parents[2] / "modelhub"
TRAINERS = [name for name in installed() if name != "numpy"]


@dataclass(frozen=True, eq=False)
class Int8Rows(leaves.Packed):
    """codes (N, D) int8, scales (N,) float32."""

    ARRAYS: ClassVar = ("codes", "scales")
    scheme: ClassVar = "int8"
    codes: Any
    scales: Any
    shape: tuple[int, ...]
    dtype: str = "float32"

    @classmethod
    def of(cls, xp, weight):
        weight = xp.get(weight).astype(np.float32)
        scales = np.maximum(np.abs(weight).max(1), 1e-6) / 127
        codes = np.round(weight / scales[:, None]).astype(np.int8)
        return cls(xp.array(codes), xp.array(scales), weight.shape)

    def values(self, xp):
        return xp.cast(xp.cast(self.codes, "float32") * xp.expand_dims(self.scales, 1), self.dtype)

    def rows(self, xp, start, size):
        return replace(self, codes=xp.slice_rows(self.codes, start, size),
                       scales=xp.slice_rows(self.scales, start, size)).values(xp)  # fmt: skip

    def linear(self, xp, x, bias):
        y = xp.matmul(x, xp.transpose(xp.cast(self.codes, self.dtype), (1, 0))) * xp.cast(self.scales, self.dtype)
        return y if bias is None else y + bias

    def embedding(self, xp, ids):
        flat = xp.reshape(ids, (-1,))
        rows = replace(self, codes=xp.take(self.codes, flat), scales=xp.take(self.scales, flat)).values(xp)
        return xp.reshape(rows, (*ids.shape, self.shape[1]))


def packed(lm, names=None):
    """The task with its matrices packed, or those in names; and one whose arrays are the values of these."""
    xp = lm.backbone.xp
    chosen = {n for n, x in lm.params.items() if len(x.shape) == 2 and ".lora." not in n and (not names or n in names)}
    lm.params = {n: Int8Rows.of(xp, x) if n in chosen else x for n, x in lm.params.items()}
    return {name: np.array(xp.get(x)) for name, x in lm.params.items()}


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return str(write_preset(tmp_path_factory.mktemp("preset")))


def load(preset, name):
    return CausalLM.from_preset(preset, backend=name)


IDS = np.random.default_rng(0).integers(3, 400, (2, 12))


@pytest.mark.parametrize("name", installed())
def test_sizes_and_products(name):
    xp = get_backend(name, "cpu")
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(10, 6)).astype(np.float32)
    leaf = Int8Rows.of(xp, xp.array(weight))
    plain = xp.values(leaf)
    assert np.abs(xp.get(leaf) - weight).max() < 0.02 and xp.get(leaf).dtype == np.float32
    assert leaves.shape_of(leaf) == leaves.shape_of(plain) == (10, 6)
    assert leaves.dtype_of(leaf) == leaves.dtype_of(plain) == "float32" and leaves.dtype_of(leaf.codes) == "int8"
    assert leaves.count(leaf) == leaves.count(plain) == 60
    assert (leaves.nbytes(leaf), leaves.nbytes(plain)) == (60 + 40, 240)
    assert leaves.nbytes(xp.array(weight, "bfloat16")) == leaves.size((10, 6), "bfloat16") == 120
    assert leaves.cast(xp, leaf, "bfloat16").dtype == xp.dtype(leaves.cast(xp, leaf, "bfloat16").values(xp))
    x, bias = xp.array(rng.normal(size=(2, 3, 6)).astype(np.float32)), xp.array(rng.normal(size=10).astype(np.float32))
    for b in (None, bias):
        np.testing.assert_allclose(xp.get(xp.linear(x, leaf, b)), xp.get(xp.linear(x, plain, b)), atol=1e-5)
    ids = xp.array(np.array([[9, 0, 3], [1, 1, 2]]), "int32")
    np.testing.assert_allclose(xp.get(xp.embedding(leaf, ids)), xp.get(xp.embedding(plain, ids)), atol=1e-6)
    np.testing.assert_allclose(xp.get(xp.weight_rows(leaf, 3, 4)), xp.get(plain)[3:7], atol=1e-6)
    layer = nn.Linear.abstract(6, 10, bias=True)
    assert flatten(bind(layer, {"weight": leaf, "bias": bias})) == {"weight": leaf, "bias": bias}
    assert of({"weight": leaf, "bias": bias}) == name


def test_leaves_of_two_frameworks():
    torch, plain = get_backend("torch", "cpu"), get_backend("numpy")
    leaf = Int8Rows.of(torch, torch.array(np.ones((2, 2), np.float32)))
    with pytest.raises(MixedBackends, match="weight is on torch and bias is on numpy"):
        of({"weight": leaf, "bias": plain.zeros((2,))})


@pytest.mark.slow
@pytest.mark.parametrize("name", installed())
def test_a_model_runs_on_them(preset, name):
    lm = load(preset, name)
    parameters = lm.backbone.num_parameters
    values = packed(lm)
    other = load(preset, name)
    other.params = {n: other.backbone.xp.array(x) for n, x in values.items()}
    np.testing.assert_allclose(lm.logits(IDS), other.logits(IDS), rtol=1e-4, atol=1e-3)
    assert lm.generate("The sky", 8) == other.generate("The sky", 8)
    assert lm.backbone.num_parameters == parameters


@pytest.mark.parametrize("name", installed())
def test_summary_and_estimates(tmp_path, name, capsys):
    lm = load(str(write_preset(tmp_path, CONFIG | {"intermediate_size": 4096})), name)
    lm.summary()
    before = capsys.readouterr().out
    packed(lm)
    lm.summary()
    after = capsys.readouterr().out
    rows = [next(line for line in text.splitlines() if " total " in line).split() for text in (before, after)]
    assert [row[:-3] for row in rows[:1]] == [row[:-3] for row in rows[1:]]  # as many tensors and parameters
    sizes = [float(row[-3]) for row in rows]
    assert 0.24 < sizes[1] / sizes[0] < 0.3  # a quarter, scales and norms aside
    assert sum(map(leaves.nbytes, lm.params.values())) / 1e6 == pytest.approx(sizes[1], abs=0.06)


@pytest.mark.parametrize("name", TRAINERS)
def test_moving_there_and_back(preset, name):
    lm = load(preset, "numpy")
    values = packed(lm)
    wanted = lm.logits(IDS)
    lm.to(backend=name)
    assert all(isinstance(x, Int8Rows) == (len(x.shape) == 2) for x in lm.params.values())
    np.testing.assert_allclose(lm.logits(IDS), wanted, rtol=1e-3, atol=1e-3)
    lm.to(backend="numpy")
    assert of(lm.params) == "numpy"
    for key, x in lm.params.items():
        np.testing.assert_array_equal(lm.backbone.xp.get(x), values[key])


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_an_adapter_is_trained_on_top_of_them(preset, name):
    """Through the engine: products, the head in pieces, and a compute dtype; the loss is that of the values."""
    losses = {}
    for kind in ("packed", "values"):
        lm = load(preset, name)
        values = packed(lm)
        if kind == "values":
            lm.params = {n: lm.backbone.xp.array(x) for n, x in values.items()}
        lm.enable_lora(rank=2)
        lm.compile(optimizer=optim.SGD(0.5))
        batch = complete({"input_ids": IDS, "labels": IDS})
        history = lm.fit([batch] * 3, verbose=False)
        losses[kind] = [step["loss"] for step in history.steps]
    np.testing.assert_allclose(losses["packed"], losses["values"], rtol=1e-4)
    assert losses["packed"][-1] < losses["packed"][0]


@pytest.mark.parametrize("name", TRAINERS)
def test_what_cannot_be_done_with_them_names_one(preset, name):
    lm = load(preset, name)
    packed(lm, ["model.layers.1.mlp.up_proj.weight"])
    batch = complete({"input_ids": IDS, "labels": IDS})
    with pytest.raises(
        ConfigError, match=r"training takes plain arrays.*model\.layers\.1\.mlp\.up_proj\.weight \(int8\)"
    ):
        lm.fit([batch], verbose=False)
    lm.enable_lora(rank=2, targets="all-linear")
    with pytest.raises(ConfigError, match=r"a way out takes plain arrays.*up_proj\.weight \(int8\)"):
        modelhub.to_torch(lm)
    with pytest.raises(ConfigError, match=r"merging an adapter takes plain arrays.*up_proj\.weight \(int8\).*unpacked"):
        lm.merge_lora()
    assert np.isfinite(lm.logits(IDS)).all()


@pytest.mark.parametrize("name", installed())
def test_the_head_in_pieces(name, preset, monkeypatch):
    xp = get_backend(name, "cpu")
    monkeypatch.setattr(head, "BLOCK", 64)
    lm = load(preset, name)
    table = "model.embed_tokens.weight"
    leaf = Int8Rows.of(xp, lm.params[table])
    hidden = xp.array(np.random.default_rng(0).normal(size=(7, leaf.shape[1])).astype(np.float32))
    batch = {"places": xp.arange(7), "labels": xp.array(IDS[0, :7], "int32"), "count": xp.array(7, "int32")}
    skeleton, gradients = lm.backbone.model, name != "numpy"
    found = [
        head.loss_and_gradients(xp, skeleton, lm.params | {table: x}, hidden, batch, frozenset(), gradients=gradients)
        for x in (leaf, xp.values(leaf))
    ]
    assert float(xp.get(found[0][0]["loss"])) == pytest.approx(float(xp.get(found[1][0]["loss"])), rel=1e-5)
    for key, gradient in found[1][1].items():
        np.testing.assert_allclose(xp.get(found[0][1][key]), xp.get(gradient), atol=1e-5)


# --- one place for sizes ------------------------------------------------------------------------------------------------

SIZES = {"core/leaves.py", "hub/checkpoint.py"}  # of leaves, and of tensors in files


def is_prod(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("math.prod", "np.prod", "prod")


def wrong_sizes(code, of_leaves):
    """Lines that work out bytes, or count a leaf's numbers, by themselves."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            inside = list(ast.walk(node))
            bytes_each = any(isinstance(x, ast.Attribute) and x.attr == "itemsize" for x in inside)
            constant = any(isinstance(x, ast.Constant) and x.value in (2, 4) for x in (node.left, node.right))
            if any(map(is_prod, inside)) and (bytes_each or constant):
                found.append(node.lineno)
        elif isinstance(node, ast.IfExp):
            sides = [x.value for x in (node.body, node.orelse) if isinstance(x, ast.Constant)]
            if sorted(map(str, sides)) == ["2", "4"]:
                found.append(node.lineno)
        elif of_leaves and is_prod(node) and isinstance(node.args[0], ast.Attribute) and node.args[0].attr == "shape":
            found.append(node.lineno)
    return found


def test_the_check_sees_what_it_forbids():
    for code in ("math.prod(shape) * np.dtype(d).itemsize", "4 * int(np.prod(x.shape))", "4 if d == 'float32' else 2"):
        assert wrong_sizes(code, of_leaves=False)
    assert wrong_sizes("sum(math.prod(x.shape) for x in params.values())", of_leaves=True)
    assert not wrong_sizes("math.prod(x.shape) // 32; 2 * n; leaves.size(x.shape, 'float32')", of_leaves=False)


def test_sizes_are_worked_out_in_one_place():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name not in SIZES:
            of_leaves = not name.startswith(("hub/", "processing/"))
            wrong += [f"{name}:{line}" for line in wrong_sizes(path.read_text(), of_leaves)]
    assert not wrong, f"use modelhub.core.leaves (hub: nbytes of checkpoint): {wrong}"
