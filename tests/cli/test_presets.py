"""The commands list, info, pull and register."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from modelhub.cli import main

CARD = """
family = "gemma"
task = "causal-lm"
description = "A [bold]card[/bold] of my own."
parameters = 1_000
licence = "gemma"
accept_licence = true

[[sources]]
uri = "hf://me/mine@v1"
verified = true

[[sources]]
type = "embedded"
folder = "gemma3_tiny"
"""
# A family of one table: the next token depends on the last one only. It takes nothing from the families here.
BIGRAM = """
from dataclasses import dataclass, field
from modelhub.core import decoder, nn
from modelhub.core.tree import Module
from modelhub.families.naming import NameMap

@dataclass
class Config:
    model_type: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int = 64
    num_hidden_layers: int = 1
    num_key_value_heads: int = 1
    head_dim: int = 2
    extra: dict = field(default_factory=dict)

    @classmethod
    def from_hf(cls, data):
        return cls(data["model_type"], data["vocab_size"], data["hidden_size"])

def names(source, config):
    return NameMap()

@dataclass
class Table(Module):
    embed_tokens: nn.Embedding
    layers: list
    config: Config

    def __call__(self, xp, ids, start=None, cache=None, positions=None, segments=None):
        return self.embed_tokens(xp, ids)

@dataclass
class Model(decoder.CausalModel):
    @classmethod
    def abstract(cls, config):
        return cls(Table(nn.Embedding.abstract(config.vocab_size, config.hidden_size), [], config), None)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder and a home of its own; returns status, standard output, standard error."""
    for variable in ("MODELHUB_CACHE", "HF_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.delenv("MODELHUB_PRESETS", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["modelhub", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return command


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package with a module and these entry points of modelhub.families."""

    def install(name, points, **modules):
        info = tmp_path / name / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[modelhub.families]\n" + points)
        for module, text in modules.items():
            (tmp_path / name / f"{module}.py").write_text(text)
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(tmp_path / name)

    return install


def test_list_is_grouped_by_family_and_sorted_by_size(run):
    status, text, remarks = run("list")
    assert status == 0 and "must be accepted once" in remarks
    lines = text.splitlines()
    assert lines[0].split() == ["preset", "task", "size", "cached", "licence", "*"]
    families = [line for line in lines[1:] if not line.startswith(" ")]
    assert families == sorted(families) and {"gemma", "llama"} <= set(families)
    llamas = [line.split()[0] for line in lines[lines.index("llama") + 1 :]]
    assert llamas.index("smollm2_135m") < llamas.index("llama3.2_1b") < llamas.index("llama3_8b_en")
    tiny = next(line.split() for line in lines if "gemma3_tiny" in line)
    assert tiny == ["gemma3_tiny", "causal-lm", "2", "M", "yes", "apache-2.0"]
    assert next(line.split() for line in lines if " llama3.2_1b " in line)[1:] == [
        "causal-lm",
        "1.2",
        "B",
        "llama3.2",
        "*",
    ]
    assert all(len(line) < 120 for line in lines)


def test_list_narrowed_and_as_json(run):
    cards = json.loads(run("list", "--json", "--family", "llama", "--max-params", "4e8")[1])
    assert {card["family"] for card in cards} == {"llama"}
    assert {card["name"] for card in cards} >= {"smollm2_135m_instruct", "smollm2_360m"}
    assert all(card["parameters"] <= 4e8 for card in cards)
    assert cards[0]["sources"][0].keys() == {"address", "verified", "cached"}
    assert json.loads(run("list", "--json", "--max-params", "0")[1]) == []
    found = json.loads(run("list", "gemma", "--json")[1])
    assert found and all("gemma" in f"{c['name']} {c['family']} {c['description']}".lower() for c in found)
    assert (
        {"gemma3_tiny"}
        <= {card["name"] for card in json.loads(run("list", "--cached", "--json")[1])}
        < {card["name"] for card in json.loads(run("list", "--json")[1])}
    )
    assert [c["name"] for c in json.loads(run("list", "GEMMA3", "tiny", "--json")[1])] == ["gemma3_tiny"]
    status, text, remarks = run("list", "--task", "nothing")
    assert (status, text) == (0, "") and "no preset is like that" in remarks


def test_register_then_info_then_remove(run, tmp_path):
    (tmp_path / "work" / "mine.toml").write_text(CARD)
    assert run("register", "mine.toml")[0] == 0
    status, text, remarks = run("info", "mine")
    text = " ".join(text.split())
    assert status == 0 and remarks == ""
    assert "A [bold]card[/bold] of my own." in text
    assert "accept at https://huggingface.co/me/mine " in text
    assert "hf://me/mine@v1 (verified)" in text and "embedded:gemma3_tiny (not verified, cached)" in text
    status, _, said = run("register", "mine.toml")
    assert status == 1 and "--force" in said and "Traceback" not in said
    assert run("register", "mine.toml", "--force")[0] == 0
    assert run("register", "--remove", "mine")[0] == 0
    status, _, said = run("info", "mine")
    assert status == 1 and "there is no preset 'mine'" in said
    for arguments in ((), ("mine.toml", "--remove", "mine")):
        status, _, said = run("register", *arguments)
        assert status == 1 and "give either the card" in said


def test_info_of_a_name_that_is_here(run):
    found = json.loads(run("info", "gemma3_tiny", "--json")[1])
    assert found["parameters"] == 2_098_560
    assert found["memory_for_weights"] == {"float32": 4 * 2_098_560, "bfloat16": 2 * 2_098_560}
    assert found["bytes_on_disk"] > 2 * 2_098_560 and os.path.isdir(found["path"])
    assert found["model_type"] == "gemma3_text" and found["context"] == 1024
    config = json.loads(Path(found["path"], "config.json").read_text())
    keys = config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    assert found["memory_for_1000_tokens"]["float32"] == 1000 * 2 * keys * 4


def test_info_of_a_name_that_is_not_here(run):
    status, text, remarks = run("info", "llama3.2_1b")
    text = " ".join(text.split())
    assert status == 0 and "modelhub pull llama3.2_1b" in remarks
    assert "must be accepted once" in text and "https://huggingface.co/meta-llama/Llama-3.2-1B " in text
    assert "4.94 GB in float32, 2.47 GB in bfloat16" in text and "1,235,814,400" in text
    assert "hf://meta-llama/Llama-3.2-1B (not verified)" in text and "model type" not in text


def test_info_of_folders_files_and_addresses(run, tiny_preset, tmp_path):
    found = json.loads(run("info", tiny_preset, "--json")[1])
    assert found["model_type"] == "gemma3_text" and found["path"] == str(tiny_preset)
    assert found["bytes_on_disk"] == sum(file.stat().st_size for file in tiny_preset.iterdir())
    assert "licence" not in found
    status, text, remarks = run("info", "hf://me/mine")
    assert status == 0 and "hf://me/mine" in text and "modelhub pull hf://me/mine" in remarks
    status, text, remarks = run("info", "me/mine")
    assert status == 0 and "me/mine" in text and "modelhub pull me/mine" in remarks
    (tmp_path / "work" / "empty").mkdir()
    (tmp_path / "work" / "wrong.gguf").write_bytes(b"no GGUF")
    for name, says in [
        ("./empty", "holds no config.json"),
        ("./nothing", "does not exist"),
        ("wrong.gguf", "wrong.gguf"),
        ("hf://me", "no address"),
        ("gemma_2b_em", "Did you mean gemma_2b_en"),
    ]:
        status, text, said = run("info", name)
        assert (status, text) == (1, "") and says in said and "Traceback" not in said


def test_pull_prints_the_place(run, tiny_preset):
    assert run("pull", tiny_preset)[1] == f"{tiny_preset}\n"
    assert os.path.isfile(os.path.join(run("pull", "gemma3_tiny")[1].strip(), "config.json"))


def test_pull_for_programs(run, tiny_preset):
    found = json.loads(run("pull", tiny_preset, "--json")[1])
    size = sum(os.path.getsize(os.path.join(tiny_preset, name)) for name in os.listdir(tiny_preset))
    assert found == {"name": str(tiny_preset), "revision": None, "path": str(tiny_preset), "bytes_on_disk": size}


def test_pull_that_is_stopped_says_how_it_goes_on(run, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("modelhub.hub.preset.resolve", stopped)
    assert run("pull", "smollm2_135m_instruct_q4") == (130, "", "stopped; the same command fetches what is missing\n")


def test_a_family_of_another_package(run, package, tiny_preset, tmp_path):
    from modelhub import CausalLM
    from modelhub.errors import ConfigError
    from modelhub.families import family_names, family_of, gemma

    points = "bigram = their_bigram\nbroken = their_broken\nempty = their_empty\ngemma2 = their_broken\n"
    package("theirs", points, their_bigram=BIGRAM, their_broken="import no_such_module", their_empty="")
    folder = tmp_path / "bigram"
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_preset / name).read_bytes())
    (folder / "config.json").write_text(json.dumps({"model_type": "bigram", "vocab_size": 400, "hidden_size": 8}))
    table = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    save_file({"model.embed_tokens.weight": table}, folder / "model.safetensors")

    lm = CausalLM.from_preset(str(folder), backend="numpy")
    np.testing.assert_allclose(np.asarray(lm.logits([[3, 7]]))[0], table[[3, 7]] @ table.T, rtol=1e-4, atol=1e-5)
    assert len(lm.generate("The river", max_new_tokens=3)) > 0
    assert json.loads(run("info", folder, "--json")[1])["parameters"] == 3200
    (tmp_path / "work" / "mine.toml").write_text(CARD.replace('"gemma"\ntask', '"bigram"\ntask'))
    assert run("register", "mine.toml")[0] == 0
    assert "bigram" in run("list")[1].splitlines()

    assert "their_broken" not in sys.modules  # only the one that is asked for is imported
    assert family_of("gemma2") is gemma  # a built-in one is never replaced
    assert {"bigram", "broken", "gemma", "llama"} <= family_names()
    with pytest.raises(ConfigError, match=r"package theirs brings their_broken.*no_such_module"):
        family_of("broken")
    with pytest.raises(ConfigError, match=r"package theirs brings their_empty.*lacks Config, Model, names"):
        family_of("empty")
    with pytest.raises(ConfigError, match=r"'gpt2' is not supported; supported: .*mistral.*bigram"):
        family_of("gpt2")
    for strange in (None, [], {"a": 1}):
        with pytest.raises(ConfigError, match="not supported"):
            family_of(strange)
    package("others", "bigram = their_bigram\n")
    with pytest.raises(ConfigError, match=r"claimed by the package (theirs and the package others|others and)"):
        family_of("bigram")
