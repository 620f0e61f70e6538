"""The models: a backbone, and a routing-capsule head on its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from ..explain import Explanation, explain
from ..heads import HeadOutput
from ..mixup import draw_mixup, mix
from .backbones import AUDIO_INPUTS, IMAGE_INPUTS, TEXT_INPUTS
from .configuration_capsule_head import CAPSULE_HEADS, CapsuleHeadConfig
from .loading import load_processor
from .losses import check_labels, infer_problem_type, problem_loss, problem_targets
from .outputs import CapsuleHeadClassifierOutput, CapsuleHeadModelOutput
from .pretrained import CapsuleHeadPreTrainedModel

# A regression's value is read from the poses of this many capsules: with a single one there is nothing to route.
N_REGRESSION_CAPSULES = 8


class CapsuleHeadModel(CapsuleHeadPreTrainedModel):
    """A backbone and the part capsules that its hidden states are routed to, without classes.

    It loads the checkpoint of a classifier, and gives its part capsules as features.
    """

    backbone_inputs = TEXT_INPUTS + IMAGE_INPUTS + AUDIO_INPUTS
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
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        image_position_ids: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        hidden_states: Tensor | Sequence[Tensor] | None = None,
        output_hidden_states: bool | None = None,
        output_routing: bool | None = None,
        return_dict: bool | None = None,
    ) -> CapsuleHeadModelOutput:
        """Routes hidden states to parts.

        Arguments as in the classifier for the backbone's inputs: `CapsuleHeadForSequenceClassification.forward`,
        `CapsuleHeadForImageClassification.forward` or `CapsuleHeadForAudioClassification.forward`.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "image_grid_thw": image_grid_thw,
            "image_position_ids": image_position_ids,
            "input_values": input_values,
            "input_features": input_features,
        }
        states, masks = self._hidden_states(hidden_states, inputs)
        parts = self.head(states, masks, bool(output_routing))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return CapsuleHeadModelOutput(
            scores=parts.a_out,
            poses=parts.mu_out,
            variances=parts.sig2_out,
            hidden_states=tuple(states) if output_hidden_states else None,
            routing_probabilities=parts.routing_probabilities,
        )


class CapsuleHeadClassifier(CapsuleHeadPreTrainedModel):
    """What the classifiers of all modalities share: from hidden states to class scores and a loss.

    The logits are the scores of the class capsules. For regression (`problem_type="regression"`, or `num_labels=1`) the
    parts are routed to `N_REGRESSION_CAPSULES` capsules, and the values are an affine function of their poses, in units
    of `config.label_std` above `config.label_mean`: a score is an amount of evidence, a pose is where it points.
    """

    def __init__(self, config: CapsuleHeadConfig, backbone: PreTrainedModel | None = None, **building) -> None:
        from_poses = config.problem_type == "regression" and config.head_type in CAPSULE_HEADS
        super().__init__(config, N_REGRESSION_CAPSULES if from_poses else config.num_labels, backbone, **building)
        self.num_labels = config.num_labels
        pose_size = N_REGRESSION_CAPSULES * config.d_cov * config.d_cap
        self.regressor = nn.Linear(pose_size, config.num_labels) if from_poses else None
        self.post_init()

    def _targets(self, labels: Tensor | None) -> Tensor | None:
        """What the loss compares scores with, `[batch, num_labels]`; settles the problem type."""
        if labels is None:
            return None
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels are a {type(labels).__name__}; expected a tensor.")
        problem_type = infer_problem_type(self.config, labels)
        check_labels(problem_type, self.config.num_labels, labels)
        self.config.problem_type = problem_type
        return problem_targets(self.config, labels)

    def _draw_mixup(self, targets: Tensor | None, inputs: Tensor) -> Callable[[Tensor], Tensor] | None:
        """In training with targets, what mixes the samples of this batch, `[batch, ...]`."""
        if targets is not None and targets.shape[0] != inputs.shape[0]:
            raise ValueError(f"There are labels of {targets.shape[0]} samples, and inputs of {inputs.shape[0]}.")
        if not self.training or targets is None or self.config.mixup_alpha == 0:
            return None
        ratio, partner = draw_mixup(len(targets), self.config.mixup_alpha, targets.device)
        return lambda tensor: mix(tensor, ratio.to(tensor.device), partner.to(tensor.device))

    def _classify(
        self,
        states: list[Tensor],
        masks: list[Tensor],
        targets: Tensor | None,
        output_hidden_states: bool | None,
        output_capsules: bool | None,
        output_routing: bool | None,
        is_mixed: bool = False,
    ) -> CapsuleHeadClassifierOutput:
        """From hidden states on. In training with mixup it mixes them, masks and targets, unless inputs were mixed."""
        mix_samples = None if is_mixed else self._draw_mixup(targets, states[0])
        if mix_samples is not None:
            different = {id(mask): mask for mask in masks}  # most often all depths have one
            mixed = {key: mix_samples(mask) for key, mask in different.items()}
            masks, targets = [mixed[id(mask)] for mask in masks], mix_samples(targets)
        capsules = self.head(states, masks, bool(output_routing), mix_samples)
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
        config = self.config
        if config.problem_type != "regression":
            return capsules.a_out
        values = capsules.a_out
        if self.regressor is not None:
            poses = capsules.mu_out.flatten(1)
            with torch.autocast(poses.device.type, enabled=False):  # values are in float32, as scores are
                values = self.regressor(poses.to(self.regressor.weight.dtype)).to(poses.dtype)
        return config.label_mean + config.label_std * values

    def explain(self, inputs: Any, processor: Any | None = None, batch_size: int = 16) -> list[Explanation]:
        """Says where class scores come from; arguments, returns and errors as in `capsule_heads.explain.explain`.

        Without a processor the one is taken that is saved with the model, or with its backbone; there is an OSError if
        there is none.

        Example:
            >>> (explanation,) = model.explain("An unexpectedly tender film .")
            >>> [(word.text, float(word.credit[explanation.predicted])) for word in explanation.by_word()]
        """
        if processor is None and not isinstance(inputs, Mapping):
            processor = load_processor(self)
        return explain(self, inputs, processor, batch_size)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is getattr(self, "regressor", None) and module is not None:
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)


class CapsuleHeadForSequenceClassification(CapsuleHeadClassifier):
    """The paper's text network on any text backbone: all tokens at all depths, routed to parts, routed to classes.

    Scores, and regression: see `CapsuleHeadClassifier`. In training, with `config.mixup_alpha` above 0, hidden states,
    mask and targets are mixed within the batch here, in the forward pass, so that it is right in any trainer and under
    DDP.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        hidden_states: Tensor | Sequence[Tensor] | None = None,
        output_attentions: bool | None = None,
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
                place of running it; or a sequence with one `[batch, tokens, width]` per depth.
            output_attentions: not for True: PEFT's models for sequence classification pass it, as None.
            output_hidden_states: whether to return those in use. Default: as in the configuration.
            output_capsules: whether to return poses and variances of the class capsules.
            output_routing: whether to return the probabilities of each routing.
            return_dict: False for a tuple, as in transformers.

        Returns:
            A `CapsuleHeadClassifierOutput`.

        Raises:
            ValueError: for inputs or labels that do not fit the model.
        """
        if output_attentions:
            raise ValueError(
                "A capsule head returns no attentions; call model.backbone for them, or output_routing=True."
            )
        targets = self._targets(labels)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        states, masks = self._hidden_states(hidden_states, inputs)
        return self._classify(states, masks, targets, output_hidden_states, output_capsules, output_routing)


class CapsuleHeadForAudioClassification(CapsuleHeadClassifier):
    """A routing-capsule head on any speech or sound backbone: all frames at all depths, routed to parts, to classes.

    A backbone's frames are fewer than its input's samples: the mask is mapped to them with the backbone's own count.
    Scores, regression and mixup as in `CapsuleHeadForSequenceClassification`.
    """

    main_input_name = "input_values"
    input_modalities = ("audio",)
    backbone_inputs = AUDIO_INPUTS

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        hidden_states: Tensor | Sequence[Tensor] | None = None,
        output_hidden_states: bool | None = None,
        output_capsules: bool | None = None,
        output_routing: bool | None = None,
        return_dict: bool | None = None,
    ) -> CapsuleHeadClassifierOutput:
        """Scores sounds.

        Args:
            input_values: `[batch, samples]`, from the backbone's feature extractor; or what it makes under this name.
            input_features: `[batch, frames, bins]` or `[batch, bins, frames]`, a spectrum, for backbones that take one.
            attention_mask: `[batch, samples]`, or `[batch, frames]` of the spectrum, 1 for sound and 0 for padding on
                the right. None: all is sound. With `hidden_states` it is of their tokens.
            labels: as in `CapsuleHeadForSequenceClassification.forward`.
            hidden_states: as in `CapsuleHeadForSequenceClassification.forward`.
            output_hidden_states: whether to return those in use. Default: as in the configuration.
            output_capsules: whether to return poses and variances of the class capsules.
            output_routing: whether to return the probabilities of each routing.
            return_dict: False for a tuple, as in transformers.

        Returns:
            A `CapsuleHeadClassifierOutput`.

        Raises:
            ValueError: for inputs or labels that do not fit the model.
        """
        targets = self._targets(labels)
        inputs = {"input_values": input_values, "input_features": input_features, "attention_mask": attention_mask}
        states, masks = self._hidden_states(hidden_states, inputs)
        return self._classify(states, masks, targets, output_hidden_states, output_capsules, output_routing)


class CapsuleHeadForImageClassification(CapsuleHeadClassifier):
    """A routing-capsule head on any image backbone: flat (ViT), hierarchical (Swin, ResNet), with packed patches.

    Scores, and regression: see `CapsuleHeadClassifier`. With `StereoConvModel` as backbone and
    `config.head_type="spatial_pose"` it is the paper's smallNORB network. In training, with `config.mixup_alpha` above
    0, images and targets are mixed within the batch here, in the forward pass; hidden states and masks are where those
    are given, or images come as patches and so may differ in shape.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    backbone_inputs = IMAGE_INPUTS

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        image_position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        hidden_states: Tensor | Sequence[Tensor] | None = None,
        output_hidden_states: bool | None = None,
        output_capsules: bool | None = None,
        output_routing: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        return_dict: bool | None = None,
    ) -> CapsuleHeadClassifierOutput:
        """Scores images.

        Args:
            pixel_values: `[batch, channels, height, width]`, from the backbone's image processor, or what else it makes
                under this name: patches, or frames `[batch, frames, channels, height, width]`.
            pixel_attention_mask: `[batch, patches]`, for backbones that take padded patches (SigLIP 2).
            spatial_shapes: `[batch, 2]`, rows and columns of patches, for the same.
            image_grid_thw: `[batch, 3]`, frames, rows and columns of patches, for backbones that take the patches of
                all images in one sequence (Qwen2-VL's tower): its states are split by these.
            image_position_ids: `[batch, patches, 2]`, for backbones that take the place of each patch, -1 for padding.
            labels: as in `CapsuleHeadForSequenceClassification.forward`.
            hidden_states: per depth in use `[batch, tokens, width]`, in the place of running the backbone; or one
                tensor `[batch, tokens, depths, width]`.
            output_hidden_states: whether to return those in use. Default: as in the configuration.
            output_capsules: whether to return poses and variances of the class capsules.
            output_routing: whether to return the probabilities of each routing.
            interpolate_pos_encoding: for images of another size than the backbone's, where it can (ViT and its like).
            return_dict: False for a tuple, as in transformers.

        Returns:
            A `CapsuleHeadClassifierOutput`.

        Raises:
            ValueError: for inputs or labels that do not fit the model.
        """
        targets = self._targets(labels)
        patches = {
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "image_grid_thw": image_grid_thw,
            "image_position_ids": image_position_ids,
        }
        mix_pixels = pixel_values is not None and all(value is None for value in patches.values())
        mix_samples = self._draw_mixup(targets, pixel_values) if mix_pixels else None
        if mix_samples is not None:
            pixel_values, targets = mix_samples(pixel_values), mix_samples(targets)
        inputs = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding, **patches}
        states, masks = self._hidden_states(hidden_states, inputs)
        return self._classify(
            states, masks, targets, output_hidden_states, output_capsules, output_routing, is_mixed=mix_pixels
        )
