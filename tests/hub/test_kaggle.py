"""Models on Kaggle: the real kagglehub against a stand-in."""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kagglehub
import pytest
from kagglesdk import kaggle_env
from stand_ins.faults import Fault
from stand_ins.kaggle import Model, serve

from modelhub.errors import CheckpointError, DownloadError, InputError, PresetNotFound
from modelhub.hub.preset import resolve
from modelhub.hub.sources import KaggleSource, Options, Unreachable, entry, source_of

WEIGHTS = bytes(range(256)) * 20_000  # 5 MB: kagglehub writes blocks of 1 MB
MODEL = {
    "config.json": b"{}",
    "metadata.json": b"{}",
    "tokenizer.json": b"{}",
    "assets/tokenizer/vocabulary.spm": b"pieces",
    "model.weights.h5": WEIGHTS,
}
EXTRAS = {"setup.py": b"#", "more/model.safetensors": b"", "model.bin": b"a pickle"}
ADDRESS = "kaggle://me/tiny/keras/base"
TOKEN = "KGAT_a_secret"


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    kaggle = serve()
    older = MODEL | {"config.json": b'{"older": true}'}
    kaggle.models["me/tiny"] = Model({("keras", "base"): [older, MODEL | EXTRAS]})
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, kaggle.url)
    monkeypatch.setattr("kagglehub.clients.get_user_agent", lambda: "kagglehub")  # reads all modules: 1 s a call
    monkeypatch.setattr(entry, "PAUSES", [0.0] * 5)
    monkeypatch.setenv("HOME", str(tmp_path))  # no credentials of the user's
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLEHUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    yield kaggle
    kaggle.close()


@pytest.fixture
def options(tmp_path):
    return Options(cache_dir=tmp_path / "cache")


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "source.json"
    }


def storage_requests(kaggle):
    return [request for request in kaggle.requests if request.startswith("GET") and "weights.h5" in request]


def process(kaggle, options, before=""):
    """A process that fetches the model."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})
from stand_ins.kaggle import redirect
from modelhub.hub.sources import Options, source_of
redirect({kaggle.url!r})
{before}
print(source_of({ADDRESS!r}).fetch(Options(cache_dir={str(options.cache_dir)!r})))
"""
    return subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, stderr=-1, text=True)


def test_only_what_is_needed_is_downloaded(kaggle, options, capsys):
    source = source_of(ADDRESS)
    assert source.find(options) is None
    folder = source.fetch(options)
    assert files(folder) == MODEL
    assert source.address(folder) == f"{ADDRESS}/2"
    record = json.loads((folder / "source.json").read_text())
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in MODEL.items()}
    assert record == {"address": f"{ADDRESS}/2", "files": sums, "weights": True}
    assert [path.name for path in folder.parent.iterdir() if path.suffix != ".lock"] == [folder.name]
    assert capsys.readouterr().out == ""


def test_the_client_is_left_as_it_was(kaggle, options):
    before = dict(os.environ)
    source_of(ADDRESS).fetch(options)
    assert dict(os.environ) == before
    assert logging.getLogger("kagglehub").level == logging.INFO
    assert not Path("~/.cache/kagglehub").expanduser().exists()  # HOME is the test's


def test_versions(kaggle, options):
    older = source_of(f"{ADDRESS}/1").fetch(options)
    assert (older / "config.json").read_bytes() == b'{"older": true}'
    by_argument = Options(revision="1", cache_dir=options.cache_dir)
    assert source_of(ADDRESS).find(by_argument) == older
    assert source_of(ADDRESS).find(options) == older  # the newest that is here
    newest = source_of(ADDRESS).fetch(options)
    assert newest != older and source_of(ADDRESS).find(options) == newest
    with pytest.raises(InputError, match="'main'.*version's number"):
        source_of(ADDRESS).fetch(Options(revision="main", cache_dir=options.cache_dir))
    with pytest.raises(PresetNotFound, match="version"):
        source_of(f"{ADDRESS}/9").fetch(options)


def test_config_and_tokenizer_alone(kaggle, options):
    without = Options(cache_dir=options.cache_dir, weights=False)
    folder = source_of(ADDRESS).fetch(without)
    assert sorted(files(folder)) == sorted(set(MODEL) - {"model.weights.h5"})
    assert source_of(ADDRESS).find(options) is None
    assert source_of(ADDRESS).fetch(options) == folder
    assert files(folder) == MODEL
    assert source_of(ADDRESS).find(without) == folder


def test_a_cached_version_needs_no_network(kaggle, options):
    folder = source_of(ADDRESS).fetch(options)
    kaggle.requests.clear()
    assert source_of(f"{ADDRESS}/2").fetch(options) == folder
    assert kaggle.requests == []
    assert source_of(ADDRESS).fetch(options) == folder
    assert kaggle.requests == ["POST GetModelInstance"]
    kaggle.close()
    with pytest.raises(Unreachable, match="Check the network"):
        source_of("kaggle://me/other/keras/base").fetch(options)


@pytest.mark.parametrize("trouble", ["no network", "no login", "gone", "busy"])
def test_a_cached_model_serves_whatever_kaggle_says(kaggle, options, monkeypatch, trouble):
    """Asked once, as nothing depends on it: pauses between attempts would take half a minute."""
    folder = source_of(ADDRESS).fetch(options)
    monkeypatch.setattr(entry.time, "sleep", lambda seconds: pytest.fail("it waited"))
    match trouble:
        case "no network":
            kaggle.close()
        case "no login":
            kaggle.models["me/tiny"].private = True
        case "gone":
            del kaggle.models["me/tiny"]
        case "busy":
            kaggle.faults.append(Fault("GetModelInstance", "status", method="POST", status=503))
    with pytest.warns(UserWarning, match=f"{ADDRESS}.*Taken as it is in the cache: {ADDRESS}/2"):
        assert source_of(ADDRESS).fetch(options) == folder


def test_files_of_another_length_than_kaggle_lists(kaggle, options, monkeypatch):
    listing = KaggleSource._listing
    monkeypatch.setattr(KaggleSource, "_listing", lambda *args: listing(*args) | {"tokenizer.json": 7})
    with pytest.raises(DownloadError, match="tokenizer.json has 2 bytes, and Kaggle lists it with 7; it was removed"):
        source_of(ADDRESS).fetch(options)
    assert source_of(ADDRESS).find(options) is None
    monkeypatch.setattr(KaggleSource, "_listing", lambda *args: listing(*args) | {"tokenizer.json": 0})  # not said
    assert files(source_of(ADDRESS).fetch(options)) == MODEL


def test_resolving(kaggle, options):
    preset = resolve(ADDRESS, cache_dir=options.cache_dir)
    assert preset.source == f"{ADDRESS}/2" and files(preset.path) == MODEL
    with pytest.raises(InputError, match="one revision"):
        resolve(f"{ADDRESS}/1", revision="2")
    kaggle.requests.clear()
    assert resolve(ADDRESS, offline=True, cache_dir=options.cache_dir).path == preset.path
    with pytest.raises(DownloadError, match="offline=True.*modelhub pull kaggle://me/tiny/keras/base/1"):
        resolve(f"{ADDRESS}/1", offline=True, cache_dir=options.cache_dir)
    assert kaggle.requests == []


def test_finding_and_importing_touch_no_network(kaggle, options):
    folder = source_of(ADDRESS).fetch(options)
    script = f"""
import socket
def refuse(*args): raise SystemExit("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
import kagglehub
from modelhub.hub.sources import Options, source_of
print(source_of({ADDRESS!r}).find(Options(cache_dir={str(options.cache_dir)!r})))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == str(folder), run.stderr


def test_a_gated_model_says_where_to_accept_and_how_to_log_in(kaggle, options, monkeypatch, tmp_path):
    kaggle.models["me/tiny"].gated = True
    with pytest.raises(DownloadError) as error:
        source_of(ADDRESS).fetch(options)
    for words in ("https://www.kaggle.com/models/me/tiny", "kagglehub.login()", "KAGGLE_API_TOKEN"):
        assert words in str(error.value)
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    folder = source_of(ADDRESS).fetch(options)
    assert files(folder) == MODEL
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_token_for_the_hugging_face_hub_is_not_sent(kaggle, options):
    kaggle.models["me/tiny"].gated = True
    with pytest.raises(DownloadError, match="licence"):
        source_of(ADDRESS).fetch(Options(token="hf_secret", cache_dir=options.cache_dir))


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("kaggle://me/nothing/keras/base", "no kaggle://me/nothing/keras/base"),
        ("kaggle://me/tiny/keras/other", "Check framework, variation"),
        ("kaggle://me/tiny/fortran/base", "no framework 'fortran'"),
    ],
)
def test_what_kaggle_does_not_have(kaggle, options, address, words):
    with pytest.raises(PresetNotFound, match=words):
        source_of(address).fetch(options)


@pytest.mark.parametrize(
    "address",
    ["me/tiny", "me/tiny/keras", "me/tiny/keras/base/newest", "me/tiny/keras/base/0", "me/../keras/base", "a/b/c/d+1"],
)
def test_addresses_that_are_none(address):
    with pytest.raises(PresetNotFound, match="owner/model/framework/variation"):
        KaggleSource.parse(f"kaggle://{address}")


def test_only_pickles(kaggle, options):
    kaggle.models["me/tiny"].variations["keras", "base"] = [{"config.json": b"{}", "pytorch_model.bin": b"pickle"}]
    with pytest.raises(CheckpointError, match="kaggle://me/tiny/keras/base/1 holds its weights only as pickles"):
        source_of(ADDRESS).fetch(options)


# Faults


@pytest.mark.parametrize(
    "fault",
    [
        Fault("weights.h5", "cut", after=3_000_000),
        Fault("weights.h5", "status", status=503),
        Fault("weights.h5", "status", status=429, headers={"Retry-After": "0"}),
        Fault("weights.h5", "slow", seconds=0.3),
        Fault("DownloadModelInstanceVersion", "status", method="POST", status=500),
        Fault("GetModelInstance", "status", method="POST", status=429),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}-{fault.method}",
)
def test_what_passes_is_tried_again(kaggle, options, fault):
    kaggle.faults.append(fault)
    assert files(source_of(ADDRESS).fetch(options)) == MODEL
    assert fault.times == 0


def test_a_cut_transfer_goes_on_where_it_stopped(kaggle, options, monkeypatch):
    monkeypatch.setattr(entry, "PAUSES", [])
    kaggle.faults.append(Fault("weights.h5", "cut", after=3_000_000))
    with pytest.raises(Unreachable, match="what arrived is kept") as error:
        source_of(ADDRESS).fetch(options)
    assert "Signature" not in str(error.value)
    kaggle.requests.clear()
    assert files(source_of(ADDRESS).fetch(options)) == MODEL
    resumed = [request for request in storage_requests(kaggle) if "bytes=" in request]
    assert len(resumed) == 1 and int(resumed[0].rpartition("=")[2].rstrip("-")) >= 2 << 20
    assert not any("config.json" in request for request in kaggle.requests)  # that had arrived


def test_a_server_that_stays_ill(kaggle, options):
    kaggle.faults.append(Fault("weights.h5", "status", status=503, times=100))
    with pytest.raises(Unreachable, match="503.*Try again later") as error:
        source_of(ADDRESS).fetch(options)
    assert len(storage_requests(kaggle)) == 6
    assert "Signature" not in str(error.value)  # of the storage's signed address
    assert source_of(ADDRESS).find(options) is None


def test_wrong_bytes_are_not_kept(kaggle, options):
    kaggle.faults.append(Fault("weights.h5", "corrupt"))
    with pytest.raises(DownloadError, match="wrong bytes.*Try again"):
        source_of(ADDRESS).fetch(options)
    assert source_of(ADDRESS).find(options) is None
    assert files(source_of(ADDRESS).fetch(options)) == MODEL


def test_sums_that_came_with_the_model_are_checked(kaggle, options):
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in MODEL.items()}
    version = MODEL | {"SHA256SUMS": "".join(f"{value}  {name}\n" for name, value in sums.items()).encode()}
    kaggle.models["me/tiny"].variations["keras", "base"] = [version, version | {"config.json": b"changed"}]
    assert files(source_of(f"{ADDRESS}/1").fetch(options)) == MODEL
    with pytest.raises(DownloadError, match="config.json: not the bytes"):
        source_of(f"{ADDRESS}/2").fetch(options)
    assert source_of(f"{ADDRESS}/2").find(options) is None


def test_files_outside_the_folder(kaggle, options, tmp_path):
    kaggle.models["me/tiny"].variations["keras", "base"] = [MODEL | {"assets/tokenizer/../../../evil": b"!"}]
    with pytest.raises(DownloadError, match="outside its folder"):
        source_of(ADDRESS).fetch(options)
    assert not list(tmp_path.rglob("evil"))


def test_a_full_disk(kaggle, options, monkeypatch):
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": len(WEIGHTS)})
        patch.setattr(entry.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(DownloadError, match="has room for 5,120,000.*MODELHUB_CACHE"):
            source_of(ADDRESS).fetch(options)
    assert storage_requests(kaggle) == []
    assert files(source_of(ADDRESS).fetch(options)) == MODEL


def test_a_cache_that_cannot_be_written(kaggle, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="cannot be written.*MODELHUB_CACHE"):
        source_of(ADDRESS).fetch(Options(cache_dir=tmp_path / "file" / "cache"))


def test_after_a_kill_the_next_process_goes_on(kaggle, options):
    stall = Fault("weights.h5", "stall", after=3_000_000, seconds=3)
    kaggle.faults.append(stall)
    killed = process(kaggle, options)
    partial = Path(options.cache_dir) / "kaggle"
    deadline = time.monotonic() + 30
    while sum(path.stat().st_size for path in partial.rglob("*.h5")) < 2 << 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert source_of(ADDRESS).find(options) is None
    assert files(source_of(ADDRESS).fetch(options)) == MODEL
    assert any("bytes=" in request for request in storage_requests(kaggle))


def test_of_two_processes_one_fetches_and_the_other_waits(kaggle, options):
    kaggle.faults.append(Fault("weights.h5", "slow", seconds=0.5))
    both = [process(kaggle, options, before="sys.stdin.readline()") for _ in range(2)]
    for one in both:  # imports are done apart: now they really start together
        one.stdin.write("go\n")
        one.stdin.flush()
    answers = {one.communicate(timeout=60)[0].strip() for one in both}
    assert answers == {str(source_of(ADDRESS).find(options))}
    assert len(storage_requests(kaggle)) == 1


def test_what_the_client_uploads_comes_back(kaggle, options, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    for name, content in MODEL.items():
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "new" / name).write_bytes(content)
    for _ in range(2):
        kagglehub.model_upload("me/fresh/keras/mine", str(tmp_path / "new"), license_name="Apache 2.0")
    assert kaggle.models["me/fresh"].private and kaggle.models["me/fresh"].licence == "Apache 2.0"
    folder = source_of("kaggle://me/fresh/keras/mine").fetch(options)
    assert folder.name.endswith("+2")
    assert files(folder) == MODEL
