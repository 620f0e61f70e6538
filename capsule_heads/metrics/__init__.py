"""GLUE's metrics, and those of SST and multi-label classification, through `evaluate` and without the network.

Their names are here. What computes them is imported when metrics are first loaded: scikit-learn, SciPy and `evaluate`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import evaluate
    from transformers import EvalPrediction

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
    "classification": ("accuracy",),
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


def compute_metrics_for(task: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a `compute_metrics` function for `transformers.Trainer`.

    The function takes logits `[n, n_classes]` and class indices `[n]`; for `stsb` predicted scores `[n]` or `[n, 1]`
    and scores `[n]`; for `multilabel` logits `[n, n_labels]`, of which those above 0 (probability 0.5) count as
    predicted, and zeros and ones `[n, n_labels]` (at least two labels). If the model's predictions are a tuple, its
    first element counts.

    Args:
        task: As for `load_metric`.

    Raises:
        ValueError: If the task is unknown; from the function, if a shape is wrong, predictions are NaN or examples are
            unlabelled.
    """
    metric = load_metric(task)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        outputs = prediction.predictions
        outputs = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
        labels = np.asarray(prediction.label_ids)
        return metric.compute(predictions=_to_predictions(outputs, labels, task), references=labels)

    return compute_metrics


def _to_predictions(outputs: np.ndarray, labels: np.ndarray, task: str) -> np.ndarray:
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
        predictions = outputs > 0
    else:
        expected = f"logits [{n}, n_classes] and labels [{n}]"
        fits = labels.ndim == 1 and outputs.ndim == 2 and len(outputs) == n
        predictions = outputs.argmax(-1) if fits else outputs
    if not fits:
        raise ValueError(f"{task} metrics need {expected}; got shapes {outputs.shape} and {labels.shape}.")
    return predictions
