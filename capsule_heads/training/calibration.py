"""Calibration: a temperature and label thresholds that make a trained classifier's probabilities trustworthy.

A temperature divides the logits. It changes no predicted class, only how sure the model says it is (Guo et al., 2017,
arXiv 1706.04599). docs/benchmarks/calibration.md shows what calibration gains.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics import measure
from ..models.modeling_capsule_head import CapsuleHeadClassifier

if TYPE_CHECKING:
    from datasets import Dataset

    from .trainer import CapsuleTrainer

logger = logging.getLogger(__name__)

LEAST_ROWS = 50  # validation rows that a temperature needs
LEAST_EXAMPLES = 20  # rows with a label, and rows without it, that its own threshold needs
MOST_TEMPERATURE = 20.0
OF_PROBABILITIES = ("negative_log_likelihood", "expected_calibration_error")


def calibrate(trainer: CapsuleTrainer, split: Dataset) -> dict[str, Any] | None:
    """Fit the temperature and the label thresholds of a trained classifier, and set them in its configuration.

    The log says in one line what was found, or why nothing is set. Call this after training, before the model is saved.

    Args:
        trainer: the model's trainer, after training.
        split: prepared validation data, which the model was not trained on.

    Returns:
        A dictionary with `rows`, `temperature`, and `thresholds` for a multi-label model. Its `before` and `after` each
        have `negative_log_likelihood` and `expected_calibration_error` of these rows, and `f1_macro` for a multi-label
        model. None if there are too few rows, or no probabilities to calibrate, as in a regression.
    """
    model = trainer.capsule_model
    config = model.config
    if not isinstance(model, CapsuleHeadClassifier) or config.problem_type == "regression":
        return None
    config.calibration_temperature, config.thresholds = 1.0, None
    if len(split) < LEAST_ROWS:
        if trainer.is_world_process_zero():
            logger.warning(
                "Probabilities are not calibrated: there are %d validation rows, and calibration needs %d.",
                len(split),
                LEAST_ROWS,
            )
        return None
    prediction = trainer.predict(split, metric_key_prefix="calibration")
    logits, labels = prediction.predictions, np.asarray(prediction.label_ids)
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits, dtype=np.float64)
    is_multi_label = config.problem_type == "multi_label_classification"
    names = (*OF_PROBABILITIES, "f1_macro") if is_multi_label else OF_PROBABILITIES
    before = measure(config, labels, logits)
    config.calibration_temperature = choose_temperature(logits, labels)
    scaled = logits / config.calibration_temperature
    if is_multi_label:
        config.thresholds = fit_thresholds(scaled, labels)
    after = measure(config, labels, scaled)
    found: dict[str, Any] = {"rows": len(labels), "temperature": config.calibration_temperature}
    found |= {"thresholds": config.thresholds} if is_multi_label else {}
    found |= {"before": {x: before[x] for x in names}, "after": {x: after[x] for x in names}}
    if trainer.is_world_process_zero():
        logger.warning("%s", _describe(found))
    return found


def choose_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the fitted temperature, or 1 if its gain in likelihood may be chance.

    The gain may be chance if its mean over the rows is no greater than its standard error.

    Args:
        logits: as in `fit_temperature`.
        labels: as in `fit_temperature`.
    """
    temperature = fit_temperature(logits, labels)
    targets = labels if labels.ndim == 2 else np.eye(logits.shape[1])[labels]
    before, after = (_losses(x, targets, labels.ndim == 2) for x in (logits, logits / temperature))
    gains = before - after
    return temperature if gains.mean() > gains.std() / np.sqrt(len(gains)) else 1.0


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature of least negative log-likelihood, from 1/20 to 20.

    Labels are smoothed by one in `n + 2`, as in Platt (1999). Otherwise a model that is right on all rows would get the
    lowest possible temperature, and be as sure as possible.

    Args:
        logits: `[n, n_classes]`, without a temperature.
        labels: `[n]`, class indices; or `[n, n_classes]`, zeros and ones.
    """
    from scipy.optimize import minimize_scalar

    n, n_classes = logits.shape
    smoothing = 1 / (n + 2)
    if labels.ndim == 2:
        targets = labels * (1 - 2 * smoothing) + smoothing
    else:
        others = smoothing / max(n_classes - 1, 1)
        targets = np.where(labels[:, None] == np.arange(n_classes), 1 - smoothing, others)

    def loss(log_temperature: float) -> float:
        return float(_losses(logits / np.exp(log_temperature), targets, labels.ndim == 2).mean())

    # In 1/T the likelihood is concave, so there is one minimum.
    bound = float(np.log(MOST_TEMPERATURE))
    return float(np.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded").x))


def _losses(logits: np.ndarray, targets: np.ndarray, is_multi_label: bool) -> np.ndarray:
    """Return the negative log-likelihood of each row; for a multi-label model, the mean over its labels.

    Args:
        logits: `[n, n_classes]`.
        targets: `[n, n_classes]`, the probability of each class.
        is_multi_label: whether each class has its own probability.
    """
    from scipy.special import log_softmax

    if is_multi_label:
        return (np.logaddexp(0.0, logits) - targets * logits).mean(-1)
    return -(targets * log_softmax(logits, axis=-1)).sum(-1)


def fit_thresholds(logits: np.ndarray, labels: np.ndarray) -> list[float] | None:
    """Return for each label the probability threshold with the highest F1; None if all thresholds are 0.5.

    A label keeps 0.5 if fewer than `LEAST_EXAMPLES` rows have it, or if fewer do not have it.

    Args:
        logits: `[n, n_labels]`, with the temperature.
        labels: `[n, n_labels]`, zeros and ones.
    """
    from scipy.special import expit

    probabilities = expit(logits)
    found = [_best_threshold(probabilities[:, k], labels[:, k] == 1) for k in range(labels.shape[1])]
    return None if all(x == 0.5 for x in found) else found


def _best_threshold(probabilities: np.ndarray, is_there: np.ndarray) -> float:
    n = int(is_there.sum())
    if min(n, len(is_there) - n) < LEAST_EXAMPLES:
        return 0.5
    order = np.argsort(-probabilities, kind="stable")
    sorted_p, hits = probabilities[order], np.cumsum(is_there[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + n)  # if the first 1, 2, ... rows are predicted
    ends = np.append(sorted_p[:-1] > sorted_p[1:], True)  # between equal probabilities there is no threshold
    f1_now = 2 * (is_there & (probabilities > 0.5)).sum() / ((probabilities > 0.5).sum() + n)
    best = int(np.where(ends, f1, -1.0).argmax())
    if f1[best] <= f1_now:
        return 0.5
    below = sorted_p[best + 1] if best + 1 < len(order) else 0.0
    return float((sorted_p[best] + below) / 2)


def _describe(found: dict[str, Any]) -> str:
    """Return one line about what was fitted, and what it changed."""
    before, after, name = found["before"], found["after"], "expected_calibration_error"
    if found["temperature"] == 1:
        line = f"Probabilities stay as they are: no temperature is surely better on {found['rows']} validation rows"
    else:
        line = (
            f"Probabilities are calibrated on {found['rows']} validation rows, with a temperature of "
            f"{found['temperature']:.3g}: expected calibration error {before[name]:.3f} before, {after[name]:.3f} after"
        )
    thresholds = found.get("thresholds") or ()
    n_own = sum(x != 0.5 for x in thresholds)
    return f"{line}; {n_own} of {len(thresholds)} labels have thresholds of their own." if n_own else f"{line}."
