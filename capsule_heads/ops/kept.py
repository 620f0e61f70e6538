"""Strategy "kept": fused kernels for the CPU on votes in memory, for small calls. README.md says which calls."""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .autograd import NAMESPACE, no_second_derivative
from .cpu import missing_numba, say_compiling
from .strategy import IN_EXPORTS, IN_GROUPS, Call, Strategy
from .threads import run_on_threads

PER_THREAD = 50_000  # numbers of votes that keep a thread busy for longer than its start takes


class Kept(Strategy):
    """Routing by the kernels in `kept_kernels`; see `Strategy`."""

    name = "kept"

    def missing(self) -> str | None:
        """Return None, or what to install."""
        return missing_numba()

    def unserved(self, call: Call) -> str | None:
        """Return None if the strategy serves a call, else the reason."""
        if torch.compiler.is_exporting():
            return IN_EXPORTS
        if call.mu_inp.device.type != "cpu":
            return f"runs on the CPU, and the inputs are on {call.mu_inp.device}"
        return IN_GROUPS if call.is_split else self.missing()

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
        """Route; see `Strategy.route`."""
        *batch, n_inp, d_cov, d_inp = mu_inp.shape
        n_samples, d_out = math.prod(batch), W.shape[-1]
        V = torch.einsum("nicd,ijdh->nichj", mu_inp.reshape(n_samples, n_inp, d_cov, d_inp), W)
        V = (V + B.permute(0, 2, 3, 1)).expand(-1, -1, -1, -1, n_out).flatten(2, 3)  # [nipj]
        n_own = max(len(beta_use), len(beta_ign))
        betas = (beta.double().expand(n_own, n_out) for beta in (beta_use, beta_ign))
        f_inp = torch.sigmoid(a_inp.reshape(n_samples, n_inp).double())
        kept, R = _Route.apply(V, f_inp, *betas, n_iters, p_model == "gaussian", eps, return_R)
        a_out, _, mu_out, sig2_out = kept.to(V.dtype).split([1, 1, d_cov * d_out, d_cov * d_out], dim=1)
        poses = (x.mT.reshape(*batch, n_out, d_cov, d_out) for x in (mu_out, sig2_out))
        return a_out.reshape(*batch, n_out), *poses, R.to(V.dtype).reshape(*batch, n_inp, n_out) if return_R else None


class _Route(torch.autograd.Function):
    """The two operators as one function; shapes as in `kept_kernels`."""

    @staticmethod
    def forward(
        ctx: Any,
        V: Tensor,
        f_inp: Tensor,
        beta_use: Tensor,
        beta_ign: Tensor,
        n_iters: int,
        is_gaussian: bool,
        eps: float,
        return_R: bool,
    ) -> tuple[Tensor, Tensor]:
        kept, R = _forward(V, f_inp, beta_use, beta_ign, n_iters, is_gaussian, eps, return_R)
        ctx.save_for_backward(V, f_inp, beta_use, beta_ign, kept, R)
        ctx.is_gaussian, ctx.eps, ctx.returns_R = is_gaussian, eps, return_R
        ctx.set_materialize_grads(False)
        if not return_R:
            last = R.new_empty(0)
        elif n_iters == 1:
            last = R.new_full((*f_inp.shape, V.shape[-1]), 1.0 / V.shape[-1])
        else:
            last = R[-1].clone()  # the caller may change it, and the backward pass needs the original
        return kept[-1].clone(), last

    @staticmethod
    def backward(ctx: Any, d_kept: Tensor | None, d_R: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if d_kept is None:
            d_kept = torch.zeros_like(tensors[4][-1])
        gradients = _backward(d_kept, d_R if ctx.returns_R else None, *tensors, ctx.is_gaussian, ctx.eps)
        return *gradients, None, None, None, None


@functools.cache
def _kernels() -> ModuleType:
    """Return the kernels. They are imported here, as that needs numba."""
    from . import kept_kernels

    say_compiling(kept_kernels, kept_kernels.forward)
    return kept_kernels


def _run(kernel: Any, V: Tensor, *arguments: object) -> None:
    """Run a kernel on all samples, on as many threads as torch would use.

    No sum goes over samples, so no bit depends on the number of threads.
    """
    n, votes = len(V), V.numpy()
    n_threads = max(1, min(torch.get_num_threads(), n, -(-V.numel() // PER_THREAD)))

    def run(thread: int) -> None:
        kernel(votes, *arguments, n * thread // n_threads, n * (thread + 1) // n_threads)

    # Without this, torch's profiler would not see the kernel.
    with torch.profiler.record_function(f"capsule_heads::{kernel.__name__}_of_kept_votes"):
        run_on_threads(run, n_threads)


def _new_results(V: Tensor, f_inp: Tensor, n_iters: int) -> tuple[Tensor, Tensor]:
    """Allocate `kept` and `R` of `kept_kernels.forward`."""
    n, i, p, j = V.shape
    return f_inp.new_empty(n_iters, n, 2 + 2 * p, j), f_inp.new_empty(n_iters - 1, n, i, j)


@torch.library.custom_op(f"{NAMESPACE}::route_kept", mutates_args=())
def _forward(
    V: Tensor,
    f_inp: Tensor,
    beta_use: Tensor,
    beta_ign: Tensor,
    n_iters: int,
    is_gaussian: bool,
    eps: float,
    return_R: bool,
) -> tuple[Tensor, Tensor]:
    kept, R = _new_results(V, f_inp, n_iters)
    tensors = (x.contiguous().numpy() for x in (f_inp, beta_use, beta_ign))
    _run(_kernels().forward, V.contiguous(), *tensors, is_gaussian, eps, kept.numpy(), R.numpy(), return_R)
    return kept, R


@_forward.register_fake
def _(
    V: Tensor, f_inp: Tensor, beta_use: Tensor, beta_ign: Tensor, n_iters: int, is_gaussian: bool, eps: float,
    return_R: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _new_results(V, f_inp, n_iters)


@torch.library.custom_op(f"{NAMESPACE}::route_kept_backward", mutates_args=())
def _backward(
    d_kept: Tensor,
    d_R: Tensor | None,
    V: Tensor,
    f_inp: Tensor,
    beta_use: Tensor,
    beta_ign: Tensor,
    kept: Tensor,
    R: Tensor,
    is_gaussian: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_V = torch.empty_like(V, memory_format=torch.contiguous_format)
    d_f_inp = torch.zeros_like(f_inp, memory_format=torch.contiguous_format)
    d_beta_use, d_beta_ign = (beta.new_zeros(len(V), *beta.shape) for beta in (beta_use, beta_ign))
    tensors = (x.contiguous().numpy() for x in (f_inp, beta_use, beta_ign))
    d_last_R = np.empty((0, 0, 0)) if d_R is None else d_R.contiguous().numpy()
    gradients = (x.numpy() for x in (d_V, d_f_inp, d_beta_use, d_beta_ign))
    _run(
        _kernels().backward,
        V.contiguous(),
        *tensors,
        is_gaussian,
        eps,
        kept.numpy(),
        R.numpy(),
        d_kept.clone(memory_format=torch.contiguous_format).numpy(),
        d_last_R,
        *gradients,
    )
    return d_V, d_f_inp, d_beta_use.sum(0), d_beta_ign.sum(0)


@_backward.register_fake
def _(d_kept: Tensor, d_R: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors[:4])


_backward.register_autograd(no_second_derivative)
