"""Publishing: the real clients against stand-ins, and shared folders, through every kind of trouble."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from stand_ins import hf_hub, kaggle
from stand_ins.faults import Fault
from stand_ins.hf_hub import READ_ONLY, Repo, commit_of

from modelhub.errors import DownloadError, InputError
from modelhub.hub.files import GENERATED
from modelhub.hub.preset import resolve
from modelhub.hub.publish import Change, HubTarget, check_address, plan, publish_folder, shared_folder

TOKEN = "hf_somebodyssecret"
SHARDS = {f"model-0000{i}-of-00003.safetensors": bytes([i]) * 3000 for i in (1, 2, 3)}
TEXTS = {
    "README.md": b"---\nlicense: mit\n---\n",
    "config.json": b"{}",
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.json": b"{}",
}
MODEL = SHARDS | TEXTS
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"lora", "modelhub.json": b"{}"}
EDITED = b"---\nlicense: mit\n---\n# What people should know\n"


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_sums(folder):
    """By the tool that the format comes from."""
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == contents(folder).keys() - {"SHA256SUMS"}
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def states(changes):
    return {change.name: change.state for change in changes}


@pytest.fixture
def model(tmp_path):
    return write(tmp_path / "model", MODEL)


@pytest.fixture
def adapter(tmp_path):
    return write(tmp_path / "adapter", ADAPTER)


# --- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "revision", "words"),
    [
        ("gemma_2b_en", None, "give hf://owner/name"),
        ("/some/folder", None, "file:///folder/name"),
        ("https://example.org/model", None, "nothing to publish to"),
        ("hf://name", None, "write hf://owner/name"),
        ("hf://me/../name", None, "write hf://owner/name"),
        ("hf://me/tiny@" + "0" * 40, None, "a commit"),
        ("hf://me/tiny@v1", "v2", "'v2' another"),
        ("hf://me/tiny@", None, "revision ''"),
        ("hf://me/tiny", "../main", "letters, digits"),
        ("kaggle://me/tiny/transformers", None, "variation"),
        ("kaggle://me/tiny/transformers/base/3", None, "numbers versions itself"),
        ("kaggle://me/tiny/transformers/base", "v1", "numbers versions itself"),
        ("kaggle://me/tiny/nonsense/base", None, "no framework 'nonsense'"),
        ("file://host/folder/name", None, "three slashes"),
        ("file:///", None, "three slashes"),
        ("file:///folder/../name", None, "three slashes"),
    ],
)
def test_addresses_that_cannot_be_published_to(address, revision, words):
    with pytest.raises(InputError, match=words):
        check_address(address, revision)


@pytest.mark.parametrize(
    ("address", "revision", "canonical"),
    [
        ("hf://me/tiny", None, "hf://me/tiny"),
        ("hf://me/tiny@v1", "v1", "hf://me/tiny@v1"),
        ("hf://me/tiny/", "v1.0", "hf://me/tiny@v1.0"),
        ("kaggle://me/tiny/transformers/base", None, "kaggle://me/tiny/transformers/base"),
        ("file:///folder/a%20name/", "v1", "file:///folder/a%20name@v1"),
        ("file://localhost/folder/name", None, "file:///folder/name"),
        ("file:///C#/what?/a name@v1", None, "file:///C%23/what%3F/a%20name@v1"),
        ("file:///C%23/what%3F/a%20name", None, "file:///C%23/what%3F/a%20name"),
    ],
)
def test_addresses(address, revision, canonical):
    assert check_address(address, revision).address == canonical


# --- a shared folder ------------------------------------------------------------------------------------------------


def test_a_shared_folder(model, tmp_path):
    there = tmp_path / "hub" / "tiny"
    done = publish_folder(model, f"file://{there}", message="first")
    assert contents(there).items() >= MODEL.items() and set(done.sent) == contents(there).keys()
    assert done.bytes_sent == sum(map(len, contents(there).values())) and not done.unchanged
    assert done.url is None and done.address == f"file://{there}"
    assert "no private models" in done.remarks[0]
    check_sums(there)
    assert [path.name for path in there.parent.iterdir() if not path.name.endswith(".lock")] == ["tiny"]
    found = resolve(done.address, cache_dir=tmp_path / "cache").path
    assert contents(found).items() >= (SHARDS | {"config.json": b"{}"}).items()


def test_a_revision_is_a_folder_beside(model, tmp_path):
    first = publish_folder(model, f"file://{tmp_path}/hub/tiny")
    write(model, {"config.json": b'{"new": 1}'})
    second = publish_folder(model, f"file://{tmp_path}/hub/tiny", revision="v2")
    assert second.address == f"{first.address}@v2"
    assert (tmp_path / "hub" / "tiny" / "config.json").read_bytes() == b"{}"
    assert (tmp_path / "hub" / "tiny@v2" / "config.json").read_bytes() == b'{"new": 1}'
    assert (resolve(second.address, cache_dir=tmp_path / "cache").path / "config.json").read_bytes() == b'{"new": 1}'


def test_an_unchanged_folder_is_not_written_again(model, tmp_path):
    there = tmp_path / "tiny"
    publish_folder(model, f"file://{there}")
    before = there.stat()
    done = publish_folder(model, f"file://{there}")
    assert done.unchanged and done.sent == () and done.bytes_sent == 0
    assert (there.stat().st_ino, there.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_is_there_is_replaced_as_a_whole_and_repaired(model, tmp_path):
    there = tmp_path / "tiny"
    publish_folder(model, f"file://{there}")
    shutil.rmtree(model)
    write(model, TEXTS | {"model.safetensors": b"one file now"})
    assert states(plan(model, f"file://{there}").files) == {
        **dict.fromkeys(TEXTS, "unchanged"), **dict.fromkeys(SHARDS, "removed"),
        "model.safetensors": "new", "SHA256SUMS": "changed",
    }  # fmt: skip
    done = publish_folder(model, f"file://{there}")
    assert contents(there).keys() == contents(model).keys() | {"SHA256SUMS"}
    assert "model-00001-of-00003.safetensors" in done.remarks[-1]
    (there / "model.safetensors").write_bytes(b"one file NOW")
    assert not publish_folder(model, f"file://{there}").unchanged
    assert (there / "model.safetensors").read_bytes() == b"one file now"
    check_sums(there)


def test_other_peoples_folders_are_not_replaced(model, tmp_path):
    mine = write(tmp_path / "photos", {"cat.jpg": b"miaow"})
    with pytest.raises(InputError, match="cat.jpg, which modelhub has not published"):
        publish_folder(model, f"file://{mine}")
    assert contents(mine) == {"cat.jpg": b"miaow"}
    there = tmp_path / "tiny"
    publish_folder(model, f"file://{there}")
    (there / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="notes.txt"):
        publish_folder(model, f"file://{there}")
    assert (there / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        publish_folder(model, f"file://{tmp_path}/file")
    for inside in (model, model / "there", model.parent):
        with pytest.raises(InputError, match="is inside"):
            publish_folder(model, f"file://{inside}")
    assert contents(model) == MODEL


def test_folders_whose_names_mean_something_in_addresses(model, tmp_path):
    """As a shell writes file://$PWD/..."""
    for name in ("C#/one", "what?/one", "C#/two"):
        done = publish_folder(model, f"file://{tmp_path}/{name}")
        assert contents(tmp_path / name).items() >= MODEL.items()
        for address in (done.address, f"file://{tmp_path}/{name}"):
            assert contents(resolve(address, cache_dir=tmp_path / "cache").path).items() >= SHARDS.items()
    assert sorted(os.listdir(tmp_path)) == ["C#", "cache", "model", "what?"]


def test_no_adapter_takes_the_place_of_a_model_or_the_other_way_round(model, adapter, tmp_path):
    publish_folder(model, f"file://{tmp_path}/hub/tiny")
    publish_folder(adapter, f"file://{tmp_path}/hub/lora")
    for folder, name, words in [(adapter, "tiny", "tiny holds a model"), (model, "lora", "lora holds an adapter")]:
        before = contents(tmp_path / "hub" / name)
        with pytest.raises(InputError, match=f"{words}.*another name"):
            publish_folder(folder, f"file://{tmp_path}/hub/{name}")
        assert contents(tmp_path / "hub" / name) == before


def test_a_full_disk_leaves_what_was_published(model, tmp_path, monkeypatch):
    there = tmp_path / "tiny"
    publish_folder(model, f"file://{there}")
    before = contents(there)
    write(model, {"config.json": b'{"new": 1}'})
    real, copied = shutil.copyfile, []

    def copyfile(source, target):
        if len(copied) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copied.append(real(source, target))

    monkeypatch.setattr(shared_folder.shutil, "copyfile", copyfile)
    with pytest.raises(DownloadError, match="No space left.*as it was"):
        publish_folder(model, f"file://{there}")
    assert contents(there) == before
    assert not [path for path in tmp_path.iterdir() if "saving" in path.name]


def test_a_kill_leaves_what_was_published(model, tmp_path):
    there = tmp_path / "tiny"
    publish_folder(model, f"file://{there}")
    before = contents(there)
    write(model, {"config.json": b'{"new": 1}'})
    script = f"""
import os, shutil, signal
from modelhub.hub.publish import publish_folder
real = shutil.copyfile
def copyfile(source, target):
    real(source, target)
    if "00002" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
shutil.copyfile = copyfile
publish_folder({str(model)!r}, "file://{there}")
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -signal.SIGKILL
    assert contents(there) == before
    publish_folder(model, f"file://{there}")
    assert contents(there)["config.json"] == b'{"new": 1}'
    assert not [path for path in tmp_path.iterdir() if "saving" in path.name]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a swap is two renames")
def test_readers_never_find_half_a_publication(model, tmp_path):
    there = tmp_path / "tiny"
    other = write(tmp_path / "other", {**TEXTS, "model.safetensors": b"one file"})
    publish_folder(model, f"file://{there}")
    stop, seen = threading.Event(), set()

    def read():
        while not stop.is_set():
            handle = os.open(there, os.O_RDONLY)  # one state of the folder, whatever the name means a moment later
            seen.add(frozenset(os.listdir(handle)))
            os.close(handle)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        publish_folder(other, f"file://{there}")
        publish_folder(model, f"file://{there}")
    stop.set()
    reader.join()
    whole = {frozenset(MODEL.keys() | {"SHA256SUMS"}), frozenset(contents(other).keys() | {"SHA256SUMS"})}
    # A folder that has been replaced is emptied: who still holds it sees fewer files, never others.
    assert whole & seen and all(any(names <= state for state in whole) for names in seen)
    assert contents(there).items() >= MODEL.items()


def test_two_who_publish_at_once_wait_for_each_other(model, tmp_path):
    there = tmp_path / "tiny"
    others = [write(tmp_path / f"other{i}", {**TEXTS, "model.safetensors": bytes([i]) * 100_000}) for i in range(4)]
    threads = [threading.Thread(target=publish_folder, args=(folder, f"file://{there}")) for folder in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_sums(there)
    assert (there / "model.safetensors").read_bytes() in [bytes([i]) * 100_000 for i in range(4)]


# --- the Hugging Face Hub -------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = hf_hub.serve()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    yield hub
    hub.close()


def head(hub, branch="main"):
    return hub.repos["me/tiny"].revisions[branch]


def test_a_new_repository(hub, model, tmp_path):
    done = publish_folder(model, "hf://me/tiny")
    assert hub.repos["me/tiny"].private
    assert head(hub).items() >= MODEL.items() and set(done.sent) == MODEL.keys() | {"SHA256SUMS"}
    assert done.address == f"hf://me/tiny@{commit_of(head(hub))}" and done.url == f"{hub.url}/me/tiny"
    assert "a new private repository" in done.remarks[0]
    found = resolve(done.address, cache_dir=tmp_path / "cache").path
    assert contents(found).items() >= (SHARDS | {"config.json": b"{}"}).items()
    fetched = Path(huggingface_hub.snapshot_download("me/tiny", local_dir=tmp_path / "fetched"))
    shutil.rmtree(fetched / ".cache")
    (fetched / ".gitattributes").unlink()
    assert contents(fetched).items() >= MODEL.items()
    check_sums(fetched)


def test_a_public_repository_only_when_asked(hub, model):
    done = publish_folder(model, "hf://me/tiny", private=False)
    assert not hub.repos["me/tiny"].private and "public" in done.remarks[0]
    write(model, {"config.json": b'{"secret": 1}'})
    with pytest.raises(InputError, match=r"me/tiny is public.*private=False \(--public\).*settings"):
        publish_folder(model, "hf://me/tiny")
    assert head(hub)["config.json"] == b"{}"
    hub.repos["me/tiny"].private = True
    done = publish_folder(model, "hf://me/tiny", private=False)
    assert "stays private" in done.remarks[0] and hub.repos["me/tiny"].private


def test_an_unchanged_folder_sends_nothing(hub, model):
    first = publish_folder(model, "hf://me/tiny")
    sent, asked = hub.received, len(hub.requests)
    again = publish_folder(model, "hf://me/tiny")
    assert again.unchanged and again.bytes_sent == 0 and again.sent == () and again.address == first.address
    assert hub.received == sent
    assert all(request.startswith("GET ") for request in hub.requests[asked:])


def test_what_is_out_of_date_goes_and_what_people_added_stays(hub, model):
    publish_folder(model, "hf://me/tiny")
    (model / "README.md").unlink()
    for shard in SHARDS:
        (model / shard).unlink()
    write(model, {"model.safetensors": b"one file now", "config.json": b'{"new": 1}'})
    head(hub).update({"notes.txt": b"mine", "gguf/model.safetensors": b"mine", "flax_model.msgpack": b"mine"})
    assert states(plan(model, "hf://me/tiny").files) == {
        "config.json": "changed", "model.safetensors": "new", "model.safetensors.index.json": "unchanged",
        "tokenizer.json": "unchanged", "SHA256SUMS": "changed", **dict.fromkeys(SHARDS, "removed"),
    }  # fmt: skip
    before, commits = hub.received, hub.asked("POST", "/commit/")
    done = publish_folder(model, "hf://me/tiny", message="one file")
    assert set(done.sent) == {"config.json", "model.safetensors", "SHA256SUMS"}
    assert hub.received - before == len(b"one file now")
    assert hub.asked("POST", "/commit/") == commits + 1
    kept = {".gitattributes", "README.md", "notes.txt", "gguf/model.safetensors", "flax_model.msgpack"}
    assert head(hub).keys() == contents(model).keys() | {"SHA256SUMS"} | kept
    assert "model-00001-of-00003.safetensors" in done.remarks[-1]


def test_a_card_that_was_edited_on_the_hub_is_kept(hub, model, tmp_path):
    generated = f"# tiny\n\n{GENERATED}\n".encode()
    write(model, {"README.md": generated})
    publish_folder(model, "hf://me/tiny")
    head(hub)["README.md"] = EDITED
    write(model, {"config.json": b'{"new": 1}', "README.md": generated + b"newer"})
    assert states(plan(model, "hf://me/tiny").files)["README.md"] == "unchanged"
    done = publish_folder(model, "hf://me/tiny")
    assert set(done.sent) == {"config.json", "SHA256SUMS"} and head(hub)["README.md"] == EDITED
    assert "README.md was edited there and is kept" in done.remarks[0]
    assert publish_folder(model, "hf://me/tiny").unchanged
    check_sums(write(tmp_path / "fetched", {k: v for k, v in head(hub).items() if k != ".gitattributes"}))


@pytest.mark.parametrize(
    ("there", "ours"),
    [
        (b"# tiny\n" + GENERATED.encode(), b"# newer\n" + GENERATED.encode()),  # nobody has touched it
        (b"---\nlicense: mit\n---\n", b"# newer\n" + GENERATED.encode()),  # as the page for new repositories makes it
        (EDITED, b"# Written here by hand\n"),
    ],
)
def test_a_card_that_holds_nothing_of_peoples_own_is_replaced(hub, model, there, ours):
    publish_folder(write(model, {"README.md": there}), "hf://me/tiny")
    publish_folder(write(model, {"README.md": ours}), "hf://me/tiny")
    assert head(hub)["README.md"] == ours


def test_a_model_and_an_adapter_leave_each_others_files(hub, model, adapter):
    publish_folder(model, "hf://me/tiny")
    planned = plan(adapter, "hf://me/tiny")
    assert "removed" not in states(planned.files).values()
    done = publish_folder(adapter, "hf://me/tiny")
    assert done.remarks == planned.remarks and "holds a model, which stays there" in done.remarks[0]
    assert head(hub).items() >= {**SHARDS, **ADAPTER}.items()
    for shard in SHARDS:
        (model / shard).unlink()
    done = publish_folder(write(model, {"model.safetensors": b"one file now"}), "hf://me/tiny")
    assert "holds an adapter, which stays there" in done.remarks[0]
    assert head(hub).items() >= ADAPTER.items() and not SHARDS.keys() & head(hub).keys()


def test_a_branch(hub, model):
    main = publish_folder(model, "hf://me/tiny")
    commits, received = hub.asked("POST", "/commit/"), hub.received
    equal = publish_folder(model, "hf://me/tiny@stable")  # nothing but a name for what is there
    assert equal.address == main.address and equal.url == f"{hub.url}/me/tiny/tree/stable"
    assert (hub.asked("POST", "/commit/"), hub.received) == (commits, received)
    assert publish_folder(model, "hf://me/tiny@stable").unchanged
    write(model, {"config.json": b'{"new": 1}'})
    done = publish_folder(model, "hf://me/tiny", revision="v2")
    assert done.address == f"hf://me/tiny@{commit_of(head(hub, 'v2'))}"
    assert head(hub, "v2")["config.json"] == b'{"new": 1}'
    assert head(hub)["config.json"] == head(hub, "stable")["config.json"] == b"{}"
    new = publish_folder(model, "hf://me/other", revision="v1")
    assert hub.repos["me/other"].revisions["v1"].items() >= TEXTS.items() - {("config.json", b"{}")}
    assert "SHA256SUMS" not in hub.repos["me/other"].revisions["main"] and new.sent


def test_an_interrupted_upload_goes_on(hub, model):
    publish_folder(model, "hf://me/tiny")
    before = commit_of(head(hub))
    hub.received = 0
    write(model, {name: content + b"!" for name, content in SHARDS.items()})
    second = publish_sums(model)["model-00002-of-00003.safetensors"]
    hub.faults.append(Fault(f"/objects/{second}", "cut", "PUT", after=1000, times=6))  # all attempts of the client
    with pytest.raises(DownloadError, match="broke off.*as it was.*not sent again"):
        publish_folder(model, "hf://me/tiny")
    assert commit_of(head(hub)) == before
    arrived = sum(len(content) == 3001 for content in hub.objects.values())
    assert arrived == 2
    hub.received = 0
    done = publish_folder(model, "hf://me/tiny")
    assert hub.received == 3001  # the one that was missing
    assert commit_of(head(hub)) == done.address.partition("@")[2] != before
    assert head(hub)["model-00003-of-00003.safetensors"] == SHARDS["model-00003-of-00003.safetensors"] + b"!"


def publish_sums(folder):
    """{name: sha256} as publishing would send it."""
    there = folder.parent / "sums"
    publish_folder(folder, f"file://{there}")
    return {line[66:]: line[:64] for line in (there / "SHA256SUMS").read_text().splitlines()}


def test_a_passing_failure_is_not_noticed(hub, model):
    hub.faults += [Fault("/objects/", "status", "PUT", 503), Fault("preupload", "status", "POST", 429)]
    publish_folder(model, "hf://me/tiny")
    assert head(hub).items() >= MODEL.items()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("/api/repos/create", "status", "POST", 401), r"who you are \(401\).*hf auth login"),
        (Fault("/preupload/", "status", "POST", 403), r"\(403.*hf auth login"),
        (Fault("/preupload/", "status", "POST", 429, times=9), r"no more requests.*\(429.*later"),
        (Fault("/objects/", "status", "PUT", 500, times=99), r"\(500.*run the same again"),
        (Fault("/commit/", "status", "POST", 503, times=9), r"\(503"),
        (Fault("/validate-yaml", "status", "POST", 400), r"\(400"),
        (Fault("/commit/", "cut", "POST"), "broke off"),
        (Fault("/api/models/me/tiny", "status", "GET", 500, times=9), r"\(500"),
    ],
)
def test_failures_are_told_and_change_nothing(hub, model, caplog, capfd, fault, words):
    hub.faults.append(fault)
    with pytest.raises(DownloadError, match=words) as error:
        publish_folder(model, "hf://me/tiny", token="hf_anothersecret")
    told = str(error.value) + caplog.text + "".join(capfd.readouterr())
    assert "hf://me/tiny: " in told and "secret" not in told
    assert "me/tiny" not in hub.repos or "config.json" not in head(hub)


def test_who_may_not_write_is_told_how_to_log_in(hub, model, monkeypatch):
    with pytest.raises(DownloadError, match=r"403: .*rights.*hf auth login"):
        publish_folder(model, "hf://me/tiny", token=READ_ONLY)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DownloadError, match=r"\(401\).*hf auth login"):
        publish_folder(model, "hf://me/tiny")
    hub.repos["me/tiny"] = Repo({"main": {}}, private=True)  # somebody else's
    with pytest.raises(DownloadError, match="hf auth login"):
        publish_folder(model, "hf://me/tiny")


def test_a_secret_in_an_answer_is_not_passed_on(hub, model, monkeypatch):
    fault = Fault("/commit/", "status", "POST", 400, {"X-Error-Message": f"bad token {TOKEN} and hf_123456789"})
    hub.faults.append(fault)
    with pytest.raises(DownloadError, match=r"bad token \*\*\* and \*\*\*"):
        publish_folder(model, "hf://me/tiny", token=TOKEN)


def test_of_two_who_publish_at_once_one_is_told(hub, model, monkeypatch):
    publish_folder(model, "hf://me/tiny")
    write(model, {"config.json": b'{"mine": 1}'})
    look = HubTarget.look

    def slow_look(*args):
        there = look(*args)
        hub.repos["me/tiny"].revisions["main"] = head(hub) | {"config.json": b'{"theirs": 1}'}
        return there

    monkeypatch.setattr(HubTarget, "look", slow_look)
    with pytest.raises(DownloadError, match="somebody else has published"):
        publish_folder(model, "hf://me/tiny")
    assert head(hub)["config.json"] == b'{"theirs": 1}'


def test_a_plan_writes_nothing(hub, model, monkeypatch):
    found = plan(model, "hf://me/tiny")
    assert states(found.files) == dict.fromkeys([*MODEL, "SHA256SUMS"], "new")
    assert Change("config.json", 2, "new") in found.files
    assert found.remarks == ("hf://me/tiny is a new private repository",)
    hub.repos["me/tiny"] = Repo({"main": {}})
    with pytest.raises(InputError, match="is public"):
        plan(model, "hf://me/tiny")
    assert {request.partition(" ")[0] for request in hub.requests} == {"GET"}
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing listens
    found = plan(model, "hf://me/tiny")
    assert set(states(found.files).values()) == {"not compared"}
    assert "could not be reached" in found.remarks[-1]


# --- Kaggle ---------------------------------------------------------------------------------------------------------

HANDLE = "me/tiny/transformers/base"


@pytest.fixture
def store(monkeypatch, tmp_path):
    """Kaggle's stand-in."""
    from kagglesdk import kaggle_env

    store = kaggle.serve()
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, store.url)
    monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_somebodyssecret")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("kagglehub.gcs_upload.time.sleep", lambda seconds: None)  # between its attempts
    monkeypatch.setattr("kagglehub.clients.get_user_agent", lambda: "kagglehub")  # reads all modules: 1 s a call
    yield store
    store.close()


def versions(store):
    return store.models["me/tiny"].variations["transformers", "base"]


def test_a_new_model_on_kaggle_is_private(store, model, tmp_path, capsys):
    done = publish_folder(model, f"kaggle://{HANDLE}", message="first", licence="apache-2.0")
    assert store.models["me/tiny"].private and store.models["me/tiny"].licence == "Apache 2.0"
    assert done.address == f"kaggle://{HANDLE}/1" and done.url.endswith(f"/models/{HANDLE}/1")
    (files,) = versions(store)
    assert files.items() >= MODEL.items() and set(done.sent) == files.keys()
    assert done.bytes_sent == sum(map(len, files.values())) == store.uploaded_bytes
    found = resolve(done.address, cache_dir=tmp_path / "cache").path
    assert contents(found).items() >= (SHARDS | {"config.json": b"{}"}).items()
    assert done.remarks == ("Kaggle's client cannot choose who sees a model: it makes new ones private",)
    assert capsys.readouterr().out == ""  # which is for results


def test_an_unchanged_folder_sends_nothing_to_kaggle(store, model):
    publish_folder(model, f"kaggle://{HANDLE}")
    sent = store.uploaded_bytes
    again = publish_folder(model, f"kaggle://{HANDLE}")
    assert again.unchanged and again.address == f"kaggle://{HANDLE}/1" and again.bytes_sent == 0
    assert store.uploaded_bytes == sent and len(versions(store)) == 1
    (model / "tokenizer.json").unlink()
    write(model, {"config.json": b'{"new": 1}'})
    found = states(plan(model, f"kaggle://{HANDLE}").files)
    assert found["config.json"] == "changed" and found["tokenizer.json"] == "removed"
    assert found["README.md"] == "unchanged" and store.uploaded_bytes == sent
    done = publish_folder(model, f"kaggle://{HANDLE}", message="second", licence="mit")
    assert done.address == f"kaggle://{HANDLE}/2" and store.models["me/tiny"].notes == ["second"]
    assert versions(store)[1].keys() == contents(model).keys() | {"SHA256SUMS"}
    assert "sets a licence only once" in done.remarks[0]


def test_what_is_public_on_kaggle_gets_nothing_private(store, model):
    done = publish_folder(model, f"kaggle://{HANDLE}", private=False, licence="llama3.2")
    assert "makes new ones private; to make it public open https" in done.remarks[0]
    assert "no licence 'llama3.2'" in done.remarks[1]
    store.models["me/tiny"].private = False
    write(model, {"config.json": b'{"secret": 1}'})
    with pytest.raises(InputError, match="is public.*private=False"):
        publish_folder(model, f"kaggle://{HANDLE}")
    assert len(versions(store)) == 1
    publish_folder(model, f"kaggle://{HANDLE}", private=False)
    assert versions(store)[1]["config.json"] == b'{"secret": 1}'


def test_kaggles_client_goes_on_where_a_transfer_broke_off(store, model):
    big = b"x" * 200_000
    write(model, {"model.safetensors": big})
    store.faults.append(Fault("/upload/", "cut", "PUT", after=60_000))
    publish_folder(model, f"kaggle://{HANDLE}")
    assert versions(store)[0]["model.safetensors"] == big
    assert store.uploaded_bytes < sum(map(len, versions(store)[0].values())) + 60_000


@pytest.mark.slow
def test_what_did_not_arrive_whole_is_noticed(store, model):
    store.faults.append(Fault("/upload/", "cut", "PUT", after=10, times=50))  # more often than the client tries
    with pytest.raises(
        DownloadError, match="model-00003-of-00003.safetensors did not arrive whole.*Delete this version"
    ):
        publish_folder(model, f"kaggle://{HANDLE}")


def test_kaggles_failures_are_told(store, model, monkeypatch):
    store.faults.append(Fault("GetModel$", "status", "POST", 500))
    with pytest.raises(DownloadError, match=r"Kaggle failed or refused \(500"):
        publish_folder(model, f"kaggle://{HANDLE}")
    store.faults.append(Fault("CreateModel$", "status", "POST", 403))
    with pytest.raises(DownloadError, match=r"\(403.*kaggle.com/settings/api"):
        publish_folder(model, f"kaggle://{HANDLE}", token="KGAT_anothersecret")
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    with pytest.raises(DownloadError, match=r"who you are \(401\).*KAGGLE_API_TOKEN"):
        publish_folder(model, f"kaggle://{HANDLE}")
    assert not store.blobs
    store.close()
    assert "not compared" in states(plan(model, f"kaggle://{HANDLE}").files).values()


def test_kaggle_takes_fifty_files(store, model):
    write(model, {f"model-{i}.safetensors": b"" for i in range(50)})
    with pytest.raises(InputError, match="max_shard_size"):
        publish_folder(model, f"kaggle://{HANDLE}")
    assert not store.models
