"""The models: a backbone, and a routing-capsule head on its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from ..backbones.parts import AUDIO_INPUTS, IMAGE_INPUTS, TEXT_INPUTS
from ..heads import HeadOutput, get_head
from ..heads.linear_term import LinearTerm
from ..heads.values import make_regressor, n_outputs, read_values
from ..mixup import draw_mixup, mix
from .base import CapsuleHeadPreTrainedModel
from .configuration_capsule_head import CapsuleHeadConfig
from .losses import check_labels, infer_problem_type, problem_loss, problem_targets
from .outputs import CapsuleHeadClassifierOutput, CapsuleHeadModelOutput


class Requests(TypedDict, total=False):
    """The optional outputs of a forward pass.

    Attributes:
        output_hidden_states: True to return the hidden states in use; an index, or a list of them, to return a tuple of
            all the backbone's, None in place of those that were not asked for, as in transformers. Default: as in the
            configuration.
        output_capsules: whether to return poses and variances of the class capsules.
        output_routing: whether to return the probabilities of each routing.
        output_attentions: whether to return the backbone's attentions. Default: as in the configuration.
        return_dict: False for a tuple, as in transformers.
    """

    output_hidden_states: bool | int | Sequence[int] | None
    output_capsules: bool | None
    output_routing: bool | None
    output_attentions: bool | None
    return_dict: bool | None


class CapsuleHeadModel(CapsuleHeadPreTrainedModel):
    """A backbone and the part capsules that its hidden states are routed to, without classes.

    It loads the checkpoint of a classifier, and gives its part capsules as features.
    """

    backbone_inputs = TEXT_INPUTS + IMAGE_INPUTS + AUDIO_INPUTS
    _keys_to_ignore_on_load_unexpected = [r"^head\.routings\.1\.", r"^regressor\.", r"^linear_term\."]

    def __init__(self, config: CapsuleHeadConfig, backbone: PreTrainedModel | None = None, **building: Any) -> None:
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
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        output_routing: bool | None = None,
        return_dict: bool | None = None,
    ) -> CapsuleHeadModelOutput:
        """Route hidden states to parts.

        Args:
            input_ids: as in `CapsuleHeadForSequenceClassification.forward`.
            attention_mask: as there, or as in `CapsuleHeadForAudioClassification.forward`.
            token_type_ids: as in `CapsuleHeadForSequenceClassification.forward`.
            position_ids: as there.
            inputs_embeds: as there.
            pixel_values: as in `CapsuleHeadForImageClassification.forward`.
            pixel_attention_mask: as there.
            spatial_shapes: as there.
            image_grid_thw: as there.
            image_position_ids: as there.
            input_values: as in `CapsuleHeadForAudioClassification.forward`.
            input_features: as there.
            hidden_states: as in `CapsuleHeadForSequenceClassification.forward`.
            output_hidden_states: as in `Requests`.
            output_attentions: as there.
            output_routing: whether to return the probabilities of the routing to the parts.
            return_dict: False for a tuple, as in transformers.

        Returns:
            A `CapsuleHeadModelOutput`.

        Raises:
            ValueError: If inputs do not fit the model.
        """
        inputs = {
            "input_ids": input_ids,
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
        output, returned = self._run(inputs, attention_mask, hidden_states, output_hidden_states, output_attentions)
        parts = self.head(output.states, output.masks, bool(output_routing))
        return CapsuleHeadModelOutput(
            scores=parts.a_out,
            poses=parts.mu_out,
            variances=parts.sig2_out,
            hidden_states=returned,
            attentions=output.attentions,
            routing_probabilities=parts.routing_probabilities,
        )


class CapsuleHeadClassifier(CapsuleHeadPreTrainedModel):
    """What the classifiers of all modalities share: from hidden states to class scores and a loss.

    The logits are the scores of the class capsules. For regression (`problem_type="regression"`, or `num_labels=1`) the
    parts of a head that routes are routed to `N_REGRESSION_CAPSULES` capsules, and the values are an affine function of
    their poses, in units of `config.label_std` above `config.label_mean`: a score is an amount of evidence, a pose is
    where it points.

    Where the configuration has no `problem_type`, the dtype of the labels says it in each forward pass, as in
    transformers: floating-point labels are multi-label. `CapsuleTrainer` writes what it finds to the configuration.

    In evaluation mode the logits of a classification are divided by `config.calibration_temperature`.

    With a linear term (`config.linear_term`) the logits are the mean of the head's scores and the term's, as of two
    models. In training they are the head's alone: a head that has only to mend a regression which fits its training
    rows learns nothing. For regression the values are the sum of both, and the head learns what the term leaves.

    `label_smoothing` smooths the targets of the loss. `CapsuleTrainer` sets it for its `label_smoothing_factor`.
    `mixup_draws` are those of the next batch, from `mixup.draw_mixup`; where None, the forward pass draws them.

    In training, with `config.mixup_alpha` above 0, samples and targets are mixed within the batch here, in the forward
    pass, so that mixup is right in any trainer and under DDP.
    """

    label_smoothing = 0.0
    mixup_draws: tuple[Tensor, Tensor] | None = None

    def __init__(self, config: CapsuleHeadConfig, backbone: PreTrainedModel | None = None, **building: Any) -> None:
        is_regression = config.problem_type == "regression"
        n_out = n_outputs(get_head(config.head_type), config.num_labels or 2, is_regression)
        super().__init__(config, n_out, backbone, **building)
        self.num_labels = config.num_labels
        self.regressor = make_regressor(self.head, config.num_labels or 2) if is_regression else None
        self.linear_term: LinearTerm | None = None
        if config.linear_term:
            self.add_linear_term()
        self.post_init()

    def add_linear_term(self) -> LinearTerm:
        """Add a linear term to the scores, at 0, if there is none yet, and return it."""
        if self.linear_term is None:
            of_head = next(self.head.parameters())
            term = LinearTerm(self.head.hidden_sizes, self.config.num_labels or 2)
            self.linear_term = term.to(of_head.device, of_head.dtype)
            self.config.linear_term = True
        return self.linear_term

    def freeze(self) -> None:
        """Freeze the backbone, if the configuration says so, and the linear term, which is solved for."""
        super().freeze()
        term: LinearTerm | None = getattr(self, "linear_term", None)  # the base class calls this before there is one
        if term is not None:
            term.requires_grad_(False)

    def _classify(
        self,
        inputs: dict[str, Tensor | bool | None],
        attention_mask: Tensor | None,
        labels: Tensor | None,
        hidden_states: Tensor | Sequence[Tensor] | None,
        *,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_capsules: bool | None = None,
        output_routing: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,  # can_return_tuple has read it
    ) -> CapsuleHeadClassifierOutput:
        """Compute class scores and, with labels, a loss: what `forward` of every modality does."""
        problem_type, targets = self._targets(labels)
        inputs, targets, is_mixed = self._mix_inputs(inputs, targets)
        output, returned = self._run(inputs, attention_mask, hidden_states, output_hidden_states, output_attentions)
        states, masks = output.states, output.masks
        mix_samples = None if is_mixed else self._draw_mixup(targets, states[0])
        linear = None
        if self.linear_term is not None and not (self.training and self.config.problem_type != "regression"):
            linear = self.linear_term(states, masks, mix_samples)
        if mix_samples is not None and targets is not None:
            different = {id(mask): mask for mask in masks}  # most often all layers have one
            mixed = {key: mix_samples(mask) for key, mask in different.items()}
            masks, targets = [mixed[id(mask)] for mask in masks], mix_samples(targets)
        capsules: HeadOutput = self.head(states, masks, bool(output_routing), mix_samples)
        logits = self._logits(capsules, linear)
        loss = None
        if targets is not None and problem_type is not None:
            targets = targets.to(logits.device)
            loss = problem_loss(self.config, problem_type, logits, targets, self.label_smoothing)
        return CapsuleHeadClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=returned,
            attentions=output.attentions,
            poses=capsules.mu_out if output_capsules else None,
            variances=capsules.sig2_out if output_capsules else None,
            routing_probabilities=capsules.routing_probabilities,
        )

    def _targets(self, labels: Tensor | None) -> tuple[str | None, Tensor | None]:
        """Return the problem type, and what the loss compares scores with, `[batch, num_labels]`."""
        if labels is None:
            return None, None
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels are a {type(labels).__name__}; expected a tensor.")
        problem_type = infer_problem_type(self.config, labels)
        check_labels(problem_type, self.config.num_labels or 2, labels)
        return problem_type, problem_targets(self.config, problem_type, labels)

    def _mix_inputs(
        self, inputs: dict[str, Tensor | bool | None], targets: Tensor | None
    ) -> tuple[dict[str, Tensor | bool | None], Tensor | None, bool]:
        """Return inputs and targets, mixed where inputs can be, and whether they were: else hidden states are mixed."""
        return inputs, targets, False

    def _draw_mixup(self, targets: Tensor | None, inputs: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Return a function that mixes the samples of this batch, `[batch, ...]`, in training with targets."""
        if targets is not None and targets.shape[0] != inputs.shape[0]:
            raise ValueError(f"There are labels of {targets.shape[0]} samples, and inputs of {inputs.shape[0]}.")
        if not self.training or targets is None or self.config.mixup_alpha == 0:
            return None
        alpha = self.config.mixup_alpha
        ratio, partner = self.mixup_draws or draw_mixup(len(targets), alpha, targets.device)
        return lambda tensor: mix(tensor, ratio.to(tensor.device), partner.to(tensor.device))

    def _logits(self, capsules: HeadOutput, linear: Tensor | None) -> Tensor:
        config = self.config
        is_regression = config.problem_type == "regression"
        values = read_values(capsules, self.regressor, linear, is_regression)
        if is_regression:
            return config.label_mean + config.label_std * values
        # Here, so that one input has one score in pipelines, predictions and explanations alike.
        is_scaled = not self.training and config.calibration_temperature != 1
        return values / config.calibration_temperature if is_scaled else values

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        regressor = getattr(self, "regressor", None)  # the base class calls this before there is one
        if isinstance(module, nn.Linear) and module is regressor:
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, LinearTerm):
            module.reset_parameters()


class CapsuleHeadForSequenceClassification(CapsuleHeadClassifier):
    """The paper's text network on any text backbone: all tokens at all layers, routed to parts, routed to classes.

    Scores, regression and mixup: see `CapsuleHeadClassifier`.
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
        **requests: Unpack[Requests],
    ) -> CapsuleHeadClassifierOutput:
        """Score texts.

        Args:
            input_ids: `[batch, tokens]`, from the backbone's tokenizer.
            attention_mask: `[batch, tokens]`, 1 for tokens and 0 for padding, on either side. None: all are tokens.
            token_type_ids: `[batch, tokens]`, left out where the backbone has none.
            position_ids: `[batch, tokens]`; by default counted over the tokens, so that padding never shifts them.
            inputs_embeds: `[batch, tokens, hidden_size]`, instead of `input_ids`.
            labels: `[batch]` class indices; `[batch, num_labels]` 0 or 1 for multi-label; `[batch]` or
                `[batch, num_labels]` numbers for regression.
            hidden_states: `[batch, tokens, layers, hidden_size]`, the backbone's hidden states at the layers in use,
                instead of running it; or a sequence with one `[batch, tokens, hidden_size]` per layer.
            **requests: the optional outputs; see `Requests`.

        Returns:
            A `CapsuleHeadClassifierOutput`.

        Raises:
            ValueError: If inputs or labels do not fit the model.
            TypeError: If labels, tokens or mask are no tensors.
        """
        inputs: dict[str, Tensor | bool | None] = {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        return self._classify(inputs, attention_mask, labels, hidden_states, **requests)


class CapsuleHeadForAudioClassification(CapsuleHeadClassifier):
    """A routing-capsule head on any audio backbone: all frames at all layers, routed to parts, to classes.

    A backbone's frames are fewer than its input's samples: the mask is mapped to them with the backbone's own count.
    Scores, regression and mixup: see `CapsuleHeadClassifier`.
    """

    main_input_name = "input_values"
    input_modalities = ("audio",)  # type: ignore[assignment]  # as transformers' own models have it
    backbone_inputs = AUDIO_INPUTS

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        hidden_states: Tensor | Sequence[Tensor] | None = None,
        **requests: Unpack[Requests],
    ) -> CapsuleHeadClassifierOutput:
        """Score audio.

        Args:
            input_values: `[batch, samples]`, from the backbone's feature extractor; or what it makes under this name.
            input_features: `[batch, frames, bins]` or `[batch, bins, frames]`, a spectrum, for backbones that take one.
            attention_mask: `[batch, samples]`, or `[batch, frames]` of the spectrum, 1 for audio and 0 for padding on
                the right. None: all is audio. With `hidden_states` it is of their tokens.
            labels: as in `CapsuleHeadForSequenceClassification.forward`.
            hidden_states: as in `CapsuleHeadForSequenceClassification.forward`.
            **requests: the optional outputs; see `Requests`.

        Returns:
            A `CapsuleHeadClassifierOutput`.

        Raises:
            ValueError: If inputs or labels do not fit the model.
            TypeError: If labels or mask are no tensors.
        """
        inputs: dict[str, Tensor | bool | None] = {"input_values": input_values, "input_features": input_features}
        return self._classify(inputs, attention_mask, labels, hidden_states, **requests)


class CapsuleHeadForImageClassification(CapsuleHeadClassifier):
    """A routing-capsule head on any image backbone: flat (ViT), hierarchical (Swin, ResNet), with packed patches.

    Scores and regression: see `CapsuleHeadClassifier`. With the stereo backbone of `capsule_heads.paper` and
    `config.head_type="spatial_pose"` it is the paper's smallNORB network. Mixup mixes the images; hidden states and
    masks where those are given, or where images come as patches and so may differ in shape.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # as transformers' own models have it
    backbone_inputs = IMAGE_INPUTS

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        image_position_ids: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        labels: Tensor | None = None,
        hidden_states: Tensor | Sequence[Tensor] | None = None,
        **requests: Unpack[Requests],
    ) -> CapsuleHeadClassifierOutput:
        """Score images.

        Args:
            pixel_values: `[batch, channels, height, width]`, from the backbone's image processor, or what else it makes
                under this name: patches, or frames `[batch, frames, channels, height, width]`.
            pixel_attention_mask: `[batch, patches]`, for backbones that take padded patches (SigLIP 2).
            spatial_shapes: `[batch, 2]`, rows and columns of patches, for the same.
            image_grid_thw: `[batch, 3]`, frames, rows and columns of patches, for backbones that take the patches of
                all images in one sequence (Qwen2-VL's tower): its states are split by these.
            image_position_ids: `[batch, patches, 2]`, for backbones that take the position of each patch, -1 for
                padding.
            interpolate_pos_encoding: for images of another size than the backbone's, where it can (ViT and its like).
            labels: as in `CapsuleHeadForSequenceClassification.forward`.
            hidden_states: as in `CapsuleHeadForSequenceClassification.forward`.
            **requests: the optional outputs; see `Requests`.

        Returns:
            A `CapsuleHeadClassifierOutput`.

        Raises:
            ValueError: If inputs or labels do not fit the model.
            TypeError: If labels are no tensor.
        """
        inputs: dict[str, Tensor | bool | None] = {
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "image_grid_thw": image_grid_thw,
            "image_position_ids": image_position_ids,
            "interpolate_pos_encoding": interpolate_pos_encoding,
        }
        return self._classify(inputs, None, labels, hidden_states, **requests)

    def _mix_inputs(
        self, inputs: dict[str, Tensor | bool | None], targets: Tensor | None
    ) -> tuple[dict[str, Tensor | bool | None], Tensor | None, bool]:
        pixels = inputs["pixel_values"]
        of_patches = ("pixel_attention_mask", "spatial_shapes", "image_grid_thw", "image_position_ids")
        if not isinstance(pixels, Tensor) or any(inputs[name] is not None for name in of_patches):
            return inputs, targets, False
        mix_samples = self._draw_mixup(targets, pixels)
        if mix_samples is not None and targets is not None:
            inputs, targets = {**inputs, "pixel_values": mix_samples(pixels)}, mix_samples(targets)
        return inputs, targets, True


AutoModel.register(CapsuleHeadConfig, CapsuleHeadModel, exist_ok=True)
AutoModelForAudioClassification.register(CapsuleHeadConfig, CapsuleHeadForAudioClassification, exist_ok=True)
AutoModelForImageClassification.register(CapsuleHeadConfig, CapsuleHeadForImageClassification, exist_ok=True)
AutoModelForSequenceClassification.register(CapsuleHeadConfig, CapsuleHeadForSequenceClassification, exist_ok=True)
