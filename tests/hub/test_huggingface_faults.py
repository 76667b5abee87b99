"""Transfers from the Hugging Face Hub that go wrong: the real client against a stand-in that misbehaves on request."""

import logging
import os
import pty
import random
import signal
import termios
import time
from contextlib import suppress

import pytest
from huggingface_hub import file_download
from stand_ins.faults import Fault
from stand_ins.hf_client import start, use_only
from stand_ins.hf_hub import Repo, serve

from modelhub.errors import DownloadError, PresetNotFound
from modelhub.hub.preset import resolve
from modelhub.hub.sources import Options, Unreachable, entry, source_of

BIG = {"config.json": b"{}", "model.safetensors": random.Random(0).randbytes(3_000_000)}
RESOLVE = "from modelhub.hub.preset import resolve; import sys; sys.stdin.readline(); print(resolve({!r}).path)"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, which the client takes for the Hub, and a cache of the client's own in tmp_path."""
    hub = serve()
    hub.repos["google/big"] = Repo({"main": BIG})
    hub.repos["google/gated"] = Repo({"main": BIG}, gated=True)
    use_only(hub, tmp_path, monkeypatch)
    monkeypatch.setattr(entry, "PAUSES", [0.01, 0.01])
    yield hub
    hub.close()


def files(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_cut_transfer_goes_on(hub):
    hub.faults.append(Fault("/objects/", "cut", after=1_000_000))
    assert files(resolve("hf://google/big").path) == BIG
    assert hub.asked("GET", "/objects/") == 2


def test_a_killed_transfer_goes_on_in_the_next_process(hub, tmp_path, monkeypatch):
    hub.faults.append(Fault("/objects/", "stall", after=2_000_000, seconds=60))
    small_blocks = "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1 << 16;"
    with start(hub, tmp_path, small_blocks + RESOLVE.format("hf://google/big")) as first:
        first.stdin.write("go\n")
        first.stdin.flush()
        blobs = tmp_path / "hf" / "hub" / "models--google--big" / "blobs"
        deadline = time.monotonic() + 60
        while not any(file.stat().st_size for file in blobs.glob("*.incomplete")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
    assert source_of("hf://google/big").find(Options()) is None
    arrived = max(file.stat().st_size for file in blobs.glob("*.incomplete"))
    asked = []
    http_get = file_download.http_get

    def recorded(*args, resume_size=0, **kwargs):
        asked.append(resume_size)
        return http_get(*args, resume_size=resume_size, **kwargs)

    monkeypatch.setattr(file_download, "http_get", recorded)
    assert files(resolve("hf://google/big").path) == BIG
    assert asked == [arrived, 0]  # the second is config.json
    assert not list(blobs.glob("*.incomplete"))


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("path", ["/revision/main", "/tree/", "/objects/"])
def test_a_server_that_stumbles_is_asked_again(hub, status, path):
    hub.faults.append(Fault(path, "status", status=status, headers={"Retry-After": "0"}))
    assert files(resolve("hf://google/big").path) == BIG


def test_a_server_that_stays_down_is_an_error_that_says_so(hub):
    hub.faults.append(Fault("/revision/main", "status", status=500, times=100))
    with pytest.raises(DownloadError, match="500.*[Tt]ry again"):
        resolve("hf://google/big")
    assert hub.asked("GET", "/revision/main") == 1 + len(entry.PAUSES)
    hub.faults[:] = [Fault("/revision/main", "status", status=429, headers={"Retry-After": "3600"}, times=100)]
    with pytest.raises(DownloadError, match="429"):  # at once
        resolve("hf://google/big")
    assert hub.asked("GET", "/revision/main") == 2 + len(entry.PAUSES)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_wrong_bytes_are_refused_and_removed(hub, tmp_path, name):
    hub.faults.append(Fault("/objects/" if "model" in name else name, "corrupt"))
    with pytest.raises(DownloadError, match=f"{name} has the wrong bytes.*was removed") as error:
        resolve("hf://google/big")
    assert not isinstance(error.value, Unreachable)
    assert source_of("hf://google/big").find(Options()) is None
    assert not list(tmp_path.rglob(name))
    assert files(resolve("hf://google/big").path) == BIG


def test_of_two_processes_one_fetches_and_the_other_waits(hub, tmp_path):
    hub.faults.append(Fault("/objects/", "slow", seconds=1))
    both = [start(hub, tmp_path, RESOLVE.format("hf://google/big")) for _ in range(2)]
    for one in both:
        one.stdin.write("go\n")
        one.stdin.flush()
    answers = {one.communicate(timeout=60)[0].strip() for one in both}
    assert answers == {str(source_of("hf://google/big").find(Options()))}
    assert hub.asked("GET", "/objects/") == 1
    assert hub.asked("GET", "/config.json") == 1


def test_a_slow_transfer_shows_its_progress(hub, tmp_path):
    hub.faults.append(Fault("/objects/", "slow", seconds=0.5))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with start(hub, tmp_path, RESOLVE.format("hf://google/big"), stderr=theirs) as one:
        one.communicate("go\n", timeout=60)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # the end of a terminal
        while block := os.read(ours, 1 << 16):
            shown += block
    os.close(ours)
    shown = shown.decode()
    assert "model.safetensors" in shown and "100%" in shown and "3.00M" in shown


def test_a_token_goes_nowhere_but_to_the_hub(hub, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    token = "hf_secretSecretSecret"
    seen = []
    for name in ("hf://google/big", "hf://google/gated", "hf://google/nothing"):
        try:
            seen.append(repr(resolve(name, token=token)))
        except DownloadError as error:
            seen.append(f"{error} {error.__cause__!r}")
        except PresetNotFound as error:
            seen.append(f"{error} {error.__cause__!r}")
    seen += [
        repr(Options(token=token)),
        caplog.text,
        *(str(vars(record)) for record in caplog.records),
        *capfd.readouterr(),
    ]
    assert len(caplog.records) > 5
    assert not any(token in text for text in seen)
    held = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert held and not any(token.encode() in file.read_bytes() for file in held)
