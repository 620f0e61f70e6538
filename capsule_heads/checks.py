"""Checks that layers, heads, configurations and checkpoints share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

MOST_SHOWN = 200  # characters of a value in a message


def is_readable(tensor: Tensor) -> bool:
    """Return whether the values of a tensor may be checked.

    On another device than the CPU that would wait for the device. While compiling it would break the graph.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def plain(value: Any) -> Any:
    """Return numbers as Python's own, whatever holds them: NumPy, torch, pandas, ranges, lists and dicts of these."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    if isinstance(value, range):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value


def shown(value: object) -> str:
    """Return a value for a message: as Python writes it or, where that is long, its kind."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN and "\n" not in text else f"a {type(value).__name__}"


def is_number(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_size(name: str, size: object, or_none: str | None = None) -> None:
    """Check a size, or a number of things.

    Args:
        name: the argument's name.
        size: its value.
        or_none: the meaning of None; without it, None is an error.

    Raises:
        ValueError: If the size is not a positive whole number.
    """
    if size is None and or_none is not None:
        return
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        alternative = "" if or_none is None else f" or None ({or_none})"
        raise ValueError(f"{name} is {shown(size)}; expected a positive whole number{alternative}.")


def check_hidden_sizes(hidden_sizes: object, at_most: int | None = None) -> tuple[int, ...]:
    """Check the sizes of the hidden states that a head takes, and return them as a tuple.

    Raises:
        ValueError: If they are no sequence of sizes, there are none, or more than `at_most`.
    """
    if isinstance(hidden_sizes, str) or not isinstance(hidden_sizes, Sequence) or not hidden_sizes:
        raise ValueError(
            f"hidden_sizes is {shown(hidden_sizes)}; expected the size of each hidden state, such as [768] * 13."
        )
    if at_most is not None and len(hidden_sizes) > at_most:
        raise ValueError(f"hidden_sizes has {len(hidden_sizes)} sizes; this head takes {at_most} hidden state.")
    for index, size in enumerate(hidden_sizes):
        check_size(f"hidden_sizes[{index}]", size)
    return tuple(hidden_sizes)


def check_memory(make: Callable[[], nn.Module], options: Mapping[str, object]) -> None:
    """Check that there is memory for a module's parameters, before the system ends the process for want of it.

    Args:
        make: returns the module; called on the meta device.
        options: what its size follows from, for the message.

    Raises:
        ValueError: If its parameters take more than is free.
    """
    free = psutil.virtual_memory().available
    try:
        with torch.device("meta"):
            n_bytes = sum(x.numel() * x.element_size() for x in make().parameters())
    except (RuntimeError, TypeError):  # of sizes beyond 64 bits
        n_bytes = 1 << 63
    if n_bytes > free:
        sizes = ", ".join(f"{name}={value}" for name, value in options.items() if type(value) is int)
        raise ValueError(
            f"The head's parameters take {n_bytes / 1e9:,.0f} GB, and {free / 1e9:,.1f} GB of memory are free; "
            f"expected smaller options ({sizes}), or fewer layers."
        )


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Check an argument that is one of several words.

    Raises:
        ValueError: If it is another word.
    """
    if value not in choices:
        raise ValueError(f"{name} is {shown(value)}; expected one of {', '.join(choices)}.")


def check_dtype(dtype: object) -> None:
    """Check a dtype as transformers takes it: a `torch.dtype` or its name, "auto", or None.

    Raises:
        ValueError: If it is something else.
    """
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in (None, "auto") and not isinstance(named, torch.dtype):
        raise ValueError(f'dtype is {shown(dtype)}; expected a torch.dtype or the name of one, such as "bfloat16".')
