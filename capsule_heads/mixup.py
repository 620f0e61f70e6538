"""Mixup (Zhang et al., 2018, arXiv 1710.09412), with one ratio per sample, as in the paper of routing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta


def draw_mixup(n_samples: int, alpha: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw a partner from the batch for each sample, and the fraction of itself that the sample keeps.

    Args:
        n_samples: batch size.
        alpha: both parameters of the Beta distribution of the fractions.
        device: where to put the result. The draws come from torch's generator for the CPU, so they are the same on
            every device, and nothing waits for a device.

    Returns:
        `ratio [batch]`, float32 in [0, 1], and `partner [batch]`, a permutation of the batch's indices.
    """
    concentration = torch.full((n_samples,), float(alpha))
    ratio, partner = Beta(concentration, concentration).sample(), torch.randperm(n_samples)
    if device.type != "cuda" or torch.compiler.is_compiling():
        return ratio.to(device), partner.to(device)
    return ratio.pin_memory().to(device, non_blocking=True), partner.pin_memory().to(device, non_blocking=True)


def mix(tensor: Tensor, ratio: Tensor, partner: Tensor) -> Tensor:
    """Mix each sample with its partner: `ratio * tensor + (1 - ratio) * tensor[partner]`.

    Args:
        tensor: `[batch, ...]`, floating point.
        ratio: `[batch]`, the fraction of itself that each sample keeps.
        partner: `[batch]`, the index of each sample's partner.

    Returns:
        `[batch, ...]`, of the tensor's dtype.
    """
    ratio = ratio.to(tensor.dtype).view(-1, *[1] * (tensor.ndim - 1))
    return torch.lerp(tensor.index_select(0, partner), tensor, ratio)  # an index would be sorted in the backward pass
