"""Presets on the Hugging Face Hub, through the real client, from a stand-in: what is fetched, and what is cached."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import close_session, snapshot_download
from stand_ins.hf_client import start, use_only
from stand_ins.hf_hub import ACCEPTED, Repo, commit_of, serve

from modelhub.errors import CheckpointError, DownloadError, InputError, PresetNotFound
from modelhub.hub.preset import resolve, resolve_adapter
from modelhub.hub.sources import Options, huggingface, source_of

MODEL = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"#",
    "model.safetensors.index.json": b"{}",
    "model-00001-of-00002.safetensors": b"first",
    "model-00002-of-00002.safetensors": b"second",
}
EXTRAS = {
    ".gitattributes": b"",
    "consolidated.safetensors": b"the same once more",
    "pytorch_model.bin": b"pickle",
    "original/config.json": b"{}",
    "onnx/model.safetensors": b"",
}
OLDER = {"config.json": b"old", "model.safetensors": b"old"}
LARGE = random.Random(0).randbytes(3_000_000)
BIG = {"config.json": b"{}", "model.safetensors": LARGE}
KERAS = {
    "config.json": b"{}",
    "metadata.json": b"{}",
    "assets/tokenizer/vocabulary.spm": b"spm",
    "model.weights.h5": b"h5",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, which the client takes for the Hub, and a cache of the client's own in tmp_path."""
    hub = serve()
    hub.repos["google/tiny"] = Repo({"main": {**MODEL, **EXTRAS}, "older": OLDER})
    hub.repos["google/big"] = Repo({"main": BIG})
    hub.repos["google/gated"] = Repo({"main": MODEL}, gated=True)
    hub.repos["me/hidden"] = Repo({"main": MODEL}, private=True)
    hub.repos["me/notes"] = Repo({"main": {"README.md": b"#"}})
    hub.repos["me/pickles"] = Repo({"main": {"config.json": b"{}", "pytorch_model.bin": b"pickle"}})
    hub.repos["me/gguf"] = Repo({"main": {"a-Q4.gguf": LARGE[:5000], "F16/b.gguf": b"GGUF", "README.md": b"#"}})
    hub.repos["me/lora"] = Repo({"main": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"lora"}})
    hub.repos["keras/tiny"] = Repo({"main": {**KERAS, "other.weights.h5": b"h5"}})
    use_only(hub, tmp_path, monkeypatch)
    yield hub
    hub.close()


def cached(name):
    return source_of(name).find(Options())


def files(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# What is fetched


def test_only_what_is_needed_is_downloaded(hub, tmp_path):
    preset = resolve("hf://google/tiny")
    assert files(preset.path) == MODEL
    assert preset.source == f"hf://google/tiny@{commit_of(hub.repos['google/tiny'].revisions['main'])}"
    assert preset.path.is_relative_to(tmp_path / "hf" / "hub")  # the Hub's own cache, shared with transformers
    assert cached("hf://google/tiny") == preset.path


def test_a_kerashub_preset(hub):
    assert files(resolve("hf://keras/tiny").path) == KERAS


def test_config_and_tokenizer_alone(hub):
    assert set(files(resolve("hf://google/tiny", weights=False).path)) == {n for n in MODEL if "model" not in n}
    with pytest.raises(DownloadError, match="not complete in the cache"):  # these do not pass for the whole preset
        resolve("hf://google/tiny", offline=True)
    assert resolve("hf://google/tiny", offline=True, weights=False)
    resolve("hf://google/tiny")
    assert files(resolve("hf://google/tiny", offline=True).path) == MODEL


def test_an_own_cache(hub, tmp_path, monkeypatch):
    assert resolve("hf://google/tiny", cache_dir=tmp_path / "mine").path.is_relative_to(tmp_path / "mine" / "hf")
    assert cached("hf://google/tiny") is None
    monkeypatch.setenv("MODELHUB_CACHE", str(tmp_path / "other"))
    assert resolve("hf://google/tiny").path.is_relative_to(tmp_path / "other" / "hf")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "{home}/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HF_HOME": "~/hf", "XDG_CACHE_HOME": "/x"}, "{home}/hf/hub"),
        ({"HF_HUB_CACHE": "$HF_HOME/c", "HF_HOME": "/hf"}, "/hf/c"),
        ({"HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
    ],
)
def test_the_clients_cache_is_found_without_it(tmp_path, settings, expected):
    program = """
import sys
from modelhub.hub.sources.huggingface import client_cache
print(client_cache(), "huggingface_hub" in sys.modules)
from huggingface_hub import constants
print(constants.HF_HUB_CACHE)
"""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "MODELHUB_", "XDG_"))}
    env = kept | settings | {"HOME": str(tmp_path)}
    answer = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout
    place = expected.format(home=tmp_path)
    assert answer.split() == [place, "False", place]


def test_revisions(hub):
    older = commit_of(OLDER)
    assert files(resolve("hf://google/tiny@older").path) == OLDER
    assert resolve("hf://google/tiny", revision="older").path.name == older
    assert resolve(f"hf://google/tiny@{older}", revision=older).path.name == older
    with pytest.raises(InputError, match="@older.*'main'"):
        resolve("hf://google/tiny@older", revision="main")
    for name in ("hf://google/tiny@never", f"hf://google/tiny@{'0' * 40}"):
        with pytest.raises(PresetNotFound, match=name.partition("@")[2]):
            resolve(name)


@pytest.mark.parametrize("name", ["hf://me/gguf/a-Q4.gguf", "hf://me/gguf/F16/b.gguf@main"])
def test_one_gguf_file_of_a_repository(hub, name):
    preset = resolve(name)
    main = hub.repos["me/gguf"].revisions["main"]
    file = name.removeprefix("hf://me/gguf/").removesuffix("@main")
    assert preset.path.read_bytes() == main[file]
    assert preset.source == f"hf://me/gguf/{file}@{commit_of(main)}"
    assert resolve(name, offline=True).path == preset.path
    assert sum("/resolve/" in request for request in hub.requests if "GET" in request) == 1
    with pytest.raises(PresetNotFound, match=r"no file c.gguf; it holds F16/b.gguf, a-Q4.gguf"):
        resolve("hf://me/gguf/c.gguf")
    with pytest.raises(PresetNotFound, match="give the path of one"):
        resolve("hf://me/gguf")


def test_adapters(hub, tmp_path):
    path = resolve_adapter("hf://me/lora")
    assert set(files(path)) == {"adapter_config.json", "adapter_model.safetensors"}
    assert resolve_adapter("hf://me/lora", offline=True) == path
    assert resolve_adapter("here") == Path.cwd() / "here"
    with pytest.raises(PresetNotFound, match=r"an adapter.*lm.load_adapter\('hf://me/lora'\)"):
        resolve("hf://me/lora")
    with pytest.raises(PresetNotFound, match="hf://google/tiny holds no adapter"):
        resolve_adapter("hf://google/tiny")
    assert hub.asked("GET", "safetensors") == 1  # of the adapter; not the model's
    with pytest.raises(InputError, match="local path"):
        resolve_adapter("here", revision="main")


@pytest.mark.parametrize("token", [None, "hf_someone_else"])
def test_a_gated_repository_says_where_to_accept_and_how_to_log_in(hub, token):
    with pytest.raises(DownloadError, match=f"{hub.url}/google/gated.*hf auth login"):
        resolve("hf://google/gated", token=token)
    assert files(resolve("hf://google/gated", token=ACCEPTED).path) == MODEL


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("hf://google/nothing", PresetNotFound, "google/nothing.*private.*hf auth login"),
        ("hf://me/hidden", PresetNotFound, "me/hidden.*private.*hf auth login"),
        ("hf://me/notes", PresetNotFound, "no config.json"),
        ("hf://me/pickles", CheckpointError, "only as pickles.*any code"),
    ],
)
def test_repositories_that_cannot_be_loaded(hub, name, error, words):
    with pytest.raises(error, match=words):
        resolve(name)
    assert not any("/resolve/" in request for request in hub.requests)


# The cache


def test_offline_and_without_a_network(hub, monkeypatch):
    with pytest.raises(DownloadError, match="modelhub pull hf://google/tiny"):
        resolve("hf://google/tiny", offline=True)
    assert hub.requests == []
    path = resolve("hf://google/tiny").path
    hub.close()
    close_session()  # its connections outlive the server
    assert resolve("hf://google/tiny").path == path
    with pytest.raises(DownloadError, match="Check the network.*Presets in the cache"):
        resolve("hf://google/gated")

    def no_network(*args):
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for name in ("hf://google/tiny", f"hf://google/tiny@{path.name}"):
        assert resolve(name, offline=True).path == path
    assert resolve(f"hf://google/tiny@{path.name}").path == path


def test_a_cached_commit_needs_neither_the_client_nor_a_network(hub, tmp_path):
    path = resolve("hf://google/tiny").path
    hub.requests.clear()
    program = f"""
import sys
from modelhub.hub.preset import resolve
print(resolve("hf://google/tiny@{path.name}").path, *{{"huggingface_hub", "filelock", "numpy"}} & sys.modules.keys())
"""
    with start(hub, tmp_path, program) as one:
        assert one.communicate()[0].split() == [str(path)]
    assert hub.requests == []


def test_new_weights_on_the_hub_are_taken(hub):
    before = resolve("hf://google/tiny").path
    hub.repos["google/tiny"].revisions["main"] = {**MODEL, "config.json": b'{"newer": true}'}
    after = resolve("hf://google/tiny").path
    assert before != after
    assert (after / "config.json").read_bytes() == b'{"newer": true}'
    assert resolve("hf://google/tiny", offline=True).path == after


def test_a_snapshot_of_transformers_is_checked_once_and_not_fetched_again(hub):
    path = snapshot_download("google/tiny", allow_patterns=[*MODEL])
    asked = hub.asked("GET", "/resolve/")
    with pytest.raises(DownloadError, match="not complete"):  # who knows what is missing in it
        resolve("hf://google/tiny", offline=True)
    assert str(resolve("hf://google/tiny").path) == path
    assert hub.asked("GET", "/resolve/") == asked
    assert str(resolve("hf://google/tiny", offline=True).path) == path


@pytest.fixture
def no_network(hub):
    """Takes it away."""

    def cut():
        hub.close()
        close_session()  # its connections outlive the server

    return cut


@pytest.mark.parametrize("way", ["offline=True", "no network", "a commit and no network"])
def test_what_transformers_has_fetched_loads_without_a_network(hub, no_network, monkeypatch, way):
    path = Path(snapshot_download("google/big"))
    no_network()
    read = []
    checksum_of = huggingface.checksum_of
    monkeypatch.setattr(huggingface, "checksum_of", lambda path, like: read.append(path) or checksum_of(path, like))
    name = f"hf://google/big@{path.name}" if "commit" in way else "hf://google/big"
    for _ in range(2):
        assert resolve(name, offline=way == "offline=True").path == path
    assert len(read) == len(BIG)  # checked once
    assert cached("hf://google/big") is None  # the Hub may have more, such as a tokenizer


def test_what_transformers_has_fetched_in_part_is_completed(hub):
    path = Path(snapshot_download("google/big"))
    hub.repos["google/big"].revisions["main"] = newer = BIG | {"tokenizer.json": b"{}"}
    partial = Path(snapshot_download("google/big", ignore_patterns=["tokenizer.json"]))
    assert partial != path and resolve("hf://google/big", offline=True).path == partial
    assert files(resolve("hf://google/big").path) == newer
    assert cached("hf://google/big") == partial


@pytest.mark.parametrize("damage", ["a shard is missing", "changed", "a copy"])
def test_what_transformers_has_not_fetched_whole_does_not_load(hub, damage):
    index = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    hub.repos["google/tiny"].revisions["main"] = MODEL | {"model.safetensors.index.json": index}
    second = "model-00002-of-00002.safetensors"
    path = Path(snapshot_download("google/tiny", ignore_patterns=second if "missing" in damage else None))
    if damage == "changed":
        (path / second).resolve().write_bytes(b"SECOND")
    if damage == "a copy":  # as on systems without links: nothing tells its checksum
        (path / second).unlink()
        (path / second).write_bytes(b"second")
    with pytest.raises(DownloadError, match="hf://google/tiny is not complete in the cache and offline=True"):
        resolve("hf://google/tiny", offline=True)
    assert resolve("hf://google/tiny", weights=False, offline=True).path == path


@pytest.mark.parametrize("mover", ["modelhub", "transformers"])
def test_a_look_at_a_newer_config_leaves_the_older_model_usable(hub, no_network, mover):
    older = resolve("hf://google/big").path
    hub.repos["google/big"].revisions["main"] = BIG | {"config.json": b'{"newer": true}'}
    if mover == "modelhub":
        newer = resolve("hf://google/big", weights=False).path
    else:
        newer = Path(snapshot_download("google/big", allow_patterns=["config.json"]))
    assert newer != older and (newer / "config.json").read_bytes() == b'{"newer": true}'
    assert resolve("hf://google/big", offline=True).path == older
    no_network()
    assert resolve("hf://google/big").path == older
    with pytest.raises(DownloadError):  # another branch, of which nothing was fetched, is not that one
        resolve("hf://google/big@older", offline=True)


def test_a_file_that_lost_its_end_is_fetched_again(hub):
    path = resolve("hf://google/tiny").path
    shard = path / "model-00002-of-00002.safetensors"
    shard.resolve().write_bytes(b"sec")
    assert cached("hf://google/tiny") is None
    assert files(resolve("hf://google/tiny").path) == MODEL


def test_a_cache_for_reading_only(hub, tmp_path, monkeypatch):
    snapshot_download("google/tiny", allow_patterns=[*MODEL])
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(huggingface.os, "access", lambda path, mode: False)
    monkeypatch.setattr(huggingface, "checksum_of", None)  # reading all of it again each time would help nobody
    assert files(resolve("hf://google/tiny").path) == MODEL
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_commit_shares_with_another_is_neither_fetched_nor_read_again(hub, monkeypatch):
    resolve("hf://google/big")
    hub.repos["google/big"].revisions["main"] = BIG | {"README.md": b"newer"}
    read = []
    checksum_of = huggingface.checksum_of
    monkeypatch.setattr(
        huggingface, "checksum_of", lambda path, like: read.append(path.name) or checksum_of(path, like)
    )
    assert files(resolve("hf://google/big").path) == BIG | {"README.md": b"newer"}
    assert read == ["README.md"]
    assert hub.asked("GET", "/objects/") == 1


@pytest.mark.parametrize("path", ["../evil", "assets/tokenizer/../../../../evil", "/tmp/evil", "assets\\..\\evil"])
def test_paths_that_leave_the_folder_are_left_out(hub, tmp_path, path):
    hub.repos["keras/tiny"].revisions["main"] |= {path: b"evil"}
    assert files(resolve("hf://keras/tiny").path) == KERAS
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("stated", ["../../../evil", "", "x" * 64])
def test_what_is_no_checksum_is_no_name_of_a_file(hub, tmp_path, monkeypatch, stated):
    monkeypatch.setattr("stand_ins.hf_hub._digest", lambda path, content: stated)
    with pytest.raises(DownloadError, match="as the checksum of model.safetensors, which is none"):
        resolve("hf://google/big")
    assert not list(tmp_path.rglob("evil*"))


def test_a_full_disk_is_said_before_the_transfer(hub, monkeypatch):
    monkeypatch.setattr(huggingface.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DownloadError, match=r"cannot be written.*0.00 GB are free.*MODELHUB_CACHE"):
        resolve("hf://google/big")
    assert not any("/resolve/" in request for request in hub.requests)


@pytest.mark.parametrize("name", ["hf://a/../x.gguf", "hf://a/b/../../x.gguf", "hf://a/b@../../x", "hf://a/b/c.bin"])
def test_addresses_that_are_none(name):
    with pytest.raises(PresetNotFound, match="hf://owner/name"):
        source_of(name)


def test_records_that_are_damaged_are_as_good_as_none(hub):
    path = resolve("hf://google/big").path
    (record,) = path.parents[1].glob("modelhub/*/model.json")
    for text in ("", "{", "[]", '{"config.json": 1}', json.dumps({"config.json": {"size": 1}})):
        record.write_text(text)
        assert cached("hf://google/big") is None
    assert resolve("hf://google/big").path == path
    assert cached("hf://google/big") == path
