"""The capsule-head model inside a model that may be wrapped: finding it, and checking and completing its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..heads import check_trainable, get_head
from ..models.base import CapsuleHeadPreTrainedModel
from ..models.losses import infer_problem_type

if TYPE_CHECKING:
    from transformers import TrainingArguments


def find_capsule_model(model: nn.Module | None) -> CapsuleHeadPreTrainedModel:
    """Return the capsule-head model that a model is or wraps, as PEFT's models and DistributedDataParallel do.

    Raises:
        TypeError: If the model neither is nor wraps a capsule-head model.
    """
    for module in model.modules() if model is not None else ():
        if isinstance(module, CapsuleHeadPreTrainedModel):
            return module
    raise TypeError(
        f"model is of class {type(model).__name__}; CapsuleTrainer expects a capsule-head model, wrapped or not: use "
        "transformers' Trainer for others."
    )


def check_trains(model: CapsuleHeadPreTrainedModel, args: TrainingArguments, compute_loss_func: object) -> None:
    """Check that the head trains, and that a user's settings of its training have an effect.

    Raises:
        ValueError: If the head cannot be trained, or is frozen, as PEFT leaves it without `modules_to_save`; if a
            user's own loss would ignore class weights, mixup or label smoothing; if noise is set for the embeddings
            of a frozen backbone.
    """
    check_trainable(get_head(model.config.head_type))
    if not any(x.requires_grad for x in model.head.parameters()):
        remedy = 'pass modules_to_save=["head"] to the configuration of PEFT' if model.has_adapters else "unfreeze it"
        raise ValueError(f"No parameter of the head requires a gradient, so that the head would not train; {remedy}.")
    config = model.config
    own = {
        "class_weights": config.class_weights is not None,
        "mixup_alpha": config.mixup_alpha > 0,
        "label_smoothing_factor": args.label_smoothing_factor > 0,
    }
    unused = [name for name, is_set in own.items() if is_set]
    if compute_loss_func is not None and unused:
        raise ValueError(
            f"compute_loss_func replaces the model's loss, and {' and '.join(unused)} would have no effect; leave "
            f"{'it' if len(unused) == 1 else 'them'} out."
        )
    if args.neftune_noise_alpha and not model.backbone_trains:
        raise ValueError(
            f"neftune_noise_alpha is {args.neftune_noise_alpha}, and the embeddings of a frozen backbone get no noise; "
            "leave neftune_noise_alpha out, or train the backbone (freeze_backbone=False)."
        )


def settle_problem_type(model: CapsuleHeadPreTrainedModel, labels: object) -> None:
    """Set a model's problem type by its first labels, if its configuration has none.

    The dtype of the labels decides, so no value is read from a device. The model and the data loader then refuse labels
    of another kind.
    """
    if model.config.problem_type is None and isinstance(labels, Tensor):
        settled = infer_problem_type(model.config, labels)
        model.config.problem_type = settled  # type: ignore[assignment]  # typed as a str, not as one of the words
