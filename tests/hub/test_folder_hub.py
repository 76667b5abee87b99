"""The shared-folder hub: published folders are copied and checked, plain ones are used in place."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from modelhub.errors import DownloadError, InputError, PresetNotFound
from modelhub.hub.preset import resolve
from modelhub.hub.sources import FolderSource, Options, Unreachable, entry, source_of
from modelhub.hub.sources import folder as hub
from modelhub.hub.sources.folder import read_sums

MODEL = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": bytes(range(256)) * 10_000}
EXTRAS = {"notes.txt": b"# A model", "setup.py": b""}


def publish(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    sums = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(content.items())]
    (folder / "SHA256SUMS").write_text("".join(sums))


@pytest.fixture
def share(tmp_path):
    """A shared folder with one published model."""
    publish(tmp_path / "share" / "tiny", MODEL | EXTRAS)
    return tmp_path / "share"


@pytest.fixture
def options(tmp_path):
    return Options(cache_dir=tmp_path / "cache")


def source(path):
    return source_of(path.as_uri())


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "source.json"}


def forbid_copies(patch):
    patch.setattr(hub, "_blocks", lambda path: pytest.fail(f"{path} was read"))


def test_a_published_folder_is_copied(share, options, monkeypatch):
    tiny = source(share / "tiny")
    assert tiny.find(options) is None
    path = tiny.fetch(options)
    assert path.is_relative_to(options.cache_dir)
    assert files(path) == MODEL
    assert tiny.address(path) == (share / "tiny").as_uri()
    record = json.loads((path / "source.json").read_text())
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in MODEL.items()}
    assert record == {"address": (share / "tiny").as_uri(), "files": sums, "weights": True}
    forbid_copies(monkeypatch)
    assert tiny.fetch(options) == tiny.find(options) == path


def test_sums_that_coreutils_wrote(share, options):
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum here")
    for mode in ("--binary", "--text"):
        text = subprocess.check_output(["sha256sum", mode, *MODEL], cwd=share / "tiny")
        assert sorted(read_sums(text, "here")) == sorted(MODEL)
    (share / "tiny" / "SHA256SUMS").write_bytes(text)
    assert files(source(share / "tiny").fetch(options)) == MODEL
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=share / "tiny", check=True)


def test_config_and_tokenizer_alone(share, options):
    without = Options(cache_dir=options.cache_dir, weights=False)
    path = source(share / "tiny").fetch(without)
    assert sorted(files(path)) == ["config.json", "tokenizer.json"]
    assert source(share / "tiny").find(options) is None
    assert files(source(share / "tiny").fetch(options)) == MODEL


def test_revisions(share, options):
    publish(share / "tiny@v1", MODEL | {"config.json": b'{"v": 1}'})
    by_address = source_of(f"{(share / 'tiny').as_uri()}@v1")
    assert by_address.revision == "v1" and source(share / "tiny").revision is None
    path = by_address.fetch(options)
    assert (path / "config.json").read_bytes() == b'{"v": 1}'
    v1 = Options(revision="v1", cache_dir=options.cache_dir)
    assert source(share / "tiny").fetch(v1) == by_address.fetch(v1) == path
    assert source(share / "tiny").address(path) == f"{(share / 'tiny').as_uri()}@v1"
    assert files(source(share / "tiny").fetch(options)) == MODEL
    with pytest.raises(PresetNotFound, match="tiny@v9"):
        source(share / "tiny").fetch(Options(revision="v9", cache_dir=options.cache_dir))
    for revision in ("v2", "../v1"):
        with pytest.raises(InputError, match="folder `name@v1` beside it"):
            by_address.fetch(Options(revision=revision, cache_dir=options.cache_dir))


def test_what_is_published_anew_is_taken(share, options):
    old = source(share / "tiny").fetch(options)
    publish(share / "tiny", MODEL | {"config.json": b'{"new": true}'})
    new = source(share / "tiny").fetch(options)
    assert (new / "config.json").read_bytes() == b'{"new": true}'
    assert files(old) == MODEL  # whoever reads it still can
    assert source(share / "tiny").find(options) == new
    publish(share / "tiny", MODEL | EXTRAS)
    os.utime(new / "source.json", (1, 1))
    assert source(share / "tiny").fetch(options) == old
    assert source(share / "tiny").find(options) == old


def test_an_unmounted_share(share, options, tmp_path):
    path = source(share / "tiny").fetch(options)
    share.rename(tmp_path / "away")
    assert source(share / "tiny").fetch(options) == source(share / "tiny").find(options) == path
    (share / "tiny").mkdir(parents=True)  # its mount point is still there
    assert source(share / "tiny").fetch(options) == path
    with pytest.raises(PresetNotFound, match="does not exist, and the cache holds no copy.*mounted"):
        source(share / "other").fetch(options)


def test_a_share_that_does_not_answer(share, options, monkeypatch):
    real, failing = open, False

    def broken(path, *args, **kwargs):
        if failing and str(path).startswith(str(share)):
            raise OSError(116, "Stale file handle")
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", broken)
    failing = True
    with pytest.raises(Unreachable, match="Stale file handle.*mounted"):
        source(share / "tiny").fetch(options)
    failing = False
    path = source(share / "tiny").fetch(options)
    failing = True
    assert source(share / "tiny").fetch(options) == path


def test_a_share_that_goes_away_while_it_is_read(share, options, monkeypatch):
    """And the next call goes on: what had arrived is not read again."""
    real = hub._blocks
    read = []

    def broken(path):
        read.append(path.name)
        if path.name == "tokenizer.json" and len(read) < 4:
            raise Unreachable(f"{path} cannot be read")
        return real(path)

    monkeypatch.setattr(hub, "_blocks", broken)
    with pytest.raises(Unreachable):
        source(share / "tiny").fetch(options)
    assert source(share / "tiny").find(options) is None
    assert read == ["config.json", "model.safetensors", "tokenizer.json"]
    assert files(source(share / "tiny").fetch(options)) == MODEL
    assert read[3:] == ["tokenizer.json"]


def test_a_damaged_file_is_named_and_not_kept(share, options):
    (share / "tiny" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(DownloadError, match="model.safetensors: not the bytes that SHA256SUMS promises.*nothing was"):
        source(share / "tiny").fetch(options)
    assert source(share / "tiny").find(options) is None
    (share / "tiny" / "model.safetensors").write_bytes(MODEL["model.safetensors"])
    assert files(source(share / "tiny").fetch(options)) == MODEL


def test_a_folder_that_is_published_anew_while_it_is_copied(share, options, monkeypatch):
    real, newer = hub._blocks, MODEL | {"config.json": b'{"new": true}', "tokenizer.json": b'{"new": true}'}

    def swapped(path):
        blocks = list(real(path))
        publish(share / "tiny", newer)  # after the first file of the old state
        return blocks

    monkeypatch.setattr(hub, "_blocks", swapped)
    assert files(source(share / "tiny").fetch(options)) == newer


@pytest.mark.parametrize(
    "line",
    [
        f"{'0' * 64}  ../evil",
        f"{'0' * 64}  /etc/passwd",
        f"{'0' * 64}  a\\b",
        f"{'0' * 64}  C:evil",
        f"{'0' * 64}  .",
        f"{'0' * 63}  config.json",
        f"\\{'0' * 64}  a\\nb",
        "config.json",
    ],
)
def test_lines_that_are_no_sum(share, options, line):
    with open(share / "tiny" / "SHA256SUMS", "a") as manifest:
        manifest.write(line + "\n")
    with pytest.raises(DownloadError, match="no sum of a file in its folder"):
        source(share / "tiny").fetch(options)


def test_manifests_of_no_reasonable_size(share, options):
    (share / "tiny" / "SHA256SUMS").write_bytes(bytes(2 << 20))
    with pytest.raises(DownloadError, match="larger than"):
        source(share / "tiny").fetch(options)


def test_links(share, options, tmp_path):
    weights = share / "tiny" / "model.safetensors"
    weights.rename(share / "tiny" / "blob")
    weights.symlink_to("blob")
    assert files(source(share / "tiny").fetch(options)) == MODEL  # inside the folder they are fine
    assert not any(path.is_symlink() for path in Path(options.cache_dir).rglob("*"))
    secret = tmp_path / "secret"
    secret.write_bytes(MODEL["config.json"])
    (share / "tiny" / "config.json").unlink()
    (share / "tiny" / "config.json").symlink_to(secret)
    publish(share / "other", MODEL)
    (share / "other" / "config.json").unlink()
    (share / "other" / "config.json").symlink_to(secret)
    with pytest.raises(DownloadError, match="config.json is a link to .*secret, which is outside"):
        source(share / "other").fetch(options)


def test_a_file_that_is_listed_and_missing(share, options):
    (share / "tiny" / "tokenizer.json").unlink()
    with pytest.raises(DownloadError, match="lists tokenizer.json, which is no file there"):
        source(share / "tiny").fetch(options)


def test_a_full_disk(share, options, monkeypatch):
    monkeypatch.setattr(entry.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DownloadError, match="bytes more, and .* has room for 1,000"):
        source(share / "tiny").fetch(options)


def test_a_plain_folder_is_used_in_place(share, options):
    (share / "tiny" / "SHA256SUMS").unlink()
    assert source(share / "tiny").fetch(options) == source(share / "tiny").find(options) == share / "tiny"
    assert source(share / "tiny").address(share / "tiny") == (share / "tiny").as_uri()
    (share / "model.gguf").write_bytes(b"GGUF")
    assert source(share / "model.gguf").fetch(options) == share / "model.gguf"
    assert not Path(options.cache_dir).exists()
    with pytest.raises(PresetNotFound, match="notes.txt is a file, but no .gguf"):
        (share / "notes.txt").touch()
        source(share / "notes.txt").fetch(options)


@pytest.mark.parametrize("offline", [False, True])
def test_resolving(share, options, offline, tmp_path):
    address = (share / "tiny").as_uri()
    preset = resolve(address, offline=offline, cache_dir=options.cache_dir)  # a folder takes no network
    assert files(preset.path) == MODEL
    assert (preset.name, preset.source) == ("tiny", address)
    share.rename(tmp_path / "away")
    assert resolve(address, offline=offline, cache_dir=options.cache_dir) == preset
    with pytest.raises(InputError, match="one revision"):
        resolve(f"{address}@v1", revision="v2")


@pytest.mark.parametrize("address", ["file://server/share/tiny", "file:tiny", "hf://a/b", "file://"])
def test_addresses_that_are_none(address):
    with pytest.raises(PresetNotFound, match="write file:///path"):
        FolderSource.parse(address)


def test_names_that_an_address_must_quote(tmp_path, options):
    publish(tmp_path / "our models" / "größe 7#b", MODEL)
    path = source(tmp_path / "our models" / "größe 7#b").fetch(options)
    assert files(path) == MODEL
