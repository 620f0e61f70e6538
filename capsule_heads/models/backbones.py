"""What a head needs to know of its backbone: how to call it, and what its hidden states look like."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

TOKENS_TO_PROBE_WITH = 4
IMAGE_SIZE_TO_PROBE_WITH = 224  # where the configuration does not say for which size the backbone was made


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


def run_backbone(
    backbone: PreTrainedModel, depths: Sequence[int], hidden_sizes: Sequence[int], **inputs
) -> list[Tensor]:
    """Runs a backbone and returns the hidden states at some depths.

    Index 0 is the embedding output. The last depth is `last_hidden_state`: some models' own tuple ends before the final
    norm, which would then be left out. A token's states do not depend on padding, unless the backbone itself mixes
    padding into its tokens (FNet and others without a mask, ConvBERT's convolutions, RWKV with padding on the left).

    Args:
        backbone: a text or image backbone.
        depths: indices of the hidden states wanted, ascending.
        hidden_sizes: the width that each of the backbone's hidden states is expected to have.
        **inputs: its inputs; those that are None, or that it does not take, are left out.

    Returns:
        Per depth, `[batch, tokens, width]`; the places of feature maps are their tokens, row by row.

    Raises:
        ValueError: if the backbone yields another number of hidden states or other widths, or none.
    """
    hidden_states = _all_hidden_states(backbone, inputs)
    found = [states.shape[-1] for states in hidden_states]
    if found != list(hidden_sizes):
        raise ValueError(
            f"The {backbone.config.model_type} backbone returned {len(found)} hidden states of widths "
            f"{describe(found)}, where the configuration has {len(hidden_sizes)} of {describe(hidden_sizes)}; set "
            "hidden_sizes to what it returns."
        )
    return [hidden_states[depth] for depth in depths]


def describe(widths: Sequence[int]) -> str:
    """Widths for a message: the one that all have, or each."""
    return str(widths[0]) if len(set(widths)) == 1 else str(list(widths))


@torch.no_grad()
def probe_hidden_sizes(backbone: PreTrainedModel) -> list[int]:
    """Runs a backbone on a few tokens, or an image, and returns the width of each of its hidden states.

    Raises:
        ValueError: if it is not a text or image model whose hidden states are all `[batch, tokens, width]` or feature
            maps `[batch, width, rows, columns]`; says what was found.
    """
    model_type = backbone.config.model_type
    if backbone.config.is_encoder_decoder:
        raise ValueError(
            f"{model_type} is an encoder-decoder; expected an encoder or a decoder whose hidden states are "
            "[batch, tokens, width]. Load its encoder alone, if transformers has a class for it."
        )
    name = main_input_name(backbone)
    if name == "pixel_values":
        inputs = {name: torch.zeros(1, *_image_shape(backbone.config), device=backbone.device, dtype=backbone.dtype)}
    elif name == "input_ids":
        inputs = {name: torch.zeros(1, TOKENS_TO_PROBE_WITH, dtype=torch.long, device=backbone.device)}
    else:
        raise ValueError(f"{model_type} takes {name}; expected a text or image backbone (input_ids or pixel_values).")
    was_training = backbone.training
    try:
        hidden_states = _all_hidden_states(backbone.eval(), inputs)
    except Exception as error:
        raise ValueError(
            f"{model_type} does not run on {name} alone; expected a text or image backbone. {error}"
        ) from error
    finally:
        backbone.train(was_training)
    shapes = [tuple(states.shape) for states in hidden_states]
    if name == "input_ids" and len({shape[:2] for shape in shapes} | {(1, TOKENS_TO_PROBE_WITH)}) > 1:
        raise ValueError(
            f"The hidden states of {model_type} for {TOKENS_TO_PROBE_WITH} tokens have shapes {shapes}; expected each "
            f"to be [1, {TOKENS_TO_PROBE_WITH}, width], that is, [batch, tokens, width]."
        )
    return [shape[-1] for shape in shapes]


def probe_hidden_sizes_without_weights(base_config: PreTrainedConfig) -> list[int]:
    """The same from a backbone's configuration alone: it runs on tensors that have shapes and no data.

    Where the way through a backbone depends on data (mixtures of experts), its configuration has to say it.

    Raises:
        ValueError: as `probe_hidden_sizes`, or if neither tells.
    """
    with torch.device("meta"):
        backbone = AutoModel.from_config(copy.deepcopy(base_config))
    # Models look at the values of some tensors, unless those are fake: meta tensors alone would not do.
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return probe_hidden_sizes(backbone)
    except ValueError as error:
        text_config = base_config.get_text_config()
        n_layers, width = (getattr(text_config, name, None) for name in ("num_hidden_layers", "hidden_size"))
        if not isinstance(error.__cause__, DataDependentOutputException | DynamicOutputShapeException) or not n_layers:
            raise
        return [width] * (n_layers + 1)


def main_input_name(backbone: PreTrainedModel) -> str:
    """What a backbone takes: "input_ids", "pixel_values", "input_values" and the like."""
    accepted = list(inspect.signature(backbone.forward).parameters)
    name = backbone.main_input_name
    return name if name in accepted else accepted[0]


def _image_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    size = getattr(config, "image_size", None) or IMAGE_SIZE_TO_PROBE_WITH
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return getattr(config, "num_channels", 3), height, width


def _all_hidden_states(backbone: PreTrainedModel, inputs: dict[str, Tensor | None]) -> list[Tensor]:
    """All hidden states as `[batch, tokens, width]`."""
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
            "expected a model that yields one tensor per layer."
        )
    hidden_states = list(outputs.hidden_states)
    if outputs.last_hidden_state.shape == hidden_states[-1].shape:
        hidden_states[-1] = outputs.last_hidden_state
    return [x.flatten(2).mT if x.ndim == 4 else x for x in hidden_states]


def _positions(backbone: nn.Module, mask: Tensor) -> Tensor:
    """`[batch, tokens]`: positions counted over the tokens, so that padding on the left does not shift them."""
    for name, module in backbone.named_modules():
        padding_idx = getattr(module, "padding_idx", None)
        # RoBERTa and its like give padding a position of its own and count tokens from the next one. Modules with an
        # offset (XGLM's) add it themselves.
        if "position" in name and padding_idx is not None and not hasattr(module, "offset"):
            return mask.cumsum(-1) * mask + padding_idx
    return (mask.cumsum(-1) - 1).clamp_min(0)
