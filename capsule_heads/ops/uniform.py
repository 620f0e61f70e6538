"""The first iteration, from `[c,d,d]` moments of the inputs. README.md derives it; shapes are those of `terms`."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import block_size, blocks, workspace
from .terms import Inputs, Statistics, UseGradient


def uniform_statistics(inputs: Inputs) -> tuple[Statistics, Tensor]:
    """Return the statistics of the first iteration, and the moments of the inputs, `[n,c,d,d+1]`."""
    moments = _moments(inputs)
    return statistics_of(inputs, moments), moments


def statistics_of(inputs: Inputs, moments: Tensor) -> Statistics:
    """Return the statistics of the first iteration, from the moments of the inputs, `[n,c,d,d+1]`."""
    total, W, n_out = inputs.total, inputs.W.double(), inputs.W.shape[1]
    mean_x = moments[..., -1] / total[..., None].clamp_min(torch.finfo(total.dtype).tiny)  # [ncd]
    covariance = moments[..., :-1] - total[..., None, None] * mean_x[..., :, None] * mean_x[..., None, :]
    mean = torch.einsum("ncd,hjd->nchj", mean_x, W)
    W_covariance = W.flatten(0, 1) @ covariance  # [n,c,hj,d]
    scatter = (W_covariance * W.flatten(0, 1)).sum(-1).unflatten(2, W.shape[:2]) / n_out
    return Statistics((total / n_out).expand(-1, n_out), mean, scatter)


def uniform_gradients(inputs: Inputs, moments: Tensor, d_use: UseGradient, d_mu_inp: Tensor, d_f_inp: Tensor) -> Tensor:
    """Go back through `uniform_statistics`; see `passes.Passes.uniform_gradients`."""
    constant, half, d_W = quadratic_form(inputs, moments, d_use)
    n, i, c, d = inputs.mu_inp.shape
    for samples, part in blocks(n, i, block_size(inputs.mu_inp, 8 * c * (d + 1))):
        x = inputs.centred(samples, part)  # [n,c,i,d+1]
        d_x = torch.matmul(x, half[samples], out=workspace.like("d_x", x[..., :d]))
        d_f = (x[..., :d] @ half[samples, :, d, :, None]).sum((1, 3)) + constant[samples, None]
        f_x = torch.mul(d_x, x[..., :d], out=workspace.like("f_x", d_x))
        d_f_inp[samples, part] += d_f + f_x.sum((1, 3))
        d_x.mul_(inputs.f_inp[samples, None, part, None])
        d_mu_inp[samples, part].add_(d_x.transpose(1, 2), alpha=2.0)
    return d_W


def quadratic_form(inputs: Inputs, moments: Tensor, d_use: UseGradient) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the gradient of `D_ij` in the first iteration over `j`: `constant + x linear + x square x^T`.

    Returns:
        `constant [n]` and `half [n,c,d+1,d]`, of the dtype of the inputs, and the gradient of `W`. `half` is `square`
        above half of `linear`. Multiplied by `half`, `x` with a column of ones gives half the gradient of `x`, without
        the factor `f`.
    """
    W, n_out = inputs.W.double(), inputs.W.shape[1]
    constant, linear_u, square_u = (x / n_out for x in d_use.in_u())
    square_W = (square_u[..., None] * W).flatten(2, 3)  # [n,c,hj,d]
    square = square_W.mT @ W.flatten(0, 1)  # [n,c,d,d]
    linear = torch.einsum("nchj,hjd->ncd", linear_u, W)
    half = torch.cat([square, linear[:, :, None] / 2.0], dim=2)
    d_W = 2.0 * (square_W @ moments[..., :-1]).sum((0, 1)).view_as(W)
    d_W += torch.einsum("ncd,nchj->hjd", moments[..., -1], linear_u)
    dtype = inputs.mu_inp.dtype
    return constant.sum(-1).to(dtype), half.to(dtype), d_W


def no_moments(inputs: Inputs) -> Tensor:
    """Return zeros as moments, for a strategy whose backward pass needs none."""
    n, _, c, d = inputs.mu_inp.shape
    return inputs.total.new_zeros(n, c, d, d + 1)


def _moments(inputs: Inputs) -> Tensor:
    """Return second and first moments of the inputs, `[n,c,d,d+1]`: `sum_i f_i x_ic x_ic^T`, and `sum_i f_i x_ic`."""
    n, i, c, d = inputs.mu_inp.shape
    moments = inputs.mu_inp.new_zeros(n, c, d, d + 1, dtype=torch.float64)
    for samples, part in blocks(n, i, block_size(moments, 8 * c * (d + 1))):
        x = inputs.centred(samples, part, dtype=torch.float64)
        f_x = torch.mul(x[..., :d], inputs.f_inp[samples, None, part, None], out=workspace.like("f_x", x[..., :d]))
        moments[samples] += f_x.mT @ x
    return moments
