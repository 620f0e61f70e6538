"""The streaming strategies, as differentiable operations of torch that `torch.compile` does not break up.

Forward and backward are custom operators, which the compiler leaves alone. It would otherwise unroll the loop over
blocks into a graph for one number of inputs, compile for minutes and gain nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import streaming
from .passes import Passes
from .strategy import IN_EXPORTS, Call, Strategy, n_votes

# With fewer numbers than this in all votes, time goes into calls and not arithmetic, so float64 costs nothing.
SMALL_VOTES = 500_000
# "capsule_heads", or another name for a copy that came with a checkpoint: operators of the same name would clash.
NAMESPACE = __name__.rpartition(".")[0].removesuffix(".ops").replace(".", "_")


class StreamingStrategy(Strategy, Passes):
    """A strategy that goes over blocks of inputs, forward and backward. A subclass provides the passes.

    Computing second derivatives raises a `NotImplementedError`.
    """

    def unserved(self, call: Call) -> str | None:
        """Return None if the strategy serves a call, else the reason; see `Strategy`."""
        if torch.compiler.is_exporting():
            return IN_EXPORTS
        if call.n_own > 1:
            return f"needs weights that all inputs share; these are different for each of {call.n_own} inputs"
        if call.mu_inp.device.type not in ("cpu", "cuda"):
            return f"runs on CPU and CUDA; the inputs are on {call.mu_inp.device.type}"
        return self.missing()

    def needs_double(self, n_votes: int, p_model: str, is_split: bool) -> bool:
        """Return whether to compute float32 inputs in float64, which costs nothing for few votes; see `SMALL_VOTES`.

        Processes that share inputs may hold parts of unequal size but have to compute alike, so they never do.
        """
        return not is_split and n_votes < SMALL_VOTES

    def route(
        self,
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
        """Route in passes; see `Strategy.route`."""
        *batch, n_inp, d_cov, d_inp = mu_inp.shape
        n_samples, d_out = math.prod(batch), W.shape[-1]
        is_double = self.needs_double(n_votes(mu_inp, n_out, d_out), p_model, group is not None)
        dtype = torch.float64 if is_double else mu_inp.dtype
        # Parameters are few. In float64, their gradients are rounded once, after the sum over all that share them.
        outputs = _Route.apply(
            self.name,
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
    """The operators of both directions as one function; shapes as in `streaming.forward`."""

    @staticmethod
    def forward(
        ctx: Any, strategy: str, options: tuple[int, str, float, bool, str | None], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
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
    """Return the passes of a strategy by its name, as operators take no objects."""
    from .routing import STRATEGIES  # imported here, as the strategies in this table are built on this module

    passes = STRATEGIES[strategy]
    assert isinstance(passes, Passes)
    return passes


@torch.library.custom_op(f"{NAMESPACE}::route", mutates_args=())
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
    passes = _passes(strategy)
    return streaming.forward(
        passes, *tensors, n_iters=n_iters, p_model=p_model, eps=eps, return_R=return_R, group=group
    )


@_forward.register_fake
def _(
    strategy: str, a_inp: Tensor, mu_inp: Tensor, W: Tensor, B: Tensor, beta_use: Tensor, beta_ign: Tensor,
    n_iters: int, p_model: str, eps: float, return_R: bool, group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, i, c, d = mu_inp.shape
    h, j, _ = W.shape
    new, n_rows = mu_inp.new_empty, 1 + 2 * c * h + _passes(strategy).n_kept(c, d)
    R = new(n, i, j) if return_R else new(0)
    moments = new(n, c, d, d + 1, dtype=torch.float64)
    statistics = new(n_iters, n, n_rows, j, dtype=torch.float64)
    return new(n, j), new(n, c, h, j), new(n, c, h, j), R, new(n, 1, c, d), moments, statistics


@torch.library.custom_op(f"{NAMESPACE}::route_backward", mutates_args=())
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
def _(
    strategy: str, d_a_out: Tensor | None, d_mu_out: Tensor | None, d_sig2_out: Tensor | None, d_R: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    tensors = arguments[:6]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def no_second_derivative(ctx: Any, *_: Tensor) -> None:
    """Refuse to differentiate a backward pass.

    Raises:
        NotImplementedError: If it is called.
    """
    raise NotImplementedError(
        "The fast strategies of routing have first derivatives only; for second derivatives, route with "
        'strategy="reference".'
    )


_backward.register_autograd(no_second_derivative)
