"""The metrics as an `evaluate.Metric`, computed by scikit-learn and SciPy."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

from . import metric_names
from .scores import SCORES


class GlueMetric(evaluate.Metric):
    """The metrics of one task; `config_name` is the task's name.

    | task | metrics |
    | --- | --- |
    | cola | matthews_correlation |
    | mrpc, qqp | accuracy, f1 (of class 1) |
    | stsb | pearson, spearmanr |
    | sst2, mnli, qnli, rte, wnli, sst5, sst2_root | accuracy |
    | classification | accuracy, f1_macro (the mean over classes) |
    | multilabel | f1_micro, f1_macro, subset_accuracy (all labels of an example right) |

    `compute` takes class indices; for stsb numbers; for multilabel one list of zeros and ones per example.

    Where a metric is undefined: matthews_correlation is 0.0 if all predictions (or all references) are the same, an F1
    without any positive prediction or reference is 0.0 (scikit-learn's conventions), and pearson and spearmanr are NaN
    if all predictions (or all references) are the same. SciPy then warns (`ConstantInputWarning`), and the NaN stays
    one, as in GLUE's own code: Trainer never takes a NaN for the best checkpoint, while a 0.0 would pass for a result.
    """

    def _info(self) -> evaluate.MetricInfo:
        names = metric_names(self.config_name)
        value = datasets.Value("float64" if self.config_name == "stsb" else "int64")
        feature = datasets.Sequence(value) if self.config_name == "multilabel" else value
        return evaluate.MetricInfo(
            description=f"{', '.join(names)} ({self.config_name})",
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
        return {name: float(SCORES[name](labels, guesses)) for name in metric_names(self.config_name)}
