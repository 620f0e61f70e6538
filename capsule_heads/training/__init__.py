"""Training: the paper's regime in transformers' Trainer."""

from .arguments import CapsuleTrainingArguments
from .schedule import OneCycle
from .trainer import CapsuleTrainer

__all__ = ["CapsuleTrainer", "CapsuleTrainingArguments", "OneCycle"]
