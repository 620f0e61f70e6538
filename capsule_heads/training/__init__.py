"""Training: the paper's regime in transformers' Trainer. Names are imported when they are first used."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .arguments import CapsuleTrainingArguments
    from .schedule import OneCycle
    from .trainer import CapsuleTrainer

__all__ = ["CapsuleTrainer", "CapsuleTrainingArguments", "OneCycle"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {"CapsuleTrainer": "trainer", "CapsuleTrainingArguments": "arguments", "OneCycle": "schedule"},
)
