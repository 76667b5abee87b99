"""Checkpoints whose bytes changed since they were written: the one before is taken."""

import json

import numpy as np
import pytest

from modelhub.training import checkpoints

ARRAYS = {"trainable/w": np.arange(64, dtype=np.float32), "state/m": np.ones(8, np.float32)}


@pytest.fixture
def run(tmp_path):
    for step in (1, 2):
        meta = {"step": step, "settings": {"x": 1.5, "name": "ö", "none": float("nan")}, 3: [1, 2]}
        checkpoints.save(tmp_path, step, {name: x + step for name, x in ARRAYS.items()}, meta)
    return tmp_path


def test_whole_ones_are_taken_and_those_of_earlier_versions(run):
    found = checkpoints.latest(run)
    assert found.step == 2 and found.meta["settings"]["name"] == "ö"
    np.testing.assert_array_equal(found.tensors()["trainable/w"], ARRAYS["trainable/w"] + 2)
    record = run / "step-00000002" / "run.json"
    written = json.loads(record.read_text())
    assert set(written.pop("sha256")) == {"state", "run"}
    record.write_text(json.dumps(written))  # as versions before wrote it
    assert checkpoints.latest(run).step == 2


def test_a_single_bit_of_the_state_is_noticed(run):
    state = run / "step-00000002" / "state.safetensors"
    whole = bytearray(state.read_bytes())
    whole[-5] ^= 1
    state.write_bytes(whole)
    with pytest.warns(UserWarning, match="step-00000002 is damaged .*state.safetensors changed after it was written"):
        assert checkpoints.latest(run).step == 1


def test_another_digit_in_the_record_is_noticed(run):
    record = run / "step-00000002" / "run.json"
    record.write_text(record.read_text().replace("1.5", "1.6"))
    with pytest.warns(UserWarning, match="run.json changed after it was written"):
        assert checkpoints.latest(run).step == 1
