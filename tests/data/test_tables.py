"""Files of rows: every value as it stands, and one sentence on what cannot be read."""

import gzip
import json

import pandas as pd
import pytest

from capsule_heads.data.tables import open_table


def written(folder, name, content):
    path = folder / name
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def rows(path, size=2):
    table = open_table(path)
    found = [dict(zip(batch, values)) for batch in table.batches(size) for values in zip(*batch.values())]
    assert table.count_rows() == len(found)
    assert all(list(row) == table.columns for row in found)
    return found


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'id,text\n007,"Good, ""very"" good"\nNA,\n1e5,"two\nlines"\n'),
        ("a.csv", '\ufeffid;text\r\n007;"Good, ""very"" good"\r\nNA;\r\n1e5;"two\nlines"\r\n'),
        ("a.csv.gz", 'id\ttext\n007\t"Good, ""very"" good"\n\nNA\t\n1e5\t"two\nlines"'),
        ("a.TSV", 'id\ttext\n007\t"Good, ""very"" good"\nNA\t\n1e5\t"two\nlines"\n'),
        ("a.csv", 'id,text\n007,"Good, ""very"" good"\nNA,\n1e5,"two\nlines"\n'.encode("utf-16")),
    ],
)
def test_fields_stay_as_they_stand(tmp_path, name, content):
    assert rows(written(tmp_path, name, content)) == [
        {"id": "007", "text": 'Good, "very" good'},
        {"id": "NA", "text": ""},
        {"id": "1e5", "text": "two\nlines"},
    ]


def test_quotation_marks_of_texts_in_a_tsv_file_stay(tmp_path):
    path = written(tmp_path, "a.tsv", 'text\tlabel\n"Good" he said\tyes\n5" screen\tno\n')
    assert rows(path) == [{"text": '"Good" he said', "label": "yes"}, {"text": '5" screen', "label": "no"}]


def test_a_blank_line_is_an_empty_text_where_there_is_one_column(tmp_path):
    assert rows(written(tmp_path, "a.csv", "text\na\n\nb\n")) == [{"text": "a"}, {"text": ""}, {"text": "b"}]


def test_a_text_of_any_length_is_read(tmp_path):
    assert rows(written(tmp_path, "a.csv", f"text\n{'long ' * 100_000}\n")) == [{"text": "long " * 100_000}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson.gz"])
def test_objects_have_the_columns_of_all(tmp_path, name):
    given = [{"text": "a", "stars": 1}, {"text": "b", "tags": ["x"]}, {"text": None, "stars": 2.5}]
    content = json.dumps(given, indent=1) if name == "a.json" else "\n".join(map(json.dumps, given)) + "\n\n"
    assert rows(written(tmp_path, name, content)) == [
        {name: row.get(name) for name in ("text", "stars", "tags")} for row in given
    ]


def test_a_json_file_may_have_an_object_a_line(tmp_path):
    assert rows(written(tmp_path, "a.json", '{"text": "a"}\n{"text": "b"}')) == [{"text": "a"}, {"text": "b"}]


def test_a_list_of_objects_is_parsed_once(tmp_path, monkeypatch):
    loads, parsed = json.loads, []
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    assert rows(written(tmp_path, "a.json", '[{"text": "a"}, {"text": "b"}]')) == [{"text": "a"}, {"text": "b"}]
    assert len(parsed) == 1


def test_parquet_keeps_its_types(tmp_path):
    pd.DataFrame({"text": ["a", None, "c"], "n": [1, 2, 3]}).to_parquet(tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == [{"text": "a", "n": 1}, {"text": None, "n": 2}, {"text": "c", "n": 3}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "a", "is no table by its name; expected .csv"),
        ("a.parquet.gz", "a", "is no table by its name"),
        ("a.csv", "", "is empty; expected a header"),
        ("a.csv", "text,text\n1,2\n", "two columns named 'text'"),
        ("a.csv", "text,label\na,b\nc,d,e\n", "Row 2 of .* has 3 fields, and the header 2; expected as many"),
        ("a.csv", "text,label\na,b\nc\n", "Row 2 of .* has 1 field, and the header 2"),
        ("a.csv", 'text,label\na,b\n"c" d,e\n', "Line 3 of .* cannot be read"),
        ("a.csv", 'text,label\na,b\n"c,e\n', "cannot be read .*; expected fields between commas"),
        ("a.csv", "text,label\na,caf\xe9\n".encode("latin-1"), "is not UTF-8 text, after line .* iconv -f LATIN1"),
        ("a.jsonl", '{"text": "a"}\n{"text": }\n', "Line 2 of .* is not JSON"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "Line 2 of .* is list; expected an object"),
        ("a.json", '[{"text": "a"}, 3]', "Row 2 of .* is int; expected an object"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.json", "[]", "has no objects"),
        ("a.parquet", "PAR1 this is none", "is not a Parquet file that can be read"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, name, content, words):
    with pytest.raises(ValueError, match=words):
        rows(written(tmp_path, name, content))


def test_a_gzip_file_that_is_cut_short_is_named(tmp_path):
    path = written(tmp_path, "a.csv.gz", "text\n" + "some text\n" * 10_000)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.csv\.gz is damaged"):
        rows(path)


def test_a_file_that_is_not_there_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        open_table(tmp_path / "a.csv")
