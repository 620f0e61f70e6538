"""transformers models with a routing-capsule head."""

from .configuration_capsule_head import PAPER, CapsuleHeadConfig
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
    "PAPER",
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
