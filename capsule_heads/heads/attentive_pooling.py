"""A head that attends to all tokens at all layers with one query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import HeadOptions, HeadOutput, Mix, option, register, reset
from .inputs import TokenHead


@dataclass(frozen=True)
class AttentivePoolingOptions(HeadOptions):
    """The options of `AttentivePoolingHead`."""

    d_inp: int = option(64, "Size of the vectors that hidden states become, and of the query.")


@register("attentive_pooling")
class AttentivePoolingHead(TokenHead):
    """A learned query that attends to all tokens at all layers, and an affine map of the result.

    Hidden states become vectors `x_i` as in `TokenDepthHead`: layer embedding, affine map, swish, normalisation. With a
    mask `f_i`, the weight `w_i` of each is `f_i exp(q x_i / sqrt(d_inp))`, over the sum of all. A score is then a sum
    over tokens and layers, `sum_i w_i (A x_i)_k`, and a bias.

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
        self.query = nn.Parameter(torch.empty(self.options.d_inp))
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
        weights, x = self._attend(hidden_states, masks, mix)
        return HeadOutput(self.affine(torch.einsum("bi,bid->bd", weights, x)).float())

    def credits(self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Return the terms of the sum over tokens and layers; see `Head.credits`."""
        weights, x = self._attend(hidden_states, masks)
        return self.split_by_layer(
            weights.detach().unsqueeze(-1) * (x @ self.affine.weight.mT), [x.shape[1] for x in hidden_states]
        )

    def _attend(
        self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor], mix: Mix | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the weights `[batch, n_inp]` of vectors, and these, `[batch, n_inp, d_inp]`."""
        a, x = self.detect(hidden_states, masks, mix)
        x = x.squeeze(-2)  # [bid]
        scores = (x @ self.query) * x.shape[-1] ** -0.5
        # Where all is masked the weights are 0, not NaN.
        weights = (scores + F.logsigmoid(a).clamp_min(torch.finfo(torch.float32).min)).softmax(-1) * (a > -torch.inf)
        return weights.to(x.dtype), x
