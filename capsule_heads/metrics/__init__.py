"""GLUE's metrics, and those of SST and multi-label classification, through `evaluate` and without the network.

Their names are here. What computes them is imported when metrics are first loaded: scikit-learn, SciPy and `evaluate`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import evaluate
    from transformers import EvalPrediction

    from ..models.configuration_capsule_head import CapsuleHeadConfig

METRICS = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
    "sst5": ("accuracy",),
    "sst2_root": ("accuracy",),
    "classification": ("accuracy", "f1_macro"),
    "multilabel": ("f1_micro", "f1_macro", "subset_accuracy"),
}


def metric_names(task: str) -> tuple[str, ...]:
    """Return the names of a task's metrics; tasks are those of `load_metric`.

    Raises:
        ValueError: If the task is unknown.
    """
    if task not in METRICS:
        raise ValueError(f"No metrics for task {task!r}; expected one of {', '.join(METRICS)}.")
    return METRICS[task]


def load_metric(task: str) -> evaluate.Metric:
    """Return the metrics of a task as an `evaluate.Metric`, without asking the Hub.

    Predictions and references stay in memory, so that any number of processes can compute at once.

    Args:
        task: One of GLUE's nine tasks (`cola`, `sst2`, `mrpc`, `qqp`, `stsb`, `mnli`, `qnli`, `rte`, `wnli`), `sst5`,
            `sst2_root`, `classification` or `multilabel`; see `glue.GlueMetric` for what each reports.

    Raises:
        ValueError: If the task is unknown.
    """
    metric_names(task)
    from .glue import GlueMetric

    return GlueMetric(config_name=task, keep_in_memory=True, experiment_id=uuid.uuid4().hex)


def measure(config: CapsuleHeadConfig, labels: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """Measure a classifier or a regression by all that belongs to its problem type.

    It is what `capsule-heads evaluate` writes; JSON can hold it.

    Args:
        config: the model's configuration.
        labels: class indices `[n]`; zeros and ones `[n, n_labels]`; or numbers `[n]` or `[n, n_values]`.
        logits: `[n, num_labels]`, what the model returns in evaluation mode; of a regression its values.

    Returns:
        See `scores.measure_classes`, `scores.measure_labels` and `scores.measure_values`.

    Raises:
        ValueError: If labels do not fit the logits, or numbers are not finite.
    """
    from scipy.special import expit, softmax

    from .scores import measure_classes, measure_labels, measure_values

    labels, names = np.asarray(labels), config.class_names
    logits = np.asarray(logits, dtype=np.float64)
    if config.problem_type == "regression":
        return measure_values(labels.astype(np.float64), logits, names)
    if config.problem_type == "multi_label_classification":
        return measure_labels(labels, expit(logits), names, config.label_thresholds)
    return measure_classes(labels, softmax(logits, axis=-1), names)


def compute_metrics_for(
    task: str, thresholds: Sequence[float] | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a `compute_metrics` function for `transformers.Trainer`.

    The function takes logits `[n, n_classes]` and class indices `[n]`; for `stsb` predicted scores `[n]` or `[n, 1]`
    and scores `[n]`; for `multilabel` logits `[n, n_labels]`, of which those above a threshold count as predicted, and
    zeros and ones `[n, n_labels]` (at least two labels). If the model's predictions are a tuple, its first element
    counts.

    Args:
        task: As for `load_metric`.
        thresholds: For `multilabel`, the probability above which each label is predicted. None for 0.5.

    Raises:
        ValueError: If the task is unknown; from the function, if a shape is wrong, predictions are NaN or examples are
            unlabelled.
    """
    metric = load_metric(task)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        outputs = prediction.predictions
        outputs = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
        labels = np.asarray(prediction.label_ids)
        return metric.compute(predictions=_to_predictions(outputs, labels, task, thresholds), references=labels)

    return compute_metrics


def _to_predictions(
    outputs: np.ndarray, labels: np.ndarray, task: str, thresholds: Sequence[float] | None
) -> np.ndarray:
    from scipy.special import logit

    n = len(labels)
    if np.isnan(outputs).any():  # argmax would take it for the largest
        raise ValueError(f"Some {task} predictions are NaN; expected numbers: look at the model's weights and inputs.")
    if task == "stsb":
        expected, fits = f"predicted scores [{n}] or [{n}, 1]", outputs.shape in ((n,), (n, 1))
        predictions = outputs.reshape(-1)
    elif task == "multilabel":
        # scikit-learn would take a single column for the two classes of a binary task.
        expected = f"logits and labels [{n}, n_labels] with at least 2 labels"
        fits = labels.ndim == 2 and labels.shape[1] >= 2 and outputs.shape == labels.shape
        predictions = outputs > (0.0 if thresholds is None else logit(thresholds)) if fits else outputs
    else:
        expected = f"logits [{n}, n_classes] and labels [{n}]"
        fits = labels.ndim == 1 and outputs.ndim == 2 and len(outputs) == n
        predictions = outputs.argmax(-1) if fits else outputs
    if not fits:
        raise ValueError(f"{task} metrics need {expected}; got shapes {outputs.shape} and {labels.shape}.")
    return predictions
