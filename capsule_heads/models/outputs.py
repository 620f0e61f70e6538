"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class CapsuleHeadModelOutput(ModelOutput):
    """Part capsules: what the tokens at all layers were routed to.

    Attributes:
        scores: `[batch, n_parts]`, scores of the parts, as logits.
        poses: `[batch, n_parts, d_cov, d_cap]`, their poses.
        variances: `[batch, n_parts, d_cov, d_cap]`, of the votes for each pose.
        hidden_states: on request, per layer in use `[batch, tokens, hidden_size]`; see `Requests`.
        attentions: on request, per layer of the backbone, as it gives them.
        routing_probabilities: on request, one tensor `[batch, tokens * layers, n_parts]`.
    """

    scores: Tensor | None = None
    poses: Tensor | None = None
    variances: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    routing_probabilities: tuple[Tensor, ...] | None = None


@dataclass
class CapsuleHeadClassifierOutput(ModelOutput):
    """Class scores.

    Attributes:
        loss: scalar, where labels were given.
        logits: `[batch, num_labels]`, float32: the scores of the class capsules; for regression, values in the labels'
            unit.
        hidden_states: on request, per layer in use `[batch, tokens, hidden_size]`; see `Requests`.
        attentions: on request, per layer of the backbone, as it gives them.
        poses: on request, `[batch, n_capsules, d_cov, d_cap]`, poses of the class capsules.
        variances: on request, `[batch, n_capsules, d_cov, d_cap]`, of the votes for each pose.
        routing_probabilities: on request, per routing `[batch, n_inp, n_out]`: from tokens and layers to parts (input
            `token * n_layers + index of the layer`), and from parts to classes.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    poses: Tensor | None = None
    variances: Tensor | None = None
    routing_probabilities: tuple[Tensor, ...] | None = None
