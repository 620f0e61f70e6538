"""Backbones: transformers models whose hidden states a head takes, and all knowledge of their types."""

from .backbone import Backbone
from .parts import Part, Windowing

__all__ = ["Backbone", "Part", "Windowing"]
