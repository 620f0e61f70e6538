"""Configurations of models on tiny backbones, whose hidden sizes are found out."""

from transformers.configuration_utils import PreTrainedConfig

from capsule_heads import CapsuleHeadConfig
from capsule_heads.backbones import Backbone, Part


def make_config(base_config, **fields):
    """Return the configuration that `from_backbone` would build, without a model."""
    if isinstance(base_config, PreTrainedConfig) and "hidden_sizes" not in fields:
        part = Part(fields.get("stack", "encoder"), fields.get("tower"))
        fields["hidden_sizes"] = list(Backbone(base_config, part=part).probe().hidden_sizes)
    return CapsuleHeadConfig(base_config, **fields)
