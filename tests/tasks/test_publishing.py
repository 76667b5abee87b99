"""Saving and publishing: what transformers, PEFT and another backend make of what is written."""

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from modelhub import CausalLM
from modelhub.errors import CheckpointError, InputError
from modelhub.hub.preset import Preset
from modelhub.hub.provenance import Provenance, read_provenance
from modelhub.model.origin import origin_of
from modelhub.publishing import publishing

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


def test_a_readme_in_another_encoding_stays(lm, tmp_path):
    lm.save_to_preset(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_bytes("# Für mich\n".encode("latin-1"))
    lm.save_to_preset(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_bytes() == b"# F\xfcr mich\n"


def test_a_file_is_not_replaced_by_a_folder(lm, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        with pytest.raises(InputError, match="notes.txt is a file"):
            lm.save_to_preset(tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


class TestIdentity:
    """What an adapter's folder says it goes on."""

    def saved(self, lm, folder):
        if lm.backbone.adapter is None:
            lm.enable_lora(2)
        lm.save_adapter(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        return config["base_model_name_or_path"], read_provenance(folder), (folder / "README.md").read_text()

    def test_a_folder_that_names_its_parent(self, lm, tmp_path):
        """The card of a repository says what that was made from, and not what it is."""
        folder = tmp_path / "tiny-instruct"
        lm.save_to_preset(folder)
        (folder / "modelhub.json").unlink()
        (folder / "README.md").write_text("---\nlicense: gemma\nbase_model:\n- google/gemma-3-270m\n---\n# Tiny\n")
        loaded = CausalLM.from_preset(folder, backend="numpy")
        assert loaded.provenance.base_model == "google/gemma-3-270m"  # of a card of the whole model
        base, told, card = self.saved(loaded, tmp_path / "adapter")
        assert base == told.base == str(folder) and told.base_model is None
        assert "google/gemma-3-270m" not in card and "Gemma Terms of Use" in card
        assert "Gemma is provided under" in (tmp_path / "adapter" / "NOTICE").read_text()

    def test_a_repository(self, tmp_path):
        """On the Hub the repository is what the weights are, whatever its card calls their base."""
        (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: google/gemma-2b\n---\n")
        origin = origin_of(Preset("hf://me/x", tmp_path, None, "hf://me/x@abc"))
        assert origin.identity == Provenance("hf://me/x@abc", "me/x")
        assert origin.provenance == Provenance("hf://me/x@abc", "me/x", "mit", base_licence="gemma")

    def test_a_preset_that_comes_with_modelhub(self, tmp_path):
        base, told, card = self.saved(CausalLM.from_preset("gemma3_tiny", backend="numpy"), tmp_path / "adapter")
        assert base is None and told.base == "modelhub:gemma3_tiny" and 'from_preset("gemma3_tiny")' in card

    def test_weights_that_were_trained(self, lm, tmp_path):
        """Neither the parent nor the folder they were loaded from is what the adapter goes on."""
        lm.backbone.provenance = dataclasses.replace(lm.backbone.provenance, base_model="google/gemma-3-270m")
        assert self.saved(CausalLM.from_preset(lm.preset, backend="numpy"), tmp_path / "a")[0] == lm.preset
        lm.compile("sgd", learning_rate=1e-2)
        lm.fit(["the cat sat"], **QUIET)
        lm.save_to_preset(tmp_path / "tuned")
        base, told, card = self.saved(lm, tmp_path / "b")
        assert base is None and told.base is told.base_model is None and "google/gemma-3-270m" not in card
        with pytest.raises(InputError, match="publish the whole model first, or say base_model="):
            lm.publish((tmp_path / "hub").as_uri(), adapter_only=True, licence="gemma")
        loaded = CausalLM.from_preset(tmp_path / "tuned", backend="numpy")
        assert self.saved(loaded, tmp_path / "c")[0] == str(tmp_path / "tuned")
        lm.publish((tmp_path / "hub").as_uri(), adapter_only=True, licence="gemma", base_model="me/tuned")
        assert (
            json.loads((tmp_path / "hub" / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/tuned"
        )
        assert "[me/tuned](https://huggingface.co/me/tuned)" in (tmp_path / "hub" / "README.md").read_text()
        assert lm.provenance.base_model == "google/gemma-3-270m"

    def test_an_adapter_kept_in_the_weights(self, lm, tmp_path):
        tuned(lm).merge_lora()
        assert self.saved(lm, tmp_path / "a")[0] == lm.preset  # it can still be taken out
        lm.backbone.keep_merged()
        assert self.saved(lm, tmp_path / "b")[0] is None

    def test_switching_adapters_changes_no_weights(self, lm, tmp_path):
        tuned(lm).merge_lora()
        lm.unmerge_lora()
        lm.set_adapter(None)
        assert lm.backbone.identity.base == lm.preset
        lm.params = lm.params | {name: x * 2 for name, x in list(lm.params.items())[:1]}
        assert lm.backbone.identity is None

    def test_only_the_adapters_own_runs_go_with_it(self, lm, tmp_path):
        lm.compile("sgd", learning_rate=1e-2)
        lm.fit(["the cat sat"], **QUIET)
        _, told, _ = self.saved(tuned(lm), tmp_path / "a")
        assert [run.adapter is None for run in lm.provenance.runs] == [True, False] and told.runs == lm.provenance.runs[
            1:
        ]


class TestLicences:
    @pytest.fixture
    def licensed(self, lm, tmp_path):
        """A folder with the texts that its licence wants to go along."""
        folder = tmp_path / "base"
        lm.save_to_preset(folder)
        (folder / "LICENSE").write_bytes(b"the terms\xff")
        (folder / "USE_POLICY.md").write_text("the policy")
        (folder / "NOTICE").write_text("theirs")
        (folder / "README.md").write_text("---\nlicense: gemma\nbase_model: google/gemma-3-270m\n---\n# Tiny\n")
        (folder / "modelhub.json").unlink()
        return folder

    def test_texts_go_with_every_copy(self, licensed, tmp_path):
        lm = CausalLM.from_preset(licensed, backend="numpy")
        lm.enable_lora(2)
        lm.save_to_preset(tmp_path / "model")
        lm.save_adapter(tmp_path / "adapter")
        for _ in range(2):  # nor do they grow
            for folder in (tmp_path / "model", tmp_path / "adapter"):
                assert (folder / "LICENSE").read_bytes() == b"the terms\xff"
                assert (folder / "USE_POLICY.md").read_text() == "the policy"
                notice = (folder / "NOTICE").read_text()
                assert notice.startswith("theirs\n\nGemma is provided under") and notice.count("Gemma is provided") == 1
                assert "`LICENSE`, `USE_POLICY.md`" in (folder / "README.md").read_text()
            again = CausalLM.from_preset(tmp_path / "model", backend="numpy")
            again.save_to_preset(tmp_path / "model")
            lm.save_adapter(tmp_path / "adapter")
        done = lm.publish((tmp_path / "hub").as_uri())
        assert {"LICENSE", "USE_POLICY.md", "NOTICE"} <= set(done.sent) and not any(
            "LICENSE" in x for x in done.remarks
        )
        assert CausalLM.from_preset((tmp_path / "hub").as_uri(), backend="numpy").backbone.licence_files.keys() >= {
            "LICENSE"
        }

    def test_a_text_put_there_by_hand_stays(self, lm, tmp_path):
        lm.save_to_preset(tmp_path / "saved")
        (tmp_path / "saved" / "LICENSE.txt").write_text("mine")
        lm.save_to_preset(tmp_path / "saved")
        assert (tmp_path / "saved" / "LICENSE.txt").read_text() == "mine"

    def test_the_publisher_is_told_where_there_is_none(self, licensed, tmp_path):
        for name in ("LICENSE", "USE_POLICY.md"):
            (licensed / name).unlink()
        lm = CausalLM.from_preset(licensed, backend="numpy")
        for dry_run in (True, False):
            remarks = lm.publish((tmp_path / "hub").as_uri(), dry_run=dry_run).remarks
            assert any("put it as LICENSE into the folder" in remark for remark in remarks)

    def test_what_is_not_taken_along(self, licensed, tmp_path):
        """A link may lead to a secret of the user's, which would then be published."""
        (tmp_path / "secret").write_text("secret")
        (licensed / "LICENSE-B.txt").symlink_to(tmp_path / "secret")
        (licensed / "LICENSE-C.txt").write_bytes(bytes(1_000_001))
        blobs = tmp_path / "blobs"  # as in the cache of the Hub's client
        blobs.mkdir()
        (blobs / "abc").write_text("the terms")
        (licensed / "LICENSE").unlink()
        (licensed / "LICENSE").symlink_to(blobs / "abc")
        found = CausalLM.from_preset(licensed, backend="numpy").backbone.licence_files
        assert found == {"LICENSE": b"the terms", "USE_POLICY.md": b"the policy", "NOTICE": b"theirs"}

    @pytest.mark.parametrize("dry_run", [True, False])
    def test_what_is_said_once_is_forgotten_when_nothing_is_sent(self, licensed, tmp_path, monkeypatch, dry_run):
        lm = CausalLM.from_preset(licensed, backend="numpy")
        before = lm.provenance
        if not dry_run:
            monkeypatch.setattr(publishing.hub, "publish_folder", lambda *args, **options: 1 / 0)
        with pytest.warns(UserWarning, match="does not lift"), contextlib.suppress(ZeroDivisionError):
            lm.publish((tmp_path / "hub").as_uri(), licence="mit", base_model="me/x", dry_run=dry_run)
        assert lm.provenance == before

    def test_terms_stay_under_another_licence(self, lm, tmp_path):
        """Also where nothing but the licence told that there are any."""
        lm.backbone.provenance = Provenance(licence="gemma", base_model="me/renamed")
        with pytest.warns(UserWarning, match="does not lift"):
            lm.publish((tmp_path / "hub").as_uri(), licence="mit")
        again = CausalLM.from_preset((tmp_path / "hub").as_uri(), backend="numpy")
        assert (again.provenance.licence, again.provenance.base_licence) == ("mit", "gemma")
        assert "Gemma is provided under" in (tmp_path / "hub" / "NOTICE").read_text()
        again.enable_lora(2)
        again.save_adapter(tmp_path / "adapter")
        assert "Gemma is provided under" in (tmp_path / "adapter" / "NOTICE").read_text()


def test_a_killed_save_leaves_what_was_there(lm, tmp_path, tiny_preset):
    folder = tmp_path / "saved"
    lm.save_to_preset(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    script = f"""
import time
from modelhub import CausalLM
from modelhub.hub import model_folder as saving
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

    @pytest.mark.parametrize("base, revision", [("hf://me/base@" + "a" * 40, "a" * 40), ("hf://me/base", None)])
    def test_an_adapter_names_the_revision_of_its_base(self, lm, hub, tmp_path, base, revision):
        """PEFT loads that of the base model which the adapter was trained on."""
        tuned(lm)
        lm.backbone.weights.describe(identity=Provenance(base=base, base_model="me/base"))
        lm.publish(hub, adapter_only=True, licence="mit")
        [config] = (tmp_path / "hub").rglob("adapter_config.json")
        told = json.loads(config.read_text())
        assert (told["base_model_name_or_path"], told["revision"]) == ("me/base", revision)

    def test_a_merged_adapter_stays_merged(self, lm, hub):
        tuned(lm).merge_lora()
        logits = lm.logits(IDS)
        lm.publish(hub, adapter_only=True, licence="mit", base_model="someone/tiny")
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

    def test_what_was_only_loaded_goes_out_as_it_is(self, lm, hub, tmp_path):
        lm.save_to_preset(tmp_path / "saved", dtype="bfloat16")
        (tmp_path / "saved" / "README.md").write_text("# My own card")
        CausalLM.from_preset(tmp_path / "saved", backend="numpy").publish(hub, licence="mit", from_scratch=True)
        published = tmp_path / "hub" / "me" / "tuned"
        assert (published / "README.md").read_text() == "# My own card"
        assert json.loads((published / "config.json").read_text())["dtype"] == "bfloat16"
        assert (published / "model.safetensors").read_bytes() == (tmp_path / "saved" / "model.safetensors").read_bytes()
        trained = tuned(CausalLM.from_preset(tmp_path / "saved", backend="torch"))
        trained.publish(hub, licence="mit", from_scratch=True)
        assert "My own card" not in (published / "README.md").read_text()
        assert json.loads((published / "config.json").read_text())["dtype"] == "float32"

    def test_two_at_once_do_not_meet(self, lm, hub, tmp_path, monkeypatch):
        """One is published while another has written its files, but not sent them."""
        from modelhub.hub import publish

        other = CausalLM.from_preset(lm.preset, backend="numpy", load_weights=False, seed=5)
        real, logits = publish.publish_folder, lm.logits(IDS)

        def meanwhile(*args, **options):
            monkeypatch.setattr(publish, "publish_folder", real)
            other.publish(hub, licence="mit", from_scratch=True)
            return real(*args, **options)

        monkeypatch.setattr(publish, "publish_folder", meanwhile)
        lm.publish(hub, licence="mit", from_scratch=True)
        np.testing.assert_allclose(CausalLM.from_preset(hub, backend="numpy").logits(IDS), logits, atol=1e-4)
