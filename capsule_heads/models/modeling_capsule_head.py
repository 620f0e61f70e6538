"""Models: a backbone and a routing-capsule head on its hidden states."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..heads import HeadOutput, TokenDepthHead
from ..layers import Routing
from ..mixup import draw_mixup, mix
from .backbones import build_backbone, count_hidden_states, run_backbone
from .configuration_capsule_head import CapsuleHeadConfig
from .loading import BACKBONE_KWARGS, HUB_KWARGS, check_checkpoint_type, check_config_kwargs, load_pretrained_backbone
from .losses import check_labels, problem_targets, infer_problem_type, problem_loss

# A regression's value is read from the poses of this many capsules: with a single one there is nothing to route.
N_REGRESSION_CAPSULES = 8


@dataclass
class CapsuleHeadModelOutput(ModelOutput):
    """Part capsules: what the tokens at all depths were routed to.

    Attributes:
        scores: `[batch, n_parts]`, scores of the parts, as logits.
        poses: `[batch, n_parts, 1, d_cap]`, their poses.
        variances: `[batch, n_parts, 1, d_cap]`, of the votes for each pose.
        hidden_states: on request, per depth used `[batch, tokens, width]`.
        routing_probabilities: on request, one tensor `[batch, tokens * depths, n_parts]`.
    """

    scores: Tensor | None = None
    poses: Tensor | None = None
    variances: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    routing_probabilities: tuple[Tensor, ...] | None = None


@dataclass
class CapsuleHeadClassifierOutput(ModelOutput):
    """Class scores.

    Attributes:
        loss: scalar, where labels were given.
        logits: `[batch, num_labels]`, float32: the scores of the class capsules; for regression, values in the labels'
            unit.
        hidden_states: on request, per depth used `[batch, tokens, width]`.
        poses: on request, `[batch, n_capsules, 1, d_cap]`, poses of the class capsules.
        variances: on request, `[batch, n_capsules, 1, d_cap]`, of the votes for each pose.
        routing_probabilities: on request, per routing `[batch, n_inp, n_out]`: from tokens and depths to parts (input
            `token * n_depths + depth index`), and from parts to classes.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    poses: Tensor | None = None
    variances: Tensor | None = None
    routing_probabilities: tuple[Tensor, ...] | None = None


class CapsuleHeadPreTrainedModel(PreTrainedModel):
    """What all capsule-head models share: a backbone, frozen or not, and how both are loaded and saved."""

    config_class = CapsuleHeadConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch: the Trainer has to divide it when it accumulates
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self, config: CapsuleHeadConfig, n_out: int | None, backbone: PreTrainedModel | None, build: bool
    ) -> None:
        super().__init__(config)
        # The head comes first: a model's dtype and device are those of its first parameter, and the head's are saved.
        self.head = TokenDepthHead(
            d_depth=len(config.depths),
            d_emb=config.get_text_config().hidden_size,
            n_out=n_out,
            d_inp=config.d_inp,
            n_parts=config.n_parts,
            d_cap=config.d_cap,
            n_iters=config.n_iters,
            p_model=config.p_model,
            single_beta=config.single_beta,
            eps=config.eps,
            strategy=config.strategy,
        )
        if build:
            config.head_only = False  # the backbone made here is random, not the one that the reference names
            backbone = build_backbone(config.base_config)
        self.backbone = backbone
        self._freeze()

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str | os.PathLike,
        *,
        num_labels: int | None = None,
        revision: str | None = None,
        **kwargs,
    ):
        """Puts a new head on a pretrained backbone.

        Args:
            name_or_path: the backbone, on the Hub or in a local directory.
            num_labels: number of classes; default 2, or that of `id2label`.
            revision: the backbone's branch, tag or commit.
            **kwargs: fields of `CapsuleHeadConfig`, such as `depths` or `freeze_backbone`, and what loading the backbone
                takes: `dtype`, `device_map`, `attn_implementation`, `token`, `cache_dir`, `trust_remote_code`, ...

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: if the backbone's hidden states are not `[batch, tokens, width]`, or a field has no such value.
            TypeError: for an unknown argument.
            OSError: if the backbone is not found.
        """
        backbone_kwargs = {name: kwargs.pop(name) for name in BACKBONE_KWARGS if name in kwargs}
        check_config_kwargs(kwargs)
        backbone, commit = load_pretrained_backbone(name_or_path, revision, **backbone_kwargs)
        if num_labels is not None:
            kwargs["num_labels"] = num_labels
        kwargs.setdefault("n_hidden_states", count_hidden_states(backbone))
        config = CapsuleHeadConfig(
            base_config=backbone.config,
            base_model_name_or_path=str(name_or_path),
            base_model_revision=commit,
            **kwargs,
        )
        config.head_only = config.freeze_backbone
        model = cls(config, backbone=backbone)
        model.head.to(backbone.device)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        config=None,
        load_backbone: bool = True,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """Loads a checkpoint that `save_pretrained` wrote, and the backbone it refers to where it holds the head alone.

        Arguments as in transformers, and:

        Args:
            load_backbone: False to leave the backbone out of a head-only checkpoint; the model then takes hidden states.

        Raises:
            ValueError: for a checkpoint of another kind of model, or one that lacks the backbone's weights.
            OSError: if the checkpoint, or the backbone it refers to, is not found.
        """
        if pretrained_model_name_or_path is None:  # with a state_dict, as transformers' own tools do
            return super().from_pretrained(
                None, *model_args, config=config, output_loading_info=output_loading_info, **kwargs
            )
        head_repo_kwargs = {k: kwargs[k] for k in (*HUB_KWARGS, "revision", "subfolder") if k in kwargs}
        check_checkpoint_type(pretrained_model_name_or_path, **head_repo_kwargs)
        if not isinstance(config, CapsuleHeadConfig):
            config, kwargs = cls.config_class.from_pretrained(
                config or pretrained_model_name_or_path, return_unused_kwargs=True, **head_repo_kwargs, **kwargs
            )
            kwargs = {**head_repo_kwargs, **kwargs}
        backbone_kwargs = {name: kwargs[name] for name in BACKBONE_KWARGS if name in kwargs}
        backbone_dtype = backbone_kwargs.get("dtype", backbone_kwargs.pop("torch_dtype", config.base_config.dtype))
        head_only = config.head_only

        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            config=config,
            build=not head_only,
            output_loading_info=True,
            **kwargs,
        )
        missing = [key for key in loading_info["missing_keys"] if key.startswith("backbone.")]
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of the backbone, among them {missing[0]}; "
                "expected a whole checkpoint, or one saved with head_only=True."
            )
        if head_only and load_backbone:
            model._attach_reference_backbone(
                pretrained_model_name_or_path, {**backbone_kwargs, "dtype": backbone_dtype}
            )
        elif model.backbone is not None and backbone_dtype not in (None, "auto"):
            model.backbone.to(backbone_dtype)  # transformers has one dtype for all; head and backbone may differ
        model._freeze()
        model.eval()
        return (model, loading_info) if output_loading_info else model

    def _attach_reference_backbone(self, source, backbone_kwargs: dict) -> None:
        config = self.config
        try:
            backbone, _ = load_pretrained_backbone(
                config.base_model_name_or_path, config.base_model_revision, config.base_config, **backbone_kwargs
            )
        except OSError as error:
            revision = f" (revision {config.base_model_revision})" if config.base_model_revision else ""
            raise OSError(
                f"{source} holds a head alone, and its backbone {config.base_model_name_or_path}{revision} could not be "
                f"loaded: {error} Pass base_model_name_or_path=... if it is elsewhere now, or load_backbone=False."
            ) from error
        config.base_config = backbone.config
        config.head_only = config.freeze_backbone
        self.backbone = backbone
        self.post_init()  # again, now that there is a backbone: it collects the backbone's tied weights and the like

    def save_pretrained(self, save_directory, *args, head_only: bool | None = None, **kwargs) -> None:
        """Saves as in transformers; the backbone too, or only where its weights can be had.

        Args:
            save_directory: where to.
            *args: as in transformers.
            head_only: True to write the head and the reference to its backbone, False to write all weights. None for
                the head alone if the backbone is, unchanged, the one that the configuration refers to.
            **kwargs: as in transformers.

        Raises:
            ValueError: for `head_only=True` where the backbone's weights are not those of its reference, and for
                `head_only=False` where there is no backbone.
        """
        config = self.config
        refers = config.head_only
        if head_only and not refers:
            raise ValueError(
                "head_only=True would lose the backbone: its weights were trained here, or are not from a checkpoint "
                "that the configuration refers to. Save all weights, with head_only=False."
            )
        if head_only is False and self.backbone is None:
            raise ValueError("head_only=False needs the backbone, and this model was loaded with load_backbone=False.")
        config.head_only = refers if head_only is None else head_only
        if self.backbone is not None:
            config.base_config.dtype = self.backbone.dtype
        # Trainer, too, goes by this list: it then expects a checkpoint without these weights.
        self._keys_to_ignore_on_save = self._backbone_keys() if config.head_only else set()
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            config.head_only = refers
            self._keys_to_ignore_on_save = self._backbone_keys() if refers else set()

    def _backbone_keys(self) -> set[str]:
        return set() if self.backbone is None else {f"backbone.{key}" for key in self.backbone.state_dict()}

    def _freeze(self) -> None:
        if self.backbone is not None and self.config.freeze_backbone:
            self.backbone.requires_grad_(False)
            self.backbone.eval()

    def train(self, mode: bool = True):
        """Sets training mode; a frozen backbone stays in evaluation mode, without dropout."""
        super().train(mode)
        self._freeze()
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for every module of ours, also for those of a checkpoint that lacks some weights; its
        # `init` leaves loaded tensors alone.
        if isinstance(module, TokenDepthHead):
            init.zeros_(module.depth_emb)
            init.kaiming_normal_(module.detect_parts[0].weight)
            init.zeros_(module.detect_parts[0].bias)
        elif isinstance(module, Routing):
            init.normal_(module.W, std=1.0 / module.d_inp)
            for parameter in (module.B, module.B_brk, module.beta_use, module.beta_ign):
                if parameter is not None:
                    init.zeros_(parameter)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers would leave containers without parameters of their own uninitialised otherwise."""
        return False

    def _hidden_states(self, hidden_states: Tensor | None, inputs: dict[str, Tensor | None]) -> list[Tensor]:
        """The hidden states at the depths in use, given or computed, in the head's dtype and on its device."""
        n_depths = len(self.config.depths)
        if hidden_states is not None:
            if hidden_states.ndim != 4 or hidden_states.shape[2] != n_depths:
                raise ValueError(
                    f"hidden_states has shape {tuple(hidden_states.shape)}; expected [batch, tokens, {n_depths} depths, "
                    "width]."
                )
            states = hidden_states.unbind(2)
        else:
            if self.backbone is None:
                raise ValueError("This model has no backbone: pass hidden_states, or load it with load_backbone=True.")
            if (inputs["input_ids"] is None) == (inputs["inputs_embeds"] is None):
                raise ValueError("Pass either input_ids or inputs_embeds (or hidden_states, in the place of both).")
            with torch.no_grad() if self.config.freeze_backbone else nullcontext():
                states = run_backbone(self.backbone, self.config.depths, self.config.n_hidden_states, **inputs)
        weight = self.head.depth_emb
        return [x.to(device=weight.device, dtype=weight.dtype) for x in states]


def _token_mask(attention_mask: Tensor | None, like: Tensor) -> Tensor:
    """`[batch, tokens]`, 1 for a token and 0 for padding."""
    if attention_mask is None:
        return torch.ones(like.shape[:2], dtype=like.dtype, device=like.device)
    if attention_mask.shape != like.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected [batch, tokens], {tuple(like.shape[:2])}."
        )
    return attention_mask.to(device=like.device, dtype=like.dtype)


class CapsuleHeadModel(CapsuleHeadPreTrainedModel):
    """A backbone and the part capsules that its hidden states are routed to, without classes.

    It loads the checkpoint of a classifier, and gives its part capsules as features.
    """

    _keys_to_ignore_on_load_unexpected = [r"^head\.routings\.1\.", r"^regressor\."]

    def __init__(
        self, config: CapsuleHeadConfig, backbone: PreTrainedModel | None = None, build: bool | None = None
    ) -> None:
        super().__init__(config, None, backbone, backbone is None if build is None else build)
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
        parts = self.head(states, _token_mask(attention_mask, states[0]), bool(output_routing))
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

    def __init__(
        self, config: CapsuleHeadConfig, backbone: PreTrainedModel | None = None, build: bool | None = None
    ) -> None:
        regression = config.problem_type == "regression"
        n_out = N_REGRESSION_CAPSULES if regression else config.num_labels
        super().__init__(config, n_out, backbone, backbone is None if build is None else build)
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
            self.config.problem_type = infer_problem_type(self.config, labels)
            check_labels(self.config, labels)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        states = self._hidden_states(hidden_states, inputs)
        mask = _token_mask(attention_mask, states[0])
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
