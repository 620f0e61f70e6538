"""scripts/benchmarks/conditions.py on a tiny backbone and a few texts, and what it draws."""

import json
import shutil

import conditions
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

BEST = {"learning_rate": 0.01, "weight_decay": 0.0, "mixup_alpha": 0.0}
PARTS = {"n_iters": 2, "n_parts": 4}


@pytest.fixture
def train():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
    rows = {"text": [" ".join(["word"] * (1 + n % 7)) for n in range(60)], "label": [n % 3 for n in range(60)]}
    return Dataset.from_dict(rows, features)


def test_what_is_drawn(train):
    few = conditions.CONDITIONS["8 of each class"](train)
    assert np.bincount(few["label"][:]).tolist() == [8, 8, 8]
    noisy = conditions.CONDITIONS["20% of labels wrong"](train)
    assert noisy["text"][:] == train["text"][:] and noisy.features == train.features
    assert sum(x != y for x, y in zip(noisy["label"][:], train["label"][:])) == 12
    short = conditions.CONDITIONS["short texts"](train)
    assert set(conditions.lengths(short)) == {1, 2, 3, 4}  # the median of 1 to 7 words
    others = conditions.CONDITIONS["as many, of all lengths"](train)
    assert len(others) == len(short) and set(conditions.lengths(others)) == set(range(1, 8))


def test_what_is_measured():
    of_test = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    of_none = np.array([[0.75, 0.25], [0.5, 0.5]])
    found = conditions.measure(of_test, of_none, np.array([0, 1, 1]))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["ece"] == pytest.approx((0.1 + 0.2 + 0.7) / 3)
    assert found["auroc"] == pytest.approx(5 / 6)  # of 6 pairs, 0.7 is below 0.75


def test_a_table(call, backbone, tiny_set, tmp_path):
    shutil.copytree(tiny_set / "cr", tiny_set / "subj")
    best = {"capsules": {**BEST, **PARTS}, "gated routing": {**BEST, **PARTS}, "attentive pooling": BEST}
    (tmp_path / "heads").mkdir()
    record = {"best": {**best, "regression, all layers": {"C": 0.1}}}
    (tmp_path / "heads" / "cr.json").write_text(json.dumps(record))
    options = ("--set", "cr", "--of_no_class", "subj", "--data", tiny_set, "--backbone", backbone, "--steps", 2)
    files = ("--results", tmp_path / "heads", "--runs", tmp_path / "runs", "--seeds", 2)
    which = ("--conditions", "all rows", "8 of each class")
    status, out, err = call("benchmarks/conditions.py", *options, *files, *which)
    assert status == 0, err
    lines = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][2:]
    assert [line[2] for line in lines] == 2 * list(conditions.MEASURED)
    records = json.loads((tmp_path / "runs" / "cr" / "runs.json").read_text())
    assert len(records) == 2 * (3 * 2 + 1)
    assert {x["auroc"] for x in records if x["condition"] == "all rows"} == {0.5}  # the texts of no class are the same
    again = call("benchmarks/conditions.py", *options, *files, *which)
    assert again[:2] == (0, out)  # nothing is measured again
    assert "have steps 2, not 3" in call("benchmarks/conditions.py", *options, *files, "--steps", 3)[2]
    _, _, err = call("benchmarks/conditions.py", *options, *files, "--conditions", "short texts")
    assert err.strip() == "error: No test text has more than 4 words, the median; leave out 'short texts'."


def test_mistakes(fails, tmp_path):
    options = ("--set", "cr", "--data", tmp_path, "--results", tmp_path)
    assert "--of_no_class cr is the set itself" in fails("benchmarks/conditions.py", *options, "--of_no_class", "cr")
    assert "cr.json" in fails("benchmarks/conditions.py", *options, "--of_no_class", "mr")
