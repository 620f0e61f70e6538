"""transformers models with a routing-capsule head."""

from .configuration_capsule_head import CapsuleHeadConfig
from .modeling_capsule_head import CapsuleHeadForSequenceClassification, CapsuleHeadModel
from .outputs import CapsuleHeadClassifierOutput, CapsuleHeadModelOutput

__all__ = [
    "CapsuleHeadClassifierOutput",
    "CapsuleHeadConfig",
    "CapsuleHeadForSequenceClassification",
    "CapsuleHeadModel",
    "CapsuleHeadModelOutput",
]
