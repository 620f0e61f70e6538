"""What `measure` says of a model, against sums by hand."""

import json

import numpy as np
import pytest
from transformers import EvalPrediction

from capsule_heads import CapsuleHeadConfig
from capsule_heads.metrics import compute_metrics_for, measure
from capsule_heads.metrics.scores import measure_calibration


def logits_of(probabilities):
    return np.log(np.asarray(probabilities, dtype=np.float64))


def test_classes_by_hand():
    config = CapsuleHeadConfig(id2label={0: "bad", 1: "good", 2: "odd"})
    probabilities = [[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.8, 0.1], [0.3, 0.6, 0.1]]
    labels = np.array([0, 1, 1, 0])
    found = measure(config, labels, logits_of(probabilities))
    assert (found["n"], found["accuracy"], found["f1_macro"]) == (4, 0.5, 0.5)  # "odd" is nowhere: no part of the mean
    assert found["negative_log_likelihood"] == pytest.approx(-np.log([0.7, 0.4, 0.8, 0.3]).mean())
    # 0.5 is in (7/15, 8/15] and wrong, 0.6 in (8/15, 9/15] and wrong, 0.7 and 0.8 are right.
    assert found["expected_calibration_error"] == pytest.approx((0.3 + 0.5 + 0.2 + 0.6) / 4)
    assert found["classes"]["bad"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert found["classes"]["odd"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert found["confusion"] == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert json.loads(json.dumps(found)) == found


def test_labels_by_hand():
    thresholds = [0.5, 0.2]
    config = CapsuleHeadConfig(
        id2label={0: "long", 1: "odd"}, problem_type="multi_label_classification", thresholds=thresholds
    )
    probabilities = np.array([[0.9, 0.3], [0.6, 0.1], [0.2, 0.25]])
    labels = np.array([[1, 1], [0, 0], [0, 0]], dtype=np.float32)
    logits = np.log(probabilities / (1 - probabilities))
    found = measure(config, labels, logits)
    assert found["classes"]["long"] == {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1, "threshold": 0.5}
    assert found["classes"]["odd"] == {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1, "threshold": 0.2}
    assert (found["f1_micro"], found["subset_accuracy"]) == pytest.approx((2 / 3, 1 / 3))
    assert found["negative_log_likelihood"] == pytest.approx(-np.log([0.9, 0.3, 0.4, 0.9, 0.8, 0.75]).mean())
    # (4/15, 5/15] has 0.3; (3/15, 4/15] has 0.25; (2/15, 3/15] has 0.2; 0.1, 0.6 and 0.9 are alone too.
    assert found["expected_calibration_error"] == pytest.approx((0.7 + 0.25 + 0.2 + 0.1 + 0.6 + 0.1) / 6)
    trained = compute_metrics_for("multilabel", thresholds)(EvalPrediction(logits, labels))
    assert trained == pytest.approx({name: found[name] for name in trained})
    assert trained != compute_metrics_for("multilabel")(EvalPrediction(logits, labels))


def test_values_by_hand():
    config = CapsuleHeadConfig(num_labels=1)
    labels, values = np.array([1.0, 2.0, 3.0, 6.0]), np.array([[1.0], [3.0], [3.0], [4.0]])
    found = measure(config, labels, values)
    assert found["mean_squared_error"] == pytest.approx(5 / 4)
    assert found["mean_absolute_error"] == pytest.approx(3 / 4)
    assert found["r2"] == pytest.approx(1 - 5 / 14)
    assert found["spearmanr"] == pytest.approx(4.5 / (np.sqrt(5 * 4.5)))
    constant = measure(config, labels, np.ones((4, 1)))
    assert constant["pearson"] is None and constant["mean_absolute_error"] == 2.0
    both = CapsuleHeadConfig(num_labels=2, problem_type="regression")
    two = measure(both, np.stack([labels, labels], 1), values[:, [0, 0]])
    assert two["values"]["LABEL_1"]["r2"] == two["r2"] == found["r2"]


def test_bins_end_where_the_definition_says():
    found = measure_calibration(np.array([0.0, 1 / 15, 0.07, 1.0]), np.array([False, True, True, True]))
    assert [(x["from"], x["n"]) for x in found["reliability"]] == [(0, 2), (1 / 15, 1), (14 / 15, 1)]
    calibrated = measure_calibration(np.full(1000, 0.7), np.arange(1000) < 700)
    assert calibrated["expected_calibration_error"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("labels", "logits", "message"),
    [
        ([0, 3], np.zeros((2, 3)), "labels go from 0 to 3; expected classes 0 to 2"),
        ([0, -1], np.zeros((2, 3)), "labels go from -1 to 0"),
        ([0], np.zeros((2, 3)), r"labels have shape \[1\] and predictions \[2, 3\]"),
        ([], np.zeros((0, 3)), "and a row at least"),
        ([0, 1], np.full((2, 3), np.nan), "not finite"),
    ],
)
def test_what_cannot_be_measured(labels, logits, message):
    with pytest.raises(ValueError, match=message):
        measure(CapsuleHeadConfig(num_labels=3), np.array(labels, dtype=float), logits)
