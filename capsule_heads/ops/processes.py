"""Sums over processes that route together, each with a part of the inputs.

A group of processes is given by its name here, as operators of torch take no group. None is this process alone.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def n_processes(group: str | None) -> int:
    """Return the number of processes."""
    return 1 if group is None else _resolved(group).size()


def summed(group: str | None, *tensors: Tensor) -> list[Tensor]:
    """Sum tensors over all processes, in one all-reduce in float64; every process gets the same bits."""
    if group is None:
        return list(tensors)
    flat = torch.cat([tensor.flatten().double() for tensor in tensors])
    dist.all_reduce(flat, group=_resolved(group))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors)]


def _resolved(group: str) -> dist.ProcessGroup:
    # As in torch's own functional collectives. Some versions of torch have a type of their own for group names.
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
