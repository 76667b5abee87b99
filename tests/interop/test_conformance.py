"""The table of distances from transformers: it is complete, and a mistake of ours shows in it."""

import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from modelhub.cli.commands import app
from modelhub.core.backends import installed
from modelhub.core.backends.torch import TorchBackend
from modelhub.errors import BackendNotInstalled, InputError, UnknownBackend
from modelhub.interop import conformance as module
from modelhub.interop.conformance import BOUND, FACTOR, FAMILIES, Case, conformance


@pytest.fixture(scope="module")
def report():
    return conformance(["mistral", "vit"])


def test_every_backend_conforms(report):
    assert not report.failures
    found = {(figure.family, figure.dtype, figure.quantity, figure.backend) for figure in report.figures}
    assert found == {
        (family, dtype, quantity, backend)
        for family in ("mistral", "vit")
        for dtype in ("float32", "bfloat16")
        for quantity in ("logits", "loss", "gradients")
        for backend in installed()
        if (backend, quantity) != ("numpy", "gradients")
    }
    for figure in report.figures:
        if figure.dtype == "float32":
            assert figure.error == figure.difference <= BOUND and figure.theirs == 0
        else:
            assert figure.theirs > 0 and figure.error <= figure.bound >= FACTOR * figure.theirs


def test_the_page(report):
    text = report.as_markdown()
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("| family")]
    assert [len(table) for table in tables] == [8, 8, 8]  # two families, three quantities, two lines of a head
    assert all(len({len(line) for line in table}) == 1 for table in tables)
    assert all(name in tables[0][0] for name in installed()) and "transformers" in tables[1][0]
    first = next(x for x in report.figures if (x.dtype, x.quantity) == ("bfloat16", "logits"))
    assert f"{first.theirs:.1e}" in tables[1][2] and f"{first.error:.1e}" in tables[1][2]
    assert "**" not in "".join(line for table in tables for line in table)


def test_the_published_page_is_of_these_families():
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text()
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row and row != "family" and not row.startswith("-")] == 3 * list(FAMILIES)
    assert "| **" not in page


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_weight_is_seen(monkeypatch, dtype):
    ours, weights = module._ours, module._weights

    def perturbed(case):
        values = weights(case)
        values["model.layers.1.mlp.up_proj.weight"][3, 5] += 4.0
        return values

    def ours_perturbed(*args):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_weights", perturbed)
            return ours(*args)

    monkeypatch.setattr(module, "_ours", ours_perturbed)
    found = conformance(["llama"], ["torch"], [dtype])
    assert "logits" in {figure.quantity for figure in found.failures}
    assert "llama on torch in" in str(found.failures[0])
    assert "**" in found.as_markdown().partition("| family")[2]


def test_a_wrong_gradient_is_seen(monkeypatch):
    monkeypatch.setattr(TorchBackend, "silu", lambda self, x: x * self.sigmoid(x).detach())
    found = conformance(["llama"], ["torch"], ["float32"])
    assert [figure.quantity for figure in found.failures] == ["gradients"]


def test_what_is_no_number_does_not_conform(monkeypatch):
    monkeypatch.setattr(TorchBackend, "silu", lambda self, x: x * float("nan"))
    found = conformance(["llama"], ["torch"], ["float32"])
    assert len(found.failures) == 3


FEATURES = {
    "gemma2": [{"sliding_window": 64}, {"attn_logit_softcapping": None}, {"final_logit_softcapping": None}],
    "gemma3": [{"sliding_window": 64}, {"query_pre_attn_scalar": 12}, {"rope_parameters": None}],
    "llama3": [{"rope_parameters": None}],
    "mistral": [{"sliding_window": None}],
    "vit": [{"hidden_act": "relu"}],
}


@pytest.mark.parametrize("family", FEATURES)
def test_the_features_change_the_logits(family):
    """Or the figures would say nothing about them."""
    case = FAMILIES[family]
    whole = module._theirs(case, "float32").logits
    for change in FEATURES[family]:
        other = Case(case.model, copy.deepcopy(case.config) | change, case.size)
        assert np.abs(module._theirs(other, "float32").logits - whole).max() > 100 * BOUND, change


def test_command(tmp_path, monkeypatch):
    options = ["conformance", "--families", " vit", "--backends", "numpy, torch", "--dtypes", "float32 "]
    done = CliRunner().invoke(app, [*options, "--output", str(tmp_path / "page.md")])
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text().count("| vit ") == 1
    monkeypatch.setattr(module, "BOUND", 0.0)
    done = CliRunner().invoke(app, [*options, "--json"])
    assert done.exit_code == 1 and "vit on torch in float32: logits off by" in done.stderr
    found = json.loads(done.stdout)
    assert set(found["versions"]) == {"modelhub", "transformers", "torch", "numpy"}
    assert [x["conforms"] for x in found["figures"] if x["quantity"] == "logits"] == [False, False]


def test_bad_input(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="unknown family 'gpt2', 'vitt'; choose among gemma, gemma2"):
        conformance(["gpt2", "vit", "vitt"])
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        conformance(dtypes=["int8"])
    with pytest.raises(UnknownBackend, match="mxnet"):
        conformance(backends=["mxnet"])
    done = CliRunner().invoke(app, ["conformance", "--output", str(tmp_path / "no" / "page.md")])
    assert isinstance(done.exception, InputError) and "there is no folder" in str(done.exception)
    monkeypatch.setattr(module, "conformance", lambda *args, **kwargs: pytest.fail("it measured"))
    for folder in (str(tmp_path), ""):
        done = CliRunner().invoke(app, ["conformance", "--output", folder])
        assert isinstance(done.exception, InputError) and "is a folder; give a file" in str(done.exception)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find_spec(name))
    with pytest.raises(BackendNotInstalled, match="pip install transformers"):
        conformance(["vit"], ["numpy"])
