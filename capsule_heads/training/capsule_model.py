"""The capsule-head model in a model that may be wrapped, and the problem type that its first labels settle."""

from __future__ import annotations

from torch import Tensor, nn

from ..models.base import CapsuleHeadPreTrainedModel
from ..models.losses import infer_problem_type


def find_capsule_model(model: nn.Module | None) -> CapsuleHeadPreTrainedModel:
    """Return the capsule-head model that a model is or wraps, as PEFT's and DistributedDataParallel do.

    Raises:
        TypeError: If the model neither is nor wraps a capsule-head model.
    """
    for module in model.modules() if model is not None else ():
        if isinstance(module, CapsuleHeadPreTrainedModel):
            return module
    raise TypeError(
        f"model is a {type(model).__name__}; CapsuleTrainer expects a capsule-head model, wrapped or not: use "
        "transformers' Trainer for others."
    )


def settle_problem_type(model: CapsuleHeadPreTrainedModel, labels: object) -> None:
    """Write the problem type of the first labels to a model's configuration, where it has none.

    Their dtype decides, so no value is read from a device. The model and the data loader then refuse labels of another
    kind.
    """
    if model.config.problem_type is None and isinstance(labels, Tensor):
        settled = infer_problem_type(model.config, labels)
        model.config.problem_type = settled  # type: ignore[assignment]  # one of the words, which a str does not show
