"""The learning-rate schedule of the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class OneCycle(LRScheduler):
    """One cycle of the learning rate, and an opposite cycle of beta1.

    The learning rate rises linearly from `min_lr` to the optimizer's own value over the warm-up, then falls by a half
    cosine to `min_lr`. Beta1 falls from the optimizer's own value to `min_beta1`, then rises back. An optimizer without
    betas keeps its momentum.

    Args:
        optimizer: its learning rates and beta1 are the peaks.
        n_steps: steps of the complete cycle.
        n_warmup_steps: steps of the learning rate's rise.
        min_lr: learning rate at both ends; one for all parameter groups, or one for each.
        min_beta1: beta1 at the learning rate's peak.
        last_epoch: as in torch.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        n_steps: int,
        n_warmup_steps: int,
        min_lr: float | Sequence[float],
        min_beta1: float,
        last_epoch: int = -1,
    ) -> None:
        self.n_steps, self.n_warmup_steps = n_steps, n_warmup_steps
        self.min_lr, self.min_beta1 = min_lr, min_beta1
        for group in optimizer.param_groups:
            if "betas" in group:
                group.setdefault("initial_beta1", group["betas"][0])  # as torch does for the learning rate
        super().__init__(optimizer, last_epoch)

    def height(self) -> float:
        """Return how far up the cycle the current step is: 0 at both ends, 1 at the peak."""
        step = min(self.last_epoch, self.n_steps)
        if step < self.n_warmup_steps:
            return step / self.n_warmup_steps
        progress = (step - self.n_warmup_steps) / max(1, self.n_steps - self.n_warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * progress))

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each parameter group at the current step."""
        lows = self.min_lr if isinstance(self.min_lr, Sequence) else [self.min_lr] * len(self.base_lrs)
        return [low + (peak - low) * self.height() for low, peak in zip(lows, self.base_lrs, strict=True)]

    def step(self, epoch: int | None = None) -> None:
        """Advance by one step, as in torch, and set beta1 too."""
        super().step(epoch)
        self._set_beta1()

    def apply(self) -> None:
        """Set the learning rates and beta1 of the current step."""
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr
        self._set_beta1()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the current step of another cycle, and continue this cycle from there."""
        super().load_state_dict({name: state_dict[name] for name in ("last_epoch", "_step_count")})
        self.apply()

    def _set_beta1(self) -> None:
        for group in self.optimizer.param_groups:
            if "initial_beta1" in group:
                beta1 = group["initial_beta1"] + (self.min_beta1 - group["initial_beta1"]) * self.height()
                group["betas"] = (beta1, *group["betas"][1:])
