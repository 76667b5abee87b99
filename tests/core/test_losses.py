"""Losses and metrics on every framework's arrays, against those of torch, optax and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow as tf
import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from modelhub import losses, metrics
from modelhub.core.backends import backend_of, get_backend
from modelhub.errors import InputError, MixedBackends

RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.standard_normal((4, 6, 11)).astype(np.float32)
LABELS = np.where(RNG.random((4, 6)) < 0.3, -100, RNG.integers(0, 11, (4, 6))).astype(np.int32)
SOFT = RNG.dirichlet(np.ones(11), (4, 6)).astype(np.float32)
CASES = [
    {}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"reduction": "none", "label_smoothing": 0.2},
    {"ignore_index": 3, "reduction": "none"},
]  # fmt: skip


def torchs(logits, labels, **options):
    """torch's own, whose classes are axis 1."""
    labels = torch.tensor(labels)
    labels = labels.movedim(-1, 1) if labels.is_floating_point() else labels.long()
    logits = logits if isinstance(logits, torch.Tensor) else torch.tensor(logits)
    return F.cross_entropy(logits.movedim(-1, 1), labels, **options)


def labels_for(options):
    """Where another index is ignored, -100 is a wrong label."""
    return np.where(LABELS == -100, options.get("ignore_index", -100), LABELS).astype(np.int32)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_cross_entropy_is_torchs(backend, options):
    labels = labels_for(options)
    found = losses.cross_entropy(backend.array(LOGITS), backend.array(labels), **options)
    assert backend.owns(found) and backend.dtype(found) == "float32"
    np.testing.assert_allclose(backend.get(found), torchs(LOGITS, labels, **options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [CASES[0], CASES[1], CASES[3]], ids=str)
def test_soft_labels(backend, options):
    found = losses.cross_entropy(backend.array(LOGITS), backend.array(SOFT), **options)
    np.testing.assert_allclose(backend.get(found), torchs(LOGITS, SOFT, **options), rtol=1e-5, atol=1e-6)


def test_cross_entropy_is_optaxs():
    labels = np.where(LABELS < 0, 0, LABELS)
    found = losses.cross_entropy(jnp.array(LOGITS), jnp.array(labels), reduction="none")
    optaxs = optax.softmax_cross_entropy_with_integer_labels(LOGITS, labels)
    np.testing.assert_allclose(found, optaxs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("items", [None, 7, np.float32(31.0)], ids=str)
def test_causal_lm_loss_is_that_of_transformers(backend, items):
    theirs = ForCausalLMLoss(torch.tensor(LOGITS), torch.tensor(LABELS).long(), 11, num_items_in_batch=items)
    given = backend.array(items) if isinstance(items, np.generic) else items
    found = losses.causal_lm_loss(backend.array(LOGITS), backend.array(LABELS), given)
    np.testing.assert_allclose(backend.get(found), theirs, rtol=1e-5)


def test_large_logits_keep_their_digits(backend):
    logits = LOGITS + np.float32(2.0**14)
    found = losses.cross_entropy(backend.array(logits), backend.array(LABELS))
    np.testing.assert_allclose(backend.get(found), torchs(logits, LABELS), rtol=1e-6)


def test_half_precision_is_computed_in_float32(backend):
    logits = backend.array(LOGITS, "bfloat16")
    rounded = backend.get(backend.cast(logits, "float32"))
    found = losses.cross_entropy(logits, backend.array(LABELS), label_smoothing=0.1)
    assert backend.dtype(found) == "float32"
    np.testing.assert_allclose(backend.get(found), torchs(rounded, LABELS, label_smoothing=0.1), rtol=1e-5)


@pytest.mark.parametrize("plain", [np.int64, list])
def test_either_may_be_numpys_or_a_list(backend, plain):
    def without(x):
        return x.tolist() if plain is list else x.astype(np.int64 if x.dtype.kind == "i" else np.float64)

    logits, labels = backend.array(LOGITS), backend.array(LABELS)
    for function in (losses.cross_entropy, losses.causal_lm_loss, metrics.accuracy, metrics.causal_lm_accuracy):
        wanted = backend.get(function(logits, labels))
        for given in ((logits, without(LABELS)), (without(LOGITS), labels)):
            found = function(*given)
            assert backend.owns(found)
            np.testing.assert_allclose(backend.get(found), wanted, rtol=1e-6)


def test_numpys_beside_tracers():
    wanted = losses.cross_entropy(LOGITS, LABELS)
    assert jax.jit(lambda labels: losses.cross_entropy(LOGITS, labels))(LABELS) == pytest.approx(wanted)
    assert float(tf.function(lambda y: losses.cross_entropy(LOGITS, y))(LABELS)) == pytest.approx(wanted)


# --- metrics, counted by hand -----------------------------------------------------------------------------------------


def by_hand(logits, labels, k):
    places = np.argsort(-logits, axis=-1)[..., :k]
    return (places == labels[..., None]).any(-1)[labels != -100].mean()


@pytest.mark.parametrize("k", [1, 3, 11])
def test_accuracy(backend, k):
    logits, labels = backend.array(LOGITS), backend.array(LABELS)
    found = metrics.top_k_accuracy(logits, labels, k)
    assert backend.dtype(found) == "float32"
    np.testing.assert_allclose(backend.get(found), by_hand(LOGITS, LABELS, k), rtol=1e-6)
    if k == 1:
        np.testing.assert_array_equal(backend.get(metrics.accuracy(logits, labels)), backend.get(found))
        soft = metrics.accuracy(logits, backend.array(SOFT))
        np.testing.assert_allclose(backend.get(soft), by_hand(LOGITS, SOFT.argmax(-1), 1), rtol=1e-6)


def test_causal_lm_accuracy(backend):
    found = metrics.causal_lm_accuracy(backend.array(LOGITS), backend.array(LABELS))
    np.testing.assert_allclose(backend.get(found), by_hand(LOGITS[:, :-1], LABELS[:, 1:], 1), rtol=1e-6)


def test_what_is_no_answer_is_not_right(backend):
    logits = np.full((3, 4), np.nan, np.float32)
    assert backend.get(metrics.accuracy(backend.array(logits), backend.array([0, 1, 2]))) == 0
    logits[:] = 0  # all alike
    assert backend.get(metrics.accuracy(backend.array(logits), backend.array([0, 1, -1]))) == pytest.approx(2 / 3)
    assert np.isnan(backend.get(losses.cross_entropy(backend.array(logits), backend.array([0, 4, -1]))))


# --- where the frameworks' own losses work ----------------------------------------------------------------------------


def torchs_gradient():
    logits = torch.tensor(LOGITS, requires_grad=True)
    theirs = ForCausalLMLoss(logits, torch.tensor(LABELS).long(), 11)
    theirs.backward()
    return theirs.item(), logits.grad.numpy()


VALUE, GRADIENT = torchs_gradient()


def ours(logits, labels):
    return losses.causal_lm_loss(logits, labels), metrics.causal_lm_accuracy(logits, labels)


@pytest.mark.parametrize("compiled", [False, True])
def test_torch_autograd_and_compile(compiled):
    program = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    logits = torch.tensor(LOGITS, requires_grad=True)
    loss, right = program(logits, torch.tensor(LABELS).long())
    loss.backward()
    assert loss.item() == pytest.approx(VALUE, rel=1e-6)
    assert right.item() == pytest.approx(by_hand(LOGITS[:, :-1], LABELS[:, 1:], 1))
    np.testing.assert_allclose(logits.grad, GRADIENT, atol=1e-7)


def test_torch_vmap_and_grad():
    each = torch.func.vmap(torch.func.grad(lambda z, y: losses.cross_entropy(z, y)))
    found = each(torch.tensor(LOGITS), torch.tensor(np.maximum(LABELS, 0)))
    logits = torch.tensor(LOGITS, requires_grad=True)
    sum(torchs(row, np.maximum(y, 0)) for row, y in zip(logits, LABELS, strict=True)).backward()
    np.testing.assert_allclose(found, logits.grad, atol=1e-7)


@pytest.mark.slow
def test_jax_transformations():
    logits, labels = jnp.array(LOGITS), jnp.array(LABELS)
    (loss, right), found = jax.jit(jax.value_and_grad(ours, has_aux=True))(logits, labels)
    assert loss == pytest.approx(VALUE, rel=1e-6) and right == ours(logits, labels)[1]
    np.testing.assert_allclose(found, GRADIENT, atol=1e-7)
    each = jax.jit(jax.vmap(losses.causal_lm_loss))(logits, labels)
    alone = [losses.causal_lm_loss(z, y) for z, y in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(each, jnp.stack(alone), rtol=1e-6)
    assert jax.eval_shape(losses.causal_lm_loss, logits, labels).shape == ()
    program = jax.export.export(jax.jit(losses.causal_lm_loss), platforms=["cpu", "cuda", "tpu"])(logits, labels)
    assert program.platforms == ("cpu", "cuda", "tpu")  # nothing is pinned to the device of today
    batch, time = jax.export.symbolic_shape("b, t", constraints=["t >= 2"])
    shapes = (jax.ShapeDtypeStruct((batch, time, 11), "float32"), jax.ShapeDtypeStruct((batch, time), "int32"))
    assert jax.export.export(jax.jit(losses.causal_lm_loss))(*shapes).call(logits, labels) == pytest.approx(VALUE)


@pytest.mark.parametrize("jit_compile", [None, False, True], ids=["eager", "graph", "xla"])
def test_tensorflow_tape_and_function(jit_compile):
    def step(logits, labels):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            loss, right = ours(logits, labels)
        return loss, right, tape.gradient(loss, logits)

    shapes = [tf.TensorSpec((None, None, 11)), tf.TensorSpec((None, None), "int64")]
    program = step if jit_compile is None else tf.function(step, shapes, jit_compile=jit_compile)
    loss, right, found = program(tf.constant(LOGITS), tf.constant(LABELS, "int64"))
    assert float(loss) == pytest.approx(VALUE, rel=1e-6)
    assert float(right) == pytest.approx(by_hand(LOGITS[:, :-1], LABELS[:, 1:], 1))
    np.testing.assert_allclose(found, GRADIENT, atol=1e-7)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_tensorflow_with_an_unknown_number_of_classes(jit_compile):
    def both(logits, labels):
        return losses.cross_entropy(logits, labels, label_smoothing=0.1), metrics.top_k_accuracy(logits, labels, 3)

    shapes = [tf.TensorSpec((None, None, None)), tf.TensorSpec((None, None), "int32")]
    loss, right = tf.function(both, shapes, jit_compile=jit_compile)(LOGITS, LABELS)
    assert float(loss) == pytest.approx(torchs(LOGITS, LABELS, label_smoothing=0.1).item(), rel=1e-5)
    assert float(right) == pytest.approx(by_hand(LOGITS, LABELS, 3))
    for function in (losses.cross_entropy, metrics.accuracy):
        with pytest.raises(InputError, match="number of dimensions of logits and labels must be known"):
            tf.function(function, [tf.TensorSpec(None), shapes[1]], autograph=False)(LOGITS, LABELS)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_backend_of(backend):
    found = backend_of(backend.array([1.0]), backend.array([2]))
    assert found.name == backend.name and found.device == "cpu" and found is backend_of(backend.array([1.0]))


def test_mixed_frameworks():
    with pytest.raises(MixedBackends, match="logits is on jax and labels is on torch"):
        losses.cross_entropy(jnp.array(LOGITS), torch.tensor(LABELS))
    with pytest.raises(InputError, match="labels is a str"):
        metrics.accuracy(jnp.array(LOGITS), "a cat")


@pytest.mark.parametrize("labels", [np.zeros((4,), int), np.zeros((4, 5), int), np.zeros((4, 6, 11), int), SOFT[:, :5]])
def test_shapes_that_do_not_fit(backend, labels):
    given = backend.array(LOGITS), backend.array(labels)
    for function in (losses.cross_entropy, losses.causal_lm_loss, metrics.accuracy, metrics.causal_lm_accuracy):
        with pytest.raises(InputError, match=r"labels must be integers .* got .* beside logits \(4, 6, 11\)"):
            function(*given)


def test_values_that_make_no_sense():
    with pytest.raises(InputError, match="reduction must be one of mean, sum, none, got 'average'"):
        losses.cross_entropy(LOGITS, LABELS, reduction="average")
    with pytest.raises(InputError, match="label_smoothing must be between 0 and 1, got 2"):
        losses.cross_entropy(LOGITS, LABELS, label_smoothing=2)
    with pytest.raises(InputError, match="k must be between 1 and the number of classes, 11, got 12"):
        metrics.top_k_accuracy(LOGITS, LABELS, 12)
    with pytest.raises(InputError, match=r"logits must be \(..., time, vocabulary\)"):
        losses.causal_lm_loss(LOGITS, SOFT)
    assert get_backend("numpy") is backend_of(LOGITS)
