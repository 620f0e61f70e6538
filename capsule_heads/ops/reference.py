"""Strategy "reference": the algorithm as the paper states it, a literal loop and the ground truth for all others.

It shares no arithmetic with the fast strategies. Its memory and time grow with `n_inp n_out d_cov d_out n_iters`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .strategy import IN_GROUPS, Call, Strategy


class Reference(Strategy):
    """The literal loop, which serves all calls except those with a group of processes; see `Strategy`."""

    name = "reference"

    def unserved(self, call: Call) -> str | None:
        """Return None if the strategy serves a call, else the reason."""
        return IN_GROUPS if call.is_split else None

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
        """Route by the E-, D- and M-steps of Heinsen (2019), section 3, algorithm 1; see `Strategy.route`."""
        V = torch.einsum("...icd,ijdh->...ijch", mu_inp, W) + B  # [...ijch], or [...i1ch] if outputs share W and B
        f_inp = torch.sigmoid(a_inp).unsqueeze(-1)  # [...i1]
        R = torch.full_like(f_inp, 1.0 / n_out).expand(*f_inp.shape[:-1], n_out)  # [...ij]; uniform at first
        outputs = _m_step(V, f_inp, R, beta_use, beta_ign, eps)
        for _ in range(n_iters - 1):
            R = _e_step(V, *outputs, p_model)
            outputs = _m_step(V, f_inp, R, beta_use, beta_ign, eps)
        return *outputs, R if return_R else None


def _e_step(V: Tensor, a_out: Tensor, mu_out: Tensor, sig2_out: Tensor, p_model: str) -> Tensor:
    """Return the probability that an input comes from an output, `R [...ij]`."""
    squared_distance = (V - mu_out.unsqueeze(-4)).square()  # [...ijch]
    if p_model == "gaussian":
        sig2 = sig2_out.unsqueeze(-4)  # [...1jch]
        log_p = -(squared_distance / (2.0 * sig2)).sum((-2, -1)) - sig2.sqrt().log().sum((-2, -1))
    else:
        log_p = F.log_softmax(-squared_distance.sum((-2, -1)), dim=-1)
    # logsigmoid(a). ONNX has F.logsigmoid only as log(sigmoid(a)), which is -inf below about -18 in ONNX Runtime.
    log_sigmoid = -F.softplus(-a_out, threshold=80.0)  # above 80, exp might overflow, and softplus is linear
    return torch.softmax(log_sigmoid.unsqueeze(-2) + log_p, dim=-1)


def _m_step(
    V: Tensor, f_inp: Tensor, R: Tensor, beta_use: Tensor, beta_ign: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `a_out [...j]`, `mu_out` and `sig2_out [...jch]`, by the D-step and the M-step."""
    # D-step: the fraction of each input's data that each output uses, and the rest, which it ignores.
    D_use = f_inp * R  # [...ij]
    D_ign = f_inp - D_use
    # M-step: net benefit of the data used, and the mean and variance of the votes, weighted by it.
    a_out = (beta_use * D_use).sum(-2) - (beta_ign * D_ign).sum(-2)  # [...j]
    n_used = D_use.sum(-2)[..., None, None] + eps  # [...j11]
    weights = D_use[..., None, None]  # [...ij11]
    mu_out = (weights * V).sum(-4) / n_used  # [...jch]
    sig2_out = (weights * (V - mu_out.unsqueeze(-4)).square()).sum(-4) / n_used + eps  # [...jch]
    return a_out, mu_out, sig2_out
