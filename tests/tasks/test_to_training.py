"""Training around lm.to: whose memory is written to, the optimizer's state, weights from loops of the user's own."""

import itertools

import numpy as np
import optax
import pytest
import torch
from movable import (
    IDS,
    PIXELS,
    PROMPT,
    QUIET,
    TEXTS,
    TRAINING,
    address,
    addresses,
    assert_same,
    batches,
    classifier,
    load,
    one_layer,
    values,
)  # fmt: skip

from modelhub import optim
from modelhub.core.backends import installed
from modelhub.errors import InputError, MixedBackends
from modelhub.training.engine import TrainingEngine


@pytest.fixture(scope="module")
def tiny_preset(tmp_path_factory):
    return one_layer(tmp_path_factory.mktemp("presets") / "one_layer")


# --- what is written to is nobody else's ------------------------------------------------------------------------


def train_by_fit(lm):
    lm.compile("sgd", learning_rate=0.1)
    lm.fit(TEXTS, steps=2, **QUIET)


def train_by_torch(lm):
    from modelhub import to_torch

    net = to_torch(lm)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        ids = torch.tensor(IDS)
        net(input_ids=ids, labels=ids)["loss"].backward()
        optimizer.step()
    net.load_state_dict({name: x + 1 for name, x in net.state_dict().items()})


def write_to_everything(lm):
    """What a torch optimizer does, to all that the model says is its own."""
    for x in lm.backbone.owned().values():
        x.mul_(2)


@pytest.mark.parametrize("source", ["jax", "tensorflow", "numpy"])
def test_what_others_hold_is_never_written_to(tiny_preset, source):
    lm = load(tiny_preset, source, lora=True)
    xp, kept = lm.backbone.xp, lm.params
    wanted, before = values(lm), addresses(lm)
    lm.to("torch")
    assert addresses(lm) == before
    before = lm.logits(IDS)
    lm.generate([PROMPT, "a"], 8)  # in-place caches
    train_by_fit(lm)
    lm.merge_lora()
    lm.unmerge_lora()
    lm.merge_lora()
    train_by_fit(lm)  # all weights now
    write_to_everything(lm)
    assert np.abs(lm.logits(IDS) - before).max() > 1e-3
    assert_same({name: xp.get(x) for name, x in kept.items()}, wanted)


def test_jax_arrays_are_not_reached_through_a_module(tiny_preset):
    lm = load(tiny_preset, "jax", lora=True)
    kept, wanted = lm.params, values(lm)
    train_by_torch(lm)
    assert lm.backend == "torch"
    trained = values(lm)
    assert any(np.abs(trained[name] - wanted[name]).max() > 0.5 for name in wanted)
    lm.to("numpy")
    train_by_torch(lm.to("jax"))
    assert_same({name: np.asarray(x) for name, x in kept.items()}, wanted)


@pytest.mark.parametrize("target", ["jax", "tensorflow", "numpy"])
def test_a_module_that_trains_on_does_not_reach_the_model(tiny_preset, target):
    from modelhub import to_torch

    lm = load(tiny_preset, "torch", lora=True)
    net = to_torch(lm)
    wanted = lm.to(target).logits(IDS)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    np.testing.assert_array_equal(lm.logits(IDS), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jax", "tensorflow"])
def test_training_where_memory_is_donated(tiny_preset, name):
    """XLA may write into what it is given: not into torch's memory."""
    lm = load(tiny_preset, "torch", lora=True)
    kept, wanted = lm.params, values(lm)
    lm.to(name)
    train_by_fit(lm)
    assert_same({key: x.numpy() for key, x in kept.items()}, wanted)


def test_owned(tiny_preset):
    lm = load(tiny_preset, "jax", lora=True)
    assert lm.backbone.owned() is lm.params  # nobody else's anyway
    lm.to("torch")
    before, identity = addresses(lm), lm.backbone.identity
    owned = lm.backbone.owned()
    assert owned is lm.params and not set(before.values()) & set(addresses(lm).values())
    assert lm.backbone.owned() is owned and lm.backbone.identity is identity and lm.backbone.untouched is None
    lm.set_adapter("other")  # was handed over too
    assert set(map(address, lm.backbone.owned().values())).isdisjoint(before.values())


def test_owned_of_tensorflow_is_a_copy(tiny_preset):
    lm = load(tiny_preset, "torch")
    before = addresses(lm.to("tensorflow"))
    assert set(map(address, lm.backbone.owned().values())).isdisjoint(before.values())


def test_shared_parameters_are_seen_as_they_are(tiny_preset):
    lm = load(tiny_preset, "torch")
    text = lm.generate(PROMPT, 8)
    net = {name: torch.nn.Parameter(x) for name, x in lm.backbone.owned().items()}
    lm.backbone.share(net)
    assert lm.backbone.shared and lm.params is net and lm.backbone.identity is None
    assert lm.generate(PROMPT, 8) == text and lm.generate(PROMPT, 8) == text
    assert lm._engine.reused == 0  # no cache of keys and values that older weights have made
    with torch.no_grad():
        for parameter in net.values():
            parameter.mul_(0.5)
    fresh = load(tiny_preset, "torch")
    fresh.params = {name: x * 0.5 for name, x in fresh.params.items()}
    assert lm.generate(PROMPT, 8) == fresh.generate(PROMPT, 8)
    lm.fit(TEXTS, steps=1, **QUIET)
    assert not lm.backbone.shared


@pytest.mark.slow
def test_shared_parameters_in_another_dtype(tiny_preset):
    lm = load(tiny_preset, "torch")
    lm.backbone.share({name: torch.nn.Parameter(x.bfloat16()) for name, x in lm.params.items()}, dtype="bfloat16")
    assert lm.dtype == "bfloat16" and lm.generate(PROMPT, 4)
    assert lm.to("jax").dtype == "bfloat16" and lm.generate(PROMPT, 4)


def test_what_a_module_trained_of_merged_weights_stays(tiny_preset):
    from modelhub import to_torch

    lm = load(tiny_preset, "torch", lora=True)
    lm.merge_lora()
    net = to_torch(lm)
    assert lm.backbone.active_adapter is None and lm.backbone.identity is None
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.5)
    trained = values(lm)
    lm.enable_lora(rank=2, name="second")
    assert_same({name: x for name, x in values(lm).items() if name in trained}, trained)


@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_what_a_module_trains_keeps_no_graph(tiny_preset, use_dora):
    from modelhub import to_torch

    lm = load(tiny_preset, "torch")
    to_torch(lm)  # everything requires gradients
    lm.enable_lora(rank=2, use_dora=use_dora)
    assert all(x.is_leaf for x in lm.params.values())
    to_torch(lm)
    lm.merge_lora()
    assert all(x.is_leaf for x in lm.params.values())


# --- training ---------------------------------------------------------------------------------------------------


def curve(history):
    return [step["loss"] for step in history.steps]


def trainer(preset, name, **options):
    lm = load(preset, name, lora=True, **options)
    lm.compile(optim.AdamW(1e-3))
    return lm


@pytest.fixture(scope="module")
def twenty(tiny_preset):
    lm = trainer(tiny_preset, "torch")
    history = lm.fit(batches(20), verbose=False)
    return curve(history), values(lm)


@pytest.mark.parametrize("source,target", [*itertools.permutations(TRAINING, 2)])
def test_ten_steps_and_ten_more_elsewhere(tiny_preset, twenty, source, target):
    lm = trainer(tiny_preset, source)
    first = lm.fit(batches(20)[:10], verbose=False)
    lm.to(target)
    assert all(lm.backbone.xp.owns(x) for x in lm.optimizer_state.values())
    second = lm.fit(batches(20)[10:], verbose=False)
    losses, weights = twenty
    np.testing.assert_allclose(curve(first) + curve(second), losses, rtol=1e-3)
    for name, x in values(lm).items():
        np.testing.assert_allclose(x, weights[name], atol=1e-3, err_msg=name)


def test_a_run_in_two_is_the_run_in_one(tiny_preset, twenty):
    lm = trainer(tiny_preset, "torch")
    assert lm.optimizer_state is None
    lm.fit(batches(20)[:10], verbose=False)
    lm.fit(batches(20)[10:], verbose=False)
    assert_same(values(lm), twenty[1])
    lm.compile(optim.AdamW(1e-3))
    assert lm.optimizer_state is None


def test_another_adapter_begins_anew(tiny_preset):
    lm = load(tiny_preset, "torch")
    for name in ("one", "two"):
        lm.enable_lora(rank=2, name=name)
    lm.fit(batches(4), verbose=False)
    lm.set_adapter("one")
    lm.fit(batches(4), verbose=False)
    other = load(tiny_preset, "torch")
    other.enable_lora(rank=2, name="one")
    other.fit(batches(4), verbose=False)
    assert_same(values(lm), values(other))


def test_weights_put_in_between_are_what_is_trained(tiny_preset):
    """A bfloat16 has a float32 copy in the optimizer's state."""
    lm = load(tiny_preset, "torch", "bfloat16")
    lm.compile(optim.SGD(0.0))
    wanted = values(lm)
    lm.fit(batches(2), verbose=False)
    assert_same(values(lm), wanted)
    lm.load_params({name: x * 2 for name, x in lm.params.items()})
    lm.fit(batches(2), verbose=False)
    assert_same(values(lm), {name: 2 * x for name, x in wanted.items()})


def test_replaced_weights_begin_anew(tiny_preset):
    """The folds of a cross-validation do not know of each other."""
    lm = load(tiny_preset, "torch")
    lm.compile(optim.AdamW(1e-3))
    start = {name: x.clone() for name, x in lm.params.items()}
    found = []
    for put in (lm.load_params, lambda params: setattr(lm, "params", params), lm.load_params):
        put(start)
        assert lm.optimizer_state is None
        lm.fit(batches(2), verbose=False)
        found.append(values(lm))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_training_in_place_and_switching_keep_the_optimizer_state(tiny_preset):
    from modelhub import to_torch

    lm = trainer(tiny_preset, "torch")
    lm.fit(batches(2), verbose=False)
    kept = lm.optimizer_state
    train_by_torch(lm)
    to_torch(lm)
    lm.merge_lora()
    lm.unmerge_lora()
    lm.set_adapter("other")
    lm.set_adapter("mine")
    assert all(x is kept[name] for name, x in lm.optimizer_state.items())


def test_an_adapter_with_the_name_of_an_old_one_begins_anew(tiny_preset):
    lm = load(tiny_preset, "torch")
    lm.enable_lora(rank=2)
    lm.fit(batches(2), verbose=False)
    lm.merge_lora()
    lm.backbone.share({name: torch.nn.Parameter(x) for name, x in lm.params.items()})
    lm.enable_lora(rank=2, seed=1)
    assert lm.optimizer_state is None


@pytest.mark.slow
def test_a_step_that_fails_leaves_the_model_as_it_was(tiny_preset, monkeypatch):
    """It has consumed the optimizer's state: XLA has its memory."""
    lm = load(tiny_preset, "jax")
    lm.enable_lora(rank=2)
    lm.fit(batches(1), verbose=False)
    before, train = values(lm), TrainingEngine.train

    def fails(self, *args):
        train(self, *args)
        raise MemoryError("no more")

    monkeypatch.setattr(TrainingEngine, "train", fails)
    with pytest.raises(MemoryError):
        lm.fit(batches(1), verbose=False)
    monkeypatch.undo()
    assert lm.optimizer_state is None
    assert_same(values(lm), before)
    lm.to("torch").fit(batches(1), verbose=False)
    assert lm.optimizer_state


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [optax.adamw(1e-3), torch.optim.AdamW], ids=["optax", "torch"])
def test_native_optimizers_go_on_too(tiny_preset, optimizer):
    name = "torch" if isinstance(optimizer, type) else "jax"
    found = []
    for cuts in ((0, 8), (0, 4, 8)):
        lm = load(tiny_preset, name, lora=True)
        lm.compile(optimizer)
        for first, last in itertools.pairwise(cuts):
            lm.fit(batches(8)[first:last], verbose=False)
        found.append(values(lm))
    for key, x in found[0].items():
        np.testing.assert_allclose(found[1][key], x, atol=1e-6, err_msg=key)


@pytest.mark.slow
def test_the_optimizer_state_is_not_written_to_either(tiny_preset):
    lm = trainer(tiny_preset, "jax")
    lm.fit(batches(4), verbose=False)
    kept = lm.optimizer_state
    wanted = {name: np.array(x) for name, x in kept.items()}
    assert any(x.any() for x in wanted.values())
    lm.to("torch")
    lm.fit(batches(4), verbose=False)
    assert_same({name: np.asarray(x) for name, x in kept.items()}, wanted)


@pytest.mark.slow
def test_a_run_that_went_on_is_resumed_elsewhere(tiny_preset, tmp_path, twenty):
    """Its steps are counted on: the checkpoint knows how many came before."""
    lm = trainer(tiny_preset, "torch")
    lm.fit(batches(20)[:10], verbose=False)
    lm.fit(batches(20)[10:], steps=5, verbose=False, checkpoint_dir=tmp_path)
    other = trainer(tiny_preset, "torch")
    history = other.to("jax").fit(batches(20)[10:], verbose=False, checkpoint_dir=tmp_path)
    np.testing.assert_allclose(curve(history), twenty[0][10:], rtol=1e-3)
    for name, x in values(other).items():
        np.testing.assert_allclose(x, twenty[1][name], atol=1e-3, err_msg=name)


def test_images_are_trained_after_a_move():
    labels = np.array([0, 1, 2, 1])
    clf, other = classifier("jax"), classifier("torch")
    for model in (clf, other):
        model.compile(optim.AdamW(1e-3))
    clf.to("tensorflow").to("torch")
    for model in (clf, other):
        model.fit([(PIXELS, labels)] * 3, verbose=False)
    for name, x in values(other).items():
        np.testing.assert_allclose(values(clf)[name], x, atol=1e-5, err_msg=name)


# --- load_params ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source,target", [*itertools.product(installed(), repeat=2)])
def test_load_params(tiny_preset, source, target):
    lm, other = load(tiny_preset, target), load(tiny_preset, source)
    given = {name: other.backbone.xp.cast(x * 0.5, "float16") for name, x in other.params.items()}
    lm.logits(IDS)
    lm.load_params(given)
    assert lm.backbone.identity is None
    assert {lm.backbone.xp.dtype(x) for x in lm.params.values()} == {"float32"}
    assert_same(values(lm), values(other, given))
    fresh = load(tiny_preset, target)
    fresh.params = dict(lm.params)
    np.testing.assert_array_equal(lm.logits(IDS), fresh.logits(IDS))


def test_what_was_given_is_nobody_elses(tiny_preset):
    lm = load(tiny_preset, "torch")
    given = {name: x.numpy().copy() for name, x in lm.params.items()}
    wanted = values(lm)
    lm.load_params(given)
    for x in given.values():
        x += 1
    assert_same(values(lm), wanted)
    for x in lm.backbone.owned().values():
        x.mul_(0)
    assert all(x.max() > 0 for x in given.values() if x.size)


def test_an_adapter_alone(tiny_preset):
    lm = load(tiny_preset, "jax", "bfloat16", lora=True)
    names, before, identity = lm.backbone.trainable_names(), values(lm), lm.backbone.identity
    lm.load_params({name: torch.full(lm.params[name].shape, 0.25, dtype=torch.bfloat16) for name in names})
    assert lm.backbone.identity is identity
    for name, x in values(lm).items():
        np.testing.assert_array_equal(x, np.full_like(x, 0.25) if name in names else before[name])
    assert {lm.backbone.xp.dtype(lm.params[name]) for name in names} == {"float32"}


@pytest.mark.parametrize("name", installed())
def test_an_adapter_and_the_base_that_it_is_for(tiny_preset, name):
    """A loop of the user's own gives all of them back; only the adapter was trained."""
    lm = load(tiny_preset, name, lora=True)
    trained, identity = lm.backbone.trainable_names(), lm.backbone.identity
    lm.load_params({key: np.array(x) * (2 if key in trained else 1) for key, x in values(lm).items()})
    assert lm.backbone.identity is identity is not None
    lm.load_params(lm.params | {"model.norm.weight": lm.params["model.norm.weight"] + 1})
    assert lm.backbone.identity is None


def test_weights_of_a_loop_that_donated_the_models(tiny_preset):
    import jax

    lm = load(tiny_preset, "jax", lora=True)
    step = jax.jit(lambda params: {name: x * 2 for name, x in params.items()}, donate_argnums=0)
    wanted = {name: x * 2 for name, x in values(lm).items()}
    lm.load_params(step(lm.params))
    assert lm.backbone.identity is None
    assert_same(values(lm), wanted)


def test_sharded_weights_are_not_taken(tiny_preset):
    from torch import distributed
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    from modelhub import to_torch

    lm = load(tiny_preset, "torch")
    wanted, net = values(lm), to_torch(load(tiny_preset, "torch"))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for block in net.model.layers:
            fully_shard(block)
        fully_shard(net)
        with pytest.raises(InputError, match=r"sharded.*get_model_state_dict\(.*full_state_dict=True"):
            lm.load_params(net.state_dict())
        lm.params = {name: torch.zeros_like(x) for name, x in lm.params.items()}
        lm.load_params(get_model_state_dict(net, options=StateDictOptions(full_state_dict=True)))
        assert_same(values(lm), wanted)
    finally:
        distributed.destroy_process_group()


def test_load_params_that_do_not_fit(tiny_preset):
    lm = load(tiny_preset, "jax")
    before = lm.params
    given = {name: np.zeros(x.shape, np.float32) for name, x in lm.params.items()}
    norm, head, first, *_ = given
    del given[norm]
    given |= {head: np.zeros(3), "lm_head.weight": np.zeros((2, 2))}
    with pytest.raises(InputError) as error:
        lm.load_params(given)
    told = str(error.value)
    assert f"missing: {norm}" in told and "unexpected: lm_head.weight (2, 2)" in told and f"{head} is (3,)" in told
    assert "3 of the arrays" in told and lm.params is before
    with pytest.raises(InputError, match="missing"):
        lm.load_params({first: before[first]})
    with pytest.raises(InputError, match="belong to no backend"):
        lm.load_params({})
    with pytest.raises(MixedBackends):
        lm.load_params(before | {norm: np.zeros(before[norm].shape)})
    with pytest.raises(InputError, match="list"):
        lm.load_params(before | {norm: [0.0]})
    assert lm.params is before
