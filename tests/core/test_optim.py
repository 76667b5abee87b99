"""Optimizers against torch.optim and optax, schedules against transformers, on every backend, eager and compiled."""

import math

import numpy as np
import pytest
import torch
import transformers

from modelhub.core import optim
from modelhub.core.backends import get_backend, installed
from modelhub.errors import ConfigError

SHAPES = {"tall.weight": (6, 4), "wide.weight": (3, 5), "bias": (4,), "conv.weight": (3, 4, 5), "embed.weight": (7, 4)}
MATRICES = ("tall.weight", "wide.weight")  # what Muon takes
RATE = 0.05


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: (rng.standard_normal(shape) * scale).astype(np.float32) for name, shape in SHAPES.items()}


PARAMS, GRADS = draw(0), [draw(step, scale=3.0 if step % 4 else 0.1) for step in range(1, 21)]


def put(xp, arrays, dtype=None):
    return {name: xp.array(array, dtype) for name, array in arrays.items()}


def get(xp, arrays):
    """Copies: what is updated in place must not change under the test."""
    return {name: np.array(xp.get(array), np.float32) for name, array in arrays.items()}


def train(xp, optimizer, params, state, grads, first=1, compiled=False):
    """The params and state (numpy) after one step for each of `grads`."""
    params = put(xp, params)
    state = put(xp, state) if state else optimizer.init(xp, params)

    def update(grads, state, params, learning_rate, step):
        return optimizer.update(xp, grads, state, params, learning_rate, step)

    update = xp.compile(update, donate=(1, 2)) if compiled else update
    for step, g in enumerate(grads, first):
        params, state = update(put(xp, g), state, params, xp.array(RATE / step), xp.array(step))
    return get(xp, params), get(xp, state)


def train_torch(make, params, grads, rate=RATE):
    params = {name: torch.tensor(array) for name, array in params.items()}
    optimizer = make(list(params.values()))
    for step, g in enumerate(grads, 1):
        optimizer.param_groups[0]["lr"] = rate / step
        for name, param in params.items():
            param.grad = torch.tensor(g[name])
        optimizer.step()
    return {name: param.numpy() for name, param in params.items()}


def train_optax(make, params, grads):
    optax = pytest.importorskip("optax")
    state = (optimizer := optax.inject_hyperparams(make(optax))(learning_rate=RATE)).init(params)
    for step, g in enumerate(grads, 1):
        state.hyperparams["learning_rate"] = np.float32(RATE / step)
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(found, wanted, atol=1e-6):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=atol, err_msg=name)


def check_training(xp, optimizer, wanted):
    for compiled in [True, False] if xp.eager else [True]:  # operation by operation JAX is slow, and nobody uses it so
        assert_close(train(xp, optimizer, PARAMS, None, GRADS, compiled=compiled)[0], wanted)


CASES = {
    "sgd": (optim.SGD(), lambda p: torch.optim.SGD(p)),
    "sgd_momentum": (
        optim.SGD(momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, momentum=0.9, weight_decay=0.1),
    ),
    "sgd_nesterov": (
        optim.SGD(momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True),
    ),
    "adam": (optim.Adam(weight_decay=0.1), lambda p: torch.optim.Adam(p, weight_decay=0.1)),
    "adamw": (optim.AdamW(), torch.optim.AdamW),
    "adamw_other": (
        optim.AdamW(betas=(0.0, 0.95), eps=1e-3, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, betas=(0.0, 0.95), eps=1e-3, weight_decay=0.3),
    ),
    "adafactor": (optim.Adafactor(), torch.optim.Adafactor),
    "adafactor_other": (
        optim.Adafactor(beta2_decay=-0.5, eps=(1e-4, 2.0), d=1.5, weight_decay=0.1),
        lambda p: torch.optim.Adafactor(p, beta2_decay=-0.5, eps=(1e-4, 2.0), d=1.5, weight_decay=0.1),
    ),
    "lion": (optim.Lion(), lambda optax: lambda learning_rate: optax.lion(learning_rate, weight_decay=0.0)),
    "lion_other": (
        optim.Lion(betas=(0.8, 0.95), weight_decay=0.3),
        lambda optax: lambda learning_rate: optax.lion(learning_rate, b1=0.8, b2=0.95, weight_decay=0.3),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_torch_or_optax(backend, case):
    optimizer, make = CASES[case]
    wanted = (train_optax if case.startswith("lion") else train_torch)(make, PARAMS, GRADS)
    check_training(backend, optimizer, wanted)


MUON = [
    (optim.Muon(adjust_lr_fn="original"), {}),
    (optim.Muon(nesterov=False, momentum=0.8, weight_decay=0.3), {"nesterov": False, "momentum": 0.8, "weight_decay": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize("optimizer, options", MUON, ids=["defaults", "other"])
def test_muon_equals_torch(backend, optimizer, options, monkeypatch):
    # torch rounds to bfloat16 inside; in float32 both must agree to the last digits.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    options = {"adjust_lr_fn": optimizer.adjust_lr_fn} | options
    matrices = {name: PARAMS[name] for name in MATRICES}
    wanted = train_torch(lambda p: torch.optim.Muon(p, **options), matrices, GRADS)
    others = {name: array for name, array in PARAMS.items() if name not in MATRICES}
    wanted |= train_torch(lambda p: torch.optim.AdamW(p, weight_decay=optimizer.weight_decay), others, GRADS)
    check_training(backend, optimizer, wanted)


def test_muon_in_bfloat16(backend):
    matrices = {name: PARAMS[name] for name in MATRICES}
    grads = [{name: g[name] for name in MATRICES} for g in GRADS]
    wanted = train_torch(lambda p: torch.optim.Muon(p), matrices, grads)
    optimizer = optim.Muon(adjust_lr_fn="original", ns_dtype="bfloat16")
    assert_close(train(backend, optimizer, matrices, None, grads)[0], wanted, atol=2e-2)  # the weights move by 0.18


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adafactor", "lion", "muon"])
def test_state_continues_on_another_backend(backend, name):
    optimizer = optim.get(name, RATE, weight_decay=0.1)
    optimizer = optim.SGD(momentum=0.9) if name == "sgd" else optimizer  # with something to remember
    numpy = get_backend("numpy", "cpu")
    whole = train(numpy, optimizer, PARAMS, None, GRADS[:8])
    for first, second in ((numpy, backend), (backend, numpy)):
        half = train(first, optimizer, PARAMS, None, GRADS[:4])
        params, state = train(second, optimizer, *half, GRADS[4:8], first=5)
        assert_close(params, whole[0])
        assert_close(state, whole[1], atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_params_are_rounded_masters(backend, dtype):
    xp, optimizer = backend, optim.AdamW()
    params = put(xp, PARAMS, dtype)
    rounded = get(xp, params)
    state = optimizer.init(xp, params)
    assert {xp.dtype(x) for x in state.values()} == {"float32"}
    assert_close({name: get(xp, state)[f"master/{name}"] for name in SHAPES}, rounded, atol=0)
    rate = 1e-4  # in bfloat16 alone most of these steps would change nothing
    for step, g in enumerate(GRADS, 1):
        params, state = optimizer.update(xp, put(xp, g), state, params, xp.array(rate / step), xp.array(step))
    assert {xp.dtype(x) for x in params.values()} == {dtype}
    masters = {name: get(xp, state)[f"master/{name}"] for name in SHAPES}
    assert_close(masters, train_torch(torch.optim.AdamW, rounded, GRADS, rate))
    assert_close(get(xp, params), get(xp, put(xp, masters, dtype)), atol=0)


def test_low_precision_gradients_are_widened(backend):
    xp, optimizer = backend, optim.AdamW()
    grads = put(xp, {"w": np.full((2, 2), 1e-3, np.float32)}, "float16")  # its square is 0 in float16
    params = put(xp, {"w": np.ones((2, 2), np.float32)})
    _, state = optimizer.update(xp, grads, optimizer.init(xp, params), params, xp.array(0.1), xp.array(1))
    np.testing.assert_allclose(xp.get(state["v/w"]), 1e-9, rtol=1e-2)


def test_torch_and_numpy_write_in_place():
    for name, address in (("torch", lambda x: x.data_ptr()), ("numpy", lambda x: x.ctypes.data)):
        if name not in installed():
            continue
        xp = get_backend(name, "cpu")
        for optimizer in (optim.SGD(momentum=0.9), optim.AdamW(), optim.Adafactor(), optim.Lion(), optim.Muon()):
            params = put(xp, PARAMS)
            state = optimizer.init(xp, params)
            new = optimizer.update(xp, put(xp, GRADS[0]), state, params, xp.array(0.1), xp.array(1))
            for after, before in zip(new, (params, state), strict=True):
                assert {k: address(x) for k, x in after.items()} == {k: address(x) for k, x in before.items()}


@pytest.mark.parametrize("name", [name for name in ("jax", "tensorflow") if name in installed()])
def test_nothing_compiles_again(name):
    xp, optimizer, traces = get_backend(name, "cpu"), optim.Muon(), []

    def update(grads, state, params, learning_rate, step):
        traces.append(1)
        return optimizer.update(xp, grads, state, params, learning_rate, step)

    update, params = xp.compile(update, donate=(1, 2)), put(xp, PARAMS)
    state = optimizer.init(xp, params)
    for step, g in enumerate(GRADS[:3], 1):
        params, state = update(put(xp, g), state, params, xp.array(RATE / step), xp.array(step))
    assert len(traces) == 1


def test_decay_only_matrices(backend):
    zeros = {name: np.zeros_like(array) for name, array in PARAMS.items()}
    params, _ = train(backend, optim.AdamW(weight_decay=0.5, decay_only_matrices=True), PARAMS, None, [zeros])
    np.testing.assert_array_equal(params["bias"], PARAMS["bias"])
    np.testing.assert_allclose(params["tall.weight"], PARAMS["tall.weight"] * (1 - RATE * 0.5), rtol=1e-6)


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clip_equals_torch(backend, limit):
    xp, oracle = backend, [torch.nn.Parameter(torch.tensor(g)) for g in GRADS[0].values()]
    for param in oracle:
        param.grad = param.detach().clone()
    wanted = torch.nn.utils.clip_grad_norm_(oracle, limit).item()

    def run(grads):
        norm = optim.global_norm(xp, grads)
        return norm, optim.clip(xp, grads, norm, limit)

    for call in (run, xp.compile(run)):
        norm, clipped = call(put(xp, GRADS[0]))
        assert float(xp.get(norm)) == pytest.approx(wanted, rel=1e-6)
        assert xp.dtype(norm) == "float32" and tuple(norm.shape) == ()
        assert_close(get(xp, clipped), {k: p.grad.numpy() for k, p in zip(SHAPES, oracle, strict=True)})


def test_norm_of_float16_is_float32(backend):
    big = put(backend, {"a": np.full((8,), 6e4, np.float32)}, "float16")
    assert float(backend.get(optim.global_norm(backend, big))) == pytest.approx(6e4 * math.sqrt(8), rel=1e-3)
    assert not math.isfinite(optim.global_norm(backend, big | put(backend, {"b": np.array([np.nan])})))


def test_loss_scale_equals_torch(backend):
    """Losses c * p with c sometimes infinite: the same scales and the same weights, skipped steps included."""
    xp, slopes = backend, [1.0, 2.0, math.inf, 1.0, math.nan, 3.0, 1.0, 2.0, 1.0, 1.0, -math.inf, 1.0]
    oracle = torch.ones(3, requires_grad=True)
    torch_adamw = torch.optim.AdamW([oracle], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    scaling, optimizer = optim.LossScale(init_scale=1024.0, growth_interval=2), optim.AdamW()
    params, state = {"p": xp.array([1.0, 1.0, 1.0])}, scaling.init(xp)
    slots, good = optimizer.init(xp, params), 0

    def step_of(params, slots, state, grads, step):
        grads = scaling.unscale(xp, grads, state)
        finite = optim.global_norm(xp, grads) < math.inf
        params, slots = optimizer.update(xp, grads, slots, params, xp.array(0.1), step, finite)
        return params, slots, scaling.update(xp, state, finite), finite

    for slope in slopes:
        torch_adamw.zero_grad()
        scaler.scale((oracle * slope).sum()).backward()
        scaled = {"p": xp.array(oracle.grad.numpy())}
        scaler.step(torch_adamw)
        scaler.update()
        params, slots, state, finite = step_of(params, slots, state, scaled, xp.array(good + 1))
        good += bool(xp.get(finite))
        assert bool(xp.get(finite)) == math.isfinite(slope)
        assert float(xp.get(state["scale"])) == scaler.get_scale()
        np.testing.assert_allclose(xp.get(params["p"]), oracle.detach().numpy(), rtol=1e-6)
    assert {xp.dtype(state["scale"]), xp.dtype(state["good_steps"])} == {"float32", "int32"}


# --- schedules ----------------------------------------------------------------------------------------------


def transformers_factors(name, warmup, total):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    factors = []
    for _ in range(total + 3):
        factors.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return factors


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(
    "ours, theirs", [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")]
)
def test_schedules_equal_transformers(ours, theirs, warmup):
    schedule = type(optim.get_schedule(ours))(warmup_steps=warmup)
    wanted = transformers_factors(theirs, warmup, 30)
    end = 31 if ours == "cosine" else 33  # later theirs rises again; ours stays
    assert [schedule(step, 30) for step in range(end)] == pytest.approx(wanted[:end], abs=1e-12)


def test_schedules_with_other_numbers():
    assert optim.Linear(warmup_ratio=0.1)(1, 25) == pytest.approx(1 / 3)  # rounded up, as transformers does
    assert optim.Cosine(final_ratio=0.1)(15, 30) == pytest.approx(0.55)
    assert optim.Linear(final_ratio=0.1)(30, 30) == optim.Cosine(final_ratio=0.1)(99, 30) == pytest.approx(0.1)
    assert optim.get_schedule(None)(5, None) == 1.0
    assert optim.Constant(warmup_steps=4)(1, None) == 0.25
    assert optim.Cosine(warmup_steps=50)(25, 30) == 0.5

    def own(step, total_steps):
        return step / total_steps

    cosine = optim.Cosine(warmup_steps=3)
    assert optim.get_schedule(own) is own and optim.get_schedule(cosine) is cosine
    with pytest.raises(ConfigError, match="number of all steps"):
        optim.Linear()(0, None)


# --- names and errors ---------------------------------------------------------------------------------------


def test_get():
    assert optim.get("AdamW", 1e-3) == optim.AdamW(1e-3, weight_decay=0.01)
    assert optim.get("muon", 1e-3, weight_decay=0.0) == optim.Muon(1e-3, weight_decay=0.0)
    assert optim.get(optim.SGD(momentum=0.9), 0.1, weight_decay=0.0) == optim.SGD(0.1, momentum=0.9)
    assert optim.get(optim.AdamW(1e-2), 5e-5) == optim.AdamW(1e-2)
    with pytest.raises(ConfigError, match="give it in one place"):
        optim.get(optim.AdamW(), 1e-3, weight_decay=0.2)


@pytest.mark.parametrize("wrong", ["adamx", None, optim.AdamW])
def test_unknown_optimizer(wrong):
    with pytest.raises(ConfigError, match="sgd, adam, adamw, adafactor, lion, muon"):
        optim.get(wrong)


@pytest.mark.parametrize("wrong", ["cosin", 3, optim.Cosine])
def test_unknown_schedule(wrong):
    with pytest.raises(ConfigError, match="constant, linear, cosine"):
        optim.get_schedule(wrong)


@pytest.mark.parametrize(
    "make, options",
    [
        (optim.SGD, {"learning_rate": -0.1}),
        (optim.AdamW, {"learning_rate": math.nan}),
        (optim.SGD, {"momentum": 1.1}),
        (optim.SGD, {"nesterov": True}),
        (optim.AdamW, {"betas": (0.9, 1.0)}),
        (optim.AdamW, {"weight_decay": -1.0}),
        (optim.Adam, {"eps": -1e-8}),
        (optim.Adafactor, {"beta2_decay": 0.8}),
        (optim.Adafactor, {"d": 0.5}),
        (optim.Lion, {"betas": (-0.1, 0.9)}),
        (optim.Muon, {"ns_steps": 0}),
        (optim.Muon, {"adjust_lr_fn": "rms"}),
        (optim.Muon, {"ns_dtype": "int8"}),
        (optim.LossScale, {"backoff_factor": 2.0}),
        (optim.Constant, {"warmup_steps": 0.1}),
        (optim.Linear, {"warmup_ratio": 3}),
        (optim.Cosine, {"warmup_ratio": 0.1, "warmup_steps": 5}),
        (optim.Cosine, {"final_ratio": -0.1}),
    ],
)
def test_bad_values(make, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make(**options)


def test_state_of_another_optimizer():
    xp = get_backend("numpy", "cpu")
    params, grads = put(xp, PARAMS), put(xp, GRADS[0])
    state = optim.SGD(momentum=0.9).init(xp, params)
    with pytest.raises(ConfigError, match="AdamW.* state lacks v/bias, v/conv.weight, v/embed.weight and 2 more"):
        optim.AdamW().update(xp, grads, state, params, xp.array(0.1), xp.array(1))
    with pytest.raises(ConfigError, match="grads has other too many"):
        optim.SGD().update(xp, grads | {"other": grads["bias"]}, {}, params, xp.array(0.1), xp.array(1))
    with pytest.raises(ConfigError, match="clip_norm"):
        optim.clip(xp, grads, xp.array(1.0), 0.0)
