"""Checks that layers, heads, configurations and loading share."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def is_readable(tensor: Tensor) -> bool:
    """Return whether the values of a tensor may be checked.

    On another device than the CPU that would wait for the device. While compiling it would break the graph.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_size(name: str, size: object, or_none: str | None = None) -> None:
    """Checks a number of things, or a width.

    Args:
        name: what it is the size of.
        size: the number.
        or_none: what None stands for; without it, None is none.

    Raises:
        ValueError: if it is no positive whole number.
    """
    if size is None and or_none is not None:
        return
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        alternative = "" if or_none is None else f" or None ({or_none})"
        raise ValueError(f"{name} is {size!r}; expected a positive whole number{alternative}.")


def check_widths(d_emb: object, at_most: int | None = None) -> tuple[int, ...]:
    """Checks the widths of the hidden states that a head takes, and returns them as a tuple.

    Raises:
        ValueError: if they are no sequence of sizes, none, or more than `at_most`.
    """
    if isinstance(d_emb, str) or not isinstance(d_emb, Sequence) or not d_emb:
        raise ValueError(f"d_emb is {d_emb!r}; expected the width of each hidden state, such as [768] * 13.")
    if at_most is not None and len(d_emb) > at_most:
        raise ValueError(f"d_emb has {len(d_emb)} widths; this head takes {at_most} hidden state.")
    for index, width in enumerate(d_emb):
        check_size(f"d_emb[{index}]", width)
    return tuple(d_emb)


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Checks one of several words.

    Raises:
        ValueError: if it is none of them; naming all.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")


def check_dtype(dtype: object) -> None:
    """Checks a dtype as transformers takes it: a `torch.dtype` or its name, "auto", or None.

    Raises:
        ValueError: if it is none of these.
    """
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in (None, "auto") and not isinstance(named, torch.dtype):
        raise ValueError(f'dtype is {dtype!r}; expected a torch.dtype or the name of one, such as "bfloat16".')
