"""The metrics that a classifier is evaluated by where none are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..metrics import compute_metrics_for

if TYPE_CHECKING:
    from transformers import EvalPrediction

    from ..models.configuration_capsule_head import CapsuleHeadConfig


def default_metrics(config: CapsuleHeadConfig, prediction: EvalPrediction) -> dict[str, float]:
    """Return the metrics of a model's problem type: of classes, of several labels, or the correlations of one number.

    A regression of several numbers has its loss alone.

    Args:
        config: the model's configuration.
        prediction: as a Trainer passes it.
    """
    metric = {"regression": "stsb", "multi_label_classification": "multilabel"}.get(
        config.problem_type or "", "classification"
    )
    if metric != "classification" and (config.num_labels == 1) != (metric == "stsb"):
        return {}
    return compute_metrics_for(metric)(prediction)
