"""Small configurations of models on tiny backbones."""

import dataclasses

from transformers.configuration_utils import PreTrainedConfig

from capsule_heads import CapsuleHeadConfig
from capsule_heads.backbones import Backbone, Part
from capsule_heads.heads import get_head

SIZES = {"d_inp": 8, "n_parts": 6}


def small(head_type="token_depth", **fields):
    """Return fields with a head type, and small sizes where the head has options of these names."""
    has = {field.name for field in dataclasses.fields(get_head(head_type).Options)}
    sizes = {name: size for name, size in SIZES.items() if name in has}
    return {"head_type": head_type, **sizes, **fields}


def make_config(base_config, **fields):
    """Return the configuration that `from_backbone` would build, without a model."""
    if isinstance(base_config, PreTrainedConfig) and "hidden_sizes" not in fields:
        part = Part(fields.get("stack", "encoder"), fields.get("tower"))
        fields["hidden_sizes"] = list(Backbone(base_config, part=part).probe().hidden_sizes)
    return CapsuleHeadConfig(base_config, **fields)
