import math
from pathlib import Path

import datasets
import pytest

from capsule_heads.data.glue import GLUE_TASKS, load_glue

MNLI_HEADER = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
    "sentence1_parse\tsentence2_parse\tsentence1\tsentence2"
)
STSB_HEADER = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"

# task: labelled file, unlabelled test file, expected rows of the first, expected rows of the second
LAYOUTS = {
    "cola": (
        'gj04\t1\t\tHe "left .\ngj04\t0\t*\tLeft he .\n',
        "index\tsentence\n0\tShe left .\n",
        [('He "left .', 1), ("Left he .", 0)],
        [("She left .", -1)],
    ),
    "sst2": (
        "sentence\tlabel\na fine film \t1\nno wit\t0\n",
        "index\tsentence\n0\tuneasy\n",
        [("a fine film ", 1), ("no wit", 0)],
        [("uneasy", -1)],
    ),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said so .\tSo he said .\n0\t9\t9\tA\tB\n",
        "\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tC\tD\n",
        [("He said so .", "So he said .", 1), ("A", "B", 0)],
        [("C", "D", -1)],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n5\t1\t2\tWhy?\tHow?\t0\n6\t3\t4\tWho?\tWho is it?\t1\n",
        "id\tquestion1\tquestion2\n0\tWhen?\tWhere?\n",
        [("Why?", "How?", 0), ("Who?", "Who is it?", 1)],
        [("When?", "Where?", -1)],
    ),
    "stsb": (
        f"{STSB_HEADER}\tscore\n0\tnews\tf\t2012\t1\tx\ty\tA dog .\tA cat .\t1.250\n",
        f"{STSB_HEADER}\n0\tnews\tf\t2012\t1\tx\ty\tA man .\tMen .\n",
        [("A dog .", "A cat .", 1.25)],
        [("A man .", "Men .", math.nan)],
    ),
    "mnli": (
        f"{MNLI_HEADER}\tlabel1\tgold_label\n"
        "0\t1\t1n\tfiction\tp\tp\tp\tp\tIt rains .\tIt is wet .\tneutral\tentailment\n"
        "1\t1\t1n\tfiction\tp\tp\tp\tp\tIt rains .\tIt is dry .\tneutral\tcontradiction\n"
        "2\t1\t1n\tfiction\tp\tp\tp\tp\tIt rains .\tIt is May .\tneutral\tneutral\n",
        f"{MNLI_HEADER}\n0\t1\t1n\tfiction\tp\tp\tp\tp\tA\tB\n",
        [("It rains .", "It is wet .", 0), ("It rains .", "It is dry .", 2), ("It rains .", "It is May .", 1)],
        [("A", "B", -1)],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n0\tWho?\tHe .\tentailment\n1\tWho?\tThen .\tnot_entailment\n",
        "index\tquestion\tsentence\n0\tWho?\tShe .\n",
        [("Who?", "He .", 0), ("Who?", "Then .", 1)],
        [("Who?", "She .", -1)],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tnot_entailment\n1\tC\tD\tentailment\n",
        "index\tsentence1\tsentence2\n0\tE\tF\n",
        [("A", "B", 1), ("C", "D", 0)],
        [("E", "F", -1)],
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel\n0\tA\tB\t1\n1\tC\tD\t0\n",
        "index\tsentence1\tsentence2\n0\tE\tF\n",
        [("A", "B", 1), ("C", "D", 0)],
        [("E", "F", -1)],
    ),
}

# As on the Hub.
LABEL_NAMES = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
    "wnli": ["not_entailment", "entailment"],
}
HUB_COLUMNS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "stsb": ["sentence1", "sentence2"],
    "mnli": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}


def write(folder, task, **changed):
    """Writes a task's files, with other content where given: train=..., dev=..., test=..."""
    labelled, unlabelled, _, _ = LAYOUTS[task]
    for file in GLUE_TASKS[task].files.values():
        kind = file.partition(".")[0].partition("_")[0]
        content = changed.get(kind, unlabelled if kind == "test" else labelled)
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def rows(dataset):
    return [tuple(row.values()) for row in dataset]


def columns_of(task):
    return ["text", "label"] if len(HUB_COLUMNS[task]) == 1 else ["text", "text_pair", "label"]


def label_feature(task):
    return datasets.Value("float32") if task == "stsb" else datasets.ClassLabel(names=LABEL_NAMES[task])


def test_table_of_tasks():
    assert list(GLUE_TASKS) == ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
    assert [name for name, task in GLUE_TASKS.items() if not task.is_pair] == ["cola", "sst2"]


@pytest.mark.parametrize("task", LAYOUTS)
def test_official_layouts(tmp_path, task):
    loaded = load_glue(task, write(tmp_path, task))
    endings = ["_matched", "_mismatched"] if task == "mnli" else [""]
    assert list(loaded) == ["train", *("validation" + end for end in endings), *("test" + end for end in endings)]
    for split, dataset in loaded.items():
        expected = LAYOUTS[task][3 if split.startswith("test") else 2]
        assert repr(rows(dataset)) == repr(expected)  # NaN is not equal to itself, but is written alike
        assert dataset.column_names == columns_of(task)
        assert dataset.features["label"] == label_feature(task)


def test_test_file_may_be_absent_or_labelled(tmp_path):
    source = write(tmp_path, "sst2", test="label\tcontent\n1\tgood \n")
    assert rows(load_glue("sst2", source)["test"]) == [("good ", 1)]
    (source / "test.tsv").unlink()
    assert list(load_glue("sst2", str(source))) == ["train", "validation"]


def test_columns_may_come_in_any_order_with_any_line_ends(tmp_path):
    source = write(tmp_path, "sst2", train="label\tcontent\r\n0\tno\u2028\x85wit\r\n", dev="content\tlabel\nfine\t1")
    loaded = load_glue("sst2", source)
    assert rows(loaded["train"]) == [("no\u2028\x85wit", 0)]
    assert rows(loaded["validation"]) == [("fine", 1)]


@pytest.mark.parametrize(
    ("task", "row", "complaint"),
    [
        ("qqp", "5\t1\t2\tWhy?", r"4 tab-separated fields, expected 6: \['id', 'qid1'"),
        ("qqp", "", r"1 tab-separated fields, expected 6"),
        ("rte", "0\tA\tB\tC\tentailment", r"5 tab-separated fields, expected 4"),
        (
            "cola",
            "gj04\t1\tHe left .",
            r"3 tab-separated fields, expected 4: \['source', 'label', 'mark', 'sentence'\]",
        ),
        ("cola", "gj04\tyes\t\tHe left .", r"label 'yes' is not one of 0, 1\."),
        ("qnli", "0\tWho?\tHe .\t1", r"label '1' is not one of entailment, not_entailment\."),
        ("sst2", "fine\t", r"label '' is not one of 0, 1\."),
        ("sst2", "\t1", r"the text in column 'sentence' is empty"),
        ("qqp", "5\t1\t2\tWhy?\t \t0", r"the text in column 'question2' is empty"),
        ("stsb", "0\tn\tf\t2012\t1\tx\ty\tA\tB\thigh", r"the score 'high' is not a finite number"),
        ("stsb", "0\tn\tf\t2012\t1\tx\ty\tA\tB\tnan", r"the score 'nan' is not a finite number"),
        ("sst2", b"caf\xe9\t1", r"not UTF-8 text .*; save the file as UTF-8"),
        ("sst2", b"ca\0fe\t1", "a NUL byte, as in UTF-16 or a damaged file; save the file as UTF-8"),
    ],
)
def test_malformed_row_names_file_and_line(tmp_path, task, row, complaint):
    first = LAYOUTS[task][0].split("\n")[0].encode() + b"\n"  # the header row; for CoLA an example
    row = row if isinstance(row, bytes) else row.encode()
    source = write(tmp_path, task, dev=first + row + b"\n" + row + b"\n")
    with pytest.raises(ValueError, match=rf"dev\.tsv, line 2: {complaint}"):
        load_glue(task, source)


@pytest.mark.parametrize("content", ["", "\n"])
def test_empty_file(tmp_path, content):
    for task in ("cola", "rte"):
        with pytest.raises(ValueError, match=r"train\.tsv is empty; expected one example a line"):
            load_glue(task, write(tmp_path, task, train=content))


def test_header_row_alone(tmp_path):
    with pytest.raises(ValueError, match=r"train\.tsv holds a header row only; expected one example a line"):
        load_glue("sst2", write(tmp_path, "sst2", train="sentence\tlabel\n"))


def test_missing_column(tmp_path):
    with pytest.raises(ValueError, match=r"dev\.tsv has no column 'label'; its header row is \['sentence', 'lable'\]"):
        load_glue("sst2", write(tmp_path, "sst2", dev="sentence\tlable\nfine\t1\n"))
    with pytest.raises(
        ValueError, match=r"test\.tsv has no column 'sentence' or 'content'; its header row is \['text'"
    ):
        load_glue("sst2", write(tmp_path, "sst2", test="text\tlabel\nfine\t1\n"))


def test_unknown_task():
    with pytest.raises(ValueError, match=r"Unknown GLUE task 'sst5'; expected one of cola, sst2, .*wnli\."):
        load_glue("sst5")


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent is not a directory; give .*rte's TSV files \(train\.tsv, dev"):
        load_glue("rte", tmp_path / "absent")
    (tmp_path / "train.tsv").touch()
    with pytest.raises(FileNotFoundError, match=r"has no dev\.tsv; rte needs its training and validation files"):
        load_glue("rte", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no dev_matched\.tsv, dev_mismatched\.tsv; mnli needs"):
        load_glue("mnli", tmp_path)


def from_hub(task, labels, names=None):
    """A split as the Hub has it: its own column names, the label before the index."""
    columns = {name: [f"{name} {index}" for index in range(len(labels))] for name in HUB_COLUMNS[task]}
    features = {name: datasets.Value("string") for name in columns}
    features["label"] = label_feature(task) if names is None else datasets.ClassLabel(names=names)
    features["idx"] = datasets.Value("int32")
    return datasets.Dataset.from_dict(
        {**columns, "label": labels, "idx": list(range(len(labels)))}, features=datasets.Features(features)
    )


@pytest.mark.parametrize("task", LAYOUTS)
def test_hub_columns_are_mapped(monkeypatch, task):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.DatasetDict({"train": from_hub(task, [1, 0]), "test": from_hub(task, [-1])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_glue(task)
    assert asked == [(("nyu-mll/glue", task), {})]
    assert list(loaded) == ["train", "test"]
    for dataset in loaded.values():
        assert dataset.column_names == columns_of(task)
        assert dataset.features["label"] == label_feature(task)
    for column, name in zip(columns_of(task), HUB_COLUMNS[task], strict=False):
        assert loaded["train"][column][:] == [f"{name} 0", f"{name} 1"]
    assert loaded["train"]["label"][:] == [1, 0]
    assert str(loaded["test"]["label"][0]) == ("nan" if task == "stsb" else "-1")


@pytest.mark.parametrize("error", [ConnectionError, datasets.exceptions.DatasetNotFoundError, TimeoutError])
def test_hub_out_of_reach(monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = (
        r"Could not load rte of nyu-mll/glue from the Hugging Face Hub \(no route\); .*give source= a local directory"
    )
    with pytest.raises(ConnectionError, match=message):
        load_glue("rte")


@pytest.mark.parametrize(
    "dataset",
    [
        from_hub("rte", [0], names=["not_entailment", "entailment"]),
        from_hub("rte", [0]).rename_column("sentence2", "hypothesis"),
    ],
)
def test_changed_hub_version_is_refused(monkeypatch, dataset):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: datasets.DatasetDict({"train": dataset}))
    with pytest.raises(
        ValueError, match=r"has columns .* and label names .* in rte/train; expected .*'sentence2', 'label'\]"
    ):
        load_glue("rte")


def test_real_sst2_files():
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "glue_sst2"
    if not folder.is_dir():
        pytest.skip(f"GLUE's SST-2 is not at {folder}")
    loaded = load_glue("sst2", folder)
    for file, split in (("train.tsv", "train"), ("dev.tsv", "validation"), ("test.tsv", "test")):
        lines = (folder / file).read_bytes().decode().rstrip("\n").split("\n")[1:]
        assert rows(loaded[split]) == [(text, int(label)) for label, text in (line.split("\t") for line in lines)]
    assert loaded.num_rows["validation"] == 872
