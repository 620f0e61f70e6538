"""Heads: what turns a backbone's hidden states into class scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Routing


class HeadOutput(NamedTuple):
    """What a head returns.

    Attributes:
        a_out: `[batch, n_out]`, scores of the output capsules, as logits.
        mu_out: `[batch, n_out, 1, d_cap]`, their poses (means).
        sig2_out: `[batch, n_out, 1, d_cap]`, their variances.
        routing_probabilities: per routing `[batch, n_inp, n_out]`, or None if not asked for. Inputs of the first
            routing are ordered `token * depth + depth index`.
    """

    a_out: Tensor
    mu_out: Tensor
    sig2_out: Tensor
    routing_probabilities: tuple[Tensor, ...] | None


class TokenDepthHead(nn.Module):
    """The paper's text head: every token at every depth is a capsule, routed to parts, routed to classes.

    A learned embedding of depth is added to the hidden states; an affine map, swish and layer normalisation make each
    one a capsule of `1 x d_inp`, with its token's mask as score; these are routed to `n_parts` capsules of `1 x d_cap`,
    and those to `n_out` capsules of `1 x d_cap`, whose scores are the logits (Heinsen, 2019, section 4.2).

    Args:
        d_depth: number of hidden states.
        d_emb: their width.
        n_out: number of output capsules; None to stop at the parts, which are then the output.
        d_inp: width of the capsules that hidden states become.
        n_parts: number of part capsules.
        d_cap: width of part and output capsules.
        n_iters: iterations of each routing.
        p_model: "gaussian" or "skm".
        single_beta: whether the routings share one beta for use and ignorance.
        eps: of the routings.
        strategy: of the first routing, which does almost all the work. That of the parts, each with its own weights, is
            "auto".
    """

    def __init__(
        self,
        *,
        d_depth: int,
        d_emb: int,
        n_out: int | None,
        d_inp: int = 64,
        n_parts: int = 64,
        d_cap: int = 2,
        n_iters: int = 3,
        p_model: str = "gaussian",
        single_beta: bool = False,
        eps: float = 1e-5,
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        options = {"n_iters": n_iters, "p_model": p_model, "single_beta": single_beta, "eps": eps}
        self.depth_emb = nn.Parameter(torch.empty(d_depth, d_emb))
        self.detect_parts = nn.Sequential(nn.Linear(d_emb, d_inp), nn.SiLU(), nn.LayerNorm(d_inp))
        self.routings = nn.ModuleList([Routing(1, d_inp, d_cap, n_out=n_parts, strategy=strategy, **options)])
        if n_out is not None:
            self.routings.append(Routing(1, d_cap, d_cap, n_inp=n_parts, n_out=n_out, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as the paper does: depth embeddings and biases zero, the affine map Kaiming normal."""
        nn.init.zeros_(self.depth_emb)
        nn.init.kaiming_normal_(self.detect_parts[0].weight)
        nn.init.zeros_(self.detect_parts[0].bias)
        self.detect_parts[2].reset_parameters()
        for routing in self.routings:
            routing.reset_parameters()

    def forward(
        self, hidden_states: Sequence[Tensor], mask: Tensor, return_routing_probabilities: bool = False
    ) -> HeadOutput:
        """Scores each class.

        Args:
            hidden_states: `d_depth` tensors `[batch, tokens, d_emb]`.
            mask: `[batch, tokens]`, in [0, 1]: 1 for a token, 0 for padding, a fraction for a share of a token (mixup).
            return_routing_probabilities: whether to return those of each routing.

        Returns:
            A `HeadOutput`.

        Raises:
            ValueError: for another number of hidden states than `d_depth`, or shapes that do not fit.
        """
        if len(hidden_states) != len(self.depth_emb):
            raise ValueError(
                f"{len(hidden_states)} hidden states were passed to a head built for d_depth={len(self.depth_emb)}; "
                "expected one per depth: the embeddings, say, and the output of every layer."
            )
        affine, swish, norm = self.detect_parts
        # W (x + e) + b = W x + (W e + b): nothing of the size token x depth x width is made. [batch, tokens, depth, d]
        offsets = affine(self.depth_emb)
        parts = torch.stack([F.linear(x, affine.weight) + e for x, e in zip(hidden_states, offsets)], dim=2)
        x = norm(swish(parts)).flatten(1, 2).unsqueeze(-2)  # [batch, i, 1, d_inp], i = token * d_depth + depth
        # In float32 also where x is bfloat16, which would round a mixed mask to two digits.
        mask = mask.to(torch.promote_types(x.dtype, torch.float32))
        a = torch.logit(mask).repeat_interleave(len(hidden_states), dim=1)  # [batch, i]

        routing_probabilities = []
        for routing in self.routings:
            a, x, sig2, *R = routing(a, x, return_R=return_routing_probabilities)
            routing_probabilities += R
        return HeadOutput(a, x, sig2, tuple(routing_probabilities) if return_routing_probabilities else None)
