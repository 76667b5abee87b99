"""`modelhub publish`: what it hands to the API, and what it prints."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from modelhub import CausalLM
from modelhub.cli.commands import app
from modelhub.errors import CheckpointError, InputError
from modelhub.hub.publish import Change, Plan, Published

DONE = Published(
    "hf://me/tiny@abc", "https://hub/me/tiny", ("config.json", "model.safetensors"), 2_500_000, False, ("a remark",)
)
PLAN = Plan(
    "hf://me/tiny", (Change("config.json", 1200, "new"), Change("old.safetensors", 0, "removed")), ("a remark",)
)


def run(*arguments):
    done = CliRunner().invoke(app, ["publish", *map(str, arguments)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture
def calls(monkeypatch):
    """What CausalLM.publish was called with; it does nothing."""
    calls = []

    def publish(self, address, **options):
        calls.append({"address": address, "adapter": self.backbone.active_adapter} | options)
        return PLAN if options["dry_run"] else DONE

    monkeypatch.setattr(CausalLM, "publish", publish, raising=False)
    return calls


@pytest.fixture(scope="module")
def adapter(tiny_preset, tmp_path_factory):
    lm = CausalLM.from_preset(tiny_preset, backend="numpy")
    lm.enable_lora(rank=2)
    folder = tmp_path_factory.mktemp("publish") / "adapter"
    lm.save_adapter(folder)
    return folder


def test_a_model(tiny_preset, calls):
    done = run(tiny_preset, "hf://me/tiny", "--backend", "numpy")
    assert calls == [{
        "address": "hf://me/tiny", "adapter": None, "private": True, "adapter_only": False, "revision": None,
        "message": None, "licence": None, "dry_run": False, "base_model": None, "from_scratch": False, "dtype": None,
    }]  # fmt: skip
    assert done.stdout == "hf://me/tiny@abc\n"
    assert done.stderr == ("a remark\nsent 2.5 MB in 2 files: config.json, model.safetensors\nhttps://hub/me/tiny\n")


def test_options_have_the_apis_names(tiny_preset, calls):
    run(
        tiny_preset, "hf://me/tiny", "--backend", "numpy", "--public", "--revision", "v1", "--message", "first",
        "--licence", "mit", "--base-model", "you/base", "--from-scratch",
    )  # fmt: skip
    assert calls[0].items() >= {
        "private": False, "revision": "v1", "message": "first", "licence": "mit", "base_model": "you/base",
        "from_scratch": True,
    }.items()  # fmt: skip


def test_an_adapter(tiny_preset, adapter, calls):
    run(adapter, "hf://me/tiny", "--preset", tiny_preset, "--adapter-only", "--backend", "numpy")
    assert calls[0]["adapter"] == "adapter" and calls[0]["adapter_only"]
    with pytest.raises(InputError, match=f"holds an adapter.*--preset .*{tiny_preset.name}"):
        run(adapter, "hf://me/tiny")
    with pytest.raises(InputError, match="is none; leave it out"):
        run(tiny_preset, "hf://me/tiny", "--preset", tiny_preset)
    broken = shutil.copytree(adapter, adapter.with_name("broken"))
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no adapter"):
        run(broken, "hf://me/tiny", "--preset", tiny_preset)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "base, written, advice",
    [
        ("gemma3_tiny", None, "--preset gemma3_tiny$"),
        (None, "google/gemma-3-270m", "--preset hf://google/gemma-3-270m$"),
        (None, "modelhub:gemma3_tiny", "--preset gemma3_tiny$"),
        (None, "/models/base", "--preset /models/base$"),
        (None, None, "--preset PRESET$"),
    ],
)
def test_the_advice_names_what_from_preset_takes(tmp_path, base, written, advice):
    lm = CausalLM.from_preset(base or "gemma3_tiny", backend="numpy")
    lm.enable_lora(rank=2)
    lm.save_adapter(tmp_path)
    if base is None:  # as PEFT writes it
        (tmp_path / "modelhub.json").unlink()
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": written}))
        (tmp_path / "README.md").unlink()
    with pytest.raises(InputError, match=advice):
        run(tmp_path, "hf://me/tiny")


def test_a_dry_run_prints_a_table(tiny_preset, calls):
    done = run(tiny_preset, "hf://me/tiny", "--dry-run", "--backend", "numpy")
    assert "would be sent to hf://me/tiny" in done.stdout
    rows = [line.replace("│", " ").split() for line in done.stdout.splitlines()]
    assert ["config.json", "1.2", "kB", "new"] in rows and ["old.safetensors", "removed"] in rows
    assert done.stderr == "a remark\n"


def test_a_wrong_address_costs_no_loading(calls):
    with pytest.raises(InputError, match="hf://owner/name"):
        run("no_such_preset", "me/tiny")


def test_to_a_shared_folder_and_back(tiny_preset, tmp_path):
    """The whole way: two runs, of which the second sends nothing, and the preset loads by its address."""
    address = f"file://{tmp_path}/hub/tiny"
    options = ("--backend", "numpy", "--licence", "mit", "--from-scratch")
    first = run(tiny_preset, address, *options)
    assert first.stdout == f"{address}\n" and "sent" in first.stderr
    assert "nothing has changed" in run(tiny_preset, address, *options).stderr
    config = json.loads((tmp_path / "hub" / "tiny" / "config.json").read_text())
    assert config["model_type"] == json.loads((tiny_preset / "config.json").read_text())["model_type"]
    ours, again = (CausalLM.from_preset(name, backend="numpy", cache_dir=tmp_path) for name in (tiny_preset, address))
    assert ours.generate("In the", max_new_tokens=4) == again.generate("In the", max_new_tokens=4)
