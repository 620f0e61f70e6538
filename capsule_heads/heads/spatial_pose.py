"""The paper's vision head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import Mix, mixed, option, register
from .routing import RoutingHead, RoutingOptions


@dataclass(frozen=True)
class SpatialPoseOptions(RoutingOptions):
    """The options of `SpatialPoseHead`."""

    d_cov: int = option(4, "Rows of a capsule's pose.")
    d_cap: int = option(4, "Columns of a capsule's pose.")


class PositionConv(nn.Conv1d):
    """A 1x1 convolution on `[batch, channels, positions]`, initialised as in the paper: Kaiming normal, bias zero."""

    bias: nn.Parameter

    def __init__(self, d_inp: int, d_out: int) -> None:
        super().__init__(d_inp, d_out, kernel_size=1)

    def reset_parameters(self) -> None:
        """Initialise weight and bias again."""
        nn.init.kaiming_normal_(self.weight)
        nn.init.zeros_(self.bias)


@register("spatial_pose")
class SpatialPoseHead(RoutingHead):
    """The paper's vision head: capsules at every position of a feature map, routed to parts, routed to classes.

    Batch normalisation and a 1x1 convolution give `n_parts` scores at each position. Another such pair gives `n_parts`
    poses of `d_cov x d_cap`. All these capsules are routed to `n_parts` part capsules, and the parts to `n_out` output
    capsules of the same shape, whose scores are the logits (Heinsen, 2019, section 4.1). A 1x1 convolution treats
    positions as an affine map treats tokens. So the head takes feature maps flattened to `[batch, positions,
    channels]`, or the tokens of any backbone. The logarithm of the mask is added to the scores, so a masked position
    has a score of -inf.

    The inputs of the first routing are ordered `part * positions + position`.

    Args:
        hidden_sizes: size of the one hidden state, as a sequence.
        n_out: number of output capsules; None to stop at the parts, which are then the output.
        **options: fields of `SpatialPoseOptions`.
    """

    title = "A routing-capsule head for poses"
    Options = SpatialPoseOptions
    takes_one_layer = True
    options: SpatialPoseOptions

    def __init__(self, *, hidden_sizes: Sequence[int], n_out: int | None, **options: Any) -> None:
        super().__init__(hidden_sizes=hidden_sizes, n_out=n_out, **options)
        (size,) = self.hidden_sizes
        n_parts, d_cov, d_cap = self.options.n_parts, self.options.d_cov, self.options.d_cap
        self.compute_a = nn.Sequential(nn.BatchNorm1d(size), PositionConv(size, n_parts))
        self.compute_mu = nn.Sequential(nn.BatchNorm1d(size), PositionConv(size, n_parts * d_cov * d_cap))
        self.routings = self.make_routings(d_cov, d_cap, d_cap)

    def detect(
        self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor], mix: Mix | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the inputs of the first routing; see `RoutingHead.detect`."""
        x = mixed(hidden_states[0].to(next(self.compute_a.parameters()).dtype), mix).mT  # [batch, channels, positions]
        scores = self.compute_a(x)
        a = scores + masks[0].to(torch.promote_types(scores.dtype, torch.float32)).log()[:, None]
        shape = self.options.n_parts, self.options.d_cov, self.options.d_cap
        poses = self.compute_mu(x).unflatten(1, shape).movedim(-1, 2)
        return a.flatten(1), poses.flatten(1, 2)

    def split_by_layer(self, values: Tensor, n_tokens: Sequence[int]) -> list[Tensor]:
        """Sum values over the parts of each position; see `RoutingHead.split_by_layer`."""
        return [values.unflatten(1, (self.options.n_parts, *n_tokens)).sum(1)]
