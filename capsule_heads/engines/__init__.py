"""Engines that do the work on many texts outside this process: a module for each kind of cluster."""

from .ray import Actors, run_on_ray

__all__ = ["Actors", "run_on_ray"]
