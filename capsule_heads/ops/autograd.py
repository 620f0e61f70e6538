"""Streamed routing as a differentiable operation of torch, and one `torch.compile` takes whole.

The two directions are custom operators, which the compiler leaves alone: a loop over blocks, unrolled into a graph for
one number of inputs, would compile for minutes and gain nothing.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from . import streaming
from .passes import Passes

# With fewer numbers than this in all votes, time goes into calls and not arithmetic: double precision costs nothing.
SMALL_VOTES = 500_000
SECOND_DERIVATIVES = (
    'The fast strategies of routing have first derivatives only; for second ones, route with strategy="reference".'
)
# "capsule_heads", or of a copy that came along with a checkpoint: a second operator of one name would break the first.
_NAMESPACE = __package__.removesuffix(".ops").replace(".", "_")


def n_votes(mu_inp: Tensor, n_out: int, d_out: int) -> int:
    """How many numbers there are in all votes, `[...ijch]`."""
    return mu_inp.numel() // mu_inp.shape[-1] * n_out * d_out


def route_in_passes(
    strategy: str,
    a_inp: Tensor,
    mu_inp: Tensor,
    W: Tensor,
    B: Tensor,
    beta_use: Tensor,
    beta_ign: Tensor,
    *,
    n_out: int,
    n_iters: int,
    p_model: str,
    eps: float,
    return_R: bool,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Routes with the passes of a strategy. Other arguments as in `ops.route`; no parameter may differ by input.

    `group` is the name of the processes that hold the inputs, None for this one alone.

    Second derivatives raise a `NotImplementedError`.
    """
    *batch, n_inp, d_cov, d_inp = mu_inp.shape
    n_samples, d_out = math.prod(batch), W.shape[-1]
    # Processes may hold unequal shares of the inputs, and have to compute alike.
    is_small = group is None and strategy in ("moments", "votes") and n_votes(mu_inp, n_out, d_out) < SMALL_VOTES
    # Nothing scales the distances of soft k-means: where they are large, their rounding decides between outputs.
    is_hard = strategy == "numba" and p_model == "skm"
    dtype = torch.float64 if is_small or is_hard else mu_inp.dtype
    # Parameters are few. In float64, their gradients are rounded once, after they are summed over what shares them.
    outputs = _Route.apply(
        strategy,
        (n_iters, p_model, eps, return_R, group),
        a_inp.reshape(n_samples, n_inp).to(dtype),
        mu_inp.reshape(n_samples, n_inp, d_cov, d_inp).to(dtype),
        W.double()[0].permute(2, 0, 1).expand(d_out, n_out, d_inp),
        B.double()[0].permute(1, 2, 0).expand(d_cov, d_out, n_out),
        beta_use.double()[0].expand(n_out),
        beta_ign.double()[0].expand(n_out),
    )
    a_out, mu_out, sig2_out, R = (output.to(mu_inp.dtype) for output in outputs)
    return (
        a_out.reshape(*batch, n_out),
        mu_out.permute(0, 3, 1, 2).reshape(*batch, n_out, d_cov, d_out),
        sig2_out.permute(0, 3, 1, 2).reshape(*batch, n_out, d_cov, d_out),
        R.reshape(*batch, n_inp, n_out) if return_R else None,
    )


class _Route(torch.autograd.Function):
    """Shapes as in `streaming.forward`."""

    @staticmethod
    def forward(
        ctx: Any, strategy: str, options: tuple[int, str, float, bool, str | None], *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *outputs, centre, moments, statistics = _forward(strategy, *tensors, *options)
        ctx.save_for_backward(*tensors, centre, moments, statistics)
        ctx.strategy, ctx.options = strategy, options
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        _, p_model, eps, return_R, group = ctx.options
        *d_means, d_R = d_outputs
        d_R = d_R if return_R else None
        return None, None, *_backward(ctx.strategy, *d_means, d_R, *ctx.saved_tensors, p_model, eps, group)


def _passes(strategy: str) -> Passes:
    return importlib.import_module(f".{strategy}", __package__)


@torch.library.custom_op(f"{_NAMESPACE}::route", mutates_args=())
def _forward(
    strategy: str,
    a_inp: Tensor,
    mu_inp: Tensor,
    W: Tensor,
    B: Tensor,
    beta_use: Tensor,
    beta_ign: Tensor,
    n_iters: int,
    p_model: str,
    eps: float,
    return_R: bool,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (a_inp, mu_inp, W, B, beta_use, beta_ign)
    options = {"n_iters": n_iters, "p_model": p_model, "eps": eps, "return_R": return_R, "group": group}
    return streaming.forward(_passes(strategy), *tensors, **options)


@_forward.register_fake
def _(strategy, a_inp, mu_inp, W, B, beta_use, beta_ign, n_iters, p_model, eps, return_R, group=None):
    n, i, c, d = mu_inp.shape
    h, j, _ = W.shape
    n_kept = _passes(strategy).n_kept(c, d)
    new, new64 = mu_inp.new_empty, lambda *shape: mu_inp.new_empty(shape, dtype=torch.float64)
    R = new(n, i, j) if return_R else new(0)
    outputs = (new(n, j), new(n, c, h, j), new(n, c, h, j), R)
    return *outputs, new(n, 1, c, d), new64(n, c, d, d + 1), new64(n_iters, n, 1 + 2 * c * h + n_kept, j)


@torch.library.custom_op(f"{_NAMESPACE}::route_backward", mutates_args=())
def _backward(
    strategy: str,
    d_a_out: Tensor | None,
    d_mu_out: Tensor | None,
    d_sig2_out: Tensor | None,
    d_R: Tensor | None,
    a_inp: Tensor,
    mu_inp: Tensor,
    W: Tensor,
    B: Tensor,
    beta_use: Tensor,
    beta_ign: Tensor,
    centre: Tensor,
    moments: Tensor,
    statistics: Tensor,
    p_model: str,
    eps: float,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (a_inp, mu_inp, W, B, beta_use, beta_ign, centre, moments, statistics)
    d_outputs = (d_a_out, d_mu_out, d_sig2_out, d_R)
    return streaming.backward(_passes(strategy), d_outputs, *tensors, p_model=p_model, eps=eps, group=group)


@_backward.register_fake
def _(strategy, d_a_out, d_mu_out, d_sig2_out, d_R, a_inp, mu_inp, W, B, beta_use, beta_ign, *_):
    tensors = (a_inp, mu_inp, W, B, beta_use, beta_ign)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError(SECOND_DERIVATIVES)


_backward.register_autograd(_no_second_derivative)
