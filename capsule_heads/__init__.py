"""Routing-capsule heads (Heinsen, 2019) on the hidden states of transformers.

Names are imported when they are first used, so that `import capsule_heads` is fast. transformers' auto classes know
the models as soon as both packages are imported, in either order.
"""

from typing import TYPE_CHECKING

from .lazy import import_after, lazy_names
from .requirements import refuse_other_versions
from .version import __version__

if TYPE_CHECKING:
    from .backbones.processors import load_processor
    from .data import load_data
    from .estimator import HeadClassifier
    from .layers import Routing
    from .models import (
        CapsuleHeadConfig,
        CapsuleHeadForAudioClassification,
        CapsuleHeadForImageClassification,
        CapsuleHeadForSequenceClassification,
        CapsuleHeadModel,
        make_ensemble,
    )
    from .training import CapsuleTrainer, CapsuleTrainingArguments

__all__ = [
    "CapsuleHeadConfig",
    "CapsuleHeadForAudioClassification",
    "CapsuleHeadForImageClassification",
    "CapsuleHeadForSequenceClassification",
    "CapsuleHeadModel",
    "CapsuleTrainer",
    "CapsuleTrainingArguments",
    "HeadClassifier",
    "Routing",
    "__version__",
    "load_data",
    "load_processor",
    "make_ensemble",
]

refuse_other_versions()

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "HeadClassifier": "estimator",
        "Routing": "layers",
        "load_data": "data.own",
        "load_processor": "backbones.processors",
        "make_ensemble": "models",
        "CapsuleTrainer": "training",
        "CapsuleTrainingArguments": "training",
        **{name: "models" for name in __all__ if name.startswith("CapsuleHead")},
    },
)

# Pairs: a module of transformers, and a module of this package that registers classes in it when it is imported.
for _auto, _own in (
    ("configuration_auto", "models.configuration_capsule_head"),
    ("modeling_auto", "models.modeling_capsule_head"),
    ("configuration_auto", "paper.configuration_stereo_conv"),
    ("modeling_auto", "paper.modeling_stereo_conv"),
    ("image_processing_auto", "paper.image_processing_stereo"),
):
    import_after(f"transformers.models.auto.{_auto}", __name__, _own)
