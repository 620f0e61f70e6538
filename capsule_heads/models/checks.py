"""A check that configurations share."""

from __future__ import annotations


def check_size(name: str, size: object) -> None:
    """Checks a number of things, or a width.

    Raises:
        ValueError: if it is no positive whole number.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} is {size!r}; expected a positive whole number.")
