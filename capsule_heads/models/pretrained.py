"""What all capsule-head models share: how backbone and head come together, are frozen, loaded and saved."""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from ..heads import TokenDepthHead
from ..layers import Routing
from .backbones import build_backbone, count_hidden_states, run_backbone
from .configuration_capsule_head import CapsuleHeadConfig
from .loading import (
    BACKBONE_KWARGS,
    REPOSITORY_KWARGS,
    check_backbone_weights,
    check_config_kwargs,
    load_config,
    load_pretrained_backbone,
    reference_of,
)


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
        if backbone is None and build:
            config.head_only = False  # the backbone made here is random, not the one that the reference names
            backbone = build_backbone(config.base_config, backbone_dtype)
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
            name_or_path: the backbone: a model on the Hub, a local directory, or `package:NAME/FOLDER` for one that
                comes inside an installed Python package.
            num_labels: number of classes; default 2, or that of `id2label`.
            revision: the backbone's branch, tag or commit.
            **kwargs: fields of `CapsuleHeadConfig`, such as `depths` or `freeze_backbone`, and what loading a backbone
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
            base_model_name_or_path=reference_of(name_or_path),
            base_model_revision=commit,
            **kwargs,
        )
        model = cls(config, backbone=backbone)
        model._refer_to_backbone(config.freeze_backbone)
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
            load_backbone: False to leave out the backbone of a head-only checkpoint: the model takes hidden states.

        Raises:
            ValueError: for a checkpoint of another kind of model, or one that lacks the backbone's weights.
            OSError: if the checkpoint, or the backbone it refers to, is not found.
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
            backbone, _ = load_pretrained_backbone(
                config.base_model_name_or_path, config.base_model_revision, config.base_config, **backbone_kwargs
            )
        except OSError as error:
            revision = f" (revision {config.base_model_revision})" if config.base_model_revision else ""
            raise OSError(
                f"{source} holds a head alone, and its backbone {config.base_model_name_or_path}{revision} could not "
                f"be loaded: {error} Pass base_model_name_or_path=... (and base_model_revision=...) if it is elsewhere "
                "now, or load_backbone=False."
            ) from error
        config.base_config = backbone.config
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
        n_depths, width = self.head.depth_emb.shape
        if hidden_states is not None:
            if hidden_states.ndim != 4 or hidden_states.shape[2:] != (n_depths, width):
                raise ValueError(
                    f"hidden_states has shape {tuple(hidden_states.shape)}; expected [batch, tokens, depths, width], "
                    f"with {n_depths} depths of width {width}."
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


def token_mask(attention_mask: Tensor | None, like: Tensor) -> Tensor:
    """`[batch, tokens]`, 1 for a token and 0 for padding, for hidden states `[batch, tokens, width]`.

    In float32 or wider, whatever the states are: mixup makes fractions of it, which bfloat16 would round to two digits.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if attention_mask is None:
        return torch.ones(like.shape[:2], dtype=dtype, device=like.device)
    if attention_mask.shape != like.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected [batch, tokens], here "
            f"{tuple(like.shape[:2])}."
        )
    return attention_mask.to(device=like.device, dtype=dtype)
