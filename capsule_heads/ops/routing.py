"""`route`, with its checks, the table of strategies and the choice of "auto"."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import plain, shown
from .cpu import Cpu
from .cuda import Cuda
from .kept import Kept
from .moments import Moments
from .reference import Reference
from .strategy import Call, Strategy
from .votes import Votes

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy for strategy in (Reference(), Moments(), Votes(), Kept(), Cpu(), Cuda())
}
P_MODELS = ("gaussian", "skm")
# With fewer numbers than this in all votes, a strategy is done on the CPU before a pass over blocks is set up.
SMALL = {"kept": 1_000_000, "reference": 250_000}


def _is_small(call: Call, strategy: str) -> bool:
    """Return whether votes are few; False for a group, whose processes may differ in size but have to choose alike."""
    return call.mu_inp.device.type == "cpu" and not call.is_split and call.n_votes < SMALL[strategy]


def _has_few_moments(call: Call) -> bool:
    """Return whether an input has few moments beside its votes, and float64 is precise enough for their squares."""
    d_cov, d_inp = call.mu_inp.shape[-2:]
    return call.dtype == torch.float32 and d_cov * d_inp * (d_inp + 3) // 2 + 1 <= 8 * d_cov * call.d_out


# "auto" takes the first line that holds and whose strategy serves the call.
AUTO: tuple[tuple[str, Callable[[Call], bool]], ...] = (
    ("reference", lambda call: torch.compiler.is_exporting()),
    ("cuda", lambda call: call.mu_inp.device.type == "cuda"),
    ("kept", lambda call: _is_small(call, "kept")),
    ("reference", lambda call: _is_small(call, "reference")),
    ("cpu", lambda call: True),
    ("moments", _has_few_moments),
    ("votes", lambda call: True),
    ("kept", lambda call: True),
    ("reference", lambda call: True),
)


def check_routing_options(*, n_iters: int, p_model: str, eps: float, strategy: str) -> None:
    """Check the options of a routing.

    Args:
        n_iters: number of iterations.
        p_model: "gaussian" or "skm".
        eps: a positive number.
        strategy: "auto" or one of `STRATEGIES`.

    Raises:
        ValueError: If an option has a value that is not valid.
    """
    if isinstance(n_iters, bool) or not isinstance(n_iters, int) or n_iters < 1:
        raise ValueError(
            f"n_iters is {shown(n_iters)}; expected a whole number of iterations, 1 or more (the paper uses 3)."
        )
    if p_model not in P_MODELS:
        raise ValueError(f'p_model is {shown(p_model)}; expected "gaussian" or "skm" (soft k-means).')
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < math.inf:
        raise ValueError(
            f"eps is {shown(eps)}; expected a positive number, such as 1e-5: it keeps variances above zero."
        )
    if strategy not in ("auto", *STRATEGIES):
        raise ValueError(f"strategy is {shown(strategy)}; expected one of {', '.join(['auto', *STRATEGIES])}.")


def route(
    a_inp: Tensor,
    mu_inp: Tensor,
    W: Tensor,
    B: Tensor,
    beta_use: Tensor,
    beta_ign: Tensor,
    *,
    n_out: int,
    n_iters: int = 3,
    p_model: str = "gaussian",
    eps: float = 1e-5,
    return_R: bool = False,
    strategy: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, ...]:
    """Route input capsules to output capsules (Heinsen, 2019, arXiv 1911.00792, section 3).

    The computation is in float32, or in float64 if an argument is float64. Autocast and half-precision arguments do
    not change that, as variances near `eps` need float32. In the shapes, `i` counts inputs, `j` outputs, `c` rows of a
    capsule, `d` columns of an input capsule and `h` columns of an output capsule. `...` is any number of batch
    dimensions, or none. A parameter whose dimension `i` or `j` is 1 is shared by all inputs, or all outputs.

    Args:
        a_inp: `[...i]`, input scores, as logits. A score of `-inf` masks an input, which then changes nothing.
        mu_inp: `[...icd]`, input capsules.
        W: `[i or 1, j or 1, d, h]`, the linear part of the votes `V_ij = mu_inp_i W_ij + B_ij`.
        B: `[i or 1, j or 1, c, h]`, the constant part of the votes.
        beta_use: `[i or 1, j or 1]`, net benefit of using a unit of data.
        beta_ign: `[i or 1, j or 1]`, net cost of ignoring a unit of data.
        n_out: number of output capsules.
        n_iters: number of iterations.
        p_model: "gaussian", a mixture of Gaussians, or "skm", soft k-means.
        eps: added to counts of data and to variances.
        return_R: whether to return the routing probabilities too.
        strategy: "auto" or one of `STRATEGIES`.
        group: processes that hold the inputs together; None if this process has all inputs. Each process has the same
            weights and a part of the inputs, of any size or empty. It returns the outputs for all inputs, and `R` for
            its own inputs. An iteration sums statistics over the processes twice, and its backward pass once, so every
            process has to run both. Gradients are those of the sum of all processes' losses, and each process gets its
            part of a parameter's gradient. DDP takes the mean of these parts. If all processes compute the same loss,
            the mean is the gradient of this loss.

    Returns:
        `a_out [...j]` (logits), `mu_out [...jch]` (means), `sig2_out [...jch]` (variances) and, with `return_R`,
        `R [...ij]` (probabilities; each row sums to 1 over the outputs).

    Raises:
        ValueError: If an option is unknown, shapes do not fit each other, tensors are on several devices, or the
            strategy does not serve the call.
        TypeError: If a tensor is complex, or `group` is not a process group.
        ImportError: If a strategy chosen by name needs a library that is not installed.
    """
    n_out, n_iters, eps = plain(n_out), plain(n_iters), plain(eps)
    check_routing_options(n_iters=n_iters, p_model=p_model, eps=eps, strategy=strategy)
    _check_shapes(a_inp, mu_inp, W, B, beta_use, beta_ign, n_out)
    tensors = (a_inp, mu_inp, W, B, beta_use, beta_ign)
    if any(tensor.device != mu_inp.device for tensor in tensors):
        devices = (f"{name} on {tensor.device}" for name, tensor in zip(("a_inp", "mu_inp", "W", "B"), tensors))
        raise ValueError(
            f"The tensors include {', '.join(devices)}; expected all tensors on one device: move them with .to()."
        )
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if not dtype.is_floating_point:
        raise TypeError(f"One of the tensors of a routing is {dtype}; expected real numbers in all of them.")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is {shown(group)}; expected a process group, such as torch.distributed.group.WORLD, or None where "
            "this process has all inputs."
        )
    call = Call(mu_inp, tensors[2:], n_out, dtype, is_split=group is not None)
    chosen = _choose(call) if strategy == "auto" else _named(strategy, call)
    with torch.autocast(a_inp.device.type, enabled=False):
        a_out, mu_out, sig2_out, R = chosen.route(
            *(tensor.to(dtype) for tensor in tensors),
            n_out=n_out,
            n_iters=n_iters,
            p_model=p_model,
            eps=eps,
            return_R=return_R,
            group=None if group is None else group.group_name,
        )
    return (a_out, mu_out, sig2_out) if R is None else (a_out, mu_out, sig2_out, R)


def _choose(call: Call) -> Strategy:
    """Return the strategy that "auto" takes; if none serves the call, raise the error of the last line of `AUTO`."""
    for name, holds in AUTO:
        if holds(call) and STRATEGIES[name].unserved(call) is None:
            return STRATEGIES[name]
    return _named(AUTO[-1][0], call)


def _named(name: str, call: Call) -> Strategy:
    """Return the strategy with a name, and check that it serves the call."""
    _check_served(STRATEGIES[name], call)
    return STRATEGIES[name]


def _check_served(strategy: Strategy, call: Call) -> None:
    clause = strategy.unserved(call)
    if clause is None:
        return
    reason = f'strategy "{strategy.name}" {clause}'
    if clause == strategy.missing():
        raise ImportError(f'{reason}, or use strategy="auto".')
    if call.is_split:
        raise ValueError(
            f'{reason}. Use strategy="auto" with weights that all inputs share (`Routing` without n_inp), or leave '
            "group out, with all inputs in each process."
        )
    raise ValueError(f'{reason}. Use strategy="auto" or "reference".')


def _check_shapes(
    a_inp: Tensor, mu_inp: Tensor, W: Tensor, B: Tensor, beta_use: Tensor, beta_ign: Tensor, n_out: int
) -> None:
    if n_out < 1:
        raise ValueError(f"n_out is {n_out}; expected at least 1.")
    if mu_inp.ndim < 3 or mu_inp.shape[:-2] != a_inp.shape:
        raise ValueError(
            f"a_inp has shape {tuple(a_inp.shape)} and mu_inp {tuple(mu_inp.shape)}; expected scores [..., n_inp] and "
            "capsules [..., n_inp, d_cov, d_inp] with the same leading dimensions."
        )
    n_inp, d_cov, d_inp = mu_inp.shape[-3:]
    for name, parameter, trailing in (
        ("W", W, (d_inp, W.shape[-1])),
        ("B", B, (d_cov, W.shape[-1])),
        ("beta_use", beta_use, ()),
        ("beta_ign", beta_ign, ()),
    ):
        shape = tuple(parameter.shape)
        fits = len(shape) == 2 + len(trailing) and shape[0] in (1, n_inp) and shape[1] in (1, n_out)
        if not fits or shape[2:] != trailing:
            raise ValueError(
                f"{name} has shape {shape}, which does not fit mu_inp {tuple(mu_inp.shape)} and n_out={n_out}; "
                f"expected [{n_inp} or 1, {n_out} or 1{''.join(f', {size}' for size in trailing)}]."
            )
