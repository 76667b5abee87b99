"""Saving and publishing: what transformers, PEFT and another backend make of what is written."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from modelhub import CausalLM
from modelhub.errors import CheckpointError, InputError
from modelhub.hub.provenance import read_provenance

QUIET = {"verbose": False}
IDS = [[2, 5, 9, 17, 33, 6]]


@pytest.fixture
def lm(tiny_preset):
    lm = CausalLM.from_preset(tiny_preset, backend="torch", device="cpu")
    lm.preprocessor.sequence_length = 48
    return lm


def tuned(lm):
    lm.enable_lora(4, targets="all-linear")
    lm.compile("adamw", learning_rate=3e-2)
    lm.fit(["the cat sat", "a dog ran far"], batch_size=2, epochs=3, **QUIET)
    return lm


def test_an_adapter_is_merged_into_what_is_saved_and_not_into_the_model(lm, tmp_path):
    import transformers

    logits = tuned(lm).logits(IDS)
    lm.save_to_preset(tmp_path / "saved")
    np.testing.assert_array_equal(lm.logits(IDS), logits)
    assert lm.has_adapter
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    import torch

    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(IDS)).logits.numpy(), logits, atol=1e-4)


def test_what_is_saved_loads_on_every_backend(lm, tmp_path, backend):
    logits = tuned(lm).logits(IDS)
    lm.save_to_preset(tmp_path / "saved")
    again = CausalLM.from_preset(tmp_path / "saved", backend=backend.name, device="cpu")
    np.testing.assert_allclose(again.logits(IDS), logits, atol=1e-4)


def test_the_run_is_remembered(lm, tmp_path):
    tuned(lm).save_to_preset(tmp_path / "saved")
    (run,) = read_provenance(tmp_path / "saved").runs
    assert run.data == "2 rows from memory" and run.adapter["rank"] == 4 and run.backend == "torch"
    assert run.settings["learning_rate"] == 3e-2 and run.settings["steps"] == len(run.losses) == 3
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "2 rows from memory" in card and "curve.png" in card
    again = CausalLM.from_preset(tmp_path / "saved", backend="numpy")
    assert again.provenance.runs == (run,)


def test_an_adapters_runs_go_with_the_adapter(lm, tmp_path):
    tuned(lm).save_adapter(tmp_path / "adapter")
    assert len(lm.provenance.runs) == 1
    lm.set_adapter(None)
    assert lm.provenance.runs == ()
    lm.save_to_preset(tmp_path / "base")
    assert read_provenance(tmp_path / "base").runs == ()
    lm.load_adapter(tmp_path / "adapter", "again")
    assert len(lm.provenance.runs) == 1
    lm.merge_lora()
    lm.compile("sgd", learning_rate=1e-4)
    lm.fit(["the cat sat"], **QUIET)
    assert [run.adapter is None for run in lm.provenance.runs] == [False, True]


def test_a_readme_of_the_users_own_stays(lm, tmp_path):
    lm.save_to_preset(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text("# Mine\n")
    lm.save_to_preset(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text() == "# Mine\n"


def test_a_killed_save_leaves_what_was_there(lm, tmp_path, tiny_preset):
    folder = tmp_path / "saved"
    lm.save_to_preset(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    script = f"""
import time
from modelhub import CausalLM
from modelhub.tasks import saving
lm = CausalLM.from_preset({str(tiny_preset)!r}, backend="numpy", load_weights=False, seed=7)
def stop(*args):
    print("half", flush=True)
    time.sleep(60)
saving.save_tensors = stop
lm.save_to_preset({str(folder)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    lm.save_to_preset(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


class TestPublish:
    """To a shared folder; the hubs' own protocols are in tests/hub/test_publish.py."""

    @pytest.fixture
    def hub(self, tmp_path):
        return (tmp_path / "hub" / "me" / "tuned").as_uri()

    def test_a_fine_tune_loads_by_its_address_on_another_backend(self, lm, hub):
        logits = tuned(lm).logits(IDS)
        done = lm.publish(hub, licence="mit", from_scratch=True, message="first")
        assert "model.safetensors" in done.sent and not done.unchanged
        again = CausalLM.from_preset(hub, backend="numpy")
        np.testing.assert_allclose(again.logits(IDS), logits, atol=1e-4)
        assert again.provenance.licence == "mit" and len(again.provenance.runs) == 1
        assert lm.publish(hub).unchanged

    def test_an_adapter_alone(self, lm, hub, tiny_preset):
        logits = tuned(lm).logits(IDS)
        lm.publish(hub, adapter_only=True, licence="mit", base_model="someone/tiny")
        assert lm.backbone.active_adapter == "default" and list(lm.backbone.adapters) == ["default"]
        again = CausalLM.from_preset(tiny_preset, backend="numpy")
        again.load_adapter(hub)
        np.testing.assert_allclose(again.logits(IDS), logits, atol=1e-4)

    def test_a_merged_adapter_stays_merged(self, lm, hub):
        tuned(lm).merge_lora()
        logits = lm.logits(IDS)
        lm.publish(hub, adapter_only=True, licence="mit", from_scratch=True)
        assert not lm.has_adapter and lm.backbone.active_adapter == "default"
        np.testing.assert_array_equal(lm.logits(IDS), logits)

    def test_dry_run_sends_nothing(self, lm, hub, tmp_path):
        plan = lm.publish(hub, licence="mit", from_scratch=True, dry_run=True)
        assert {change.name for change in plan.files} >= {"config.json", "model.safetensors", "README.md"}
        assert not (tmp_path / "hub").exists()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"from_scratch": True}, "add licence="),
            ({"licence": "mit"}, "add base_model="),
            ({}, "add licence=.*add base_model="),
            ({"licence": "mit", "base_model": "../etc"}, "owner/name"),
        ],
    )
    def test_an_incomplete_card_is_refused_before_anything_is_written(self, lm, hub, tmp_path, options, words):
        with pytest.raises(InputError, match=words):
            lm.publish(hub, **options)
        assert not (tmp_path / "hub").exists()

    def test_what_computes_something_else_is_not_sent(self, lm, hub, tmp_path, monkeypatch):
        from modelhub.tasks import publishing

        write = publishing.write_backbone

        def wrong(folder, backbone, *options):
            params = backbone.params
            name = next(iter(params))
            backbone.params = params | {name: params[name] * 2}
            write(folder, backbone, *options)
            backbone.params = params

        monkeypatch.setattr(publishing, "write_backbone", wrong)
        with pytest.raises(CheckpointError, match="logits differ.*Nothing was sent"):
            lm.publish(hub, licence="mit", from_scratch=True)
        assert not (tmp_path / "hub").exists()

    def test_weights_that_are_no_numbers_are_not_sent(self, lm, hub, tmp_path):
        name = next(iter(lm.params))
        lm.params = lm.params | {name: lm.params[name] * float("nan")}
        with pytest.raises(CheckpointError, match="finite"):
            lm.publish(hub, licence="mit", from_scratch=True)

    def test_the_staging_folder_is_gone(self, lm, hub, tmp_path, monkeypatch):
        monkeypatch.setenv("MODELHUB_CACHE", str(tmp_path / "cache"))
        lm.publish(hub, licence="mit", from_scratch=True)
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
