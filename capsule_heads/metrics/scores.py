"""The scores of predictions, by name, and all that says how good a model's probabilities or values are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    matthews_corrcoef,
    mean_absolute_error,
    mean_squared_error,
    precision_recall_fscore_support,
    r2_score,
)

N_BINS = 15  # of the expected calibration error

# Each takes references and predictions.
SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": lambda references, predictions: f1_score(references, predictions, zero_division=0.0),
    "matthews_correlation": matthews_corrcoef,
    "pearson": lambda references, predictions: pearsonr(references, predictions)[0],
    "spearmanr": lambda references, predictions: spearmanr(references, predictions)[0],
    "f1_micro": lambda references, predictions: f1_score(references, predictions, average="micro", zero_division=0.0),
    "f1_macro": lambda references, predictions: f1_score(references, predictions, average="macro", zero_division=0.0),
    "subset_accuracy": accuracy_score,
    "mean_squared_error": mean_squared_error,
    "mean_absolute_error": mean_absolute_error,
    "r2": r2_score,
}
OF_CLASSES = ("accuracy", "f1_macro")
OF_LABELS = ("f1_micro", "f1_macro", "subset_accuracy")
OF_VALUES = ("mean_squared_error", "mean_absolute_error", "r2", "pearson", "spearmanr")


def measure_classes(labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Measure the predictions of a model that gives each input one class.

    Args:
        labels: `[n]`, class indices.
        probabilities: `[n, n_classes]`, of each class; those of an input add up to 1. The predicted class is the most
            probable one.
        names: of the classes.

    Returns:
        `n`, `accuracy`, `f1_macro` over the classes that labels or predictions have, `negative_log_likelihood` in nats,
        `expected_calibration_error` and the `reliability` that it is of (see `measure_calibration`: of the predicted
        class's probability, and whether it was right), `classes` with precision, recall, F1 and support (number of
        labels) of each, and `confusion`, `[n_classes][n_classes]` counts, labels in rows and predictions in columns.

    Raises:
        ValueError: If shapes do not fit each other, labels are no classes, or probabilities are not finite.
    """
    n, n_classes = len(labels), len(names)
    _check(labels, probabilities, (n,), (n, n_classes))
    if not ((labels >= 0) & (labels < n_classes)).all():
        raise ValueError(f"labels go from {labels.min():g} to {labels.max():g}; expected classes 0 to {n_classes - 1}.")
    labels, predicted = labels.astype(int), probabilities.argmax(-1)
    likelihood = probabilities[np.arange(n), labels].astype(np.float64)
    return {
        "n": n,
        **{name: float(SCORES[name](labels, predicted)) for name in OF_CLASSES},
        "negative_log_likelihood": float(-np.log(likelihood.clip(1e-12)).mean()),
        **measure_calibration(probabilities.max(-1), predicted == labels),
        "classes": _by_class(labels, predicted, names),
        "confusion": confusion_matrix(labels, predicted, labels=range(n_classes)).tolist(),
    }


def measure_labels(
    labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str], thresholds: Sequence[float]
) -> dict[str, Any]:
    """Measure the predictions of a model that gives each input any number of labels.

    Args:
        labels: `[n, n_labels]`, 0 or 1.
        probabilities: `[n, n_labels]`, of each label.
        names: of the labels.
        thresholds: for each label, the probability above which it is predicted.

    Returns:
        `n`, `f1_micro`, `f1_macro`, `subset_accuracy` (all labels of an input right), `negative_log_likelihood` in nats
        a label, `expected_calibration_error` and its `reliability` (of each probability of each label, and whether the
        label is there), and `classes` with precision, recall, F1, support and threshold of each label.

    Raises:
        ValueError: If shapes do not fit each other, labels are not 0 or 1, or probabilities are not finite.
    """
    shape = (len(labels), len(names))
    _check(labels, probabilities, shape, shape)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels go from {labels.min():g} to {labels.max():g}; expected 0 or 1 for each label.")
    labels, predicted = labels.astype(int), (probabilities > np.asarray(thresholds)).astype(int)
    likelihood = np.where(labels == 1, probabilities, 1 - probabilities).astype(np.float64)
    by_label = _by_class(labels, predicted, names)
    return {
        "n": len(labels),
        **{name: float(SCORES[name](labels, predicted)) for name in OF_LABELS},
        "negative_log_likelihood": float(-np.log(likelihood.clip(1e-12)).mean()),
        **measure_calibration(probabilities.ravel(), labels.ravel() == 1),
        "classes": {name: {**by_label[name], "threshold": float(at)} for name, at in zip(names, thresholds)},
    }


def measure_values(labels: np.ndarray, values: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Measure the predictions of a regression.

    Args:
        labels: `[n]`, or `[n, n_values]`.
        values: `[n, n_values]`, what the model says.
        names: of the values.

    Returns:
        `n`, and `mean_squared_error`, `mean_absolute_error`, `r2`, `pearson` and `spearmanr`: of several values their
        means, and `values` with those of each. A correlation is None where all labels or all values are the same.

    Raises:
        ValueError: If shapes do not fit each other, or numbers are not finite.
    """
    shape = (len(values), len(names))
    labels = labels.reshape(shape) if labels.size == len(values) * len(names) else labels
    _check(labels, values, shape, shape)
    of_each = {
        name: {score: _finite(score, labels[:, k], values[:, k]) for score in OF_VALUES} for k, name in enumerate(names)
    }
    found: dict[str, Any] = {"n": len(labels)}
    for score in OF_VALUES:
        known = [x[score] for x in of_each.values()]
        found[score] = None if None in known else float(np.mean([x for x in known if x is not None]))
    return found if len(names) == 1 else {**found, "values": of_each}


def measure_calibration(confidence: np.ndarray, is_right: np.ndarray) -> dict[str, Any]:
    """Measure how far probabilities are from frequencies (Guo et al., 2017, arXiv 1706.04599).

    Probabilities fall into `N_BINS` bins of equal width, (0, 1/15], (1/15, 2/15] and so on; 0 is in the first. The
    expected calibration error is the mean over all of them of the distance of a bin's mean probability from its
    fraction of events.

    Args:
        confidence: `[n]`, probabilities of events.
        is_right: `[n]`, whether the event was there.

    Returns:
        `expected_calibration_error`; and `reliability`: of each bin that is not empty its bounds `from` and `to`, its
        number `n`, mean `confidence`, and `accuracy`, the fraction of events.
    """
    bins = np.clip(np.ceil(confidence.astype(np.float64) * N_BINS) - 1, 0, N_BINS - 1).astype(int)
    reliability = []
    for k in np.unique(bins):
        inside = bins == k
        reliability.append(
            {
                "from": float(k / N_BINS),
                "to": float((k + 1) / N_BINS),
                "n": int(inside.sum()),
                "confidence": float(confidence[inside].mean(dtype=np.float64)),
                "accuracy": float(is_right[inside].mean()),
            }
        )
    error = sum(x["n"] * abs(x["confidence"] - x["accuracy"]) for x in reliability) / len(confidence)
    return {"expected_calibration_error": error, "reliability": reliability}


def _by_class(labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    found = precision_recall_fscore_support(labels, predicted, labels=range(len(names)), zero_division=0.0)
    keys = ("precision", "recall", "f1", "support")
    return {
        name: {key: int(x) if key == "support" else float(x) for key, x in zip(keys, of_class)}
        for name, *of_class in zip(names, *found)
    }


def _finite(score: str, labels: np.ndarray, values: np.ndarray) -> float | None:
    """Return a score; None where it is undefined, which JSON has no number for."""
    if score == "r2" and len(labels) < 2:
        return None
    if score in ("pearson", "spearmanr") and (len(labels) < 2 or not np.ptp(labels) or not np.ptp(values)):
        return None
    return float(SCORES[score](labels, values))


def _check(labels: np.ndarray, outputs: np.ndarray, of_labels: tuple[int, ...], of_outputs: tuple[int, ...]) -> None:
    """Check shapes and numbers.

    Raises:
        ValueError: If they do not fit, there are none, or one is not finite.
    """
    if labels.shape != of_labels or outputs.shape != of_outputs or not len(labels):
        raise ValueError(
            f"labels have shape {list(labels.shape)} and predictions {list(outputs.shape)}; expected {list(of_labels)} "
            f"and {list(of_outputs)}, and a row at least."
        )
    if not (np.isfinite(labels).all() and np.isfinite(outputs).all()):
        raise ValueError("Some labels or predictions are not finite; expected numbers: look at weights and labels.")
