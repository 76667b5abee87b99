"""The ONNX standard's own reference cases, an oracle that nobody here wrote, on every backend.

`onnx.backend.test.case.node` holds inputs, attributes and expected outputs of each operator. A mapping below turns a
case into calls of our operations, or returns None for what we do not have (interleaved rotary embedding, additive
attention biases, negative indices, ...).
"""

import functools
import warnings
from collections import defaultdict

import ml_dtypes
import numpy as np
import pytest

from modelhub.core.decoder import causal_mask

onnx = pytest.importorskip("onnx")

HALF = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
KINDS = (np.float32, np.float64, np.int32, np.int64, np.bool_, *HALF)


@pytest.fixture(scope="module")
def cases():
    """{operator: [(name, {input: array}, attributes, outputs)]}; cases of several nodes are other tests' business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        collected = collect_testcases(None)
    found = defaultdict(list)
    for case in collected:
        if case.model is None or len(case.model.graph.node) != 1:
            continue
        node = case.model.graph.node[0]
        inputs, outputs = case.data_sets[0]
        arrays = [x for x in (*inputs, *outputs) if x is not None]
        if not all(isinstance(x, np.ndarray | np.generic) and np.asarray(x).dtype in KINDS for x in arrays):
            continue
        names = [name for name in node.input if name]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        found[node.op_type].append(
            (case.name, dict(zip(names, map(np.asarray, inputs), strict=True)), attributes, outputs)
        )
    return found


# Mappings: (xp, inputs, attributes) -> the first outputs as arrays of the backend, or None for what does not map.


def operation(method, *attributes):
    """A method whose arguments are the node's inputs; only the given attributes may be present."""

    def run(xp, inputs, given):
        if set(given) - set(attributes):
            return None
        return getattr(xp, method)(*map(xp.array, inputs.values()), **given)

    return run


def operator(function):
    return lambda xp, inputs, given: function(*map(xp.array, inputs.values()))


def heads(xp, x, count):
    batch, time, width = x.shape
    return xp.transpose(xp.reshape(x, (batch, time, count, width // count)), (0, 2, 1, 3))


def attention(xp, inputs, given):
    if set(given) - {
        "is_causal",
        "scale",
        "softcap",
        "q_num_heads",
        "kv_num_heads",
        "left_window_size",
        "right_window_size",
    }:
        return None
    q, k, v = (xp.array(inputs[name]) for name in "QKV")
    flat = inputs["Q"].ndim == 3
    if flat:
        q, k, v = (
            heads(xp, q, given["q_num_heads"]),
            heads(xp, k, given["kv_num_heads"]),
            heads(xp, v, given["kv_num_heads"]),
        )
    past = 0
    if "past_key" in inputs:
        past = inputs["past_key"].shape[2]
        k, v = xp.concat([xp.array(inputs["past_key"]), k], 2), xp.concat([xp.array(inputs["past_value"]), v], 2)
    batch, _, time, width = q.shape
    length = k.shape[2]
    window, right = given.get("left_window_size", -1), given.get("right_window_size", -1)
    if v.shape[-1] != width or right != -1 or (window != -1 and not given.get("is_causal")):
        return None
    mask = np.ones((1, 1, 1, length), bool)
    if (bias := inputs.get("attn_mask")) is not None:
        if bias.dtype != bool:
            if not np.isin(bias, (0.0, -np.inf)).all():
                return None  # an additive bias
            bias = bias == 0
        if bias.ndim < 2 or bias.shape[-1] != length or (bias.ndim > 2 and bias.shape[-3] != 1):
            return None
        mask = mask & bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    used = inputs.get("nonpad_kv_seqlen")
    if used is not None:
        mask = mask & (np.arange(length) < used[:, None])[:, None, None]
    if given.get("is_causal"):
        start = np.full(1, past) if used is None else used - time
        positions = start[:, None] + np.arange(time)
        mask = mask & causal_mask(positions, np.arange(length)[None], None if window == -1 else window + 1)
    if not mask.any(-1).all():
        return None  # a row that sees nothing: 0 in ONNX, undefined here
    whole = None if mask.all() else xp.array(np.broadcast_to(mask, (mask.shape[0], 1, time, length)))
    y = xp.attention(q, k, v, whole, given.get("scale", width**-0.5), given.get("softcap") or None)
    if flat:
        y = xp.reshape(xp.transpose(y, (0, 2, 1, 3)), (batch, time, -1))
    return (y, k, v) if "past_key" in inputs else y


def rotary(xp, inputs, given):
    if given.get("interleaved") or given.get("rotary_embedding_dim"):
        return None
    x, cos, sin = (xp.array(inputs[name]) for name in ("input", "cos_cache", "sin_cache"))
    if "position_ids" in inputs:
        positions = xp.array(inputs["position_ids"])
        cos, sin = xp.take(cos, positions), xp.take(sin, positions)
    cos, sin = xp.expand_dims(cos, 1), xp.expand_dims(sin, 1)
    if len(x.shape) == 4:
        return xp.rotate(x, cos, sin)
    y = xp.rotate(heads(xp, x, given["num_heads"]), cos, sin)
    return xp.reshape(xp.transpose(y, (0, 2, 1, 3)), x.shape)


def norm(method, default_eps):
    """Norms over the axes from `axis` on: over the last axis, once those are flattened."""

    def run(xp, inputs, given):
        x, *weights = inputs.values()
        rows = x.shape[: given.get("axis", -1) % x.ndim]
        y = getattr(xp, method)(
            xp.reshape(xp.array(x), (*rows, -1)),
            *(xp.reshape(xp.array(w), (-1,)) for w in weights),
            given.get("epsilon", default_eps),
        )
        return xp.reshape(y, x.shape)

    return run


def reduction(method):
    def run(xp, inputs, given):
        x, *axes = inputs.values()
        axes = axes[0].tolist() if axes else []
        if x.size == 0 or x.dtype == bool or len(axes) > 1 or given.get("noop_with_empty_axes"):
            return None
        if not axes and method == "logsumexp":
            return None
        return getattr(xp, method)(xp.array(x), axis=axes[0] if axes else None, keepdims=bool(given.get("keepdims", 1)))

    return run


def gather(xp, inputs, given):
    data, indices = inputs.values()
    if (indices < 0).any():
        return None
    return xp.take(xp.array(data), xp.array(indices), given.get("axis", 0))


def gather_elements(xp, inputs, given):
    data, indices = inputs.values()
    if (indices < 0).any():
        return None
    return xp.take_along_axis(xp.array(data), xp.array(indices), given.get("axis", 0))


def cumsum(xp, inputs, given):
    x, axis = inputs.values()
    return None if given else xp.cumsum(xp.array(x), int(axis))


def top_k(xp, inputs, given):
    x, k = inputs.values()
    if given.get("largest") == 0 or given.get("axis", -1) % x.ndim != x.ndim - 1:
        return None
    values, indices = xp.top_k(xp.array(x), int(k[0]))
    return values if len(np.unique(x)) < x.size else (values, indices)  # the order of ties is free here


def argmax(xp, inputs, given):
    if given.get("select_last_index"):
        return None
    axis = given.get("axis", 0)
    y = xp.argmax(xp.array(inputs["data"]), axis)
    return xp.expand_dims(y, axis) if given.get("keepdims", 1) else y


def einsum(xp, inputs, given):
    equation = given["equation"].decode().replace(" ", "")
    if "." in equation or "->" not in equation or equation == "->":
        return None
    return xp.einsum(equation, *map(xp.array, inputs.values()))


def matmul(xp, inputs, given):
    return None if any(x.ndim < 2 for x in inputs.values()) else xp.matmul(*map(xp.array, inputs.values()))


def gemm(xp, inputs, given):
    if given != {"transB": 1} or inputs.get("c", np.zeros((1, 1))).shape[0] != 1:
        return None
    return xp.linear(*(xp.array(x.ravel() if name == "c" else x) for name, x in inputs.items()))


def gelu(xp, inputs, given):
    return xp.gelu(xp.array(inputs["x"]), approximate=given.get("approximate") == b"tanh")


def swish(xp, inputs, given):
    return xp.silu(xp.array(inputs["x"])) if given.get("alpha", 1.0) == 1.0 else None


def swiglu(xp, inputs, given):
    return xp.silu(xp.array(inputs["a"])) * xp.array(inputs["b"]) if given.get("alpha", 1.0) == 1.0 else None


def tensor_scatter(xp, inputs, given):
    if given.get("mode") == b"circular":
        return None
    cache, update, start = map(xp.array, inputs.values())
    if len(cache.shape) == 4:
        return xp.update_slots(cache, update, start)
    return xp.update_slots(xp.expand_dims(cache, 1), xp.expand_dims(update, 1), start)[:, 0]


def expand(xp, inputs, given):
    x, shape = inputs.values()
    return xp.broadcast_to(xp.array(x), np.broadcast_shapes(x.shape, tuple(shape.tolist())))


def concat(xp, inputs, given):
    return xp.concat([*map(xp.array, inputs.values())], given["axis"])


def split(xp, inputs, given):
    x, *sizes = inputs.values()
    axis, parts = given.get("axis", 0), given.get("num_outputs")
    return tuple(xp.split(xp.array(x), parts, axis)) if not sizes and parts and x.shape[axis] % parts == 0 else None


def transpose(xp, inputs, given):
    return xp.transpose(xp.array(inputs["data"]), given.get("perm", [2, 1, 0]))


def unsqueeze(xp, inputs, given):
    x, axes = inputs.values()
    return xp.expand_dims(xp.array(x), int(axes[0])) if len(axes) == 1 else None


def pairwise(method):
    return lambda xp, inputs, given: getattr(xp, method)(*map(xp.array, inputs.values())) if len(inputs) == 2 else None


# Operator: its mapping, and how many cases (onnx 1.23) must run at least.
MAPPINGS = {
    "Attention": (attention, 30),
    "RotaryEmbedding": (rotary, 3),
    "RMSNormalization": (norm("rms_norm", 1e-5), 19),
    "LayerNormalization": (norm("layer_norm", 1e-5), 19),
    "TensorScatter": (tensor_scatter, 2),
    "Gelu": (gelu, 4),
    "Swish": (swish, 1),
    "SwiGLU": (swiglu, 2),
    "Softmax": (operation("softmax", "axis"), 7),
    "LogSoftmax": (operation("log_softmax", "axis"), 7),
    "Erf": (operation("erf"), 1),
    "Tanh": (operation("tanh"), 2),
    "Sigmoid": (operation("sigmoid"), 2),
    "Exp": (operation("exp"), 2),
    "Log": (operation("log"), 2),
    "Sqrt": (operation("sqrt"), 2),
    "Sin": (operation("sin"), 2),
    "Cos": (operation("cos"), 2),
    "Abs": (operation("abs"), 1),
    "Where": (operation("where"), 2),
    "Gather": (gather, 3),
    "GatherElements": (gather_elements, 2),
    "CumSum": (cumsum, 5),
    "TopK": (top_k, 4),
    "ArgMax": (argmax, 8),
    "Einsum": (einsum, 6),
    "MatMul": (matmul, 4),
    "Gemm": (gemm, 1),
    "ReduceSum": (reduction("sum"), 6),
    "ReduceMean": (reduction("mean"), 6),
    "ReduceMax": (reduction("max"), 6),
    "ReduceMin": (reduction("min"), 6),
    "ReduceLogSumExp": (reduction("logsumexp"), 4),
    "Max": (pairwise("maximum"), 4),
    "Min": (pairwise("minimum"), 4),
    "Expand": (expand, 2),
    "Concat": (concat, 12),
    "Split": (split, 3),
    "Transpose": (transpose, 6),
    "Unsqueeze": (unsqueeze, 3),
    "Neg": (operator(lambda x: -x), 2),
    "Add": (operator(lambda x, y: x + y), 2),
    "Sub": (operator(lambda x, y: x - y), 2),
    "Mul": (operator(lambda x, y: x * y), 2),
    "And": (operator(lambda x, y: x & y), 5),
    "Or": (operator(lambda x, y: x | y), 5),
    "Not": (operator(lambda x: ~x), 3),
    "Less": (operator(lambda x, y: x < y), 2),
    "GreaterOrEqual": (operator(lambda x, y: x >= y), 2),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_onnx_cases(backend, cases, name):
    mapping, at_least = MAPPINGS[name]
    ran = 0
    for case, inputs, attributes, outputs in cases[name]:
        # One program a case: JAX would compile its operations one by one.
        found = backend.compile(functools.partial(mapping, backend, inputs, attributes), hot=False)()
        if found is None:
            continue
        ran += 1
        found = found if isinstance(found, tuple) else (found,)
        for one, wanted in zip(found, outputs, strict=False):
            wanted = np.asarray(wanted)
            tolerance = 1e-2 if wanted.dtype in HALF else 2e-5
            assert tuple(one.shape) == wanted.shape, case
            actual, wanted = (np.asarray(x).astype(np.float64) for x in (backend.get(one), wanted))
            np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance, err_msg=case)
    assert ran >= at_least, f"{ran} of {len(cases[name])} cases of {name} ran"


def test_that_enough_of_the_standard_is_covered(cases):
    assert sum(at_least for _, at_least in MAPPINGS.values()) >= 200
    assert all(len(cases[name]) >= at_least for name, (_, at_least) in MAPPINGS.items())
