"""Every kind of record, from every kind of source, and what is said of those that do not fit."""

import json

import numpy as np
import pytest

from modelhub.errors import DataError
from modelhub.training.records import read_records

DOLLY = {"instruction": "Name it.", "context": "It is Ö.", "response": "Ö", "category": "closed_qa"}
ASKED = {"instruction": "Name it.", "context": "It is Ö.", "response": "Ö"}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "system", "value": "s"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.mark.parametrize(
    ("row", "kind", "fields"),
    [
        (DOLLY, "dolly", ASKED),
        ({"instruction": "a", "response": "b"}, "dolly", {"instruction": "a", "context": "", "response": "b"}),
        ({"instruction": "a", "context": None, "response": "b"}, "dolly", {"instruction": "a", "context": "", "response": "b"}),
        ({"instruction": "a", "input": "c", "output": "b", "text": "all"}, "alpaca", {"instruction": "a", "context": "c", "response": "b"}),
        ({"prompt": "a", "completion": " b"}, "prompt", {"prompt": "a", "response": " b"}),
        ({"prompt": "a", "messages": CHAT}, "messages", {"messages": CHAT}),
        ({"conversations": SHAREGPT}, "messages", {"messages": [{"role": "system", "content": "s"}, *CHAT]}),
        ({"conversations": CHAT}, "messages", {"messages": CHAT}),
        ({"text": "a\nb", "id": 3}, "text", {"text": "a\nb"}),
        ("a\nb", "text", {"text": "a\nb"}),
    ],
)  # fmt: skip
def test_kinds(row, kind, fields):
    (record,) = read_records([row])
    assert (record.kind, record.fields, record.where) == (kind, fields, "row 1")
    assert read_records([row], kind) == [record]


def test_the_kind_can_be_chosen():
    both = {"instruction": "a", "output": "b", "text": "c"}
    assert read_records([both])[0].kind == "alpaca"
    assert read_records([both], kind="text")[0].fields == {"text": "c"}


def test_messages_keep_what_templates_read_and_lose_the_nones_of_datasets():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows = [{"messages": [{**CHAT[0], "tool_calls": None}, call, {"role": "tool", "content": "3", "name": "f"}]}]
    assert read_records(rows)[0].fields["messages"] == [CHAT[0], call, {"role": "tool", "content": "3", "name": "f"}]


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return path


def test_jsonl_with_bom_and_blank_lines(tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        "\n" + json.dumps(DOLLY, ensure_ascii=False) + "\n\n" + json.dumps(DOLLY) + "\n",
        "utf-8-sig",
    )
    for data in (path, str(path)):
        records = read_records(data)
        assert [record.fields for record in records] == [ASKED, ASKED]
        assert [record.where for record in records] == [f"{path}, row 1 (line 2)", f"{path}, row 2 (line 4)"]


def test_json_as_a_list_and_as_lines(tmp_path):
    assert (
        read_records(write(tmp_path / "a.json", json.dumps([DOLLY, DOLLY], indent=1), "utf-8-sig"))[1].fields == ASKED
    )
    assert read_records(write(tmp_path / "b.json", f"{json.dumps(DOLLY)}\n{json.dumps(DOLLY)}"))[1].fields == ASKED


def test_csv_with_line_breaks_inside_cells(tmp_path):
    text = 'instruction,context,response\nName it.,It is Ö.,Ö\n"a\nb, c",,"say ""d"""\n'
    first, second = read_records(write(tmp_path / "d.csv", text, "utf-8-sig"))
    assert first.fields == ASKED
    assert second.fields == {"instruction": "a\nb, c", "context": "", "response": 'say "d"'}


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([DOLLY, DOLLY]), tmp_path / "d.parquet")
    assert [record.fields for record in read_records(tmp_path / "d.parquet")] == [ASKED, ASKED]
    write(tmp_path / "broken.parquet", "PAR1 and no more")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_records(tmp_path / "broken.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        read_records(write(tmp_path / "d.parquet", "x"))


def test_hugging_face_datasets():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(
        [{"messages": CHAT, "n": 1}, {"messages": [*CHAT, {"role": "user", "content": "?"}], "n": 2}]
    )
    assert [record.fields["messages"][:2] for record in read_records(rows)] == [CHAT, CHAT]
    with pytest.raises(DataError, match=r'a dict with the keys train.*data\["train"\]'):
        read_records(datasets.DatasetDict(train=rows))


def test_other_iterables():
    assert len(read_records(dict(DOLLY) for _ in range(3))) == 3
    assert [record.fields["text"] for record in read_records(np.array(["a", "b"]))] == ["a", "b"]

    class Frame:  # what a pandas DataFrame has; iterating one gives its columns
        iterrows = None

        def to_dict(self, orient):
            assert orient == "records"
            return [DOLLY]

        def __iter__(self):
            return iter(DOLLY)

    assert read_records(Frame())[0].fields == ASKED


@pytest.mark.parametrize(
    ("rows", "kind", "says"),
    [
        ([DOLLY, {"instruction": "a", "context": "", "category": "x"}], None, "^row 2: response missing for the kind dolly; it has instruction, context, category"),
        ([DOLLY, {"instruction": "a", "response": None}], None, "^row 2: response missing"),
        ([{"text": "a"}], "alpaca", "row 1: instruction and output missing for the kind alpaca; it has text"),
        ([{"text": "a"}], "messages", r"row 1: messages \(or conversations\) missing; it has text"),
        ([DOLLY, {**DOLLY, "response": 3}], None, "row 2: response must be text, found int: 3"),
        ([DOLLY, {**DOLLY, "context": ["a"]}], None, "row 2: context must be text, found list"),
        ([DOLLY, "text"], None, "row 2: a row of the kind dolly must be a dict, found str: 'text'"),
        (["text", DOLLY], None, "row 2: text missing for the kind text"),
        ([{"query": "a", "reply": "b"}], None, r"row 1 is of no known kind, it has query, reply. The kinds .* dolly: instruction, context, response; alpaca: instruction, input, output; messages: messages; prompt: prompt, completion; text: text"),
        ([3], None, "row 1 is of no known kind, it has int: 3"),
        ([{}], None, "it has no keys"),
        ([], None, "the data holds no rows"),
        ([DOLLY], "dollly", "kind must be one of dolly, alpaca, messages, prompt, text, got 'dollly'"),
        (3, None, "the data is a int; give a path"),
        ([{"messages": []}], None, "row 1: messages is empty"),
        ([{"messages": "Hi"}], None, "row 1: messages must be a list of messages, found str: 'Hi'"),
        ([{"messages": ["Hi"]}], None, "row 1: message 0 must be a dict, found str"),
        ([{"messages": [CHAT[0], {"role": "bot", "content": "a"}]}], None, "row 1: message 1 has the role 'bot'.*known: system, .*human"),
        ([{"messages": [{"content": "a"}]}], None, "row 1: message 0 has the role None"),
        ([{"messages": [{"role": "user", "text": "a"}]}], None, "message 0: content must be text, found NoneType; it has role, text"),
        ([{"messages": CHAT, "tools": ["f"]}], None, "row 1: tools must be a list of JSON schemas"),
        ([{"messages": CHAT, "tools": "{"}], None, "row 1: tools is not valid JSON"),
    ],
)  # fmt: skip
def test_errors_of_rows(rows, kind, says):
    with pytest.raises(DataError, match=says):
        read_records(rows, kind)


def test_wrong_rows_are_told_together():
    with pytest.raises(DataError) as caught:
        read_records([DOLLY, *[{"instruction": "a"}] * 7])
    assert str(caught.value).count("response missing") == 5
    assert str(caught.value).endswith("and 2 more rows")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": b}\n', "a.jsonl is not valid JSON on line 3: Expecting value"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a.jsonl, row 2 \(line 2\): a row of the kind text must be a dict, found list"),
        ("a.jsonl", '\n{"prompt": "a"}', r"a.jsonl, row 1 \(line 2\) is of no known kind, it has prompt"),
        ("a.jsonl", "\n \n", "a.jsonl holds no rows"),
        ("a.json", "", "a.json holds no rows"),
        ("a.json", "[]", "a.json holds no rows"),
        ("a.json", '[{"text": "a"},\n{"text": }]', "a.json is not valid JSON on line 2"),
        ("a.json", '{"data": []}', "a.json must hold a list of rows, found dict"),
        ("a.csv", "", "a.csv holds no rows"),
        ("a.csv", "text\n", "a.csv holds no rows"),
        ("a.csv", "prompt,completion\na,b\nc\n", r"a.csv, row 2 \(line 3\): completion missing"),
        ("a.csv", "text\na, b\n", r"a.csv, row 1 \(line 2\) has more cells than the header"),
        ("a.csv", 'text\n"a\n', "a.csv is not valid CSV near line 1"),
        ("a.txt", "a", "extension '.txt'; known: .jsonl, .json, .csv, .parquet"),
        ("a", "a", "extension ''; known"),
    ],
)  # fmt: skip
def test_errors_of_files(tmp_path, name, text, says):
    with pytest.raises(DataError, match=says):
        read_records(write(tmp_path / name, text))


def test_more_errors_of_files(tmp_path):
    with pytest.raises(DataError, match="missing.jsonl: no such file"):
        read_records(tmp_path / "missing.jsonl")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="a folder, not a file"):
        read_records(tmp_path / "folder.json")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_records(write(tmp_path / "a.jsonl", '{"text": "ä"}', "latin-1"))
