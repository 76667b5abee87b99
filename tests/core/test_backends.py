"""Every operation of every backend against numpy in float64, eager and compiled; and choosing among backends."""

import itertools
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from modelhub.core import backends, nn
from modelhub.core.backends.base import Backend
from modelhub.core.tree import Module
from modelhub.errors import BackendNotInstalled, ConfigError, DeviceError, InputError, MixedBackends, UnknownBackend

ROOT = Path(__file__).parents[2]


def random(*shape, seed=0, scale=1.0):
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)


def integers(*shape, below=5, seed=0):
    return np.random.default_rng([seed, *shape]).integers(0, below, shape).astype(np.int32)


def booleans(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).random(shape) < 0.5


# Oracles that numpy does not have under one name. All see float64.


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def logsumexp(x, axis=-1, keepdims=False):
    peak = x.max(axis, keepdims=True)
    total = np.log(np.exp(x - peak).sum(axis, keepdims=True)) + peak
    return total if keepdims else total.squeeze(axis)


def erf(x):
    from math import erf

    return np.vectorize(erf)(x)


def gelu(x):
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, weight, eps=1e-6, offset=0.0):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (weight + offset)


def layer_norm(x, weight, bias, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)
    return np.concatenate([turned.real, turned.imag], -1)


def attention(q, k, v, mask=None, scale=1.0, softcap=None):
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum("bhtd,bhsd->bhts", q, k) * scale
    if softcap:
        scores = np.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    return np.einsum("bhts,bhsd->bhtd", softmax(scores), v)


def update_slots(buffer, new, start):
    buffer = buffer.copy()
    for row, first in enumerate(start):
        buffer[row, :, first : first + new.shape[2]] = new[row]
    return buffer


def top_k(x, k):
    order = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(x, order, -1), order


def causal(queries, keys):
    return (np.arange(keys) <= np.arange(queries)[:, None] + keys - queries)[None, None]


@dataclass
class Case:
    """call(xp, *inputs) on a backend must equal oracle(*inputs) in numpy; floats reach the oracle as float64."""

    call: object
    oracle: object
    inputs: tuple
    tolerance: float


def case(call, oracle, *inputs, tolerance=2e-6):
    return Case(call, oracle, inputs, tolerance)


def elementwise(name, oracle, x):
    return [case(lambda xp, x: getattr(xp, name)(x), oracle, x)]


def reduction(name, oracle, *inputs):
    variants = [(axis, keepdims) for axis in (None, 0, 1, -1) for keepdims in (False, True)]
    return [
        case(lambda xp, x, a=axis, k=keep: getattr(xp, name)(x, axis=a, keepdims=k), lambda x, a=axis, k=keep: oracle(x, axis=a, keepdims=k), x)
        for x in inputs
        for axis, keep in variants
    ]  # fmt: skip


X = random(2, 3, 4)
SIGNED = np.concatenate(
    [random(4, 5, scale=3.0).ravel(), np.array([0.0, -0.0, 1e-8, -20.0, 20.0, 100.0, -100.0])]
).astype(np.float32)
POSITIVE = np.abs(random(3, 5)) + np.float32(0.1)
TIES = np.array([[1, 3, 3, 2, 3], [0, 0, 0, 0, 0], [5, 1, 5, 1, 4]], np.float32)
WIDE = random(3, 7, scale=50.0)
MASKED = np.where(booleans(3, 7) | (np.arange(7) == 2), random(3, 7), np.float32(-1e30))
Q, K, V = random(2, 6, 4, 8), random(2, 3, 5, 8, seed=1), random(2, 3, 5, 8, seed=2)
ROW_MASK = causal(4, 5) & (np.arange(5) >= np.array([0, 1])[:, None, None, None])

CASES: dict[str, list[Case]] = {
    "array": [
        case(lambda xp: xp.array([[1.5, 2.0]]), lambda: np.array([[1.5, 2.0]])),
        case(lambda xp: xp.array([1, 2, 3]), lambda: np.array([1, 2, 3])),
        case(lambda xp: xp.array([True, False]), lambda: np.array([True, False])),
        case(lambda xp: xp.array(2.5), lambda: np.array(2.5)),
        case(lambda xp: xp.array(np.arange(3.0)), lambda: np.arange(3.0)),
        case(lambda xp: xp.array(np.arange(6).reshape(2, 3).T), lambda: np.arange(6).reshape(2, 3).T),
        case(lambda xp: xp.array([1, 2], "float32"), lambda: np.array([1.0, 2.0])),
        case(lambda xp: xp.array([1.0, 0.0], "bool"), lambda: np.array([True, False])),
        case(lambda xp: xp.array([1, 2], "bfloat16"), lambda: np.array([1, 2], ml_dtypes.bfloat16)),
    ],
    "native_labels": [
        case(lambda xp, x: xp.cast(xp.native_labels(x), "int32"), lambda x: x, np.array([3, 0, 2], np.int32)),
        case(lambda xp, x: xp.native_labels(x), lambda x: x, POSITIVE),
    ],
    "zeros": [
        case(lambda xp: xp.zeros((2, 3)), lambda: np.zeros((2, 3))),
        case(lambda xp: xp.zeros([4], "int32"), lambda: np.zeros(4, np.int32)),
        case(lambda xp: xp.zeros((1, 2), "bfloat16"), lambda: np.zeros((1, 2), ml_dtypes.bfloat16)),
        case(lambda xp: xp.zeros((2,), "bool"), lambda: np.zeros(2, bool)),
    ],
    "full": [
        case(lambda xp: xp.full((2, 3), 1.5), lambda: np.full((2, 3), 1.5)),
        case(lambda xp: xp.full((), -1e30), lambda: np.full((), -1e30)),
        case(lambda xp: xp.full((3,), 7, "int32"), lambda: np.full(3, 7)),
        case(lambda xp: xp.full((3,), True, "bool"), lambda: np.full(3, True)),
    ],
    "arange": [
        case(lambda xp: xp.arange(5), lambda: np.arange(5)),
        case(lambda xp: xp.arange(3, "float32"), lambda: np.arange(3.0)),
        case(lambda xp: xp.arange(0), lambda: np.arange(0)),
    ],
    "cast": [
        case(lambda xp, x: xp.cast(x, "int32"), lambda x: x.astype(np.int32), random(3, 4, scale=9.0)),
        case(lambda xp, x: xp.cast(x, "float32"), lambda x: x.astype(float), integers(3, 4)),
        case(lambda xp, x: xp.cast(x, "float32"), lambda x: x.astype(float), booleans(3, 4)),
        case(lambda xp, x: xp.cast(x, "int32"), lambda x: x.astype(np.int32), booleans(3, 4)),
        case(lambda xp, x: xp.cast(x, "bool"), lambda x: x.astype(bool), integers(3, 4, below=2)),
        case(lambda xp, x: xp.cast(x, "float16"), lambda x: x.astype(np.float16), X),
        case(lambda xp, x: xp.cast(x, "bfloat16"), lambda x: x.astype(ml_dtypes.bfloat16), X),
        case(lambda xp, x: xp.cast(xp.cast(x, "bfloat16"), "float32"), lambda x: x.astype(ml_dtypes.bfloat16).astype(float), X),
    ],
    "shape": [case(lambda xp, x: xp.reshape(x, xp.shape(x)[::-1]), lambda x: x.reshape(x.shape[::-1]), X)],
    "reshape": [
        case(lambda xp, x: xp.reshape(x, (4, 6)), lambda x: x.reshape(4, 6), X),
        case(lambda xp, x: xp.reshape(x, (2, -1)), lambda x: x.reshape(2, -1), X),
        case(lambda xp, x: xp.reshape(xp.transpose(x, (2, 0, 1)), [24]), lambda x: x.transpose(2, 0, 1).reshape(24), X),
        case(lambda xp, x: xp.reshape(x, ()), lambda x: x.reshape(()), random(1)),
    ],
    "transpose": [
        case(lambda xp, x: xp.transpose(x, (2, 0, 1)), lambda x: x.transpose(2, 0, 1), X),
        case(lambda xp, x: xp.transpose(x, [0, 2, 1]), lambda x: x.transpose(0, 2, 1), X),
        case(lambda xp, x: xp.transpose(x, (-1, 0, 1)), lambda x: x.transpose(-1, 0, 1), X),
    ],
    "concat": [
        case(lambda xp, x, y: xp.concat([x, y]), lambda x, y: np.concatenate([x, y]), X, random(1, 3, 4)),
        case(lambda xp, x, y: xp.concat((x, y, x), axis=-1), lambda x, y: np.concatenate([x, y, x], -1), X, random(2, 3, 1)),
    ],
    "stack": [
        case(lambda xp, x, y: xp.stack([x, y]), lambda x, y: np.stack([x, y]), X, -X),
        case(lambda xp, x, y: xp.stack((x, y), axis=1), lambda x, y: np.stack([x, y], 1), X, -X),
        case(lambda xp, x, y: xp.stack([x, y], axis=-1), lambda x, y: np.stack([x, y], -1), X, -X),
    ],
    "split": [
        case(lambda xp, x: tuple(xp.split(x, 2)), lambda x: tuple(np.split(x, 2, -1)), X),
        case(lambda xp, x: tuple(xp.split(x, 3, axis=1)), lambda x: tuple(np.split(x, 3, 1)), X),
        case(lambda xp, x: tuple(xp.split(x, 1, axis=0)), lambda x: (x,), X),
    ],
    "expand_dims": [
        case(lambda xp, x, a=axis: xp.expand_dims(x, a), lambda x, a=axis: np.expand_dims(x, a), X) for axis in (0, 2, 3, -1, -2)
    ],
    "broadcast_to": [
        case(lambda xp, x: xp.broadcast_to(x, (2, 3, 4)), lambda x: np.broadcast_to(x, (2, 3, 4)), random(3, 1)),
        case(lambda xp, x: xp.broadcast_to(x, [5, 1]), lambda x: np.broadcast_to(x, (5, 1)), integers(1, 1)),
    ],
    "where": [
        case(lambda xp, c, x, y: xp.where(c, x, y), np.where, booleans(2, 3, 4), X, -X),
        case(lambda xp, c, x, y: xp.where(c, x, y), np.where, booleans(3, 1), X, random(4)),
        case(lambda xp, c, x: xp.where(c, x, -1e30), lambda c, x: np.where(c, x, -1e30), booleans(3, 4), X),
        case(lambda xp, c, x: xp.where(c, 0.0, x), lambda c, x: np.where(c, 0.0, x), booleans(3, 4), X),
        case(lambda xp, c, x: xp.where(c, x, xp.full((), 0.0)), lambda c, x: np.where(c, x, 0.0), booleans(3, 4), X),
        case(lambda xp, c, x, y: xp.where(c, x, y), np.where, booleans(5), integers(5), integers(5, seed=1)),
    ],
    "take": [
        case(lambda xp, x, i: xp.take(x, i), lambda x, i: x[i], random(5, 3), integers(4)),
        case(lambda xp, x, i: xp.take(x, i), lambda x, i: x[i], random(5, 3), integers(2, 3)),
        case(lambda xp, x, i: xp.take(x, i), lambda x, i: x[i], random(5), integers(2, 3)),
        case(lambda xp, x, i: xp.take(x, i, axis=1), lambda x, i: x[:, i], random(2, 5, 3), integers(4)),
        case(lambda xp, x, i: xp.take(x, i, axis=-1), lambda x, i: x[..., i], random(2, 3, 5), integers(2, 2)),
        case(lambda xp, x, i: xp.take(x, i), lambda x, i: x[i], integers(5, 3), integers(4)),
    ],
    "take_along_axis": [
        case(lambda xp, x, i, a=axis: xp.take_along_axis(x, i, a), lambda x, i, a=axis: np.take_along_axis(x, i, a), random(5, 5, 5), indices)
        for axis, indices in ((0, integers(2, 5, 5)), (1, integers(5, 1, 5)), (-1, integers(5, 5, 3)), (-2, integers(5, 4, 5)))
    ],
    "update_slots": [
        case(
            lambda xp, b, n, s: xp.update_slots(b, n, s), update_slots,
            random(rows, 2, 9, 4), random(rows, 2, time, 4, seed=1), np.array(starts, np.int32),
        )
        for rows, time, starts in (
            (1, 1, [0]), (1, 1, [8]), (1, 4, [3]), (1, 4, [5]), (1, 9, [0]), (3, 1, [0, 4, 8]), (3, 4, [5, 0, 2]), (3, 4, [1, 1, 1]),
        )
    ],
    "exp": elementwise("exp", np.exp, random(4, 5)),
    "log": elementwise("log", np.log, POSITIVE),
    "sqrt": elementwise("sqrt", np.sqrt, POSITIVE),
    "rsqrt": elementwise("rsqrt", lambda x: 1 / np.sqrt(x), POSITIVE),
    "sin": elementwise("sin", np.sin, SIGNED),
    "cos": elementwise("cos", np.cos, SIGNED),
    "tanh": elementwise("tanh", np.tanh, SIGNED),
    "sigmoid": elementwise("sigmoid", lambda x: 1 / (1 + np.exp(-x)), SIGNED),
    "erf": elementwise("erf", erf, SIGNED),
    "abs": elementwise("abs", np.abs, SIGNED) + elementwise("abs", np.abs, integers(5) - 2),
    "maximum": [
        case(lambda xp, x, y: xp.maximum(x, y), np.maximum, X, random(3, 1)),
        case(lambda xp, x: xp.maximum(x, 0.25), lambda x: np.maximum(x, 0.25), X),
        case(lambda xp, x: xp.maximum(x, 2), lambda x: np.maximum(x, 2), integers(5)),
    ],
    "minimum": [
        case(lambda xp, x, y: xp.minimum(x, y), np.minimum, X, random(3, 1)),
        case(lambda xp, x: xp.minimum(x, 0.25), lambda x: np.minimum(x, 0.25), X),
        case(lambda xp, x: xp.minimum(x, 2), lambda x: np.minimum(x, 2), integers(5)),
    ],
    "sum": reduction("sum", np.sum, X, integers(3, 4)),
    "mean": reduction("mean", np.mean, X),
    "max": reduction("max", np.max, X, integers(3, 4)),
    "min": reduction("min", np.min, X, integers(3, 4)),
    "any": reduction("any", np.any, booleans(3, 4)),
    "all": reduction("all", np.all, booleans(3, 4)),
    "argmax": [
        case(lambda xp, x: xp.argmax(x), lambda x: np.argmax(x, -1), X),
        case(lambda xp, x: xp.argmax(x, axis=0), lambda x: np.argmax(x, 0), X),
        case(lambda xp, x: xp.argmax(x), lambda x: np.argmax(x, -1), TIES),
        case(lambda xp, x: xp.argmax(x), lambda x: np.argmax(x, -1), np.tile(TIES, 50)),
        case(lambda xp, x: xp.argmax(x), lambda x: np.argmax(x, -1), integers(2, 9)),
    ],
    "cumsum": [
        case(lambda xp, x: xp.cumsum(x), lambda x: np.cumsum(x, -1), X),
        case(lambda xp, x: xp.cumsum(x, axis=0), lambda x: np.cumsum(x, 0), X),
        case(lambda xp, x: xp.cumsum(x, axis=1), lambda x: np.cumsum(x, 1), integers(3, 4)),
    ],
    "top_k": [
        case(lambda xp, x, k=k: xp.top_k(x, k), lambda x, k=k: top_k(x, k), random(3, 6)) for k in (1, 3, 6)
    ] + [case(lambda xp, x: xp.top_k(x, 4), lambda x: top_k(x, 4), random(9))],
    "matmul": [
        case(lambda xp, x, y: xp.matmul(x, y), np.matmul, random(3, 4), random(4, 5)),
        case(lambda xp, x, y: xp.matmul(x, y), np.matmul, random(2, 1, 3, 4), random(5, 4, 2)),
        case(lambda xp, x, y: xp.matmul(x, xp.transpose(y, (0, 2, 1))), lambda x, y: x @ y.transpose(0, 2, 1), X, random(2, 5, 4)),
    ],
    "einsum": [
        case(lambda xp, x, y: xp.einsum("bij,bkj->bik", x, y), lambda x, y: np.einsum("bij,bkj->bik", x, y), X, random(2, 5, 4)),
        case(lambda xp, x: xp.einsum("ijk->ki", x), lambda x: np.einsum("ijk->ki", x), X),
        case(
            lambda xp, x, y, z: xp.einsum("ij,jk,kl->il", x, y, z), lambda x, y, z: x @ y @ z,
            random(2, 3), random(3, 4), random(4, 2),
        ),
    ],
    "plus": [case(lambda xp, x, b: xp.plus(x, b), lambda x, b: x + b, random(2, 3, 4), random(4))],
    "times": [case(lambda xp, x, b: xp.times(x, b), lambda x, b: x * b, random(2, 3, 4), random(4))],
    "linear": [
        case(lambda xp, x, w, b: xp.linear(x, w, b), lambda x, w, b: x @ w.T + b, random(2, 3, 4), random(5, 4), random(5)),
        case(lambda xp, x, w: xp.linear(x, w), lambda x, w: x @ w.T, random(4), random(64, 4)),
    ],
    "embedding": [case(lambda xp, w, i: xp.embedding(w, i), lambda w, i: w[i], random(7, 4), integers(2, 3))],
    # Of packed leaves: test_leaves. Of rows that are computed in several places: training/test_objectives.
    "weight_rows": [case(lambda xp, w: xp.weight_rows(w, 2, 3), lambda w: w[2:5], random(7, 4))],
    "values": [case(lambda xp, w: xp.values(w), lambda w: w, random(7, 4))],
    "all_rows": [case(lambda xp, x: xp.all_rows(x), lambda x: x, random(3, 4))],
    "logsumexp": [
        case(lambda xp, x: xp.logsumexp(x), logsumexp, WIDE),
        case(lambda xp, x: xp.logsumexp(x, axis=0, keepdims=True), lambda x: logsumexp(x, 0, True), WIDE),
        case(lambda xp, x: xp.logsumexp(x, axis=1), lambda x: logsumexp(x, 1), X),
        case(lambda xp, x: xp.logsumexp(x), logsumexp, MASKED),
    ],
    "softmax": [
        case(lambda xp, x: xp.softmax(x), softmax, WIDE),
        case(lambda xp, x: xp.softmax(x), softmax, MASKED),
        case(lambda xp, x: xp.softmax(x, axis=0), lambda x: softmax(x, 0), X),
        case(lambda xp, x: xp.softmax(x, axis=1), lambda x: softmax(x, 1), X),
    ],
    "log_softmax": [
        case(lambda xp, x: xp.log_softmax(x), lambda x: x - logsumexp(x, -1, True), WIDE),
        case(lambda xp, x: xp.log_softmax(x, axis=0), lambda x: x - logsumexp(x, 0, True), X),
    ],
    "silu": elementwise("silu", silu, SIGNED),
    "gelu": [
        case(lambda xp, x: xp.gelu(x), gelu, SIGNED),
        case(lambda xp, x: xp.gelu(x, approximate=True), gelu_tanh, SIGNED),
    ],
    "rms_norm": [
        case(lambda xp, x, w: xp.rms_norm(x, w, 1e-6), rms_norm, X, random(4)),
        case(lambda xp, x, w: xp.rms_norm(x, w, 1e-6, offset=1.0), lambda x, w: rms_norm(x, w, offset=1.0), X, random(4)),
        case(lambda xp, x, w: xp.rms_norm(x, w, 0.5), lambda x, w: rms_norm(x, w, 0.5), X, random(4)),
    ],
    "layer_norm": [
        case(lambda xp, x, w, b: xp.layer_norm(x, w, b, 1e-5), layer_norm, X + 3, random(4), random(4, seed=1)),
        case(lambda xp, x, w, b: xp.layer_norm(x, w, b, 0.5), lambda x, w, b: layer_norm(x, w, b, 0.5), X, random(4), random(4)),
    ],
    "rotate": [
        case(lambda xp, x, c, s: xp.rotate(x, c, s), rotate, random(2, 3, 4, 6), random(2, 1, 4, 3), random(2, 1, 4, 3, seed=1)),
    ],
    "attention": [
        case(lambda xp, q, k, v: xp.attention(q, k, v), attention, Q, K, V),
        case(lambda xp, q, k, v: xp.attention(q, k, v, scale=0.3), lambda q, k, v: attention(q, k, v, scale=0.3), Q, K, V),
        case(lambda xp, q, k, v: xp.attention(q, k, v, scale=0.3), lambda q, k, v: attention(q, k, v, scale=0.3), Q[:, :3], K, V),
        case(lambda xp, q, k, v: xp.attention(q, k, v, scale=0.3), lambda q, k, v: attention(q, k, v, scale=0.3), Q, K[:, :1], V[:, :1]),
        case(lambda xp, q, k, v, m: xp.attention(q, k, v, m), attention, Q, K, V, causal(4, 5)),
        case(lambda xp, q, k, v, m: xp.attention(q, k, v, m, 0.3), lambda q, k, v, m: attention(q, k, v, m, 0.3), Q, K, V, ROW_MASK),
        case(lambda xp, q, k, v, m: xp.attention(q, k, v, m), attention, Q[:, :, -1:], K, V, ROW_MASK[:, :, -1:]),
        case(lambda xp, q, k, v: xp.attention(q, k, v, None, 1.0, 1.5), lambda q, k, v: attention(q, k, v, softcap=1.5), Q, K, V),
        case(lambda xp, q, k, v, m: xp.attention(q, k, v, m, 0.7, 1.5), lambda q, k, v, m: attention(q, k, v, m, 0.7, 1.5), Q, K, V, ROW_MASK),
    ],
}  # fmt: skip

# Methods that the table cannot express, and the test that each has instead.
QUANTIZED = {  # in test_quantized.py
    "kernels": "test_values_rows_and_products",
    "kernel_linears": "test_values_rows_and_products",
    "linears": "test_values_rows_and_products",
    "matrix": "test_experts",
    "kernel_rows": "test_values_rows_and_products",
    "kernel_take": "test_values_rows_and_products",
    "packed_rows": "test_values_rows_and_products",
    "packed_take": "test_values_rows_and_products",
    "packed_linear": "test_values_rows_and_products",
    "without_gradient": "test_gradients_go_through_them",
}
ELSEWHERE = {
    "put": "test_put_takes_every_kind_of_array",
    "get": "test_put_takes_every_kind_of_array",
    "compile": "test_compile_binds_the_module",
    "owns": "test_of_names_the_backend",
    "device_of": "test_devices",
    "check_whole": "test_an_array_in_one_piece",
    "lend": "test_arrays_of_other_backends",
    "adopt": "test_arrays_of_other_backends",
    "devices": "test_devices",
    "pick_device": "test_devices",
    "dtype": "test_dtype_names",
    "expect": "test_expect_names_the_stranger",
    "with_attention": "test_own_attention",
}

# What training needs is tested in test_training_ops.py.
FOR_TRAINING = {
    "value_and_grad": "TestGradients", "stop_gradient": "TestGradients", "block": "TestGradients",
    "for_training": "TestGradients", "loop": "TestLoops", "scan": "TestLoops", "joined": "TestLoops",
    "add_rows": "TestRows", "slice_rows": "TestRows", "add_into": "TestRows", "copy": "TestRows",
    "one_of_equals": "TestRows",
    "dropout": "TestDropout", "native_optimizer": "TestNativeOptimizers",
    "matmul_precision": "test_matmul_precision_is_put_back", "free_memory": "test_memory", "peak_memory": "test_memory",
}  # fmt: skip

# What the docstring of base.py lets model code do without a method.
OPERATORS = [
    case(lambda xp, x, y: x + y, lambda x, y: x + y, X, random(3, 1)),
    case(lambda xp, x, y: x - y, lambda x, y: x - y, X, random(4)),
    case(lambda xp, x, y: x * y / (y * y + 1.0), lambda x, y: x * y / (y * y + 1), X, random(4)),
    case(lambda xp, x: (x * x + 0.5) ** 0.5, lambda x: (x * x + 0.5) ** 0.5, X),
    case(lambda xp, x: 2.0 - 3.0 / (2.0 + x * x), lambda x: 2 - 3 / (2 + x * x), X),
    case(lambda xp, x, y: x @ y, lambda x, y: x @ y, X, random(4, 2)),
    case(lambda xp, x: -x, lambda x: -x, X),
    case(lambda xp, x: (x < 0.1, x <= 0.1, x > 0.1, x >= 0.1), lambda x: (x < 0.1, x <= 0.1, x > 0.1, x >= 0.1), X),
    case(lambda xp, x, y: (x == y, x != y), lambda x, y: (x == y, x != y), integers(3, 4), integers(3, 4, seed=1)),
    case(lambda xp, x, y: (x & y, x | y, ~x), lambda x, y: (x & y, x | y, ~x), booleans(3, 4), booleans(4)),
    case(lambda xp, x: (x[0], x[-1], x[:, 1:], x[..., :2]), lambda x: (x[0], x[-1], x[:, 1:], x[..., :2]), X),
    case(lambda xp, x: (x[:, None], x[:, 0, None, 1:3], x[:, ::2]), lambda x: (x[:, None], x[:, 0, None, 1:3], x[:, ::2]), X),
    case(lambda xp, i: (i + 1, i * 2 - 3, -i), lambda i: (i + 1, i * 2 - 3, -i), integers(3, 4)),
]  # fmt: skip

TABLE = {f"{name}-{index}": case for name, cases in CASES.items() for index, case in enumerate(cases)}
TABLE |= {f"operators-{index}": case for index, case in enumerate(OPERATORS)}

NARROW = {"float64": "float32", "int64": "int32"}


def check(xp, found, wanted, tolerance, dtype=None):
    """Shapes, dtypes and values of an array or a tuple of arrays; the tolerance is relative to the largest value."""
    if isinstance(wanted, tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            check(xp, one, other, tolerance, dtype)
        return
    wanted = np.asarray(wanted)
    assert xp.owns(found), f"a {type(found).__name__} is no array of {xp.name}"
    assert tuple(found.shape) == wanted.shape
    assert xp.dtype(found) == (dtype or NARROW.get(wanted.dtype.name, wanted.dtype.name))
    found = np.asarray(xp.get(found)).astype(np.float64)
    wanted = wanted.astype(np.float64)
    room = tolerance * max(1.0, np.abs(wanted[np.abs(wanted) < 1e29]).max(initial=0.0))
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=room)


def expected(case):
    return case.oracle(*(x.astype(np.float64) if x.dtype == np.float32 else x for x in case.inputs))


@pytest.mark.parametrize("name", TABLE)
def test_operation(backend, name):
    case = TABLE[name]
    found = case.call(backend, *map(backend.array, case.inputs))
    check(backend, found, expected(case), case.tolerance)


@pytest.fixture(scope="module")
def compiled(backend):
    """The whole table as one compiled program."""
    inputs = {f"{name}.{i}": backend.array(x) for name, case in TABLE.items() for i, x in enumerate(case.inputs)}

    def program(inputs):
        return {
            name: case.call(backend, *(inputs[f"{name}.{i}"] for i in range(len(case.inputs))))
            for name, case in TABLE.items()
        }

    return backend.compile(program)(inputs)


@pytest.mark.parametrize("name", TABLE)
def test_operation_compiled(backend, compiled, name):
    check(backend, compiled[name], expected(TABLE[name]), TABLE[name].tolerance)


def public(cls):
    return {name for name in dir(cls) if not name.startswith("_") and callable(getattr(cls, name))}


def test_no_method_is_left_untested():
    from core import test_quantized, test_training_ops

    assert CASES.keys() | ELSEWHERE.keys() | FOR_TRAINING.keys() | QUANTIZED.keys() == public(Backend)
    assert all(callable(getattr(test_quantized, test)) for test in QUANTIZED.values())
    assert not CASES.keys() & (ELSEWHERE | FOR_TRAINING).keys()
    source = Path(test_training_ops.__file__).read_text(encoding="utf-8")
    for method, test in FOR_TRAINING.items():
        assert hasattr(test_training_ops, test) and f".{method}(" in source
    assert all(CASES.values())
    assert all(callable(globals()[test]) for test in ELSEWHERE.values())


def test_backends_offer_nothing_beyond_the_interface(backend):
    assert public(type(backend)) == public(Backend)


# Half precision: what the forward pass of a bfloat16 model uses, and the dtype it must come back in.

HALF = {
    "take", "embedding", "plus", "times", "sum", "mean", "concat", "reshape", "transpose", "update_slots", "matmul", "linear", "einsum", "rms_norm",
    "layer_norm", "softmax", "log_softmax", "attention",
}  # fmt: skip
HALF_CASES = [
    (key, dtype)
    for key, case in TABLE.items()
    for dtype, largest in (("bfloat16", 1e38), ("float16", 65504))
    if key.split("-")[0] in HALF and all(np.abs(x).max(initial=0) < largest for x in case.inputs)
]


@pytest.mark.parametrize("name, dtype", HALF_CASES)
def test_operation_in_half_precision(backend, name, dtype):
    case = TABLE[name]
    stored = np.dtype(getattr(ml_dtypes, dtype, dtype))
    inputs = [x.astype(stored) if x.dtype == np.float32 else x for x in case.inputs]
    wanted = case.oracle(*(x.astype(np.float64) if x.dtype == stored else x for x in inputs))
    found = case.call(backend, *map(backend.array, inputs))
    out = "float32" if name.startswith("log_softmax") else dtype if case.inputs[0].dtype == np.float32 else None
    check(backend, found, wanted, 1e-2 if dtype == "bfloat16" else 2e-3, out)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norms_and_softmax_keep_float32_inside(backend, dtype):
    x = np.array([[3e-4, 60.0, 200.0, -300.0] * 64], np.float32).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    weight = np.ones(256, np.float32)
    wanted = rms_norm(x.astype(np.float64), weight)  # 300² * 64 overflows float16
    found = backend.get(backend.rms_norm(backend.array(x), backend.array(weight), 1e-6)).astype(np.float64)
    np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-7)
    many = np.zeros((1, 5000), x.dtype)  # 5000 equal shares: a half-precision sum stops growing at 256 or 2048
    shares = backend.get(backend.softmax(backend.array(many))).astype(np.float64)
    np.testing.assert_allclose(shares, 1 / 5000, rtol=1e-2)


def test_long_sums_do_not_drift(backend):
    """Sampling inverts a cumulative sum over the vocabulary: a drift would pick other tokens than other backends do."""
    shares = np.exp(random(1, 262144, scale=3.0))
    wanted = np.cumsum(shares.astype(np.float64), -1)
    found = backend.get(backend.cumsum(backend.array(shares))).astype(np.float64)
    assert np.abs(found - wanted).max() < 1e-6 * wanted[0, -1]
    total = backend.get(backend.sum(backend.array(shares)))
    assert abs(total - wanted[0, -1]) < 1e-6 * wanted[0, -1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_of_16_bits_are_taken_in_float32(backend, dtype):
    ones = backend.array(np.ones(4097, np.float32), dtype)  # one by one, 16 bits stop at 256 or 2048
    assert float(backend.get(backend.sum(ones))) == 4096 and float(backend.get(backend.mean(ones))) == 1
    assert np.asarray(backend.get(backend.cumsum(ones)))[-1] == 4096
    assert float(backend.get(backend.logsumexp(backend.log(ones)))) == pytest.approx(np.log(4097), rel=2**-8)
    x = backend.array(np.random.default_rng(0).random((4096, 8), np.float32) / 16, dtype)
    wanted = np.asarray(backend.get(x), np.float64).sum(0)
    found = np.asarray(backend.get(backend.sum(x, axis=0)), np.float64)
    np.testing.assert_allclose(found, wanted, rtol=2**-8 if dtype == "bfloat16" else 2**-10)


# linear has several forms, chosen by rows, outputs and dtype.


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [64, 100, 192, 17000, 17408])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 40])
def test_linear_forms(backend, rows, outputs, bias):
    x, weight, b = random(rows, 16), random(outputs, 16, seed=1), random(outputs, seed=2)
    wanted = x.astype(np.float64) @ weight.T.astype(np.float64) + (b if bias else 0)
    w, b = backend.array(weight), backend.array(b) if bias else None
    for shape in ((rows, 16), (rows, 1, 16), (1, rows, 16)):
        found = backend.linear(backend.array(x.reshape(shape)), w, b)
        check(backend, found, wanted.reshape(*shape[:-1], outputs), 2e-6)
    strided = backend.transpose(backend.array(np.ascontiguousarray(x.T)), (1, 0))
    check(backend, backend.linear(strided, w, b), wanted, 2e-6)
    tall = backend.transpose(backend.array(np.ascontiguousarray(weight.T)), (1, 0))
    check(backend, backend.linear(backend.array(x), tall, b), wanted, 2e-6)


# Arrays in and out.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool"])
def test_dtype_names(backend, dtype):
    assert backend.dtype(backend.zeros((2,), dtype)) == dtype
    assert backend.dtype(backend.cast(backend.arange(2), dtype)) == dtype
    assert backend.dtype(backend.put(np.ones(2, np.dtype(getattr(ml_dtypes, dtype, dtype))))) == dtype


def aligned(shape, dtype=np.float32):
    raw = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + len(raw) - 64].view(dtype).reshape(shape)


def readonly(x):
    x.flags.writeable = False
    return x


KINDS = {
    "scalar": lambda dtype: np.array(3).astype(dtype),
    "empty": lambda dtype: np.zeros((0, 3), dtype),
    "aligned": lambda dtype: aligned((4, 16), dtype),
    "transposed": lambda dtype: np.arange(12).reshape(3, 4).astype(dtype).T,
    "strided": lambda dtype: np.arange(24).reshape(4, 6).astype(dtype)[::2, 1::2],
    "reversed": lambda dtype: np.arange(6).astype(dtype)[::-1],
    "read-only": lambda dtype: readonly(aligned((4, 16), dtype)),
    "unaligned": lambda dtype: aligned((17,), dtype)[1:],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_put_takes_every_kind_of_array(backend, kind, dtype):
    array = KINDS[kind](np.dtype(getattr(ml_dtypes, dtype, dtype)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = backend.put(array)
        back = backend.get(x)
    assert isinstance(back, np.ndarray)
    assert backend.owns(x) and backend.dtype(x) == dtype and tuple(x.shape) == array.shape
    assert back.dtype == array.dtype and back.tobytes() == array.tobytes()


def test_put_adopts_aligned_memory(backend):
    array = aligned((256, 1024))
    x = backend.put(array)
    array[3, 5] = 7.0  # forbidden to users: it shows whose memory the weights are in
    assert backend.get(x)[3, 5] == 7.0


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_array_copies(backend, dtype):
    source = aligned((64, 64))
    x = backend.array(source, dtype)
    source[:] = 1.0
    assert not backend.get(x).any()


def test_writing_never_reaches_another_framework():
    """A cache that torch or numpy writes in place shares no memory with what JAX or TensorFlow were given."""
    start = np.array([1], np.int32)
    for name in backends.installed():
        xp = backends.get_backend(name, "cpu")
        buffer = xp.array(aligned((1, 2, 16, 32)))
        others = [backends.get_backend(n, "cpu").array(xp.get(buffer)) for n in backends.installed()]
        xp.update_slots(buffer, xp.array(np.ones((1, 2, 4, 32), np.float32)), xp.array(start))
        for other in others:
            assert not np.asarray(other).any()


# compile


@dataclass
class Twice(Module):
    inner: nn.Linear
    layers: list
    factor: float

    def __call__(self, xp, x):
        for layer in (self.inner, *self.layers):
            x = layer(xp, x) * self.factor
        return x


@pytest.mark.parametrize("hot", [True, False])
def test_compile_binds_the_module(backend, hot):
    skeleton = Twice(nn.Linear.abstract(4, 4), [nn.Linear.abstract(4, 4, bias=True)], 2.0)
    values = {"inner.weight": random(4, 4), "layers.0.weight": random(4, 4, seed=1), "layers.0.bias": random(4)}
    x = random(3, 4)
    fn = backend.compile(lambda module, x, y: {"sum": module(backend, x) + y}, skeleton, hot=hot)
    for shift in (0.0, 1.0):  # a new dict is a new model
        params = {name: backend.array(value + np.float32(shift)) for name, value in values.items()}
        w = {name: value.astype(np.float64) + shift for name, value in values.items()}
        wanted = 2 * ((2 * x @ w["inner.weight"].T) @ w["layers.0.weight"].T + w["layers.0.bias"]) + 1
        found = fn(params, backend.array(x), backend.array(1.0))
        assert found.keys() == {"sum"}
        check(backend, found["sum"], wanted, 1e-5)
    assert isinstance(skeleton.inner.weight.shape, tuple)  # still a Spec


@pytest.mark.parametrize("rows", [1, 3])
def test_donated_cache(backend, rows):
    """Several steps over one donated buffer; the positions are arrays, so one program serves them all."""
    traces = []

    def step(new, start, cache):
        traces.append(1)
        return {"total": backend.sum(new)}, {"k": backend.update_slots(cache["k"], new, start)}

    fn = backend.compile(step, donate=(2,))
    wanted = np.zeros((rows, 2, 8, 4))
    cache = {"k": backend.zeros(wanted.shape)}
    for index in range(4):
        new, start = random(rows, 2, 2, 4, seed=index), np.arange(rows, dtype=np.int32) + index
        wanted = update_slots(wanted, new, start)
        before = cache
        total, cache = fn(backend.array(new), backend.array(start), cache)
        check(backend, total["total"], new.astype(np.float64).sum(), 1e-5)
    check(backend, cache["k"], wanted, 0.0)
    if backend.name in ("numpy", "torch"):
        assert np.shares_memory(backend.get(before["k"]), backend.get(cache["k"]))  # no copy of the cache per token
    else:
        assert len(traces) == 1
    if backend.name == "jax":
        assert before["k"].is_deleted()


# Choosing a backend and a device.


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_listing_and_opening_imports_no_other_framework():
    code = """
        import sys
        from modelhub.core import backends, nn, tree
        from modelhub import families
        backends.installed()
        backends.get_backend("numpy")
        print([name for name in ("jax", "torch", "tensorflow") if name in sys.modules])
    """
    assert run_python("\n".join(line.strip() for line in code.splitlines())) == "[]"


def test_installed_are_in_order_of_preference():
    assert backends.installed() == [
        name for name in ("jax", "torch", "tensorflow", "numpy") if name in backends.installed()
    ]
    assert "numpy" in backends.installed()


def test_default_backend(monkeypatch):
    monkeypatch.setattr(backends, "_default", None)
    monkeypatch.setattr(backends, "_automatic", lambda: "numpy")
    monkeypatch.delenv("MODELHUB_BACKEND", raising=False)
    assert backends.get_backend().name == "numpy"
    monkeypatch.setenv("MODELHUB_BACKEND", "nonsense")
    with pytest.raises(UnknownBackend, match="'nonsense'.*numpy"):
        backends.get_backend()
    backends.set_backend("numpy")
    assert backends.get_backend() is backends.get_backend("numpy", "cpu")
    backends.set_backend(None)
    with pytest.raises(UnknownBackend):
        backends.get_backend()


@pytest.mark.parametrize("accelerator, chosen", [(False, "jax"), (True, "torch")])
def test_automatic_choice_prefers_who_sees_an_accelerator(monkeypatch, accelerator, chosen):
    def fake(devices):
        return SimpleNamespace(devices=lambda: devices)

    classes = {"jax": fake(["cpu"]), "torch": fake(["gpu:0", "cpu"]), "numpy": fake(["cpu"])}
    monkeypatch.setattr(backends, "installed", lambda: list(classes))
    monkeypatch.setattr(backends, "backend_class", classes.__getitem__)
    monkeypatch.setattr(backends, "_machine_has_accelerator", lambda: accelerator)
    assert backends._automatic.__wrapped__() == chosen


def test_unknown_backend():
    for choose in (backends.get_backend, backends.set_backend, backends.backend_class):
        with pytest.raises(UnknownBackend, match="'theano'.*jax, torch, tensorflow, numpy"):
            choose("theano")


@pytest.mark.parametrize("name", ["jax", "torch", "tensorflow"])
def test_missing_backend(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, f"modelhub.core.backends.{name}", raising=False)
    assert name not in backends.installed()
    with pytest.raises(BackendNotInstalled, match=rf"{name} is not installed.*numpy.*pip install 'modelhub\[{name}\]'"):
        backends.get_backend(name)


def test_a_framework_with_a_missing_part_is_not_called_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    monkeypatch.delitem(sys.modules, "modelhub.core.backends.numpy", raising=False)
    with pytest.raises(ModuleNotFoundError, match="ml_dtypes"):
        backends.backend_class("numpy")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "bool"])
@pytest.mark.parametrize("source,target", [*itertools.permutations(backends.installed(), 2)])
def test_arrays_of_other_backends(source, target, dtype):
    old, new = backends.get_backend(source, "cpu"), backends.get_backend(target, "cpu")
    for shape in ((), (0, 3), (5,), (3, 4)):
        found = new.adopt(old.full(shape, dtype == "bool" or 1, dtype), old)
        assert new.owns(found) and new.dtype(found) == dtype and tuple(found.shape) == shape
        np.testing.assert_array_equal(np.asarray(new.get(found), np.float32), np.ones(shape, np.float32))


def test_devices(backend):
    cls = type(backend)
    seen = cls.devices()
    assert seen[-1] == "cpu" and len(set(seen)) == len(seen)
    assert cls.pick_device(None) == seen[0]
    assert cls.pick_device("cpu") == "cpu" == backend.device
    assert cls.device_of(backend.array([1.0])) in ("cpu", None)
    for device in seen:
        assert cls.pick_device(device) == device
    with pytest.raises(DeviceError, match=f"'abacus:3'.*{backend.name} sees only: .*cpu"):
        cls.pick_device("abacus:3")
    assert repr(backend) == f"<backend {backend.name} on cpu>"


def test_device_spellings(backend, monkeypatch):
    cls = type(backend)
    monkeypatch.setattr(cls, "devices", classmethod(lambda cls: ["gpu:0", "gpu:1", "cpu"]))
    picked = [cls.pick_device(device) for device in (None, "gpu", "gpu:1", "cuda", "cuda:1", "cpu")]
    assert picked == ["gpu:0", "gpu:0", "gpu:1", "gpu:0", "gpu:1", "cpu"]
    with pytest.raises(DeviceError, match="'gpu:2'"):
        cls.pick_device("gpu:2")


def test_unseen_device_raises():
    with pytest.raises(DeviceError, match="'gpu' was asked for, but numpy sees only: cpu"):
        backends.get_backend("numpy", "gpu")


def test_backends_are_opened_once():
    assert backends.get_backend("numpy", "cpu") is backends.get_backend("numpy")


def test_of_names_the_backend(backend):
    assert backends.of({"a": backend.zeros((1,)), "b": backend.array([1])}) == backend.name
    assert not backend.owns([1.0]) and not backend.owns("text")


@pytest.mark.parametrize("other", backends.installed())
def test_mixed_backends_name_both(backend, other):
    arrays = {"model.a": backend.zeros((1,)), "model.b": backends.get_backend(other, "cpu").zeros((1,))}
    if other == backend.name:
        assert backends.of(arrays) == other
        return
    with pytest.raises(MixedBackends, match=f"model.a is on {backend.name} and model.b is on {other}"):
        backends.of(arrays)


def test_own_attention(backend):
    """Gets what ours gets; and what it could not be told is refused."""
    xp = backend.with_attention(lambda q, k, v, mask, *, scale: (q * scale, k, v, mask))
    training = xp.for_training(xp.array([1, 2], "int32"))
    q, k, mask = xp.full((2, 4, 3, 2), 1.0), xp.zeros((2, 2, 3, 2)), xp.array(causal(3, 3))
    for each in (xp, training):
        scaled, *rest = each.attention(q, k, k, mask, 0.5)
        assert [x is y for x, y in zip(rest, (k, k, mask), strict=True)] == [True] * 3
        np.testing.assert_array_equal(backend.get(scaled), np.full((2, 4, 3, 2), 0.5))
    assert backend.own_attention is None
    with pytest.raises(ConfigError, match="caps its attention scores at 50"):
        xp.attention(q, k, k, softcap=50.0)
    with pytest.raises(ConfigError, match="attention_probs_dropout_prob to 0"):
        training.attention(q, k, k, dropout=0.1)
    xp.attention(q, k, k, dropout=0.1)  # not training: nothing is dropped


@pytest.mark.parametrize("other", backends.installed())
def test_expect_names_the_stranger(backend, other):
    stranger = backends.get_backend(other, "cpu").zeros((1,), "int32")
    if other == backend.name:
        assert backend.expect(ids=stranger) is None
        return
    with pytest.raises(MixedBackends, match=f"^ids is a .*, but the model is on {backend.name}"):
        backend.expect(weight=backend.zeros((1,)), ids=stranger)


def test_of_refuses_what_is_no_array(backend):
    with pytest.raises(InputError, match="model.b is a list"):
        backends.of({"model.a": backend.zeros((1,)), "model.b": [1.0]})
    with pytest.raises(InputError, match="no array"):
        backends.of({})


def test_an_array_in_one_piece(backend):  # test_to_training.py has sharded ones
    assert backend.check_whole("a", backend.zeros((1,))) is None


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "tensorflow", "numpy"])
def test_of_knows_frameworks_that_modelhub_has_not_opened(framework):
    """A torch tensor handed to a JAX model is a mixture, also before any model was loaded on torch."""
    if framework not in backends.installed():
        pytest.skip(f"{framework} is not installed")
    make = {"torch": "torch.zeros(1)", "tensorflow": "tensorflow.zeros(1)", "numpy": "numpy.zeros(1)"}[framework]
    code = f"import {framework}; from modelhub.core import backends; print(backends.of({{'x': {make}}}))"
    assert run_python(code) == framework
