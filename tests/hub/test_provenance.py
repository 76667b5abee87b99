"""Where a model comes from: modelhub.json and the front matter of README.md, also such as nobody should trust."""

import dataclasses
import json
import time

import numpy as np
import pytest

from modelhub.errors import CheckpointError
from modelhub.hub.provenance import FILE, Provenance, TrainingRun, is_repo_id, read_provenance, write_provenance

RUN = TrainingRun(
    data="dolly_style.jsonl", settings={"learning_rate": 2e-4, "betas": [0.9, 0.999], "schedule": None, "packing": True},
    metrics={"loss": 2.5, "val_loss": 2.75}, losses=[(1, 3.5), (2, 3.0)], adapter={"rank": 8, "targets": ["q_proj"]},
    examples=250, tokens=31415, seconds=60.5, backend="jax", date="2025-01-31T12:00:00+00:00",
)  # fmt: skip
WHOLE = Provenance("hf://google/gemma-3-270m@abc", "google/gemma-3-270m", "gemma", False, (RUN,))


def written(folder, text):
    (folder / FILE).write_text(text if isinstance(text, str) else json.dumps(text))
    return folder


def from_card(folder, header):
    (folder / "README.md").write_bytes(header if isinstance(header, bytes) else f"---\n{header}\n---\n# A\n".encode())
    return read_provenance(folder)


# modelhub.json


@pytest.mark.parametrize(
    "provenance",
    [
        WHOLE,
        Provenance(),
        Provenance(from_scratch=True, runs=(RUN, RUN)),
        Provenance("hf://me/a@b", "me/a", "mit", base_licence="gemma"),
        WHOLE.with_run(dataclasses.replace(RUN, data="Käse \ud800 \n---\n", adapter=None, examples=None, seconds=None)),
    ],
)
def test_what_is_written_is_read(tmp_path, provenance):
    write_provenance(tmp_path, provenance)
    assert read_provenance(tmp_path) == provenance
    assert (tmp_path / FILE).read_bytes().isascii()


def test_a_run_is_added_at_the_end():
    later = dataclasses.replace(RUN, data="b.csv")
    assert WHOLE.with_run(later).runs == (RUN, later)
    assert WHOLE.runs == (RUN,)


def test_values_that_json_does_not_have(tmp_path):
    run = dataclasses.replace(
        RUN,
        settings={"rate": np.float32(0.5), "rows": np.int64(3), "clip": float("inf"), "loss": object, "deep": [[[[[[[1]]]]]]]},
        metrics={"loss": np.float32(1.5), "val_loss": float("nan")},
        losses=[(1, float("nan")), (np.int64(2), np.float64(3.0)), (3, float("inf"))],
        adapter={"alpha": np.float64(2)},
    )  # fmt: skip
    assert run.settings["rate"] == 0.5 and run.settings["rows"] == 3 and run.settings["clip"] == "inf"
    assert run.metrics == {"loss": 1.5} and run.losses == [(2, 3.0)] and run.adapter == {"alpha": 2.0}
    write_provenance(tmp_path, Provenance(runs=(run,)))
    assert read_provenance(tmp_path).runs == (run,)


def test_values_that_make_no_sense(tmp_path):
    run = dataclasses.replace(
        RUN, metrics={"loss": 1e305, "val_loss": -2.0}, losses=[(-1, 1.0), (1, 1e305), (2, 3.0)], examples=-1, tokens=2**64,
        seconds=float("nan"), backend="b" * 3000, date="d" * 3000, data="x" * 3000,
    )  # fmt: skip
    assert (run.metrics, run.losses, run.examples, run.tokens, run.seconds) == (
        {"val_loss": -2.0},
        [(2, 3.0)],
        None,
        None,
        None,
    )
    assert dataclasses.replace(RUN, seconds=np.float32(1.5), examples=np.int64(3)).seconds == 1.5
    text = "x" * 3000
    whole = Provenance(text, text, text, False, (run, dataclasses.replace(RUN, seconds=float("inf"))), text)
    write_provenance(tmp_path, whole)
    found = read_provenance(tmp_path)
    assert found.runs == whole.runs and found.licence == found.base == found.base_licence == "x" * 2000


@pytest.mark.parametrize("count", [0, 1, 2, 199, 200, 201, 5000])
def test_the_curve_is_thinned_between_its_ends(count):
    losses = dataclasses.replace(RUN, losses=[(i, 1.0) for i in range(count)]).losses
    steps = [step for step, _ in losses]
    assert len(steps) == min(count, 200) and sorted(set(steps)) == steps
    assert not steps or (steps[0], steps[-1]) == (0, count - 1)


def test_the_file_stays_small_and_the_newest_run_is_kept(tmp_path):
    long = {f"key {i}": "x" * 100_000 for i in range(500)}
    run = dataclasses.replace(RUN, settings=long, data="d" * 10_000, losses=[(i, 1 / 3) for i in range(1000)])
    last = dataclasses.replace(RUN, data="the last")
    write_provenance(tmp_path, Provenance(runs=(run,) * 50 + (last,)))
    assert (tmp_path / FILE).stat().st_size <= 1_000_000
    runs = read_provenance(tmp_path).runs
    assert runs[-1] == last and runs[:-1] == (run,) * (len(runs) - 1)
    assert 1 < len(runs) < 51


def test_keys_of_a_later_version_are_passed_over(tmp_path):
    table = dataclasses.asdict(WHOLE) | {"new": 1}
    table["runs"][0]["new"] = {}
    assert read_provenance(written(tmp_path, table)) == WHOLE


def changed(**run):
    return dataclasses.asdict(WHOLE) | {"runs": [dataclasses.asdict(RUN) | run]}


def test_layers(tmp_path):
    made = dataclasses.replace(WHOLE, layers=(("mlp", "small"), ("layers.0.mlp", "large")))
    write_provenance(tmp_path, made)
    assert read_provenance(tmp_path) == made
    table = dataclasses.asdict(WHOLE)
    del table["layers"]  # of an earlier version
    assert read_provenance(written(tmp_path, table)) == WHOLE


DAMAGED = {
    "layers": ({"layers": [["mlp"]]}, "layers is"),
    "empty": ("", "not JSON"),
    "no json": ("{", "not JSON"),
    "no utf-8": ("\udcff", "not JSON"),
    "list": ("[]", "JSON object"),
    "deep": ("[" * 200_000, "not JSON"),
    "huge number": ('{"base": ' + "9" * 5000 + "}", "not JSON"),
    "huge": (" " * 1_000_001, "at most"),
    "base": ({"base": 3}, "base is 3"),
    "long base": ({"base": "x" * 5000}, "base is 'xxx"),
    "scratch": ({"from_scratch": "yes"}, "from_scratch"),
    "runs": ({"runs": {}}, "runs is"),
    "run": ({"runs": [3]}, "runs is"),
    "no keys": ({"runs": [{}]}, r"runs\[0\].data"),
    "settings": (changed(settings=[]), r"runs\[0\].settings is \[\]"),
    "metrics": (changed(metrics={"loss": "low"}), r"runs\[0\].metrics"),
    "nan": (changed(metrics={"loss": float("nan")}), r"runs\[0\].metrics"),
    "infinite": (changed(seconds=10**400), r"runs\[0\].seconds"),
    "losses": (changed(losses=[[1]]), r"runs\[0\].losses"),
    "step": (changed(losses=[["1", 2.0]]), r"runs\[0\].losses"),
    "true": (changed(examples=True), r"runs\[0\].examples is True"),
    "negative": (changed(tokens=-1), r"runs\[0\].tokens is -1"),
}  # fmt: skip


@pytest.mark.parametrize("content, message", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named(tmp_path, content, message):
    if isinstance(content, str):
        (tmp_path / FILE).write_bytes(content.encode(errors="surrogateescape"))
    else:
        written(tmp_path, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_provenance(tmp_path)
    assert str(tmp_path / FILE) in str(caught.value) and len(str(caught.value)) < 2000


# README.md


CARDS = {
    "license: gemma\nbase_model: google/gemma-3-270m": ("gemma", "google/gemma-3-270m"),
    "license: [mit]\nbase_model:\n- me/a": ("mit", "me/a"),
    "license: other\nlicense_name: my-own": ("my-own", None),
    "license: other\nbase_model: me/a": (None, "me/a"),
    "base_model: [me/a, me/b]\nlicense: mit": ("mit", None),  # a merge
    "base_model: /home/me/model\nlicense: mit": ("mit", None),
    "base_model: ../../etc/passwd\nlicense: mit": ("mit", None),
    "license: 2024-01-01\nbase_model: me/a": (None, "me/a"),
    "license: {a: b}\nbase_model: 3\n": None,
    "license: ''": None,
    "tags: [x]": None,
    "- a": None,
    "": None,
    "license: [": None,
    "license: !!python/object/apply:os.mkdir [ran]": None,
    "license: !!timestamp x": None,
    "license: !!bool x": None,
    "license: &a mit\nother: *a": None,
    "x: " + "[" * 20_000: None,
    "license: mit\nx: " + "a" * 200_000: None,  # no end within what is read
}  # fmt: skip


@pytest.mark.parametrize("header", CARDS, ids=lambda header: header[:40])
def test_front_matter(tmp_path, monkeypatch, header):
    monkeypatch.chdir(tmp_path)
    found, expected = from_card(tmp_path, header), CARDS[header]
    assert found == (expected and Provenance(licence=expected[0], base_model=expected[1]))
    assert not (tmp_path / "ran").exists()


def test_bombs_of_aliases_and_merges_are_not_unfolded(tmp_path):
    nested = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))
    merges = "m0: &m0 {k: v}\n" + "".join(
        f"m{i}: &m{i}\n  <<: [{', '.join([f'*m{i - 1}'] * 9)}]\n" for i in range(1, 40)
    )
    start = time.monotonic()
    assert from_card(tmp_path, f"license: mit\n{nested}") is None
    assert from_card(tmp_path, f"license: mit\n{merges}") is None
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "raw, licence",
    [
        (b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n# A", "mit"),
        (b"---\nlicense: mit\nname: \xff\xfe\n---", "mit"),
        (b"\n\n--- \nlicense: mit\n---\n\n---\nlicense: gemma\n---\n", "mit"),
        (b"# A\n\n---\nlicense: mit\n---\n", None),
        (b"---\nlicense: mit\n", None),
        (b"", None),
        (bytes(range(256)) * 100, None),
    ],
)
def test_bytes_of_a_card(tmp_path, raw, licence):
    found = from_card(tmp_path, raw)
    assert (found and found.licence) == licence


def test_our_own_file_goes_first(tmp_path):
    from_card(tmp_path, "license: mit")
    write_provenance(tmp_path, WHOLE)
    assert read_provenance(tmp_path) == WHOLE
    assert read_provenance(tmp_path / "elsewhere") is None
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()  # foreign, whatever it is
    assert read_provenance(tmp_path) == Provenance(licence="mit")


NAMES = [
    "google/gemma-3-270m", "me/a_b.c", "a/b", "_/b", "m" * 50 + "/" + "n" * 50, "a/" + "b" * 97, "a--b/c", "a/b..c",
    "a/b/c", "a/", "/a", "a/b c", "a/b\n", "../b", "a/.b", "a/b.", "-a/b", "a/b-", "a/b.git", "a/b@main", "a/<b>",
]  # fmt: skip


@pytest.mark.parametrize("text", NAMES)
def test_names_of_repositories_are_those_that_the_hub_allows(text):
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if is_repo_id(text):
        validate_repo_id(text)
    else:
        with pytest.raises(HFValidationError):
            validate_repo_id(text)
