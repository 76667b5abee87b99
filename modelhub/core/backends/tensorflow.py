"""TensorFlow: one XLA program for what runs often enough to pay for its compilation; the rest eagerly."""

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Without growth TensorFlow takes the whole GPU from the other frameworks; read when it first touches the device.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

import numpy as np

from modelhub.core import kernels
from modelhub.core.backends.base import Array, Backend, Matrix, Shape, bound, bound_once, host_copy, of_arrays
from modelhub.core.tree import bind, flatten


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """TensorFlow's start-up notices go straight to file descriptor 2, whatever TF_CPP_MIN_LOG_LEVEL says.

    Who wants to see them imports tensorflow first. Exceptions are not affected.
    """
    if "tensorflow" in sys.modules:
        yield
        return
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # JAX sets 1 for its own needs
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # obeyed once it is running
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


with _silence():
    import tensorflow as tf

    tf.config.list_physical_devices()


def _capturing(fn: Callable, skeleton: Any) -> Callable:
    """One program per params dict, which holds on to its weights.

    As arguments, hundreds of weights cost 2.4 ms of Python in every call (docs/decisions.md). TensorFlow passes what a
    program captures by reference: the weights are neither copied nor made constants.
    """
    params_seen: Any = None
    program: Any = None

    def call(params: Any, *args: Any) -> Any:
        nonlocal params_seen, program
        if params is not params_seen:
            module = bind(skeleton, params)
            params_seen = params
            program = tf.function(lambda *args: fn(module, *args), jit_compile=True, autograph=False)
        return program(*args)

    return call


class _Fused:
    """A composite as one XLA program each for its value and its gradient, which computes all but the arguments again.

    Outside of XLA every elementwise operation keeps its result for the backward pass: 100 MB per layer of Gemma 3 270M
    at 512 tokens, against 35 (docs/decisions.md).
    """

    def __init__(self, fn: Callable):
        def pull_back(args: tuple, upstream: Array) -> tuple:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                wanted = [arg for arg in args if arg.dtype.is_floating]
                tape.watch(wanted)
                value = fn(*args)
            found = iter(tape.gradient(value, wanted, upstream, unconnected_gradients=tf.UnconnectedGradients.ZERO))
            return tuple(next(found) if arg.dtype.is_floating else None for arg in args)

        forward = tf.function(fn, jit_compile=True, autograph=False)
        backward = tf.function(pull_back, jit_compile=True, autograph=False)

        @tf.custom_gradient
        def run(*args: Array) -> tuple[Array, Callable]:
            return forward(*args), lambda upstream: backward(args, upstream)

        self._run = run

    def __call__(self, *args: Array) -> Array:
        return self._run(*args)


@functools.cache
def _fused(name: str, *options: Any) -> _Fused:
    """Backend.`name` with its options bound, as a function of arrays."""
    plain = TensorflowBackend()
    method = getattr(Backend, name)
    return _Fused(lambda *arrays: method(plain, *arrays, *options))


# --- native products (modelhub.core.kernels), as custom calls of XLA's ---

_REGISTRY = "_ZN3xla24CustomCallTargetRegistry"  # xla::CustomCallTargetRegistry, as its C++ compiler spells it
_TEXT = "RKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"  # const std::string&


class _StdString(ctypes.Structure):
    """libstdc++'s std::string, whose text is somewhere else."""

    _fields_ = (("text", ctypes.c_char_p), ("size", ctypes.c_size_t), ("room", ctypes.c_char * 16))

    @classmethod
    def of(cls, text: bytes) -> Any:
        return ctypes.byref(cls(text, len(text)))


@functools.cache
def _library() -> Any:
    """The native products, made known to TensorFlow's XLA; None where there are none, or it has no place for them.

    TensorFlow has no Python function for that; the registry's own functions, in its library, are called. Where they are
    named otherwise, as on other systems, XLA's own products are used.
    """
    if (found := kernels.library()) is None:
        return None
    try:
        from tensorflow.compiler.tf2xla.ops import gen_xla_ops

        in_xla = ctypes.CDLL(os.path.join(os.path.dirname(tf.__file__), "libtensorflow_cc.so.2"))
        registry = getattr(in_xla, f"{_REGISTRY}6GlobalEv")
        register = getattr(in_xla, f"{_REGISTRY}8RegisterE{_TEXT}PvS8_")
        assert gen_xla_ops.xla_custom_call_v2
    except (ImportError, AttributeError, OSError):
        return None
    registry.restype = ctypes.c_void_p
    register(ctypes.c_void_p(registry()), _StdString.of(b"modelhub"), ctypes.c_void_p(found.TF_CALL),
             _StdString.of(b"Host"))  # fmt: skip
    return found


@functools.lru_cache(4096)
def _native(what: str, kind: int, rows: int, outputs: int, width: int, shape: tuple[int, ...]) -> Callable:
    """A native product as a program of XLA's, which may be a part of another; see kernels/src/tf.c."""
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    def run(*args: Array) -> Array:
        return gen_xla_ops.xla_custom_call_v2(
            operands=args, call_target_name="modelhub", backend_config=f"{what} {kind} {rows} {outputs} {width}",
            has_side_effect=False, result_dtypes=[tf.float32], result_shapes=[tf.TensorShape(shape)],
        )[0]  # fmt: skip

    program = tf.function(run, jit_compile=True, autograph=False)
    # A tape that watches an argument would look for the gradient of what is inside.
    return lambda *args: program(*map(tf.stop_gradient, args))


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy, aligned as the kernels count on. tf.constant would make two."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    first = -memory.ctypes.data % 64
    copy = memory[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _wide(fn: Callable, x: Array, *args: Any) -> Array:
    """fn(x, *args), for float16 in float32: of float16 TensorFlow takes sums, those of gradients too, in 16 bits."""
    return tf.cast(fn(tf.cast(x, tf.float32), *args), tf.float16) if x.dtype == tf.float16 else fn(x, *args)


class TensorflowBackend(Backend):
    name = "tensorflow"
    eager = True
    traced = True

    def __init__(self, device: str | None = "cpu"):
        super().__init__(device)
        self._device = "/" + device.upper() + (":0" if ":" not in device else "") if device else ""

    @classmethod
    def devices(cls) -> list[str]:
        found = [f"gpu:{i}" for i in range(len(tf.config.list_physical_devices("GPU")))]
        return found + ["cpu"]

    @staticmethod
    def owns(x: object) -> bool:
        return isinstance(x, (tf.Tensor, tf.Variable))

    @staticmethod
    def device_of(x: Array) -> str | None:
        device = tf.DeviceSpec.from_string(x.device) if tf.executing_eagerly() else None
        if device is None or device.device_type not in ("CPU", "GPU"):
            return None
        return "cpu" if device.device_type == "CPU" else f"gpu:{device.device_index}"

    def put(self, array: np.ndarray) -> Array:
        adoptable = array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % 64 == 0
        if self.device == "cpu" and array.size and adoptable:
            if array.dtype.name != "bfloat16":  # DLPack of numpy has none
                return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
            return tf.bitcast(tf.experimental.dlpack.from_dlpack(array.view(np.int16).__dlpack__()), tf.bfloat16)
        with tf.device(self._device):
            return tf.constant(array)

    def _get(self, x: Array) -> np.ndarray:
        if self.device != "cpu" or isinstance(x, tf.Variable) or x.dtype == tf.string:
            return np.asarray(x.numpy())  # a scalar comes as a number
        if x.dtype != tf.bfloat16:
            return np.from_dlpack(x)  # numpy() would copy
        return np.from_dlpack(tf.bitcast(x, tf.int16)).view(tf.bfloat16.as_numpy_dtype)

    def compile(
        self, fn: Callable, skeleton: Any = None, donate: Sequence[int] = (), hot: bool | None = True,
        training: bool = False, jit: bool | None = None,
    ) -> Callable:  # fmt: skip
        if training:
            # On CPU the products of TensorFlow's own kernels are faster than XLA's (docs/decisions.md).
            return tf.function(
                bound(fn, skeleton), jit_compile=self.device != "cpu" if jit is None else jit, autograph=False
            )
        if hot is None:
            return tf.function(bound(fn, skeleton), autograph=False)
        if hot and skeleton is None:
            return tf.function(fn, jit_compile=True, autograph=False)
        if hot:
            return _capturing(fn, skeleton)
        # XLA takes 3 s to compile what runs eagerly in 0.2 s (docs/decisions.md).
        return bound_once(fn, skeleton)

    def value_and_grad(self, fn: Callable[..., tuple[Array, Any]]) -> Callable:
        def run(variables: dict[str, Array], *args: Any) -> tuple[tuple[Array, Any], dict[str, Array]]:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(variables)
                value, more = fn(variables, *args)
            found = tape.gradient(value, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
            return (value, more), {name: tf.convert_to_tensor(gradient) for name, gradient in found.items()}

        return run

    def stop_gradient(self, x: Array) -> Array:
        return tf.stop_gradient(x)

    def copy(self, x: Array) -> Array:
        return tf.raw_ops.DeepCopy(x=x)  # tf.identity shares the memory

    def lend(self, x: Array) -> Any:
        return tf.convert_to_tensor(x)

    def adopt(self, x: Array, owner: Backend) -> Array:
        with tf.device(self._device):
            if owner.name == self.name:
                return tf.identity(x)
            if self._beside(owner):
                dtype = tf.dtypes.as_dtype(owner.dtype(x))
                found = tf.experimental.dlpack.from_dlpack(owner.lend(x).__dlpack__())
                found = found if found.dtype == dtype else tf.bitcast(found, dtype)
                if self.device != "cpu" or self.get(found).ctypes.data % 64 == 0:
                    return tf.identity(found)
            return self.put(_aligned(owner.get(x)))

    def block(self, fn: Any, *args: Any) -> Any:
        if not self.remat:
            return fn(*args)
        # recompute_grad has no gradients for what a function closes over: the block's own arrays are arguments too.
        weights = flatten(fn)
        arrays, args_with = of_arrays(self, args)

        def run(*given: Array) -> Any:
            block: Any = bind(fn, dict(zip(weights, given, strict=False)))
            return block(*args_with(*given[len(weights) :]))

        return tf.recompute_grad(run)(*weights.values(), *arrays)

    def loop(self, n: Array, body: Callable[[Array, Any], Any], state: Any) -> Any:
        # One after the other: run ahead, the iterations would all hold their arrays at once.
        return tf.while_loop(
            lambda i, _: i < n, lambda i, state: (i + 1, body(i, state)), (0, state), parallel_iterations=1
        )[1]

    def scan(self, body: Callable[[Any, Array, Any], tuple], state: Any, n: int, xs: Any = None) -> tuple[Any, Any]:
        state, first = body(state, 0, None if xs is None else xs.read(0))  # shows what the ys are
        if first is None:
            ys: Any = tf.zeros(())
        else:
            ys = tf.TensorArray(first.dtype, n, element_shape=first.shape, clear_after_read=False).write(0, first)

        def step(i: Array, state: Any, ys: Any) -> tuple[Array, Any, Any]:
            state, y = body(state, i, None if xs is None else xs.read(i))
            return i + 1, state, ys if first is None else ys.write(i, y)

        _, state, ys = tf.while_loop(lambda i, *_: i < n, step, (1, state, ys), parallel_iterations=1)
        return state, None if first is None else ys

    def joined(self, ys: Any) -> Array:
        return ys.concat()

    @contextlib.contextmanager
    def matmul_precision(self, precision: str | None) -> Iterator[None]:
        before = tf.config.experimental.tensor_float_32_execution_enabled()
        tf.config.experimental.enable_tensor_float_32_execution(before if precision is None else precision == "high")
        try:
            yield
        finally:
            tf.config.experimental.enable_tensor_float_32_execution(before)

    def peak_memory(self) -> int | None:
        if self.device == "cpu":
            return super().peak_memory()
        return tf.config.experimental.get_memory_info(self.device.upper())["peak"]

    def array(self, values: Any, dtype: str | None = None) -> Array:
        values = host_copy(values, tf.dtypes.as_dtype(dtype).as_numpy_dtype if dtype else None)
        with tf.device(self._device):
            return tf.constant(values)

    def zeros(self, shape: Shape, dtype: str = "float32") -> Array:
        with tf.device(self._device):
            return tf.zeros(tuple(shape), dtype)

    def full(self, shape: Shape, value: float, dtype: str = "float32") -> Array:
        with tf.device(self._device):
            return tf.fill(tuple(shape), tf.constant(value, dtype))

    def arange(self, n: int, dtype: str = "int32") -> Array:
        return tf.range(n, dtype=dtype)

    def cast(self, x: Array, dtype: str) -> Array:
        return tf.cast(x, dtype)

    def dtype(self, x: Array) -> str:
        return x.dtype.name

    def shape(self, x: Array) -> tuple[Any, ...]:
        if x.shape.is_fully_defined():
            return tuple(x.shape)
        sizes = tf.shape(x)
        return tuple(sizes[axis] if size is None else size for axis, size in enumerate(x.shape))

    def reshape(self, x: Array, shape: Shape) -> Array:
        return tf.reshape(x, tuple(shape))

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        return tf.transpose(x, [axis % len(axes) for axis in axes])  # XLA knows no negative axes

    def concat(self, xs: Sequence[Array], axis: int = 0) -> Array:
        return tf.concat(xs, axis)

    def stack(self, xs: Sequence[Array], axis: int = 0) -> Array:
        return tf.stack(xs, axis)

    def split(self, x: Array, sections: int, axis: int = -1) -> list[Array]:
        return tf.split(x, sections, axis)

    def expand_dims(self, x: Array, axis: int) -> Array:
        return tf.expand_dims(x, axis)

    def broadcast_to(self, x: Array, shape: Shape) -> Array:
        return _wide(tf.broadcast_to, x, tuple(shape))

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return tf.where(condition, x, y)

    def take(self, x: Array, indices: Array, axis: int = 0) -> Array:
        return tf.gather(x, indices, axis=axis)

    def take_along_axis(self, x: Array, indices: Array, axis: int) -> Array:
        # tf.gather wants the axis last when all others are batch dimensions.
        order = [*range(len(x.shape))]
        order.append(order.pop(axis))
        back = sorted(range(len(order)), key=order.__getitem__)
        picked = tf.gather(tf.transpose(x, order), tf.transpose(indices, order), batch_dims=len(order) - 1)
        return tf.transpose(picked, back)

    def update_slots(self, buffer: Array, new: Array, start: Array) -> Array:
        time, length = self.shape(new)[2], self.shape(buffer)[2]
        # A gather and a select: XLA fuses them into one pass over the buffer, where a scatter runs slot by slot.
        offset = tf.range(length)[None, :] - start[:, None]
        inside = (offset >= 0) & (offset < time)
        if new.shape[2] != 1:
            new = tf.gather(new, tf.clip_by_value(offset, 0, time - 1), axis=2, batch_dims=1)
        return tf.where(inside[:, None, :, None], new, buffer)

    def slice_rows(self, x: Array, start: Array, size: int) -> Array:
        if isinstance(start, int):
            return x[start : start + size]
        begin = tf.concat([tf.reshape(start, (1,)), tf.zeros((len(x.shape) - 1,), tf.int32)], 0)
        return tf.ensure_shape(tf.slice(x, begin, (size, *x.shape[1:])), (size, *x.shape[1:]))

    def add_rows(self, x: Array, indices: Array, new: Array) -> Array:
        return tf.tensor_scatter_nd_add(x, indices[:, None], new)

    def one_of_equals(self, ids: Array, size: int) -> Array:
        table = tf.tensor_scatter_nd_update(tf.zeros((size,), tf.int32), ids[:, None], tf.range(tf.shape(ids)[0]))
        return tf.gather(table, ids)

    def exp(self, x: Array) -> Array:
        return tf.exp(x)

    def log(self, x: Array) -> Array:
        return tf.math.log(x)

    def sqrt(self, x: Array) -> Array:
        return tf.sqrt(x)

    def rsqrt(self, x: Array) -> Array:
        return tf.math.rsqrt(x)

    def sin(self, x: Array) -> Array:
        return tf.sin(x)

    def cos(self, x: Array) -> Array:
        return tf.cos(x)

    def tanh(self, x: Array) -> Array:
        return tf.tanh(x)

    def sigmoid(self, x: Array) -> Array:
        return tf.sigmoid(x)

    def erf(self, x: Array) -> Array:
        return tf.math.erf(x)

    def abs(self, x: Array) -> Array:
        return tf.abs(x)

    def maximum(self, x: Array, y: Array | float) -> Array:
        return tf.maximum(x, y)

    def minimum(self, x: Array, y: Array | float) -> Array:
        return tf.minimum(x, y)

    def sum(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return _wide(tf.reduce_sum, x, axis, keepdims)

    def mean(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return _wide(tf.reduce_mean, x, axis, keepdims)

    def max(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return tf.reduce_max(x, axis, keepdims)

    def min(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return tf.reduce_min(x, axis, keepdims)

    def any(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return tf.reduce_any(x, axis, keepdims)

    def all(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return tf.reduce_all(x, axis, keepdims)

    def argmax(self, x: Array, axis: int = -1) -> Array:
        return tf.argmax(x, axis, output_type=tf.int32)

    def cumsum(self, x: Array, axis: int = -1) -> Array:
        if not x.dtype.is_floating:
            return tf.cumsum(x, axis)
        # Eager sums run one after the other: in float32, 262,144 probabilities drift by 4e-4.
        return tf.cast(tf.cumsum(tf.cast(x, tf.float64), axis), x.dtype)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        return tuple(tf.math.top_k(x, k))

    def matmul(self, x: Array, y: Array) -> Array:
        return tf.matmul(x, y)

    def einsum(self, equation: str, *operands: Array) -> Array:
        return tf.einsum(equation, *operands)

    @property
    def _fuses(self) -> bool:
        return self.training and self.device == "cpu"

    def gelu(self, x: Array, approximate: bool = False) -> Array:
        return _fused("gelu", approximate)(x) if self._fuses else super().gelu(x, approximate)

    def silu(self, x: Array) -> Array:
        return _fused("silu")(x) if self._fuses else super().silu(x)

    def rms_norm(self, x: Array, weight: Array, eps: float, offset: float = 0.0) -> Array:
        return _fused("rms_norm", eps, offset)(x, weight) if self._fuses else super().rms_norm(x, weight, eps, offset)

    def rotate(self, x: Array, cos: Array, sin: Array) -> Array:
        return _fused("rotate")(x, cos, sin) if self._fuses else super().rotate(x, cos, sin)

    def _attention(
        self, q: Array, k: Array, v: Array, mask: Array | None, scale: float, softcap: float | None, dropout: float,
        salt: int,
    ) -> Array:  # fmt: skip
        if not self._fuses or mask is None or dropout:
            return super()._attention(q, k, v, mask, scale, softcap, dropout, salt)
        return _fused("attention", scale, softcap)(q, k, v, mask)

    def kernels(self) -> Any:
        # Functions that are called in programs of the user's own, or exported, have no native parts.
        return _library() if self._device and self.device == "cpu" else None

    def kernel_linears(self, x: Array, matrices: Sequence[Matrix]) -> tuple[Array, ...]:
        rows, width = x.shape
        return tuple(
            _native("linear", kind, rows, outputs, width, (rows, outputs))(x, *(p for p in parts if p is not None))
            for kind, parts, outputs in matrices
        )

    def kernel_rows(self, leaf: Any, start: Array, size: int) -> Array:
        outputs, width = leaf.shape
        start = tf.convert_to_tensor(start, tf.int32)
        return _native("widen", leaf.kind, size, outputs, width, (size, width))(start, *leaf.arrays.values())

    def kernel_take(self, leaf: Any, ids: Array) -> Array:
        outputs, width = leaf.shape
        if None in ids.shape:
            return leaf.plain_take(self, ids)
        return _native("take", leaf.kind, ids.shape.num_elements(), outputs, width, (*ids.shape, width))(
            tf.cast(ids, tf.int32), *leaf.arrays.values()
        )

    def without_gradient(self, product: Callable, back: Callable, x: Array, leaves: tuple) -> tuple[Array, ...]:
        @tf.custom_gradient
        def run(x: Array) -> tuple[tuple[Array, ...], Callable]:
            return product(x, leaves), lambda *upstream: back(upstream, leaves)

        return run(x)

    @tf.custom_gradient
    def _few(self, x: Array, weight: Array) -> tuple[Array, Callable]:
        """x (R, D) times weight (N, D), transposed, by a native product."""

        def back(upstream: Array) -> tuple[Array, Array]:
            return tf.matmul(upstream, weight), tf.matmul(upstream, x, transpose_a=True)

        kind, parts = kernels.FLOATS[weight.dtype.name], (weight, None, None)
        (y,) = self.kernel_linears(tf.cast(x, tf.float32), [(kind, parts, weight.shape[0])])
        return tf.cast(y, x.dtype), back

    def _linear(self, x: Array, weight: Array, bias: Array | None) -> Array:
        flat = tf.reshape(x, (-1, x.shape[-1]))
        outputs, rows = weight.shape[0], flat.shape[0]
        few = rows is not None and rows <= kernels.FEW and weight.dtype.name in kernels.FLOATS
        few = few and flat.shape[1] == weight.shape[1]
        if few and not self.training and isinstance(weight, tf.Tensor) and self.kernels() is not None:
            y = self._few(flat, weight)
        else:
            y = tf.matmul(flat, weight, transpose_b=True)
        y = tf.reshape(y, (*self.shape(x)[:-1], outputs))
        return y if bias is None else self.plus(y, bias)
