"""PyTorch: eager kernels; in-place caches; matrix-vector products in the form that its CPU build threads."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
import torch.utils.checkpoint

from modelhub.core import kernels
from modelhub.core.backends.base import Array, Backend, Shape, bound_once, host_copy
from modelhub.core.backends.native import NativeCalls
from modelhub.errors import ConfigError, InputError

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "bool": torch.bool,
}
_PACKAGE = os.path.dirname(torch.__file__)
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# oneDNN's float32 product, which torch itself takes only for bfloat16: on processors that MKL does not favour it is
# twice as fast (docs/decisions.md has the figures). Weights may be strided in any way.
_ONEDNN = (
    torch.ops.mkldnn._linear_pointwise
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else None
)


# Whether torch.func, torch.jit, or modes and fake tensors look at what is called.
_transformed, _tracing = torch._C._are_functorch_transforms_active, torch._C._is_tracing
_dispatched = torch._C._len_torch_dispatch_stack


def _product(x: Array, weight: Array) -> Array:
    """x (M, K) times weight (N, K), transposed, in float32 on CPU, without a gradient."""
    assert _ONEDNN is not None
    return _ONEDNN(x, weight, None, "none", [], "")


class _Product(torch.autograd.Function):
    """`_product` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Array, weight: Array) -> Array:
        x_wanted, weight_wanted = ctx.needs_input_grad
        ctx.save_for_backward(x if weight_wanted else None, weight if x_wanted else None)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Array) -> tuple[Array | None, Array | None]:
        x, weight = ctx.saved_tensors
        of_x = None if weight is None else _product(gradient, weight.t())
        return of_x, None if x is None else _product(gradient.t(), x.t())


class _Frozen(torch.autograd.Function):
    """Products with matrices that are not trained, and that the backward pass widens again."""

    @staticmethod
    def forward(ctx: Any, x: Array, leaves: tuple, product: Callable, back: Callable) -> tuple[Array, ...]:
        ctx.leaves, ctx.back = leaves, back
        return product(x, leaves)

    @staticmethod
    def backward(ctx: Any, *gradients: Array) -> tuple[Array | None, ...]:
        return ctx.back(gradients, ctx.leaves), None, None, None


class TorchOptimizer:
    """A torch.optim class, or a function params -> optimizer, with the methods of optim.Optimizer.

    A class gets the learning rate of each step; a function's optimizer keeps its own. The state is kept as
    {"torch/NAME/slot": tensor}, so that it goes into checkpoints as any other.
    """

    def __init__(self, make: Callable[..., torch.optim.Optimizer]):
        self.make = make
        self.takes_rate = isinstance(make, type)
        self._optimizer: torch.optim.Optimizer | None = None
        self._leaves: dict[str, Array] = {}

    def __repr__(self) -> str:
        return f"torch optimizer {getattr(self.make, '__name__', self.make)}"  # a partial says what it was given

    def init(self, xp: Backend, params: Mapping[str, Array]) -> dict[str, Array]:
        self._optimizer = None
        return {}

    def update(
        self, xp: Backend, grads: Mapping[str, Array], state: Mapping[str, Array], params: Mapping[str, Array],
        learning_rate: Array, step: Array, finite: Array | None = None,
    ) -> tuple[dict[str, Array], dict[str, Array]]:  # fmt: skip
        if self._optimizer is None or any(self._leaves[name] is not params[name] for name in params):
            self._start(params, state, float(learning_rate))
        assert self._optimizer is not None
        if finite is not None and not bool(finite):
            return dict(params), dict(state)
        if self.takes_rate:
            for group in self._optimizer.param_groups:
                group["lr"] = float(learning_rate)
        for name, leaf in self._leaves.items():
            leaf.grad = grads[name].to(leaf.dtype)
        self._optimizer.step()
        for leaf in self._leaves.values():
            leaf.grad = None
        slots = {
            f"torch/{name}/{slot}": torch.as_tensor(value)
            for name, leaf in self._leaves.items()
            for slot, value in self._optimizer.state[leaf].items()
            if value is not None
        }
        return dict(self._leaves), slots

    def _start(self, params: Mapping[str, Array], state: Mapping[str, Array], rate: float) -> None:
        """At the first step, and when a run goes on from a checkpoint."""
        self._leaves = dict(params)
        leaves = list(self._leaves.values())
        self._optimizer = self.make(leaves, lr=rate) if self.takes_rate else self.make(leaves)
        for key, value in state.items():
            _, name, slot = key.split("/")
            # Copies: the state that was given may be kept elsewhere, and torch writes into its own.
            self._optimizer.state[self._leaves[name]][slot] = value.clone()


class Torch(Backend):
    """All of it but native calls."""

    name = "torch"
    eager = True
    traced = False

    def __init__(self, device: str | None = "cpu"):
        super().__init__(device)
        self._device = torch.device(self.device.replace("gpu", "cuda"))
        self._on_cpu = self._device.type == "cpu"

    @classmethod
    def devices(cls) -> list[str]:
        found = [f"gpu:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
        if torch.backends.mps.is_available():
            found.append("mps:0")
        return found + ["cpu"]

    @staticmethod
    def owns(x: object) -> bool:
        return isinstance(x, torch.Tensor)

    @staticmethod
    def device_of(x: Array) -> str | None:
        return str(x.device).replace("cuda", "gpu")

    def put(self, array: np.ndarray) -> Array:
        # A copy only if torch could not take the array or may not write to it.
        array = np.require(array, requirements=["C", "W"])
        if array.dtype.name == "bfloat16":  # torch cannot take ml_dtypes' arrays; the bits are the same
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(self._device)
        return torch.from_numpy(array).to(self._device)

    def _get(self, x: Array) -> np.ndarray:
        x = x.detach().cpu()
        if x.dtype == torch.bfloat16:
            import ml_dtypes

            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()

    def compile(
        self, fn: Callable, skeleton: Any = None, donate: Sequence[int] = (), hot: bool | None = True,
        training: bool = False, jit: bool | None = None,
    ) -> Callable:  # fmt: skip
        # Eager: on CPU torch.compile needs a C++ compiler, and decoding is bound by memory, not by launches.
        if jit and training:
            fn = torch.compile(fn, dynamic=False)
        # What inference mode makes can never be part of a gradient.
        return (torch.no_grad() if training else torch.inference_mode())(bound_once(fn, skeleton))

    def value_and_grad(self, fn: Callable[..., tuple[Array, Any]]) -> Callable:
        def run(variables: dict[str, Array], *args: Any) -> tuple[tuple[Array, Any], dict[str, Array]]:
            leaves = {name: x.detach().requires_grad_() for name, x in variables.items()}
            with torch.enable_grad():
                value, more = fn(leaves, *args)
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
            return (value.detach(), more), dict(zip(leaves, found, strict=True))

        return run

    def stop_gradient(self, x: Array) -> Array:
        return x.detach()

    def add_into(self, total: Array, new: Array) -> Array:
        return total.add_(new)

    def copy(self, x: Array) -> Array:
        return x.detach().clone()

    @staticmethod
    def check_whole(name: str, x: Array) -> None:
        if hasattr(x, "full_tensor"):  # a DTensor, whose memory is not that of its values
            raise InputError(
                f"{name} is sharded over processes (a {type(x).__name__}). Give the gathered weights: "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict(net, "
                "options=StateDictOptions(full_state_dict=True))"
            )

    def lend(self, x: Array) -> Any:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)  # TensorFlow knows nothing of torch's streams
        return x.detach().contiguous()

    def adopt(self, x: Array, owner: Backend) -> Array:
        if not self._beside(owner):
            return x.detach().to(self._device) if owner.name == self.name else self.put(owner.get(x))
        return torch.from_dlpack(owner.lend(x)).view(_DTYPES[owner.dtype(x)]).to(self._device)

    def native_labels(self, x: Array) -> Array:
        return x if x.is_floating_point() else x.long()

    def native_optimizer(self, optimizer: Any) -> Any:
        if isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                "give the class of the torch optimizer, or a function params -> optimizer: the parameters to train are "
                "not known before fit; for example functools.partial(torch.optim.AdamW, lr=1e-4)"
            )
        is_class = isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)
        is_function = callable(optimizer) and not isinstance(optimizer, type) and not hasattr(optimizer, "update")
        return TorchOptimizer(optimizer) if is_class or is_function else None

    def block(self, fn: Callable, *args: Any) -> Any:
        if not self.remat:
            return fn(*args)
        return torch.utils.checkpoint.checkpoint(fn, *args, use_reentrant=False)

    @contextlib.contextmanager
    def matmul_precision(self, precision: str | None) -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision or before)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def free_memory(self) -> int | None:
        if self._device.type != "cuda":
            return super().free_memory()
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)

    def peak_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else super().peak_memory()

    def array(self, values: Any, dtype: str | None = None) -> Array:
        if torch.compiler.is_dynamo_compiling():  # which follows numpy only so far; `values` are a model's own tables
            return torch.as_tensor(values, dtype=_DTYPES[dtype or "float32"], device=self._device)
        x = self.put(host_copy(values, np.dtype(dtype) if dtype and dtype != "bfloat16" else None))
        return x.to(torch.bfloat16) if dtype == "bfloat16" else x

    def zeros(self, shape: Shape, dtype: str = "float32") -> Array:
        return torch.zeros(tuple(shape), dtype=_DTYPES[dtype], device=self._device)

    def full(self, shape: Shape, value: float, dtype: str = "float32") -> Array:
        return torch.full(tuple(shape), value, dtype=_DTYPES[dtype], device=self._device)

    def arange(self, n: int, dtype: str = "int32") -> Array:
        return torch.arange(n, dtype=_DTYPES[dtype], device=self._device)

    def cast(self, x: Array, dtype: str) -> Array:
        return x.to(_DTYPES[dtype])

    def dtype(self, x: Array) -> str:
        return _NAMES[x.dtype]

    def reshape(self, x: Array, shape: Shape) -> Array:
        return x.reshape(tuple(shape))

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        return x.permute(*axes)

    def concat(self, xs: Sequence[Array], axis: int = 0) -> Array:
        return torch.cat(tuple(xs), axis)

    def stack(self, xs: Sequence[Array], axis: int = 0) -> Array:
        return torch.stack(tuple(xs), axis)

    def split(self, x: Array, sections: int, axis: int = -1) -> list[Array]:
        return list(x.split(x.shape[axis] // sections, axis))

    def expand_dims(self, x: Array, axis: int) -> Array:
        return x.unsqueeze(axis)

    def broadcast_to(self, x: Array, shape: Shape) -> Array:
        return x.expand(tuple(shape))

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return torch.where(condition, x, y)

    def take(self, x: Array, indices: Array, axis: int = 0) -> Array:
        if axis == 0 and x.ndim == 2:
            return F.embedding(indices, x)
        axis %= x.ndim
        picked = x.index_select(axis, indices.reshape(-1))
        return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])

    def take_along_axis(self, x: Array, indices: Array, axis: int) -> Array:
        return torch.take_along_dim(x, indices.long(), axis)

    def update_slots(self, buffer: Array, new: Array, start: Array) -> Array:
        time = new.shape[2]
        if self._on_cpu:  # reading `start` costs nothing here; on a GPU it would wait for the device
            for row, first in enumerate(start.tolist()):
                buffer[row, :, first : first + time] = new[row]
            return buffer
        slots = start[:, None] + torch.arange(time, device=self._device)
        rows = torch.arange(len(start), device=self._device)[:, None]
        buffer[rows, :, slots] = new.transpose(1, 2)
        return buffer

    def add_rows(self, x: Array, indices: Array, new: Array) -> Array:
        return x.index_add_(0, indices, new)

    def one_of_equals(self, ids: Array, size: int) -> Array:
        ids = ids.long()
        places = torch.arange(len(ids), device=ids.device)
        return torch.zeros(size, dtype=torch.int64, device=ids.device).scatter(0, ids, places)[ids]

    def exp(self, x: Array) -> Array:
        return torch.exp(x)

    def log(self, x: Array) -> Array:
        return torch.log(x)

    def sqrt(self, x: Array) -> Array:
        return torch.sqrt(x)

    def rsqrt(self, x: Array) -> Array:
        return torch.rsqrt(x)

    def sin(self, x: Array) -> Array:
        return torch.sin(x)

    def cos(self, x: Array) -> Array:
        return torch.cos(x)

    def tanh(self, x: Array) -> Array:
        return torch.tanh(x)

    def sigmoid(self, x: Array) -> Array:
        return torch.sigmoid(x)

    def erf(self, x: Array) -> Array:
        return torch.erf(x)

    def abs(self, x: Array) -> Array:
        return torch.abs(x)

    def maximum(self, x: Array, y: Array | float) -> Array:
        return torch.maximum(x, y) if isinstance(y, torch.Tensor) else x.clamp(min=y)

    def minimum(self, x: Array, y: Array | float) -> Array:
        return torch.minimum(x, y) if isinstance(y, torch.Tensor) else x.clamp(max=y)

    def sum(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return torch.sum(x, dim=axis, keepdim=keepdims, dtype=x.dtype)

    def mean(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return torch.mean(x, dim=axis, keepdim=keepdims)

    def max(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return torch.amax(x, dim=() if axis is None else axis, keepdim=keepdims)

    def min(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return torch.amin(x, dim=() if axis is None else axis, keepdim=keepdims)

    def any(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return torch.any(x, dim=axis, keepdim=keepdims)

    def all(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return torch.all(x, dim=axis, keepdim=keepdims)

    def argmax(self, x: Array, axis: int = -1) -> Array:
        return torch.argmax(x, dim=axis).to(torch.int32)

    def cumsum(self, x: Array, axis: int = -1) -> Array:
        return torch.cumsum(x, dim=axis, dtype=x.dtype)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        values, indices = torch.topk(x, k)
        return values, indices.to(torch.int32)

    def matmul(self, x: Array, y: Array) -> Array:
        batch = x.shape[:-2]
        if not self._suits_onednn(x, y) or batch != y.shape[:-2] or math.prod(batch) != 1:
            return torch.matmul(x, y)
        return self._onednn(x.flatten(0, -2), y.flatten(0, -2).t()).reshape(*batch, x.shape[-2], y.shape[-1])

    def _suits_onednn(self, x: Array, y: Array) -> bool:
        """Tiny matrices are not worth its setup."""
        same = x.dtype == y.dtype == torch.float32
        # torch.compile cannot lower the operation, and asking for symbolic sizes would fix them; autocast and
        # torch.func do not know it.
        return (
            _ONEDNN is not None
            and self._on_cpu
            and same
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._are_functorch_transforms_active()
            and min(*x.shape[-2:], *y.shape[-2:]) > 4
        )

    def _onednn(self, x: Array, weight: Array) -> Array:
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return _Product.apply(x, weight)
        return _product(x, weight)

    def plus(self, x: Array, shared: Array) -> Array:
        return x + shared  # torch sums in float32 by itself

    def times(self, x: Array, shared: Array) -> Array:
        return x * shared

    def einsum(self, equation: str, *operands: Array) -> Array:
        return torch.einsum(equation, *operands)

    def without_gradient(self, product: Callable, back: Callable, x: Array, leaves: tuple) -> tuple[Array, ...]:
        # torch.func and forward mode go through what the product is made of.
        others = _transformed() or fwAD._current_level >= 0
        wanted = torch.is_grad_enabled() and x.requires_grad and not others
        return _Frozen.apply(x, leaves, product, back) if wanted else product(x, leaves)

    def _linear(self, x: Array, weight: Array, bias: Array | None) -> Array:
        if not self._on_cpu or x.dtype != weight.dtype or torch.compiler.is_compiling():
            return F.linear(x, weight, bias)
        outputs, width = weight.shape
        rows = x.numel() // width
        if x.dtype != torch.float32 or rows <= 4 or not self._suits_onednn(weight, weight):
            return F.linear(x, weight, bias)
        y = self._onednn(x.reshape(rows, width), weight).reshape(*x.shape[:-1], outputs)
        return y if bias is None else y + bias

    def softmax(self, x: Array, axis: int = -1) -> Array:
        return torch.softmax(x, axis, dtype=torch.float32).to(x.dtype)

    def log_softmax(self, x: Array, axis: int = -1) -> Array:
        return torch.log_softmax(x, axis, dtype=torch.float32)

    def logsumexp(self, x: Array, axis: int = -1, keepdims: bool = False) -> Array:
        return torch.logsumexp(x, axis, keepdim=keepdims)

    def silu(self, x: Array) -> Array:
        return F.silu(x)

    def gelu(self, x: Array, approximate: bool = False) -> Array:
        return F.gelu(x, approximate="tanh" if approximate else "none")

    def rms_norm(self, x: Array, weight: Array, eps: float, offset: float = 0.0) -> Array:
        scale = weight.float() + offset if offset else weight.float()
        if self._on_cpu and x.dtype == torch.float32:  # F.rms_norm's CPU form copies three times: 14 us against 8
            return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * scale
        return F.rms_norm(x.float(), (x.shape[-1],), scale, eps).to(x.dtype)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        return F.layer_norm(x.float(), (x.shape[-1],), weight.float(), bias.float(), eps).to(x.dtype)

    def _attention(
        self, q: Array, k: Array, v: Array, mask: Array | None, scale: float, softcap: float | None, dropout: float,
        salt: int,
    ) -> Array:  # fmt: skip
        one_product = self._suits_onednn(q, k) and k.shape[0] * k.shape[1] == 1 and 4 < q.shape[2] <= 512
        # No fused kernel caps the scores or draws our random numbers; for a single key head two plain products are
        # faster (docs/decisions.md), as long as the scores are no burden on memory.
        if softcap or dropout or one_product:
            return super()._attention(q, k, v, mask, scale, softcap, dropout, salt)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


class TorchBackend(NativeCalls, Torch):
    def kernels(self) -> Any:
        # Nobody knows the kernels' names but we: programs that are compiled or exported go without, and so does what
        # records operations: tracers, fake tensors, derivatives of functions and of the forward mode.
        if torch.compiler.is_compiling() or not self._on_cpu or _transformed() or _tracing() or _dispatched():
            return None
        return kernels.library() if fwAD._current_level < 0 else None

    def _native(self, *arrays: Array) -> Any:
        library = self.kernels()
        if library is None:
            return None
        wanted = torch.is_grad_enabled()
        for x in arrays:
            if x.dtype is not torch.float32 or not x.is_contiguous() or not x.is_cpu or (wanted and x.requires_grad):
                return None
        return library

    def _native_weight(self, x: Array, weight: Array) -> Any:
        library = self.kernels()
        if library is None or x.dtype != weight.dtype or not (x.is_cpu and weight.is_cpu and weight.is_contiguous()):
            return None
        wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return library if _NAMES.get(weight.dtype) in kernels.FLOATS and not wanted else None

    def _count(self, x: Array) -> int:
        return x.numel()

    def _contiguous(self, x: Array) -> Array:
        return x.contiguous()

    def _pointer(self, x: Array | None) -> Any:
        return None if x is None else x.data_ptr()

    def _empty(self, shape: Shape) -> Array:
        return torch.empty(shape)

    def _native_threads(self) -> tuple[int, int]:
        return torch.get_num_threads(), kernels.openmp(_PACKAGE)
