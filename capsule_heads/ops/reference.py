"""The routing algorithm as the paper states it: a literal loop, ground truth for every other strategy.

It materialises the votes `V` and several tensors of their size in each iteration, and autograd keeps them all: memory
and time grow with `n_inp * n_out * d_cov * d_out * n_iters`. It shares no arithmetic with the fast strategies.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def route_reference(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Routes by the E-, D- and M-steps of Heinsen (2019), section 3, algorithm 1. Arguments as in `ops.route`."""
    V = torch.einsum("...icd,ijdh->...ijch", mu_inp, W) + B  # [...ijch], or [...i1ch] where outputs share both W and B
    f_inp = torch.sigmoid(a_inp).unsqueeze(-1)  # [...i1]
    R = torch.full_like(f_inp, 1.0 / n_out).expand(*f_inp.shape[:-1], n_out)  # [...ij]
    a_out = mu_out = sig2_out = None

    for iteration in range(n_iters):
        # E-step: the probability that input i comes from output j. Uniform at first.
        if iteration > 0:
            squared_distance = (V - mu_out.unsqueeze(-4)).square()  # [...ijch]
            if p_model == "gaussian":
                sig2 = sig2_out.unsqueeze(-4)  # [...1jch]
                log_p = -(squared_distance / (2.0 * sig2)).sum((-2, -1)) - sig2.sqrt().log().sum((-2, -1))
            else:
                log_p = F.log_softmax(-squared_distance.sum((-2, -1)), dim=-1)
            # logsigmoid(a), which ONNX only has as log(sigmoid(a)): -inf from some -18 on in ONNX Runtime.
            log_sigmoid = -F.softplus(-a_out, threshold=80.0)  # beyond, exp might overflow, and both are linear
            R = torch.softmax(log_sigmoid.unsqueeze(-2) + log_p, dim=-1)  # [...ij]

        # D-step: the share of each input's data that each output uses, and the rest, which it ignores.
        D_use = f_inp * R  # [...ij]
        D_ign = f_inp - D_use

        # M-step: net benefit of the data used, and the mean and variance of the votes, weighted by it.
        a_out = (beta_use * D_use).sum(-2) - (beta_ign * D_ign).sum(-2)  # [...j]
        n_used = D_use.sum(-2)[..., None, None] + eps  # [...j11]
        weights = D_use[..., None, None]  # [...ij11]
        mu_out = (weights * V).sum(-4) / n_used  # [...jch]
        sig2_out = (weights * (V - mu_out.unsqueeze(-4)).square()).sum(-4) / n_used + eps  # [...jch]

    return a_out, mu_out, sig2_out, R if return_R else None
