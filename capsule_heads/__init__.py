"""Routing-capsule heads (Heinsen, 2019) on the hidden states of transformers."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from .layers import Routing
from .models import (
    PAPER,
    CapsuleHeadConfig,
    CapsuleHeadForAudioClassification,
    CapsuleHeadForImageClassification,
    CapsuleHeadForSequenceClassification,
    CapsuleHeadModel,
    StereoConvConfig,
    StereoConvModel,
    StereoImageProcessor,
)
from .training import CapsuleTrainer, CapsuleTrainingArguments
from .version import __version__

__all__ = [
    "PAPER",
    "CapsuleHeadConfig",
    "CapsuleHeadForAudioClassification",
    "CapsuleHeadForImageClassification",
    "CapsuleHeadForSequenceClassification",
    "CapsuleHeadModel",
    "CapsuleTrainer",
    "CapsuleTrainingArguments",
    "Routing",
    "StereoConvConfig",
    "StereoConvModel",
    "StereoImageProcessor",
    "__version__",
]

AutoConfig.register(CapsuleHeadConfig.model_type, CapsuleHeadConfig)
AutoModel.register(CapsuleHeadConfig, CapsuleHeadModel)
AutoModelForAudioClassification.register(CapsuleHeadConfig, CapsuleHeadForAudioClassification)
AutoModelForImageClassification.register(CapsuleHeadConfig, CapsuleHeadForImageClassification)
AutoModelForSequenceClassification.register(CapsuleHeadConfig, CapsuleHeadForSequenceClassification)
AutoImageProcessor.register(StereoConvConfig, StereoImageProcessor)
