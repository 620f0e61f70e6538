"""A mixture of linear classifiers, chosen for each token and layer by routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import HeadOptions, HeadOutput, Mix, option, register, reset
from .inputs import TokenHead, attend

_EPS = 1e-3  # smallest variance of a part: votes have a variance of about 1


@dataclass(frozen=True)
class GatedRoutingOptions(HeadOptions):
    """The options of `GatedRoutingHead`."""

    d_inp: int = option(64, "Size of the vectors that hidden states become, and of the query.")
    d_cap: int = option(2, "Size of a vote for a part.")
    n_parts: int = option(16, "Number of parts, each with a linear classifier of its own.")
    n_iters: int = option(2, "Iterations of routing; 1 weights all parts alike.")


@register("gated_routing")
class GatedRoutingHead(TokenHead):
    """A query weights tokens and layers, routing assigns each to parts, and each part has a linear classifier.

    Hidden states become vectors `x_i` as in `TokenDepthHead`, with mask `f_i`. The gate `g_i` is `f_i exp(q x_i /
    sqrt(d_inp))`, divided by its sum over all inputs. Votes `V_ij = x_i W_j + B_j` are routed as in a mixture of
    Gaussians:

        E-step   R_ij = 1 / n_parts; later softmax_j(log n_j + p_j + s log N(V_ij; mu_j, sig2_j + eps))
        M-step   D_ij = g_i R_ij;  n_j = sum_i D_ij;  mu_j, sig2_j: mean and variance of V_ij with weights D_ij / n_j

    The prior `p_j` and the factor `s` are learned. A score is a sum over tokens and layers plus a bias,
    `sum_i sum_j D_ij (u_jk x_i + v_jk) + b_k`, with `D_ij` from the last E-step. Credits are the terms of this sum.
    They take gate and probabilities as given.

    Args:
        hidden_sizes: size of each hidden state.
        n_out: number of scores.
        **options: fields of `GatedRoutingOptions`.
    """

    title = "A mixture of linear classifiers chosen by routing"
    Options = GatedRoutingOptions
    explains = ("tokens",)
    options: GatedRoutingOptions

    def __init__(self, *, hidden_sizes: Sequence[int], n_out: int, **options: Any) -> None:
        super().__init__(hidden_sizes=hidden_sizes, n_out=n_out, **options)
        d_inp, d_cap, n_parts = self.options.d_inp, self.options.d_cap, self.options.n_parts
        self.detect_parts = self.make_detectors(d_inp)
        self.query = nn.Parameter(torch.empty(d_inp))
        self.W_votes = nn.Parameter(torch.empty(d_inp, d_cap, n_parts))
        self.B_votes = nn.Parameter(torch.empty(d_cap, n_parts))
        self.log_prior, self.sharpness = nn.Parameter(torch.empty(n_parts)), nn.Parameter(torch.empty(1))
        self.W_out = nn.Parameter(torch.empty(n_parts, n_out, d_inp))
        self.B_out = nn.Parameter(torch.empty(n_parts, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters again: all inputs weigh alike, all classes start alike, votes are random."""
        reset(self.detect_parts)
        for zeros in (self.query, self.B_votes, self.log_prior, self.W_out, self.B_out, self.bias):
            nn.init.zeros_(zeros)
        nn.init.normal_(self.W_votes, std=len(self.W_votes) ** -0.5)
        nn.init.ones_(self.sharpness)

    def score(
        self,
        hidden_states: Sequence[Tensor],
        masks: Sequence[Tensor],
        return_routing_probabilities: bool,
        mix: Mix | None,
    ) -> HeadOutput:
        """Route, and score the inputs of each part; see `Head.score`."""
        x, gate, R = self._route(hidden_states, masks, mix)
        D = gate.unsqueeze(-1) * R
        scores = torch.einsum("bjd,jkd->bk", D.mT @ x, self.W_out) + D.sum(1) @ self.B_out + self.bias
        return HeadOutput(scores.float(), routing_probabilities=(R,) if return_routing_probabilities else None)

    def credits(self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Return the terms of the sum over tokens and layers; see `Head.credits`."""
        x, gate, R = self._route(hidden_states, masks)
        D = (gate.unsqueeze(-1) * R).detach()
        classified = torch.einsum("bid,jkd->bijk", x, self.W_out) + self.B_out
        credits = torch.einsum("bij,bijk->bik", D, classified)
        return self.split_by_layer(credits, [states.shape[1] for states in hidden_states])

    def _route(
        self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor], mix: Mix | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return vectors `[batch, n_inp, d_inp]`, their gate `[batch, n_inp]` and `R` `[batch, n_inp, n_parts]`."""
        a, x = self.detect(hidden_states, masks, mix)
        x = x.squeeze(-2)
        gate = attend(x @ self.query * x.shape[-1] ** -0.5, a).to(x.dtype)
        votes = (x @ self.W_votes.flatten(1)).unflatten(-1, self.B_votes.shape) + self.B_votes  # [bihj]
        n_parts = len(self.log_prior)
        R = x.new_full((*x.shape[:2], n_parts), 1 / n_parts)
        for _ in range(self.options.n_iters - 1):
            D = gate.unsqueeze(-1) * R
            n = D.sum(1, keepdim=True).clamp_min(torch.finfo(D.dtype).tiny)  # [b1j]; 0 where every input is masked
            shares = (D / n).unsqueeze(2)
            mu = (shares * votes).sum(1, keepdim=True)
            distance = (votes - mu).square()
            sig2 = (shares * distance).sum(1, keepdim=True) + _EPS
            log_density = (distance * (-0.5 / sig2)).sum(2) - 0.5 * sig2.log().sum(2)
            R = (n.log() + self.log_prior + self.sharpness * log_density).softmax(-1)
        return x, gate, R
