"""Losses of the three problem types, on targets that mixup may have mixed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import is_readable
from .configuration_capsule_head import BALANCED, CapsuleHeadConfig


def infer_problem_type(config: CapsuleHeadConfig, labels: Tensor) -> str:
    """Return the configuration's problem type or, where it has none, that of the labels' dtype, as in transformers."""
    if config.problem_type is not None:
        return config.problem_type
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def balanced_weights(labels: Sequence[int], num_labels: int) -> list[float]:
    """Return a weight for each class in inverse proportion to its number of labels, 1 on average over the labels.

    A class without labels has weight 0.

    Args:
        labels: class indices.
        num_labels: number of classes.
    """
    counts = torch.bincount(torch.as_tensor(labels), minlength=num_labels)
    n_present = int(counts.count_nonzero())
    return [len(labels) / (n_present * n) if n else 0.0 for n in counts.tolist()]


def check_labels(problem_type: str, num_labels: int, labels: Tensor) -> None:
    """Check labels against the problem type; their values only where they are on the host.

    Raises:
        ValueError: If their dtype, shape or values are not what the problem type expects.
    """
    n = num_labels
    if problem_type == "single_label_classification":
        if labels.is_floating_point() or labels.is_complex() or labels.ndim != 1:
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}; single-label classification expects whole "
                '[batch] class indices. For others set problem_type to "multi_label_classification" or "regression".'
            )
    elif labels.shape[1:] != (n,) and not (problem_type == "regression" and n == 1 and labels.ndim == 1):
        raise ValueError(f"labels have shape {tuple(labels.shape)}; {problem_type} expects [batch, {n}].")
    if labels.shape[0] == 0:
        raise ValueError("labels are of no sample, and a mean loss needs at least one.")
    if not is_readable(labels):
        return
    low, high = labels.min().item(), labels.max().item()  # NaN if one is
    if problem_type == "single_label_classification" and not 0 <= low <= high < n:
        raise ValueError(f"labels go from {low} to {high}; num_labels={n} expects class indices 0 to {n - 1}.")
    if problem_type == "multi_label_classification" and not 0 <= low <= high <= 1:
        raise ValueError(f"labels go from {low} to {high}; {problem_type} expects 0 or 1 for each label.")
    if problem_type == "regression" and not math.isfinite(low + high):
        raise ValueError(f"labels go from {low} to {high}; {problem_type} expects finite numbers.")


def problem_targets(config: CapsuleHeadConfig, problem_type: str, labels: Tensor) -> Tensor:
    """Return `[batch, num_labels]`, float32: one-hot classes, 0 or 1 per label, or values in the head's units.

    A class that does not exist raises an error on any device: on a GPU, the device's own.
    """
    if problem_type == "single_label_classification":
        one_hot = torch.zeros(labels.shape[0], config.num_labels or 2, device=labels.device)
        return one_hot.scatter_(1, labels.long()[:, None], 1.0)
    targets = labels.float().view(len(labels), -1)
    return (targets - config.label_mean) / config.label_std if problem_type == "regression" else targets


def problem_loss(
    config: CapsuleHeadConfig, problem_type: str, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Return the mean loss over a batch: cross-entropy, binary cross-entropy or mean squared error.

    Class weights weight each target in the cross-entropy, and divide its mean, as in `torch.nn.CrossEntropyLoss`; in
    the binary cross-entropy they weight each label. A batch whose targets all have weight 0 has a loss of 0. The
    squared error is in units of `config.label_std`.

    Args:
        config: the model's configuration.
        problem_type: one of `PROBLEM_TYPES`, which chooses the loss.
        logits: `[batch, num_labels]`.
        targets: `[batch, num_labels]`, from `problem_targets`, mixed or not.
        label_smoothing: fraction of each target that goes to all classes alike; of a label's, to 0 and 1 alike.

    Returns:
        A scalar.

    Raises:
        ValueError: If class weights are still to be balanced, or labels of a regression to be smoothed.
    """
    if problem_type == "regression":
        if label_smoothing:
            raise ValueError(
                f"label_smoothing_factor is {label_smoothing}, and a regression has no classes to smooth; leave it out."
            )
        return F.mse_loss((logits - config.label_mean) / config.label_std, targets)
    weights = None
    if config.class_weights == BALANCED:
        raise ValueError(
            f'class_weights is "{BALANCED}", of which CapsuleTrainer makes numbers when training starts; expected '
            "numbers for a loss outside of it, such as those of sklearn's compute_class_weight."
        )
    if config.class_weights is not None:  # a copy that waited for the device would stop the step
        weights = torch.tensor(config.class_weights).to(logits.device, non_blocking=True)
    if problem_type == "multi_label_classification":
        targets = targets * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, targets, weight=weights)
    if weights is not None:
        targets = targets * weights
    total = targets.sum()
    if label_smoothing:
        alike = torch.ones_like(logits) if weights is None else weights
        targets = targets * (1 - label_smoothing) + alike * (label_smoothing / logits.shape[-1])
    loss = -(targets * logits.log_softmax(-1)).sum()
    return loss * (total > 0) / total.clamp_min(torch.finfo(total.dtype).tiny)
