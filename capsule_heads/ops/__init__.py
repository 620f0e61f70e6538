"""The routing operation: pure functions of tensors, without parameters.

`route` checks its inputs, settles the dtype and calls a strategy. All strategies compute the same function:

| strategy    | serves     | what it is                                                         |
| ----------- | ---------- | ------------------------------------------------------------------ |
| `reference` | everything | the literal loop of the paper, ground truth                        |
| `auto`      | everything | the fastest strategy that serves the shape; today, `reference`     |
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import route_reference

STRATEGIES = {"reference": route_reference}
P_MODELS = ("gaussian", "skm")

__all__ = ["P_MODELS", "STRATEGIES", "check_routing_options", "route"]


def check_routing_options(*, n_iters: int, p_model: str, eps: float, strategy: str) -> None:
    """Checks the options that routing has beside its tensors.

    Raises:
        ValueError: naming the option, what was given and what was expected.
    """
    if isinstance(n_iters, bool) or not isinstance(n_iters, int) or n_iters < 1:
        raise ValueError(
            f"n_iters is {n_iters!r}; expected a whole number of iterations, 1 or more (the paper uses 3)."
        )
    if p_model not in P_MODELS:
        raise ValueError(f'p_model is {p_model!r}; expected "gaussian" or "skm" (soft k-means).')
    if not eps > 0:
        raise ValueError(f"eps is {eps!r}; expected a positive number, such as 1e-5: it keeps variances above zero.")
    if strategy != "auto" and strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; expected one of {', '.join(['auto', *STRATEGIES])}.")


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
) -> tuple[Tensor, ...]:
    """Routes input capsules to output capsules (Heinsen, 2019, arXiv 1911.00792, section 3).

    It computes in float32, or float64 where an argument is float64, whatever autocast says and also where all arguments
    are half precision: variances near `eps` do not survive less. In the shapes, `i` counts inputs, `j` outputs, `c`
    rows of a capsule, `d` columns of an input capsule, `h` columns of an output capsule; `...` is any number of batch
    dimensions, also none. A parameter's dimension of size 1 is shared by all inputs, or all outputs.

    Args:
        a_inp: `[...i]`, input scores, as logits. `-inf` masks an input: it then changes nothing.
        mu_inp: `[...icd]`, input capsules.
        W: `[i or 1, j or 1, d, h]`, the linear part of the votes `V_ij = mu_inp_i W_ij + B_ij`.
        B: `[i or 1, j or 1, c, h]`, their constant part.
        beta_use: `[i or 1, j or 1]`, net benefit of using a unit of data.
        beta_ign: `[i or 1, j or 1]`, net cost of ignoring one.
        n_out: number of output capsules.
        n_iters: number of iterations.
        p_model: "gaussian", a mixture of Gaussians, or "skm", soft k-means.
        eps: added to counts of data and to variances.
        return_R: whether to return the routing probabilities too.
        strategy: "auto" or one of `STRATEGIES`.

    Returns:
        `a_out [...j]` (logits), `mu_out [...jch]` (means), `sig2_out [...jch]` (variances) and, with `return_R`,
        `R [...ij]` (probabilities; each row sums to 1 over the outputs).

    Raises:
        ValueError: for an unknown option, or shapes that do not fit each other.
    """
    check_routing_options(n_iters=n_iters, p_model=p_model, eps=eps, strategy=strategy)
    _check_shapes(a_inp, mu_inp, W, B, beta_use, beta_ign, n_out)
    routing_strategy = STRATEGIES["reference" if strategy == "auto" else strategy]
    tensors = (a_inp, mu_inp, W, B, beta_use, beta_ign)
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    with torch.autocast(a_inp.device.type, enabled=False):
        outputs = routing_strategy(
            *(tensor.to(dtype) for tensor in tensors), n_out=n_out, n_iters=n_iters, p_model=p_model, eps=eps
        )
    return outputs if return_R else outputs[:3]


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
