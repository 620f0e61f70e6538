"""What a computation ran on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def describe_hardware(device: torch.device, n_processes: int = 1) -> str:
    """Return the hardware of a computation, such as "NVIDIA H200" or "AMD EPYC 9R45, 2 threads".

    Args:
        device: where each process computes.
        n_processes: number of processes that compute together.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        n_threads = torch.get_num_threads()
        name = f"{processor_name()}, {n_threads} thread{'' if n_threads == 1 else 's'}"
    else:
        name = device.type
    return name if n_processes == 1 else f"{n_processes} processes: {name} each"


def processor_name() -> str:
    """Return the name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, where platform knows the architecture alone
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
