"""What the backends do for training, against plain formulas: gradients, loops, recomputation, dropout."""

from dataclasses import dataclass

import numpy as np
import pytest

from modelhub.core import optim
from modelhub.core.backends import get_backend, installed
from modelhub.core.nn import Linear
from modelhub.core.tree import Module
from modelhub.errors import ConfigError, NoGradients

TRAINING = [name for name in installed() if name != "numpy"]


@pytest.fixture(params=TRAINING, scope="module")
def xp(request):
    return get_backend(request.param, "cpu")


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


# fn(xp, ones (4096, 8), parameter) -> (4096, 8), and where the parameter starts.
SHARED = {
    "bias": (
        lambda xp, x, b: xp.linear(x, xp.cast(xp.array(np.eye(8, dtype=np.float32)), xp.dtype(x)), b),
        np.zeros(8),
    ),
    "weight": (lambda xp, x, w: xp.linear(x, w), np.eye(8)),
    "shift": (lambda xp, x, b: xp.plus(x, b), np.zeros(8)),
    "scale": (lambda xp, x, b: xp.times(x, b), np.ones(8)),
    "norm's weight": (lambda xp, x, w: xp.rms_norm(x, w, 1e-12), np.ones(8)),
    "norm's bias": (lambda xp, x, b: xp.layer_norm(x, b + 1.0, b, 1e-12), np.zeros(8)),
    "token": (lambda xp, x, t: xp.broadcast_to(t, (4096, 8)), np.ones((1, 8))),
    "embedding": (lambda xp, x, w: xp.embedding(w, xp.zeros((4096,), "int32")), np.ones((3, 8))),
}


@pytest.mark.parametrize("compiled", [False, True])
class TestGradients:
    def run(self, xp, fn, variables, *args, compiled):
        program = xp.value_and_grad(fn)
        (value, more), gradients = (xp.compile(program, training=True) if compiled else program)(variables, *args)
        return float(xp.get(value)), more, {name: xp.get(x) for name, x in gradients.items()}

    def test_by_the_variables_alone(self, xp, compiled):
        x, w, b = draw(3, 4), draw(5, 4), draw(5)

        def fn(variables, x):
            y = xp.linear(x, variables["w"], variables["b"])
            return xp.sum(y * y), {"y": y}

        variables = {"w": xp.array(w), "b": xp.array(b), "unused": xp.array(b)}
        value, more, gradients = self.run(xp, fn, variables, xp.array(x), compiled=compiled)
        y = x @ w.T + b
        assert value == pytest.approx(float((y * y).sum()), rel=1e-5)
        np.testing.assert_allclose(xp.get(more["y"]), y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(gradients["w"], 2 * y.T @ x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(gradients["b"], 2 * y.sum(0), rtol=1e-4, atol=1e-5)
        assert gradients["unused"].shape == (5,) and not gradients["unused"].any()
        np.testing.assert_array_equal(xp.get(variables["w"]), w)

    def test_stop_gradient(self, xp, compiled):
        x = draw(4)
        _, _, gradients = self.run(
            xp, lambda v: (xp.sum(v["x"] * xp.stop_gradient(v["x"])), None), {"x": xp.array(x)}, compiled=compiled
        )
        np.testing.assert_allclose(gradients["x"], x)

    def test_of_rows_that_are_looked_up_more_than_once(self, xp, compiled):
        weight, ids = draw(6, 3), np.array([[1, 1, 5], [0, 1, 5]], np.int32)
        _, _, gradients = self.run(
            xp, lambda v, ids: (xp.sum(xp.embedding(v["w"], ids)), None), {"w": xp.array(weight)}, xp.array(ids),
            compiled=compiled,
        )  # fmt: skip
        np.testing.assert_allclose(gradients["w"], np.bincount(ids.ravel(), minlength=6)[:, None] * np.ones(3))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("shared", SHARED)
    def test_what_all_tokens_share_is_summed_in_float32(self, xp, shared, dtype, compiled):
        """Of each parameter that all of 4096 tokens have in common, the gradient is off by one rounding at most."""
        call, start = SHARED[shared]
        weights = np.random.default_rng(0).random((4096, 8), np.float32) + 0.5
        wide = np.asarray(xp.get(xp.array(weights, dtype)), np.float64)
        training, ones = xp.for_training(), xp.array(np.ones((4096, 8), np.float32), dtype)

        def fn(variables, w):
            return xp.sum(xp.cast(call(training, ones, variables["shared"]) * w, "float32")) / 16, None

        variables = {"shared": xp.array(np.asarray(start, np.float32), dtype)}
        _, _, gradients = self.run(xp, fn, variables, xp.array(weights, dtype), compiled=compiled)
        found = np.asarray(gradients["shared"], np.float64)
        found, wanted = found[:, 0] if found.shape == (8, 8) else found.reshape(-1, 8)[0], wide.sum(0) / 16
        np.testing.assert_allclose(found, wanted, rtol=2**-8 if dtype == "bfloat16" else 2**-10)

    def test_a_gradient_inside_of_a_gradient_program(self, xp, compiled):
        """As a user's loss is differentiated in the head: inside a loop, in a function that is differentiated itself."""
        x = draw(4, 3)

        def outer(variables):
            fixed = xp.stop_gradient(variables["x"])

            def body(i, total):
                inner = xp.value_and_grad(lambda v: (xp.sum(xp.exp(v["row"])), None))
                _, found = inner({"row": xp.slice_rows(fixed, i, 1)})
                return xp.add_rows(
                    total, xp.reshape(i, (1,)) if not isinstance(i, int) else xp.array([i]), found["row"]
                )

            gradients = xp.loop(xp.array(3, "int32"), body, xp.zeros((4, 3)))
            return xp.sum(variables["x"] * xp.stop_gradient(gradients)), None

        _, _, gradients = self.run(xp, outer, {"x": xp.array(x)}, compiled=compiled)
        np.testing.assert_allclose(gradients["x"][:3], np.exp(x[:3]), rtol=1e-5)
        assert not gradients["x"][3].any()

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_recomputing_changes_no_gradient(self, xp, compiled, dtype):
        """Neither of a block's input nor of its own weights; with dropout, which must come out the same again."""
        weights = {f"{i}.weight": draw(4, 4, seed=i) * 0.5 for i in range(3)}
        runs = []

        def fn(remat):
            def run(variables, x, keys, scale):
                forward = xp.for_training(keys, remat)
                x = x + variables["first"]
                for i in range(3):
                    block = Block(Linear(variables[f"{i}.weight"]), runs)
                    x = forward.block(block, forward, x, {"scale": scale}, i)
                return xp.sum(xp.cast(x, "float32") ** 2), None

            return run

        variables = {name: xp.array(x, dtype) for name, x in (weights | {"first": draw(4)}).items()}
        given = xp.array(draw(2, 4), dtype), xp.array([1, 2], "int32"), xp.array(draw(2, 4), dtype)
        kept = self.run(xp, fn(False), variables, *given, compiled=compiled)
        passes = len(runs)
        recomputed = self.run(xp, fn(True), variables, *given, compiled=compiled)
        assert recomputed[0] == pytest.approx(kept[0], rel=1e-6 if dtype == "float32" else 0.02)
        if xp.name == "torch":  # elsewhere the compiler decides how often a function is traced
            assert len(runs) - passes == 2 * passes
        tolerance = 1e-5 if dtype == "float32" else 0.05
        for name, gradient in kept[2].items():
            assert np.abs(gradient).max() > 0, name
            np.testing.assert_allclose(
                recomputed[2][name].astype(np.float32), gradient.astype(np.float32), rtol=tolerance, atol=tolerance
            )


@dataclass
class Block(Module):
    layer: Linear
    runs: list

    def __call__(self, xp, x, context, index):
        self.runs.append(index)
        return x + xp.tanh(self.layer(xp, xp.dropout(x, 0.3, index)) * context["scale"])


def test_numpy_has_no_gradients():
    with pytest.raises(NoGradients, match='"jax", "torch" or "tensorflow"'):
        get_backend("numpy").value_and_grad(lambda variables: (variables, None))


class TestLoops:
    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("n", [0, 1, 5])
    def test_loop(self, backend, compiled, n):
        def run(n, start):
            def body(i, state):
                return {
                    "x": state["x"] * 2.0 + backend.cast(i + backend.zeros((), "int32"), "float32"),
                    "steps": state["steps"] + 1,
                }

            return backend.loop(n, body, {"x": start, "steps": backend.zeros((), "int32")})

        found = (backend.compile(run, training=True) if compiled else run)(
            backend.array(n, "int32"), backend.array(1.5)
        )
        wanted = 1.5
        for i in range(n):
            wanted = wanted * 2 + i
        assert float(backend.get(found["x"])) == wanted and int(backend.get(found["steps"])) == n

    @pytest.mark.parametrize("compiled", [False, True])
    def test_scan(self, backend, compiled):
        x = draw(6, 3)

        def number(i):
            return backend.cast(i + backend.zeros((), "int32"), "float32")

        def run(x):
            def rows(state, i, nothing):
                assert nothing is None
                row = backend.slice_rows(x, i * 2, 2)
                return state + row, row * 10.0

            state, ys = backend.scan(rows, backend.zeros((2, 3)), 3)
            again, none = backend.scan(
                lambda state, i, y: (state + y * (number(i) + 1.0), None), backend.zeros((2, 3)), 3, ys
            )
            return state, again, backend.joined(ys)

        state, again, joined = (backend.compile(run, training=True) if compiled else run)(backend.array(x))
        parts = x.reshape(3, 2, 3)
        np.testing.assert_allclose(backend.get(state), parts.sum(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            backend.get(again), sum(10 * (i + 1) * part for i, part in enumerate(parts)), rtol=1e-5, atol=1e-4
        )
        np.testing.assert_allclose(backend.get(joined), 10 * x, rtol=1e-6)


class TestRows:
    @pytest.mark.parametrize("compiled", [False, True])
    def test_add_rows_counts_repeated_indices(self, backend, compiled):
        x, new, places = draw(5, 3), draw(4, 3, seed=1), np.array([3, 0, 3, 3], np.int32)
        wanted = x.copy()
        np.add.at(wanted, places, new)
        add = backend.compile(backend.add_rows, training=True, donate=(0,)) if compiled else backend.add_rows
        found = add(backend.array(x), backend.array(places), backend.array(new))
        np.testing.assert_allclose(backend.get(found), wanted, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("start", [0, 2, 3])
    def test_slice_rows(self, backend, start):
        for x in (np.arange(5, dtype=np.int32), draw(5, 2), draw(5, 2, 3)):
            for given in (start, backend.array(start, "int32")):
                found = backend.slice_rows(backend.array(x), given, 2)
                assert tuple(found.shape) == (2, *x.shape[1:])
                np.testing.assert_array_equal(backend.get(found), x[start : start + 2])

    def test_one_of_equals(self, backend):
        ids = np.array([3, 0, 3, 5, 0, 3], np.int32)
        found = backend.get(backend.one_of_equals(backend.array(ids), 6))
        assert (ids[found] == ids).all() and len(set(found.tolist())) == 3

    def test_add_into(self, backend):
        x, y = draw(3, 2), draw(3, 2, seed=1)
        found = backend.add_into(backend.array(x), backend.array(y))
        np.testing.assert_array_equal(backend.get(found), x + y)

    def test_copies_are_apart(self, backend):
        """Optimizers write into them."""
        x = backend.array(draw(2, 3))
        before = np.array(backend.get(x))
        copied = backend.copy(x)
        copied += 1.0
        np.testing.assert_array_equal(backend.get(x), before)
        np.testing.assert_allclose(backend.get(copied), before + 1)


class TestDropout:
    KEYS = np.array([7, -3, 2**31 - 1, -(2**31), 7], np.int32)

    def drop(self, xp, x, rate=0.25, salt=123_456_789, keys=KEYS):
        return xp.get(xp.for_training(xp.array(keys)).dropout(xp.array(x), rate, salt))

    def test_the_same_on_every_backend(self, backend):
        for shape, rate, salt in (((5, 7), 0.5, 0), ((5, 3, 11), 0.1, 2**31 - 1), ((5, 2, 3, 4), 0.9, 1)):
            x = draw(*shape)
            wanted = self.drop(get_backend("numpy"), x, rate, salt)
            found = self.drop(backend, x, rate, salt)
            np.testing.assert_array_equal(found == 0, wanted == 0)
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
            np.testing.assert_allclose(found[found != 0], (x / (1 - rate))[found != 0], rtol=1e-6)

    def test_compiled(self, xp):
        x = draw(5, 64)
        program = xp.compile(lambda keys, x: xp.for_training(keys).dropout(x, 0.25, 123_456_789), training=True)
        np.testing.assert_allclose(
            xp.get(program(xp.array(self.KEYS), xp.array(x))), self.drop(get_backend("numpy"), x), rtol=1e-6
        )

    @pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
    def test_share_and_mean(self, backend, rate):
        keys = np.random.default_rng(0).integers(-(2**31), 2**31, 50).astype(np.int32)
        dropped = self.drop(backend, np.ones((50, 100, 40), np.float32), rate, keys=keys)
        spread = 5 * (rate * (1 - rate)) ** 0.5  # five standard deviations of a mean
        assert abs((dropped == 0).mean() - rate) < spread / dropped.size**0.5
        assert dropped.mean() == pytest.approx(1.0, abs=0.01)
        # Every row, every position and every channel loses its share, none more.
        for axes, count in (((1, 2), 4000), ((0, 2), 2000), ((0, 1), 5000)):
            assert np.abs((dropped == 0).mean(axes) - rate).max() < spread / count**0.5

    def test_keys_and_salts_give_independent_masks(self, backend):
        x = np.ones((5, 2000), np.float32)
        kept = self.drop(backend, x, 0.5) != 0
        np.testing.assert_array_equal(kept[0], kept[4])  # the same key
        other = self.drop(backend, x, 0.5, salt=123_456_790) != 0
        for a, b in ((kept[0], kept[1]), (kept[0], kept[2]), (kept[0], other[0]), (kept[0][1:], kept[0][:-1])):
            assert abs((a == b).mean() - 0.5) < 0.06
        # A row's mask does not depend on the rows beside it.
        np.testing.assert_array_equal(self.drop(backend, x[:1], 0.5, keys=self.KEYS[1:2])[0] != 0, kept[1])

    def test_off(self, backend):
        x = backend.array(draw(2, 3))
        assert backend.dropout(x, 0.5, 1) is x
        assert backend.for_training(None).dropout(x, 0.5, 1) is x
        assert backend.for_training(backend.array([1, 2], "int32")).dropout(x, 0.0, 1) is x
        assert backend.dropout_keys is None and not backend.remat  # for_training makes another object

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_keeps_the_dtype(self, xp, dtype):
        x = xp.array(draw(2, 3), dtype)
        assert xp.dtype(xp.for_training(xp.array([1, 2], "int32")).dropout(x, 0.5, 1)) == dtype


class TestNativeOptimizers:
    """One step of each, and one without finite gradients, which must change nothing."""

    @pytest.mark.parametrize("name", ["jax", "torch"])
    def test_steps_and_skipped_steps(self, name):
        backend = get_backend(name, "cpu")
        if name == "jax":
            native = backend.native_optimizer(pytest.importorskip("optax").adamw(0.1, weight_decay=0.01))
        else:
            native = backend.native_optimizer(pytest.importorskip("torch").optim.AdamW)
        ours = optim.AdamW(0.1)
        params = {"a.weight": draw(3, 2), "b.bias": draw(4)}
        results = []
        for optimizer in (native, ours):
            weights = {key: backend.array(x) for key, x in params.items()}
            state = optimizer.init(backend, weights)
            numbers = backend.array(0.1), backend.array(1, "int32")
            for step in (1, 2, 3):
                grads = {key: backend.array(draw(*x.shape, seed=step)) for key, x in params.items()}
                if step == 2:  # skipped
                    before = {key: np.array(backend.get(x)) for key, x in (weights | state).items()}
                    grads["b.bias"] = grads["b.bias"] * float("nan")
                    weights, state = optimizer.update(
                        backend, grads, state, weights, *numbers, backend.array(False, "bool")
                    )
                    for key, x in before.items():
                        np.testing.assert_array_equal(backend.get((weights | state)[key]), x)
                    continue
                numbers = backend.array(0.1), backend.array(1 if step == 1 else 2, "int32")
                weights, state = optimizer.update(backend, grads, state, weights, *numbers, backend.array(True, "bool"))
            results.append({key: np.array(backend.get(x)) for key, x in weights.items()})
        for key in params:
            np.testing.assert_allclose(results[0][key], results[1][key], rtol=1e-4, atol=1e-6)

    def test_what_is_none(self, backend):
        for other in ("adamw", optim.AdamW(), optim.SGD, None, 3):
            assert backend.native_optimizer(other) is None

    def test_torch_wants_a_class(self):
        torch = pytest.importorskip("torch")
        with pytest.raises(ConfigError, match="functools.partial"):
            get_backend("torch", "cpu").native_optimizer(torch.optim.SGD([torch.zeros(2, requires_grad=True)]))


def test_matmul_precision_is_put_back(xp):
    def found():
        if xp.name == "torch":
            import torch

            return torch.get_float32_matmul_precision()
        if xp.name == "jax":
            import jax

            return jax.config.jax_default_matmul_precision
        import tensorflow

        return tensorflow.config.experimental.tensor_float_32_execution_enabled()

    before = found()
    seen = []
    for precision in ("highest", "high", None):
        with xp.matmul_precision(precision):
            seen.append(found())
            product = xp.matmul(xp.array(draw(8, 8)), xp.array(draw(8, 8, seed=1)))
        np.testing.assert_allclose(xp.get(product), draw(8, 8) @ draw(8, 8, seed=1), rtol=1e-2, atol=1e-2)
        assert found() == before
    assert seen[0] != seen[1] and seen[2] == before
    with pytest.raises(ZeroDivisionError), xp.matmul_precision("high"):
        raise ZeroDivisionError
    assert found() == before


def test_memory(backend):
    free, peak = backend.free_memory(), backend.peak_memory()
    assert free is None or free > 1e6
    assert peak is None or peak > 1e6
