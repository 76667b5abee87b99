"""Quantised matrices on every backend: with the native kernels, and with the frameworks' own forms alone."""

import numpy as np
import pytest

from modelhub.core import kernels, leaves
from modelhub.core.backends import get_backend, installed
from modelhub.core.quantized import SCHEMES, Plan, Tiles, pack, tiles_of
from modelhub.errors import ConfigError

OUTPUTS, WIDTH = 100, 192
BITS = {"int8": 8.5, "int8m": 9, "int8h": 9, "int4": 4.5, "int4m": 5}
TRAINERS = [name for name in installed() if name != "numpy"]


@pytest.fixture(params=["native", "plain"])
def form(request, monkeypatch):
    """The error of a product with few rows: x is rounded to 8 bits where integers are multiplied."""
    if request.param == "plain":
        for name in installed():
            monkeypatch.setattr(type(get_backend(name, "cpu")), "kernels", lambda self: None)
        return 1e-6
    if kernels.library() is None:
        pytest.skip(f"no native kernels: {kernels.problem()}")
    return 1e-2


def matrix(name, scheme, outputs=OUTPUTS, width=WIDTH):
    """A leaf, and its values as numpy works them out."""
    xp, plain = get_backend(name, "cpu"), get_backend("numpy")
    weight = np.random.default_rng(0).normal(size=(outputs, width)).astype(np.float32)
    arrays = pack(weight, scheme)
    values = tiles_of(plain, arrays, scheme, weight.shape, "float32").plain_rows(plain)[:outputs]
    assert np.linalg.norm(values - weight) / np.linalg.norm(weight) < (0.1 if scheme.startswith("int4") else 0.01)
    return xp, tiles_of(xp, {name: x.copy() for name, x in arrays.items()}, scheme, weight.shape, "float32"), values


def off(y, wanted):
    return np.linalg.norm(y - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", installed())
def test_values_rows_and_products(name, scheme, form):
    xp, leaf, values = matrix(name, scheme)
    assert leaves.shape_of(leaf) == (OUTPUTS, WIDTH) and leaves.dtype_of(leaf) == "float32"
    assert leaves.nbytes(leaf) == 112 * WIDTH * BITS[scheme] / 8  # seven tiles of 16 rows
    np.testing.assert_allclose(xp.get(leaf), values, atol=1e-6)
    for start, size in ((0, 16), (5, 30), (84, 16), (3, 97)):
        for first in (start, xp.array(start, "int32")):
            np.testing.assert_allclose(xp.get(leaf.rows(xp, first, size)), values[start : start + size], atol=1e-6)
    ids = np.array([[0, 99, 3], [17, 17, 50]], np.int32)
    np.testing.assert_allclose(xp.get(xp.embedding(leaf, xp.array(ids))), values[ids], atol=1e-6)
    rng = np.random.default_rng(1)
    bias = rng.normal(size=OUTPUTS).astype(np.float32)
    for rows in (1, 3, 9, 40):
        x = rng.normal(size=(2, rows, WIDTH)).astype(np.float32)
        assert off(xp.get(xp.linear(xp.array(x), leaf)), x @ values.T) < form
        assert off(xp.get(xp.linear(xp.array(x), leaf, xp.array(bias))), x @ values.T + bias) < form
        for other, wanted in ((leaf, values), (xp.array(values[:7]), values[:7])):
            first, second = xp.linears(xp.array(x), [(leaf, xp.array(bias)), (other, None)])
            assert off(xp.get(first), x @ values.T + bias) < form and off(xp.get(second), x @ wanted.T) < form


@pytest.mark.parametrize("scheme", ["int8", "int4m"])
@pytest.mark.parametrize("name", TRAINERS)
def test_in_compiled_programs(name, scheme, form):
    xp, leaf, values = matrix(name, scheme)
    x = np.random.default_rng(1).normal(size=(2, WIDTH)).astype(np.float32)
    for training in (False, True):
        run = xp.compile(lambda params, x: xp.linear(x, params["w"]), training=training)
        assert off(xp.get(run({"w": leaf}, xp.array(x))), x @ values.T) < form
    half = dtype16(leaf)
    y = xp.get(xp.linear(xp.array(x, "bfloat16"), half)).astype(np.float32)
    assert xp.dtype(xp.linear(xp.array(x, "bfloat16"), half)) == "bfloat16" and off(y, x @ values.T) < 1.5e-2


def dtype16(leaf):
    return leaves.cast(None, leaf, "bfloat16")


@pytest.mark.parametrize("ids", [[0, OUTPUTS], [111], [-1], [-OUTPUTS], [-OUTPUTS - 1], [2**31 - 1]])
@pytest.mark.parametrize("name", installed())
def test_ids_outside_the_table_are_as_in_a_plain_one(name, ids, form):
    """An error on numpy and torch, where numpy counts negative ones from the end; XLA takes the nearest row."""
    xp, leaf, values = matrix(name, "int4", width=32)
    table = xp.array(values)

    def answer(run, given):
        try:
            return xp.get(xp.compile(lambda params, ids: run(ids))({}, given))
        except (IndexError, RuntimeError):
            return None

    given = xp.array(np.array(ids, np.int32))
    wanted = answer(lambda ids: xp.take(table, ids), given)
    found = answer(lambda ids: xp.embedding(leaf, ids), given)
    assert (
        (wanted is None) == (found is None) == (name == "torch" or (name == "numpy" and ids not in ([-1], [-OUTPUTS])))
    )
    if wanted is not None:
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("scheme", ["int8h", "int4"])
@pytest.mark.parametrize("name", TRAINERS)
def test_gradients_go_through_them(name, scheme, form):
    """By x as of the values, in float32 and in bfloat16; x is not rounded then."""
    xp, leaf, values = matrix(name, scheme)
    xp = xp.for_training()
    x = np.random.default_rng(2).normal(size=(12, WIDTH)).astype(np.float32)
    upstream = np.random.default_rng(3).normal(size=(12, OUTPUTS)).astype(np.float32)

    def loss(variables, w, upstream):
        y = xp.linear(variables["x"], w)
        return xp.sum(xp.cast(y, "float32") * upstream), y

    run = xp.compile(lambda *args: xp.value_and_grad(loss)(*args), training=True)
    for dtype, exact in (("float32", 1e-6), ("bfloat16", 1e-2)):
        (_, y), found = run({"x": xp.array(x, dtype)}, leaves.cast(None, leaf, dtype), xp.array(upstream))
        assert off(xp.get(y).astype(np.float32), x @ values.T) < exact
        assert off(xp.get(found["x"]).astype(np.float32), upstream @ values) < exact


@pytest.mark.parametrize("name", installed())
def test_in_blocks(name, monkeypatch):
    """A matrix that is wider than one block."""
    from modelhub.core.backends import base

    blocks = base._blocks
    monkeypatch.setattr(base, "_blocks", lambda leaf: [(0, 48), (48, 48), (96, 4)])
    xp, leaf, values = matrix(name, "int4")
    assert [size for _, size in blocks(leaf)] == [100]
    x = np.random.default_rng(2).normal(size=(80, WIDTH)).astype(np.float32)
    assert off(xp.get(xp.linear(xp.array(x), leaf)), x @ values.T) < 1e-6


EXPERTS, CHOSEN = 4, 2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", installed())
def test_experts(name, scheme, form):
    """A mixture: each token is multiplied with the matrices of its own experts, of a stack (E, N, K)."""
    xp, rng = get_backend(name, "cpu"), np.random.default_rng(5)
    weight = rng.normal(size=(EXPERTS, 37, 64)).astype(np.float32)  # 37: no whole tiles
    arrays = pack(weight, scheme)
    for index, one in enumerate(weight):
        for part, x in pack(one, scheme).items():
            np.testing.assert_array_equal(arrays[part][index], x)
    leaf = tiles_of(xp, arrays, scheme, weight.shape, "float32")
    assert leaves.shape_of(leaf) == weight.shape and leaves.count(leaf) == weight.size
    assert leaves.nbytes(leaf) == EXPERTS * 48 * 64 * BITS[scheme] / 8
    values = xp.get(leaf)
    assert off(values, weight) < (0.1 if scheme.startswith("int4") else 0.01)
    x = rng.normal(size=(3, 64)).astype(np.float32)
    experts = np.array([[0, 3], [3, 1], [2, 2]], np.int32)
    shares = rng.uniform(size=experts.shape).astype(np.float32)
    wanted = np.einsum("tc,tcnk,tk->tn", shares, values[experts], x)

    def mixture(params, x, experts, shares):
        return xp.stack([
            sum(xp.linear(x[t : t + 1], xp.matrix(params["w"], experts[t, c])) * shares[t, c] for c in range(CHOSEN))[0]
            for t in range(len(wanted))
        ])  # fmt: skip

    given = (xp.array(x), xp.array(experts), xp.array(shares))
    assert off(xp.get(xp.compile(mixture)({"w": leaf}, *given)), wanted) < max(form, 1e-5)
    assert off(xp.get(mixture({"w": xp.array(values)}, *given)), wanted) < 1e-5  # plain arrays the same
    third = xp.matrix(leaf, 3)
    assert third.shape == (37, 64) and off(xp.get(xp.linear(given[0], third)), x @ values[3].T) < max(form, 1e-5)
    for wrong in (lambda: xp.linear(given[0], leaf), lambda: xp.embedding(leaf, given[1]), lambda: leaf.rows(xp, 0, 2)):
        with pytest.raises(ConfigError, match="stack of matrices"):
            wrong()


def test_what_patterns_mean():
    plan = Plan.of({"*": "int4", "lm_head": "int8", "model.layers.1?.mlp.*": None})
    assert plan.scheme("model.layers.3.mlp.up_proj.weight") == "int4"
    assert plan.scheme("model.layers.13.mlp.up_proj.weight") is None
    assert plan.scheme("lm_head.weight") == "int8"
    assert Plan.of(None) is None and Plan.of("keep").keep
    for wrong in ("int5", 4, {"*": "q4_0"}, {}, {"*": 4}):
        with pytest.raises(ConfigError, match="quantize"):
            Plan.of(wrong)


def test_a_row_more_than_a_tile():
    xp, leaf, values = matrix("numpy", "int4m", 17, 32)
    assert isinstance(leaf, Tiles) and leaf.codes.shape == (2, 1, 256)
    x = np.ones((1, 32), np.float32)
    assert off(xp.linear(x, leaf), x @ values.T) < 1e-2


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", [name for name in installed() if name in ("jax", "torch")])
def test_forward_mode(name, packed):
    """Derivatives along a direction, through few rows; torch's with gradients wanted as well."""
    xp, leaf, values = matrix(name, "int4m")
    x, along = np.random.default_rng(1).normal(size=(2, 3, WIDTH)).astype(np.float32)
    weight = leaf if packed else xp.array(values)
    if name == "jax":
        import jax

        _, found = jax.jvp(lambda x: xp.linear(x, weight), (x,), (along,))
        _, twice = jax.jvp(jax.grad(lambda x: (xp.linear(x, weight) ** 2).sum()), (x,), (along,))
        assert off(twice, 2 * along @ values.T @ values) < 1e-5
    else:
        import torch
        import torch.autograd.forward_ad as forward

        with forward.dual_level():
            dual = forward.make_dual(xp.array(x).requires_grad_(), xp.array(along))
            found = forward.unpack_dual(xp.linear(dual, weight)).tangent.detach()
        _, again = torch.func.jvp(lambda x: xp.linear(x, weight), (xp.array(x),), (xp.array(along),))
        assert off(xp.get(again), along @ values.T) < 1e-5
    assert off(xp.get(found), along @ values.T) < 1e-5
