"""Routing-capsule heads (Heinsen, 2019) on the hidden states of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .layers import Routing
from .models import CapsuleHeadConfig, CapsuleHeadForSequenceClassification, CapsuleHeadModel
from .training import CapsuleTrainer, CapsuleTrainingArguments
from .version import __version__

__all__ = [
    "CapsuleHeadConfig",
    "CapsuleHeadForSequenceClassification",
    "CapsuleHeadModel",
    "CapsuleTrainer",
    "CapsuleTrainingArguments",
    "Routing",
    "__version__",
]

AutoConfig.register(CapsuleHeadConfig.model_type, CapsuleHeadConfig)
AutoModel.register(CapsuleHeadConfig, CapsuleHeadModel)
AutoModelForSequenceClassification.register(CapsuleHeadConfig, CapsuleHeadForSequenceClassification)
