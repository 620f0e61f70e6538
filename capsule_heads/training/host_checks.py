"""Checks of a batch's values on the host, before it moves to a device where reading them would wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..backbones.running import check_ids, check_mask, count_embeddings
from ..models.base import CapsuleHeadPreTrainedModel
from ..models.configuration_capsule_head import CapsuleHeadConfig
from ..models.losses import check_labels, infer_problem_type


@dataclass
class CheckedCollator:
    """A collator whose batches are checked: labels, masks and tokens have values that the model takes.

    It keeps only what the checks need, not the model, because a data loader sends its collator to other processes.

    Args:
        collator: makes the batches.
        config: the model's configuration.
        n_embeddings: number of tokens in the backbone's table of embeddings; None if it has no table.
    """

    collator: Callable[[list[Any]], Any]
    config: CapsuleHeadConfig
    n_embeddings: int | None

    @classmethod
    def for_model(cls, collator: Callable[[list[Any]], Any], model: CapsuleHeadPreTrainedModel) -> CheckedCollator:
        """Return the checked collator for a model."""
        return cls(collator, model.config, count_embeddings(model.backbone))

    def __call__(self, features: list[Any]) -> Any:
        """Return a batch of the collator.

        Raises:
            ValueError: If labels, a mask or tokens have values that the model does not take.
        """
        batch = self.collator(features)
        if not isinstance(batch, Mapping):
            return batch
        labels, mask, tokens = (_on_host(batch.get(name)) for name in ("labels", "attention_mask", "input_ids"))
        if labels is not None:
            check_labels(infer_problem_type(self.config, labels), self.config.num_labels or 2, labels)
        if mask is not None:
            check_mask(mask, mask.shape)
        if tokens is not None:
            check_ids(tokens, self.n_embeddings, self.config.base_config.model_type)
        return batch


def _on_host(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.device.type == "cpu" else None
