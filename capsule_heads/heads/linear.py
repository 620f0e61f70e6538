"""A linear head, and the pooling of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Head, HeadOptions, HeadOutput, Mix, mixed, option, register


@dataclass(frozen=True)
class LinearOptions(HeadOptions):
    """The options of `LinearHead`."""

    pooling: str = option(
        "mean",
        "Pooling of tokens: the mean of all, or the first (BERT's [CLS]) or last one that is not padding.",
        choices=("mean", "first", "last"),
    )


@register("linear")
class LinearHead(Head):
    """One hidden state, pooled over tokens, and an affine map.

    Args:
        hidden_sizes: size of the one hidden state, as a sequence.
        n_out: number of scores.
        **options: fields of `LinearOptions`.
    """

    title = "A linear control head, without capsules,"
    Options = LinearOptions
    takes_one_layer = True
    explains = ("tokens",)
    options: LinearOptions

    def __init__(self, *, hidden_sizes: Sequence[int], n_out: int, **options: Any) -> None:
        super().__init__(hidden_sizes=hidden_sizes, n_out=n_out, **options)
        self.affine = nn.Linear(self.hidden_sizes[0], n_out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight and bias to zero: all classes start alike."""
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)

    def score(
        self,
        hidden_states: Sequence[Tensor],
        masks: Sequence[Tensor],
        return_routing_probabilities: bool,
        mix: Mix | None,
    ) -> HeadOutput:
        """Score pooled tokens; see `Head.score`."""
        x = mixed(hidden_states[0].to(self.affine.weight.dtype), mix)
        return HeadOutput(self.affine(pool_tokens(x, masks[0], self.options.pooling)).float())

    def credits(self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Return the terms of the sum over tokens; see `Head.credits`."""
        weight = self.affine.weight
        weights = token_weights(masks[0].to(weight.dtype), self.options.pooling)
        return [(hidden_states[0].to(weight.dtype) @ weight.mT) * weights.unsqueeze(-1)]


def pool_tokens(x: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool `[batch, tokens, hidden_size]` to `[batch, hidden_size]`; zero if all tokens are masked.

    Args:
        x: the tokens.
        mask: `[batch, tokens]`, from 0 to 1.
        pooling: one of the choices of `LinearOptions`.
    """
    return (token_weights(mask.to(x.dtype), pooling)[:, None] @ x)[:, 0]


def token_weights(mask: Tensor, pooling: str) -> Tensor:
    """Return the weight of each token in the pooled vector, `[batch, tokens]`.

    Args:
        mask: `[batch, tokens]`, from 0 to 1.
        pooling: one of the choices of `LinearOptions`.
    """
    if pooling == "first":  # where the mask rises, which may be at two tokens for texts that were mixed
        mask = (mask - F.pad(mask, (1, 0))[:, :-1]).clamp_min(0)
    elif pooling == "last":  # where it falls
        mask = (mask - F.pad(mask, (0, 1))[:, 1:]).clamp_min(0)
    return mask / mask.sum(-1, keepdim=True).clamp_min(torch.finfo(mask.dtype).eps)
