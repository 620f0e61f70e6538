"""Labels of a user's own data: words, true and false, numbers of pandas, and what is missing."""

import math
from datetime import datetime

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from capsule_heads.data.labels import number_labels

NAN = float("nan")


def labelled(labels, feature=None):
    columns = {"text": ["a"] * len(labels), "label": labels}
    return Dataset.from_dict(columns, features=feature and Features({"text": Value("string"), "label": feature}))


def numbered(**splits):
    given = {name: labels if isinstance(labels, Dataset) else labelled(labels) for name, labels in splits.items()}
    return number_labels(DatasetDict(given))


def test_words_become_the_classes_of_all_splits():
    found = numbered(train=["good", "bad"], test=["ugly", "bad"], more=[None, None])
    assert (
        found["train"].features["labels"]
        == found["test"].features["labels"]
        == ClassLabel(names=["bad", "good", "ugly"])
    )
    assert (found["train"]["labels"][:], found["test"]["labels"][:]) == ([1, 0], [2, 0])
    assert found["more"].column_names == ["text"]


def test_true_and_false_become_classes():
    found = numbered(train=[True, False])["train"]
    assert found.features["labels"] == ClassLabel(names=["False", "True"])
    assert found["labels"][:] == [1, 0]


def test_rows_that_were_chosen_keep_their_labels():
    found = numbered(train=labelled(["p", "q", "r"]).select([2, 0]))["train"]
    assert (found["labels"][:], found.features["labels"].names) == ([1, 0], ["p", "r"])


def test_whole_numbers_of_pandas_become_integers():
    frame = pd.DataFrame({"text": ["a", "b"], "label": [0.0, 1.0]})
    found = numbered(train=Dataset.from_pandas(frame), test=[1, 1], more=[NAN])
    assert found["train"]["labels"][:] == [0, 1] and found["train"].features["labels"] == Value("int64")
    assert found["test"]["labels"][:] == [1, 1]
    assert math.isnan(found["more"]["labels"][0])


def test_numbers_that_are_not_whole_stay():
    found = numbered(train=[0.5, 1.0], test=[1.0, 2.0], more=[3, 4])
    assert [found[name]["labels"][:] for name in found] == [[0.5, 1.0], [1.0, 2.0], [3.0, 4.0]]
    assert found["more"].features["labels"] == Value("float64")


def test_a_split_without_labels_stays():
    names = ClassLabel(names=["no", "yes"])
    found = numbered(train=labelled([0, 1], names), test=labelled([-1, -1], names))
    assert found["test"]["labels"][:] == [-1, -1]
    found = numbered(train=labelled([0.5, 1.5], Value("float32")), test=labelled([NAN, NAN], Value("float32")))
    assert found["test"].features["labels"] == Value("float32")
    assert numbered(train=labelled([0, 1], names), test=labelled([None], names))["test"].column_names == ["text"]
    assert numbered(train=[-1, 3])["train"]["labels"][:] == [-1, 3]  # numbers, which may be of a regression


def test_lists_stay():
    assert numbered(train=[[0.0, 1.0], [1.0, 1.0]])["train"]["labels"][:] == [[0.0, 1.0], [1.0, 1.0]]


def test_the_column_may_be_called_labels():
    found = number_labels({"": labelled(["x", "y"]).rename_column("label", "labels")})[""]
    assert found.features["labels"].names == ["x", "y"]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            {"train": ["good", None]},
            r"label of row 1 of train \(counted from 0\) is None; expected a label in every row",
        ),
        (
            {"train": [0, 1], "test": [0, None, None]},
            "label of row 1 of test .* is None; .* there are 2, with dataset.f",
        ),
        ({"train": [0.0, 1.0, NAN]}, "label of row 2 of train .* is nan"),
        ({"train": [0.5, math.inf]}, "label of row 1 of train .* is inf"),
        ({"train": labelled([0, -1], ClassLabel(names=["no", "yes"]))}, "label of row 1 of train .* is -1"),
        ({"train": [True, None]}, "label of row 1 of train"),
        ({"train": [[0.0, 1.0], None]}, "label of row 1 of train .* is None"),
        ({"train": [[0.0, 1.0], [0.0, NAN]]}, r"label of row 1 of train .* is \[0.0, nan\]"),
        ({"train": [[0.0, 1.0], [0.0]]}, "label of row 1 of train .* is a list of 1; expected 2, as in the first row"),
        ({"train": [0, 1], "test": ["no"]}, "label holds numbers in train, words in test; expected the same in all"),
        ({"train": [["a"], ["b"]]}, "label of train holds lists of string; expected words, whole numbers or"),
        ({"train": [{"a": 1}]}, "label of train holds dict; expected words"),
        ({"train": [datetime(2026, 1, 1)]}, r"label of train holds timestamp\[us\]; expected words"),
        (
            {"train": labelled([0], ClassLabel(names=["x", "y"])), "test": labelled([0], ClassLabel(names=["y", "x"]))},
            r"label has the classes \['x', 'y'\] in train and \['y', 'x'\] in test; expected the same in",
        ),
    ],
)
def test_labels_that_are_missing_or_of_no_kind(splits, message):
    with pytest.raises(ValueError, match=message):
        numbered(**splits)


def test_a_missing_number_in_pandas():
    frame = pd.DataFrame({"text": ["a", "b"], "label": np.array([1.0, np.nan])})
    with pytest.raises(ValueError, match=r"label of row 1 \(counted from 0\) is (None|nan)"):
        number_labels({"": Dataset.from_pandas(frame)})
