"""The interface that every framework implements, in one place.

A Backend object stands for one framework on one device. Model code receives it as `xp` and calls nothing else, apart
from the operators that all frameworks share: + - * / ** @ unary -, comparisons, & | ~ on booleans, and indexing with
static integers and slices.

Conventions: names and argument order are numpy's; `axis` counts as in numpy; dtypes are strings ("float32",
"bfloat16", "float16", "int32", "bool"); indices are int32; shapes are static, but see `shape`. Letters in shape
comments: B batch, T query time, S key time, D model width, H query heads, K key/value heads, N outputs, V vocabulary,
h head width.

A new backend is one file: it subclasses Backend, provides what is marked "each backend" and overrides a composite
where its framework has a faster one.
"""

import contextlib
import copy
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from modelhub.core.leaves import Packed, arrays_of
from modelhub.core.tree import bind
from modelhub.errors import ConfigError, DeviceError, MixedBackends

Array = Any
Shape = Sequence[int]
# Rows of x up to which integers are multiplied. It is the same on all processors, as x is rounded for it.
FEW_PACKED = 64
Parts = tuple[Array, Array | None, Array | None]  # of a matrix: values or codes; scales and minima of quantised ones
Matrix = tuple[int, Parts, int]  # the kernels' number of its kind, its parts, and how many outputs it has


class Backend:
    """One framework on one device; see the module docstring for conventions."""

    name: ClassVar[str]
    eager: ClassVar[bool]  # True where programs compiled with hot=False take any new shape at no cost
    traced: ClassVar[bool]  # True where those compiled with hot=None are made anew for each shape
    device: str  # "cpu", "gpu:0", "tpu:0", "mps:0"
    # (B,) int32, one per row, while training with dropout; or a function that draws them.
    dropout_keys: Array | Callable[[], Array] | None = None
    training: bool = False
    remat: bool = False
    own_attention: Callable | None = None  # the user's, in place of ours

    def __init__(self, device: str | None = "cpu"):
        """device None: wherever the framework puts what is new, in functions of the user's that it traces."""
        self.device = device or self.devices()[0]

    def __repr__(self) -> str:
        return f"<backend {self.name} on {self.device}>"

    # --- engine: each backend -------------------------------------------------------------------------------

    def put(self, array: np.ndarray) -> Array:
        """Take a numpy array over to the device. The caller gives it up: on CPU its memory is adopted, not copied."""
        raise NotImplementedError

    def get(self, x: Array) -> np.ndarray:
        """The values of an array, or of a packed leaf, as a numpy array that the caller may write to only after copying
        it."""
        return self._get(self.values(x))

    def _get(self, x: Array) -> np.ndarray:
        """What backends provide of `get`."""
        raise NotImplementedError

    def values(self, leaf: Any) -> Array:
        """The plain array that a leaf of params is, or stands for."""
        return leaf.values(self) if isinstance(leaf, Packed) else leaf

    def compile(
        self, fn: Callable, skeleton: Any = None, donate: Sequence[int] = (), hot: bool | None = True,
        training: bool = False, jit: bool | None = None,
    ) -> Callable:  # fmt: skip
        """A fast version of `fn`, whose arguments and results are (dicts of) arrays.

        With a skeleton, fn's first argument is a Module, and the result is called with a params dict in its place: the
        dict is what crosses the framework's boundary. A params dict is never changed in place, only replaced.
        Arguments at the positions in `donate` are consumed: their memory may be reused for the results.
        hot: True: it will run many times with the same shapes, so seconds of compilation pay; None: a second pays.
        training: it takes gradients (see `value_and_grad`), or its results will be differentiated by. jit: whether such
        a program is compiled by XLA or torch.compile; None: what is usual for the backend and device.
        """
        raise NotImplementedError

    def value_and_grad(self, fn: Callable[..., tuple[Array, Any]]) -> Callable:
        """From fn(variables, *args) -> (scalar, more results) to ((scalar, more results), gradients).

        variables and gradients are dicts of arrays; nothing else is differentiated by.
        """
        raise NotImplementedError

    def stop_gradient(self, x: Array) -> Array:
        """x as a constant for `value_and_grad`."""
        return x

    def copy(self, x: Array) -> Array:
        """The values in memory of their own."""
        raise NotImplementedError

    @staticmethod
    def check_whole(name: str, x: Array) -> None:
        """Raise InputError for an array, called `name`, of which this process has only a part."""

    def lend(self, x: Array) -> Any:
        """x as another backend's `adopt` gets it: an object with __dlpack__ over the memory of x, which is whole."""
        return x

    def adopt(self, x: Array, owner: "Backend") -> Array:
        """x, an array of the backend `owner`, as one of this backend on its device, in the same dtype.

        It shares the memory of x where both frameworks can, through DLPack; else it is a copy. Neither may then be
        written to, nor donated, before it is copied.
        """
        raise NotImplementedError

    def _beside(self, owner: "Backend") -> bool:
        """Whether arrays of both are in the same memory."""
        return self.device == owner.device

    def add_into(self, total: Array, new: Array) -> Array:
        """total + new. CONSUMES `total`: in place where arrays can be written to."""
        return total + new

    def for_training(
        self, dropout_keys: Array | Callable[[], Array] | None = None, remat: bool = False
    ) -> Self:  # fmt: skip
        """This backend as the forward pass of a training step gets it.

        dropout_keys (B,) int32: what `dropout` draws from, one number per row of the batch; None: no dropout. Or a
        function that draws them, called where something drops.
        remat: keep only the inputs of blocks for the backward pass, which computes the rest again.
        """
        changed = copy.copy(self)
        changed.training, changed.dropout_keys, changed.remat = True, dropout_keys, remat
        return changed

    def with_attention(self, fn: Callable) -> Self:
        """This backend with fn(q, k, v, mask, scale=scale) -> (B, H, T, h) in place of its own `attention`.

        Its arrays are those of `attention`. torch's F.scaled_dot_product_attention can be given as it is, for models
        with as many key heads as query heads.
        """
        changed = copy.copy(self)
        changed.own_attention = fn
        return changed

    def all_rows(self, x: Array) -> Array:
        """x (rows, ...), which belongs to the rows computed here, of all rows of the batch, in their order.

        Where the rows of a batch are computed in one place, that is x. Gradients go back to where the rows are.
        """
        return x

    def native_labels(self, x: Array) -> Array:
        """Labels, integers or shares of the classes, in the dtype that the framework's own losses take."""
        return x

    def native_optimizer(self, optimizer: Any) -> Any:
        """The framework's own optimizer with the methods of optim.Optimizer; None for what is none."""
        return None

    def block(self, fn: Any, *args: Any) -> Any:
        """fn(*args), fn a Module, one block of a model; with `remat` each backend sees to the recomputation.

        Gradients reach fn's own arrays and those among args, none that args hold inside.
        """
        raise NotImplementedError

    def loop(self, n: Array, body: Callable[[Array, Any], Any], state: Any) -> Any:
        """state = body(i, state) for i in 0 ... n - 1; n an int32 scalar array. Not differentiable."""
        for i in range(int(n)):
            state = body(i, state)
        return state

    def scan(self, body: Callable[[Any, Array, Any], tuple], state: Any, n: int, xs: Any = None) -> tuple[Any, Any]:
        """state, y = body(state, i, x) for i in 0 ... n - 1, with x = xs[i]; returns the last state and all y.

        xs and the ys are either None or what an earlier `scan` returned as its ys: opaque.
        """
        ys = []
        for i in range(n):
            state, y = body(state, i, None if xs is None else xs[i])
            ys.append(y)
        return state, ys

    def joined(self, ys: Any) -> Array:
        """The ys of a `scan` in one array, one after the other along their first axis."""
        return self.concat(ys, 0)

    @contextlib.contextmanager
    def matmul_precision(self, precision: str | None) -> Iterator[None]:
        """Inside: "highest" computes float32 products in float32, "high" in TF32 where the device has it.

        None leaves the framework's own setting alone.
        """
        yield

    def free_memory(self) -> int | None:
        """Bytes that are free on the device, None if unknown."""
        return host_memory() if self.device == "cpu" else None

    def peak_memory(self) -> int | None:
        """The most bytes that this process has had on the device, None if unknown."""
        return host_peak() if self.device == "cpu" else None

    @property
    def asynchronous(self) -> bool:
        """True where a call returns before its result is there, so that the host can work on ahead."""
        return self.device != "cpu"

    def expect(self, **arrays: Any) -> None:
        """Raise MixedBackends for an array, or a leaf of params, of another framework than this one."""
        for name, leaf in arrays.items():
            for array in arrays_of(leaf):
                if self.owns(array):
                    continue
                kind = type(array)
                raise MixedBackends(
                    f"{name} is a {kind.__module__}.{kind.__qualname__}, but the model is on {self.name}: "
                    f"pass an array of {self.name}, or plain numbers to the task's own methods"
                )

    @staticmethod
    def owns(x: object) -> bool:
        """True if `x` is an array of this framework."""
        raise NotImplementedError

    @staticmethod
    def device_of(x: Array) -> str | None:
        """The device that an array is on, as `device` names it; None: left to the framework."""
        raise NotImplementedError

    @classmethod
    def devices(cls) -> list[str]:
        """All devices that the framework sees, the best first."""
        raise NotImplementedError

    @classmethod
    def pick_device(cls, device: str | None) -> str:
        """Turn None, "gpu" or "gpu:1" into one of `devices()`."""
        seen = cls.devices()
        if device is None:
            return seen[0]
        wanted = device.replace("cuda", "gpu")
        for candidate in seen:
            if wanted == candidate or wanted == candidate.split(":")[0]:
                return candidate
        raise DeviceError(
            f"device {device!r} was asked for, but {cls.name} sees only: {', '.join(seen)}. "
            f"Pass one of these, or leave device out; `modelhub doctor` shows what each backend sees."
        )

    # --- creation and types: each backend -------------------------------------------------------------------

    def array(self, values: Any, dtype: str | None = None) -> Array:
        """A new array on the device from numbers, lists or numpy arrays; always a copy.

        dtype None: float32 for Python's and numpy's float64, int32 for int and int64, else what `values` has.
        """
        raise NotImplementedError

    def zeros(self, shape: Shape, dtype: str = "float32") -> Array:
        raise NotImplementedError

    def full(self, shape: Shape, value: float, dtype: str = "float32") -> Array:
        raise NotImplementedError

    def arange(self, n: int, dtype: str = "int32") -> Array:
        raise NotImplementedError

    def cast(self, x: Array, dtype: str) -> Array:
        raise NotImplementedError

    def dtype(self, x: Array) -> str:
        raise NotImplementedError

    # --- shape: each backend --------------------------------------------------------------------------------

    def shape(self, x: Array) -> tuple[Any, ...]:
        """Sizes as ints; in a TensorFlow graph traced for any size, int32 scalar tensors where it is not known."""
        return tuple(x.shape)

    def reshape(self, x: Array, shape: Shape) -> Array:
        raise NotImplementedError

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        raise NotImplementedError

    def concat(self, xs: Sequence[Array], axis: int = 0) -> Array:
        raise NotImplementedError

    def stack(self, xs: Sequence[Array], axis: int = 0) -> Array:
        raise NotImplementedError

    def split(self, x: Array, sections: int, axis: int = -1) -> list[Array]:
        """`sections` equal parts."""
        raise NotImplementedError

    def expand_dims(self, x: Array, axis: int) -> Array:
        raise NotImplementedError

    def broadcast_to(self, x: Array, shape: Shape) -> Array:
        raise NotImplementedError

    # --- selection: each backend ----------------------------------------------------------------------------

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        raise NotImplementedError

    def take(self, x: Array, indices: Array, axis: int = 0) -> Array:
        """Slices of `x` along `axis`; indices of any shape replace that axis."""
        raise NotImplementedError

    def take_along_axis(self, x: Array, indices: Array, axis: int) -> Array:
        raise NotImplementedError

    def update_slots(self, buffer: Array, new: Array, start: Array) -> Array:
        """buffer (B, K, S, h) with new (B, K, T, h) written to slots start[b] ... start[b] + T - 1. CONSUMES `buffer`.

        start: (B,) int32 with start + T <= S. In place on numpy and torch; XLA reuses donated memory.
        """
        raise NotImplementedError

    def slice_rows(self, x: Array, start: Array, size: int) -> Array:
        """x[start : start + size], start an int or an int32 scalar array; all of it must be inside."""
        return x[start : start + size]

    def add_rows(self, x: Array, indices: Array, new: Array) -> Array:
        """x (N, D) with new (M, D) added to its rows at indices (M,), also where they repeat. CONSUMES `x`."""
        raise NotImplementedError

    def one_of_equals(self, ids: Array, size: int) -> Array:
        """For each of ids (N,), from 0 to size - 1, the index of an id that equals it, the same for all equal ones."""
        raise NotImplementedError

    # --- elementwise: each backend --------------------------------------------------------------------------

    def exp(self, x: Array) -> Array:
        raise NotImplementedError

    def log(self, x: Array) -> Array:
        raise NotImplementedError

    def sqrt(self, x: Array) -> Array:
        raise NotImplementedError

    def rsqrt(self, x: Array) -> Array:
        raise NotImplementedError

    def sin(self, x: Array) -> Array:
        raise NotImplementedError

    def cos(self, x: Array) -> Array:
        raise NotImplementedError

    def tanh(self, x: Array) -> Array:
        raise NotImplementedError

    def sigmoid(self, x: Array) -> Array:
        raise NotImplementedError

    def erf(self, x: Array) -> Array:
        raise NotImplementedError

    def abs(self, x: Array) -> Array:
        raise NotImplementedError

    def maximum(self, x: Array, y: Array | float) -> Array:
        raise NotImplementedError

    def minimum(self, x: Array, y: Array | float) -> Array:
        raise NotImplementedError

    # --- reductions and products: each backend --------------------------------------------------------------

    def sum(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        """In the dtype of x; 16 bits are summed in float32, here and in `mean` and `cumsum`."""
        raise NotImplementedError

    def mean(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        raise NotImplementedError

    def max(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        raise NotImplementedError

    def min(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        raise NotImplementedError

    def any(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        raise NotImplementedError

    def all(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        raise NotImplementedError

    def argmax(self, x: Array, axis: int = -1) -> Array:
        """int32 index of the first maximum."""
        raise NotImplementedError

    def cumsum(self, x: Array, axis: int = -1) -> Array:
        raise NotImplementedError

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        """The k largest values along the last axis, in falling order, and their int32 indices; ties in any order."""
        raise NotImplementedError

    def matmul(self, x: Array, y: Array) -> Array:
        raise NotImplementedError

    def einsum(self, equation: str, *operands: Array) -> Array:
        raise NotImplementedError

    # --- composites: written once here, overridden where a framework has a faster one -----------------------

    def plus(self, x: Array, shared: Array) -> Array:
        """x (..., N) + shared, a parameter of fewer dimensions, whose gradient is summed in float32 in any dtype."""
        return self.cast(self.cast(x, "float32") + self.cast(shared, "float32"), self.dtype(x))

    def times(self, x: Array, shared: Array) -> Array:
        """x (..., N) * shared; see `plus`."""
        return self.cast(self.cast(x, "float32") * self.cast(shared, "float32"), self.dtype(x))

    def linear(self, x: Array, weight: Any, bias: Array | None = None) -> Array:
        """x (..., D) times weight (N, D), an array or a packed leaf, transposed, plus bias (N,): (..., N)."""
        return weight.linear(self, x, bias) if isinstance(weight, Packed) else self._linear(x, weight, bias)

    def linears(self, x: Array, layers: Sequence[tuple[Any, Array | None]]) -> list[Array]:
        """`linear` of the same x with each (weight, bias): in one native call where all are quantised."""
        weights = tuple(weight for weight, _ in layers)
        joins = all(isinstance(weight, Packed) and weight.joins for weight in weights)
        if not joins or len({weight.shape[1:] for weight in weights}) > 1:
            return [self.linear(x, *layer) for layer in layers]
        ys = self._packed_linears(x, weights)
        return [y if bias is None else self.plus(y, bias) for y, (_, bias) in zip(ys, layers, strict=True)]

    def _linear(self, x: Array, weight: Array, bias: Array | None) -> Array:
        """What backends override of `linear`."""
        y = self.matmul(x, self.transpose(weight, (1, 0)))
        return y if bias is None else self.plus(y, bias)

    def embedding(self, weight: Any, ids: Array) -> Array:
        """Rows of weight (V, D), an array or a packed leaf, at ids (...): (..., D).

        The gradient of an array's row is summed in float32 in any dtype.
        """
        if isinstance(weight, Packed):
            return weight.embedding(self, ids)
        dtype = self.dtype(weight)
        if not self.training or dtype == "float32":
            return self.take(weight, ids, axis=0)
        # Every framework adds up the gradients of equal ids in the dtype of the table: in bfloat16 a word that comes
        # 4096 times counts as if it came 256 times. Here equal ids take the same row of a float32 copy of their rows,
        # which is a copy of the table's at one of them: the others bring nothing to the table.
        width, flat = weight.shape[-1], self.reshape(ids, (-1,))
        # (TensorFlow leaves the gradients of rows apart as far back as the reshape, which must not be in 16 bits.)
        rows = self.reshape(self.cast(self.take(weight, ids, axis=0), "float32"), (-1, width))
        rows = self.take(rows, self.one_of_equals(flat, weight.shape[0]), axis=0)
        return self.reshape(self.cast(rows, dtype), (*self.shape(ids), width))

    def weight_rows(self, weight: Any, start: Array, size: int) -> Array:
        """As `slice_rows`, of a matrix that is an array or a packed leaf: a plain array."""
        return weight.rows(self, start, size) if isinstance(weight, Packed) else self.slice_rows(weight, start, size)

    def matrix(self, weights: Any, index: Array) -> Any:
        """Number `index` of a stack of matrices (E, N, D), an array or a packed leaf, as experts have: the same (N, D).

        index: an int or an int32 scalar array.
        """
        if isinstance(weights, Packed):
            return weights.matrix(self, index)
        return self.reshape(self.slice_rows(weights, index, 1), weights.shape[1:])

    # --- quantised weights: leaves of modelhub.core.quantized -----------------------------------------------

    def kernels(self) -> Any:
        """The library of native products (modelhub.core.kernels), None where it cannot be used."""
        return None

    def kernel_linears(self, x: Array, matrices: Sequence[Matrix]) -> tuple[Array, ...]:
        """x (R, K) float32 times each of some matrices, transposed: (R, outputs). For backends that have `kernels`."""
        raise NotImplementedError

    def kernel_rows(self, leaf: Any, start: Array, size: int) -> Array:
        """Rows of a quantised matrix as float32 (size, K). For backends that have `kernels`."""
        raise NotImplementedError

    def kernel_take(self, leaf: Any, ids: Array) -> Array:
        """Those at ids (...) as float32 (..., K). For backends that have `kernels`."""
        raise NotImplementedError

    def without_gradient(self, product: Callable, back: Callable, x: Array, leaves: tuple) -> tuple[Array, ...]:
        """product(x, leaves), a tuple, whose gradient by x is back(gradients, leaves) and by the leaves nothing.

        Each backend that trains: what `product` widens is not kept for the backward pass.
        """
        return product(x, leaves)

    def packed_rows(self, leaf: Any, start: Array, size: int) -> Array:
        """Rows start ... start + size - 1 of a quantised matrix, float32; start an int or an int32 scalar array."""
        return leaf.plain_window(self, start, size) if self.kernels() is None else self.kernel_rows(leaf, start, size)

    def packed_take(self, leaf: Any, ids: Array) -> Array:
        """Rows of a quantised matrix at ids (...), float32 (..., K)."""
        return leaf.plain_take(self, ids) if self.kernels() is None else self.kernel_take(leaf, ids)

    def packed_linear(self, x: Array, leaf: Any) -> Array:
        """x (..., K) times a quantised matrix (N, K), transposed: (..., N) in the dtype of x.

        With few rows integers are multiplied, and x is rounded to 8 bits; else the matrix is widened by blocks.
        """
        (y,) = self._packed_linears(x, (leaf,))
        return y

    def _packed_linears(self, x: Array, leaves: tuple) -> Sequence[Array]:
        """`packed_linear` of several matrices."""
        *shape, _ = self.shape(x)
        product = self._integer_products if self._are_few(x) else self._widened_products
        flat = self.reshape(x, (-1, leaves[0].shape[1]))
        ys = self.without_gradient(product, self._widened_back, flat, leaves)
        return [self.reshape(y, (*shape, leaf.shape[0])) for y, leaf in zip(ys, leaves, strict=True)]

    def _are_few(self, x: Array) -> bool:
        """Whether quantised matrices are multiplied by the rows of x (..., K) as integers."""
        if self.training or self.kernels() is None:
            return False
        rows = math.prod(self.shape(x)[:-1])
        return isinstance(rows, int) and rows <= FEW_PACKED

    def _integer_products(self, x: Array, leaves: tuple) -> tuple[Array, ...]:
        ys = self.kernel_linears(self.cast(x, "float32"), [(leaf.kind, leaf.parts, leaf.shape[0]) for leaf in leaves])
        return tuple(self.cast(y, self.dtype(x)) for y in ys)

    def _widened_products(self, x: Array, leaves: tuple) -> tuple[Array, ...]:
        """x (R, K) times the matrices, a block of their rows after the other: in floats they never exist as a whole."""
        dtype = self.dtype(x)

        def product(leaf: Any) -> Array:
            return self.concat(
                [self._linear(x, self.cast(self.packed_rows(leaf, *block), dtype), None) for block in _blocks(leaf)], -1
            )

        return tuple(map(product, leaves))

    def _widened_back(self, gradients: Sequence[Array], leaves: tuple) -> Array:
        """The sum of gradients (R, N) times the matrices: (R, K), in the same way; summed in float32."""
        dtype = self.dtype(gradients[0])
        total = None
        for gradient, leaf in zip(gradients, leaves, strict=True):
            for start, size in _blocks(leaf):
                rows = self.cast(self.packed_rows(leaf, start, size), dtype)
                part = self.cast(self.matmul(gradient[:, start : start + size], rows), "float32")
                total = part if total is None else total + part
        return self.cast(total, dtype)

    def logsumexp(self, x: Array, axis: int = -1, keepdims: bool = False) -> Array:
        peak = self.max(x, axis=axis, keepdims=True)
        total = self.log(self.sum(self.exp(x - peak), axis=axis, keepdims=True)) + peak
        return total if keepdims else self.max(total, axis=axis)

    def softmax(self, x: Array, axis: int = -1) -> Array:
        """Computed in float32, returned in the dtype of x. Rows of -inf give NaN: mask with a large finite number."""
        dtype = self.dtype(x)
        x = self.cast(x, "float32")
        e = self.exp(x - self.max(x, axis=axis, keepdims=True))
        return self.cast(e / self.sum(e, axis=axis, keepdims=True), dtype)

    def log_softmax(self, x: Array, axis: int = -1) -> Array:
        """Computed and returned in float32."""
        x = self.cast(x, "float32")
        x = x - self.max(x, axis=axis, keepdims=True)  # first: large logits would swallow the digits of the logarithm
        return x - self.log(self.sum(self.exp(x), axis=axis, keepdims=True))

    def silu(self, x: Array) -> Array:
        """x * sigmoid(x) (Elfwing et al. 2017, arXiv:1702.03118)."""
        return x * self.sigmoid(x)

    def gelu(self, x: Array, approximate: bool = False) -> Array:
        """Gaussian error linear unit (Hendrycks and Gimpel 2016, arXiv:1606.08415); `approximate`: its tanh form."""
        if approximate:
            return 0.5 * x * (1.0 + self.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
        return 0.5 * x * (1.0 + self.erf(x * 0.7071067811865476))

    def rms_norm(self, x: Array, weight: Array, eps: float, offset: float = 0.0) -> Array:
        """x / rms(x) * (offset + weight) over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467).

        In float32 throughout, then cast to the dtype of x. Gemma stores its weights around 0: offset=1.
        """
        dtype = self.dtype(x)
        x = self.cast(x, "float32")
        x = x * self.rsqrt(self.mean(x * x, axis=-1, keepdims=True) + eps)
        scale = self.cast(weight, "float32")
        return self.cast(x * (scale + offset if offset else scale), dtype)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """Ba et al. 2016, arXiv:1607.06450, over the last axis; in float32, then cast to the dtype of x."""
        dtype = self.dtype(x)
        x = self.cast(x, "float32")
        x = x - self.mean(x, axis=-1, keepdims=True)
        x = x * self.rsqrt(self.mean(x * x, axis=-1, keepdims=True) + eps)
        return self.cast(x * self.cast(weight, "float32") + self.cast(bias, "float32"), dtype)

    def rotate(self, x: Array, cos: Array, sin: Array) -> Array:
        """Rotary position embedding of x (..., h), halves rotated as in GPT-NeoX; cos and sin (..., h / 2).

        Su et al. 2021, arXiv:2104.09864.
        """
        left, right = self.split(x, 2, axis=-1)
        return self.concat([left * cos - right * sin, right * cos + left * sin], axis=-1)

    def dropout(self, x: Array, rate: float, salt: int) -> Array:
        """x (B, ...) with a share of its values 0 and the others scaled up; x itself when not training.

        Which ones is decided by `dropout_keys` and `salt` alone, alike on every backend: a counter through the
        finalizer of MurmurHash3 (Appleby, public domain).
        """
        if not rate or self.dropout_keys is None:
            return x
        shape = batch, *rest = self.shape(x)
        count = math.prod(rest)
        keys = self.dropout_keys() if callable(self.dropout_keys) else self.dropout_keys
        keys = self.reshape(keys, (batch, 1))
        bits = _mixed(_mixed(keys ^ salt) + self.reshape(self.arange(count), (1, count)))
        kept = (bits & 0xFFFFFF) >= int(rate * 2**24)
        return self.where(self.reshape(kept, shape), x * (1.0 / (1.0 - rate)), x * 0.0)

    def attention(
        self, q: Array, k: Array, v: Array, mask: Array | None = None, scale: float = 1.0, softcap: float | None = None,
        dropout: float = 0.0, salt: int = 0,
    ) -> Array:  # fmt: skip
        """Scaled dot-product attention with grouped queries (Vaswani et al. 2017; Ainslie et al. 2023).

        q (B, H, T, h), k and v (B, K, S, h) with H a multiple of K; mask (B or 1, 1, T, S), True where a query may
        look; softcap c turns scores s into c * tanh(s / c) (Gemma 2). Scores and softmax in float32.
        dropout, salt: of the attention's weights, as in `dropout`.
        Returns (B, H, T, h) in the dtype of q. Raises ConfigError for what the function of `with_attention` cannot do.
        """
        dropout = dropout if self.dropout_keys is not None else 0.0
        if self.own_attention is None:
            return self._attention(q, k, v, mask, scale, softcap, dropout, salt)
        if softcap:
            raise ConfigError(
                f"this model caps its attention scores at {softcap}, which a function given as attention= is not told: "
                "its scores would be others. Leave attention out for this model"
            )
        if dropout:
            raise ConfigError(
                f"this model drops {dropout:g} of its attention weights while training, which a function given as "
                "attention= does not show. Set attention_probs_dropout_prob to 0, or leave attention out"
            )
        return self.own_attention(q, k, v, mask, scale=scale)

    def _attention(
        self, q: Array, k: Array, v: Array, mask: Array | None, scale: float, softcap: float | None, dropout: float,
        salt: int,
    ) -> Array:  # fmt: skip
        """What backends override of `attention`; dropout is 0 when there is none to do."""
        batch, heads, time, width = self.shape(q)
        kv_heads, length = self.shape(k)[1:3]
        group = heads // kv_heads
        # The queries that share a key head lie side by side, so no key or value is ever repeated in memory.
        q = self.reshape(q, (batch, kv_heads, group * time, width))
        scores = self.cast(self.matmul(q, self.transpose(k, (0, 1, 3, 2))), "float32") * scale
        if softcap:
            scores = self.tanh(scores / softcap) * softcap
        if mask is not None:
            scores = self.reshape(scores, (batch, kv_heads, group, time, length))
            scores = self.where(self.expand_dims(mask, 2), scores, -1e30)
            scores = self.reshape(scores, (batch, kv_heads, group * time, length))
        weights = self.dropout(self.cast(self.softmax(scores), self.dtype(q)), dropout, salt)
        return self.reshape(self.matmul(weights, v), (batch, heads, time, width))


def _blocks(leaf: Any) -> list[tuple[int, int]]:
    """(first row, rows) of blocks of a quantised matrix, of some 8 MB in float32 each."""
    outputs, width = leaf.shape
    size = max(16, (1 << 21) // width // 16 * 16)
    return [(start, min(size, outputs - start)) for start in range(0, outputs, size)]


def _mixed(x: Array) -> Array:
    """MurmurHash3's finalizer on int32, whose overflow wraps on every backend."""
    for shift, factor in ((16, -2048144789), (13, -1028477387), (16, 1)):
        # An arithmetic shift by division, without the sign bits that it drags in.
        x = (x ^ ((x // 2**shift) & (2 ** (32 - shift) - 1))) * factor
    return x


def host_memory() -> int | None:
    """Bytes of main memory that this process can still have: what is free, within its own limit."""
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        with open("/proc/self/statm") as sizes:
            taken = int(sizes.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, StopIteration):
        return None
    import resource  # Linux has it

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return free if limit == resource.RLIM_INFINITY else min(free, max(0, limit - taken))


def host_peak() -> int | None:
    """The most bytes of main memory that this process has had."""
    try:
        with open("/proc/self/status") as lines:  # getrusage begins with what the parent had
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def of_arrays(xp: Backend, args: Sequence[Any]) -> tuple[list[Array], Callable[..., list[Any]]]:
    """The arrays among args, and how others in their place make args again."""

    def args_with(*arrays: Array) -> list[Any]:
        given = iter(arrays)
        return [next(given) if xp.owns(arg) else arg for arg in args]

    return [arg for arg in args if xp.owns(arg)], args_with


def host_copy(values: Any, dtype: np.dtype | None) -> np.ndarray:
    """A new numpy array; without a dtype 64-bit numbers become 32-bit, the widest that all frameworks agree on."""
    array = np.array(values, dtype=dtype)
    if dtype is None and array.dtype in (np.float64, np.int64):
        return array.astype(np.float32 if array.dtype == np.float64 else np.int32)
    return array


def bound(fn: Callable, skeleton: Any) -> Callable:
    """`fn` with its Module argument bound from a params dict at every call: while tracing, that is."""
    if skeleton is None:
        return fn
    return lambda params, *args: fn(bind(skeleton, params), *args)


def bound_once(fn: Callable, skeleton: Any) -> Callable:
    """As `bound`, for eager backends: the Module is kept for as long as the same params dict comes."""
    if skeleton is None:
        return fn
    params_seen: Any = None
    module: Any = None

    def call(params: Any, *args: Any) -> Any:
        nonlocal params_seen, module
        if params is not params_seen:
            params_seen, module = params, bind(skeleton, params)
        return fn(module, *args)

    return call
