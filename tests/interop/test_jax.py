"""to_jax under JAX's own transformations, with optax and flax, on one device and on several."""

import os
import subprocess
import sys

import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from modelhub import Backbone, CausalLM, ImageClassifier, losses, nn, to_jax
from modelhub.core.tree import bind, flatten
from modelhub.errors import InputError

IDS = (np.arange(3 * 20).reshape(3, 20) * 7919 % 400).astype(np.int32)
MASK = np.ones((3, 20), np.int32)
MASK[1, 13:] = 0  # padded on the right
MASK[2, :5] = 0  # and on the left


@pytest.fixture(autouse=True)
def quickly_compiled():
    """XLA's optimizations take longer than what is run here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def lm(tiny_preset):
    return CausalLM.from_preset(str(tiny_preset), backend="jax")


@pytest.fixture
def adapted(lm):
    lm.enable_lora(rank=2, dropout=0.3, targets="all-linear")
    noise = {name: x + 0.1 for name, x in lm.params.items() if name in lm.backbone.trainable_names()}
    lm.params = lm.params | noise  # B starts at 0, where A has no gradient
    return lm


def loss_of(fn, params, ids):
    return losses.causal_lm_loss(fn(params, ids), ids)


def close(found, wanted, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), found, wanted)


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True])
def test_logits_are_the_tasks(lm, jit):
    params, fn = to_jax(lm)
    assert params is not lm.params and all(params[name] is x for name, x in lm.params.items())
    logits = (jax.jit(fn) if jit else fn)(params, IDS)
    assert logits.dtype == "float32" and logits.shape == (3, 20, 400)
    close(logits, lm.logits(IDS))


def test_padding_and_positions(lm):
    params, fn = to_jax(lm)
    shifted = np.where(MASK, np.cumsum(MASK, 1) - 1, 0)
    logits = jax.jit(fn)(params, IDS, MASK, shifted)
    for row in range(3):
        alone = IDS[row][MASK[row] == 1]
        close(logits[row][MASK[row] == 1], lm.logits([alone])[0])
    close(fn(params, IDS, position_ids=np.arange(20)[None]), lm.logits(IDS))


def test_images():
    clf = ImageClassifier.from_preset("vit_tiny_fashion", backend="jax")
    params, fn = to_jax(clf)
    (rows, columns), (high, wide) = clf.config.grid, clf.config.patch
    shape = 2, clf.config.num_channels, rows * high, columns * wide
    pixels = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    wanted = clf.backbone.xp.get(clf.backbone(pixels))
    close(jax.jit(to_jax(clf.backbone)[1])(params, pixels), wanted)
    logits = jax.jit(fn)(params, pixels)
    assert logits.shape == (2, clf.config.num_labels)
    model = bind(clf.backbone.model, clf.params)
    close(logits, model.logits(clf.backbone.xp, clf.backbone(pixels)))
    labels = jnp.array([3, 4])
    loss, gradients = jax.jit(jax.value_and_grad(lambda p: losses.cross_entropy(fn(p, pixels), labels)))(params)
    close(loss, losses.cross_entropy(logits, labels))
    assert all(np.abs(gradient).max() > 0 for gradient in gradients.values())


def test_a_backbone_and_single_modules(lm, tiny_preset):
    backbone = Backbone.from_preset(str(tiny_preset), backend="jax")
    params, fn = to_jax(backbone)
    close(fn(params, IDS), backbone(IDS))
    layer = bind(lm.backbone.model, lm.params).model.layers[0].mlp
    params, fn = to_jax(layer)
    assert set(params) == set(flatten(layer))
    x = np.ones((1, 2, 32), np.float32)
    close(jax.jit(fn)(params, x), layer(lm.backbone.xp, jnp.array(x)))
    params, fn = to_jax(nn.Linear.abstract(3, 5, bias=True))  # starts as it would in a model
    close(fn(params, x[..., :3]), x[..., :3] @ params["weight"].T + params["bias"])


def test_parameters_on_the_host(lm):
    params, fn = to_jax(lm)
    host = jax.device_get(params)
    close(fn(host, IDS), jax.jit(fn)(host, IDS))


def test_a_layers_arrays_may_be_donated(tiny_preset):
    lm = CausalLM.from_preset(str(tiny_preset), backend="torch", device="cpu")
    kept = dict(lm.params)
    before = {name: x.clone() for name, x in kept.items()}
    wanted = lm.to("jax").logits(IDS)
    params, _ = to_jax(lm.backbone.module.model.layers[0])
    jax.block_until_ready(jax.jit(lambda p: {name: x * 2 for name, x in p.items()}, donate_argnums=0)(params))
    assert all((x == before[name]).all() for name, x in kept.items())
    close(lm.logits(IDS), wanted)


def test_half_precision(tiny_preset):
    lm = CausalLM.from_preset(str(tiny_preset), backend="jax", dtype="bfloat16")
    params, fn = to_jax(lm)
    logits = jax.jit(fn)(params, IDS)
    assert logits.dtype == "float32" and {str(x.dtype) for x in params.values()} == {"bfloat16"}
    np.testing.assert_allclose(logits, lm.logits(IDS), atol=0.05)


def test_a_task_on_another_backend_is_moved(tiny_preset):
    lm = CausalLM.from_preset(str(tiny_preset), backend="torch")
    before = lm.logits(IDS)
    params, fn = to_jax(lm)
    assert lm.backend == "jax" and all(isinstance(x, jax.Array) for x in params.values())
    close(fn(params, IDS), before)


def test_the_users_attention_function(tiny_preset, lm):
    def blind(xp, q, k, v, mask, scale):
        return q * 0.0

    own = CausalLM.from_preset(str(tiny_preset), backend="jax", attention=blind)
    params, fn = to_jax(own)
    close(jax.jit(fn)(params, IDS), own.logits(IDS))
    assert np.abs(own.logits(IDS) - lm.logits(IDS)).max() > 0.1


# --- JAX's transformations --------------------------------------------------------------------------------------------


def test_grad_and_checkpoint(lm):
    params, fn = to_jax(lm)
    value, found = jax.jit(jax.value_and_grad(lambda p: loss_of(fn, p, IDS)))(params)
    close(jax.jit(jax.grad(lambda p: loss_of(jax.checkpoint(fn), p, IDS)))(params), found)
    # A small step against the gradient lowers the loss by its squared length times the step.
    length = sum(jnp.vdot(g, g) for g in found.values())
    step = 0.01 / length
    lower = loss_of(fn, {name: x - step * found[name] for name, x in params.items()}, IDS)
    assert value - lower == pytest.approx(0.01, rel=0.05)


def test_vmap_over_inputs_and_gradients_of_each(lm):
    params, fn = to_jax(lm)
    each = jax.jit(jax.vmap(lambda ids: fn(params, ids[None])[0]))(IDS)
    close(each, fn(params, IDS))

    def loss(last, ids):
        return loss_of(fn, params | {"model.norm.weight": last}, ids)

    last = params["model.norm.weight"]
    gradients = jax.jit(jax.vmap(jax.grad(lambda last, ids: loss(last, ids[None])), (None, 0)))(last, IDS)
    close(gradients.mean(0), jax.jit(jax.grad(loss))(last, IDS))  # all rows have as many labels


def test_vmap_over_stacked_adapters(adapted):
    params, fn = to_jax(adapted)
    names = adapted.backbone.trainable_names()
    stacked = {name: jnp.stack([params[name], -params[name], 2 * params[name]]) for name in names}
    many = jax.jit(jax.vmap(lambda own: fn(params | own, IDS)))(stacked)
    for index in range(3):
        close(many[index], fn(params | {name: x[index] for name, x in stacked.items()}, IDS), atol=1e-4)
    assert np.abs(many[0] - many[2]).max() > 0.1


def test_a_training_loop_inside_scan(lm):
    params, fn = to_jax(lm)
    optimizer = optax.sgd(0.05)

    def step(carry, ids):
        params, state = carry
        loss, gradients = jax.value_and_grad(lambda p: loss_of(fn, p, ids))(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    batches = np.stack([IDS] * 6)
    (_, _), curve = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))((params, optimizer.init(params)))
    carry, alone = (params, optimizer.init(params)), []
    for ids in batches:
        carry, loss = jax.jit(step)(carry, ids)
        alone.append(loss)
    close(curve, np.array(alone), atol=1e-4)
    assert curve[-1] < curve[0] - 0.2


def test_ahead_of_time_and_export(lm):
    params, fn = to_jax(lm)
    ids = jax.ShapeDtypeStruct((3, 20), "int32")
    assert jax.eval_shape(fn, params, ids).shape == (3, 20, 400)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    compiled = jax.jit(fn).lower(shapes, ids).compile()
    close(compiled(params, IDS), lm.logits(IDS))
    batch, time = jax.export.symbolic_shape("b, t", constraints=["t <= 128"])
    program = jax.export.export(jax.jit(fn), platforms=["cpu", "cuda"])(
        shapes, jax.ShapeDtypeStruct((batch, time), "int32")
    )
    again = jax.export.deserialize(program.serialize())
    close(again.call(params, IDS), lm.logits(IDS))
    close(again.call(params, IDS[:1, :9]), lm.logits(IDS[:1, :9]))


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from modelhub import CausalLM, losses, to_jax

lm = CausalLM.from_preset(sys.argv[1], backend="jax")
params, fn = to_jax(lm)
ids = (np.arange(8 * 16).reshape(8, 16) * 7919 % 400).astype(np.int32)
loss = lambda params, ids: losses.causal_lm_loss(fn(params, ids), ids)
wanted = jax.jit(jax.value_and_grad(loss))(params, ids)
logits = lm.logits(ids)
near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
assert len(jax.devices()) == 4

# Each device has its rows, and the gradients are averaged.
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
def step(params, ids):
    value, gradients = jax.value_and_grad(lambda p: jax.lax.pmean(loss(p, ids), "data"))(params)
    return value, gradients
everywhere = jax.device_put(params, NamedSharding(mesh, P()))
with_rows = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
jax.tree.map(near, with_rows(everywhere, ids), wanted)
forward = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")))
near(forward(everywhere, ids), logits)

# Weights and rows cut by the compiler, on a mesh of two by two.
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
cut = lambda x: P("model") if x.ndim == 2 else P()
spread = {name: jax.device_put(x, NamedSharding(mesh, cut(x))) for name, x in params.items()}
rows = jax.device_put(ids, NamedSharding(mesh, P("data")))
value, gradients = jax.jit(jax.value_and_grad(loss))(spread, rows)
jax.tree.map(near, (value, gradients), wanted)
one = gradients["model.layers.0.mlp.up_proj.weight"]
assert one.sharding.shard_shape(one.shape)[0] == one.shape[0] // 2, one.sharding
lm.load_params(spread)  # gathered
near(lm.logits(ids), logits)
print("done")
"""


def test_several_devices(tiny_preset):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(tiny_preset)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr[-4000:]


def test_dropout(adapted):
    params, fn = to_jax(adapted)
    run = jax.jit(lambda rng, ids: fn(params, ids, dropout_rng=rng))
    first, second = (run(jax.random.key(seed), IDS) for seed in (0, 1))
    close(first, run(jax.random.PRNGKey(0), IDS))
    assert np.abs(first - second).max() > 0.01 and np.abs(first - fn(params, IDS)).max() > 0.01
    twice = run(jax.random.key(0), IDS[[0, 0]])
    assert np.abs(twice[0] - twice[1]).max() > 0.01  # each row has its own
    many = run(jax.random.key(0), np.repeat(IDS[:1, :6], 200, axis=0))
    assert np.abs(many.mean(0) - fn(params, IDS[:1, :6])).mean() < 0.2 * many.std(0).mean()


# --- optax and flax ---------------------------------------------------------------------------------------------------


def fitted(fn, params, optimizer, steps=8):
    @jax.jit
    def step(params, state):
        loss, gradients = jax.value_and_grad(lambda p: loss_of(fn, p, IDS))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, curve = optimizer.init(params), []
    for _ in range(steps):
        params, state, loss = step(params, state)
        curve.append(float(loss))
    return params, curve


def test_optax_and_back(lm):
    params, fn = to_jax(lm)
    before = lm.logits(IDS)
    trained, curve = fitted(fn, params, optax.adamw(3e-3))
    assert curve[-1] < 0.9 * curve[0]
    close(lm.logits(IDS), before)  # the task has its own until it is told
    lm.load_params(trained)
    close(lm.logits(IDS), fn(trained, IDS))


def test_an_adapter_alone_by_multi_transform(adapted):
    params, fn = to_jax(adapted)
    names = set(adapted.backbone.trainable_names())
    labels = {name: "trained" if name in names else "frozen" for name in params}
    optimizer = optax.multi_transform({"trained": optax.adamw(3e-2), "frozen": optax.set_to_zero()}, labels)
    trained, curve = fitted(fn, params, optimizer)
    assert curve[-1] < curve[0]
    changed = {name for name, x in trained.items() if np.abs(x - params[name]).max() > 0}
    assert changed == names
    adapted.load_params({name: trained[name] for name in names})  # the adapter's are enough
    close(adapted.logits(IDS), fn(trained, IDS), atol=1e-4)


def test_flax_train_state(lm):
    params, fn = to_jax(lm)
    state = flax.training.train_state.TrainState.create(apply_fn=fn, params=params, tx=optax.adam(3e-3))

    @jax.jit
    def step(state, ids):
        loss, gradients = jax.value_and_grad(lambda p: loss_of(state.apply_fn, p, ids))(state.params)
        return state.apply_gradients(grads=gradients), loss

    curve = []
    for _ in range(8):
        state, loss = step(state, IDS)
        curve.append(float(loss))
    assert int(state.step) == 8 and curve[-1] < 0.9 * curve[0]
    lm.load_params(state.params)
    close(lm.logits(IDS), fn(state.params, IDS))


def test_nothing_is_donated_but_by_the_user(lm):
    params, fn = to_jax(lm)
    jax.jit(jax.grad(lambda p: loss_of(fn, p, IDS)))(params)
    assert not any(x.is_deleted() for x in params.values())
    halved = jax.jit(lambda p: jax.tree.map(lambda x: x / 2, p), donate_argnums=0)(params)
    lm.load_params(halved)
    close(lm.logits(IDS), fn(halved, IDS))


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes(lm):
    params, fn = to_jax(lm)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(
        InputError, match=rf"1 of the model's \d+ parameters are not among those given, the first {name}"
    ):
        jax.jit(fn)({key: x for key, x in params.items() if key != name}, IDS)
    with pytest.raises(InputError, match=r"input_ids \(batch, time\), got shape \(20,\); under vmap add"):
        jax.vmap(lambda ids: fn(params, ids))(IDS)
    with pytest.raises(
        InputError, match="expected a CausalLM, an ImageClassifier, a Backbone or a Module, got builtins.str"
    ):
        to_jax("gemma")
    with pytest.raises(InputError, match="input_ids must be integers .* got float32"):
        fn(params, IDS.astype(np.float32))
    with pytest.raises(InputError, match=r"attention_mask must be of shape \(batch, time\), got \(1, 1, 20, 20\)"):
        jax.jit(fn)(params, IDS, np.ones((1, 1, 20, 20)))
    close(fn(params, IDS), lm.logits(IDS))
