"""Where work on many texts is done beside the process that was called: a module for each kind of cluster."""

from .ray import Actors, run_on_ray

__all__ = ["Actors", "run_on_ray"]
