"""Module trees, dotted names, shape checks and initial values."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from modelhub.core import nn
from modelhub.core.tree import Module, Spec, bind, check, flatten, initial_value
from modelhub.errors import CheckpointError, ConfigError


@dataclass
class Layer(Module):
    proj: nn.Linear
    gate: Any = None
    scale: float = 2.0


@dataclass
class Net(Module):
    embed: nn.Embedding
    layers: list
    tables: list
    label: str
    config: dict
    kinds: list


def skeleton():
    return Net(
        nn.Embedding.abstract(7, 4),
        [Layer(nn.Linear.abstract(4, 3, bias=True)), Layer(nn.Linear.abstract(4, 5), nn.RMSNorm.abstract(4, 1e-6))],
        [Spec((2,), "ones"), [Spec((3,), "zeros")]],
        "a static value",
        {"shape": (1, 2)},
        ["local", None, 3],
    )


NAMES = {
    "embed.weight": (7, 4),
    "layers.0.proj.weight": (3, 4),
    "layers.0.proj.bias": (3,),
    "layers.1.proj.weight": (5, 4),
    "layers.1.gate.weight": (4,),
    "tables.0": (2,),
    "tables.1.0": (3,),
}


def test_flatten_gives_dotted_names_in_the_order_of_the_fields():
    leaves = flatten(skeleton())
    assert {name: spec.shape for name, spec in leaves.items()} == NAMES
    assert list(leaves) == list(NAMES)
    assert list(flatten(skeleton(), "model")) == [f"model.{name}" for name in NAMES]


def test_bind_and_flatten_are_inverse(backend):
    params = {
        name: backend.array(np.full(shape, index, np.float32)) for index, (name, shape) in enumerate(NAMES.items())
    }
    net = skeleton()
    bound = bind(net, params)
    assert flatten(bound).keys() == params.keys()
    assert all(flatten(bound)[name] is params[name] for name in NAMES)
    assert bound.layers[1].gate.weight is params["layers.1.gate.weight"]
    for part in (bound, net):
        assert (part.label, part.config, part.kinds) == ("a static value", {"shape": (1, 2)}, ["local", None, 3])
    assert (bound.layers[0].scale, bound.layers[0].gate) == (2.0, None)
    again = bind(bound, {name: -array for name, array in params.items()})  # a bound module can be bound again
    assert backend.get(again.tables[1][0]).tolist() == [-6.0] * 3


def test_bind_changes_neither_argument():
    net, params = skeleton(), {name: np.zeros(shape) for name, shape in NAMES.items()}
    before = dict(params)
    bound = bind(net, params)
    bound.layers.append("more")
    bound.layers[0].proj.weight = None
    assert flatten(net).keys() == NAMES.keys()
    assert all(isinstance(leaf, Spec) for leaf in flatten(net).values())
    assert params.keys() == before.keys() and all(params[name] is before[name] for name in before)


def test_bind_takes_a_part_under_a_prefix():
    params = {f"model.{name}": np.zeros(shape) for name, shape in NAMES.items()}
    assert bind(skeleton(), params, "model").embed.weight is params["model.embed.weight"]


def test_bind_names_what_is_missing_and_ignores_what_is_too_much():
    params = {name: np.zeros(shape) for name, shape in NAMES.items()} | {"other": np.zeros(1)}
    assert flatten(bind(skeleton(), params)).keys() == NAMES.keys()
    del params["layers.0.proj.bias"]
    with pytest.raises(KeyError, match="layers.0.proj.bias"):
        bind(skeleton(), params)


def test_check_accepts_the_right_shapes():
    assert check(skeleton(), {name: list(shape) for name, shape in NAMES.items()}, "here") is None


def test_check_gathers_every_mismatch_in_one_error():
    found = dict(NAMES)
    del found["tables.0"], found["layers.0.proj.bias"]
    found["extra.weight"] = (9, 9)
    found["embed.weight"] = (4, 7)
    with pytest.raises(CheckpointError) as caught:
        check(skeleton(), found, "model.safetensors")
    message = str(caught.value)
    assert message.startswith("model.safetensors: config and weights disagree in 4 places")
    for line in (
        "missing: tables.0 (2,)",
        "missing: layers.0.proj.bias (3,)",
        "unexpected: extra.weight (9, 9)",
        "wrong shape: embed.weight should be (7, 4) by the config, the file has (4, 7)",
    ):
        assert line in message


def test_check_counts_what_it_does_not_list():
    found = NAMES | {f"extra.{index}": (1,) for index in range(50)}
    with pytest.raises(CheckpointError, match="disagree in 50 places") as caught:
        check(skeleton(), found, "x")
    assert "... and 30 more" in str(caught.value)
    assert str(caught.value).count("unexpected:") == 20


def test_initial_values():
    normal = initial_value("a.weight", Spec((64, 128), scale=0.5), seed=3)
    assert normal.dtype == np.float32 and normal.shape == (64, 128)
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 0.5) < 0.02
    assert not initial_value("a", Spec((3,), "zeros"), 0).any()
    assert (initial_value("a", Spec((3,), "ones"), 0) == 1).all()


def test_initial_values_depend_on_name_and_seed_only():
    with pytest.raises(ConfigError, match="init of a Spec must be one of normal, .*, got 'nonsense'"):
        Spec((4, 4), "nonsense")
    spec = Spec((4, 4))
    first = initial_value("a", spec, 0)
    initial_value("b", spec, 0)  # drawing another changes nothing
    assert (initial_value("a", spec, 0) == first).all()
    assert not np.allclose(initial_value("b", spec, 0), first)
    assert not np.allclose(initial_value("a", spec, 1), first)
    # Pinned: a checkpoint-free run must start from the same weights in every release and on every machine.
    np.testing.assert_allclose(initial_value("a", Spec((3,)), 0), [-0.000456, -0.013282, -0.036619], atol=1e-5)


def test_initial_values_are_equal_on_every_backend(backend):
    for name, spec in flatten(skeleton()).items():
        value = initial_value(name, spec, 7)
        assert (backend.get(backend.put(value.copy())) == value).all()
