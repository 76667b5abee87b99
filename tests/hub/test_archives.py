"""Archives of every kind, and every malice."""

import gzip
import hashlib
import io
import random
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from modelhub.errors import CheckpointError, PresetNotFound
from modelhub.hub.sources.archives import Refused, extract

MODEL = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": bytes(range(256)) * 12}
EXTRAS = {"setup.py": b"#", "onnx/model.onnx": b"", "training_args.bin": b"a pickle"}


@pytest.fixture
def unpack(tmp_path):
    (tmp_path / "work" / "files").mkdir(parents=True)

    def run(name, content):
        (tmp_path / "work" / "archive").write_bytes(content)
        return extract(tmp_path / "work" / "archive", name.lower(), tmp_path / "work", f"https://host/{name}")

    return run


def zip_of(files, change=lambda info: None):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            change(info)
            archive.writestr(info, content)
    return out.getvalue()


def tar_of(files, mode="w", change=lambda info: None):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            change(info)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def tar_gz_of(files):
    return tar_of(files, "w:gz")


@pytest.mark.parametrize(
    ("name", "pack", "top"),
    [("m.zip", zip_of, ""), ("m.zip", zip_of, "tiny-main/"), ("m.tar", tar_of, ""), ("m.tar", tar_of, "./")]
    + [("m.tar.gz", tar_gz_of, "tiny-main/"), ("m.TGZ", tar_gz_of, "")],
)
def test_only_what_is_needed_is_taken_out(unpack, tmp_path, name, pack, top):
    sums = unpack(name, pack({top + name: content for name, content in (MODEL | EXTRAS).items()}))
    found = {path.name: path.read_bytes() for path in (tmp_path / "work" / "files").iterdir()}
    assert found == MODEL
    assert sums == {name: hashlib.sha256(content).hexdigest() for name, content in MODEL.items()}


def test_a_compressed_archive_is_read_once(unpack, monkeypatch):
    """Going back in one means to begin again."""
    content = random.Random(0).randbytes(300_000)
    archive = tar_gz_of(
        dict(reversed([*MODEL.items(), *((f"model-0000{i}-of-00003.safetensors", content) for i in (1, 2, 3))]))
    )
    rewound = []
    rewind = gzip.GzipFile.rewind
    monkeypatch.setattr(gzip.GzipFile, "rewind", lambda file: rewound.append(1) or rewind(file))
    unpack("m.tar.gz", archive)
    assert len(rewound) <= 1


def symlink(info):
    if info.__class__ is tarfile.TarInfo:
        info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0
    else:
        info.external_attr = (stat.S_IFLNK | 0o777) << 16


def hardlink(info):
    info.type, info.linkname, info.size = tarfile.LNKTYPE, "/etc/passwd", 0


def device(info):
    info.type, info.size = tarfile.CHRTYPE, 0


def sparse(info):
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}


def only(name, change):
    return lambda info: change(info) if (getattr(info, "filename", None) or info.name) == name else None


def twice(pack):
    class Twice(dict):
        def items(self):
            return [*super().items(), *super().items()]

    return pack(Twice(MODEL))


HOSTILE = {
    "up.zip": (lambda: zip_of(MODEL | {"../evil": b"!"}), "'../evil' leads out of its folder"),
    "deep.zip": (lambda: zip_of(MODEL | {"a/../../evil": b"!"}), "leads out"),
    "absolute.zip": (lambda: zip_of(MODEL | {"/evil": b"!"}), "leads out"),
    "folder.zip": (lambda: zip_of(MODEL | {"../evil/": b""}), "leads out"),
    "drive.zip": (lambda: zip_of(MODEL | {"C:evil": b"!"}), "leads out"),
    "backslash.zip": (lambda: zip_of(MODEL | {"..\\evil": b"!"}), "leads out"),
    "link.zip": (lambda: zip_of(MODEL, only("tokenizer.json", symlink)), "'tokenizer.json' is a link or a device"),
    "case.zip": (lambda: zip_of(MODEL | {"CONFIG.json": b"{}"}), "'config.json' is there 2 times"),
    "bomb.zip": (lambda: zip_of(MODEL | {"zeros": bytes(17 << 20)}), "hold 17,8.*at most 16,777,216"),
    "cut.zip": (lambda: zip_of(MODEL)[:-30], "no archive that can be read"),
    "not.zip": (lambda: b"<html>", "no archive that can be read"),
    "up.tar": (lambda: tar_of(MODEL | {"../evil": b"!"}), "leads out"),
    "absolute.tar": (lambda: tar_of(MODEL | {"/evil": b"!"}), "leads out"),
    "link.tar": (lambda: tar_of(MODEL, change=only("tokenizer.json", symlink)), "'tokenizer.json' is a link"),
    "hardlink.tar": (lambda: tar_of(MODEL, change=only("tokenizer.json", hardlink)), "is a link"),
    "device.tar": (lambda: tar_of(MODEL, change=only("tokenizer.json", device)), "is a link, a device"),
    "sparse.tar": (lambda: tar_of(MODEL, change=only("tokenizer.json", sparse)), "is a link|no archive"),
    "twice.tar": (lambda: twice(tar_of), "'config.json' is there 2 times"),
    "bomb.tar.gz": (lambda: tar_of(MODEL | {"zeros": bytes(17 << 20)}, "w:gz"), "hold 17,8.*at most 16,777,216"),
    "farther.tar.gz": (lambda: tar_of(MODEL | {"zeros": bytes(40 << 20)}, "w:gz"), "expands to more than"),
    "headers.tar.gz": (
        lambda: tar_of(MODEL, "w:gz", lambda info: info.pax_headers.update(comment="x" * (6 << 20))),
        "list of its members is larger",
    ),
    "cut.tar": (lambda: tar_of(MODEL)[:2000], "no archive that can be read"),
    "cut.tar.gz": (lambda: tar_of(MODEL, "w:gz")[:-40], "no archive that can be read"),
    "not.tar.gz": (lambda: b"<html>", "no archive that can be read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_write_nothing(unpack, tmp_path, name):
    pack, words = HOSTILE[name]
    with pytest.raises(Refused, match=f"{words}.*Nothing was kept"):
        unpack(name, pack())
    assert not list(tmp_path.rglob("*evil*")) and not Path("/evil").exists()
    assert not list((tmp_path / "work").rglob("*.json"))


def test_a_zip_that_lies_about_its_sizes(unpack):
    content = zip_of({"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": bytes(100_000)})
    size, lie = (100_000).to_bytes(4, "little"), (1000).to_bytes(4, "little")
    assert content.count(size) == 2
    with pytest.raises(Refused, match="no archive that can be read"):
        unpack("liar.zip", content.replace(size, lie))


def test_an_archive_without_a_model_or_with_pickles_alone(unpack):
    with pytest.raises(PresetNotFound, match="no config.json"):
        unpack("notes.zip", zip_of(EXTRAS))
    with pytest.raises(PresetNotFound, match="no config.json"):  # which of the two?
        unpack("two.zip", zip_of({f"{top}/{name}": b"{}" for top in "ab" for name in MODEL}))
    with pytest.raises(CheckpointError, match="pickles"):
        unpack("pickle.zip", zip_of({"config.json": b"{}", "pytorch_model.bin": b""}))


@pytest.mark.parametrize("name", ["m.zip", "m.tar", "m.tar.gz"])
def test_damage_is_refused_in_words(unpack, name):
    """Whatever zipfile and tarfile raise for it."""
    whole = bytearray({"m.zip": zip_of, "m.tar": tar_of, "m.tar.gz": tar_gz_of}[name](MODEL))
    chance = random.Random(0)
    refused = 0
    for _ in range(200):
        damaged = whole.copy()
        for _ in range(chance.choice([1, 3, 20])):
            damaged[chance.randrange(len(damaged))] = chance.choice([0, 55, 255, chance.randrange(256)])
        try:
            unpack(name, bytes(damaged))
        except (Refused, PresetNotFound):
            refused += 1
    assert refused > 30
