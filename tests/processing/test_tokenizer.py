"""Tokenizer against transformers: the same files, the same ids."""

import argparse
import concurrent.futures
import inspect
import io
import json
import pickle
import random
import shutil
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges
from transformers.integrations.gguf import convert_gguf_tokenizer

from modelhub.errors import TokenizerError
from modelhub.processing.spm import SentencePieceEngine
from modelhub.processing.tokenizer import Tokenizer

SPACE = "\u2581"
CORPUS = """\
The capital of France is Paris, isn't it? It's 1,234.50 euros on 2024-02-29.
    def f(x: int) -> dict[str, list[int]]:  # a comment
        return {"k": [x ** 2 for _ in range(10)]} if x != 0 else None
for (int i = 0; i < n; ++i) { a[i] += b[i] * c; }  // C
<html><body><h1>Title</h1><td>cell</td></body></html>
SELECT * FROM "t" WHERE a >= 3 AND b LIKE '%x_%';\tx\t\ty
Grüße aus Köln, çà et là, niño, Æsir, ﬁne ligature, Ångström Å
Привет, мир! Καλημέρα κόσμε. שלום עולם. مرحبا بالعالم
你好,世界。東京タワー 안녕하세요 세계 สวัสดีชาวโลก नमस्ते दुनिया
👩‍👩‍👧‍👦 family, 🇩🇪🇫🇷 flags, 👍🏽 skin tone, ❤️ heart, 🧑🏿‍🚀
e\u0301 a\u0308\u0323 combining, q\u0307\u0323 order, \u0915\u093f\u0928\u094d
\x00NUL\x01\x02\x1b[0m\x7f\x80\x9f control \ufeff bom \u200b\u200d\u2060 zero width
\u00a0nbsp\u2003em space\u3000ideographic\u2028line\u2029paragraph\x0b\x0c\x85
\ufffd\U0010ffff\ue000 private, ﷽ long, 𝒳𝓎 maths, 🂡
▁ ▁▁ ▁▁▁a literal lower one eighth block
<bos>typed<eos> <start_of_turn>user
 <end_of_turn> <start_of_turn><start_of_turn>model <unk><pad> <bos <s>[INST]</s><0x41>
supercalifragilisticexpialidociousantidisestablishmentarianismpneumonoultramicroscopic
AbCdEfGhIjKlMnOpQrStUvWxYz0123456789+/=aGVsbG8gd29ybGQh
https://example.org/a/b?c=d&e=f#g user@example.org C:\\Users\\x
---------------- ================ ######## ........ !!!!???? ~~~~
haha hahaha hahahaha abababab aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"""
LINES = CORPUS.split("\n")
WHITESPACE = ["", " ", "  ", "   x", "x   ", "\n", "\n\n\n", "\t", "\t\t\n ", " \n \n", "\r\n", "a" + " " * 31 + "b"]
WHITESPACE += [" " * n for n in (32, 40, 63, 64, 100)] + [
    "\n" * 40,
    "a\n" * 5,
    "\t" * 40,
    " hello",
    "hello ",
    "a" * 3000,
]
TEXTS = LINES + WHITESPACE + ["\n".join(LINES), " ".join(LINES)]
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"
TURN = "<start_of_turn>user\nHi there!<end_of_turn>\n<start_of_turn>model\n"


def random_texts(count, seed=0):
    """Pieces of the texts above, runs, and characters of every script, glued together."""
    draw = random.Random(seed)
    ranges = [
        (32, 127),
        (32, 0x250),
        (0x370, 0x600),
        (0x900, 0xE00),
        (0x3000, 0x9FFF),
        (0x1F300, 0x1FAFF),
        (0, 0x10FFFF),
    ]
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(1, 6)):
            line = draw.choice(LINES)
            start = draw.randrange(len(line))
            low, high = draw.choice(ranges)
            letters = (draw.randint(low, high) for _ in range(draw.randint(1, 12)))
            run = "".join(draw.choice("=-ab0 \n\t▁#") for _ in range(draw.randint(1, 2))) * draw.randint(1, 70)
            random_part = "".join(chr(code) for code in letters if not 0xD800 <= code <= 0xDFFF)
            parts.append(
                draw.choice([line[start : start + draw.randint(1, 30)], random_part, run, TURN[: draw.randint(0, 40)]])
            )
        texts.append("".join(parts))
    return texts


TEXTS += random_texts(400)


def assert_same(ours, reference, texts=TEXTS, decode=True):
    """Ids with and without special tokens, and the text of the ids, equal transformers'."""
    for text in texts:
        plain = reference.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == plain, repr(text)
        assert ours.encode(text) == reference.encode(text), repr(text)
        for skip in (True, False) if decode else ():
            expected = reference.decode(plain, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(plain, skip_special_tokens=skip) == expected, repr(text)


def assert_streams(ours, texts=TEXTS):
    for text in texts:
        ids = ours.encode(text)
        for skip in (True, False):
            stream = ours.stream(skip_special_tokens=skip)
            assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids, skip_special_tokens=skip)


# --- small models -----------------------------------------------------------------------------------------------------


def train(**options):
    """A SentencePiece model of about 1000 pieces, trained on Python source and the lines above."""
    source = textwrap.dedent(inspect.getsource(argparse)).splitlines()[:1500]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in source + LINES * 5 if line.strip() and "\x00" not in line]),
        model_writer=model,
        minloglevel=2,
        character_coverage=0.99,
        **{"vocab_size": 1200, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
        | options,
    )
    return model.getvalue()


def train_gemma():
    runs = [c * n for c in ("\n", SPACE) for n in range(2 if c == SPACE else 1, 32)]
    return train(
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        user_defined_symbols=["<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>", *runs, "<td>", "</h1>"],
        add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True,
    )  # fmt: skip


def train_llama():
    return train(remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True)


gemma_model = pytest.fixture(train_gemma, scope="session", name="gemma_model")
llama_model = pytest.fixture(train_llama, scope="session", name="llama_model")


def pieces_of(model):
    """(piece, score, type) of each piece, by SentencePiece's own protobuf classes."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    return [(piece.piece, piece.score, piece.type) for piece in proto.pieces]


def added_tokens(model, special):
    return [
        AddedToken(piece, normalized=False, special=piece in special)
        for piece, _, kind in pieces_of(model)
        if kind in (2, 3, 4)
    ]


def merges_of(model):
    """In the order of the scores, as the conversion that wrote Gemma's and Llama's tokenizer.json."""
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces_of(model))}
    # Gemma's runs have the score 0, and are its first pieces after the special tokens
    scores = {piece: 1e6 - vocab[piece] if kind == 4 else score for piece, score, kind in pieces_of(model)}
    return vocab, generate_merges(vocab, scores)


GEMMA_SPECIAL = {"<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"}


@pytest.fixture(scope="session")
def gemma_folder(gemma_model, tmp_path_factory):
    """tokenizer.model, and tokenizer.json as transformers writes it."""
    folder = tmp_path_factory.mktemp("gemma")
    vocab, merges = merges_of(gemma_model)
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    tokenizer.add_tokens(added_tokens(gemma_model, GEMMA_SPECIAL))
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(gemma_model)
    return folder


def write_gemma_config(folder):
    """tokenizer_config.json with the flags of every added token, as Gemma's own repository has it."""
    head = json.loads((folder / "tokenizer.json").read_text())
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "chat_template": "{{ bos_token }}"}
    config |= {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    config["added_tokens_decoder"] = {str(token.pop("id")): token for token in head["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def copy_of(folder, path, *names):
    """A folder with some of the files."""
    path.mkdir()
    for name in names:
        shutil.copy(folder / name, path)
    return path


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2))


def uses_sentencepiece(tokenizer):
    return isinstance(tokenizer._engine, SentencePieceEngine)


# --- Hugging Face folders ---------------------------------------------------------------------------------------------


def test_gemma_folder_is_loaded_by_sentencepiece_with_the_ids_of_tokenizer_json(gemma_folder):
    ours = Tokenizer.from_folder(gemma_folder)
    assert uses_sentencepiece(ours)
    reference = PreTrainedTokenizerFast.from_pretrained(gemma_folder)
    assert_same(ours, reference)
    assert_same(ours, GemmaTokenizer.from_pretrained(gemma_folder), TEXTS[:100])
    assert_streams(ours)
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.unk_token_id) == (
        1200,
        2,
        1,
        0,
        3,
    )
    assert (ours.bos_token, ours.eos_token, ours.pad_token, ours.unk_token) == ("<bos>", "<eos>", "<pad>", "<unk>")
    assert ours.add_bos and not ours.add_eos
    assert ours.special_ids == {reference.convert_tokens_to_ids(token) for token in GEMMA_SPECIAL}
    for token_id in range(ours.vocab_size):
        token = ours.id_to_token(token_id)
        assert token == reference.convert_ids_to_tokens(token_id)
        assert ours.token_to_id(token) == token_id
    assert ours.token_to_id("no such token") is None
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]


@pytest.mark.parametrize("files", [["tokenizer.json"], ["tokenizer.model"], ["tokenizer.json", "tokenizer.model"]])
@pytest.mark.parametrize("config", [True, False])
def test_gemma_folder_with_some_of_the_files(gemma_folder, tmp_path, files, config):
    folder = copy_of(gemma_folder, tmp_path / "some", *files)
    reference = PreTrainedTokenizerFast.from_pretrained(gemma_folder)
    if config:
        shutil.copy(gemma_folder / "tokenizer.json", tmp_path)
        write_gemma_config(tmp_path)
        shutil.copy(tmp_path / "tokenizer_config.json", folder)
    ours = Tokenizer.from_folder(folder)
    assert uses_sentencepiece(ours) == ("tokenizer.model" in files)
    assert_same(
        ours, reference, decode=config or "tokenizer.json" in files
    )  # else special user-defined ones are unknown
    if config:
        assert ours.special_ids == {reference.convert_tokens_to_ids(token) for token in GEMMA_SPECIAL}
        assert (ours.bos_token_id, ours.eos_token_id, ours.chat_template) == (2, 1, "{{ bos_token }}")


def swap_two_ids(content):
    vocab = content["model"]["vocab"]
    first, second = [piece for piece, i in vocab.items() if i in (0, 1199)]
    vocab[first], vocab[second] = vocab[second], vocab[first]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda c: c.update(normalizer={"type": "NFC"}), id="normalizer"),
        pytest.param(lambda c: c["model"].update(ignore_merges=True), id="ignore merges"),
        pytest.param(lambda c: c["model"].update(byte_fallback=False), id="no byte fallback"),
        pytest.param(lambda c: c["model"]["merges"].reverse(), id="order of merges"),
        pytest.param(lambda c: c["model"]["vocab"].update(more=1200), id="larger vocabulary"),
        pytest.param(lambda c: c["added_tokens"][-1].update(normalized=True), id="normalized token"),
        pytest.param(
            lambda c: c.update(pre_tokenizer={"type": "Digits", "individual_digits": True}), id="pre-tokenizer"
        ),
        pytest.param(swap_two_ids, id="other ids"),
    ],
)
def test_tokenizer_json_decides_where_the_model_would_give_other_ids(gemma_folder, tmp_path, change):
    folder = copy_of(gemma_folder, tmp_path / "changed", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    edit_json(folder / "tokenizer.json", change)
    ours = Tokenizer.from_folder(folder)
    assert not uses_sentencepiece(ours)
    assert_same(ours, PreTrainedTokenizerFast.from_pretrained(folder), TEXTS[:60], decode=False)


def test_a_damaged_model_beside_a_good_tokenizer_json_is_not_needed(gemma_folder, tmp_path):
    folder = copy_of(gemma_folder, tmp_path / "lfs", "tokenizer.json", "tokenizer_config.json")
    (folder / "tokenizer.model").write_bytes(LFS_POINTER)
    assert_same(Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(gemma_folder), LINES)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_flags_of_added_tokens(gemma_folder, tmp_path, flag):
    folder = copy_of(gemma_folder, tmp_path / "flags", "tokenizer.json", "tokenizer.model")
    edit_json(
        folder / "tokenizer.json", lambda content: [token.update({flag: True}) for token in content["added_tokens"]]
    )
    write_gemma_config(folder)
    ours = Tokenizer.from_folder(folder)
    assert uses_sentencepiece(ours) == (flag != "single_word")  # SentencePiece finds its own pieces inside words
    texts = [
        f"{a}<start_of_turn>{b}<td>{b}" for a in ("", " ", "a", "a \n ", "\t") for b in ("", "  ", "b", " b", "\n")
    ]
    assert_same(ours, PreTrainedTokenizerFast.from_pretrained(folder), texts + TEXTS[:60], decode=False)


def test_tokens_only_the_configs_know(gemma_folder, tmp_path):
    folder = copy_of(gemma_folder, tmp_path / "more", "tokenizer.json", "tokenizer.model")
    config = {"bos_token": "<bos>", "image_token": "<image>", "extra_special_tokens": ["<one>", "the"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    eos = {"content": "<end_of_turn>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": eos}))
    (folder / "added_tokens.json").write_text(json.dumps({"<late>": 1200}))
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    texts = ["<late> and <one>, <image>the other<end_of_turn> theme", *TEXTS[:40]]
    for with_model in (True, False):
        if not with_model:
            (folder / "tokenizer.model").unlink()
        ours = Tokenizer.from_folder(folder)
        assert_same(ours, reference, texts)
        assert (ours.vocab_size, ours.eos_token_id) == (len(reference), reference.eos_token_id)


def test_llama_folder(llama_model, tmp_path):
    """Dummy prefix; and the model alone merges by its scores, as the tokenizer.json that Llama's repositories have."""
    vocab, merges = merges_of(llama_model)
    reference = LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, add_eos_token=True)
    reference.add_tokens(added_tokens(llama_model, {"<s>", "</s>", "<unk>"}))
    (tmp_path / "tokenizer.model").write_bytes(llama_model)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_eos_token": True})
    )
    texts = [*TEXTS, "<s>hello", " <s> hello</s>x"]
    ours = Tokenizer.from_folder(tmp_path)
    assert (ours.add_bos, ours.add_eos, ours.special_ids) == (True, True, {0, 1, 2})
    assert_same(ours, reference, texts)
    assert_streams(ours)
    reference.save_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    assert not uses_sentencepiece(ours)
    assert_same(ours, PreTrainedTokenizerFast.from_pretrained(tmp_path), texts)
    assert_streams(ours)


def test_unigram_model_alone_gives_the_ids_of_sentencepiece(tmp_path):
    model = train(
        model_type="unigram", byte_fallback=False, normalization_rule_name="nmt_nfkc", vocab_size=600, bos_id=-1
    )
    (tmp_path / "tokenizer.model").write_bytes(model)
    ours = Tokenizer.from_folder(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in LINES[:12]:
        assert ours.encode(text) == processor.encode(text)
    assert ours.decode(ours.encode("The capital of France")) == "The capital of France"


def unigram():
    tokenizer = HFTokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=500, unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"]
    )


def word_level():
    tokenizer = HFTokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer, trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"])


def byte_level():
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )


TEMPLATE = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
POST_PROCESSORS = {
    "none": (None, False, False),
    "template": (TEMPLATE, True, True),
    "byte level, then template": (processors.Sequence([processors.ByteLevel(), TEMPLATE]), True, True),
    "bert": (processors.BertProcessing(("</s>", 2), ("<s>", 1)), True, True),
}


@pytest.mark.parametrize("kind", [byte_level, unigram, word_level])
@pytest.mark.parametrize("post_processor", POST_PROCESSORS)
def test_other_kinds_of_tokenizer_json(tmp_path, kind, post_processor):
    tokenizer, trainer = kind()
    tokenizer.train_from_iterator(LINES * 3, trainer)
    tokenizer.add_tokens([AddedToken("<|im_end|>", rstrip=True), AddedToken("word", single_word=True)])
    tokenizer.post_processor, add_bos, add_eos = POST_PROCESSORS[post_processor]
    tokenizer.enable_truncation(4)  # transformers does not cut unless it is asked to
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    )
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    assert_same(ours, reference, [*TEXTS[:150], "a word, swords<|im_end|>\n  word"])
    assert (ours.add_bos, ours.add_eos, ours.vocab_size) == (add_bos, add_eos, len(reference))
    assert ours.pad_token_id == reference.pad_token_id
    assert ours.encode_batch(LINES) == [ours.encode(text) for text in LINES]
    if kind is unigram:
        with pytest.raises(TokenizerError, match="cannot stream"):
            ours.stream()
    else:
        assert_streams(ours, TEXTS[:150])


def test_chat_template(gemma_folder, tmp_path):
    folder = copy_of(gemma_folder, tmp_path / "chat", "tokenizer.json")
    assert Tokenizer.from_folder(folder).chat_template is None
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.from_folder(folder).chat_template == "D"
    (folder / "chat_template.jinja").write_text("J\n")
    assert Tokenizer.from_folder(folder).chat_template == "J\n"


def test_the_configs_of_the_model_name_the_special_tokens_of_a_bare_tokenizer(gemma_folder, tmp_path):
    folder = copy_of(gemma_folder, tmp_path / "bare", "tokenizer.json")
    assert Tokenizer.from_folder(folder).eos_token is None
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 2, "eos_token_id": 5, "pad_token_id": None}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    ours = Tokenizer.from_folder(folder)
    assert (ours.bos_token, ours.eos_token_id, ours.pad_token_id) == ("<bos>", 1, None)


# --- GGUF -------------------------------------------------------------------------------------------------------------


def gguf_metadata(model, **more):
    """As llama.cpp converts a SentencePiece model; added pieces lose their score, and hold plain spaces."""
    pieces = pieces_of(model)
    added = [kind in (3, 4) for _, _, kind in pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [
            p.replace(SPACE, " ") if a else p for (p, _, _), a in zip(pieces, added, strict=True)
        ],
        "tokenizer.ggml.scores": np.array(
            [-1000.0 if a else p[1] for p, a in zip(pieces, added, strict=True)], np.float32
        ),
        "tokenizer.ggml.token_type": np.array([kind for _, _, kind in pieces], np.int32),
    } | {f"tokenizer.{key}": value for key, value in more.items()}


def transformers_gguf(metadata, architecture):
    """transformers' conversion of the same metadata."""
    names = ("model", "pre", "tokens", "scores", "token_type", "merges")
    values = {name: metadata.get(f"tokenizer.ggml.{name}") for name in names}
    values["tokenizer_type"], values["pre_tokenizer_type"] = values.pop("model"), values.pop("pre")
    values = {name: np.asarray(value).tolist() for name, value in values.items() if value is not None}
    backend, _ = convert_gguf_tokenizer(architecture, values)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=None, eos_token=None)


def assert_same_without_special_tokens(ours, reference, texts=TEXTS):
    for text in texts:
        ids = reference.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids, repr(text)
        assert ours.decode(ids, False) == reference.decode(ids, clean_up_tokenization_spaces=False), repr(text)


GEMMA_IDS = {"ggml.bos_token_id": 2, "ggml.eos_token_id": 1, "ggml.padding_token_id": 0, "ggml.unknown_token_id": 3}


@pytest.mark.parametrize("unknown_type", [2, 3])
def test_gguf_gemma(gemma_model, unknown_type):
    metadata = gguf_metadata(gemma_model, **GEMMA_IDS, **{"ggml.add_space_prefix": False, "chat_template": "T"})
    metadata["tokenizer.ggml.token_type"][3] = unknown_type  # Gemma's files call <unk> a control token
    ours = Tokenizer.from_gguf(metadata)
    assert metadata["tokenizer.ggml.token_type"][3] == unknown_type
    assert_same_without_special_tokens(ours, transformers_gguf(metadata, "gemma3"))
    assert_streams(ours)
    assert ours.encode("<unk>") == [2, 3]
    assert (ours.bos_token, ours.eos_token, ours.pad_token, ours.unk_token) == ("<bos>", "<eos>", "<pad>", "<unk>")
    assert (ours.vocab_size, ours.add_bos, ours.add_eos, ours.chat_template) == (1200, True, False, "T")
    assert ours.special_ids == {0, 1, 2, 3}


def test_gguf_gives_the_ids_of_the_folder(gemma_model, gemma_folder):
    ours = Tokenizer.from_gguf(gguf_metadata(gemma_model, **GEMMA_IDS, **{"ggml.add_space_prefix": False}))
    folder = Tokenizer.from_folder(gemma_folder)
    texts = [text for text in TEXTS if SPACE * 2 not in text]  # a GGUF cannot tell a typed ▁▁ from two spaces
    assert ours.encode_batch(texts) == folder.encode_batch(texts)


def test_gguf_llama(llama_model):
    metadata = gguf_metadata(
        llama_model, **{"ggml.bos_token_id": 1, "ggml.eos_token_id": 2, "ggml.add_eos_token": True}
    )
    ours = Tokenizer.from_gguf(metadata)
    assert_same_without_special_tokens(ours, transformers_gguf(metadata, "llama"))
    ids = ours.encode("hello")
    assert (ids[0], ids[-1]) == (1, 2)
    assert ours.unk_token_id == 0
    assert_streams(ours)


def gguf_byte_level(pre):
    tokenizer, trainer = byte_level()
    tokenizer.train_from_iterator(LINES * 3, trainer)
    vocab = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.get),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.token_type": np.array([3] * 3 + [1] * (len(vocab) - 3), np.int32),
        "tokenizer.ggml.bos_token_id": 1,
    }


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_gguf_byte_level(pre):
    metadata = gguf_byte_level(pre)
    ours = Tokenizer.from_gguf(metadata)
    reference = transformers_gguf(metadata, "llama")
    reference.backend_tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
    assert_same_without_special_tokens(ours, reference)
    assert_streams(ours)
    assert (ours.add_bos, ours.bos_token_id, ours.special_ids) == (pre == "llama-bpe", 1, {0, 1, 2})


def test_gguf_byte_level_with_single_digits():
    ours = Tokenizer.from_gguf(gguf_byte_level("smollm"))
    reference = transformers_gguf(gguf_byte_level("gpt-2"), "llama")
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), reference.backend_tokenizer.pre_tokenizer]
    )
    assert_same_without_special_tokens(ours, reference)
    assert [ours.id_to_token(i) for i in ours.encode("in 2024")][-4:] == list("2024")


# --- the place of each token in the text ------------------------------------------------------------------------------


def assert_same_offsets(ours, reference, texts=TEXTS, covers=True):
    """Those of transformers; together they are the text, without a gap."""
    for text, (ids, offsets) in zip(texts, ours.encode_offsets_batch(texts, add_special_tokens=False), strict=True):
        assert ids == ours.encode(text, add_special_tokens=False)
        theirs = reference(text, return_offsets_mapping=True, add_special_tokens=False)
        assert (ids, offsets) == (theirs["input_ids"], theirs["offset_mapping"]), repr(text)
        end = 0
        for low, high in offsets if covers else ():
            assert low <= end <= high and low < high, repr(text)
            end = high
        assert end == len(text) or not covers, repr(text)


@pytest.mark.parametrize("files", [["tokenizer.json"], ["tokenizer.model"], ["tokenizer.json", "tokenizer.model"]])
def test_offsets_of_gemma(gemma_folder, tmp_path, files):
    ours = Tokenizer.from_folder(copy_of(gemma_folder, tmp_path / "some", *files))
    assert_same_offsets(ours, PreTrainedTokenizerFast.from_pretrained(gemma_folder))


def test_offsets_of_llama(llama_model, tmp_path):
    vocab, merges = merges_of(llama_model)
    reference = LlamaTokenizer(vocab=vocab, merges=merges)
    reference.add_tokens(added_tokens(llama_model, {"<s>", "</s>", "<unk>"}))
    (tmp_path / "tokenizer.model").write_bytes(llama_model)
    assert_same_offsets(Tokenizer.from_folder(tmp_path), reference)


@pytest.mark.parametrize(("pre", "covers"), [("gpt-2", True), ("llama-bpe", True), ("qwen2", False)])
def test_offsets_of_byte_level(pre, covers):
    metadata = gguf_byte_level(pre)
    reference = transformers_gguf(metadata, "llama")
    reference.backend_tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
    assert_same_offsets(Tokenizer.from_gguf(metadata), reference, covers=covers)  # no token has what NFC composes away


def test_offsets_keep_the_spaces_that_a_post_processor_cuts_off(tmp_path):
    tokenizer, trainer = byte_level()
    tokenizer.train_from_iterator(LINES * 3, trainer)
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), TEMPLATE])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids, offsets = Tokenizer.from_folder(tmp_path).encode_offsets("The  capital")
    assert offsets[0] == (0, 0) and offsets[-1] == (12, 12) and len(ids) == len(offsets)
    assert "".join("The  capital"[low:high] for low, high in offsets) == "The  capital"
    assert tokenizer.encode("The  capital").ids == ids


def test_offsets_of_special_tokens(llama_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama_model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_eos_token": True}))
    ours = Tokenizer.from_folder(tmp_path)
    for text in ("", "a</s> b", "🧑🏿"):
        ids, offsets = ours.encode_offsets(text)
        assert ids == ours.encode(text)
        inside = ours.encode_offsets(text, add_special_tokens=False)[1]
        assert offsets == [(0, 0), *inside, (len(text), len(text))]
    assert ours.encode_offsets("a</s> b", add_special_tokens=False)[1] == [(0, 1), (1, 5), (5, 7)]


def test_offsets_of_a_model_that_normalizes(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(
        train(model_type="unigram", normalization_rule_name="nmt_nfkc", vocab_size=900)
    )
    ours = Tokenizer.from_folder(tmp_path)
    assert set(ours.encode_offsets("ﷺ", add_special_tokens=False)[1]) == {(0, 1)}  # 18 letters in one
    ids, offsets = ours.encode_offsets("  the   ½ x  ", add_special_tokens=False)
    assert offsets[0][0] <= 2 and offsets[-1] == (10, 11) and (8, 9) in offsets
    for text in TEXTS:
        ids, offsets = ours.encode_offsets(text)
        assert ids == ours.encode(text) and sorted(offsets[1:]) == offsets[1:]
        assert all(0 <= low <= high <= len(text) for low, high in offsets)


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_stream_shows_whole_characters_only(gemma_folder):
    ours = Tokenizer.from_folder(gemma_folder)
    ids = ours.encode("a🧑🏿‍🚀é", add_special_tokens=False)
    stream = ours.stream()
    shown = [stream.push(token_id) for token_id in ids]
    assert "".join(shown) == "a🧑🏿‍🚀é"
    assert "\ufffd" not in "".join(shown) and "" in shown
    assert stream.flush() == ""
    first_byte = ours.token_to_id("<0xF0>")
    assert [stream.push(first_byte), stream.flush(), stream.push(ids[0])] == ["", "\ufffd", "a"]


def test_stream_of_any_ids_equals_decode(gemma_folder):
    ours = Tokenizer.from_folder(gemma_folder)
    reference = PreTrainedTokenizerFast.from_pretrained(gemma_folder)
    draw = random.Random(0)
    first = ours.token_to_id("<0x00>")
    for _ in range(500):
        ids = [
            draw.choice([draw.randrange(1200), draw.randrange(first, first + 256)]) for _ in range(draw.randint(0, 9))
        ]
        stream = ours.stream()
        text = ours.decode(ids)
        assert "".join(map(stream.push, ids)) + stream.flush() == text
        expected = reference.decode(ids, skip_special_tokens=True)
        # transformers turns a whole run of bytes into U+FFFD when one of them is wrong; here the good ones stay
        assert text == expected or "\ufffd" in expected and "\ufffd" in text


def test_streaming_costs_the_same_for_every_token(gemma_folder):
    stream = Tokenizer.from_folder(gemma_folder).stream()
    start = time.perf_counter()
    for _ in range(100_000):
        stream.push(600)
    assert time.perf_counter() - start < 5  # 0.1 s; decoding all the text each time would take minutes


def test_decode_takes_numpy_ids(gemma_folder):
    ours = Tokenizer.from_folder(gemma_folder)
    ids = np.array(ours.encode("The capital"), np.int32)
    assert ours.decode(ids) == "The capital"
    assert ours.stream().push(ids[1]) == ours.decode(ids[1:2])


# --- use and misuse ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [["tokenizer.json"], ["tokenizer.model"]])
def test_pickles_and_threads(gemma_folder, tmp_path, files):
    ours = Tokenizer.from_folder(copy_of(gemma_folder, tmp_path / "one", *files))
    expected = ours.encode_batch(TEXTS)
    assert pickle.loads(pickle.dumps(ours)).encode_batch(TEXTS) == expected
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ours.encode, TEXTS)) == expected


@pytest.mark.parametrize("files", [["tokenizer.json"], ["tokenizer.model"]])
def test_text_that_is_not_text(gemma_folder, tmp_path, files):
    ours = Tokenizer.from_folder(copy_of(gemma_folder, tmp_path / "one", *files))
    for encode in (ours.encode, ours.encode_offsets, lambda text: ours.encode_batch(["fine", text])):
        with pytest.raises(TokenizerError, match="surrogate '\\\\ud83d' at position 2"):
            encode("ab\ud83dc")
        with pytest.raises(TokenizerError, match="must be a str, found int"):
            encode(7)
    assert ours.encode("ab\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"))


@pytest.mark.parametrize("beyond", [1200, 10**12])
def test_ids_beyond_the_vocabulary_are_nothing(gemma_folder, tmp_path, beyond):
    """As in transformers: models whose embedding is larger than their tokenizer can answer with them."""
    reference = PreTrainedTokenizerFast.from_pretrained(gemma_folder)
    for files in (["tokenizer.json"], ["tokenizer.model"]):
        ours = Tokenizer.from_folder(copy_of(gemma_folder, tmp_path / files[0], *files))
        ids = [600, 1200, 601]
        assert ours.decode([600, beyond, 601]) == reference.decode(ids) == ours.decode([600, 601])
        stream = ours.stream()
        assert [stream.push(600), stream.push(beyond)] == [ours.decode([600]), ""]
        with pytest.raises(TokenizerError, match=f"No token has the id {beyond}"):
            ours.id_to_token(beyond)


@pytest.mark.parametrize("bad", [-100, -1])
def test_ids_out_of_range(gemma_folder, tmp_path, bad):
    for files in (["tokenizer.json"], ["tokenizer.model"]):
        ours = Tokenizer.from_folder(copy_of(gemma_folder, tmp_path / files[0], *files))
        with pytest.raises(TokenizerError, match=f"id {bad}: this vocabulary has the ids 0 to 1199"):
            ours.decode([5, bad])
        with pytest.raises(TokenizerError, match=str(bad)):
            ours.stream().push(bad)


def test_folder_without_tokenizer(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        TokenizerError, match=r"looked for tokenizer.json and tokenizer.model, found \['model.safetensors'\]"
    ):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(TokenizerError, match="no such folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {"type": "BPE"}}', b"\xff\xfe", LFS_POINTER])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_damaged_tokenizer(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 10**5, b"\xff\xfe", LFS_POINTER])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_config_that_is_no_json_object(gemma_folder, tmp_path, name, content):
    folder = copy_of(gemma_folder, tmp_path / "one", "tokenizer.json")
    (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=name):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "config", [{"added_tokens_decoder": {"7": 3}}, {"added_tokens_decoder": []}, {"bos_token": {}}]
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_damaged_config(gemma_folder, tmp_path, name, config):
    folder = copy_of(gemma_folder, tmp_path / "one", name)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match="hold something unexpected"):
        Tokenizer.from_folder(folder)


def test_a_cut_tokenizer_model(gemma_model, tmp_path):
    for size in [1, 2, 3, 40, 1000, len(gemma_model) // 2, len(gemma_model) - 1]:
        (tmp_path / "tokenizer.model").write_bytes(gemma_model[:size])
        with pytest.raises(TokenizerError):
            Tokenizer.from_folder(tmp_path)


def test_a_cut_tokenizer_json(gemma_folder, tmp_path):
    folder = copy_of(gemma_folder, tmp_path / "cut", "tokenizer.json", "tokenizer.model")
    content = (folder / "tokenizer.json").read_bytes()
    for size in (100, len(content) // 2, len(content) - 1):
        (folder / "tokenizer.json").write_bytes(content[:size])
        with pytest.raises(TokenizerError, match="tokenizer.json"):
            Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "is 'bert'"),
        ({"model": None}, "is None"),
        ({"tokens": None}, r"missing are \['tokens'\]"),
        ({"scores": None, "token_type": None}, r"missing are \['scores', 'token_type'\]"),
        ({"token_type": np.ones(3, np.int32)}, "1200 tokens but 3 token types"),
        ({"scores": np.ones(3, np.float32)}, "1200 tokens, 3 scores"),
        ({"eos_token_id": 1200}, "eos_token_id is 1200"),
        ({"tokens": ["same"] * 1200}, "SentencePiece cannot read"),
        ({"token_type": np.full(1200, 300, np.int32)}, r"token types \[300\]"),
    ],
)
def test_damaged_gguf(gemma_model, change, message):
    metadata = gguf_metadata(gemma_model, **GEMMA_IDS) | {
        f"tokenizer.ggml.{key}": value for key, value in change.items()
    }
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_gguf(metadata)


def test_gguf_with_an_unknown_pre_tokenizer():
    with pytest.raises(TokenizerError, match="'mystery', which is not supported yet"):
        Tokenizer.from_gguf(gguf_byte_level("mystery"))


def test_gguf_with_merges_of_another_vocabulary():
    with pytest.raises(TokenizerError, match="merges do not fit"):
        Tokenizer.from_gguf(gguf_byte_level("gpt-2") | {"tokenizer.ggml.merges": ["zz qq"]})


# --- real files -------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_gemma3(gemma3_gguf: Path, tmp_path):
    """The vocabulary of the GGUF file; and as a folder, where tokenizer.json is transformers' conversion of it."""
    from modelhub.hub.gguf import open_gguf

    with open_gguf(gemma3_gguf) as file:
        metadata = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    start = time.perf_counter()
    ours = Tokenizer.from_gguf(metadata)
    assert time.perf_counter() - start < 3  # 0.15 s
    assert ours.encode("The capital of France is") == [2, 818, 5279, 529, 7001, 563]
    assert ours.encode("<start_of_turn>user\n") == [2, 105, 2364, 107]
    assert (ours.vocab_size, ours.add_bos, ours.special_ids >= {0, 1, 2, 3}) == (262144, True, True)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.unk_token_id) == (2, 1, 0, 3)
    reference = transformers_gguf(metadata, "gemma3")
    texts = TEXTS + random_texts(2000, seed=1)
    assert_same_without_special_tokens(ours, reference, texts)
    assert_streams(ours)

    reference.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(ours._engine.sp.serialized_model_proto())
    start = time.perf_counter()
    folder = Tokenizer.from_folder(tmp_path)
    assert time.perf_counter() - start < 3  # 0.07 s
    assert uses_sentencepiece(folder)
    assert_same_without_special_tokens(folder, reference, texts)
