"""What all capsule-head models share: how hidden states are computed, and what trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from ..backbones.running import check_hidden_states, token_masks
from ..heads.base import reset, self_initialised
from ..hub import refuse_auto_class
from .checkpoint import CheckpointModel


class CapsuleHeadPreTrainedModel(CheckpointModel):
    """A backbone, frozen or not, and a head on its hidden states."""

    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch: the Trainer has to divide it when it accumulates
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize as in transformers. The backbone then differs from its reference, and is saved with the head."""
        before = self.get_input_embeddings().weight.shape
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if embeddings.weight.shape != before:
            self._refer_to_backbone(False)
            self.freeze()
        return embeddings

    @property
    def backbone_trains(self) -> bool:
        """Whether anything in the backbone trains: its own weights, or adapters in a frozen one."""
        if not self.config.freeze_backbone:
            return True
        return (
            self.has_adapters and self.backbone is not None and any(x.requires_grad for x in self.backbone.parameters())
        )

    def train(self, mode: bool = True) -> Self:
        """Set training mode. A frozen backbone stays in evaluation mode, without dropout, unless it has adapters."""
        if self.backbone is None or not self.config.freeze_backbone or self.has_adapters:  # PEFT froze all else
            return super().train(mode)
        # Not to training mode and back: Trainer calls this in every step, and a backbone has hundreds of modules.
        self.training = mode
        for module in self.children():
            if module is not self.backbone:
                module.train(mode)
        if self.backbone.training or any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.freeze()
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for every module of ours, also for those of a checkpoint that lacks some weights; the
        # functions of nn.init leave loaded tensors alone meanwhile.
        if isinstance(module, nn.BatchNorm1d):
            super()._init_weights(module)  # which leaves loaded running statistics alone too
        elif any(module is initialised for initialised in self_initialised(self.head)):
            reset(module)

    @classmethod
    def register_for_auto_class(cls, auto_class: object = None) -> NoReturn:
        """Refuse; see `hub.refuse_auto_class`."""
        refuse_auto_class(cls)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: transformers would leave containers without parameters of their own uninitialised otherwise."""
        return False

    def compute_hidden_states(
        self,
        *,
        hidden_states: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **inputs: Tensor | bool | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the backbone's hidden states at the layers in use, without running the head.

        Args:
            hidden_states: as in `forward`: states that were computed before, which are checked and returned.
            attention_mask: as in `forward`.
            **inputs: the other inputs of `forward` that go to the backbone.

        Returns:
            Per layer `[batch, tokens, hidden_size]`, which `forward` takes as `hidden_states`; and per layer `[batch,
            tokens]`, 1 for a token and 0 for padding. Both are on the head's device, and without a graph where the
            backbone is frozen.

        Raises:
            ValueError: If inputs do not fit the model, or there are none that a backbone could take.
        """
        if hidden_states is not None:
            states = list(check_hidden_states(hidden_states, self.head.hidden_sizes))
            masks = token_masks(attention_mask, states)
        else:
            if self.backbone is None:
                raise ValueError("This model has no backbone: pass hidden_states, or load it with load_backbone=True.")
            names = [name for name in (*self.backbone_inputs, "inputs_embeds") if name in inputs]
            if sum(inputs[name] is not None for name in names) != 1:
                expected = ", ".join(names or self.backbone_inputs)
                raise ValueError(f"Pass one of {expected} (or hidden_states, instead of them).")
            config = self.config
            given = {**inputs, "attention_mask": attention_mask}
            states, masks = config.backbone.run(self.backbone, config.layers, given, trains=self.backbone_trains)
        device = next(self.head.parameters()).device
        return [x.to(device) for x in states], [
            mask.to(device) for mask in masks
        ]  # the head converts them to its dtype
