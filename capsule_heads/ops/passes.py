"""What streaming and its strategies share: the terms of one pass over the inputs, blocks of them, and work space.

In the shapes `n` counts samples (all batch dimensions) and outputs come last, `[n,c,h,j]`. Inputs are centred,
`x = mu_inp - centre`; then a vote is `u + bias` with `u = x W`, and means are those of `u`. See `streaming`.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import processes


@dataclass(frozen=True)
class Inputs:
    """What every pass reads.

    Attributes:
        mu_inp: `[n,i,c,d]`.
        f_inp: `[n,i]`, the sigmoid of the scores.
        total: `[n,1]`, the sum of `f_inp`, float64.
        centre: `[n,1,c,d]`, of the dtype of `mu_inp`.
        W: `[h,j,d]`, of the dtype of `mu_inp`.
        eps: added to counts and variances.
        memo: what a strategy keeps from pass to pass.
    """

    mu_inp: Tensor
    f_inp: Tensor
    total: Tensor
    centre: Tensor
    W: Tensor
    eps: float
    memo: dict[str, Any] = field(default_factory=dict)

    def centred(self, samples: slice, part: slice, dtype: torch.dtype | None = None) -> Tensor:
        """A block of inputs less their centre, with a column of ones, in the workspace: `x [n,c,i,d+1]`."""
        mu_inp = self.mu_inp[samples, part].transpose(1, 2)  # [ncid]
        n, c, i, d = mu_inp.shape
        x = workspace("x", (n, c, i, d + 1), dtype or mu_inp.dtype, mu_inp.device)
        centre = self.centre[samples].transpose(1, 2)
        if x.dtype == mu_inp.dtype:
            torch.sub(mu_inp, centre, out=x[..., :d])
        else:  # as exact as the wider dtype
            x[..., :d].copy_(mu_inp).sub_(centre)
        x[..., d] = 1.0
        return x


class EStep(NamedTuple):
    """Parameters of `R_ij = softmax_j( log_prior_j - sum_ch (scale_jch (u_ijch - mean_jch))^2 )`; or gradients.

    Attributes:
        log_prior: `[n,j]`.
        mean: `[n,c,h,j]`.
        scale: `[n,c,h,j]`.
    """

    log_prior: Tensor
    mean: Tensor
    scale: Tensor


class Statistics(NamedTuple):
    """What a pass adds up for the M-step.

    Attributes:
        n_used: `[n,j]`, `sum_i D_ij`.
        mean: `[n,c,h,j]`, `sum_i D_ij u_ijch / n_used_j`; anything finite where nothing is used.
        scatter: `[n,c,h,j]`, `sum_i D_ij (u_ijch - mean_jch)^2`, about this very mean.
        kept: `[n,k,j]`, what else the strategy wants to see again in the backward pass.
    """

    n_used: Tensor
    mean: Tensor
    scatter: Tensor
    kept: Tensor | None = None

    def packed(self, n_kept: int) -> Tensor:
        """All of them as one tensor, `[n,1+2ch+k,j]`."""
        kept = self.mean.new_zeros(len(self.mean), n_kept, self.mean.shape[-1]) if self.kept is None else self.kept
        return torch.cat([self.n_used[:, None], self.mean.flatten(1, 2), self.scatter.flatten(1, 2), kept], dim=1)

    @classmethod
    def unpacked(cls, packed: Tensor, c: int, h: int) -> Statistics:
        """The inverse of `packed`."""
        n_used, mean, scatter, kept = packed.tensor_split([1, 1 + c * h, 1 + 2 * c * h], dim=1)
        return cls(n_used[:, 0], mean.unflatten(1, (c, h)), scatter.unflatten(1, (c, h)), kept)

    def merged(self, group: str | None) -> Statistics:
        """With those of the other processes of a group, by Chan's formula; without what is kept of its own inputs."""
        if group is None:
            return self
        own_n_used = self.n_used[:, None, None]
        n_used, sum_u = processes.summed(group, self.n_used, own_n_used * self.mean)
        mean = sum_u / n_used.clamp_min(torch.finfo(n_used.dtype).tiny)[:, None, None]
        (scatter,) = processes.summed(group, self.scatter + own_n_used * (self.mean - mean).square())
        return Statistics(n_used, mean, scatter)


class UseGradient(NamedTuple):
    """The gradient of `D_ij`: `constant_j + sum_ch v_ijch (linear_jch + square_jch v_ijch)`, with `v = u - mean`.

    Attributes:
        constant: `[n,j]`.
        linear: `[n,c,h,j]`; it is also the gradient with respect to `sum_i D_ij u_ijch`.
        square: `[n,c,h,j]`; it is also the gradient with respect to `sum_i D_ij v_ijch^2`.
        mean: `[n,c,h,j]`.
    """

    constant: Tensor
    linear: Tensor
    square: Tensor
    mean: Tensor

    def in_u(self) -> tuple[Tensor, Tensor, Tensor]:
        """As a form in `u`, `constant + sum_ch u (linear + square u)`: `constant`, `linear` and `square`."""
        at_zero = (self.mean * (self.square * self.mean - self.linear)).sum((1, 2))
        return self.constant + at_zero, self.linear - 2.0 * self.square * self.mean, self.square

    def in_z(self, e_step: EStep) -> tuple[Tensor, Tensor, Tensor]:
        """In `z = scale (u - e_step.mean)`, as `constant + sum_ch v (linear + square v)`, `v = z - offset`.

        Returns:
            `offset`, `linear` and `square`, each `[n,c,h,j]`.
        """
        scale = e_step.scale
        return scale * (self.mean - e_step.mean), self.linear / scale, self.square / scale.square()


class Passes(Protocol):
    """What a strategy provides: one pass over the inputs for an iteration, and one for its backward pass."""

    def n_kept(self, d_cov: int, d_inp: int) -> int:
        """The size `k` of `Statistics.kept`."""
        ...

    def uniform_statistics(self, inputs: Inputs) -> tuple[Statistics, Tensor]:
        """Of the first iteration, whose `R_ij` is `1 / n_out`; and what its backward pass needs, `[n,c,d,d+1]`."""
        ...

    def uniform_gradients(
        self, inputs: Inputs, moments: Tensor, d_use: UseGradient, d_mu_inp: Tensor, d_f_inp: Tensor
    ) -> Tensor:
        """Adds to `d_mu_inp [n,i,c,d]` and `d_f_inp [n,i]`, and returns the gradient of `W [h,j,d]`, float64.

        It is called after all `gradients`.
        """
        ...

    def statistics(self, inputs: Inputs, e_step: EStep, R: Tensor | None) -> Statistics:
        """Adds up `D_ij = f_i R_ij`; writes `R [n,i,j]` where it is given."""
        ...

    def gradients(
        self,
        inputs: Inputs,
        e_step: EStep,
        statistics: Statistics,
        d_use: UseGradient,
        d_R: Tensor | None,
        d_mu_inp: Tensor,
        d_f_inp: Tensor,
    ) -> tuple[EStep, Tensor]:
        """Adds to `d_mu_inp [n,i,c,d]` and `d_f_inp [n,i]`, and returns the gradients of `e_step` and `W`."""
        ...


def blocks(n_samples: int, n_inp: int, block_size: int) -> Iterator[tuple[slice, slice]]:
    """Cuts `n_samples x n_inp` inputs into even blocks of about `block_size`: parts of a sample, or whole samples."""
    if n_samples == 0 or n_inp == 0:
        return
    if n_inp >= block_size:
        step = -(-n_inp // -(-n_inp // block_size))
        for sample in range(n_samples):
            for start in range(0, n_inp, step):
                yield slice(sample, sample + 1), slice(start, min(n_inp, start + step))
    else:
        count = block_size // n_inp
        step = -(-n_samples // -(-n_samples // count))
        for start in range(0, n_samples, step):
            yield slice(start, min(n_samples, start + step)), slice(0, n_inp)


def block_size(tensor: Tensor, floats_per_input: int) -> int:
    """How many inputs make a block: its temporaries are several times the cache, or a small part of a GPU's memory.

    Eight times the second-level cache was best where it was measured: with smaller blocks, calls take the time.
    """
    if tensor.device.type == "cpu":
        n_bytes = 8 * _cache_bytes_per_core() * torch.get_num_threads()
    else:
        n_bytes = torch.cuda.get_device_properties(tensor.device).total_memory // 64
    return max(1, n_bytes // (floats_per_input * tensor.element_size()))


@functools.cache
def _cache_bytes_per_core() -> int:
    """The second-level cache of a core: a block that fits is not written to memory between operations."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()  # Linux: "2048K"
        return int(size.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 2**20


def exp_(logits: Tensor) -> Tensor:
    """In place, `exp`, or 0 where it is close to the smallest normal number: below 1e-34 in float32.

    Beside the weight of the largest logit, 1, that is as good as 0. And processors are many times slower with numbers
    below the smallest normal one: `exp` where it underflows, and whatever else multiplies its results.
    """
    lowest = 0.9 * math.log(torch.finfo(logits.dtype).tiny)
    weights = logits.clamp_min_(lowest).exp_()
    return F.threshold_(weights, 1.001 * math.exp(lowest), 0.0)


def use(weights: Tensor, sum_weights: Tensor, f_inp: Tensor, R: Tensor | None) -> Tensor:
    """A block's `D = f R`, in the place of `weights [n,j,i]`, where `R = weights / sum_weights`.

    Args:
        weights: `[n,j,i]`.
        sum_weights: `[n,1,i]`.
        f_inp: `[n,1,i]`.
        R: `[n,i,j]`, to write to; or None.
    """
    if R is None:
        return weights.mul_(f_inp / sum_weights)
    R.copy_(weights.div_(sum_weights).mT)
    return weights.mul_(f_inp)


def use_backward(D: Tensor, d_D: Tensor, f_inp: Tensor, d_f_inp: Tensor, d_logits_of_R: Tensor | None) -> Tensor:
    """Back through a block's `D = f softmax(logits)`: adds to `d_f_inp [n,i]`; `d_logits`, in the place of `d_D [nji]`.

    Where `f` is 0, so is `D`, and so is the gradient of the score, whatever is added to that of `f`.
    """
    d_logits = d_D.mul_(D)
    d_f = d_logits.sum(1, keepdim=True) / f_inp.clamp_min(torch.finfo(f_inp.dtype).tiny)
    d_f_inp += d_f[:, 0]
    d_logits.addcmul_(D, d_f, value=-1.0)
    return d_logits if d_logits_of_R is None else d_logits.add_(d_logits_of_R)


def d_logits_of_R(weights: Tensor, sum_weights: Tensor, d_R: Tensor | None) -> Tensor | None:
    """What the gradient `[n,i,j]` of `R`, where it is an output, adds to that of a block's logits, `[n,j,i]`."""
    if d_R is None:
        return None
    R = weights / sum_weights
    d_logits = d_R.mT * R
    return d_logits - R * d_logits.sum(1, keepdim=True)


class Workspace(threading.local):
    """Buffers for the temporaries of a block, used again for the next: to allocate anew costs page faults on the CPU.

    They stay, for the next call as well: as much as a block takes, for each thread that routes.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor, which holds until the same name is asked for again."""
        numel = math.prod(shape)
        key = (name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside it
                buffer = self._buffers[key] = torch.empty(numel, dtype=dtype, device=device)
        return buffer[:numel].view(shape)

    def like(self, name: str, tensor: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """The same with the dtype and device of a tensor, and its shape unless another is given."""
        return self(name, tensor.shape if shape is None else shape, tensor.dtype, tensor.device)


workspace = Workspace()
