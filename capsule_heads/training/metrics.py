"""The metrics of a classifier if a user gives none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..metrics import compute_metrics_for

if TYPE_CHECKING:
    from transformers import EvalPrediction

    from ..models.configuration_capsule_head import CapsuleHeadConfig


UNEVEN = 5  # times as many examples of one class as of another


def are_uneven(labels: Iterable[int]) -> bool:
    """Return whether one class has `UNEVEN` times the examples of another, so that accuracy hides the rare one."""
    counts = Counter(labels).values()
    return max(counts, default=0) >= UNEVEN * min(counts, default=1)


def default_metric(config: CapsuleHeadConfig) -> str | None:
    """Return the name of the metrics, as in `load_metric`, of a model's problem type; None if it has no metrics."""
    metric = {"regression": "stsb", "multi_label_classification": "multilabel"}.get(
        config.problem_type or "", "classification"
    )
    return metric if metric == "classification" or (config.num_labels == 1) == (metric == "stsb") else None


def default_metrics(config: CapsuleHeadConfig, prediction: EvalPrediction) -> dict[str, float]:
    """Return the metrics of a model's problem type: for classes, for several labels, or correlations of one number.

    A regression of several numbers has no metrics besides its loss.

    Args:
        config: the model's configuration.
        prediction: as a Trainer passes it.
    """
    metric = default_metric(config)
    return {} if metric is None else compute_metrics_for(metric, config.thresholds)(prediction)
