"""The models: a backbone, and a routing-capsule head on its hidden states."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from ..heads import HeadOutput
from ..mixup import draw_mixup, mix
from .configuration_capsule_head import CapsuleHeadConfig
from .losses import check_labels, infer_problem_type, problem_loss, problem_targets
from .outputs import CapsuleHeadClassifierOutput, CapsuleHeadModelOutput
from .pretrained import CapsuleHeadPreTrainedModel, token_mask

# A regression's value is read from the poses of this many capsules: with a single one there is nothing to route.
N_REGRESSION_CAPSULES = 8


class CapsuleHeadModel(CapsuleHeadPreTrainedModel):
    """A backbone and the part capsules that its hidden states are routed to, without classes.

    It loads the checkpoint of a classifier, and gives its part capsules as features.
    """

    _keys_to_ignore_on_load_unexpected = [r"^head\.routings\.1\.", r"^regressor\."]

    def __init__(self, config: CapsuleHeadConfig, backbone: PreTrainedModel | None = None, **building) -> None:
        super().__init__(config, None, backbone, **building)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        hidden_states: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_routing: bool | None = None,
        return_dict: bool | None = None,
    ) -> CapsuleHeadModelOutput:
        """Routes hidden states to parts. Arguments as in `CapsuleHeadForSequenceClassification.forward`."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        states = self._hidden_states(hidden_states, inputs)
        parts = self.head(states, token_mask(attention_mask, states[0]), bool(output_routing))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return CapsuleHeadModelOutput(
            scores=parts.a_out,
            poses=parts.mu_out,
            variances=parts.sig2_out,
            hidden_states=tuple(states) if output_hidden_states else None,
            routing_probabilities=parts.routing_probabilities,
        )


class CapsuleHeadForSequenceClassification(CapsuleHeadPreTrainedModel):
    """The paper's text network on any text backbone: all tokens at all depths, routed to parts, routed to classes.

    The logits are the scores of the class capsules. For regression (`problem_type="regression"`, or `num_labels=1`) the
    parts are routed to `N_REGRESSION_CAPSULES` capsules, and the values are an affine function of their poses, in units
    of `config.label_std` above `config.label_mean`: a score is an amount of evidence, a pose is where it points.

    In training, with `config.mixup_alpha` above 0, hidden states, mask and targets are mixed within the batch here, in
    the forward pass, so that it is right in any trainer and under DDP.
    """

    def __init__(self, config: CapsuleHeadConfig, backbone: PreTrainedModel | None = None, **building) -> None:
        regression = config.problem_type == "regression"
        n_out = N_REGRESSION_CAPSULES if regression else config.num_labels
        super().__init__(config, n_out, backbone, **building)
        self.num_labels = config.num_labels
        self.regressor = nn.Linear(N_REGRESSION_CAPSULES * config.d_cap, config.num_labels) if regression else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        hidden_states: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_capsules: bool | None = None,
        output_routing: bool | None = None,
        return_dict: bool | None = None,
    ) -> CapsuleHeadClassifierOutput:
        """Scores texts.

        Args:
            input_ids: `[batch, tokens]`, from the backbone's tokenizer.
            attention_mask: `[batch, tokens]`, 1 for tokens and 0 for padding, on either side. None: all are tokens.
            token_type_ids: `[batch, tokens]`, left out where the backbone has none.
            position_ids: `[batch, tokens]`; by default counted over the tokens, so that padding never shifts them.
            inputs_embeds: `[batch, tokens, width]`, in the place of `input_ids`.
            labels: `[batch]` class indices; `[batch, num_labels]` 0 or 1 for multi-label; `[batch]` or
                `[batch, num_labels]` numbers for regression.
            hidden_states: `[batch, tokens, depths, width]`, the backbone's hidden states at the depths in use, in the
                place of running it.
            output_hidden_states: whether to return those in use. Default: as in the configuration.
            output_capsules: whether to return poses and variances of the class capsules.
            output_routing: whether to return the probabilities of each routing.
            return_dict: False for a tuple, as in transformers.

        Returns:
            A `CapsuleHeadClassifierOutput`.

        Raises:
            ValueError: for inputs or labels that do not fit the model.
        """
        if labels is not None:
            problem_type = infer_problem_type(self.config, labels)
            check_labels(problem_type, self.config.num_labels, labels)
            self.config.problem_type = problem_type
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        states = self._hidden_states(hidden_states, inputs)
        mask = token_mask(attention_mask, states[0])
        targets = None if labels is None else problem_targets(self.config, labels)
        if self.training and targets is not None and self.config.mixup_alpha > 0:
            ratio, partner = draw_mixup(len(targets), self.config.mixup_alpha, targets.device)
            states = [mix(x, ratio.to(x.device), partner.to(x.device)) for x in states]
            mask = mix(mask, ratio.to(mask.device), partner.to(mask.device))
            targets = mix(targets, ratio, partner)

        capsules = self.head(states, mask, bool(output_routing))
        logits = self._logits(capsules)
        loss = None if targets is None else problem_loss(self.config, logits, targets.to(logits.device))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return CapsuleHeadClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=tuple(states) if output_hidden_states else None,
            poses=capsules.mu_out if output_capsules else None,
            variances=capsules.sig2_out if output_capsules else None,
            routing_probabilities=capsules.routing_probabilities,
        )

    def _logits(self, capsules: HeadOutput) -> Tensor:
        if self.regressor is None:
            return capsules.a_out
        poses = capsules.mu_out.flatten(1).to(self.regressor.weight.dtype)
        return self.config.label_mean + self.config.label_std * self.regressor(poses).to(capsules.mu_out.dtype)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is getattr(self, "regressor", None) and module is not None:
            init.kaiming_normal_(module.weight)
            init.zeros_(module.bias)
