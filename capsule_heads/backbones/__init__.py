"""Backbones: transformers models whose hidden states a head takes, and all knowledge of their types."""

# First, because this import also imports the models of capsule_heads, which import the modules of this folder.
import transformers.models.auto.configuration_auto  # noqa: F401 - for the imports that it starts

from .backbone import Backbone
from .parts import Part, Windowing

__all__ = ["Backbone", "Part", "Windowing"]
