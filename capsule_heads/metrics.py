"""GLUE's metrics, and those of SST and multi-label classification, through `evaluate` and without the network."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction

_METRICS = {
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

_SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": lambda references, predictions: f1_score(references, predictions, zero_division=0.0),
    "matthews_correlation": matthews_corrcoef,
    "pearson": lambda references, predictions: pearsonr(references, predictions)[0],
    "spearmanr": lambda references, predictions: spearmanr(references, predictions)[0],
    "f1_micro": lambda references, predictions: f1_score(references, predictions, average="micro", zero_division=0.0),
    "f1_macro": lambda references, predictions: f1_score(references, predictions, average="macro", zero_division=0.0),
    "subset_accuracy": accuracy_score,
}


class GlueMetric(evaluate.Metric):
    """The metrics of one task; `config_name` is the task's name.

    | task | metrics |
    | --- | --- |
    | cola | matthews_correlation |
    | mrpc, qqp | accuracy, f1 (of class 1) |
    | stsb | pearson, spearmanr |
    | sst2, mnli, qnli, rte, wnli, sst5, sst2_root, classification | accuracy |
    | multilabel | f1_micro, f1_macro, subset_accuracy (all labels of an example right) |

    `compute` takes class indices; for stsb numbers; for multilabel one list of zeros and ones per example.

    Where a metric is undefined: matthews_correlation is 0.0 if all predictions (or all references) are the same, an F1
    without any positive prediction or reference is 0.0 (scikit-learn's conventions), and pearson and spearmanr are NaN
    if all predictions (or all references) are the same. SciPy then warns (`ConstantInputWarning`), and the NaN stays
    one, as in GLUE's own code: Trainer never takes a NaN for the best checkpoint, while a 0.0 would pass for a result.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in _METRICS:
            raise ValueError(f"No metrics for task {self.config_name!r}; expected one of {', '.join(_METRICS)}.")
        value = datasets.Value("float64" if self.config_name == "stsb" else "int64")
        feature = datasets.Sequence(value) if self.config_name == "multilabel" else value
        return evaluate.MetricInfo(
            description=f"{', '.join(_METRICS[self.config_name])} ({self.config_name})",
            citation="",
            inputs_description="predictions and references, one of each per example",
            features=datasets.Features({"predictions": feature, "references": feature}),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        labels, guesses = np.asarray(references), np.asarray(predictions)
        # An unlabelled test split would otherwise get a score.
        if np.isnan(labels).any() or (self.config_name != "stsb" and (labels < 0).any()):
            raise ValueError(
                f"Some {self.config_name} references are -1 or NaN, which marks unlabelled examples; "
                f"compute metrics on a labelled split."
            )
        return {name: float(_SCORES[name](labels, guesses)) for name in _METRICS[self.config_name]}


def metric_names(task: str) -> tuple[str, ...]:
    """The names of a task's metrics; tasks as for `load_metric`."""
    return _METRICS[task]


def load_metric(task: str) -> evaluate.Metric:
    """Returns the metrics of a task as an `evaluate.Metric`, without asking the Hub.

    Predictions and references stay in memory, so that any number of processes can compute at once.

    Args:
        task: One of GLUE's nine tasks (`cola`, `sst2`, `mrpc`, `qqp`, `stsb`, `mnli`, `qnli`, `rte`, `wnli`), `sst5`,
            `sst2_root`, `classification` or `multilabel`; see `GlueMetric` for what each reports.

    Raises:
        ValueError: If the task is unknown.
    """
    return GlueMetric(config_name=task, keep_in_memory=True, experiment_id=uuid.uuid4().hex)


def compute_metrics_for(task: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """Returns a `compute_metrics` function for `transformers.Trainer`.

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
