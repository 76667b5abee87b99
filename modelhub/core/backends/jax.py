"""JAX: every step is one jitted XLA program, with the caches donated."""

import contextlib
import functools
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Read by XLA when it first touches a GPU: without it JAX takes three quarters of the memory from the other frameworks.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from modelhub.core import kernels, leaves
from modelhub.core.backends.base import Array, Backend, Matrix, Shape, bound, host_copy, of_arrays
from modelhub.core.measured import cache_folder

_ZSTANDARD = b"\x28\xb5\x2f\xfd"  # RFC 8878
_PRODUCT = "product"  # the name of what is kept for the backward pass
_THIN = 64  # a product over no more than this many channels is cheap
# XLA's CPU compiler takes the barriers out early and then merges what is to be computed again with what was computed.
_KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}


leaves.follow(
    lambda kind: jax.tree_util.register_pytree_node(
        kind, lambda leaf: leaf.taken_apart(), lambda others, arrays: kind.put_together(arrays, others)
    )
)


@functools.cache
def _library() -> Any:
    """The native products, made known to XLA; None where there are none."""
    found = kernels.library()
    if found is None:
        return None
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    minor = int(re.search(r"#define XLA_FFI_API_MINOR (\d+)", header)[1])  # type: ignore[index]
    for name, handler in found.xla_handlers(minor).items():
        jax.ffi.register_ffi_target(f"modelhub_{name}", handler, platform="cpu")
    return found


def _native(name: str, shape: Shape, *args: Array) -> Array:
    """A native product as a part of an XLA program. Its inputs come row by row, as XLA lays out what it is not told."""
    return jax.ffi.ffi_call(
        f"modelhub_{name}", jax.ShapeDtypeStruct(tuple(shape), jnp.float32), vmap_method="sequential"
    )(*args)


_Zero = jax.custom_derivatives.SymbolicZero
_KINDS = {number: name for name, number in {**kernels.FLOATS, **kernels.SCHEMES}.items()}


def _use_compilation_cache() -> None:
    """Keep compiled programs on disk, unless the user has chosen a place, or turned it off with an empty variable."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    folder = os.path.join(cache_folder(), "jax")
    _remove_torn(Path(folder))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _remove_torn(folder: Path) -> None:
    """Remove programs that a full disk or a kill cut short: JAX would complain of them in each run, compile them again
    and leave them as they are. Each file is looked at once."""
    seen = folder / ".checked"
    with contextlib.suppress(OSError):  # no folder yet, or one for reading only
        last = seen.stat().st_mtime - 2 if seen.exists() else 0.0  # file systems round times
        for path in folder.glob("*-cache"):
            if path.stat().st_mtime > last and not _is_whole(path.read_bytes()):
                path.unlink(missing_ok=True)
        if folder.is_dir():
            seen.touch()


def _is_whole(program: bytes) -> bool:
    """JAX keeps them compressed, with zstandard where that is installed, else with zlib."""
    try:
        if program.startswith(_ZSTANDARD):
            import zstandard

            zstandard.ZstdDecompressor().decompress(program)
        else:
            zlib.decompress(program)
    except ImportError:
        return True  # nobody here can tell
    except Exception:  # each library has errors of its own
        return False
    return True


class Optax:
    """An optax.GradientTransformation with the methods of optim.Optimizer; it brings its own learning rate.

    Its state is kept as {"optax/NUMBER": leaf}, so that it goes into checkpoints as any other.
    """

    takes_rate = False

    def __init__(self, transformation: Any):
        self.transformation = transformation

    def __repr__(self) -> str:
        return "an optax transformation"

    def init(self, xp: Backend, params: Mapping[str, Array]) -> dict[str, Array]:
        leaves = jax.tree.leaves(self.transformation.init(dict(params)))
        return {f"optax/{number:04d}": jnp.asarray(leaf) for number, leaf in enumerate(leaves)}

    def update(
        self, xp: Backend, grads: Mapping[str, Array], state: Mapping[str, Array], params: Mapping[str, Array],
        learning_rate: Array, step: Array, finite: Array | None = None,
    ) -> tuple[dict[str, Array], dict[str, Array]]:  # fmt: skip
        structure = jax.tree.structure(jax.eval_shape(self.transformation.init, dict(params)))
        before = jax.tree.unflatten(structure, [state[name] for name in sorted(state)])
        changes, after = self.transformation.update(dict(grads), before, dict(params))
        new = {name: (x + changes[name]).astype(x.dtype) for name, x in params.items()}
        slots = {f"optax/{number:04d}": leaf for number, leaf in enumerate(jax.tree.leaves(after))}
        if finite is not None:
            new = {name: jnp.where(finite, x, params[name]) for name, x in new.items()}
            slots = {name: jnp.where(finite, x, state[name]) for name, x in slots.items()}
        return new, slots


class JaxBackend(Backend):
    name = "jax"
    eager = False
    traced = True

    def __init__(self, device: str | None = "cpu"):
        super().__init__(device)
        kind, _, index = self.device.partition(":")
        self._device: Any = jax.devices(kind)[int(index or 0)] if device else None
        if device:  # functions that are called in programs of the user's leave JAX's settings alone
            _use_compilation_cache()

    @property
    def asynchronous(self) -> bool:
        return True

    @classmethod
    def devices(cls) -> list[str]:
        found = [f"{d.platform}:{d.id}" for d in jax.devices() if d.platform != "cpu"]
        return found + ["cpu"]

    @staticmethod
    def owns(x: object) -> bool:
        return isinstance(x, jax.Array)  # tracers included

    @staticmethod
    def device_of(x: Array) -> str | None:
        return None  # a tracer has none, a sharded array many, and JAX moves what is on none of its own to either

    def put(self, array: np.ndarray) -> Array:
        return jax.device_put(array, self._device, may_alias=True)

    def _get(self, x: Array) -> np.ndarray:
        return np.asarray(x)

    def compile(
        self, fn: Callable, skeleton: Any = None, donate: Sequence[int] = (), hot: bool | None = True,
        training: bool = False, jit: bool | None = None,
    ) -> Callable:  # fmt: skip
        if jit is False:
            return bound(fn, skeleton)
        options = _KEEP_BARRIERS if training and self.device == "cpu" else None
        return jax.jit(bound(fn, skeleton), donate_argnums=tuple(donate), compiler_options=options)

    def value_and_grad(self, fn: Callable[..., tuple[Array, Any]]) -> Callable:
        return jax.value_and_grad(fn, has_aux=True)

    def stop_gradient(self, x: Array) -> Array:
        return jax.lax.stop_gradient(x)

    def copy(self, x: Array) -> Array:
        return jnp.array(x)

    def lend(self, x: Array) -> Any:
        return x.block_until_ready()

    def adopt(self, x: Array, owner: Backend) -> Array:
        if owner.name == self.name:
            x = jax.device_put(x, self._device)
        elif owner.name == "numpy" or not self._beside(owner):
            x = self.put(owner.get(x))
        else:
            x = jax.device_put(jax.dlpack.from_dlpack(owner.lend(x)), self._device)  # copies what is not aligned
        return x.block_until_ready()  # a copy that is not done yet holds on to its source

    def native_optimizer(self, optimizer: Any) -> Any:
        is_one = all(callable(getattr(optimizer, name, None)) for name in ("init", "update"))
        return Optax(optimizer) if is_one and type(optimizer).__module__.startswith("optax") else None

    def block(self, fn: Callable, *args: Any) -> Any:
        if not self.training:
            return fn(*args)
        # Arrays may also be closed over: only what is given as an argument counts as the block's input.
        arrays, args_with = of_arrays(self, args)
        # What is between the products costs less to compute again than to keep.
        policy = None if self.remat else jax.checkpoint_policies.save_only_these_names(_PRODUCT)
        return jax.checkpoint(lambda *arrays: fn(*args_with(*arrays)), policy=policy)(*arrays)

    def loop(self, n: Array, body: Callable[[Array, Any], Any], state: Any) -> Any:
        return jax.lax.fori_loop(0, n, body, state)

    def scan(self, body: Callable[[Any, Array, Any], tuple], state: Any, n: int, xs: Any = None) -> tuple[Any, Any]:
        return jax.lax.scan(lambda state, x: body(state, *x), state, (jnp.arange(n), xs))

    def joined(self, ys: Any) -> Array:
        return jnp.reshape(ys, (-1, *ys.shape[2:]))

    @contextlib.contextmanager
    def matmul_precision(self, precision: str | None) -> Iterator[None]:
        names = {"highest": "highest", "high": "tensorfloat32"}
        with jax.default_matmul_precision(names[precision]) if precision else contextlib.nullcontext():
            yield

    def free_memory(self) -> int | None:
        stats = self._device.memory_stats() or {}
        if "bytes_limit" in stats:
            return stats["bytes_limit"] - stats["bytes_in_use"]
        return super().free_memory()

    def peak_memory(self) -> int | None:
        stats = self._device.memory_stats() or {}
        return stats.get("peak_bytes_in_use", super().peak_memory())

    def array(self, values: Any, dtype: str | None = None) -> Array:
        # A copy first: device_put alone might keep looking at memory that the caller goes on writing to.
        return jax.device_put(host_copy(values, jnp.dtype(dtype) if dtype else None), self._device)

    def zeros(self, shape: Shape, dtype: str = "float32") -> Array:
        return jnp.zeros(shape, dtype, device=self._device)

    def full(self, shape: Shape, value: float, dtype: str = "float32") -> Array:
        return jnp.full(shape, value, dtype, device=self._device)

    def arange(self, n: int, dtype: str = "int32") -> Array:
        return jnp.arange(n, dtype=dtype, device=self._device)

    def cast(self, x: Array, dtype: str) -> Array:
        return x.astype(dtype)

    def dtype(self, x: Array) -> str:
        return x.dtype.name

    def reshape(self, x: Array, shape: Shape) -> Array:
        return jnp.reshape(x, shape)

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        return jnp.transpose(x, axes)

    def concat(self, xs: Sequence[Array], axis: int = 0) -> Array:
        return jnp.concatenate(xs, axis)

    def stack(self, xs: Sequence[Array], axis: int = 0) -> Array:
        return jnp.stack(xs, axis)

    def split(self, x: Array, sections: int, axis: int = -1) -> list[Array]:
        return jnp.split(x, sections, axis)

    def expand_dims(self, x: Array, axis: int) -> Array:
        return jnp.expand_dims(x, axis)

    def broadcast_to(self, x: Array, shape: Shape) -> Array:
        wide = x.astype(jnp.float32) if x.dtype.itemsize == 2 else x  # XLA would sum its gradient in 16 bits
        return jnp.broadcast_to(wide, shape).astype(x.dtype)

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return jnp.where(condition, x, y)

    def take(self, x: Array, indices: Array, axis: int = 0) -> Array:
        return jnp.take(x, indices, axis, mode="clip")

    def take_along_axis(self, x: Array, indices: Array, axis: int) -> Array:
        return jnp.take_along_axis(x, indices, axis)

    def update_slots(self, buffer: Array, new: Array, start: Array) -> Array:
        if buffer.shape[0] == 1:
            return jax.lax.dynamic_update_slice(buffer, new, (0, 0, start[0], 0))
        return jax.vmap(lambda b, n, s: jax.lax.dynamic_update_slice(b, n, (0, s, 0)))(buffer, new, start)

    def slice_rows(self, x: Array, start: Array, size: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size)

    def add_rows(self, x: Array, indices: Array, new: Array) -> Array:
        return x.at[indices].add(new)

    def one_of_equals(self, ids: Array, size: int) -> Array:
        return jnp.zeros((size,), "int32").at[ids].set(jnp.arange(ids.shape[0], dtype="int32"))[ids]

    def exp(self, x: Array) -> Array:
        return jnp.exp(x)

    def log(self, x: Array) -> Array:
        return jnp.log(x)

    def sqrt(self, x: Array) -> Array:
        return jnp.sqrt(x)

    def rsqrt(self, x: Array) -> Array:
        return jax.lax.rsqrt(x)

    def sin(self, x: Array) -> Array:
        return jnp.sin(x)

    def cos(self, x: Array) -> Array:
        return jnp.cos(x)

    def tanh(self, x: Array) -> Array:
        return jnp.tanh(x)

    def sigmoid(self, x: Array) -> Array:
        return jax.nn.sigmoid(x)

    def erf(self, x: Array) -> Array:
        return jax.lax.erf(x)

    def abs(self, x: Array) -> Array:
        return jnp.abs(x)

    def maximum(self, x: Array, y: Array | float) -> Array:
        return jnp.maximum(x, y)

    def minimum(self, x: Array, y: Array | float) -> Array:
        return jnp.minimum(x, y)

    def sum(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return jnp.sum(x, axis, keepdims=keepdims)

    def mean(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return jnp.mean(x, axis, keepdims=keepdims)

    def max(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return jnp.max(x, axis, keepdims=keepdims)

    def min(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return jnp.min(x, axis, keepdims=keepdims)

    def any(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return jnp.any(x, axis, keepdims=keepdims)

    def all(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return jnp.all(x, axis, keepdims=keepdims)

    def argmax(self, x: Array, axis: int = -1) -> Array:
        return jnp.argmax(x, axis).astype("int32")

    def cumsum(self, x: Array, axis: int = -1) -> Array:
        return jnp.cumsum(x, axis)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        values, indices = jax.lax.top_k(x, k)
        return values, indices

    def matmul(self, x: Array, y: Array) -> Array:
        return jnp.matmul(x, y)

    def kernels(self) -> Any:
        # Functions that are called in programs of the user's own, or exported, have no native parts: they could be
        # differentiated, or run elsewhere.
        return _library() if self._device is not None and self.device == "cpu" else None

    def kernel_linears(self, x: Array, matrices: Sequence[Matrix]) -> tuple[Array, ...]:
        return tuple(
            _native(f"linear_{_KINDS[kind]}", (x.shape[0], outputs), x, *(part for part in parts if part is not None))
            for kind, parts, outputs in matrices
        )

    def kernel_rows(self, leaf: Any, start: Array, size: int) -> Array:
        start = jnp.asarray(start, "int32")
        return _native(f"widen_{leaf.scheme}", (size, leaf.shape[1]), start, *leaf.arrays.values())

    def kernel_take(self, leaf: Any, ids: Array) -> Array:
        ids = jnp.clip(ids, 0, leaf.shape[0] - 1).astype("int32")  # as `take` does; tiles have more rows
        return _native(f"take_{leaf.scheme}", (*ids.shape, leaf.shape[1]), ids, *leaf.arrays.values())

    def without_gradient(self, product: Callable, back: Callable, x: Array, leaves: tuple) -> tuple[Array, ...]:
        run = jax.custom_jvp(lambda x: product(x, leaves))

        @run.defjvp
        def tangent(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
            along = jax.custom_derivatives.linear_call(
                lambda leaves, x: self._widened_products(x, leaves), lambda leaves, upstream: back(upstream, leaves),
                leaves, *tangents,
            )  # fmt: skip
            return run(*primals), along

        return run(x)

    def _linear(self, x: Array, weight: Array, bias: Array | None) -> Array:
        outputs, width = weight.shape
        rows = x.size // width
        few = isinstance(rows, int) and rows <= kernels.FEW  # jax.export's symbolic sizes have no truth
        if few and not self.training and weight.dtype.name in kernels.FLOATS and self.kernels() is not None:
            y = jnp.reshape(_few(self, jnp.reshape(x, (rows, width)), weight), (*x.shape[:-1], outputs))
            return y if bias is None else self.plus(y, bias)
        y = super()._linear(x, weight, bias)
        # The second half of a LoRA is cheaper to compute again than to keep.
        return checkpoint_name(y, _PRODUCT) if self.training and width > _THIN else y

    def einsum(self, equation: str, *operands: Array) -> Array:
        return jnp.einsum(equation, *operands)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _few(xp: JaxBackend, x: Array, weight: Array) -> Array:
    """x (R, D) times weight (N, D), transposed, by a native product; its derivatives are XLA's."""
    kind = kernels.FLOATS[weight.dtype.name]
    (y,) = xp.kernel_linears(x.astype(jnp.float32), [(kind, (weight, None, None), weight.shape[0])])
    return y.astype(x.dtype)


@functools.partial(_few.defjvp, symbolic_zeros=True)
def _along(xp: JaxBackend, primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    (x, weight), (by_x, by_weight) = primals, tangents
    pairs = [(by_x, weight)] if not isinstance(by_x, _Zero) else []
    pairs += [(x, by_weight)] if not isinstance(by_weight, _Zero) else []
    y = _few(xp, x, weight)
    parts = [left @ right.T for left, right in pairs]
    return y, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)
