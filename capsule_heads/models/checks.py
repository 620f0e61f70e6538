"""Checks that configurations and loading share."""

from __future__ import annotations

import torch


def check_size(name: str, size: object) -> None:
    """Checks a number of things, or a width.

    Raises:
        ValueError: if it is no positive whole number.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} is {size!r}; expected a positive whole number.")


def check_dtype(dtype: object) -> None:
    """Checks a dtype as transformers takes it: a `torch.dtype` or its name, "auto", or None.

    Raises:
        ValueError: if it is none of these.
    """
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in (None, "auto") and not isinstance(named, torch.dtype):
        raise ValueError(f'dtype is {dtype!r}; expected a torch.dtype or the name of one, such as "bfloat16".')
