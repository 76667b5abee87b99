"""numpy: inference anywhere, and the oracle that the other backends are tested against.

bfloat16 and float16 are storage only (ml_dtypes has no fast products): `linear` and `matmul` compute in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from modelhub.core import kernels
from modelhub.core.backends.base import Array, Backend, Shape, bound_once, host_copy
from modelhub.core.backends.native import NativeCalls
from modelhub.errors import NoGradients

_DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32), "float16": np.dtype(np.float16),
    "int32": np.dtype(np.int32),
}  # fmt: skip
_BFLOAT16 = _DTYPES["bfloat16"]
# float32 erf as a rational function of x, the coefficients that Eigen and XLA use; error below 1e-7.
_ERF_P = (0.00022905065861350646, 0.0034082910107109506, 0.050955695062380861, 0.18520832239976145, 1.128379143519084)
_ERF_Q = (
    -1.1791602954361697e-7,
    0.000023547966471313185,
    0.0010179625278914885,
    0.014070470171167667,
    0.11098505178285362,
    0.49746925110067538,
    1.0,
)


def _dtype(name: str) -> np.dtype:
    return _DTYPES.get(name) or np.dtype(name)


def _wide(x: Array) -> Array:
    return x.astype(np.float32) if x.dtype.itemsize == 2 else x


class _Lent:
    """A numpy array that may be written to or not, for frameworks that take no other and do not write."""

    def __init__(self, array: np.ndarray):
        pointer, _ = array.__array_interface__["data"]
        self._array = array
        self.__array_interface__ = array.__array_interface__ | {"data": (pointer, False)}

    def __dlpack__(self, **options: Any) -> Any:
        return np.asarray(self).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


class Numpy(Backend):
    """All of it but native calls."""

    name = "numpy"
    eager = True
    traced = False

    @classmethod
    def devices(cls) -> list[str]:
        return ["cpu"]

    @staticmethod
    def owns(x: object) -> bool:
        return isinstance(x, (np.ndarray, np.generic))

    @staticmethod
    def device_of(x: Array) -> str | None:
        return "cpu"

    def put(self, array: np.ndarray) -> Array:
        return array

    def _get(self, x: Array) -> np.ndarray:
        return np.asarray(x)

    def compile(
        self, fn: Callable, skeleton: Any = None, donate: Sequence[int] = (), hot: bool | None = True,
        training: bool = False, jit: bool | None = None,
    ) -> Callable:  # fmt: skip
        return bound_once(fn, skeleton)

    def value_and_grad(self, fn: Callable[..., tuple[Array, Any]]) -> Callable:
        raise NoGradients(
            'numpy has no gradients: load the model with backend="jax", "torch" or "tensorflow" to train it'
        )

    def copy(self, x: Array) -> Array:
        return x.copy()

    def lend(self, x: Array) -> Any:
        x = np.asarray(x, order="C")
        return _Lent(x.view(np.int16) if x.dtype.name == "bfloat16" else x)  # DLPack of numpy has no bfloat16

    def adopt(self, x: Array, owner: Backend) -> Array:
        return owner.get(x)

    def block(self, fn: Callable, *args: Any) -> Any:
        return fn(*args)

    def array(self, values: Any, dtype: str | None = None) -> Array:
        return host_copy(values, _dtype(dtype) if dtype else None)

    def zeros(self, shape: Shape, dtype: str = "float32") -> Array:
        return np.zeros(shape, _dtype(dtype))

    def full(self, shape: Shape, value: float, dtype: str = "float32") -> Array:
        return np.full(shape, value, _dtype(dtype))

    def arange(self, n: int, dtype: str = "int32") -> Array:
        return np.arange(n, dtype=_dtype(dtype))

    def cast(self, x: Array, dtype: str) -> Array:
        wanted = _dtype(dtype)
        return x if x.dtype is wanted else x.astype(wanted, copy=False)

    def dtype(self, x: Array) -> str:
        return "float32" if x.dtype == np.float32 else x.dtype.name  # numpy puts names together anew: 6 us

    def reshape(self, x: Array, shape: Shape) -> Array:
        return x.reshape(shape)

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        return x.transpose(axes)

    def concat(self, xs: Sequence[Array], axis: int = 0) -> Array:
        return np.concatenate(xs, axis)

    def stack(self, xs: Sequence[Array], axis: int = 0) -> Array:
        return np.stack(xs, axis)

    def split(self, x: Array, sections: int, axis: int = -1) -> list[Array]:
        return np.split(x, sections, axis)

    def expand_dims(self, x: Array, axis: int) -> Array:
        return np.expand_dims(x, axis)

    def broadcast_to(self, x: Array, shape: Shape) -> Array:
        return np.broadcast_to(x, shape)

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return np.where(condition, x, y)

    def take(self, x: Array, indices: Array, axis: int = 0) -> Array:
        return np.take(x, indices, axis)

    def take_along_axis(self, x: Array, indices: Array, axis: int) -> Array:
        return np.take_along_axis(x, indices, axis)

    def update_slots(self, buffer: Array, new: Array, start: Array) -> Array:
        time = new.shape[2]
        for row, first in enumerate(start.tolist()):
            buffer[row, :, first : first + time] = new[row]
        return buffer

    def add_rows(self, x: Array, indices: Array, new: Array) -> Array:
        np.add.at(x, indices, new)
        return x

    def one_of_equals(self, ids: Array, size: int) -> Array:
        _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        return first[inverse].astype(np.int32)

    def exp(self, x: Array) -> Array:
        return np.exp(x)

    def log(self, x: Array) -> Array:
        return np.log(x)

    def sqrt(self, x: Array) -> Array:
        return np.sqrt(x)

    def rsqrt(self, x: Array) -> Array:
        return np.reciprocal(np.sqrt(x))

    def sin(self, x: Array) -> Array:
        return np.sin(x)

    def cos(self, x: Array) -> Array:
        return np.cos(x)

    def tanh(self, x: Array) -> Array:
        return np.tanh(x)

    def sigmoid(self, x: Array) -> Array:
        # By tanh: exp(-x) would overflow, with a warning, below -88.
        return 0.5 * np.tanh(0.5 * x) + 0.5

    def erf(self, x: Array) -> Array:
        x = np.clip(x, -3.832506856900711, 3.832506856900711)
        square = x * x
        p = square * _ERF_P[0] + _ERF_P[1]
        for coefficient in _ERF_P[2:]:
            p = p * square + coefficient
        q = square * _ERF_Q[0] + _ERF_Q[1]
        for coefficient in _ERF_Q[2:]:
            q = q * square + coefficient
        return x * p / q

    def abs(self, x: Array) -> Array:
        return np.abs(x)

    def maximum(self, x: Array, y: Array | float) -> Array:
        return np.maximum(x, y)

    def minimum(self, x: Array, y: Array | float) -> Array:
        return np.minimum(x, y)

    def sum(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        # Integers stay what they are, as in the other frameworks; numpy alone would widen them.
        return np.sum(_wide(x), axis, keepdims=keepdims, dtype=_wide(x).dtype).astype(x.dtype, copy=False)

    def mean(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return np.mean(_wide(x), axis, keepdims=keepdims).astype(x.dtype, copy=False)

    def max(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return np.max(x, axis, keepdims=keepdims)

    def min(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return np.min(x, axis, keepdims=keepdims)

    def any(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return np.any(x, axis, keepdims=keepdims)

    def all(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return np.all(x, axis, keepdims=keepdims)

    def argmax(self, x: Array, axis: int = -1) -> Array:
        return np.argmax(x, axis).astype(np.int32)

    def cumsum(self, x: Array, axis: int = -1) -> Array:
        # One after the other in float32, 262,144 probabilities drift by 1e-4: enough to draw another token.
        dtype = x.dtype if x.dtype.kind in "iu" else np.float64
        return np.cumsum(x, axis, dtype=dtype).astype(x.dtype, copy=False)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        indices = np.argpartition(-x, k - 1, axis=-1)[..., :k]
        order = np.lexsort((indices, -np.take_along_axis(x, indices, -1)), axis=-1)
        indices = np.take_along_axis(indices, order, -1)
        return np.take_along_axis(x, indices, -1), indices.astype(np.int32)

    def matmul(self, x: Array, y: Array) -> Array:
        if x.dtype.itemsize == 2:
            return np.matmul(_wide(x), _wide(y)).astype(x.dtype)
        return np.matmul(x, y)

    def einsum(self, equation: str, *operands: Array) -> Array:
        return np.einsum(equation, *map(_wide, operands), optimize=True).astype(operands[0].dtype, copy=False)

    def _linear(self, x: Array, weight: Array, bias: Array | None) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        if weight.dtype.itemsize == 2:
            y = _blockwise_linear(rows, weight)
        elif len(rows) == 1:
            # weight @ vector runs at the memory's speed; OpenBLAS takes a slower path for a (1, D) matrix.
            y = weight @ rows[0]
        else:
            y = rows @ weight.T
        y = y.reshape(*x.shape[:-1], weight.shape[0])
        return y if bias is None else y + bias


class NumpyBackend(NativeCalls, Numpy):
    def kernels(self) -> Any:
        return kernels.library()

    def _native(self, *arrays: Array) -> Any:
        plain = all(x.dtype == np.float32 and x.flags.c_contiguous for x in arrays)
        return self.kernels() if plain else None

    def _native_weight(self, x: Array, weight: Array) -> Any:
        known = self.dtype(x) in kernels.FLOATS and self.dtype(weight) in kernels.FLOATS
        return self.kernels() if known and weight.flags.c_contiguous else None

    def _count(self, x: Array) -> int:
        return x.size

    def _contiguous(self, x: Array) -> Array:
        return np.ascontiguousarray(x)

    def _pointer(self, x: Array | None) -> Any:
        return x.view(np.uint16) if x is not None and x.dtype == _BFLOAT16 else x  # no kind of buffer is bfloat16

    def kernel_take(self, leaf: Any, ids: Array) -> Array:
        return super().kernel_take(leaf, np.where(ids < 0, ids + leaf.shape[0], ids))

    def _empty(self, shape: Shape) -> Array:
        return np.empty(shape, np.float32)

    def _native_threads(self) -> tuple[int, int]:
        return kernels.threads(), 0


def _blockwise_linear(rows: Array, weight: Array) -> Array:
    """Half-precision weights are widened a block at a time: the whole matrix in float32 never exists."""
    wide = rows.astype(np.float32)
    y = np.empty((len(rows), weight.shape[0]), np.float32)
    block = max(1, 2**18 // weight.shape[1])
    for first in range(0, weight.shape[0], block):
        np.matmul(wide, weight[first : first + block].astype(np.float32).T, out=y[:, first : first + block])
    return y.astype(rows.dtype)
