"""Backbones: transformers models whose hidden states a head takes, and all knowledge of their types."""

# First, as it imports the configuration of our models, which imports this package's modules: whoever comes here before
# transformers' own registry would meet them half imported.
import transformers.models.auto.configuration_auto  # noqa: F401 - imported for its effect

from .backbone import Backbone
from .parts import Part, Windowing

__all__ = ["Backbone", "Part", "Windowing"]
