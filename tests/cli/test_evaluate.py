"""`capsule-heads evaluate --data`: tables to read, figures in a file, and pictures."""

import builtins
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import AutoTokenizer

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.metrics.report import render_text

TEXTS = ["the food was good", "bad", "it was long and bad", "a good film", "the film", "food"]


def write_csv(path, columns):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *zip(*columns.values())])
    return path


def evaluated(result):
    status, out, err = result
    assert status == 0, err
    path = Path(out.splitlines()[-1])
    return json.loads(path.read_text()), out, path.parent


def logits_of(folder):
    model, tokenizer = (
        CapsuleHeadForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])


def test_classes_of_a_file(call, classifier, tmp_path):
    labels = ["positive", "negative"] * 3
    source = write_csv(tmp_path / "held out.csv", {"text": TEXTS, "label": labels})
    found, out, folder = evaluated(call("evaluate", classifier, "--data", source))
    assert folder == classifier / "evaluation-held out"
    probabilities = logits_of(classifier).softmax(-1)
    right = np.array([1, 0] * 3)
    predicted = probabilities.argmax(-1).numpy()
    assert found["accuracy"] == (predicted == right).mean()
    assert found["f1_macro"] == pytest.approx(f1_score(right, predicted, average="macro"))
    assert found["negative_log_likelihood"] == pytest.approx(
        -probabilities[range(6), right].log().mean().item(), rel=1e-4
    )
    assert np.sum(found["confusion"]) == 6 and found["classes"]["positive"]["support"] == 3
    assert "labels in rows, predictions in columns" in out and "macro F1" in out
    assert {path.name for path in folder.iterdir()} == {"evaluation.json", "confusion.png", "reliability.png"}


def test_several_labels_and_numbers_of_a_file(call, saved, tmp_path):
    labels = {"long": [0, 0, 1, 0, 1, 0], "good": [1, 0, 0, 1, 0, 0]}
    source = write_csv(tmp_path / "labels.csv", {"text": TEXTS, **labels})
    fields = {"id2label": {0: "long", 1: "good"}, "problem_type": "multi_label_classification"}
    model = saved(**fields, thresholds=[0.2, 0.8])
    found, out, folder = evaluated(call("evaluate", model, "--data", source, "--output_dir", tmp_path / "here"))
    assert folder == tmp_path / "here" and {x.name for x in folder.iterdir()} == {"evaluation.json", "reliability.png"}
    predicted = logits_of(model).sigmoid().numpy() > np.array([0.2, 0.8])
    expected = f1_score(np.array(list(labels.values())).T, predicted, average="micro", zero_division=0)
    assert found["f1_micro"] == pytest.approx(expected)
    assert found["classes"]["good"]["threshold"] == 0.8 and "threshold" in out

    values = [0.5, 1.5, 2.0, 0.0, 3.0, 1.0]
    source = write_csv(tmp_path / "values.csv", {"text": TEXTS, "score": values})
    model = saved(num_labels=1)
    found, out, folder = evaluated(call("evaluate", model, "--data", source))
    expected = ((logits_of(model)[:, 0].numpy() - values) ** 2).mean()
    assert found["mean_squared_error"] == pytest.approx(expected, rel=1e-4)
    assert [x.name for x in folder.iterdir()] == ["evaluation.json"] and "Spearman correlation" in out


def test_without_matplotlib_one_line_says_so(call, classifier, tmp_path, monkeypatch):
    source = write_csv(tmp_path / "x.csv", {"text": TEXTS, "label": ["positive", "negative"] * 3})
    find = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    status, _, err = call("evaluate", classifier, "--data", source, "--output_dir", tmp_path / "out")
    assert status == 0 and err.count("There are no pictures, which need matplotlib") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["evaluation.json"]


def test_many_classes_are_shown_by_their_f1():
    by_class = {f"class {k}": {"precision": 0.5, "recall": 0.5, "f1": k / 40, "support": 3} for k in range(40)}
    text = render_text({"n": 120, "accuracy": 0.5, "pearson": None, "classes": by_class, "confusion": []})
    assert "class 0 " in text and "class 39" not in text
    assert "10 classes with a higher F1 are not shown." in text and "undefined" in text


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": TEXTS, "mark": ["positive"] * 6}, ("--label", "stars"), "stars"),
        (
            {"text": TEXTS, "label": ["positive"] * 6},
            ("--text", "review"),
            "has the columns text, label, and not review",
        ),
        ({"text": TEXTS, "label": [""] * 6}, (), "has no complete row"),
        ({"text": TEXTS, "label": ["positive"] * 6}, ("--task", "reviews"), "Expected either --data"),
        ({"text": TEXTS, "label": ["positive"] * 6}, ("--source", "x"), "--source is x, which is for a task"),
        ({"text": TEXTS, "label": ["positive"] * 6}, ("--split", "dev"), "dev"),
    ],
)
def test_mistakes_are_one_sentence(fails, classifier, tmp_path, columns, options, message):
    source = write_csv(tmp_path / "x.csv", columns)
    line = fails("evaluate", classifier, "--data", source, "--output_dir", tmp_path / "out", *options)
    assert message in line and not line.count("Traceback")
    assert not (tmp_path / "out").exists()


def test_labels_that_the_model_does_not_know_are_counted(call, classifier, tmp_path):
    source = write_csv(tmp_path / "odd.csv", {"text": TEXTS, "label": ["positive", "odd", "negative"] * 2})
    found, _, _ = evaluated(result := call("evaluate", classifier, "--data", source))
    assert found["n"] == 4 and "2 rows with labels that" in result[2] and "odd" in result[2]


def test_neither_data_nor_a_task(fails, classifier):
    assert fails("evaluate", classifier).startswith("error: Expected either --data, with labelled data of your own, or")
    assert "--text is a, which is for --data" in fails("evaluate", classifier, "--task", "reviews", "--text", "a")
    assert "There is no file or folder none.csv" in fails("evaluate", classifier, "--data", "none.csv")
