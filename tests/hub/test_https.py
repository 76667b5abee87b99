"""Files on a web server, over TLS with a certificate of its own authority."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from stand_ins.faults import Fault
from stand_ins.https import serve

from modelhub.errors import DownloadError, InputError, PresetNotFound
from modelhub.hub.preset import resolve, resolve_adapter
from modelhub.hub.sources import HttpsSource, Options, Unreachable, archives, entry, source_of

CONTENT = b"GGUF" + bytes(range(256)) * 20_000  # 5 MB: blocks of 1 MB are written
MODEL = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": CONTENT[:3000]}
EXTRAS = {"setup.py": b"#", "onnx/model.onnx": b"", "training_args.bin": b"a pickle"}


@pytest.fixture
def site(monkeypatch, tmp_path):
    site = serve(tmp_path)
    site.files["/a/model.gguf"] = CONTENT
    monkeypatch.setenv("SSL_CERT_FILE", str(site.authority))
    monkeypatch.setattr(entry, "PAUSES", [0.0] * 5)
    yield site
    site.close()


@pytest.fixture
def options(tmp_path):
    return Options(cache_dir=tmp_path / "cache")


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def source(site, path="/a/model.gguf", content=CONTENT):
    return source_of(f"{site.url}{path}#sha256={sha256(content)}")


def kept(options):
    """What is in the cache, apart from locks."""
    return [p for p in Path(options.cache_dir).rglob("*") if p.is_file() and p.suffix != ".lock"]


def process(site, options, before=""):
    script = f"""
import sys
from modelhub.hub.sources import Options, source_of
{before}
print(source_of({site.url + "/a/model.gguf#sha256=" + sha256(CONTENT)!r}).fetch(Options(cache_dir={str(options.cache_dir)!r})))
"""
    return subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, stderr=-1, text=True)


def test_a_gguf_file(site, options):
    assert source(site).find(options) is None
    path = source(site).fetch(options)
    assert path.name == "model.gguf" and path.read_bytes() == CONTENT
    address = f"{site.url}/a/model.gguf#sha256={sha256(CONTENT)}"
    assert source(site).address(path) == address
    record = json.loads((path.parent / "source.json").read_text())
    assert record == {"address": address, "files": {"model.gguf": sha256(CONTENT)}, "weights": True}
    assert sorted(kept(options)) == sorted([path, path.parent / "source.json"])
    site.close()
    assert source(site).fetch(options) == path  # known by its sum: nobody is asked
    assert source_of(f"https://mirror.example/b.gguf#sha256={sha256(CONTENT)}").find(options) == path
    assert len(site.requests) == 1


def test_resolving(site, options):
    address = f"{site.url}/a/model.gguf#sha256={sha256(CONTENT)}"
    with pytest.raises(DownloadError, match="offline=True"):
        resolve(address, offline=True, cache_dir=options.cache_dir)
    assert site.requests == []
    preset = resolve(address, cache_dir=options.cache_dir)
    assert preset.path.read_bytes() == CONTENT and preset.source == address
    assert resolve(address, offline=True, cache_dir=options.cache_dir).path == preset.path
    assert len(site.requests) == 1
    with pytest.raises(InputError, match="no revisions"):
        resolve(address, revision="v1")


def test_a_query_may_be_a_secret(site, options):
    signed = source_of(f"{site.url}/a/model.gguf?signature=secret#sha256={sha256(CONTENT)}")
    path = signed.fetch(options)
    assert site.requests == ["GET /a/model.gguf?signature=secret"]
    assert "secret" not in signed.address(path) + (path.parent / "source.json").read_text()
    with pytest.raises(PresetNotFound) as error:
        source_of(f"{site.url}/b.gguf?signature=secret#sha256={sha256(b'')}").fetch(options)
    assert "secret" not in str(error.value)
    address = f"{site.url}/a/model.gguf?signature=secret#sha256={sha256(CONTENT)}"
    preset = resolve(address, cache_dir=options.cache_dir)  # its name is shown, and written into records
    assert preset.name == preset.source == address.replace("?signature=secret", "")
    for more in ({"offline": True}, {"revision": "v1"}):
        with pytest.raises((DownloadError, InputError)) as refused:
            resolve(address.replace(sha256(CONTENT), "0" * 64), cache_dir=options.cache_dir, **more)
        assert "signature" not in str(refused.value)
    with pytest.raises(DownloadError) as missing:
        resolve_adapter(address.replace("model", "none"), offline=True, cache_dir=options.cache_dir / "none")
    assert "signature" not in str(missing.value)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("https://host/model.gguf", "no checksum.*#sha256=<64 hex digits>"),
        ("https://host/model.gguf#sha256=abc", "expected #sha256= and 64 hex digits"),
        (f"https://host/model.gguf#md5={'0' * 64}", "expected #sha256="),
        (f"http://host/model.gguf#sha256={'0' * 64}", "over https only"),
        (f"https:///model.gguf#sha256={'0' * 64}", "over https only"),
        (f"https://me:secret@host/model.gguf#sha256={'0' * 64}", "leave the user and password out"),
        (f"https://host/model.bin#sha256={'0' * 64}", "pickle.*can run any code"),
        (f"https://host/model.safetensors#sha256={'0' * 64}", "no known kind.*tar.gz"),
        (f"https://[host/model.gguf#sha256={'0' * 64}", "no address"),
    ],
)
def test_addresses_that_are_none(address, words):
    with pytest.raises(PresetNotFound, match=words) as error:
        HttpsSource.parse(address)
    assert "secret" not in str(error.value)


# Transfers


@pytest.mark.parametrize(
    "fault",
    [
        Fault("model.gguf", "cut", after=3_000_000),
        Fault("model.gguf", "cut", after=0, times=3),
        Fault("model.gguf", "status", status=503),
        Fault("model.gguf", "status", status=429, headers={"Retry-After": "0"}),
        Fault("model.gguf", "slow", seconds=0.3),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.after or fault.status}",
)
def test_what_passes_is_tried_again(site, options, fault):
    site.faults.append(fault)
    assert source(site).fetch(options).read_bytes() == CONTENT
    assert fault.times == 0


def test_a_server_that_says_when_to_come_back(site, options, monkeypatch):
    pauses = []
    monkeypatch.setattr(entry.time, "sleep", pauses.append)
    site.faults.append(Fault("model.gguf", "status", status=429, headers={"Retry-After": "7"}))
    source(site).fetch(options)
    assert pauses == [7]
    site.faults.append(Fault("b.gguf", "status", status=429, headers={"Retry-After": "3600"}))
    with pytest.raises(Unreachable, match="429; it asks to wait 3600 s"):
        source(site, "/b.gguf", b"").fetch(options)
    assert pauses == [7]


@pytest.mark.parametrize("etags", [True, False])
def test_a_cut_transfer_goes_on_where_it_stopped(site, options, monkeypatch, etags):
    site.etags = etags
    monkeypatch.setattr(entry, "PAUSES", [])
    site.faults.append(Fault("model.gguf", "cut", after=3 << 20))
    with pytest.raises(Unreachable, match="what arrived is kept"):
        source(site).fetch(options)
    assert source(site).find(options) is None
    assert source(site).fetch(options).read_bytes() == CONTENT
    assert site.requests == ["GET /a/model.gguf", f"GET /a/model.gguf bytes={3 << 20}-"]


def test_a_file_that_changed_meanwhile_is_taken_whole(site, options, monkeypatch):
    monkeypatch.setattr(entry, "PAUSES", [])
    site.files["/a/model.gguf"] = CONTENT[::-1]
    site.faults.append(Fault("model.gguf", "cut", after=3 << 20))
    with pytest.raises(Unreachable):
        source(site).fetch(options)
    site.files["/a/model.gguf"] = CONTENT
    assert source(site).fetch(options).read_bytes() == CONTENT


def test_all_had_arrived_but_the_end(site, options):
    """A process was killed between the last byte and the check."""
    partial = Path(options.cache_dir) / "https" / f"{sha256(CONTENT)}.partial" / "files" / "model.gguf"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(CONTENT)
    assert source(site).fetch(options).read_bytes() == CONTENT
    assert site.requests == [f"GET /a/model.gguf bytes={len(CONTENT)}-"]
    partial.parent.mkdir(parents=True)
    (Path(options.cache_dir) / "https" / sha256(CONTENT) / "source.json").unlink()
    partial.write_bytes(CONTENT + b"more")
    assert source(site).fetch(options).read_bytes() == CONTENT


def test_wrong_bytes_are_not_kept(site, options):
    site.faults.append(Fault("model.gguf", "corrupt"))
    with pytest.raises(DownloadError, match=f"wrong bytes.*expected {sha256(CONTENT)}.*nothing was kept"):
        source(site).fetch(options)
    assert not any(path.suffix == ".gguf" for path in kept(options))
    assert source(site).fetch(options).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, DownloadError, "refuses it .401.*no credentials"),
        (403, DownloadError, "refuses it .403"),
        (404, PresetNotFound, "no such file"),
        (500, Unreachable, "answers 500. Try again later"),
    ],
)
def test_refusals(site, options, status, kind, words):
    site.faults.append(Fault("model.gguf", "status", status=status, times=100))
    with pytest.raises(kind, match=words):
        source(site).fetch(options)
    assert len(site.requests) == (6 if status == 500 else 1)


def test_no_network(site, options):
    site.close()
    with pytest.raises(Unreachable, match="Check the network"):
        source(site).fetch(options)


def test_a_certificate_of_nobody_is_refused(site, options, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(DownloadError, match="certificate is not valid.*SSL_CERT_FILE") as error:
        source(site).fetch(options)
    assert not isinstance(error.value, Unreachable)
    assert site.requests == []


def test_http_is_for_this_machine_alone(options):
    plain = serve(None)
    plain.files["/model.gguf"] = CONTENT
    try:
        assert source(plain, "/model.gguf").fetch(options).read_bytes() == CONTENT
    finally:
        plain.close()


def test_redirects_stay_on_https(site, options):
    site.files |= {"/moved.gguf": f"{site.url}/a/model.gguf", "/loop.gguf": "/loop.gguf"}
    assert source(site, "/moved.gguf").fetch(options).read_bytes() == CONTENT
    with pytest.raises(Unreachable, match="more than 10 times"):
        source(site, "/loop.gguf", b"").fetch(options)
    site.files["/open.gguf"] = "http://elsewhere.example/model.gguf?signature=secret"
    far = source(site, "/open.gguf", b"")
    with pytest.raises(DownloadError, match="over https only") as error:
        far.fetch(options)
    assert "secret" not in str(error.value)


def test_a_full_disk(site, options, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(entry.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(DownloadError, match="5,120,004 bytes more, and .* room for 1,000"):
            source(site).fetch(options)
    assert not any(path.suffix == ".gguf" for path in kept(options))
    assert source(site).fetch(options).read_bytes() == CONTENT


def test_after_a_kill_the_next_process_goes_on(site, options):
    site.faults.append(Fault("model.gguf", "stall", after=3 << 20, seconds=3))
    killed = process(site, options)
    partial = Path(options.cache_dir) / "https" / f"{sha256(CONTENT)}.partial" / "files" / "model.gguf"
    deadline = time.monotonic() + 30
    while not (partial.exists() and partial.stat().st_size >= 2 << 20) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert source(site).find(options) is None
    assert source(site).fetch(options).read_bytes() == CONTENT
    assert "bytes=" in site.requests[-1]


def test_of_two_processes_one_fetches_and_the_other_waits(site, options):
    site.faults.append(Fault("model.gguf", "slow", seconds=0.5))
    both = [process(site, options, before="sys.stdin.readline()") for _ in range(2)]
    for one in both:
        one.stdin.write("go\n")
        one.stdin.flush()
    answers = {one.communicate(timeout=60)[0].strip() for one in both}
    assert answers == {str(source(site).find(options))}
    assert len(site.requests) == 1


# Archives; test_archives.py has the hostile ones


def zip_of(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def fetch(site, options, path, content):
    site.files[path] = content
    return source(site, path, content).fetch(options)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "source.json"}


def test_an_archive_of_a_model_folder(site, options):
    content = zip_of({f"tiny-main/{name}": data for name, data in (MODEL | EXTRAS).items()})
    folder = fetch(site, options, "/a/tiny.zip", content)
    assert files(folder) == MODEL
    record = json.loads((folder / "source.json").read_text())
    assert record["files"] == {name: sha256(data) for name, data in MODEL.items()}
    assert source(site, "/a/tiny.zip", content).find(options) == folder
    assert not list(folder.parent.glob("*.partial"))


def test_a_hostile_archive_is_not_kept(site, options):
    for content, kind in ((zip_of(MODEL | {"../evil": b"!"}), archives.Refused), (zip_of(EXTRAS), PresetNotFound)):
        with pytest.raises(kind):
            fetch(site, options, "/a/tiny.zip", content)
    assert {path.name for path in kept(options)} == {"validator"}


def test_an_archive_that_does_not_fit_is_kept_until_there_is_room(site, options, monkeypatch):
    content = zip_of(MODEL)
    with monkeypatch.context() as patch:
        patch.setattr(archives, "check_room", lambda *args: (_ for _ in ()).throw(DownloadError("no room")))
        with pytest.raises(DownloadError, match="no room"):
            fetch(site, options, "/m.zip", content)
    assert files(fetch(site, options, "/m.zip", content)) == MODEL
    assert len([request for request in site.requests if "bytes=" not in request]) == 1
