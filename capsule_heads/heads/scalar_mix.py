"""A head on a learned mix of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Head, HeadOptions, HeadOutput, Mix, mixed, option, register
from .linear import pool_tokens, token_weights


@dataclass(frozen=True)
class ScalarMixOptions(HeadOptions):
    """The options of `ScalarMixHead`."""

    d_inp: int = option(64, "Size of the hidden layer.")


@register("scalar_mix")
class ScalarMixHead(Head):
    """A learned mix of all layers (Peters et al., 2018, arXiv 1802.05365), its mean over tokens, and a hidden layer.

    The mix is `gamma sum_l s_l h_l` with `s = softmax(w)`. A swish stands between the two affine maps.

    Args:
        hidden_sizes: size of each hidden state, all the same.
        n_out: number of scores.
        **options: fields of `ScalarMixOptions`.

    Raises:
        ValueError: If hidden states differ in size, and so cannot be mixed.
    """

    title = "A control head without capsules, which mixes layers,"
    Options = ScalarMixOptions
    explains = ("tokens",)
    options: ScalarMixOptions

    def __init__(self, *, hidden_sizes: Sequence[int], n_out: int, **options: Any) -> None:
        super().__init__(hidden_sizes=hidden_sizes, n_out=n_out, **options)
        if len(set(self.hidden_sizes)) > 1:
            raise ValueError(
                f'Hidden states have sizes {", ".join(map(str, self.hidden_sizes))}; head_type="scalar_mix" adds them '
                "up, and expected one size: name layers that have it, or take another head."
            )
        self.w, self.gamma = nn.Parameter(torch.empty(len(self.hidden_sizes))), nn.Parameter(torch.empty(()))
        self.hidden = nn.Linear(self.hidden_sizes[0], self.options.d_inp)
        self.affine = nn.Linear(self.options.d_inp, n_out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters again: all layers weigh the same, and all classes start alike."""
        nn.init.zeros_(self.w)
        nn.init.ones_(self.gamma)
        nn.init.kaiming_normal_(self.hidden.weight)
        for zeros in (self.hidden.bias, self.affine.weight, self.affine.bias):
            nn.init.zeros_(zeros)

    def score(
        self,
        hidden_states: Sequence[Tensor],
        masks: Sequence[Tensor],
        return_routing_probabilities: bool,
        mix: Mix | None,
    ) -> HeadOutput:
        """Score the mix; see `Head.score`."""
        dtype = self.hidden.weight.dtype
        # The mean over tokens of a mix of layers is the mix of the layers' means, which are small.
        means = [pool_tokens(mixed(x.to(dtype), mix), mask, "mean") for x, mask in zip(hidden_states, masks)]
        pooled = self.gamma * torch.einsum("l,lbd->bd", self.w.softmax(0), torch.stack(means))
        return HeadOutput(self.affine(F.silu(self.hidden(pooled))).float())

    def credits(self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Return how the scores are divided among tokens and layers; see `Head.credits`.

        The input of the swish is a sum of terms, one for each token at each layer. The rise of a hidden unit from all
        terms together is divided in proportion to the terms. This is the closed form of integrated gradients
        (Sundararajan et al., 2017) along the straight path from zero terms.
        """
        weight, bias = self.hidden.weight.double(), self.hidden.bias.double()
        shares = self.gamma.double() * self.w.double().softmax(0)
        terms = [
            share * token_weights(mask.double(), "mean").unsqueeze(-1) * (x.double() @ weight.mT)
            for share, x, mask in zip(shares, hidden_states, masks)
        ]
        total = torch.stack([x.sum(1) for x in terms]).sum(0)
        risen, sigmoid = F.silu(total + bias) - F.silu(bias), bias.sigmoid()
        slope = torch.where(total.abs() > 1e-6, risen / total, sigmoid * (1 + bias * (1 - sigmoid)))  # of the secant
        of_units = (slope.detach().unsqueeze(1) * x @ self.affine.weight.double().mT for x in terms)
        return [x.to(self.hidden.weight.dtype) for x in of_units]
