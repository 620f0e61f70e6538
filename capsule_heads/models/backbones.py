"""What a head needs to know of its backbone: how to call it, and what its hidden states look like."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

TOKENS_TO_PROBE_WITH = 4


def build_backbone(base_config: PreTrainedConfig, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
    """A backbone with random weights, without a pooler, from its configuration object (which it keeps).

    Args:
        base_config: its configuration.
        dtype: of its weights; None for that of its configuration.
    """
    if dtype is not None:
        base_config.dtype = dtype
    return drop_pooler(AutoModel.from_config(base_config))


def drop_pooler(backbone: PreTrainedModel) -> PreTrainedModel:
    """Removes the pooler of BERT and its like: a head on hidden states never uses it, and DDP stops on such weights."""
    if "add_pooling_layer" in inspect.signature(type(backbone).__init__).parameters and hasattr(backbone, "pooler"):
        backbone.pooler = None
    return backbone


def run_backbone(backbone: PreTrainedModel, depths: Sequence[int], n_hidden_states: int, **inputs) -> list[Tensor]:
    """Runs a backbone and returns the hidden states at some depths.

    Index 0 is the embedding output. The last depth is `last_hidden_state`: some models' own tuple ends before the final
    norm, which would then be left out. A token's states do not depend on padding, unless the backbone itself mixes
    padding into its tokens (FNet and others without a mask, ConvBERT's convolutions, RWKV with padding on the left).

    Args:
        backbone: a text backbone.
        depths: indices of the hidden states wanted, ascending.
        n_hidden_states: how many the backbone is expected to have.
        **inputs: its inputs; those that are None, or that it does not take, are left out.

    Returns:
        Per depth, `[batch, tokens, width]`.

    Raises:
        ValueError: if the backbone yields another number of hidden states, or none.
    """
    hidden_states = _all_hidden_states(backbone, inputs)
    if len(hidden_states) != n_hidden_states:
        raise ValueError(
            f"The {backbone.config.model_type} backbone returned {len(hidden_states)} hidden states, where the "
            f"configuration says n_hidden_states={n_hidden_states}; set n_hidden_states to what it returns."
        )
    return [hidden_states[depth] for depth in depths]


@torch.no_grad()
def count_hidden_states(backbone: PreTrainedModel) -> int:
    """Runs a backbone on a few tokens and returns how many hidden states it yields.

    Raises:
        ValueError: if it is not a text model whose hidden states are all `[batch, tokens, width]`; says what was found.
    """
    model_type = backbone.config.model_type
    if backbone.config.is_encoder_decoder:
        raise ValueError(
            f"{model_type} is an encoder-decoder; expected an encoder or a decoder whose hidden states are "
            "[batch, tokens, width]. Load its encoder alone, if transformers has a class for it."
        )
    if "input_ids" not in inspect.signature(backbone.forward).parameters:
        raise ValueError(f"{model_type} does not take input_ids; expected a text backbone.")
    input_ids = torch.zeros(1, TOKENS_TO_PROBE_WITH, dtype=torch.long, device=backbone.device)
    try:
        hidden_states = _all_hidden_states(
            backbone, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        )
    except Exception as error:
        raise ValueError(f"{model_type} does not run on input_ids alone; expected a text backbone. {error}") from error
    shapes = [tuple(states.shape) for states in hidden_states]
    width = backbone.config.get_text_config().hidden_size
    if any(shape != (1, TOKENS_TO_PROBE_WITH, width) for shape in shapes):
        raise ValueError(
            f"The hidden states of {model_type} for {TOKENS_TO_PROBE_WITH} tokens have shapes {shapes}; expected each "
            f"to be [1, {TOKENS_TO_PROBE_WITH}, {width}], that is, [batch, tokens, width]."
        )
    return len(shapes)


def _all_hidden_states(backbone: PreTrainedModel, inputs: dict[str, Tensor | None]) -> list[Tensor]:
    accepted = inspect.signature(backbone.forward).parameters
    inputs = {name: value for name, value in inputs.items() if value is not None and name in accepted}
    if "position_ids" in accepted and "position_ids" not in inputs and "attention_mask" in inputs:
        inputs["position_ids"] = _positions(backbone, inputs["attention_mask"].long())
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    outputs = backbone(**inputs, output_hidden_states=True, return_dict=True)
    if not outputs.get("hidden_states"):
        raise ValueError(
            f"The {backbone.config.model_type} backbone returned no hidden_states, only {', '.join(outputs.keys())}; "
            "expected a model that yields one [batch, tokens, width] tensor per layer."
        )
    return [*outputs.hidden_states[:-1], outputs.last_hidden_state]


def _positions(backbone: nn.Module, mask: Tensor) -> Tensor:
    """`[batch, tokens]`: positions counted over the tokens, so that padding on the left does not shift them."""
    for name, module in backbone.named_modules():
        padding_idx = getattr(module, "padding_idx", None)
        # RoBERTa and its like give padding a position of its own and count tokens from the next one. Modules with an
        # offset (XGLM's) add it themselves.
        if "position" in name and padding_idx is not None and not hasattr(module, "offset"):
            return mask.cumsum(-1) * mask + padding_idx
    return (mask.cumsum(-1) - 1).clamp_min(0)
