"""What all capsule-head models share: how hidden states are computed, and what trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from ..backbones.pickling import register_recording, without_recording
from ..backbones.running import BackboneOutput, check_hidden_states, token_masks
from ..heads.base import reset, self_initialised
from ..hub import refuse_auto_class
from .checkpoint import CheckpointModel
from .configuration_capsule_head import CapsuleHeadConfig


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
        """Whether anything in the backbone trains: weights that are not frozen, or adapters among those that are."""
        if self.backbone is None:
            return False
        return not self.config.freeze_backbone or any(x.requires_grad for x in self.backbone.parameters())

    def train(self, mode: bool = True) -> Self:
        """Set training mode. A frozen backbone, of which nothing trains, stays in evaluation mode, without dropout."""
        if self.backbone is None or self.backbone_trains:
            return super().train(mode)
        # Not to training mode and back: Trainer calls this in every step, and a backbone has hundreds of modules.
        self.training = mode
        for module in self.children():
            if module is not self.backbone:
                module.train(mode)
        if self.backbone.training:
            self.backbone.eval()
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

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle or to copy: without hooks that record outputs, which a run puts in."""
        return vars(without_recording(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the state that was pickled or copied."""
        super().__setstate__(state)
        register_recording(self)

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
        output, _ = self._run(inputs, attention_mask, hidden_states)
        return output.states, output.masks

    def _run(
        self,
        inputs: Mapping[str, Tensor | bool | None],
        attention_mask: Tensor | None,
        hidden_states: Tensor | Sequence[Tensor] | None,
        output_hidden_states: bool | int | Sequence[int] | None = False,
        output_attentions: bool | None = False,
    ) -> tuple[BackboneOutput, tuple[Tensor | None, ...] | None]:
        """Compute what the head takes, and the attentions; and the hidden states that `forward` returns, if any."""
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states or False
        if output_attentions is None:
            output_attentions = config.output_attentions
        check_indices(output_hidden_states, len(config.hidden_sizes))
        asked = layers_asked(output_hidden_states, config)
        layers = sorted({*config.layers, *asked})
        if hidden_states is not None:
            check_requests(layers, config.layers, output_attentions)
            given = list(check_hidden_states(hidden_states, self.head.hidden_sizes))
            output = BackboneOutput(given, token_masks(attention_mask, given))
        else:
            if self.backbone is None:
                raise ValueError("This model has no backbone: pass hidden_states, or load it with load_backbone=True.")
            names = [name for name in (*self.backbone_inputs, "inputs_embeds") if name in inputs]
            if sum(inputs[name] is not None for name in names) != 1:
                expected = ", ".join(names or self.backbone_inputs)
                raise ValueError(f"Pass one of {expected} (or hidden_states, instead of them).")
            output = config.backbone.run(
                self.backbone,
                layers,
                {**inputs, "attention_mask": attention_mask},
                trains=self.backbone_trains,
                output_attentions=bool(output_attentions),
            )
        device = next(self.head.parameters()).device  # the head converts them to its dtype
        states = {layer: x.to(device) for layer, x in zip(layers, output.states)}
        masks = {layer: mask.to(device) for layer, mask in zip(layers, output.masks)}
        taken = BackboneOutput(
            [states[layer] for layer in config.layers], [masks[layer] for layer in config.layers], output.attentions
        )
        if not asked:
            return taken, None
        returned = config.layers if output_hidden_states is True else range(len(config.hidden_sizes))
        return taken, tuple(states[layer] if layer in asked else None for layer in returned)


def layers_asked(output_hidden_states: bool | int | Sequence[int], config: CapsuleHeadConfig) -> set[int]:
    """Return the layers whose hidden states are to be returned: True stands for those in use."""
    if output_hidden_states is True:
        return set(config.layers)
    if isinstance(output_hidden_states, int):  # False and 0 are none, as in transformers
        output_hidden_states = [output_hidden_states] if output_hidden_states else ()
    return {index % len(config.hidden_sizes) for index in output_hidden_states}


def check_indices(output_hidden_states: object, n_states: int) -> None:
    """Check what says which hidden states to return.

    Args:
        output_hidden_states: True for those in use, an index, or a list of them; what is false for none.
        n_states: number of the backbone's hidden states.

    Raises:
        TypeError: If something else is given.
        ValueError: If the backbone has no such hidden state.
    """
    if not output_hidden_states or output_hidden_states is True:
        return
    indices = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    if not isinstance(indices, list | tuple) or any(isinstance(i, bool) or not isinstance(i, int) for i in indices):
        raise TypeError(
            f"output_hidden_states is {output_hidden_states!r}; expected True, False, or indices of hidden states."
        )
    if any(not -n_states <= index < n_states for index in indices):
        raise ValueError(
            f"output_hidden_states is {output_hidden_states!r}; the backbone has {n_states} hidden states, so expected "
            f"numbers from {-n_states} to {n_states - 1}."
        )


def check_requests(layers: Sequence[int], given: Sequence[int], output_attentions: bool | None) -> None:
    """Check that hidden states which a user gave suffice for what a model is to return.

    Args:
        layers: the layers whose hidden states are used or returned.
        given: the layers whose hidden states are given.
        output_attentions: whether attentions are to be returned.

    Raises:
        ValueError: If they do not.
    """
    if output_attentions:
        raise ValueError(
            "output_attentions is True, and hidden_states are given: the backbone does not run; pass its inputs "
            "instead, or leave output_attentions out."
        )
    missing = sorted(set(layers) - set(given))
    if missing:
        raise ValueError(
            f"output_hidden_states asks for layers {missing}, and the hidden_states that are given are of layers "
            f"{list(given)}; pass the backbone's inputs instead, or ask for these."
        )
