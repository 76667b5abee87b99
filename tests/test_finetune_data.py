"""The bundled rows and recipes, and the embedded tokenizer."""

import inspect
import json
import re
import statistics
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from modelhub.core import optim
from modelhub.processing.chat_template import ChatTemplate
from modelhub.processing.tokenizer import Tokenizer
from modelhub.training.records import read_records

REPO = Path(__file__).resolve().parents[1]
FINETUNE, TINY = REPO / "finetune", REPO / "tokenizers" / "tiny"
CATEGORIES = {
    "brainstorming", "classification", "closed_qa", "creative_writing",
    "general_qa", "information_extraction", "open_qa", "summarization",
}  # fmt: skip
RECIPES = sorted(FINETUNE.glob("*.toml"))
KEYS = {
    "": {"preset", "backend", "device", "dtype", "data", "validation_data", "output", "sequence_length"},
    "lora": {"rank", "alpha", "dropout", "targets", "use_rslora", "use_dora"},
    "compile": {
        "optimizer", "learning_rate", "schedule", "weight_decay", "clip_norm", "mixed_precision", "remat",
    },
    "fit": {
        "epochs", "batch_size", "steps", "grad_accum", "packing", "loss_on", "template", "validation_split", "seed",
        "checkpoint_dir",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in (FINETUNE / "dolly_style.jsonl").read_text(encoding="utf-8").splitlines()]


def whole(row):
    return "\n".join(row[key] for key in ("instruction", "context", "response"))


def test_every_row_has_dollys_schema_and_clean_text(rows):
    for row in rows:
        assert list(row) == ["instruction", "context", "response", "category"]
        assert all(isinstance(value, str) and value == value.strip() for value in row.values())
        assert row["instruction"] and row["response"]
        assert not re.search(r"[^\S\n ]|\n{3}| {2}|[^\x00-\u024f]", whole(row)), "odd spaces or characters"
    records = read_records(FINETUNE / "dolly_style.jsonl")
    assert len(records) == len(rows) and {record.kind for record in records} == {"dolly"}


def test_enough_rows_of_every_category_and_with_a_context(rows):
    counts = Counter(row["category"] for row in rows)
    assert len(rows) >= 220 and set(counts) == CATEGORIES and min(counts.values()) >= 20
    contexts = [row["context"] for row in rows if row["context"]]
    assert len(contexts) >= 60 and statistics.median(map(len, contexts)) > 300
    for category in ("closed_qa", "information_extraction", "summarization"):
        assert all(row["context"] for row in rows if row["category"] == category)
    # Shuffled: no long run of one category, and a split at the end sees all of them.
    assert {row["category"] for row in rows[-len(rows) // 5 :]} == CATEGORIES


def test_no_two_rows_are_nearly_the_same(rows):
    def grams(text, n=4):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}

    for part in ("instruction", "response"):
        assert len({row[part].lower() for row in rows}) == len(rows)
        found = [grams(row[part]) for row in rows]
        for i, a in enumerate(found):
            assert all(len(a & b) <= 0.4 * min(len(a), len(b)) or len(a & b) < 5 for b in found[:i]), rows[i][part]


def test_lengths_vary_as_in_real_data(rows):
    tokens = sorted(len(whole(row)) / 4.2 for row in rows)  # characters in a token of these rows, Gemma's tokenizer
    assert 110 <= statistics.median(tokens) <= 145
    assert 145 <= statistics.mean(tokens) <= 180
    assert 260 <= tokens[int(0.9 * len(tokens))] <= 360
    assert tokens[0] < 50 and tokens[-1] < 900  # within the recipes' sequence_length, template and all


def test_the_readme_tells_the_counts(rows):
    readme = (FINETUNE / "README.md").read_text(encoding="utf-8")
    assert f"{len(rows)} rows" in readme and f"({sum(bool(row['context']) for row in rows)} rows have one)" in readme
    assert all(f"`{recipe.name}`" in readme for recipe in RECIPES)
    assert all(f"`{key}`" in readme for keys in KEYS.values() for key in keys)


@pytest.mark.parametrize("path", [p for p in RECIPES if not p.stem.startswith("vit")], ids=lambda path: path.stem)
def test_a_recipe_names_what_exists(path):
    recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    tables = {name: recipe.pop(name) for name in [*recipe] if isinstance(recipe[name], dict)} | {"": recipe}
    for name, table in tables.items():
        assert set(table) <= KEYS[name], name
    assert {"preset", "data", "output"} <= set(recipe)
    assert (REPO / "presets" / f"{recipe['preset']}.toml").is_file()
    assert (path.parent / recipe["data"]).is_file()
    assert ("lora" in tables) == path.stem.startswith("lora")
    settings = tables["compile"]
    optim.get(settings["optimizer"], settings["learning_rate"], settings.get("weight_decay"))
    optim.get_schedule(settings["schedule"])


@pytest.mark.parametrize("table, method", [("lora", "enable_lora"), ("compile", "compile"), ("fit", "fit")])
def test_recipe_keys_are_the_apis(table, method):
    from modelhub import CausalLM

    if not hasattr(CausalLM, method):
        pytest.skip(f"CausalLM.{method} is not there yet")
    assert KEYS[table] <= set(inspect.signature(getattr(CausalLM, method)).parameters)


@pytest.fixture(scope="module")
def tokenizers():
    return Tokenizer.from_folder(TINY), AutoTokenizer.from_pretrained(TINY)


def test_the_tiny_tokenizer_is_gemmas_kind_and_small(tokenizers):
    ours, _ = tokenizers
    assert ours.vocab_size == 2048
    assert [ours.token_to_id(t) for t in ("<pad>", "<eos>", "<bos>", "<unk>")] == [0, 1, 2, 3]
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<bos>", "<eos>", "<pad>")
    assert ours.encode("<start_of_turn>a<end_of_turn>")[1::2] == [4, 5]
    assert sum(path.stat().st_size for path in TINY.glob("*.json")) < 100_000


def test_the_tiny_tokenizer_reads_and_writes_as_in_transformers(tokenizers, rows):
    ours, theirs = tokenizers
    texts = [whole(row) for row in rows] + ["", " ", "two  spaces\n\n\ttab", "caf\u00e9 \u2014 \u4f60\u597d \U0001f43b"]
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"] and ours.decode(ids) == text
    english = "\n".join(texts[: len(rows)])
    assert len(english) / len(ours.encode(english)) > 2.8, "characters in a token"


def test_the_tiny_chat_template_is_gemmas(tokenizers):
    ours, theirs = tokenizers
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    wanted = (
        "<bos><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == wanted
    assert ChatTemplate(ours.chat_template, special_tokens={"bos_token": "<bos>"}).render(messages) == wanted
