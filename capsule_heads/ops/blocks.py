"""Blocks of inputs, the arithmetic within a block, and the buffers for its temporaries."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def blocks(n_samples: int, n_inp: int, block_size: int) -> Iterator[tuple[slice, slice]]:
    """Cut `n_samples x n_inp` inputs into even blocks of about `block_size`: parts of a sample, or whole samples."""
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
    """Return the number of inputs of a block.

    On the CPU its temporaries take eight times the second-level cache, which was best in measurements: with smaller
    blocks, calls take the time. On a GPU they take a small part of its memory.
    """
    if tensor.device.type == "cpu":
        n_bytes = 8 * _cache_bytes_per_core() * torch.get_num_threads()
    else:
        n_bytes = torch.cuda.get_device_properties(tensor.device).total_memory // 64
    return max(1, n_bytes // (floats_per_input * tensor.element_size()))


@functools.cache
def _cache_bytes_per_core() -> int:
    """Return the size of the second-level cache of a core."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()  # Linux: "2048K"
        return int(size.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 2**20


def exp_(logits: Tensor) -> Tensor:
    """Compute `exp` in place, with 0 for results close to the smallest normal number (below 1e-34 in float32).

    Beside the weight of the largest logit, which is 1, such results are as good as 0. Processors are many times slower
    with numbers below the smallest normal one, both in `exp` and in products with its results.
    """
    lowest = 0.9 * math.log(torch.finfo(logits.dtype).tiny)
    weights = logits.clamp_min_(lowest).exp_()
    return torch.threshold_(weights, 1.001 * math.exp(lowest), 0.0)


def use(weights: Tensor, sum_weights: Tensor, f_inp: Tensor, R: Tensor | None) -> Tensor:
    """Compute a block's `D = f R` in the memory of `weights [n,j,i]`, where `R = weights / sum_weights`.

    Args:
        weights: `[n,j,i]`.
        sum_weights: `[n,1,i]`.
        f_inp: `[n,1,i]`.
        R: `[n,i,j]`, to write the probabilities to; or None.

    Returns:
        `D [n,j,i]`.
    """
    if R is None:
        return weights.mul_(f_inp / sum_weights)
    R.copy_(weights.div_(sum_weights).mT)
    return weights.mul_(f_inp)


def use_backward(D: Tensor, d_D: Tensor, f_inp: Tensor, d_f_inp: Tensor, d_logits_of_R: Tensor | None) -> Tensor:
    """Go back through a block's `D = f softmax(logits)`: add to `d_f_inp [n,i]`, and return `d_logits [n,j,i]`.

    The memory of `d_D` is reused. Where `f` is 0, `D` is 0 too. The gradient of the score is then 0, whatever is added
    to the gradient of `f`.
    """
    d_logits = d_D.mul_(D)
    d_f = d_logits.sum(1, keepdim=True) / f_inp.clamp_min(torch.finfo(f_inp.dtype).tiny)
    d_f_inp += d_f[:, 0]
    d_logits.addcmul_(D, d_f, value=-1.0)
    return d_logits if d_logits_of_R is None else d_logits.add_(d_logits_of_R)


def d_logits_of_R(weights: Tensor, sum_weights: Tensor, d_R: Tensor | None) -> Tensor | None:
    """Return what the gradient of `R`, `[n,i,j]` or None, adds to the gradient of a block's logits, `[n,j,i]`."""
    if d_R is None:
        return None
    R = weights / sum_weights
    d_logits = d_R.mT * R
    return d_logits - R * d_logits.sum(1, keepdim=True)


class Workspace(threading.local):
    """Buffers for the temporaries of a block. The next block and the next call use them again.

    New allocations would cost page faults on the CPU. Each thread that routes keeps the memory of one block. Other
    devices allocate new buffers in each call: each stream and each graph has memory of its own, and two of them may
    run at once.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor, which is valid until the same name is requested again."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        numel = math.prod(shape)
        key = (name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside it
                buffer = self._buffers[key] = torch.empty(numel, dtype=dtype, device=device)
        return buffer[:numel].view(shape)

    def like(self, name: str, tensor: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a buffer with the dtype and device of a tensor, and its shape unless another is given."""
        return self(name, tensor.shape if shape is None else shape, tensor.dtype, tensor.device)


workspace = Workspace()
