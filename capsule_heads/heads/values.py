"""Values: the outputs of a classifier, from its head's output and its linear term."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Head, HeadOutput
from .routing import RoutingHead

# A regression's value is read from the poses of this many capsules; with a single capsule there is nothing to route.
N_REGRESSION_CAPSULES = 8


def n_outputs(head: type[Head], n_values: int, is_regression: bool) -> int:
    """Return the number of outputs of a head that gives `n_values` class scores, or values of a regression."""
    return N_REGRESSION_CAPSULES if is_regression and issubclass(head, RoutingHead) else n_values


def make_regressor(head: Head, n_values: int) -> nn.Linear | None:
    """Return the map from poses to a regression's values; None for a head without poses, which outputs the values."""
    if not isinstance(head, RoutingHead):
        return None
    d_cov, d_cap = head.pose_shape
    return nn.Linear(N_REGRESSION_CAPSULES * d_cov * d_cap, n_values)


def read_values(output: HeadOutput, regressor: nn.Linear | None, linear: Tensor | None, is_regression: bool) -> Tensor:
    """Return class scores, or the values of a regression in its own unit, `[batch, n_values]`.

    Args:
        output: the output of the head.
        regressor: the affine map of its poses; None for a head whose outputs are the values.
        linear: `[batch, n_values]`, the output of a linear term; None without one. Class scores are the mean of head
            and term, as if of two models. A regression's values are their sum, as the head learns the residual.
        is_regression: whether to return values of a regression.
    """
    values = output.a_out
    if not is_regression:
        return values if linear is None else (values + linear) / 2
    if regressor is not None and output.mu_out is not None:
        poses = output.mu_out.flatten(1)
        with torch.autocast(poses.device.type, enabled=False):  # values are in float32, as scores are
            values = regressor(poses.to(regressor.weight.dtype)).to(poses.dtype)
    return values if linear is None else values + linear
