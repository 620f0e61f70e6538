"""Models of transformers with a routing-capsule head.

Names are imported when they are first used: transformers' auto classes import the configuration before they can be
imported by the models.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .configuration_capsule_head import CapsuleHeadConfig
    from .ensembles import make_ensemble
    from .modeling_capsule_head import (
        CapsuleHeadClassifier,
        CapsuleHeadForAudioClassification,
        CapsuleHeadForImageClassification,
        CapsuleHeadForSequenceClassification,
        CapsuleHeadModel,
    )
    from .outputs import CapsuleHeadClassifierOutput, CapsuleHeadModelOutput

__all__ = [
    "CapsuleHeadClassifier",
    "CapsuleHeadClassifierOutput",
    "CapsuleHeadConfig",
    "CapsuleHeadForAudioClassification",
    "CapsuleHeadForImageClassification",
    "CapsuleHeadForSequenceClassification",
    "CapsuleHeadModel",
    "CapsuleHeadModelOutput",
    "make_ensemble",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(__all__, "modeling_capsule_head"),
        "CapsuleHeadConfig": "configuration_capsule_head",
        "CapsuleHeadClassifierOutput": "outputs",
        "CapsuleHeadModelOutput": "outputs",
        "make_ensemble": "ensembles",
    },
)
