"""Every tokenizer class that transformers maps a model to: the same ids and texts, or refused by name."""

import json

import pytest
import transformers
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, TokenizersBackend
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from modelhub.errors import TokenizerError
from modelhub.processing.tokenizer import Tokenizer
from modelhub.processing.tokenizer_classes import CODE, GENERAL

LINES = [
    "The river runs past the old mill and under the bridge.",
    "In the morning the baker opens the shop, and the smell of bread fills the street!",
    "She wrote the letter twice — 12, 365 and 1024; naïve café.",
    "def f(x):\n    return x + 1\n",
] * 20
TEXTS = [
    "The river", " The river", "the river  runs \n\n past", "Cafe\u0301 naïve ﬁ", "MORNING It's 12345", "", "  ", "x\ty",
    "<s>hi</s> there", "hello <mask> world", "日本語 🧑🏿", "Don't [SEP] stop .",
]  # fmt: skip
KEYS = [
    {}, {"add_prefix_space": True}, {"add_prefix_space": False}, {"legacy": True}, {"legacy": False},
    {"do_lower_case": True}, {"do_lower_case": False}, {"strip_accents": True}, {"tokenize_chinese_chars": False},
    {"keep_accents": True}, {"split_special_tokens": True}, {"clean_up_tokenization_spaces": True},
    {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}, {"add_eos_token": False},
    {"add_prefix_space": False, "legacy": True, "split_special_tokens": True},
]  # fmt: skip
# They need the protobuf of a real model, other packages, or have no way to be trained here.
NOT_TRAINED = {"PegasusTokenizer", "EsmTokenizer"}
NAMES = sorted({name for name in TOKENIZER_MAPPING_NAMES.values() if name} - {"TokenizersBackend"})


def is_backed(name):
    """Whether the class is transformers' usual kind, over the `tokenizers` library."""
    made = getattr(transformers, name, None)
    return isinstance(made, type) and issubclass(made, TokenizersBackend)


def assert_same(folder, case):
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    for text in TEXTS:
        for special in (True, False):
            wanted = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == wanted, (case, text)
        for skip in (True, False):
            wanted_text = theirs.decode(theirs.encode(text, add_special_tokens=False), skip_special_tokens=skip)
            assert ours.decode(ours.encode(text, False), skip) == wanted_text, (case, text)


@pytest.mark.parametrize("name", [name for name in NAMES if is_backed(name) and name not in CODE | NOT_TRAINED])
def test_every_class_over_the_tokenizers_library(name, tmp_path):
    """As it is saved, and with each key of tokenizer_config.json that some class reads."""
    getattr(transformers, name)().train_new_from_iterator(LINES, 400).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if name == "CLIPTokenizer":
        pytest.skip("its decoder writes the ends of words, which only images' texts are encoded for")
    refused = []
    for keys in KEYS:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(saved | keys))
        try:
            assert_same(tmp_path, keys)
        except TokenizerError as error:
            [key] = keys
            assert f"says {key}={keys[key]} of {name}" in str(error)
            refused.append(keys)
    assert len(refused) <= 2 and {} not in refused


def test_every_other_class_is_refused_by_name(tmp_path):
    """Whatever files there are: what such a class does with a text is not in them."""
    HFTokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    others = {name for name in NAMES if not is_backed(name)}
    assert others <= CODE | {"None", "Siglip2Tokenizer"}, sorted(others - CODE)
    for name in sorted(CODE):
        for spelled in (name, f"{name}Fast"):
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": spelled}))
            with pytest.raises(TokenizerError, match=f"names {name}, which modelhub does not have"):
                Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": [*GENERAL][0]}))
    assert Tokenizer.from_folder(tmp_path).encode("a") == [0]


@pytest.mark.parametrize("file", ["prepend", "metaspace"])
def test_llamas_class_decides_where_spaces_go(tmp_path, file):
    """Not the file: older ones have a normalizer that puts a space before every stretch of text."""
    trained = HFTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    trained.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    names = dict.fromkeys(["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], *state["vocab"]])
    vocabulary = {token: i for i, token in enumerate(names)}
    merges = [tuple(pair) for pair in state["merges"]]
    backend = HFTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    if file == "prepend":
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for name in ("LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"):
        for keys in ({}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}, {"add_prefix_space": True}):
            config = named | {"tokenizer_class": name} | keys
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
            assert_same(tmp_path, (name, keys))


def test_what_a_class_makes_is_saved(tmp_path):
    """In files of the general class, which say it themselves."""
    for name, keys in (
        ("GPT2Tokenizer", {"add_prefix_space": True}), ("LlamaTokenizer", {"add_prefix_space": False}),
        ("XLMRobertaTokenizer", {"clean_up_tokenization_spaces": True}), ("BertTokenizer", {"do_lower_case": False}),
        ("RobertaTokenizer", {"split_special_tokens": True}),
    ):  # fmt: skip
        folder = tmp_path / name
        getattr(transformers, name)().train_new_from_iterator(LINES, 400).save_pretrained(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | keys))
        ours = Tokenizer.from_folder(folder)
        ours.save(folder / "saved")
        assert_same(folder / "saved", name)
        again = Tokenizer.from_folder(folder / "saved")
        for text in TEXTS:
            assert again.encode(text) == ours.encode(text) and again.decode(again.encode(text)) == ours.decode(
                ours.encode(text)
            )


def test_a_gguf_that_llama_cpp_would_cut_otherwise_is_refused(tmp_path, caplog):
    """llama.cpp composes nothing, and puts no space before byte-level text."""
    made = transformers.Qwen2Tokenizer().train_new_from_iterator(LINES, 400)
    made.save_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    composed, apart = ours.encode("caf\u00e9"), ours.encode("cafe\u0301")
    assert composed == apart
    assert ours.to_gguf(500)["tokenizer.ggml.pre"] == "qwen2"  # everybody's Qwen files are so: it is said, not refused
    assert "composes characters (NFC) before it cuts a text, which llama.cpp does not do" in caplog.text
    caplog.clear()
    transformers.GPT2Tokenizer().train_new_from_iterator(LINES, 400).save_pretrained(tmp_path / "gpt2")
    gpt2 = Tokenizer.from_folder(tmp_path / "gpt2")
    assert gpt2.to_gguf(500)["tokenizer.ggml.pre"] == "gpt-2" and not caplog.text
    file = tmp_path / "gpt2/tokenizer.json"
    plain = file.read_text()
    file.write_text(json.dumps(json.loads(plain) | {"normalizer": {"type": "NFC"}}))
    with pytest.raises(TokenizerError, match="after the normalizer"):
        Tokenizer.from_folder(tmp_path / "gpt2").to_gguf(500)
    file.write_text(plain)
    config = json.loads((tmp_path / "gpt2/tokenizer_config.json").read_text())
    (tmp_path / "gpt2/tokenizer_config.json").write_text(json.dumps(config | {"add_prefix_space": True}))
    with pytest.raises(TokenizerError, match="it cuts text into words by"):
        Tokenizer.from_folder(tmp_path / "gpt2").to_gguf(500)
