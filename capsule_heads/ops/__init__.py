"""The routing operation: pure functions of tensors, without parameters. README.md beside this file derives it."""

from .routing import P_MODELS, STRATEGIES, check_routing_options, route

__all__ = ["P_MODELS", "STRATEGIES", "check_routing_options", "route"]
