"""Training: the paper's regime in transformers' Trainer. Names are imported when they are first used."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .adapters import adapt
    from .arguments import CapsuleTrainingArguments
    from .calibration import calibrate
    from .schedule import OneCycle
    from .sweep import Sweep, SweepArguments
    from .trainer import CapsuleTrainer

__all__ = ["CapsuleTrainer", "CapsuleTrainingArguments", "OneCycle", "Sweep", "SweepArguments", "adapt", "calibrate"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CapsuleTrainer": "trainer",
        "CapsuleTrainingArguments": "arguments",
        "OneCycle": "schedule",
        "Sweep": "sweep",
        "SweepArguments": "sweep",
        "adapt": "adapters",
        "calibrate": "calibration",
    },
)
