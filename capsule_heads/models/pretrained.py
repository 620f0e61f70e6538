"""What all capsule-head models share: how backbone and head come together, are frozen, loaded and saved."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from ..heads import LinearHead, PartDetector, PlaceConv, SpatialPoseHead, TokenDepthHead
from ..layers import Routing
from .backbone_probe import probe_hidden_sizes
from .backbones import TEXT_INPUTS, Part, build_backbone, check_mask, describe, main_input_name, run_backbone
from .configuration_capsule_head import CapsuleHeadConfig
from .loading import (
    BACKBONE_KWARGS,
    REPOSITORY_KWARGS,
    candidates,
    check_backbone_weights,
    check_config_kwargs,
    load_backbone_config,
    load_config,
    load_pretrained_backbone,
    reading_weights,
    reference_of,
)

ROUTING_OPTIONS = ("n_parts", "d_cap", "n_iters", "p_model", "single_beta", "eps", "strategy")


class CapsuleHeadPreTrainedModel(PreTrainedModel):
    """What all capsule-head models share: a backbone, frozen or not, and how both are loaded and saved.

    Args:
        config: the model's configuration.
        n_out: number of the head's output capsules; None for a head that stops at the parts.
        backbone: the backbone; None to build one with random weights.
        build: False to build none where none is given.
        backbone_dtype: of the backbone that is built; None for that of its configuration.
    """

    config_class = CapsuleHeadConfig
    base_model_prefix = "backbone"
    backbone_inputs: tuple[str, ...] = TEXT_INPUTS  # a backbone's main input is one of these
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch: the Trainer has to divide it when it accumulates
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        config: CapsuleHeadConfig,
        n_out: int | None,
        backbone: PreTrainedModel | None,
        build: bool = True,
        backbone_dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(config)
        # The head comes first: a model's dtype and device are those of its first parameter, and the head's are saved.
        self.head = build_head(config, n_out)
        if backbone is None and build:
            config.head_only = False  # the backbone made here is random, not the one that the reference names
            backbone = build_backbone(config.base_config, backbone_dtype, config.part)
        if backbone is not None:
            self.check_backbone(backbone)
        self.backbone = backbone
        self._freeze()

    @classmethod
    def check_backbone(cls, backbone: PreTrainedModel) -> None:
        """Checks that a backbone takes what this model takes.

        Raises:
            ValueError: naming what it takes, and the model for it.
        """
        name = main_input_name(backbone)
        if name not in cls.backbone_inputs:
            raise ValueError(
                f"{backbone.config.model_type} takes {name}; {cls.__name__} expects a backbone that takes "
                f"{' or '.join(cls.backbone_inputs)}. For text there is CapsuleHeadForSequenceClassification, for "
                "images CapsuleHeadForImageClassification, for sound CapsuleHeadForAudioClassification."
            )

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str | os.PathLike | PreTrainedConfig,
        *,
        num_labels: int | None = None,
        revision: str | None = None,
        **kwargs,
    ):
        """Puts a new head on a pretrained backbone.

        Args:
            name_or_path: the backbone: a model on the Hub, a local directory, or `package:NAME/FOLDER` for one that
                comes inside an installed Python package; or a configuration, for one with random weights.
            num_labels: number of classes; default 2, or that of `id2label`.
            revision: the backbone's branch, tag or commit.
            **kwargs: fields of `CapsuleHeadConfig`, such as `depths` or `freeze_backbone`, and what loading a backbone
                takes: `dtype`, `device_map`, `attn_implementation`, `token`, `cache_dir`, `trust_remote_code`, ...

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: if the backbone's hidden states are not `[batch, tokens, width]` or feature maps, it takes other
                inputs than this model, or a field has no such value.
            TypeError: for an unknown argument.
            OSError: if the backbone is not found.
        """
        backbone_kwargs = {name: kwargs.pop(name) for name in BACKBONE_KWARGS if name in kwargs}
        check_config_kwargs(kwargs)
        part = Part(kwargs.pop("stack", "encoder"), kwargs.pop("tower", None))
        from_config = isinstance(name_or_path, PreTrainedConfig)
        if num_labels is not None:
            kwargs["num_labels"] = num_labels
        if from_config:
            whole = name_or_path
            make = lambda config, part: (build_backbone(config, part=part), config)  # noqa: E731 - as short as the next
        else:
            whole, commit = load_backbone_config(name_or_path, revision, **backbone_kwargs)
            make = lambda config, part: load_pretrained_backbone(  # noqa: E731
                name_or_path, commit or revision, config, part, **backbone_kwargs
            )
            kwargs |= {"base_model_name_or_path": reference_of(name_or_path), "base_model_revision": commit}
        CapsuleHeadConfig.check_part(part, whole)
        choices = candidates(whole, cls.backbone_inputs, part)
        backbone, found = cls._first_that_runs(choices, make, kwargs.pop("hidden_sizes", None))
        config = CapsuleHeadConfig(**found, **kwargs)
        model = cls(config, backbone=backbone)
        model._refer_to_backbone(config.freeze_backbone and not from_config)
        model.head.to(backbone.device)
        return model.eval()

    @classmethod
    def _first_that_runs(
        cls,
        choices: Sequence[tuple[PreTrainedConfig, Part]],
        make: Callable[[PreTrainedConfig, Part], tuple[PreTrainedModel, PreTrainedConfig]],
        hidden_sizes: list[int] | None,
    ) -> tuple[PreTrainedModel, dict]:
        """The backbone of the first choice that runs on this model's inputs alone, and the fields that say which."""
        first_error = None
        for config, part in choices:
            try:
                backbone, base_config = make(config, part)
                cls.check_backbone(backbone)
                sizes = hidden_sizes or probe_hidden_sizes(backbone, part.stack)
                return backbone, {"base_config": base_config, "hidden_sizes": sizes, **part._asdict()}
            except ValueError as error:
                first_error = first_error or error
        raise first_error

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
            load_backbone: False to leave out the backbone of a head-only checkpoint: the model takes hidden states.

        Raises:
            ValueError: for a checkpoint of another kind of model, or one that lacks the backbone's weights.
            OSError: if the checkpoint, or the backbone it refers to, is not found or cannot be read. Of the checkpoint,
                nothing but safetensors files is.
        """
        source = pretrained_model_name_or_path
        if source is None:  # with a state_dict, as transformers' own tools do
            model, loading_info = super().from_pretrained(
                None, *model_args, config=config, output_loading_info=True, **kwargs
            )
            check_backbone_weights("The state_dict", loading_info)
            return (model, loading_info) if output_loading_info else model
        loading_kwargs = {k: kwargs.pop(k) for k in (*BACKBONE_KWARGS, *REPOSITORY_KWARGS) if k in kwargs}
        config, kwargs = load_config(source, config, loading_kwargs, kwargs)
        backbone_kwargs = {name: loading_kwargs[name] for name in BACKBONE_KWARGS if name in loading_kwargs}
        dtype = backbone_kwargs.setdefault("dtype", backbone_kwargs.pop("torch_dtype", config.base_config.dtype))
        loading_kwargs["use_safetensors"] = True  # a head is never saved as a pickle, which could execute code
        with reading_weights(source, loading_kwargs.get("subfolder", "")):
            model, loading_info = super().from_pretrained(
                source,
                *model_args,
                config=config,
                build=not config.head_only,
                backbone_dtype=None if dtype == "auto" else dtype,
                output_loading_info=True,
                **loading_kwargs,
                **kwargs,
            )
        if not config.head_only:
            check_backbone_weights(source, loading_info)
        elif load_backbone:
            model._load_backbone(source, backbone_kwargs)
        model.eval()  # which freezes the backbone too
        return (model, loading_info) if output_loading_info else model

    def _load_backbone(self, source: str | os.PathLike, backbone_kwargs: dict) -> None:
        config = self.config
        try:
            backbone, base_config = load_pretrained_backbone(
                config.base_model_name_or_path,
                config.base_model_revision,
                config.base_config,
                config.part,
                **backbone_kwargs,
            )
        except OSError as error:
            revision = f" (revision {config.base_model_revision})" if config.base_model_revision else ""
            raise OSError(
                f"{source} holds a head alone, and its backbone {config.base_model_name_or_path}{revision} could not "
                f"be loaded: {error} Pass base_model_name_or_path=... (and base_model_revision=...) if it is elsewhere "
                "now, or load_backbone=False."
            ) from error
        self.check_backbone(backbone)
        config.base_config = base_config
        self.backbone = backbone
        self.post_init()  # again, now that there is a backbone: it collects the backbone's tied weights and the like
        self._refer_to_backbone(config.freeze_backbone)

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
        if os.path.isfile(save_directory):  # of which transformers would say so in its log, and return
            raise NotADirectoryError(f"{save_directory} is a file; expected a directory to save to.")
        config = self.config
        refers = config.head_only and (config.freeze_backbone or self.backbone is None)
        if head_only and not refers:
            raise ValueError(
                "head_only=True would lose the backbone: its weights were trained here, or are not from a checkpoint "
                "that the configuration refers to. Save all weights, with head_only=False."
            )
        if head_only is False and self.backbone is None:
            raise ValueError("head_only=False needs the backbone, and this model was loaded with load_backbone=False.")
        if self.backbone is not None:
            config.base_config.dtype = self.backbone.dtype
        self._refer_to_backbone(refers if head_only is None else head_only)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._refer_to_backbone(refers)

    def _refer_to_backbone(self, refers: bool) -> None:
        # Whether the backbone is left out when the model is saved, because the configuration says where to get it.
        self.config.head_only = refers
        left_out = self.backbone.state_dict() if refers and self.backbone is not None else ()
        # Trainer, too, goes by this list: it then expects a checkpoint without these weights.
        self._keys_to_ignore_on_save = {f"backbone.{key}" for key in left_out}

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As in transformers; the backbone is then no longer the one of its reference, and is saved with the head."""
        before = self.get_input_embeddings().weight.shape
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if embeddings.weight.shape != before:
            self._refer_to_backbone(False)
            self._freeze()
        return embeddings

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
        # transformers calls this for every module of ours, also for those of a checkpoint that lacks some weights; the
        # functions of nn.init leave loaded tensors alone meanwhile.
        if isinstance(module, LinearHead | PartDetector | PlaceConv | Routing | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.BatchNorm1d):
            super()._init_weights(module)  # which leaves loaded running statistics alone too

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers would leave containers without parameters of their own uninitialised otherwise."""
        return False

    def compute_hidden_states(
        self, *, attention_mask: Tensor | None = None, **inputs: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The backbone's hidden states at the depths in use, without running the head.

        Args:
            attention_mask: as in `forward`.
            **inputs: the other inputs of `forward` that go to the backbone.

        Returns:
            Per depth `[batch, tokens, width]`, which `forward` takes as `hidden_states`; and per depth `[batch,
            tokens]`, 1 for a token and 0 for padding. Without a graph where the backbone is frozen.

        Raises:
            ValueError: for inputs that do not fit the model, or a model without a backbone.
        """
        known = dict.fromkeys((*self.backbone_inputs, "inputs_embeds"))
        return self._hidden_states(None, {**known, "attention_mask": attention_mask, **inputs})

    def _hidden_states(
        self, hidden_states: Tensor | Sequence[Tensor] | None, inputs: dict[str, Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The hidden states at the depths in use, given or computed, and their masks, on the head's device."""
        if hidden_states is not None:
            states = self._check_hidden_states(hidden_states)
            masks = token_masks(inputs.get("attention_mask"), states)
        else:
            if self.backbone is None:
                raise ValueError("This model has no backbone: pass hidden_states, or load it with load_backbone=True.")
            if sum(inputs.get(name) is not None for name in (*self.backbone_inputs, "inputs_embeds")) != 1:
                names = [name for name in inputs if name in (*self.backbone_inputs, "inputs_embeds")]
                raise ValueError(f"Pass one of {', '.join(names)} (or hidden_states, in the place of them).")
            config = self.config
            # Not inference_mode: the head's affine map keeps its input for the gradient of its weight, and autograd
            # takes no inference tensors. A clone of every state would cost more than the mode saves.
            with torch.no_grad() if config.freeze_backbone else nullcontext():
                states, masks = run_backbone(self.backbone, config.depths, config.hidden_sizes, config.stack, **inputs)
        device = next(self.head.parameters()).device
        return [x.to(device) for x in states], [mask.to(device) for mask in masks]  # the head sees to the dtype

    def _check_hidden_states(self, hidden_states: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        """Hidden states that a user gave, one per depth."""
        widths = self.head.d_emb
        stacked = isinstance(hidden_states, Tensor) and hidden_states.ndim == 4
        states = hidden_states.unbind(2) if stacked else hidden_states
        for x in states:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                given = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"hidden_states are {given}; expected floating-point tensors.")
        shapes = [tuple(x.shape) for x in states]
        fit = all(len(s) == 3 and s[0] == shapes[0][0] and s[-1] == w for s, w in zip(shapes, widths))
        if len(shapes) != len(widths) or not fit:
            given = tuple(hidden_states.shape) if isinstance(hidden_states, Tensor) else shapes
            raise ValueError(
                f"hidden_states has shape {given}; expected [batch, tokens, depths, width], or one [batch, tokens, "
                f"width] per depth, with {len(widths)} depths of width {describe(widths)}."
            )
        return states


def build_head(config: CapsuleHeadConfig, n_out: int | None) -> nn.Module:
    """The head that a configuration describes.

    Args:
        config: its `head_type` chooses.
        n_out: number of output capsules, or scores; None for a head that stops at the parts.

    Raises:
        ValueError: for a head without parts that would have to stop at them.
    """
    d_emb = [config.hidden_sizes[depth] for depth in config.depths]
    if config.head_type == "linear":
        if n_out is None:
            raise ValueError('A head of head_type="linear" has no parts; load it as a classifier.')
        return LinearHead(d_emb=d_emb, n_out=n_out)
    options = {name: getattr(config, name) for name in ROUTING_OPTIONS}
    if config.head_type == "spatial_pose":
        return SpatialPoseHead(d_emb=d_emb, n_out=n_out, d_cov=config.d_cov, **options)
    return TokenDepthHead(d_emb=d_emb, n_out=n_out, d_inp=config.d_inp, **options)


def token_masks(attention_mask: Tensor | None, hidden_states: Sequence[Tensor]) -> list[Tensor]:
    """Per depth, `[batch, tokens]`, 1 for a token and 0 for padding, for hidden states `[batch, tokens, width]`.

    In float32 or wider, whatever the states are: mixup makes fractions of it, which bfloat16 would round to two digits.
    """
    dtype = torch.promote_types(hidden_states[0].dtype, torch.float32)
    if attention_mask is None:
        return [torch.ones(x.shape[:2], dtype=dtype, device=x.device) for x in hidden_states]
    check_mask(attention_mask, hidden_states[0].shape[:2])
    return [attention_mask.to(device=hidden_states[0].device, dtype=dtype)] * len(hidden_states)
