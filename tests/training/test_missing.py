"""What tables have in place of missing values, by one rule in every reader and at every depth."""

import json

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
from transformers import AutoTokenizer

from modelhub.errors import DataError
from modelhub.processing.chat_template import ChatTemplate
from modelhub.training.missing import is_missing, present
from modelhub.training.records import read_records

EMPTY = [None, float("nan"), np.nan, np.float32("nan"), pandas.NA, pandas.NaT, np.datetime64("NaT")]


@pytest.mark.parametrize("value", EMPTY, ids=lambda value: type(value).__name__)
def test_what_is_missing(value):
    assert is_missing(value) and present([value]) == [None]
    row = {"a": value, "b": {"c": value, "d": [{"e": value, "f": 1}]}}
    assert present(row) == {"b": {"d": [{"f": 1}]}}
    assert present(np.array([row], object)) == [{"b": {"d": [{"f": 1}]}}]


def test_what_is_not_missing():
    for value in ("", "nan", 0, False, [], {}, np.float64(0), np.array([np.nan]), pandas.Timestamp(0)):
        assert not is_missing(value)
    assert present({"a": "", "b": 0, "c": [], "d": False}) == {"a": "", "b": 0, "c": [], "d": False}


DOLLY = [
    {"instruction": "Add them", "context": "1 and 1", "response": "two"},
    {"instruction": "Say hi", "context": None, "response": "hi"},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
OTHER = {"type": "function", "function": {"name": "add", "arguments": {"a": "1", "b": "2"}}}
CHATS = [
    [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
     {"role": "tool", "name": "weather", "content": "sunny"}, {"role": "assistant", "content": "It is sunny."}],
    [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "", "tool_calls": [OTHER]},
     {"role": "tool", "name": "add", "content": "3"}, {"role": "assistant", "content": "3", "thinking": "easy"}],
]  # fmt: skip


def everywhere(rows, folder):
    frame = pandas.DataFrame(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows))
    return {
        "list": rows, "frame": frame, "jsonl": folder / "rows.jsonl", "json": folder / "rows.json",
        "parquet": folder / "rows.parquet", "parquet in pandas": pandas.read_parquet(folder / "rows.parquet"),
        "dataset": datasets.Dataset.from_list(rows), "stream": datasets.Dataset.from_list(rows).to_iterable_dataset(),
        "arrow": pyarrow.Table.from_pylist(rows), "arrow in pandas": frame.convert_dtypes(dtype_backend="pyarrow"),
        "pandas' own dtypes": frame.convert_dtypes(), "generator": (row for row in rows),
    }  # fmt: skip


def test_an_optional_field_may_be_missing_everywhere(tmp_path):
    wanted = [row | {"context": row["context"] or ""} for row in DOLLY]
    data = everywhere(DOLLY, tmp_path)
    pandas.DataFrame(DOLLY).to_csv(tmp_path / "rows.csv", index=False)
    data |= {"csv": tmp_path / "rows.csv", "csv in pandas": pandas.read_csv(tmp_path / "rows.csv")}
    for name, given in data.items():
        assert [record.fields for record in read_records(given)] == wanted, name


def test_a_needed_field_that_is_missing_is_told_everywhere(tmp_path):
    rows = [*DOLLY, {"instruction": "Say no", "context": "", "response": None}]
    for name, given in everywhere(rows, tmp_path).items():
        with pytest.raises(DataError, match=r"row 3.*: response missing for the kind dolly.*without a value: response"):
            read_records(given)
        assert name
    for text in EMPTY:
        with pytest.raises(DataError, match=r"^row 1: text missing for the kind text; it has text .without a value"):
            read_records([{"text": text}])
        with pytest.raises(DataError, match="^row 2: it is missing"):
            read_records(["a", text])
    with pytest.raises(DataError, match="^row 1 is missing"):
        read_records(pandas.Series([None, "a"]))


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% for key, value in m | dictsort if key not in ('role', 'reasoning_content') "
    "%}{{ key }}={{ value | tojson }};{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_what_arrow_fills_in_is_not_seen_by_templates(tmp_path):
    """The template writes every key that it is given. transformers' own, on the messages before they were in a table,
    sees what ours sees after."""
    tokenizer = AutoTokenizer.from_pretrained("tokenizers/tiny")
    tokenizer.chat_template = TEMPLATE
    wanted = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False) for chat in CHATS]
    ours = ChatTemplate(TEMPLATE, special_tokens={})
    for name, data in everywhere([{"messages": chat} for chat in CHATS], tmp_path).items():
        found = [record.fields["messages"] for record in read_records(data)]
        assert found == CHATS, name
        assert [ours.render(chat, add_generation_prompt=False) for chat in found] == wanted, name
    filled = datasets.Dataset.from_list([{"messages": chat} for chat in CHATS])[0]["messages"]
    assert "null" in tokenizer.apply_chat_template(filled, tokenize=False)  # the harm that would be done


def test_missing_tools_and_other_columns_say_nothing():
    for empty in (*EMPTY, []):
        rows = [{"messages": CHATS[1], "tools": empty, "note": empty}]
        assert read_records(rows)[0].fields["messages"] == CHATS[1]
