"""Routing of vectors (Heinsen, 2022), and a head that uses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_size
from .base import HeadOptions, HeadOutput, Mix, option, register
from .inputs import TokenHead


class VectorRouting(nn.Module):
    """Routing of vectors to the vectors that best predict them (Heinsen, 2022, arXiv 2211.11754), in efficient form.

    The inputs are `x_i [d]`, the outputs `y_j [h]`, and the mask is `m_i` with `n = sum_i m_i`. `N` normalises to mean
    0 and variance 1, and `*` multiplies element by element::

        z_i = x_i / sqrt(n)          f_i = m_i sigmoid(w_A z_i + b_A)
        V_ij = (w_F1_j * z_i) W_F2 + b_F2_j                              votes
        then n_iters times
        E-step   R_ij = 1 / n_out; later softmax_j(logsigmoid(w_S_j (x_i u_j) + b_S_j)),
                 u_j = w_G2_j * (N(y_j) W_G1) + b_G2_j                   what output j predicts
        D-step   D_use_ij = f_i R_ij            D_ign_ij = f_i - D_use_ij
        M-step   credit_ij = beta_use_ij D_use_ij - beta_ign_ij D_ign_ij
                 y_j = sum_i credit_ij V_ij = (w_F1_j * sum_i credit_ij z_i) W_F2 + b_F2_j sum_i credit_ij

    The last form needs no votes, so memory is linear in inputs and outputs. Without `n_inp`, one set of parameters
    serves any number of inputs, and the betas are affine functions of `x_i`. The equations are those of the author's
    published implementation, not checked line by line against the paper. The mask is an addition to them: with it,
    padding changes nothing. Outputs of a size above 1 are normalised at the end.

    Args:
        n_out: number of outputs, 2 or more.
        d_inp: size of an input.
        d_out: size of an output.
        n_inp: number of inputs, each with parameters of its own; None for any number with shared ones.
        n_iters: iterations; the paper's are 2.
    """

    def __init__(self, *, n_out: int, d_inp: int, d_out: int, n_inp: int | None = None, n_iters: int = 2) -> None:
        super().__init__()
        for name, size in (("n_out", n_out), ("d_inp", d_inp), ("d_out", d_out), ("n_iters", n_iters)):
            check_size(name, size)
        check_size("n_inp", n_inp, or_none="variable")
        if n_out < 2:
            raise ValueError(f"n_out is {n_out}; expected 2 or more: a single output has nothing to compete with.")
        self.n_inp, self.n_iters, self.d_out = n_inp, n_iters, d_out
        i = n_inp or 1
        self.W_A, self.B_A = nn.Parameter(torch.empty(i, d_inp)), nn.Parameter(torch.empty(i))
        self.W_F1 = nn.Parameter(torch.empty(n_out, d_inp))
        self.W_F2, self.B_F2 = nn.Parameter(torch.empty(d_inp, d_out)), nn.Parameter(torch.empty(n_out, d_out))
        self.W_G1, self.W_G2 = nn.Parameter(torch.empty(d_out, d_inp)), nn.Parameter(torch.empty(n_out, d_inp))
        self.B_G2 = nn.Parameter(torch.empty(n_out, d_inp))
        self.W_S, self.B_S = nn.Parameter(torch.empty(i, n_out)), nn.Parameter(torch.empty(i, n_out))
        shape = (n_inp, n_out) if n_inp else (d_inp, n_out)
        self.beta_use, self.beta_ign = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.B_use: nn.Parameter | None = None
        self.B_ign: nn.Parameter | None = None
        if n_inp is None:
            self.B_use, self.B_ign = nn.Parameter(torch.empty(n_out)), nn.Parameter(torch.empty(n_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters again, with the paper's scales; betas of inputs have the scale of `nn.Linear`."""
        d_inp, d_out = self.W_F2.shape
        for weight in (self.W_A, self.W_F2):
            nn.init.normal_(weight, std=2 * d_inp**-0.5)
        nn.init.normal_(self.W_G1, std=d_out**-0.5)
        nn.init.normal_(self.W_S, std=d_inp**-0.5)
        for weight in (self.W_F1, self.W_G2):
            nn.init.normal_(weight)
        for beta in (self.beta_use, self.beta_ign):
            nn.init.normal_(beta, std=1.0 if self.n_inp else (3 * d_inp) ** -0.5)
        for bias in (self.B_A, self.B_F2, self.B_G2, self.B_S, self.B_use, self.B_ign):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_inp: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route.

        Args:
            x_inp: `[...id]`.
            mask: `[...i]`, in [0, 1]; None for all ones.

        Returns:
            `x_out [...jh]`, and the credits `[...ij]` of the last iteration.

        Raises:
            ValueError: If there are more or fewer inputs than the layer was built for, or if they have another size.
        """
        if x_inp.ndim < 2 or x_inp.shape[-1] != len(self.W_F2):
            raise ValueError(f"x_inp has shape {tuple(x_inp.shape)}; expected [..., n_inp, d_inp={len(self.W_F2)}].")
        if self.n_inp is not None and x_inp.shape[-2] != self.n_inp:
            raise ValueError(f"x_inp has {x_inp.shape[-2]} vectors; this layer was built for n_inp={self.n_inp}.")
        mask = x_inp.new_ones(x_inp.shape[:-1]) if mask is None else mask.to(x_inp.dtype)
        scaled = x_inp * mask.sum(-1).clamp_min(1.0)[..., None, None] ** -0.5
        f_inp = (mask * ((scaled * self.W_A).sum(-1) + self.B_A).sigmoid()).unsqueeze(-1)  # [...i1]
        beta_use: Tensor
        beta_ign: Tensor
        if self.B_use is not None and self.B_ign is not None:
            beta_use, beta_ign = x_inp @ self.beta_use + self.B_use, x_inp @ self.beta_ign + self.B_ign  # [...ij]
        else:
            beta_use, beta_ign = self.beta_use, self.beta_ign
        x_out, n_out = f_inp.new_empty(0), len(self.W_F1)
        for iteration in range(self.n_iters):
            # E-step
            if iteration == 0:
                R = f_inp.new_full((n_out,), 1 / n_out)
            else:
                predicted = (self._normalised(x_out) @ self.W_G1) * self.W_G2 + self.B_G2  # [...jd]
                R = F.logsigmoid(x_inp @ predicted.mT * self.W_S + self.B_S).softmax(-1)
            # D-step
            D_use = f_inp * R
            D_ign = f_inp - D_use
            # M-step
            credits = beta_use * D_use - beta_ign * D_ign
            x_out = ((credits.mT @ scaled) * self.W_F1) @ self.W_F2 + credits.sum(-2).unsqueeze(-1) * self.B_F2
        return self._normalised(x_out), credits

    def _normalised(self, x_out: Tensor) -> Tensor:
        return F.layer_norm(x_out, x_out.shape[-1:]) if self.d_out > 1 else x_out


@dataclass(frozen=True)
class VectorRoutingOptions(HeadOptions):
    """The options of `VectorRoutingHead`."""

    d_inp: int = option(64, "Size of the vectors that hidden states become, and of the parts.")
    n_parts: int = option(64, "Number of part vectors.")
    n_iters: int = option(2, "Iterations of each routing.")


@register("vector_routing")
class VectorRoutingHead(TokenHead):
    """All tokens at all layers, routed as vectors to parts, routed to class scores (Heinsen, 2022).

    Hidden states become vectors as in `TokenDepthHead`, with the same mask. They are routed to `n_parts` vectors of
    the same size, and these to one number for each class.

    Args:
        hidden_sizes: size of each hidden state.
        n_out: number of scores, 2 or more.
        **options: fields of `VectorRoutingOptions`.
    """

    title = "A vector-routing control head"
    Options = VectorRoutingOptions
    options: VectorRoutingOptions

    def __init__(self, *, hidden_sizes: Sequence[int], n_out: int, **options: Any) -> None:
        super().__init__(hidden_sizes=hidden_sizes, n_out=n_out, **options)
        d_inp, n_parts, n_iters = self.options.d_inp, self.options.n_parts, self.options.n_iters
        self.detect_parts = self.make_detectors(d_inp)
        self.to_parts = VectorRouting(n_out=n_parts, d_inp=d_inp, d_out=d_inp, n_iters=n_iters)
        self.to_classes = VectorRouting(n_out=n_out, d_inp=d_inp, d_out=1, n_inp=n_parts, n_iters=n_iters)

    def score(
        self,
        hidden_states: Sequence[Tensor],
        masks: Sequence[Tensor],
        return_routing_probabilities: bool,
        mix: Mix | None,
    ) -> HeadOutput:
        """Route; see `Head.score`. Vector routing has credits instead of probabilities, and returns none."""
        a, x = self.detect(hidden_states, masks, mix)
        parts, _ = self.to_parts(x.squeeze(-2), a.sigmoid())
        scores, _ = self.to_classes(parts)
        return HeadOutput(scores.squeeze(-1).float())
