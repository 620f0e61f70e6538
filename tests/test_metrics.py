import math
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from scipy.stats import ConstantInputWarning
from transformers import EvalPrediction

from capsule_heads.metrics import compute_metrics_for, load_metric

EXPECTED_NAMES = {
    "cola": {"matthews_correlation"},
    "sst2": {"accuracy"},
    "mrpc": {"accuracy", "f1"},
    "qqp": {"accuracy", "f1"},
    "mnli": {"accuracy"},
    "qnli": {"accuracy"},
    "rte": {"accuracy"},
    "wnli": {"accuracy"},
    "sst5": {"accuracy"},
    "sst2_root": {"accuracy"},
    "classification": {"accuracy", "f1_macro"},
}
CLASSES = np.array([1, 1, 1, 0, 0, 0, 0, 1])
PREDICTED = np.array([1, 1, 0, 1, 0, 0, 0, 1])  # 3 true and 1 false positive, 3 true and 1 false negative


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    return tmp_path


def logits_for(classes, n_classes=2):
    """Logits, none of them positive, whose largest is that of the class."""
    return np.eye(n_classes, dtype=np.float32)[classes] - 3


@pytest.mark.parametrize("task", EXPECTED_NAMES)
def test_binary_classes_by_hand(task):
    expected = {"accuracy": 6 / 8, "f1": 2 * 3 / (2 * 3 + 1 + 1), "matthews_correlation": (3 * 3 - 1 * 1) / (4 * 4)}
    expected["f1_macro"] = expected["f1"]  # that of class 0 is the same
    expected = pytest.approx({name: expected[name] for name in EXPECTED_NAMES[task]})
    assert load_metric(task).compute(predictions=PREDICTED, references=CLASSES) == expected
    assert compute_metrics_for(task)(EvalPrediction(logits_for(PREDICTED), CLASSES)) == expected


def test_values_are_plain_floats():
    scores = compute_metrics_for("mrpc")(EvalPrediction(logits_for(PREDICTED), CLASSES))
    assert {type(score) for score in scores.values()} == {float}


def test_five_classes_and_a_tuple_of_outputs():
    labels = np.array([0, 1, 2, 3, 4])
    outputs = (logits_for(np.array([0, 1, 2, 4, 3]), 5), np.zeros((5, 7)))
    assert compute_metrics_for("sst5")(EvalPrediction(outputs, labels)) == {"accuracy": 0.6}


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_correlations_against_their_formulas(shape):
    scores = np.array([0.0, 1.2, 2.5, 3.1, 4.9, 5.0], dtype=np.float32)
    predicted = np.array([0.3, 1.0, 0.9, 4.0, 3.5, 4.5], dtype=np.float32)
    ranks = np.array([1, 3, 2, 5, 4, 6])  # of the predictions; the scores' are 1 to 6
    centred = [values.astype(np.float64) - values.astype(np.float64).mean() for values in (scores, predicted)]
    pearson = (centred[0] * centred[1]).sum() / math.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    spearman = 1 - 6 * ((ranks - np.arange(1, 7)) ** 2).sum() / (6 * (6**2 - 1))
    result = compute_metrics_for("stsb")(EvalPrediction(predicted.reshape(shape), scores))
    assert result == pytest.approx({"pearson": pearson, "spearmanr": spearman})


def test_multilabel_by_hand():
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=np.float32)
    logits = np.array([[2.0, -1.0, -3.0], [0.5, -0.1, -1.0], [1.0, 0.2, 0.0]], dtype=np.float32)
    # Label 0: 2 true, 1 false positive. Label 1: 1 true positive, 1 false negative. Label 2: never there, never said
    # (a logit of 0 is not above 0).
    f1 = [2 * 2 / (2 * 2 + 1), 2 * 1 / (2 * 1 + 1), 0.0]
    expected = {"f1_micro": 2 * 3 / (2 * 3 + 1 + 1), "f1_macro": sum(f1) / 3, "subset_accuracy": 1 / 3}
    assert compute_metrics_for("multilabel")(EvalPrediction(logits, labels)) == pytest.approx(expected)


def test_constant_predictions():
    zeros = np.zeros(8, dtype=int)
    assert load_metric("cola").compute(predictions=zeros, references=CLASSES) == {"matthews_correlation": 0.0}
    assert load_metric("qqp").compute(predictions=zeros, references=CLASSES) == {"accuracy": 0.5, "f1": 0.0}
    with pytest.warns(ConstantInputWarning, match="constant"):
        result = load_metric("stsb").compute(predictions=[2.0, 2.0, 2.0], references=[1.0, 2.0, 3.0])
    assert math.isnan(result["pearson"]) and math.isnan(result["spearmanr"])


def test_batches_add_up():
    metric = load_metric("mrpc")
    for start in (0, 5):
        metric.add_batch(predictions=PREDICTED[start : start + 5], references=CLASSES[start : start + 5])
    assert metric.compute() == pytest.approx({"accuracy": 0.75, "f1": 0.75})


def test_unknown_task():
    with pytest.raises(ValueError, match=r"No metrics for task 'sst3'; expected one of cola, .*, multilabel\."):
        load_metric("sst3")
    with pytest.raises(ValueError, match="No metrics for task 'sst3'"):
        compute_metrics_for("sst3")


@pytest.mark.parametrize(
    ("task", "outputs", "labels", "complaint"),
    [
        (
            "sst2",
            (4,),
            (4,),
            r"sst2 metrics need logits \[4, n_classes\] and labels \[4\]; got shapes \(4,\) and \(4,\)",
        ),
        ("sst2", (3, 2), (4,), r"got shapes \(3, 2\) and \(4,\)"),
        ("sst2", (4, 2), (4, 2), r"got shapes \(4, 2\) and \(4, 2\)"),
        ("stsb", (4, 2), (4,), r"stsb metrics need predicted scores \[4\] or \[4, 1\]; got shapes \(4, 2\)"),
        (
            "multilabel",
            (4, 3),
            (4,),
            r"multilabel metrics need logits and labels \[4, n_labels\] with at least 2 labels",
        ),
        ("multilabel", (4, 1), (4, 1), r"with at least 2 labels; got shapes \(4, 1\) and \(4, 1\)"),
    ],
)
def test_wrong_shapes(task, outputs, labels, complaint):
    with pytest.raises(ValueError, match=complaint):
        compute_metrics_for(task)(EvalPrediction(np.zeros(outputs), np.zeros(labels)))


@pytest.mark.parametrize(("task", "missing"), [("sst2", -1), ("stsb", math.nan)])
def test_unlabelled_split_is_refused(task, missing):
    labels = np.array([1, missing, 0])
    outputs = np.array([0.1, 0.2, 0.3]) if task == "stsb" else np.zeros((3, 2))
    compute_metrics = compute_metrics_for(task)
    with pytest.raises(ValueError, match=f"Some {task} references are -1 or NaN.* compute metrics on a labelled split"):
        compute_metrics(EvalPrediction(outputs, labels))
    # The function can be used again after the error.
    assert compute_metrics(EvalPrediction(outputs, np.array([0, 1, 2 * (task == "stsb")])))


def test_two_at_once_share_no_file(cache):
    first, second = load_metric("sst2"), load_metric("sst2")
    first.add_batch(predictions=[1, 1], references=[1, 1])
    second.add_batch(predictions=[1, 1], references=[1, 0])
    assert [file for file in cache.rglob("*") if file.is_file()] == []
    assert (second.compute(), first.compute()) == ({"accuracy": 0.5}, {"accuracy": 1.0})


def test_two_processes_at_once(tmp_path):
    program = (
        "from capsule_heads.metrics import load_metric\n"
        "metric = load_metric('sst2')\n"
        "metric.add_batch(predictions=[1, 1], references=[1, 0])\n"
        "print('added', flush=True)\n"
        "input()\n"
        "print(metric.compute())\n"
    )
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        assert [process.stdout.readline() for process in processes] == ["added\n"] * 2
        assert [process.communicate("\n", timeout=60)[0] for process in processes] == ["{'accuracy': 0.5}\n"] * 2
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("task, shape", [("classification", (2, 2)), ("stsb", (2,)), ("multilabel", (2, 2))])
def test_predictions_that_are_nan_are_refused(task, shape):
    outputs = np.zeros(shape)
    outputs.flat[1] = np.nan
    labels = np.zeros(shape if task == "multilabel" else 2)
    with pytest.raises(ValueError, match=f"Some {task} predictions are NaN; expected numbers"):
        compute_metrics_for(task)(EvalPrediction(outputs, labels))


def test_import_and_use_open_no_connection(tmp_path):
    program = (
        "import socket\n"
        "def refuse(*args, **kwargs):\n"
        "    raise AssertionError('the network was used')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from capsule_heads.metrics import load_metric\n"
        "print(load_metric('rte').compute(predictions=[1], references=[1]))\n"
    )
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout == "{'accuracy': 1.0}\n", result.stderr
