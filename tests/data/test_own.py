"""A user's own data: what is guessed, what is refused, and what is said of it."""

import json

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from capsule_heads.data import load_data, load_examples
from capsule_heads.models import CapsuleHeadConfig

WORDS = ["good", "bad"] * 10


@pytest.fixture
def said(caplog):
    """What was logged, one line each."""
    return lambda: [record.getMessage() for record in caplog.records]


def table(n=20, /, **columns):
    return {"text": [f"text {number}" for number in range(n)], **columns}


def names_of(data, split="train"):
    return [data.class_names[number] for number in data[split]["label"]]


def test_columns_are_guessed_and_words_are_classes(tmp_path, said):
    path = tmp_path / "reviews.csv"
    pd.DataFrame({"id": range(20), "Review": table()["text"], "stars": WORDS}).to_csv(path, index=False)
    data = load_data(path)
    assert {name: len(split) for name, split in data.items()} == {"train": 16, "validation": 4}
    assert data["train"].features == Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    assert sorted(names_of(data, "validation")) == ["bad", "bad", "good", "good"]  # each class's share
    rows = {**dict(zip(table()["text"], WORDS))}
    assert all(rows[text] == name for text, name in zip(data["train"]["text"], names_of(data)))
    assert (data.modality, data.inputs_from, data.labels_from) == ("text", ["Review"], ["stars"])
    assert said() == [
        "Columns: text from Review, label from stars.",
        "Labels: 2 classes, bad (10), good (10).",
        "Validation: 4 of 20 training rows, drawn at random, with every class's share (seed 0).",
    ]
    assert load_data(path)["train"]["text"][:] == data["train"]["text"][:]
    assert load_data(path, seed=1)["train"]["text"][:] != data["train"]["text"][:]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_the_same(tmp_path, suffix):
    frame, path = pd.DataFrame(table(label=WORDS)), tmp_path / f"a.{suffix}"
    if suffix in ("csv", "tsv"):
        frame.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    elif suffix == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=suffix == "jsonl")
    data, expected = load_data(path), load_data(frame)
    assert data["train"].to_dict() == expected["train"].to_dict()
    assert data["train"].features == expected["train"].features


@pytest.mark.parametrize(
    ("labels", "problem", "names"),
    [
        ([1, 5] * 10, "single_label_classification", ["1", "5"]),
        (["10", "9"] * 10, "single_label_classification", ["9", "10"]),
        ([1.0, 0.0] * 10, "single_label_classification", ["0", "1"]),
        ([True, False] * 10, "single_label_classification", ["False", "True"]),
        (["1", "two"] * 10, "single_label_classification", ["1", "two"]),
        ([0.5, 2] * 10, "regression", None),
        (["0.5", "1e3"] * 10, "regression", None),
        ([["a", "b"], []] * 10, "multi_label_classification", ["a", "b"]),
        (["['b', 'a']", "[]"] * 10, "multi_label_classification", ["a", "b"]),  # as pandas writes lists to CSV
        ([[0, 1], [1, 1]] * 10, "multi_label_classification", ["label_0", "label_1"]),
    ],
)
def test_labels_say_what_the_problem_is(labels, problem, names):
    data = load_data(table(label=labels))
    assert (data.problem_type, data.class_names) == (problem, names)
    assert sum(len(split) for split in data.values()) == 20


def test_numbers_have_a_mean_and_a_unit():
    fields = load_data(table(stars=[0.5, 2.5] * 10)).model_fields
    assert fields["problem_type"] == "regression" and fields["num_labels"] == 1
    assert 1 < fields["label_mean"] < 2 and fields["label_std"] == pytest.approx(1, abs=0.05)


def test_the_problem_type_can_be_given():
    assert load_data(table(stars=[1, 2] * 10), problem_type="regression")["train"].features["label"] == Value("float64")
    assert load_data(table(x=[0.5, 2.5] * 10), problem_type="single_label_classification").class_names == ["0.5", "2.5"]


def test_several_columns_are_several_labels(said):
    given = table(fun=[1, 0] * 10, sad=[0, 1] * 10)
    data = load_data(given)  # guessed
    assert (data.problem_type, data.class_names) == ("multi_label_classification", ["fun", "sad"])
    rows = dict(zip(given["text"], zip(given["fun"], given["sad"])))
    assert all(rows[text] == tuple(label) for text, label in zip(data["train"]["text"], data["train"]["label"]))
    assert "Labels: several to a row, of 2: fun (50%), sad (50%)." in said()
    assert load_data({**given, "n": range(20)}, label="sad,fun").class_names == ["sad", "fun"]


def test_pairs_of_texts():
    given = {"premise": table()["text"], "hypothesis": [None, float("nan"), "", "b"] * 5, "label": WORDS}
    rows = load_data(given)["train"]
    assert set(rows.column_names) == {"text", "text_pair", "label"}
    assert set(rows["text_pair"]) == {"", "b"}
    found = load_data({"x": ["a"] * 20, "y": ["b"] * 20, "z": WORDS}, text="y,x", label="z")["train"][0]
    assert (found["text"], found["text_pair"]) == ("b", "a")


def test_what_is_left_out_or_odd_is_said(said):
    train = table(22, label=[*WORDS, "rare", None])
    train["text"][0], train["text"][2] = "", None
    test = {"text": ["text 1", "new", "other"], "label": ["bad", "unknown", "good"]}
    data = load_data(train, test=test)
    assert {name: len(split) for name, split in data.items()} == {"train": 15, "validation": 4, "test": 2}
    assert "rare" in names_of(data) and "unknown" not in data.class_names
    lines = said()
    for line in (
        "Left out of train: 2 rows without a text.",
        "Left out of train: 1 row without a label.",
        "Left out of test: 1 row with labels that train does not have (unknown); a model of these classes has them "
        "wrong.",
        "There is no validation example of 1 class, whose only example is trained on: rare.",
    ):
        assert line in lines, lines
    assert any(line.endswith("of test are in train too.") for line in lines) == ("text 1" in data["train"]["text"])


def test_splits_are_known_by_their_names(tmp_path, said):
    for name, first in (("training", 0), ("dev", 20), ("test", 30)):
        pd.DataFrame({"text": [f"text {first + n}" for n in range(10)], "label": WORDS[:10]}).to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    data = load_data(tmp_path)
    assert {name: split["text"][0] for name, split in data.items()} == {
        "train": "text 0", "validation": "text 20", "test": "text 30",
    }  # fmt: skip
    data.save_to_disk(tmp_path / "saved")
    assert {name: len(split) for name, split in load_data(tmp_path / "saved").items()} == {
        "train": 10, "validation": 10, "test": 10,
    }  # fmt: skip
    files = {name: str(tmp_path / f"{name}.csv") for name in ("training", "dev", "test")}
    data = load_data(files["training"], validation=files["test"], test=files["dev"])
    assert (data["validation"]["text"][0], data["test"]["text"][0]) == ("text 30", "text 20")
    three = DatasetDict(big=data["train"], unsupervised=data["test"], held=data["validation"])
    data = load_data(three, split="big", validation="held")
    assert (data["train"]["text"][0], data["validation"]["text"][0]) == ("text 0", "text 30")
    assert "Not used of The DatasetDict: the splits unsupervised." in said()


def test_a_dataset_of_the_hub_comes_by_its_name(monkeypatch):
    given = DatasetDict(
        train=Dataset.from_dict(table(label=[0, 1] * 10)).cast_column("label", ClassLabel(names=["neg", "pos"])),
        test=Dataset.from_dict(table(label=[-1] * 20)).cast_column("label", ClassLabel(names=["neg", "pos"])),
    )
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *names: asked.append(names) or given)
    data = load_data("someone/reviews", config="en")
    assert asked == [("someone/reviews", "en")]
    assert data.class_names == ["neg", "pos"] and set(data) == {"train", "validation"}  # test has no labels


@pytest.mark.parametrize("with_splits", [True, False])
def test_folders_of_images_have_a_class_for_each_folder(tmp_path, with_splits):
    for split in ("train", "test") if with_splits else ("",):
        for name, grey in (("dark", 10), ("light", 200)):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(5):
                Image.new("L", (4, 4), grey + number).save(folder / f"{number}.png")
    data = load_data(tmp_path)
    assert data.modality == "image" and data.class_names == ["dark", "light"]
    assert set(data) == ({"train", "validation", "test"} if with_splits else {"train", "validation"})
    row = data["train"][0]
    assert data.class_names[row["label"]] in row["image"]["path"]


def test_a_table_names_the_files_of_a_folder(tmp_path, said):
    for number in range(21):
        Image.new("L", (4, 4), number).save(tmp_path / f"{number}.png")
    rows = pd.DataFrame({"file_name": [f"{number}.png" for number in range(20)], "age": np.arange(20) + 0.5})
    rows.to_csv(tmp_path / "metadata.csv", index=False)
    for source in (tmp_path, tmp_path / "metadata.csv"):
        data = load_data(source)
        assert (data.modality, data.problem_type, data.labels_from) == ("image", "regression", ["age"])
        for row in data["train"]:
            assert row["image"]["path"].endswith(f"{row['label'] - 0.5:.0f}.png")
    assert f"1 of the 21 files in {tmp_path} are left out: no table names them." in said()


def test_folders_of_audio(tmp_path):
    for name in ("dog", "cat"):
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{number}.wav").write_bytes(b"not read yet")
    data = load_data(tmp_path)
    assert data.modality == "audio" and data.class_names == ["cat", "dog"]
    assert data.class_names[data["train"][0]["label"]] in data["train"][0]["audio"]


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        (table(label=["good"] * 20), {}, "label of train is good in every row; expected two classes or more"),
        (table(label=[0.5] * 20), {}, "label of train is 0.5 in every row; expected different numbers"),
        (table(50, n=list(range(50))), {}, "50 different whole numbers in 50 rows, too many for classes"),
        (table(label=WORDS), {"text": "tekst"}, "has the columns text, label, and not tekst; expected --text"),
        (table(label=WORDS), {"text": "text", "label": "text"}, "text is among the columns of inputs and of labels"),
        (table(label=WORDS), {"text": "a,b,c"}, "text is a, b, c; expected one column, or two for pairs"),
        (table(a=WORDS, b=WORDS), {}, "none with a usual name for labels; expected --label COLUMN"),
        ({"x": [1, 2], "y": [3, 4]}, {}, "none with a usual name for texts; expected --text COLUMN"),
        ({"text": [1, 2], "label": WORDS[:2]}, {}, "text of train holds 1, which is no text"),
        (table(a=[0, 2] * 10, b=[0, 1] * 10), {"label": "a,b"}, "a of train holds 2; expected 0 or 1"),
        (table(label=[["a"], "b"] * 10), {}, r"label holds \['a'\]; expected one class in each row"),
        (table(label=WORDS), {"problem_type": "regression"}, "label of train holds 'good' .* expected numbers"),
        (table(label=WORDS), {"problem_type": "classes"}, "problem_type is 'classes'; expected single_label"),
        (table(label=WORDS), {"split": "big"}, "has the splits train; expected one of them, not big"),
        (table(19, label=WORDS), {}, r"different numbers of rows \(text 19, label 20\)"),
        ({"text": ["a", "b"], "label": ["x", "y"]}, {}, "are 2 examples, too few to keep some for validation"),
        ({"text": [""] * 4, "label": ["x", "y"] * 2}, {}, "no complete row to train on"),
    ],
)
def test_what_does_not_fit_is_one_sentence(given, options, words):
    with pytest.raises(ValueError, match=words):
        load_data(given, **options)


def test_what_is_not_there_is_one_sentence(tmp_path):
    for name in ("nothing.csv", "./nothing", str(tmp_path / "nothing"), "~/no/such/folder"):
        with pytest.raises(FileNotFoundError, match="There is no file or folder"):
            load_data(name)
    with pytest.raises(FileNotFoundError, match="no file or folder here, and no dataset on the Hub that can be read"):
        load_data("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="has no files; expected CLASS/FILE"):
        load_data(tmp_path)
    with pytest.raises(TypeError, match="source is a int; expected the path of a file"):
        load_data(3)
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(ValueError, match="is no table by its name"):
        load_data(tmp_path / "notes.txt")


def model_config(**fields):
    return CapsuleHeadConfig(**fields)


def test_examples_have_the_classes_of_a_model(tmp_path, said):
    config = model_config(**load_data(table(label=WORDS)).model_fields)
    path = tmp_path / "held_out.jsonl"
    rows = [{"text": "a", "label": "good"}, {"text": "b", "label": "odd"}, {"text": "c", "label": "good"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = load_examples(path, config)
    assert list(data) == ["test"] and names_of(data, "test") == ["good", "good"] and data.class_names == ["bad", "good"]
    assert any("Left out of test: 1 row with labels that" in line for line in said())
    with pytest.raises(ValueError, match="no complete row with a label of the model; it has bad, good"):
        load_examples({"text": ["a"], "label": ["odd"]}, config)


def test_examples_of_several_labels_and_of_numbers():
    given = table(fun=[1, 0] * 10, sad=[0, 1] * 10)
    config = model_config(**load_data(given).model_fields)
    data = load_examples({"text": ["a"], "sad": [1], "other": ["x"], "fun": [0]}, config)
    assert data["test"]["label"][:] == [[0, 1]]
    assert load_examples({"text": ["a"], "label": [["sad"]]}, config)["test"]["label"][:] == [[0, 1]]
    config = model_config(**load_data(table(stars=[0.5, 2.5] * 10)).model_fields)
    assert load_examples({"text": ["a"], "stars": [7]}, config)["test"]["label"][:] == [7.0]
