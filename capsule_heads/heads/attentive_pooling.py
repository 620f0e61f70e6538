"""A head that attends to all tokens at all layers with learned queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import HeadOptions, HeadOutput, Mix, option, register, reset
from .inputs import TokenHead, attend


@dataclass(frozen=True)
class AttentivePoolingOptions(HeadOptions):
    """The options of `AttentivePoolingHead`."""

    d_inp: int = option(64, "Size of the vectors that hidden states become, and of a query.")
    n_queries: int = option(1, "Number of queries; each pools its own slice of the vectors.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_inp % self.n_queries:
            raise ValueError(
                f"n_queries is {self.n_queries}, and d_inp {self.d_inp}; expected a divisor of d_inp: each query "
                "pools an equal slice of the vectors."
            )


@register("attentive_pooling")
class AttentivePoolingHead(TokenHead):
    """Learned queries that attend to all tokens at all layers, and an affine map of the pooled vectors.

    Hidden states become vectors `x_i` as in `TokenDepthHead`: layer embedding, affine map, swish, normalisation. Each
    vector is cut into slices `x_iq`, one for each query. The weight `w_iq` is `f_i exp(q x_i / sqrt(d_inp))` with the
    mask `f_i`, divided by its sum over all inputs. A score is a sum over tokens and layers plus a bias,
    `sum_i sum_q w_iq (A_q x_iq)_k + b_k`. Several queries are taken from Efficient Probing, without its other parts
    (Psomas et al., 2026, arXiv 2506.10178).

    Args:
        hidden_sizes: size of each hidden state.
        n_out: number of scores.
        **options: fields of `AttentivePoolingOptions`.
    """

    title = "A control head without capsules, which attends to tokens and layers,"
    Options = AttentivePoolingOptions
    explains = ("tokens",)
    options: AttentivePoolingOptions

    def __init__(self, *, hidden_sizes: Sequence[int], n_out: int, **options: Any) -> None:
        super().__init__(hidden_sizes=hidden_sizes, n_out=n_out, **options)
        self.detect_parts = self.make_detectors(self.options.d_inp)
        n_queries, d_inp = self.options.n_queries, self.options.d_inp
        # A single query is a vector, as in checkpoints from before there could be several.
        self.query = nn.Parameter(torch.empty(d_inp) if n_queries == 1 else torch.empty(n_queries, d_inp))
        self.affine = nn.Linear(self.options.d_inp, n_out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters again: the query attends to all alike, and all classes start alike."""
        reset(self.detect_parts)
        for zeros in (self.query, self.affine.weight, self.affine.bias):
            nn.init.zeros_(zeros)

    def score(
        self,
        hidden_states: Sequence[Tensor],
        masks: Sequence[Tensor],
        return_routing_probabilities: bool,
        mix: Mix | None,
    ) -> HeadOutput:
        """Score what the query attends to; see `Head.score`."""
        weights, slices = self._attend(hidden_states, masks, mix)
        return HeadOutput(self.affine(torch.einsum("bqi,biqd->bqd", weights, slices).flatten(1)).float())

    def credits(self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Return the terms of the sum over tokens and layers; see `Head.credits`."""
        weights, slices = self._attend(hidden_states, masks)
        weighted = weights.detach().mT.unsqueeze(-1) * slices
        return self.split_by_layer(weighted.flatten(2) @ self.affine.weight.mT, [x.shape[1] for x in hidden_states])

    def _attend(
        self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor], mix: Mix | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return weights `[batch, n_queries, n_inp]`, and slices of vectors, `[batch, n_inp, n_queries, size]`."""
        a, x = self.detect(hidden_states, masks, mix)
        x = x.squeeze(-2)  # [bid]
        queries = self.query.view(self.options.n_queries, -1)
        weights = attend(queries @ x.mT * x.shape[-1] ** -0.5, a.unsqueeze(1))
        return weights.to(x.dtype), x.unflatten(-1, (len(queries), -1))
