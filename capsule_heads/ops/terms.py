"""The terms of a pass over the inputs: what it reads, what it adds up, and gradients of both. See README.md.

In the shapes `n` counts samples (all batch dimensions) and outputs come last, `[n,c,h,j]`. Tensors without `i` are
float64, unless their docstring says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import processes
from .blocks import workspace


@dataclass(frozen=True)
class Inputs:
    """The data that every pass reads.

    Attributes:
        mu_inp: `[n,i,c,d]`.
        f_inp: `[n,i]`, the sigmoid of the scores.
        total: `[n,1]`, the sum of `f_inp`, float64.
        centre: `[n,1,c,d]`, of the dtype of `mu_inp`.
        W: `[h,j,d]`, of the dtype of `mu_inp`.
        eps: added to counts and variances.
        memo: data that a strategy keeps from pass to pass.
    """

    mu_inp: Tensor
    f_inp: Tensor
    total: Tensor
    centre: Tensor
    W: Tensor
    eps: float
    memo: dict[type, Any] = field(default_factory=dict)

    def centred(self, samples: slice, part: slice, dtype: torch.dtype | None = None) -> Tensor:
        """Return a block of inputs less their centre, with a column of ones, in the workspace: `x [n,c,i,d+1]`."""
        mu_inp = self.mu_inp[samples, part].transpose(1, 2)  # [ncid]
        n, c, i, d = mu_inp.shape
        x = workspace("x", (n, c, i, d + 1), dtype or mu_inp.dtype, mu_inp.device)
        centre = self.centre[samples].transpose(1, 2)
        if x.dtype == mu_inp.dtype:
            torch.sub(mu_inp, centre, out=x[..., :d])
        else:  # as exact as the wider dtype
            x[..., :d].copy_(mu_inp).sub_(centre)
        x[..., d] = 1.0
        return x


class EStep(NamedTuple):
    """Parameters of `R_ij = softmax_j( log_prior_j - sum_ch (scale_jch (u_ijch - mean_jch))^2 )`; or gradients.

    Attributes:
        log_prior: `[n,j]`.
        mean: `[n,c,h,j]`.
        scale: `[n,c,h,j]`.
    """

    log_prior: Tensor
    mean: Tensor
    scale: Tensor


class Statistics(NamedTuple):
    """The sums of a pass for the M-step.

    Attributes:
        n_used: `[n,j]`, `sum_i D_ij`.
        mean: `[n,c,h,j]`, `sum_i D_ij u_ijch / n_used_j`; any finite number where `n_used_j` is 0.
        scatter: `[n,c,h,j]`, `sum_i D_ij (u_ijch - mean_jch)^2`, about exactly this mean.
        kept: `[n,k,j]`, other data that the strategy needs in the backward pass.
    """

    n_used: Tensor
    mean: Tensor
    scatter: Tensor
    kept: Tensor | None = None

    def packed(self, n_kept: int) -> Tensor:
        """Return all fields as one tensor, `[n,1+2ch+k,j]`."""
        kept = self.mean.new_zeros(len(self.mean), n_kept, self.mean.shape[-1]) if self.kept is None else self.kept
        return torch.cat([self.n_used[:, None], self.mean.flatten(1, 2), self.scatter.flatten(1, 2), kept], dim=1)

    @classmethod
    def unpacked(cls, packed: Tensor, c: int, h: int) -> Statistics:
        """Invert `packed`."""
        n_used, mean, scatter, kept = packed.tensor_split([1, 1 + c * h, 1 + 2 * c * h], dim=1)
        return cls(n_used[:, 0], mean.unflatten(1, (c, h)), scatter.unflatten(1, (c, h)), kept)

    def merged(self, group: str | None) -> Statistics:
        """Merge these statistics with those of the other processes of a group. The result has no `kept`."""
        if group is None:
            return self
        own_n_used = self.n_used[:, None, None]
        n_used, sum_u = processes.summed(group, self.n_used, own_n_used * self.mean)
        mean = sum_u / n_used.clamp_min(torch.finfo(n_used.dtype).tiny)[:, None, None]
        (scatter,) = processes.summed(group, self.scatter + own_n_used * (self.mean - mean).square())
        return Statistics(n_used, mean, scatter)


class UseGradient(NamedTuple):
    """The gradient of `D_ij`: `constant_j + sum_ch v_ijch (linear_jch + square_jch v_ijch)`, with `v = u - mean`.

    Attributes:
        constant: `[n,j]`.
        linear: `[n,c,h,j]`; it is also the gradient with respect to `sum_i D_ij u_ijch`.
        square: `[n,c,h,j]`; it is also the gradient with respect to `sum_i D_ij v_ijch^2`.
        mean: `[n,c,h,j]`.
    """

    constant: Tensor
    linear: Tensor
    square: Tensor
    mean: Tensor

    def in_u(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `constant`, `linear` and `square` of the form in `u`: `constant + sum_ch u (linear + square u)`."""
        at_zero = (self.mean * (self.square * self.mean - self.linear)).sum((1, 2))
        return self.constant + at_zero, self.linear - 2.0 * self.square * self.mean, self.square

    def in_z(self, e_step: EStep) -> tuple[Tensor, Tensor, Tensor]:
        """Write the form in `z = scale (u - e_step.mean)`: `constant + sum_ch v (linear + square v)`, `v = z - offset`.

        Returns:
            `offset`, `linear` and `square`, each `[n,c,h,j]`.
        """
        scale = e_step.scale
        return scale * (self.mean - e_step.mean), self.linear / scale, self.square / scale.square()
