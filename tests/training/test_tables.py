"""Files and tables as other programs write them; rows that are skipped; conversations and preferences as TRL has them."""

import csv
import datetime
import json
import threading

import pandas
import pyarrow
import pytest
from transformers import AutoTokenizer

from modelhub.errors import DataError
from modelhub.processing.chat_template import ChatTemplate
from modelhub.processing.tokenizer import Tokenizer
from modelhub.training import rows as module
from modelhub.training.batches import prepare
from modelhub.training.loaders import repeatable
from modelhub.training.records import read_records

ROWS = [{"prompt": "Wie, bitte; so?", "completion": "Schön\tda"}, {"prompt": "a\nb", "completion": 'sie "sagt"'}]
WANTED = [{"prompt": row["prompt"], "response": row["completion"]} for row in ROWS]


def fields(data, **options):
    return [record.fields for record in read_records(data, **options)]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_csv_of_other_programs(tmp_path, separator, encoding):
    path = tmp_path / "rows.csv"
    pandas.DataFrame(ROWS).to_csv(path, index=False, sep=separator)
    text = path.read_text(encoding="utf-8")
    mark = "\ufeff" if encoding == "utf-16-le" else ""  # Excel's "Unicode text"
    path.write_bytes((mark + text).encode(encoding))
    assert fields(path) == WANTED
    assert fields(path.rename(tmp_path / "rows.tsv") if separator == "\t" else path) == WANTED


def test_json_with_other_byte_order_marks(tmp_path):
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding)
        (tmp_path / "a.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding)
        assert fields(tmp_path / "a.jsonl") == fields(tmp_path / "a.json") == WANTED


def test_a_header_with_spaces_and_one_with_the_same_name_twice(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id, prompt ,completion,\n1,a,b,\n\n2,c,d,\n")
    records = read_records(path)
    assert [record.fields["prompt"] for record in records] == ["a", "c"]
    assert [record.where for record in records] == [f"{path}, row 1 (line 2)", f"{path}, row 2 (line 4)"]
    path.write_text("text,text\na,b\n")
    with pytest.raises(DataError, match="has several columns of the name text; rename one"):
        read_records(path)
    with pytest.raises(DataError, match="the DataFrame has several columns of the name text"):
        read_records(pandas.DataFrame([["a", "b"]], columns=["text", "text"]))


def test_the_limit_on_a_cell_is_ours(tmp_path, monkeypatch):
    path, long, before = tmp_path / "rows.csv", "A long report. " * 20_000, csv.field_size_limit()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text"], [long], *[[f"row {i}"] for i in range(2500)], [long]])
    found = fields(path)
    assert found[0]["text"] == found[-1]["text"] == long and found[2500]["text"] == "row 2499" and len(found) == 2502
    assert csv.field_size_limit() == before  # other users of the module keep theirs
    several = [threading.Thread(target=lambda: results.append(len(read_records(path)))) for _ in range(4)]
    results = []
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    assert results == [2502] * 4 and csv.field_size_limit() == before
    monkeypatch.setattr(module, "LARGEST_CELL", 1000)
    with pytest.raises(
        DataError, match=r"rows.csv is not valid CSV near line 1: a cell has more than 1,000 characters"
    ):
        read_records(path)


@pytest.mark.slow
def test_wide_and_long_tables(tmp_path):
    wide = {f"column {i}": "x" for i in range(20_000)} | {"text": "here"}
    with (tmp_path / "wide.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, wide)
        writer.writeheader()
        writer.writerow(wide)
    assert fields(tmp_path / "wide.csv") == fields(pandas.DataFrame([wide])) == [{"text": "here"}]
    long = pandas.DataFrame({"text": [f"row {i}" for i in range(50_000)], "seen": datetime.datetime(2024, 1, 1)})
    long.to_parquet(tmp_path / "long.parquet")
    for data in (long, tmp_path / "long.parquet", pyarrow.Table.from_pandas(long)):
        found = read_records(data)
        assert len(found) == 50_000 and found[-1].fields["text"] == "row 49999"


def test_a_frame_of_polars_kind():
    class Frame:  # what polars has; iterating one gives its columns
        def iter_rows(self, named):
            assert named
            return iter(ROWS)

        def __iter__(self):
            return iter([["a"], ["b"]])

    assert fields(Frame()) == WANTED


# --- rows that do not fit ---------------------------------------------------------------------------------------------


BROKEN = '{"text": "a"}\n{"text": b}\n{"text": "c"}\n{"text": null}\n{"text": "\\ud83d half"}\n{"text": "e"}\n'


def test_rows_are_skipped_counted_and_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(BROKEN.encode() + b'{"text": "\xe4"}\n')
    with pytest.warns(UserWarning, match="skipped 4 of 7 rows of .*rows.jsonl:\n") as caught:
        assert [text["text"] for text in fields(path, on_error="skip")] == ["a", "c", "e"]
    told = str(caught[0].message)
    for said in (
        "not valid JSON on line 2", "row 4 (line 4): text missing", r"row 5 (line 5): text has half of a surrogate",
        "row 7 (line 7) is not UTF-8 (the byte 0xe4",
    ):  # fmt: skip
        assert said in told, said
    (tmp_path / "rows.csv").write_text("text\na\nb,c\nd\n")
    with pytest.warns(UserWarning, match=r"rows.csv, row 2 .line 3. has more cells than the header"):
        assert len(fields(tmp_path / "rows.csv", on_error="skip")) == 2
    with pytest.warns(UserWarning, match="row 1 is of no known kind"):
        assert fields([{"x": 1}, {"text": "a"}], on_error="skip") == [{"text": "a"}]
    with pytest.raises(DataError, match="none of the 2 rows of the data can be used:\nrow 1: text missing"):
        read_records([{"text": None}] * 2, on_error="skip")
    with pytest.raises(DataError, match="on_error is 'raise' or 'skip', not 'ignore'"):
        read_records(["a"], on_error="ignore")


def test_what_was_skipped_is_in_the_report(tmp_path):
    tokenizer = Tokenizer.from_folder("tokenizers/tiny")
    (tmp_path / "rows.jsonl").write_text(BROKEN)
    with pytest.warns(UserWarning, match="skipped 3 of 6"):
        source = prepare(tmp_path / "rows.jsonl", tokenizer, None, 32, 2, on_error="skip")
    assert source.report().dropped == {"rows that could not be used": 3}
    assert "3 dropped: rows that could not be used" in str(source.report())


def test_half_a_surrogate_pair_is_told_with_its_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b \\udc00"}\n')
    with pytest.raises(DataError, match=r"a.jsonl, row 2 .line 2.: text has half of a surrogate pair, '\\udc00', at"):
        read_records(tmp_path / "a.jsonl")
    call = {"function": {"name": "f", "arguments": {"x": "\ud83d"}}}
    for messages in (
        [{"role": "user", "content": "\ud83d"}],
        [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}],
        [{"role": "assistant", "tool_calls": [call]}],
    ):
        with pytest.raises(DataError, match="row 1: message 0 has half of a surrogate pair"):
            read_records([{"messages": messages}])
    assert fields([{"text": "\U0001f600"}]) == [{"text": "\U0001f600"}]


def test_the_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt,completion\na,b\nä,b\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.csv, row 2 .line 3. is not UTF-8 .the byte 0xe4 at character 1"):
        read_records(tmp_path / "a.csv")
    (tmp_path / "a.json").write_bytes('[{"text": "a"},\n{"text": "ä"}]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"a.json, line 2 is not UTF-8"):
        read_records(tmp_path / "a.json")
    (tmp_path / "b.csv").write_bytes("a,tëxt\n1,2\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"b.csv, the header .line 1. is not UTF-8"):
        read_records(tmp_path / "b.csv")


# --- TRL's forms ------------------------------------------------------------------------------------------------------


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
MORE, LAST = {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you"}


def test_prompts_and_completions_that_are_messages():
    tokenizer, theirs = Tokenizer.from_folder("tokenizers/tiny"), AutoTokenizer.from_pretrained("tokenizers/tiny")
    render = ChatTemplate(tokenizer.chat_template, special_tokens={"bos_token": "<bos>"}).render
    prompt, completion = [USER, ANSWER, MORE], [LAST]
    source = prepare([{"prompt": prompt, "completion": completion}], tokenizer, render, 64, 1, packing=False)
    (batch,) = source.epoch(0)
    # As TRL: the prompt with the opening of an answer is not learnt, the rest is.
    ids = theirs.apply_chat_template(prompt + completion, tokenize=True, return_dict=True)["input_ids"]
    asked = theirs.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert batch["input_ids"][0, : len(ids)].tolist() == ids
    learnt = [token for token in batch["labels"][0].tolist() if token >= 0]
    answer = ids[len(asked) :]
    assert learnt == answer[: len(learnt)] and tokenizer.decode(answer[len(learnt) :], False).strip() == ""
    assert tokenizer.decode(learnt, False).startswith("See you")
    for row in ({"prompt": prompt, "completion": "text"}, {"prompt": "text", "completion": completion}):
        with pytest.raises(DataError, match="must both be texts, or both lists of messages"):
            read_records([row])


def test_questions_and_answers():
    assert fields([{"question": "Why?", "answer": "So."}]) == [
        {"instruction": "Why?", "context": "", "response": "So."}
    ]
    assert fields([{"question": "Why?", "answer": "So.", "context": "Here."}])[0]["context"] == "Here."
    with pytest.raises(DataError, match="row 2: response missing for the kind dolly"):
        read_records([{"question": "a", "answer": "b"}, {"question": "a", "answer": None}])


def test_preferences_are_not_offered_and_it_is_said():
    for row in ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": [USER, ANSWER], "rejected": [USER, LAST]}):
        with pytest.raises(DataError, match="row 1 holds preferences .chosen, rejected.*not offered yet"):
            read_records([row])


def test_a_generator_is_kept_for_more_than_one_pass():
    data = repeatable(x for x in range(3))
    assert list(data) == list(data) == [0, 1, 2]
    rows = [1, 2]
    assert repeatable(rows) is rows


def test_ids_outside_int32_are_no_other_ids():
    from modelhub.training.ready_batches import complete

    with pytest.raises(DataError, match="token id 4294967301 is outside any vocabulary"):
        complete({"input_ids": [[2**32 + 5, 1]], "labels": [[1, 1]]})
    with pytest.raises(DataError, match="token id 4294967301 is outside any vocabulary"):
        complete({"input_ids": [[5, 1]], "labels": [[1, 2**32 + 5]]})
