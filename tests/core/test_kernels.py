"""The native products: every instruction set of this processor against sums in float64, and how they are found."""

import copy
import os
import pickle
import platform
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest

from modelhub.core import kernels
from modelhub.core.backends import get_backend
from modelhub.core.backends.numpy import Numpy
from modelhub.core.quantized import SCHEMES, _rounded, pack, tiled, tiles_of
from modelhub.errors import ConfigError

NATIVE = kernels.library()
pytestmark = pytest.mark.skipif(NATIVE is None, reason=f"no native kernels: {kernels.problem()}")
SETS = [name for name in kernels.ISAS if NATIVE is not None and NATIVE.isa(name)]
if NATIVE is not None:
    NATIVE.isa(SETS[0])


@pytest.fixture(params=SETS)
def isa(request):
    assert NATIVE.isa(request.param) == request.param
    yield request.param
    NATIVE.isa(SETS[0])


def product(kind, arrays, x, outputs, threads=2):
    """One call; the output has a margin that must stay as it is."""
    rows, width = x.shape
    y = np.full(rows * outputs + 8, 7.5, np.float32)
    codes, scales, minima, *_ = (*arrays, None, None)
    NATIVE.linear(kind, codes, scales, minima, x, y, rows, outputs, width, threads, 0)
    assert (y[rows * outputs :] == 7.5).all()
    return y[: rows * outputs].reshape(rows, outputs)


def off(y, wanted):
    return np.linalg.norm(y - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("dtype", kernels.FLOATS)
def test_float_weights(isa, dtype):
    rng = np.random.default_rng(0)
    for outputs, width in ((37, 197), (100, 64), (1, 5), (260, 1030)):
        weight = rng.normal(size=(outputs, width)).astype(dtype)
        stored = weight if dtype == "float32" else weight.view(np.uint16)
        for rows in range(1, 18):
            x = rng.normal(size=(rows, width)).astype(np.float32)
            y = product(kernels.FLOATS[dtype], [stored], x, outputs)
            assert off(y, x.astype(np.float64) @ weight.astype(np.float64).T) < 1e-6, (outputs, width, rows)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sums_of_integers_are_exact(isa, scheme):
    """x is a power of two times integers that fill 8 bits, so that nothing of it is rounded; scales are powers of two."""
    rng = np.random.default_rng(1)
    for outputs, width in ((37, 192), (16, 32), (100, 1024)):
        leaf = any_leaf(scheme, outputs, width, rng)
        weight = leaf.plain_rows(leaf_xp)[:outputs].astype(np.float64)
        for rows in range(1, 18):
            x = rng.integers(-127, 128, (rows, width)).astype(np.float32)
            x[:, ::32] = 127
            y = product(leaf.kind, list(leaf.arrays.values()), x / 64, outputs)
            np.testing.assert_array_equal(y, (x.astype(np.float64) / 64 @ weight.T).astype(np.float32))


@pytest.mark.parametrize("batch, heads, kv_heads, time, slots, width", [
    (1, 4, 1, 1, 100, 256), (2, 4, 2, 1, 17, 64), (3, 6, 2, 3, 300, 20), (1, 9, 3, 8, 700, 64), (2, 2, 1, 5, 1, 7),
])  # fmt: skip
def test_attention_of_few_queries(isa, batch, heads, kv_heads, time, slots, width):
    """As of operations of numpy's; with queries that see nothing, whose weights are all alike."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(batch, *shape, width)).astype(np.float32) for shape in ((heads, time), (kv_heads, slots), (kv_heads, slots)))  # fmt: skip
    masks = [None]
    for rows in {1, batch}:
        masks.append(rng.random((rows, 1, time, slots)) < 0.4)
        masks[-1][..., slots // 2 + 1 :] = False
        masks[-1][-1, 0, 0] = rows == 1  # sees all, or nothing
    for mask in masks:
        for softcap in (None, 5.0):
            args = q, k, v, mask, 0.2, softcap, 0.0, 0
            np.testing.assert_allclose(leaf_xp._attention(*args), Numpy._attention(plain_xp, *args), atol=3e-6)


def test_attention_of_numbers_that_are_not_finite(isa):
    q, k, v = np.ones((1, 2, 1, 8), np.float32), np.ones((1, 1, 9, 8), np.float32), np.ones((1, 1, 9, 8), np.float32)
    q[0, 1, 0, 3] = np.nan
    y = leaf_xp.attention(q, k, v)
    assert (y[0, 0] == 1).all() and np.isnan(y[0, 1]).all()


@pytest.mark.parametrize(
    "shape, rows", [((1, 4, 1, 256), 1), ((2, 3, 5, 20), 1), ((2, 3, 5, 20), 2), ((3, 1, 7, 6), 3)]
)
def test_rotary_embedding(isa, shape, rows):
    rng = np.random.default_rng(0)
    tables = (rows, 1, shape[2], shape[3] // 2)
    x, cos, sin = (rng.normal(size=size).astype(np.float32) for size in (shape, tables, tables))
    np.testing.assert_allclose(leaf_xp.rotate(x, cos, sin), Numpy.rotate(plain_xp, x, cos, sin), atol=1e-6)


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_activations(isa, count):
    x = (np.random.default_rng(0).normal(size=count) * 4).astype(np.float32)
    x[:8] = [-1e30, 1e30, -100, 100, 0, -0.0, 1e-20, np.nan][: min(count, 8)]
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_allclose(leaf_xp.silu(x), Numpy.silu(plain_xp, x), rtol=1e-6, atol=5e-7)
        np.testing.assert_allclose(leaf_xp.gelu(x, True), Numpy.gelu(plain_xp, x, True), rtol=1e-6, atol=5e-7)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_shapes_that_do_not_fit_go_to_the_framework(name):
    """Which says what is wrong with them, or broadcasts them; the library would read beyond their ends."""
    xp = backend_or_skip(name)

    def array(*shape, dtype="float32"):
        return xp.array(np.ones(shape, dtype))

    leaf = tiles_of(xp, pack(np.ones((48, 64), np.float32), "int8"), "int8", (48, 64), "float32")
    for wrong in (
        lambda: xp.linear(array(1, 3), array(5, 4)),
        lambda: xp.linear(array(2, 32), leaf),
        lambda: xp.linears(array(2, 32), [(leaf, None), (leaf, None)]),
        lambda: xp.attention(array(1, 2, 1, 8), array(1, 1, 9, 4), array(1, 1, 9, 4)),
        lambda: xp.attention(array(1, 2, 1, 8), array(1, 1, 9, 8), array(1, 1, 9, 8), array(1, 1, 1, 4, dtype="bool")),
        lambda: xp.rotate(array(1, 2, 3, 8), array(1, 1, 3, 3), array(1, 1, 3, 3)),
        lambda: xp.update_slots(array(1, 2, 9, 8), array(1, 2, 1, 4), xp.array([0], "int32")),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            wrong()
    if name == "numpy":  # torch looks no further than the shorter of the two
        with pytest.raises(ValueError):
            xp.attention(array(1, 2, 1, 8), array(1, 1, 9, 8), array(1, 1, 5, 8))
    q, k = array(1, 2, 3, 8), array(1, 1, 9, 8)
    assert xp.get(xp.attention(q, k, k, array(1, 1, 1, 9, dtype="bool"))).shape == (1, 2, 3, 8)


def backend_or_skip(name):
    pytest.importorskip(name)
    return get_backend(name, "cpu")


def test_a_copy_of_a_packed_leaf_has_addresses_of_its_own():
    xp = backend_or_skip("torch")
    leaf = tiles_of(xp, pack(np.ones((16, 32), np.float32), "int8"), "int8", (16, 32), "float32")
    x = xp.array(np.ones((1, 32), np.float32))
    wanted = xp.get(xp.linear(x, leaf)).copy()
    for other in (copy.deepcopy(leaf), pickle.loads(pickle.dumps(leaf))):
        assert other.codes.data_ptr() != leaf.codes.data_ptr()
        leaf.codes.zero_()
        np.testing.assert_array_equal(xp.get(xp.linear(x, other)), wanted)
        leaf.codes.copy_(other.codes)


def test_slots_outside_the_cache_are_an_error():
    buffer, new = np.zeros((2, 1, 5, 3), np.float32), np.ones((2, 1, 2, 3), np.float32)
    leaf_xp.update_slots(buffer, new, np.array([0, 3], np.int32))
    assert buffer[:, 0, :, 0].tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]
    for start in ([0, 4], [-1, 0]):
        with pytest.raises(ValueError):
            leaf_xp.update_slots(buffer, new, np.array(start, np.int32))


leaf_xp = get_backend("numpy")
plain_xp = Numpy("cpu")


def any_leaf(scheme, outputs, width, rng):
    """Codes over the whole range, scales and minima powers of two."""
    low, high = {"int8": (-127, 127), "int8m": (0, 127), "int8h": (-127, 127), "int4": (-8, 7), "int4m": (0, 15)}[
        scheme
    ]
    groups, halves = width // 32, 2 if scheme == "int8h" else 1
    codes = rng.integers(low, high + 1, (outputs, groups, 32)).astype(np.int8)
    scales = (2.0 ** rng.integers(-3, 1, (outputs, groups, halves))).astype(np.float16)
    minima = -(2.0 ** rng.integers(-3, 1, (outputs, groups))).astype(np.float16) if scheme.endswith("m") else None
    arrays = {name: np.ascontiguousarray(x) for name, x in tiled(codes, scales, minima, scheme).items()}
    leaf = tiles_of(leaf_xp, arrays, scheme, (outputs, width), "float32")
    wide = codes.reshape(outputs, groups, halves, -1) * scales.astype(np.float32)[..., None]
    wide = wide.reshape(outputs, groups, 32) + (0 if minima is None else minima.astype(np.float32)[..., None])
    np.testing.assert_array_equal(leaf.plain_rows(leaf_xp)[:outputs], wide.reshape(outputs, width))
    return leaf


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_as_floats(isa, scheme):
    leaf = any_leaf(scheme, 37, 96, np.random.default_rng(2))
    wanted = leaf.plain_rows(leaf_xp)
    for first, count in ((0, 37), (5, 1), (16, 21)):
        np.testing.assert_array_equal(leaf_xp.kernel_rows(leaf, first, count), wanted[first : first + count])
    ids = np.array([[36, 0], [17, 17]], np.int32)
    np.testing.assert_array_equal(leaf_xp.kernel_take(leaf, ids), wanted[ids])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_equals_numpys(isa, scheme, weighted):
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(37, 128)).astype(np.float32) * rng.gamma(1, size=(37, 1)).astype(np.float32)
    weight[3, :32], weight[4] = 0, 1e-20
    importance = rng.gamma(0.5, size=128).astype(np.float32) if weighted else None
    found = pack(weight, scheme, importance)
    wanted = tiled(*_rounded(weight, scheme, importance), scheme)
    assert found.keys() == wanted.keys()
    for name, x in found.items():  # two candidates may be equally good
        assert (x.astype(np.float32) != wanted[name].astype(np.float32)).mean() < 0.03, name
    values = tiles_of(leaf_xp, found, scheme, weight.shape, "float32").plain_rows(leaf_xp)[:37]
    same = tiles_of(leaf_xp, {n: np.ascontiguousarray(x) for n, x in wanted.items()}, scheme, weight.shape, "float32")
    count = np.ones(128) if importance is None else importance
    errors = [np.sqrt((count * (v - weight) ** 2).sum()) for v in (values, same.plain_rows(leaf_xp)[:37])]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert (values[3, :32] == 0).all() and np.isfinite(values).all()


@pytest.mark.parametrize("scheme", ["int4", "int4m"])
def test_rounding_is_better_than_llama_cpps(scheme):
    gguf = pytest.importorskip("gguf")
    weight = np.random.default_rng(4).normal(size=(64, 256)).astype(np.float32)
    theirs = gguf.GGMLQuantizationType["Q4_0" if scheme == "int4" else "Q4_1"]
    wanted = gguf.quants.dequantize(gguf.quants.quantize(weight, theirs), theirs)
    found = tiles_of(leaf_xp, pack(weight, scheme), scheme, weight.shape, "float32").values(leaf_xp)
    assert off(found, weight) < 0.95 * off(wanted, weight)


def test_what_is_not_finite_stays_so(isa):
    leaf = any_leaf("int8", 16, 64, np.random.default_rng(5))
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((2, 64), np.float32)
        x[0, 40] = bad
        y = product(leaf.kind, list(leaf.arrays.values()), x, 16)
        assert not np.isfinite(y[0]).any() and np.isfinite(y[1]).all()
    assert (product(leaf.kind, list(leaf.arrays.values()), np.full((1, 64), 1e-38, np.float32), 16) == 0).all()


def test_arguments_that_do_not_fit():
    x, y = np.ones((1, 40), np.float32), np.empty((1, 16), np.float32)
    with pytest.raises(ValueError, match="do not fit"):
        NATIVE.linear(3, y, y, None, x, y, 1, 16, 40, 1, 0)
    with pytest.raises(ValueError, match="do not fit"):
        NATIVE.linear(99, y, y, None, x, y, 1, 16, 40, 1, 0)
    with pytest.raises((BufferError, ValueError)):
        NATIVE.linear(0, x[:, ::2], None, None, x, y, 1, 16, 20, 1, 0)


def test_threads_at_once():
    """Whoever finds the pool busy works alone, and gets the same."""
    rng = np.random.default_rng(6)
    leaf = any_leaf("int4", 2000, 640, rng)
    x = rng.normal(size=(1, 640)).astype(np.float32)
    arrays = list(leaf.arrays.values())
    wanted, wrong = product(leaf.kind, arrays, x, 2000), []

    def work():
        for _ in range(200):
            if (product(leaf.kind, arrays, x, 2000) != wanted).any():
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_after_a_fork():
    """A child has none of the pool's threads, and starts its own."""
    leaf = any_leaf("int8", 2000, 640, np.random.default_rng(7))
    x = np.ones((1, 640), np.float32)
    wanted = product(leaf.kind, list(leaf.arrays.values()), x, 2000)
    pid = os.fork()
    if pid == 0:
        same = all((product(leaf.kind, list(leaf.arrays.values()), x, 2000) == wanted).all() for _ in range(20))
        os._exit(0 if same else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert (product(leaf.kind, list(leaf.arrays.values()), x, 2000) == wanted).all()


def says(code, **env):
    env = {k: v for k, v in os.environ.items() if not k.startswith("MODELHUB_")} | env
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


SHOW = "from modelhub.core import kernels as k; x = k.library(); print(x and x.isa(), k.problem(), k.threads())"


def test_the_environment_decides():
    assert says(SHOW).startswith(SETS[0])
    assert says(SHOW, MODELHUB_ISA=SETS[-1]).startswith(SETS[-1])
    assert says(SHOW, MODELHUB_KERNELS="off").startswith("None MODELHUB_KERNELS=off")
    assert says(SHOW, OMP_NUM_THREADS="1").endswith(" 1")
    assert "MODELHUB_ISA must be one of" in says(SHOW, MODELHUB_ISA="mmx")
    assert 'must be "off" or "require"' in says(SHOW, MODELHUB_KERNELS="maybe")
    other = next(name for name in kernels.ISAS if name not in SETS)
    assert "this processor does not have it" in says(SHOW, MODELHUB_ISA=other)


def test_a_library_of_another_version():
    code = "import modelhub.core.kernels._kernels as n; n.ABI = 99\n" + SHOW
    assert "another version (ABI 99" in says(code)
    assert "ConfigError: MODELHUB_KERNELS=require: the library is of another version" in says(
        code, MODELHUB_KERNELS="require"
    )


def test_half_precision_weights_are_what_numpy_makes_of_them(isa):
    """All bit patterns that are finite, the smallest ones too."""
    for dtype in ("float16", ml_dtypes.bfloat16):
        bits = np.arange(65536, dtype=np.uint16)
        values = bits.view(dtype).astype(np.float32)
        bits = bits[np.isfinite(values)]
        kind = kernels.FLOATS[np.dtype(dtype).name]
        y = product(kind, [bits.reshape(-1, 1)], np.ones((1, 1), np.float32), len(bits))
        np.testing.assert_array_equal(y[0], bits.view(dtype).astype(np.float32))


FLUSH = {"x86_64": (28, 0x8040), "aarch64": (0, 1 << 24)}  # where C's fenv_t has the bits for it


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in FLUSH, reason="where the bits are is known for Linux alone"
)
def test_a_caller_that_flushes_small_numbers_changes_nothing_for_others():
    """XLA's threads take the smallest floats for zero, and a thread hands that on to those that it starts."""
    offset, bits = FLUSH[platform.machine()]
    code = f"""
import ctypes, threading
import numpy as np
from modelhub.core import kernels
weights, x = np.full((65536, 1), 0x0001, np.uint16), np.ones((1, 1), np.float32)  # the smallest bfloat16
def product():
    y = np.empty((1, 65536), np.float32)
    kernels.library().linear(1, weights, None, None, x, y, 1, 65536, 1, 4, 0)
    return y
def flushing():
    libm, state = ctypes.CDLL("libm.so.6"), (ctypes.c_uint32 * 16)()
    libm.fegetenv(state)
    state[{offset} // 4] |= {bits}
    libm.fesetenv(state)
    flushed.append(product())
flushed = []
thread = threading.Thread(target=flushing)
thread.start()
thread.join()
print((flushed[0] == 0).all(), all((product() > 0).all() for _ in range(100)))
"""
    assert says(code) == "True True"


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_cannot_be_packed(scheme, native, monkeypatch):
    if not native:
        monkeypatch.setattr(kernels, "library", lambda: None)
    rng = np.random.default_rng(8)
    for bad in (np.nan, np.inf, -np.inf):
        weight = rng.normal(size=(37, 96)).astype(np.float32)
        weight[35, 70] = bad
        with pytest.raises(
            ConfigError, match=r"up_proj.weight: its weights .* 1 that are not finite.* row 35, column 70"
        ):
            pack(weight, scheme, name="layers.0.up_proj.weight")
    with pytest.raises(ConfigError, match=rf"go up to .*'\*': '{scheme}', 'layers.0.up_proj': None"):
        pack(np.outer(np.arange(16.0), np.linspace(-1e7, 1e7, 32)), scheme, name="layers.0.up_proj.weight")
    for bad in (np.nan, np.inf, -1):
        with pytest.raises(ConfigError, match="importance"):
            pack(np.ones((16, 32)), scheme, np.full(32, bad, np.float32))


def test_ids_outside_the_table(isa):
    """Nothing outside is read, and the caller is told."""
    leaf = any_leaf("int4", 37, 96, np.random.default_rng(9))
    for ids in ([0, 37], [47], [-1], [2**31 - 1, -(2**31)]):
        out = np.empty((len(ids), 96), np.float32)
        with pytest.raises(IndexError, match="outside the table"):
            NATIVE.take(leaf.kind, *leaf.parts, np.array(ids, np.int32), out, len(ids), 37, 96)
