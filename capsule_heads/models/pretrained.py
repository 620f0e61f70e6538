"""What all capsule-head models share: how backbone and head come together, are frozen and loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from ..checks import check_dtype
from ..control_heads import AttentivePoolingHead, LinearHead, ScalarMixHead, VectorRouting
from ..heads import PartDetector, PlaceConv
from ..layers import Routing
from ..weights import sample_weights
from .backbone_probe import probe_hidden_sizes
from .backbones import (
    TEXT_INPUTS,
    Part,
    build_backbone,
    check_hidden_states,
    main_input_name,
    run_backbone,
    token_masks,
)
from .configuration_capsule_head import CapsuleHeadConfig
from .loading import (
    BACKBONE_KWARGS,
    REPOSITORY_KWARGS,
    build_head,
    candidates,
    check_config_kwargs,
    check_weights,
    is_quantised,
    load_backbone_config,
    load_config,
    load_pretrained_backbone,
    reading_weights,
    reference_of,
)
from .saving import SavingMixin
from .windows import run_in_windows

# The modules of heads that have parameters of their own, and initialise them.
WITH_PARAMETERS = (
    AttentivePoolingHead,
    LinearHead,
    PartDetector,
    PlaceConv,
    Routing,
    ScalarMixHead,
    VectorRouting,
    nn.LayerNorm,
)


class CapsuleHeadPreTrainedModel(SavingMixin, PreTrainedModel):
    """What all capsule-head models share: a backbone, frozen or not, and how both are loaded and saved.

    Args:
        config: the model's configuration.
        n_out: number of the head's output capsules; None for a head that stops at the parts.
        backbone: the backbone; None to build one with random weights.
        build: False to build none where none is given.
        backbone_dtype: of the backbone that is built; None for that of its configuration.
        trust_backbone_code: whether to run code that came with the backbone, to build it.
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
        trust_backbone_code: bool = False,
    ) -> None:
        super().__init__(config)
        # The head comes first: a model's dtype and device are those of its first parameter, and the head's are saved.
        self.head = build_head(config, n_out)
        if backbone is None and build:
            config.head_only = False  # the backbone made here is random, not the one that the reference names
            backbone = build_backbone(
                config.base_config, backbone_dtype, config.part, trust_backbone_code, config.base_model_revision
            )
        if config.windowing is not None and not set(TEXT_INPUTS) & set(self.backbone_inputs):
            raise ValueError("window_length is for texts, and this model takes none; leave it out.")
        self._set_backbone(backbone)

    def _set_backbone(self, backbone: PreTrainedModel | None) -> None:
        if backbone is not None:
            self.check_backbone(backbone)
            if is_quantised(backbone) and not self.config.freeze_backbone:
                raise ValueError(
                    "A quantised backbone cannot be trained: leave it frozen (freeze_backbone=True), with or without "
                    "adapters of PEFT in it."
                )
            self._weights_as_loaded = sample_weights(backbone)
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
                takes: `dtype`, `device_map`, `attn_implementation`, `quantization_config`, `token`, `cache_dir`,
                `trust_remote_code`, ... The head is never quantised.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: if the backbone's hidden states are not `[batch, tokens, width]` or feature maps, it takes other
                inputs than this model, or a field has no such value.
            TypeError: for an unknown argument.
            OSError: if the backbone is not found.
        """
        backbone_kwargs = {name: kwargs.pop(name) for name in BACKBONE_KWARGS if name in kwargs}
        check_dtype(backbone_kwargs.get("dtype", backbone_kwargs.get("torch_dtype")))
        check_config_kwargs(kwargs)
        part = Part(kwargs.pop("stack", "encoder"), kwargs.pop("tower", None))
        from_config = isinstance(name_or_path, PreTrainedConfig)
        if num_labels is not None:
            kwargs["num_labels"] = num_labels
        if from_config:
            whole = name_or_path
            trust = backbone_kwargs.get("trust_remote_code", False)
            make = lambda config, part: (build_backbone(config, None, part, trust), config)  # noqa: E731 - the next is too
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
        trust_backbone_code: bool = False,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """Loads a checkpoint that `save_pretrained` wrote, and the backbone it refers to where it holds the head alone.

        Arguments as in transformers, and:

        Args:
            load_backbone: False to leave out the backbone of a head-only checkpoint: the model takes hidden states.
            quantization_config: of the backbone alone; by default that which it had when the head was saved.
            trust_backbone_code: whether to run code that comes with the backbone, from its own repository;
                `trust_remote_code`, an argument of the auto classes, is about this checkpoint's alone.

        Raises:
            ValueError: for a checkpoint of another kind, without the backbone's weights or with those to be quantised,
                or a backbone with code of its own that is not trusted.
            OSError: if the checkpoint, or the backbone it refers to, is not found or cannot be read. Of the checkpoint,
                nothing but safetensors files is.
        """
        source = pretrained_model_name_or_path
        if source is None:  # with a state_dict, as transformers' own tools do
            model, loading_info = super().from_pretrained(
                None, *model_args, config=config, output_loading_info=True, **kwargs
            )
            check_weights("The state_dict", loading_info, may_differ=True)
            return (model, loading_info) if output_loading_info else model
        loading_kwargs = {k: kwargs.pop(k) for k in (*BACKBONE_KWARGS, *REPOSITORY_KWARGS) if k in kwargs}
        check_dtype(loading_kwargs.get("dtype", loading_kwargs.get("torch_dtype")))
        loading_kwargs["trust_remote_code"] = trust_backbone_code  # an auto class has seen to the checkpoint's own
        kwargs["trust_backbone_code"] = trust_backbone_code  # the configuration and __init__ go by it
        config, kwargs = load_config(source, config, loading_kwargs, kwargs)
        backbone_kwargs = {name: loading_kwargs[name] for name in BACKBONE_KWARGS if name in loading_kwargs}
        # transformers would take one in the backbone's configuration to be for the head too.
        quantization_config = vars(config.base_config).pop("quantization_config", None)
        backbone_kwargs.setdefault("quantization_config", quantization_config)
        if loading_kwargs.pop("quantization_config", None) is not None and not config.head_only:
            raise ValueError(
                f"quantization_config is for a backbone, and {source} has the weights of backbone and head in one; "
                "expected a checkpoint saved with head_only=True."
            )
        dtype = backbone_kwargs.setdefault("dtype", backbone_kwargs.pop("torch_dtype", config.base_config.dtype))
        may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        loading_kwargs["use_safetensors"] = True  # a head is never saved as a pickle, which could execute code
        with reading_weights(source, loading_kwargs.get("subfolder", "")):
            model, loading_info = super().from_pretrained(
                source,
                *model_args,
                config=config,
                build=not config.head_only,
                backbone_dtype=None if dtype == "auto" else dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_weights says more clearly which they are
                **loading_kwargs,
                **kwargs,
            )
        check_weights(source, loading_info, may_differ)
        if config.head_only and load_backbone:
            model._load_backbone(source, backbone_kwargs)
        elif config.head_only and quantization_config is not None:
            model.config.base_config.quantization_config = quantization_config
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
        config.base_config = base_config
        self._set_backbone(backbone)
        self.post_init()  # again, now that there is a backbone: it collects the backbone's tied weights and the like
        self._refer_to_backbone(config.freeze_backbone)

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

    @property
    def _has_adapters(self) -> bool:
        # PEFT sets this on the model that it puts adapters into, and takes it off when it takes them out.
        return any(hasattr(module, "peft_config") for module in (self, self.backbone))

    @property
    def _backbone_trains(self) -> bool:
        """Whether anything in the backbone trains: its own weights, or adapters in a frozen one."""
        if not self.config.freeze_backbone:
            return True
        return self._has_adapters and any(parameter.requires_grad for parameter in self.backbone.parameters())

    def train(self, mode: bool = True):
        """Sets training mode; a frozen backbone stays in evaluation mode, without dropout, unless it has adapters."""
        if self.backbone is None or not self.config.freeze_backbone or self._has_adapters:  # PEFT froze all else
            return super().train(mode)
        # Not to training mode and back: Trainer calls this in every step, and a backbone has hundreds of modules.
        self.training = mode
        for module in self.children():
            if module is not self.backbone:
                module.train(mode)
        if self.backbone.training or any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self._freeze()
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for every module of ours, also for those of a checkpoint that lacks some weights; the
        # functions of nn.init leave loaded tensors alone meanwhile.
        if isinstance(module, WITH_PARAMETERS):
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
            states = check_hidden_states(hidden_states, self.head.d_emb)
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
            with nullcontext() if self._backbone_trains else torch.no_grad():
                run = partial(run_backbone, self.backbone, config.depths, config.hidden_sizes, config.stack)
                states, masks = run_in_windows(run, config.windowing, inputs)
        device = next(self.head.parameters()).device
        return [x.to(device) for x in states], [mask.to(device) for mask in masks]  # the head sees to the dtype
