"""Native products, and what is between them, for backends whose operations run one after the other.

With few rows an operation of a framework's takes longer to call than to compute. These are for float32 on the CPU where
no gradient is asked for, and for shapes that fit, which the library does not check; everything else goes to the
framework, whose backend comes after this one among the bases.
"""

from collections.abc import Sequence
from typing import Any

from modelhub.core import kernels
from modelhub.core.backends.base import FEW_PACKED, Array, Backend, Matrix, Shape

_SILU, _GELU_TANH = 0, 1  # as src/mhk.h numbers them


class NativeCalls(Backend):
    def _native(self, *arrays: Array) -> Any:
        """The library of kernels; None where it cannot be used on these, which must be float32 and contiguous."""
        raise NotImplementedError

    def _native_weight(self, x: Array, weight: Array) -> Any:
        """As `_native`, of a matrix of any dtype that there are kernels for, and an x that is cast to float32."""
        raise NotImplementedError

    def _count(self, x: Array) -> int:
        """Numbers in an array."""
        raise NotImplementedError

    def _contiguous(self, x: Array) -> Array:
        raise NotImplementedError

    def _pointer(self, x: Array | None) -> Any:
        """What the library takes for a contiguous array: an object with a buffer, or an address."""
        raise NotImplementedError

    def _empty(self, shape: Shape) -> Array:
        """float32, not initialised."""
        raise NotImplementedError

    def _native_threads(self) -> tuple[int, int]:
        """How many; and 1 where they are those of the OpenMP that the process has, or 0."""
        raise NotImplementedError

    def kernel_linears(self, x: Array, matrices: Sequence[Matrix]) -> tuple[Array, ...]:
        at = self._pointer
        found = [((kind, *map(at, parts)), outputs) for kind, parts, outputs in matrices]
        return self._products(self._contiguous(x), found)

    def _packed_linears(self, x: Array, leaves: tuple) -> Sequence[Array]:
        few = self._native(x) is not None and not self.training and self._count(x) <= FEW_PACKED * x.shape[-1]
        if not few or x.shape[-1] != leaves[0].shape[1]:
            return super()._packed_linears(x, leaves)
        return self._products(x, [(leaf.native_parts(self._pointer), leaf.shape[0]) for leaf in leaves])

    def _products(self, x: Array, matrices: Sequence[tuple[tuple[Any, ...], int]]) -> tuple[Array, ...]:
        """x (..., K), contiguous, times matrices, transposed: (..., outputs). matrices: (kind, pointers; outputs)."""
        at, (*shape, width) = self._pointer, x.shape
        ys = tuple(self._empty((*shape, outputs)) for _, outputs in matrices)
        calls = tuple((*parts, at(y), outputs) for (parts, outputs), y in zip(matrices, ys, strict=True))
        self.kernels().linears(calls, at(x), self._count(x) // width, width, *self._native_threads())
        return ys

    def kernel_rows(self, leaf: Any, start: Array, size: int) -> Array:
        outputs, width = leaf.shape
        y = self._empty((size, width))
        matrix, threads = leaf.native_parts(self._pointer), self._native_threads()
        self.kernels().widen(*matrix, self._pointer(y), int(start), size, outputs, width, *threads)
        return y

    def kernel_take(self, leaf: Any, ids: Array) -> Array:
        outputs, width = leaf.shape
        ids = self._contiguous(self.cast(ids, "int32"))
        y = self._empty((*ids.shape, width))
        matrix, count = leaf.native_parts(self._pointer), self._count(ids)
        self.kernels().take(*matrix, self._pointer(ids), self._pointer(y), count, outputs, width)
        return y

    def _linear(self, x: Array, weight: Array, bias: Array | None) -> Array:
        # Asked first: shapes may be unknown where there are no native calls.
        if self._native_weight(x, weight) is None or self._count(x) > kernels.FEW * weight.shape[1]:
            return super()._linear(x, weight, bias)
        outputs, width = weight.shape
        if not width or x.shape[-1] != width:
            return super()._linear(x, weight, bias)
        kind = kernels.FLOATS[self.dtype(weight)]
        (y,) = self.kernel_linears(self.cast(x, "float32"), [(kind, (weight, None, None), outputs)])
        y = self.cast(y, self.dtype(x))
        return y if bias is None else y + bias

    def rms_norm(self, x: Array, weight: Array, eps: float, offset: float = 0.0) -> Array:
        library = self._native(x, weight)
        if library is None or weight.shape != x.shape[-1:] or self._count(x) > kernels.SMALL:
            return super().rms_norm(x, weight, eps, offset)
        at, y, width = self._pointer, self._empty(x.shape), x.shape[-1]
        library.rms_norm(at(x), at(weight), at(y), self._count(x) // width, width, eps, offset)
        return y

    def rotate(self, x: Array, cos: Array, sin: Array) -> Array:
        library = self._native(x, cos, sin)
        if library is None or len(x.shape) != 4 or self._count(x) > kernels.SMALL:
            return super().rotate(x, cos, sin)
        batch, _, time, width = x.shape
        tables = (1, 1, time, width // 2), (batch, 1, time, width // 2)
        if cos.shape not in tables or sin.shape != cos.shape:
            return super().rotate(x, cos, sin)
        at, y = self._pointer, self._empty(x.shape)
        library.rotate(at(x), at(cos), at(sin), at(y), *x.shape, cos.shape[0])
        return y

    def update_slots(self, buffer: Array, new: Array, start: Array) -> Array:
        library = self._native(buffer, new)
        fits = new.shape[:2] == buffer.shape[:2] and new.shape[3] == buffer.shape[3] and len(start) == len(new)
        if library is None or not fits or self._count(new) > kernels.SMALL:
            return super().update_slots(buffer, new, start)
        at, start = self._pointer, self._contiguous(self.cast(start, "int32"))
        library.write(at(buffer), at(new), at(start), *new.shape, buffer.shape[2])
        return buffer

    def silu(self, x: Array) -> Array:
        y = self._activated(_SILU, x)
        return super().silu(x) if y is None else y

    def gelu(self, x: Array, approximate: bool = False) -> Array:
        y = self._activated(_GELU_TANH, x) if approximate else None
        return super().gelu(x, approximate) if y is None else y

    def _activated(self, kind: int, x: Array) -> Array | None:
        library = self._native(x)
        if library is None or self._count(x) > kernels.SMALL:
            return None
        at, y = self._pointer, self._empty(x.shape)
        library.activate(kind, at(x), at(y), self._count(x))
        return y

    def _attention(
        self, q: Array, k: Array, v: Array, mask: Array | None, scale: float, softcap: float | None, dropout: float,
        salt: int,
    ) -> Array:  # fmt: skip
        library = self._native(q, k, v)
        if library is None or dropout or q.shape[2] > kernels.FEW:
            return super()._attention(q, k, v, mask, scale, softcap, dropout, salt)
        batch, heads, time, width = q.shape
        kv_heads, slots = k.shape[1:3]
        masks = 1 if mask is None else mask.shape[0]
        fits = k.shape == v.shape == (batch, kv_heads, slots, width)
        if mask is not None:
            fits = fits and self.dtype(mask) == "bool" and mask.shape[1:] == (1, time, slots)
            mask = self._contiguous(mask)
        if not fits or masks not in (1, batch):
            return super()._attention(q, k, v, mask, scale, softcap, dropout, salt)
        at, y = self._pointer, self._empty(q.shape)
        library.attend(
            at(q), at(k), at(v), at(mask), at(y), batch, heads, kv_heads, time, slots, width, masks, scale,
            softcap or 0.0, *self._native_threads(),
        )  # fmt: skip
        return y
