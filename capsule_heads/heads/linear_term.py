"""The linear term of a classifier: a regression on pooled hidden states, beside the head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Mix, mixed
from .linear import pool_tokens, token_weights


class LinearTerm(nn.Module):
    """An affine map of the means of all hidden states over their tokens, beside a head.

    `y_k = b_k + sum_l w_lk . mean_t h_tl` is a sum over tokens `t` and layers `l`, so its credits are exact:
    `w_lk . h_tl / n_tokens` for each token, and the bias for no token. The weights start at 0. `CapsuleTrainer` solves
    for them before training (`capsule_heads.training.regression`), and training leaves them as they are.

    Args:
        hidden_sizes: size of each hidden state.
        n_out: number of scores.
    """

    def __init__(self, hidden_sizes: Sequence[int], n_out: int) -> None:
        super().__init__()
        self.hidden_sizes = list(hidden_sizes)
        # No random number is drawn here, so a training run draws the same ones with a linear term and without.
        affine = nn.Linear(sum(hidden_sizes), n_out, device="meta")
        self.affine = affine.to_empty(device=torch.get_default_device())
        self.requires_grad_(False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)

    def pool(self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """Return the means over tokens of all layers side by side, `[batch, sum of hidden sizes]`.

        Args:
            hidden_states: per layer `[batch, tokens, hidden_size]`.
            masks: per layer `[batch, tokens]`.
        """
        dtype = self.affine.weight.dtype
        with torch.autocast(hidden_states[0].device.type, enabled=False):
            pooled = [pool_tokens(x.to(dtype), mask, "mean") for x, mask in zip(hidden_states, masks, strict=True)]
        return torch.cat(pooled, dim=-1)

    def forward(self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor], mix: Mix | None = None) -> Tensor:
        """Return the scores `[batch, n_out]`, in float32 or wider.

        Args:
            hidden_states: as in `pool`.
            masks: as in `pool`, before mixup.
            mix: mixes the samples of a batch (mixup). It is applied to the means over tokens.
        """
        pooled = mixed(self.pool(hidden_states, masks), mix)
        with torch.autocast(pooled.device.type, enabled=False):
            scores = self.affine(pooled)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def credits(self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Return the terms of the sum per layer, `[batch, tokens, n_out]`; added to the bias, they give the scores."""
        weight = self.affine.weight
        of_layers = weight.to(torch.promote_types(weight.dtype, torch.float32)).split(self.hidden_sizes, dim=1)
        credits = []
        for x, mask, of_layer in zip(hidden_states, masks, of_layers, strict=True):
            weights = token_weights(mask.to(of_layer.dtype), "mean")
            credits.append((x.to(of_layer.dtype) @ of_layer.mT) * weights.unsqueeze(-1))
        return credits
