"""Losses of the three problem types, on targets that mixup may have mixed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import is_readable
from .configuration_capsule_head import CapsuleHeadConfig


def infer_problem_type(config: CapsuleHeadConfig, labels: Tensor) -> str:
    """Return the configuration's problem type or, where it has none, that of the labels' dtype, as in transformers."""
    if config.problem_type is not None:
        return config.problem_type
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


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


def problem_loss(config: CapsuleHeadConfig, problem_type: str, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss over a batch: cross-entropy, binary cross-entropy or mean squared error.

    Class weights weight each target in the cross-entropy, and divide its mean, as in `torch.nn.CrossEntropyLoss`; in
    the binary cross-entropy they weight each label. The squared error is in units of `config.label_std`.

    Args:
        config: the model's configuration.
        problem_type: one of `PROBLEM_TYPES`, which chooses the loss.
        logits: `[batch, num_labels]`.
        targets: `[batch, num_labels]`, from `problem_targets`, mixed or not.

    Returns:
        A scalar.
    """
    if problem_type == "regression":
        return F.mse_loss((logits - config.label_mean) / config.label_std, targets)
    weights = None
    if config.class_weights is not None:  # a copy that waited for the device would stop the step
        weights = torch.tensor(config.class_weights).to(logits.device, non_blocking=True)
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, targets, weight=weights)
    if weights is not None:
        targets = targets * weights
    return -(targets * logits.log_softmax(-1)).sum() / targets.sum()
