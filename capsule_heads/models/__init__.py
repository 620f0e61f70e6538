"""transformers models with a routing-capsule head."""

from .configuration_capsule_head import CapsuleHeadConfig
from .image_processing_stereo import StereoImageProcessor
from .modeling_capsule_head import (
    CapsuleHeadForAudioClassification,
    CapsuleHeadForImageClassification,
    CapsuleHeadForSequenceClassification,
    CapsuleHeadModel,
)
from .outputs import CapsuleHeadClassifierOutput, CapsuleHeadModelOutput
from .stereo_conv import StereoConvConfig, StereoConvModel

__all__ = [
    "CapsuleHeadClassifierOutput",
    "CapsuleHeadConfig",
    "CapsuleHeadForAudioClassification",
    "CapsuleHeadForImageClassification",
    "CapsuleHeadForSequenceClassification",
    "CapsuleHeadModel",
    "CapsuleHeadModelOutput",
    "StereoConvConfig",
    "StereoConvModel",
    "StereoImageProcessor",
]
