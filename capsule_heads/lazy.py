"""Imports that wait: names until they are first used, modules until another one is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from wrapt import register_post_import_hook


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package whose names are in its modules.

    Args:
        package: its `__name__`.
        modules: the module of each name, relative to the package.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{modules[name]}", package), name)

    return get, lambda: sorted({*vars(sys.modules[package]), *modules})


def import_after(other: str, package: str, module: str) -> None:
    """Import a module of a package right after another module, whenever that is imported; now if it is already.

    Args:
        other: the complete name of the other module.
        package: the package.
        module: the module, relative to the package.
    """
    register_post_import_hook(lambda _: import_module(f".{module}", package), other)
