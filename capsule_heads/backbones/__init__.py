"""Backbones: transformers models whose hidden states a head takes, and all knowledge of their types."""

# First: once this is imported, so are the models of this package, which import the modules of this one.
import transformers.models.auto.configuration_auto  # noqa: F401 - for what its import starts

from .backbone import Backbone
from .parts import Part, Windowing

__all__ = ["Backbone", "Part", "Windowing"]
