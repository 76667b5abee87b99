"""The one owner of a model's arrays: what each change keeps and drops, and snapshots that no change reaches."""

import itertools
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from movable import PROMPT, QUIET, TEXTS, TRAINING, fill, load, one_layer

from modelhub.core.backends import get_backend, installed
from modelhub.errors import MixedBackends
from modelhub.model import placement
from modelhub.model.weights import OPTIMIZER, PARAMS, Change

NAME = "model.norm.weight"
HOW = {"temperature": 3.0}  # the likeliest token would be the last one again, whatever the weights


@pytest.fixture(scope="module")
def tiny_preset(tmp_path_factory):
    return one_layer(tmp_path_factory.mktemp("presets") / "one_layer")


@pytest.fixture
def weights(tiny_preset):
    """As loaded, so that all is known of them; and something that an optimizer remembers."""
    found = load(tiny_preset, "numpy").backbone.weights
    found.change(Change.TOLD, {OPTIMIZER: {"slot": np.zeros(1, np.float32)}})
    return found


def known(weights):
    """Which of identity, untouched and optimizer state are still there."""
    there = {
        "identity": weights.origin.identity is not None, "untouched": weights.origin.untouched is not None,
        OPTIMIZER: OPTIMIZER in weights.stores,
    }  # fmt: skip
    return {name for name, is_there in there.items() if is_there}


def others(weights):
    return {PARAMS: weights.params | {NAME: weights.params[NAME] + 1}}


# --- what a change means ------------------------------------------------------------------------------------------

ALL = {"identity", "untouched", OPTIMIZER}
KEPT = {  # by changes that put other arrays in the place of the base weights
    Change.MOVED: ALL,
    Change.CAST: {"identity"},
    Change.TOLD: ALL,
    Change.SWITCHED: {"identity", OPTIMIZER},
    Change.SHARED: {OPTIMIZER},
    Change.TRAINED: {OPTIMIZER},
    Change.OVERWRITTEN: set(),
    Change.LOADED: set(),
    Change.RELOADED: {"identity"},
    Change.QUANTIZED: {"identity"},
    Change.MERGED: set(),
}


@pytest.mark.parametrize("why", Change, ids=lambda why: why.name)
def test_what_is_known_after_other_weights(weights, why):
    assert known(weights) == ALL
    weights.change(why, others(weights))
    assert known(weights) == KEPT[why]


@pytest.mark.parametrize("why", [Change.SHARED, Change.TRAINED, Change.OVERWRITTEN], ids=lambda why: why.name)
def test_the_same_arrays_are_the_same_weights(weights, why):
    weights.change(why, {PARAMS: dict(weights.params)})
    assert known(weights) == KEPT[why] | {"identity"}


@pytest.mark.parametrize("why", [Change.SHARED, Change.TRAINED, Change.OVERWRITTEN], ids=lambda why: why.name)
def test_an_adapters_arrays_say_nothing_of_the_base(tiny_preset, why):
    weights = load(tiny_preset, "numpy", lora=True).backbone.weights
    name = next(name for name in weights.params if "lora_B" in name)
    weights.change(why, {PARAMS: weights.params | {name: weights.params[name] + 1}})
    assert "identity" in known(weights)


def test_a_change_brings_what_it_says(weights):
    state = {"slot": np.ones(1, np.float32)}
    weights.change(Change.OVERWRITTEN, others(weights) | {OPTIMIZER: state})
    assert weights.stores[OPTIMIZER] is state  # given with the change that drops the one before
    weights.change(Change.TOLD, {OPTIMIZER: None})
    assert OPTIMIZER not in weights.stores
    weights.describe(part_of="gemma3")
    assert weights.origin.part_of == "gemma3"


def test_arrays_of_another_backend_change_nothing(weights):
    before, version = weights.params, weights.version
    xp = get_backend("torch", "cpu")
    with pytest.raises(MixedBackends, match="the model is on numpy and the new weights are on torch"):
        weights.change(Change.OVERWRITTEN, {PARAMS: {name: xp.array(x) for name, x in before.items()}})
    assert weights.params is before and weights.version == version and known(weights) == ALL


# --- snapshots ----------------------------------------------------------------------------------------------------


def test_a_snapshot_stays_what_it_was(weights):
    now = weights.snapshot()
    assert weights.snapshot() is now
    params, arrays = now.params, dict(now.params)
    weights.change(Change.OVERWRITTEN, others(weights))
    then = weights.snapshot()
    assert now.params is params and all(now.params[name] is x for name, x in arrays.items())
    assert then.params is weights.params and then.params[NAME] is not arrays[NAME]
    assert then.version > now.version and then.skeleton is now.skeleton


def test_programs_go_with_the_skeleton(tiny_preset):
    lm = load(tiny_preset, "numpy")
    weights, made = lm.backbone.weights, []

    def make(now):
        made.append(now)
        return lambda params, x: (len(params), x)

    first = weights.snapshot()
    assert first.run("count", make, 5) == (len(lm.params), 5)
    lm.params = {name: x + 1 for name, x in lm.params.items()}
    assert weights.snapshot().program("count", make) is first.program("count", make) and made == [first]
    lm.enable_lora(rank=2)
    second = weights.snapshot()
    assert second.program("count", make) is not first.program("count", make) and made == [first, second]
    assert second.run("count", make, 5)[0] > first.run("count", make, 5)[0]


def test_a_move_leaves_older_snapshots_where_they_are(tiny_preset):
    lm = load(tiny_preset, "numpy")
    before = lm.backbone.weights.snapshot()
    lm.to("torch")
    after = lm.backbone.weights.snapshot()
    assert (before.xp.name, after.xp.name) == ("numpy", "torch")
    assert all(before.xp.owns(x) for x in before.params.values()) and after.xp.owns(after.params[NAME])


# --- who generates while somebody trains --------------------------------------------------------------------------


@pytest.mark.parametrize("name", installed())
def test_an_answer_that_has_begun_is_that_of_one_state(tiny_preset, name):
    lm = load(tiny_preset, name)
    wanted = lm.generate(PROMPT, 12, **HOW)
    pieces = lm.generate(PROMPT, 12, stream=True, **HOW)
    begun = next(pieces)
    lm.enable_lora(rank=2)
    fill(lm, seed=1)
    assert begun + "".join(pieces) == wanted
    assert lm.generate(PROMPT, 12, **HOW) != wanted


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("name", TRAINING)
def test_an_answer_while_training(tiny_preset, name, lora):
    """Begun before a step, ended after several: the arrays it began with are not written to."""
    lm = load(tiny_preset, name, lora=lora)
    lm.compile("adamw", learning_rate=0.1)
    lm.fit(TEXTS, steps=1, **QUIET)
    wanted = lm.generate(PROMPT, 12, **HOW)
    pieces = lm.generate(PROMPT, 12, stream=True, **HOW)
    begun = next(pieces)
    trainer = threading.Thread(target=lambda: lm.fit(TEXTS, steps=3, **QUIET))
    trainer.start()
    trainer.join()
    assert begun + "".join(pieces) == wanted
    assert lm.generate(PROMPT, 12, **HOW) != wanted


@pytest.mark.parametrize("name", ["numpy", "torch"])  # the others would compile at every turn
def test_texts_while_adapters_are_switched(tiny_preset, name):
    lm = load(tiny_preset, name, lora=True)
    states = {}
    for adapter in (None, "mine", "other"):
        lm.set_adapter(adapter)
        states[adapter] = lm.generate(PROMPT, 12, **HOW)
    assert len(set(states.values())) == 3
    over, interval = threading.Event(), sys.getswitchinterval()

    def switch():
        for adapter in itertools.cycle(states):
            if over.is_set():
                return
            lm.set_adapter(adapter)

    thread = threading.Thread(target=switch)
    sys.setswitchinterval(1e-6)  # threads take turns between any two lines
    thread.start()
    try:
        found = [lm.generate(PROMPT, 12, **HOW) for _ in range(20)]
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert set(found) <= set(states.values())


@pytest.mark.parametrize(
    ("method", "ask"),
    [
        ("encode", lambda lm: [score.logprobs for score in lm.score(TEXTS[:2])]),
        ("stream", lambda lm: [a.score for a in lm.generate(TEXTS[:2], 4, num_beams=2, stop="x", logprobs=True)]),
    ],
    ids=["score", "beams"],
)
def test_a_list_is_answered_by_one_state(tiny_preset, monkeypatch, method, ask):
    """However often the adapter is switched from the first text to the last."""
    lm = load(tiny_preset, "numpy", lora=True)
    states = []
    for adapter in ("other", "mine"):
        lm.set_adapter(adapter)
        states.append(ask(lm))
    assert states[0][1] != states[1][1]
    usual = getattr(lm.tokenizer, method)

    def switching(*args, **named):
        lm.set_adapter("other" if lm.backbone.active_adapter == "mine" else "mine")
        return usual(*args, **named)

    monkeypatch.setattr(lm.tokenizer, method, switching)
    assert ask(lm) in states


def test_an_answer_that_is_asked_for_in_the_middle_of_a_move(tiny_preset, monkeypatch):
    lm = load(tiny_preset, "numpy")
    wanted, asked, move = lm.generate("The river", max_new_tokens=6), [], placement._move
    with ThreadPoolExecutor(1) as pool:

        def slow(*args):
            if len(asked) == 1:  # one tensor is there already, the others are not
                asked.append(pool.submit(lm.generate, "The river", max_new_tokens=6))
                time.sleep(0.3)
            elif not asked:
                asked.append(None)
            return move(*args)

        monkeypatch.setattr(placement, "_move", slow)
        lm.to("torch")
        assert asked[1].result() == wanted
