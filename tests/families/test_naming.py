"""Name tables: what is read, what is written back, and what is left out."""

import numpy as np

from modelhub.families.naming import KEEP, MINUS_ONE, NameMap, Rule

TABLE = NameMap(
    rules=(Rule("blk.{}.norm.{}", "layers.{}.ln.{}", MINUS_ONE), Rule("head.weight", "lm_head.weight")),
    aliases=(Rule("old.{}", "layers.{}"),),
    ignored=("vision.{}", "{}.inv_freq"),
)


def test_rules_go_both_ways():
    for theirs, ours, via in (
        ("blk.3.norm.weight", "layers.3.ln.weight", MINUS_ONE),
        ("head.weight", "lm_head.weight", KEEP),
        ("same.on.both.sides", "same.on.both.sides", KEEP),
    ):
        assert TABLE.to_ours(theirs) == (ours, via)
        assert TABLE.to_theirs(ours) == (theirs, via)


def test_aliases_are_read_and_never_written():
    assert TABLE.to_ours("old.3.ln.weight") == ("layers.3.ln.weight", KEEP)
    assert TABLE.to_theirs("layers.3.q.weight") == ("layers.3.q.weight", KEEP)


def test_ignored_tensors():
    assert TABLE.to_ours("vision.layers.0.weight") is None
    assert TABLE.to_ours("layers.0.rotary.inv_freq") is None
    assert TABLE.to_ours("my.vision.weight") == ("my.vision.weight", KEEP)


def test_a_name_must_fit_as_a_whole():
    assert TABLE.to_ours("xblk.3.norm.weight")[0] == "xblk.3.norm.weight"
    assert TABLE.to_ours("head_weight")[0] == "head_weight"  # the dot of a rule is a dot
    assert TABLE.to_ours("head.weight.more")[0] == "head.weight.more"


def test_minus_one_keeps_the_dtype_and_has_an_inverse():
    for dtype in (np.float32, np.float16):
        stored = np.array([1.5, 0.25], dtype)
        ours = MINUS_ONE.to_ours(stored.copy())
        assert ours.dtype == dtype and ours.tolist() == [0.5, -0.75]
        assert MINUS_ONE.to_theirs(ours).tolist() == stored.tolist()
