"""Routing in a few passes over blocks of inputs, forward and backward: what all streaming strategies share.

A strategy provides the passes (`passes.Passes`). This module does the work between passes, on tensors without `i`.
README.md derives it; shapes are those of `terms`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .passes import Passes
from .processes import n_processes, summed
from .terms import EStep, Inputs, Statistics, UseGradient


class MStep:
    """The M-step on statistics, the parameters of the next E-step, and the gradients of both.

    Attributes:
        a_out: `[n,j]`.
        mean: `[n,c,h,j]`, `mu_out - bias`.
        mu_out: `[n,c,h,j]`.
        sig2_out: `[n,c,h,j]`.
    """

    def __init__(
        self, statistics: Statistics, total: Tensor, eps: float, bias: Tensor, beta_use: Tensor, beta_ign: Tensor
    ) -> None:
        self.statistics, self.total, self.eps = statistics, total, eps
        self.beta_use, self.beta_ign = beta_use, beta_ign
        n_used = statistics.n_used[:, None, None]
        self.count = n_used + self.eps  # [n11j]
        self.a_out = self.beta_use * statistics.n_used - self.beta_ign * (self.total - statistics.n_used)
        self.mu_out = n_used * (statistics.mean + bias) / self.count
        # The scatter is about the mean votes. The means are not quite the mean votes, as eps draws them to zero.
        self.gap = self.eps * (statistics.mean + bias) / self.count
        self.mean = statistics.mean - self.gap
        self.sum_of_squares = statistics.scatter + n_used * self.gap.square()  # about self.mean
        self.sig2_out = self.sum_of_squares / self.count + self.eps

    def e_step(self, p_model: str) -> EStep:
        """Return the parameters of the next E-step."""
        log_prior = F.logsigmoid(self.a_out)
        if p_model == "skm":  # the paper's log-softmax adds a constant to an input's logits; the softmax removes it
            return EStep(log_prior, self.mean, torch.ones_like(self.mean))
        return EStep(log_prior - 0.5 * self.sig2_out.log().sum((1, 2)), self.mean, (2.0 * self.sig2_out).rsqrt())

    def e_step_backward(self, p_model: str, e_step: EStep, d: EStep) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of `a_out`, `mean` and `sig2_out`, from the gradient of `e_step`."""
        d_a_out = d.log_prior * torch.sigmoid(-self.a_out)
        if p_model == "skm":
            return d_a_out, d.mean, torch.zeros_like(self.sig2_out)
        d_sig2_out = -0.5 * (d.log_prior[:, None, None] + d.scale * e_step.scale) / self.sig2_out
        return d_a_out, d.mean, d_sig2_out

    def backward(
        self, d_a_out: Tensor, d_mean: Tensor, d_sig2_out: Tensor, d_mu_out: Tensor | float = 0.0
    ) -> tuple[UseGradient, MStepGradient]:
        """Return the gradients of `D` and of all else that the M-step reads, from those of the four attributes."""
        n_used = self.statistics.n_used
        square = d_sig2_out / self.count
        # The sum of squares is about `mean`, which is not quite the mean vote.
        d_mean = d_mean - 2.0 * square * n_used[:, None, None] * self.gap
        linear = (d_mean + d_mu_out) / self.count
        # The mean depends on n_used too, so the linear term is in v = u - mean and not in u.
        constant = (self.beta_use + self.beta_ign) * d_a_out - (square * self.sum_of_squares / self.count).sum((1, 2))
        return UseGradient(constant, linear, square, self.mean), MStepGradient(
            total=-(self.beta_ign * d_a_out).sum(-1, keepdim=True),
            bias=(n_used[:, None, None] * d_mu_out - self.eps * d_mean) / self.count,
            beta_use=(d_a_out * n_used).sum(0),
            beta_ign=(d_a_out * (n_used - self.total)).sum(0),
        )


class MStepGradient(NamedTuple):
    """Gradients of what an M-step reads beside the statistics: `total [n,1]`, `bias [n,c,h,j]`, betas `[j]`."""

    total: Tensor
    bias: Tensor
    beta_use: Tensor
    beta_ign: Tensor


def forward(
    passes: Passes,
    a_inp: Tensor,
    mu_inp: Tensor,
    W: Tensor,
    B: Tensor,
    beta_use: Tensor,
    beta_ign: Tensor,
    *,
    n_iters: int,
    p_model: str,
    eps: float,
    return_R: bool,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Route.

    Args:
        passes: the passes of a strategy.
        a_inp: `[n,i]`.
        mu_inp: `[n,i,c,d]`.
        W: `[h,j,d]`, float64.
        B: `[c,h,j]`, float64.
        beta_use: `[j]`, float64.
        beta_ign: `[j]`, float64.
        n_iters: as in `routing.route`, like the next three.
        p_model: see there.
        eps: see there.
        return_R: see there.
        group: the name of the processes that hold the inputs together.

    Returns:
        `a_out [n,j]`, `mu_out` and `sig2_out [n,c,h,j]`, and `R [n,i,j]` (empty unless requested), of the dtype of
        `mu_inp`. The remaining results are for `backward`: `centre`, the moments of the inputs, and the statistics of
        every iteration, `[n_iters,n,1+2ch+k,j]`.
    """
    f_inp = torch.sigmoid(a_inp)
    weighted_sum = (f_inp[:, None] @ mu_inp.flatten(2)).view(len(mu_inp), 1, *mu_inp.shape[2:])
    own_total = f_inp.sum(-1, keepdim=True, dtype=torch.float64)
    total, weighted_sum = summed(group, own_total, weighted_sum)
    centre = weighted_sum / total.to(mu_inp.dtype)[..., None, None].clamp_min(torch.finfo(mu_inp.dtype).tiny)
    inputs = Inputs(mu_inp, f_inp, own_total, centre, W.to(mu_inp.dtype), eps)
    bias = _bias(inputs, B)
    own_statistics, moments = passes.uniform_statistics(inputs)
    own = [own_statistics]
    m_step = MStep(own_statistics.merged(group), total, eps, bias, beta_use, beta_ign)
    R = mu_inp.new_full((*a_inp.shape, W.shape[1]) if return_R else (0,), 1.0 / W.shape[1])
    for iteration in range(1, n_iters):
        R_out = R if return_R and iteration == n_iters - 1 else None
        own.append(passes.statistics(inputs, m_step.e_step(p_model), R_out))
        m_step = MStep(own[-1].merged(group), total, eps, bias, beta_use, beta_ign)
    a_out, mu_out, sig2_out = (x.to(mu_inp.dtype).contiguous() for x in (m_step.a_out, m_step.mu_out, m_step.sig2_out))
    n_kept = passes.n_kept(*mu_inp.shape[2:])
    packed = torch.stack([statistics.packed(n_kept) for statistics in own])
    return a_out, mu_out, sig2_out, R, centre, moments, packed


def backward(
    passes: Passes,
    d_outputs: tuple[Tensor | None, ...],
    a_inp: Tensor,
    mu_inp: Tensor,
    W: Tensor,
    B: Tensor,
    beta_use: Tensor,
    beta_ign: Tensor,
    centre: Tensor,
    moments: Tensor,
    statistics: Tensor,
    *,
    p_model: str,
    eps: float,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `forward`'s six tensors, from those of its first four results, each of which may be None.

    The first four results are `a_out`, `mu_out`, `sig2_out` and `R`.
    """
    f_inp = torch.sigmoid(a_inp)
    own_total = f_inp.sum(-1, keepdim=True, dtype=torch.float64)
    (total,) = summed(group, own_total)
    inputs = Inputs(mu_inp, f_inp, own_total, centre, W.to(mu_inp.dtype), eps)
    bias = _bias(inputs, B)
    own = [Statistics.unpacked(s, *B.shape[:2]) for s in statistics]
    m_steps = [MStep(s.merged(group), total, eps, bias, beta_use, beta_ign) for s in own]

    last = m_steps[-1]
    # Every process has the outputs, and may compute another loss from them.
    d_mu_out: Tensor | float
    d_a_out, d_mu_out, d_sig2_out = summed(
        group,
        *(
            torch.zeros_like(x) if d is None else d.double()
            for d, x in zip(d_outputs, (last.a_out, last.mu_out, last.sig2_out))
        ),
    )
    d_mean, d_R = torch.zeros_like(last.mean), d_outputs[3]
    d_mu_inp, d_f_inp = mu_inp.new_zeros(mu_inp.shape), a_inp.new_zeros(a_inp.shape)
    d_W, d_read = torch.zeros_like(W), []
    for t in reversed(range(len(m_steps))):
        d_use, d_read_here = m_steps[t].backward(d_a_out, d_mean, d_sig2_out, d_mu_out)
        d_read.append(d_read_here)
        if t == 0:
            d_W += passes.uniform_gradients(inputs, moments, d_use, d_mu_inp, d_f_inp)
        else:
            previous = m_steps[t - 1]
            e_step = previous.e_step(p_model)
            d_e_step, d_W_here = passes.gradients(inputs, e_step, own[t], d_use, d_R, d_mu_inp, d_f_inp)
            d_e_step = EStep(*summed(group, *d_e_step))
            d_R, d_mu_out = None, 0.0  # only R and mu_out of the last iteration are outputs
            d_W += d_W_here
            d_a_out, d_mean, d_sig2_out = previous.e_step_backward(p_model, e_step, d_e_step)

    d_total, d_bias, d_beta_use, d_beta_ign = (functools.reduce(torch.add, parts) for parts in zip(*d_read))
    d_f_inp += d_total.to(d_f_inp.dtype)
    # Every process has these completely, and the sum over processes should contain them once.
    d_bias, d_beta_use, d_beta_ign = (x / n_processes(group) for x in (d_bias, d_beta_use, d_beta_ign))
    d_W += torch.einsum("nkcd,nchj->hjd", centre.double(), d_bias)
    d_a_inp = d_f_inp * f_inp * (1.0 - f_inp)
    d_B = d_bias.sum(0)
    return d_a_inp, d_mu_inp, d_W.contiguous(), d_B.contiguous(), d_beta_use.contiguous(), d_beta_ign.contiguous()


def _bias(inputs: Inputs, B: Tensor) -> Tensor:
    """Return the bias of votes, `centre W + B`, `[n,c,h,j]`, float64."""
    return torch.einsum("nkcd,hjd->nchj", inputs.centre.double(), inputs.W.double()) + B
