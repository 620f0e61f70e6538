"""`capsule-heads predict --data`: as many rows as came in, in order, with all columns, and answers beside them."""

import csv
import json

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from pyarrow import Table, parquet
from transformers import AutoTokenizer, ViTConfig, ViTImageProcessor

from capsule_heads import CapsuleHeadForImageClassification, CapsuleHeadForSequenceClassification
from capsule_heads.predicting import Answers, Prediction, files, predict_file

ROWS = [
    {"id": "007", "text": "the food was good", "note": "NA"},
    {"id": "8", "text": "", "note": 'says "no", twice'},
    {"id": "", "text": "bad film and long", "note": "two\nlines"},
    {"id": "x", "text": " \t", "note": "caf\u00e9"},
    {"id": "9", "text": "it was a long long bad film", "note": ""},
]


@pytest.fixture(scope="module")
def expected(classifier):
    """Probabilities of each text, by the model alone."""
    model = CapsuleHeadForSequenceClassification.from_pretrained(classifier)
    tokenizer = AutoTokenizer.from_pretrained(classifier)

    def compute(text):
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist()

    return compute


def write_csv(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(path):
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_all_rows_and_columns_are_kept(call, classifier, expected, tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 2)  # three of them
    source, output = write_csv(tmp_path / "in.csv", ROWS), tmp_path / f"out{suffix}"
    status, out, err = call("predict", classifier, "--data", source, "--output", output)
    assert (status, out) == (0, f"{output}\n"), err
    assert "No prediction for 2 of 5 rows, which have no text." in err.splitlines()
    found = read(output)
    names = ["predicted_label", "probability", "probability_negative", "probability_positive"]
    assert [list(row) for row in found] == [[*ROWS[0], *names]] * len(ROWS)
    for row, given in zip(found, ROWS):
        assert {name: row[name] for name in given} == given
        if not given["text"].strip():
            assert {row[name] for name in names} == {"" if suffix == ".csv" else None}
            continue
        scores = expected(given["text"])
        assert [float(row[name]) for name in names[2:]] == pytest.approx(scores, abs=1e-5)
        assert float(row["probability"]) == pytest.approx(max(scores), abs=1e-5)
        assert row["predicted_label"] == ("negative", "positive")[int(np.argmax(scores))]
    assert not output.with_name(f"{output.name}.part").exists()


def test_values_of_parquet_and_json_keep_their_types(call, classifier, tmp_path):
    given = {"n": [1, None], "text": ["good", "bad"], "tags": [["a"], []], "x": [0.5, 2.0]}
    parquet.write_table(Table.from_pydict(given), tmp_path / "in.parquet")
    rows = [dict(zip(given, row)) for row in zip(*given.values())]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    for source in ("in.parquet", "in.json"):
        for suffix in (".parquet", ".jsonl"):
            output = tmp_path / f"out{suffix}"
            assert call("predict", classifier, "--data", tmp_path / source, "--output", output)[0] == 0
            assert [{name: row[name] for name in given} for row in read(output)] == rows
    assert call("predict", classifier, "--data", tmp_path / "in.json", "--output", tmp_path / "out.csv")[0] == 0
    assert [row["tags"] for row in read(tmp_path / "out.csv")] == ['["a"]', "[]"]
    mixed = [{"text": "good", "x": 1}, {"text": "bad", "x": "one"}]
    (tmp_path / "in.json").write_text(json.dumps(mixed))
    status, _, err = call("predict", classifier, "--data", tmp_path / "in.json", "--output", tmp_path / "out.parquet")
    assert status == 2 and "has values of different kinds in one column" in err


def test_answers_with_options(call, classifier, expected, tmp_path):
    source = write_csv(tmp_path / "in.csv", [{"review": "good food"}, {"review": "a bad film"}])
    first = tmp_path / "first.csv"
    p = [max(expected(text)) for text in ("good food", "a bad film")]
    threshold = sum(p) / 2
    options = ["--data", source, "--text", "review", "--abstain_below", threshold, "--top_k", 1]
    status, _, err = call("predict", classifier, *options, "--output", first)
    assert status == 0 and f"No label for 1 of 2 rows, whose best probability is below {threshold:g}." in err
    rows = read(first)
    assert list(rows[0]) == ["review", "predicted_label", "probability", "top_1_label", "top_1_probability"]
    assert [row["predicted_label"] == "" for row in rows] == [x < threshold for x in p]
    assert all(row["top_1_label"] for row in rows)
    # Once more, beside the answers that are there.
    status, _, err = call("predict", classifier, "--data", first, "--output", tmp_path / "second.csv")
    assert status == 0 and "so new ones are called predicted_label_2, probability_2, probability_negative_2" in err
    again = read(tmp_path / "second.csv")
    assert [{name: row[name] for name in rows[0]} for row in again] == rows
    # The same options for lines.
    status, out, _ = call(
        "predict", classifier, "--abstain_below", threshold, "--top_k", 2, stdin="good food\na bad film\n"
    )
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["label"] is None for line in lines] == [x < threshold for x in p]
    assert [list(line["scores"].values()) for line in lines] == [sorted(expected(x["text"]))[::-1] for x in lines]


def test_an_interrupted_prediction_resumes(call, classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 2)
    source = write_csv(tmp_path / "in.csv", ROWS)
    output, complete = tmp_path / "out.csv", tmp_path / "complete.csv"
    arguments = ["predict", classifier, "--data", source, "--output", output]
    assert call("predict", classifier, "--data", source, "--output", complete)[0] == 0
    scored, run = [], files.Scorer.__call__

    def count(self, inputs):
        scored.append(len(inputs))
        if len(scored) == 2 and stops:
            raise KeyboardInterrupt
        return run(self, inputs)

    monkeypatch.setattr(files.Scorer, "__call__", count)
    stops = True
    status, _, err = call(*arguments)
    assert status == 130 and not output.exists()
    line = err.splitlines()[-1]
    assert line == f"error: interrupted; 2 rows are done and kept in {output}.part, where the same command resumes."
    # The same command: the first chunk is not scored again.
    scored, stops = [], False
    status, _, err = call(*arguments)
    assert status == 0 and "Resumed: 2 of 5 rows are done." in err.splitlines()
    assert scored == [1, 1] and output.read_bytes() == complete.read_bytes()
    assert "No prediction for 2 of 5 rows" in err  # those before the interruption too
    # Of another input it begins again.
    stops, scored = True, []
    assert call(*arguments)[0] == 130
    write_csv(source, [{**row, "id": "new"} for row in ROWS])
    stops, scored = False, []
    status, _, err = call(*arguments)
    assert status == 0 and f"{output}.part is of another input, model or options" in err
    assert len(scored) == 3 and {row["id"] for row in read(output)} == {"new"}


def test_the_place_of_what_is_done_is_taken(fails, classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SECONDS_TO_LOCK", 0.01)
    source, folder = write_csv(tmp_path / "in.csv", ROWS), tmp_path / "out.csv.part"
    folder.mkdir()
    arguments = ("predict", classifier, "--data", source, "--output", tmp_path / "out.csv")
    with FileLock(folder / files.LOCK):
        assert fails(*arguments).startswith(f"error: Another process writes to {folder}; wait until it has ended")
    (folder / files.LOCK).unlink(missing_ok=True)
    (folder / "diary.txt").write_text("dear diary")
    assert fails(*arguments).startswith(f"error: {folder} holds other files")
    assert (folder / "diary.txt").read_text() == "dear diary"


def test_several_labels_and_regressions(backbone, shake, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    source = write_csv(tmp_path / "in.csv", [{"text": "good"}, {"text": "the film was bad"}, {"text": ""}])
    names = {0: "long", 1: "good", 2: "odd"}
    fields = {"id2label": names, "problem_type": "multi_label_classification", "thresholds": [0.0, 0.999, 0.5]}
    for suffix in (".csv", ".jsonl", ".parquet"):
        model = CapsuleHeadForSequenceClassification.from_backbone(backbone, d_inp=8, n_parts=6, **fields)
        shake(model.head, scale=0.5)
        predict_file(model, Prediction(source, tmp_path / f"out{suffix}"), tokenizer)
        *rows, empty = read(tmp_path / f"out{suffix}")
        for row in rows:
            labels = json.loads(row["predicted_labels"]) if suffix == ".csv" else row["predicted_labels"]
            p = {name: float(row[f"probability_{name}"]) for name in names.values()}
            assert "long" in labels and "good" not in labels and ("odd" in labels) == (p["odd"] > 0.5)
        assert not empty["predicted_labels"]
    model = CapsuleHeadForSequenceClassification.from_backbone(
        backbone, d_inp=8, n_parts=6, num_labels=1, label_mean=3.0
    )
    shake(model.head, scale=0.5)
    predict_file(model, Prediction(source, tmp_path / "out.csv"), tokenizer)
    rows = read(tmp_path / "out.csv")
    with torch.no_grad():
        value = model(**tokenizer("good", return_tensors="pt")).logits.item()
    assert float(rows[0]["predicted_value"]) == pytest.approx(value, rel=1e-5) and rows[2]["predicted_value"] == ""


def test_a_folder_of_images(shake, tmp_path, caplog):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = ViTConfig(image_size=24, patch_size=8, **sizes)
    processor = ViTImageProcessor(size={"height": 24, "width": 24})
    torch.manual_seed(0)
    model = CapsuleHeadForImageClassification.from_backbone(config, num_labels=2, d_inp=8, n_parts=6)
    shake(model.head, scale=0.5)
    (tmp_path / "in/deep").mkdir(parents=True)
    for name, grey in (("b.png", 10), ("deep/a.png", 200), ("c.jpg", 90)):
        Image.new("L", (30, 20), grey).save(tmp_path / "in" / name)
    (tmp_path / "in/broken.png").write_bytes(b"no image")
    (tmp_path / "in/notes.txt").write_text("left out")
    predict_file(model, Prediction(tmp_path / "in", tmp_path / "out.jsonl"), processor)
    rows = read(tmp_path / "out.jsonl")
    assert [row["file"] for row in rows] == ["b.png", "broken.png", "c.jpg", "deep/a.png"]
    assert [row["predicted_label"] is None for row in rows] == [False, True, False, False]
    assert "No prediction for 1 of 4 files, which cannot be read; the first: " in caplog.text
    assert len({row["probability"] for row in rows}) == 4


def test_long_texts_are_counted_over_all_chunks(call, classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 1)
    source = write_csv(tmp_path / "in.csv", [{"text": "good film " * n} for n in (50, 1, 40)])
    status, _, err = call("predict", classifier, "--data", source, "--output", tmp_path / "out.csv")
    assert status == 0
    assert "Cut to 64 tokens: 2 of 3 texts, the longest of which has 102 tokens." in err.splitlines()


@pytest.fixture
def wrong(tmp_path):
    """A folder of inputs that are wrong."""
    write_csv(tmp_path / "right.csv", [{"text": "good"}])
    write_csv(tmp_path / "other.csv", [{"a": "good", "b": "bad"}])
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "header.csv").write_text("text,label\n")
    (tmp_path / "latin.csv").write_bytes("text\ngood\ncaf\u00e9\n".encode("latin-1"))
    (tmp_path / "uneven.csv").write_text("text,label\ngood,1\nbad, and long,0\n")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "numbers.jsonl").write_text('{"text": "good"}\n{"text": 5}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d"}\n')
    (tmp_path / "words.txt").write_text("good\n")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("source", "output", "options", "message"),
    [
        ("none.csv", "out.csv", (), "There is no file or folder {}/none.csv."),
        ("words.txt", "out.csv", (), "{}/words.txt is no table by its name"),
        ("empty.csv", "out.csv", (), "{}/empty.csv is empty"),
        ("header.csv", "out.csv", (), "{}/header.csv has a header and no rows"),
        ("latin.csv", "out.csv", (), "{}/latin.csv is not UTF-8 text"),
        ("uneven.csv", "out.csv", (), "Row 2 of {}/uneven.csv has 3 fields"),
        ("damaged.parquet", "out.csv", (), "{}/damaged.parquet is not a Parquet file that can be read"),
        ("numbers.jsonl", "out.csv", (), "text of row 2 of {}/numbers.jsonl is 5, a int; expected a text"),
        ("half.jsonl", "out.csv", (), "text of row 1 of {}/half.jsonl has half of a character"),
        ("other.csv", "out.csv", (), "{}/other.csv has the columns a, b, and none has a usual name for texts"),
        ("other.csv", "out.csv", ("--text", "c"), "{}/other.csv has the columns a, b, and text is c; expected"),
        ("other.csv", "out.csv", ("--text", "a,b,a"), "text is a,b,a; expected one column, or two for pairs"),
        ("folder", "out.csv", (), "{}/folder is a folder, and the model classifies texts; expected a table"),
        ("right.csv", "right.csv", (), "The output is the input, {}/right.csv; expected another file."),
        ("right.csv", "out.xlsx", (), "{}/out.xlsx is no table by its name; expected .csv, .jsonl, .parquet."),
        ("right.csv", "none/out.csv", (), "{}/none/out.csv cannot be written; expected a file in a folder that exists"),
        (
            "right.csv",
            "out.csv",
            ("--top_k", 0),
            "command line: argument --top_k: 0 is not a whole number of at least 1",
        ),
        ("right.csv", "out.csv", ("--top_k", 3), "top_k is 3, and the model has 2 classes; expected 2 or less."),
        ("right.csv", "out.csv", ("--abstain_below", 1.5), "argument --abstain_below: 1.5 is not a probability"),
    ],
)
def test_mistakes_are_one_sentence(fails, classifier, wrong, source, output, options, message):
    line = fails("predict", classifier, "--data", wrong / source, "--output", wrong / output, *options)
    assert message.format(wrong) in line
    assert not (wrong / "out.csv").exists()


def test_options_that_need_each_other(fails, classifier, wrong):
    assert "there is no --output" in fails("predict", classifier, "--data", wrong / "right.csv")
    assert "expected --data FILE beside it" in fails("predict", classifier, "good", "--output", "out.csv")
    assert "expected --data FILE beside it" in fails("predict", classifier, "good", "--text", "text")
    both = fails("predict", classifier, "a text", "--data", wrong / "right.csv", "--output", wrong / "out.csv")
    assert both.startswith("error: Expected either --data or inputs, not both")


def test_options_of_other_kinds_of_models(backbone):
    def config(**fields):
        return CapsuleHeadForSequenceClassification.config_class(**fields)

    with pytest.raises(ValueError, match="top_k is 1, and the model is a regression"):
        Answers(config(num_labels=1), top_k=1)
    with pytest.raises(ValueError, match=r"abstain_below is 0\.5, which is for models that give an input one class"):
        Answers(config(problem_type="multi_label_classification"), abstain_below=0.5)
