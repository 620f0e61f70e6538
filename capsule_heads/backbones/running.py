"""Running a backbone: its inputs under its own names, and the hidden states at some layers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from ..checks import is_readable
from .limits import check_positions, check_token_types
from .parts import INVERTED_MASKS, Inputs, name_in
from .states import Layout, arrange, attentions_of, frame_counts, hidden_states_of

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


class BackboneOutput(NamedTuple):
    """The output of a backbone for a batch.

    Attributes:
        states: per layer `[batch, tokens, hidden_size]`. The positions of feature maps are their tokens, row by row.
        masks: per layer `[batch, tokens]`, 1 for a token and 0 for padding.
        attentions: attentions of all layers, as the backbone returns them; None unless requested.
    """

    states: list[Tensor]
    masks: list[Tensor]
    attentions: tuple[Tensor, ...] | None = None


def run_backbone(
    backbone: PreTrainedModel,
    layers: Sequence[int],
    hidden_sizes: Sequence[int],
    stack: str = "encoder",
    selects: bool = False,
    output_attentions: bool = False,
    **inputs: Tensor | bool | None,
) -> BackboneOutput:
    """Run a backbone and return the hidden states at some layers, and their masks.

    Index 0 is the embedding output. The last layer is after the final norm. A token's states do not depend on padding,
    unless the backbone itself mixes padding into its tokens (FNet and others without a mask, ConvBERT's convolutions,
    RWKV with padding on the left).

    Args:
        backbone: the loaded backbone.
        layers: indices of the hidden states to return, ascending.
        hidden_sizes: the expected size of each of the backbone's hidden states.
        stack: "encoder" or "decoder", for an encoder-decoder.
        selects: whether to request only these layers, which needs a backbone for which `probe.selects` is True.
        output_attentions: whether to return its attentions too.
        **inputs: inputs by our names; inputs that are None, or that the backbone does not take, are left out.

    Returns:
        The output of the backbone at these layers.

    Raises:
        ValueError: If the backbone returns no hidden states, another number or other sizes of them, or no attentions.
    """
    output = all_hidden_states(backbone, stack, inputs, hidden_sizes, layers if selects else None, output_attentions)
    if selects:
        return output
    states, masks, attentions = output
    found = [x.shape[-1] for x in states]
    if found != list(hidden_sizes):
        raise ValueError(
            f"The {backbone.config.model_type} backbone returned {len(found)} hidden states of sizes "
            f"{describe(found)}, where the configuration has {len(hidden_sizes)} of {describe(hidden_sizes)}; set "
            "hidden_sizes to what it returns."
        )
    return BackboneOutput([states[layer] for layer in layers], [masks[layer] for layer in layers], attentions)


def describe(hidden_sizes: Sequence[int]) -> str:
    """Return sizes for a message: one if all are equal, else each."""
    return str(hidden_sizes[0]) if len(set(hidden_sizes)) == 1 else str(list(hidden_sizes))


def all_hidden_states(
    backbone: PreTrainedModel,
    stack: str,
    inputs: Inputs,
    hidden_sizes: Sequence[int] = (),
    selected: Sequence[int] | None = None,
    output_attentions: bool = False,
) -> BackboneOutput:
    """Return the hidden states at all layers, and their masks, as `run_backbone` does.

    Args:
        backbone: the loaded backbone.
        stack: "encoder" or "decoder", for an encoder-decoder.
        inputs: inputs by our names; inputs that are None are left out.
        hidden_sizes: the expected sizes; empty if they are unknown.
        selected: the layers to request; None for all.
        output_attentions: whether to return its attentions too.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    if "input_ids" in given:
        _check_tokens(given["input_ids"], backbone)
    tokens = tensors.get("input_ids", tensors.get("inputs_embeds"))
    if tokens is not None:
        check_positions(tokens, tensors.get("position_ids"), backbone)
    if "token_type_ids" in tensors:
        check_token_types(tensors["token_type_ids"], backbone)
    if tokens is not None and "attention_mask" in given:
        check_mask(given["attention_mask"], tokens.shape[:2])
    check_frames(tensors, backbone)
    _check_patches(tensors, backbone)
    arguments = call_arguments(backbone, stack, given)
    if output_attentions:
        check_takes_attentions(backbone)
        arguments["output_attentions"] = True
    asked = True if selected is None else list(selected)
    outputs = backbone(**arguments, output_hidden_states=asked, return_dict=True)
    with_last = selected is None or len(hidden_sizes) - 1 in selected
    states = hidden_states_of(outputs, stack, backbone.config.model_type, with_last)
    attentions = attentions_of(outputs, stack) if output_attentions else None
    if output_attentions:
        check_attentions(attentions, backbone)
    grids = tensors.get("image_grid_thw")
    mask = tensors.get("attention_mask", tensors.get("pixel_attention_mask"))
    if "image_position_ids" in tensors:
        positions = tensors["image_position_ids"]
        mask = (positions >= 0).all(-1)
        grids = torch.cat([torch.ones_like(positions[:, 0, :1]), positions.amax(1) + 1], -1)  # some pack the last state
    # Not len(), as an exported model would then work only for this batch size.
    n_samples = (next(iter(tensors.values())) if grids is None else grids).shape[0]
    n_tokens = None if tokens is None else tokens.shape[1]
    layout = Layout(n_samples, mask, grids, hidden_sizes or None, n_tokens)
    return BackboneOutput(*arrange(states, layout, backbone), attentions)


def check_takes_attentions(backbone: PreTrainedModel) -> None:
    """Check that a backbone can return attentions.

    Raises:
        ValueError: If its `forward` has no argument `output_attentions`.
    """
    accepted = inspect.signature(backbone.forward).parameters
    if "output_attentions" not in accepted and not any(x.kind is x.VAR_KEYWORD for x in accepted.values()):
        check_attentions(None, backbone)


def check_attentions(attentions: tuple[Tensor, ...] | None, backbone: PreTrainedModel) -> None:
    """Check that a backbone returned attentions.

    Raises:
        ValueError: If there are no attentions.
    """
    if attentions is None:
        raise ValueError(
            f"output_attentions is True, and the {backbone.config.model_type} backbone has no attentions; leave "
            "output_attentions out, or take a backbone with attention."
        )


def check_mask(attention_mask: object, shape: torch.Size) -> None:
    """Check that a mask has the shape of the tokens and, on the host, values from 0 to 1.

    Raises:
        ValueError: If the mask has another shape or other values.
        TypeError: If the mask is not a tensor.
    """
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask is a {type(attention_mask).__name__}; expected a tensor.")
    if attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected [batch, tokens], here {tuple(shape)}."
        )
    if not is_readable(attention_mask) or attention_mask.numel() == 0:
        return
    low, high = attention_mask.min().item(), attention_mask.max().item()  # NaN if one is
    if not 0 <= low <= high <= 1:
        raise ValueError(f"attention_mask goes from {low} to {high}; expected 1 for tokens and 0 for padding.")


def check_frames(inputs: Mapping[str, Tensor], backbone: PreTrainedModel) -> None:
    """Check that each recording of a batch is long enough for one frame, if the backbone can count frames.

    Otherwise the model would score padding alone. Lengths come from the mask if it is on the host.

    Raises:
        ValueError: If a recording is too short; the message gives its length and the least length.
    """
    audio, mask = inputs.get("input_values", inputs.get("input_features")), inputs.get("attention_mask")
    if audio is None or torch.compiler.is_compiling():
        return
    if mask is not None and is_readable(mask):
        lengths = mask.sum(-1).long()
    elif audio.ndim == 2:
        lengths = torch.full((audio.shape[0],), audio.shape[1])
    else:
        return
    counts = frame_counts(backbone, lengths)
    if counts is None or bool((counts >= 1).all()):
        return
    sample = int((counts < 1).int().argmax())
    unit, n_tried = ("samples", 2**17) if audio.ndim == 2 else ("frames of a spectrum", 2**10)
    tried = frame_counts(backbone, torch.arange(1, n_tried))
    assert tried is not None  # as above
    raise ValueError(
        f"Audio {sample} of the batch has {int(lengths[sample])} {unit}, too few for one frame of the "
        f"{backbone.config.model_type} backbone; expected at least {1 + int((tried < 1).sum())}."
    )


def _check_patches(inputs: Mapping[str, Tensor], backbone: PreTrainedModel) -> None:
    """Check that images are at least as large as a patch, unless the backbone pads them."""
    pixels, size = inputs.get("pixel_values"), getattr(backbone.config, "patch_size", None)
    if pixels is None or pixels.ndim != 4 or torch.compiler.is_compiling():
        return
    rows, columns = (size, size) if isinstance(size, int) else tuple(size or (1, 1))[-2:]
    too_small = pixels.shape[-2] < rows or pixels.shape[-1] < columns
    if too_small and not any(hasattr(module, "maybe_pad") for module in backbone.modules()):
        raise ValueError(
            f"The images have {pixels.shape[-2]}x{pixels.shape[-1]} pixels, and the {backbone.config.model_type} "
            f"backbone takes patches of {rows}x{columns}; expected larger images, or an image processor that resizes."
        )


def _check_tokens(input_ids: object, backbone: PreTrainedModel) -> None:
    """Check the output of a tokenizer; check ids only if they are on the host."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f'input_ids are a {type(input_ids).__name__}; expected a tensor: return_tensors="pt".')
    if input_ids.is_floating_point() or input_ids.ndim != 2:
        raise ValueError(
            f"input_ids are {input_ids.dtype} of shape {tuple(input_ids.shape)}; expected integers [batch, tokens]."
        )
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}; expected at least one sample and one token.")
    if is_readable(input_ids):
        check_ids(input_ids, count_embeddings(backbone), backbone.config.model_type)


def count_embeddings(backbone: PreTrainedModel | None) -> int | None:
    """Return the number of tokens for which a backbone has embeddings; None if it has no table of embeddings."""
    if backbone is None:
        return None
    try:
        embedding = backbone.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # some backbones hash ids
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def check_ids(input_ids: Tensor, n_embeddings: int | None, model_type: str) -> None:
    """Check, on the host, that there is an embedding of each token.

    Args:
        input_ids: the tokens.
        n_embeddings: as `count_embeddings` returns it.
        model_type: the backbone's model type, for the message.

    Raises:
        ValueError: If a token has no embedding.
    """
    if n_embeddings is None or input_ids.numel() == 0:
        return
    low, high = input_ids.min().item(), input_ids.max().item()
    if not 0 <= low <= high < n_embeddings:
        raise ValueError(
            f"input_ids go from {low} to {high}, and the {model_type} backbone has embeddings for 0 to "
            f"{n_embeddings - 1}; use its own tokenizer, or resize_token_embeddings."
        )


def check_hidden_states(hidden_states: Tensor | Sequence[Tensor], hidden_sizes: Sequence[int]) -> list[Tensor]:
    """Check hidden states that a user gave, and return one `[batch, tokens, hidden_size]` per layer.

    Args:
        hidden_states: one tensor per layer, or one tensor `[batch, tokens, layers, hidden_size]`.
        hidden_sizes: size of the hidden state of each layer in use.

    Raises:
        TypeError: If they are not floating-point tensors.
        ValueError: If they have other shapes.
    """
    if isinstance(hidden_states, Tensor) and hidden_states.ndim == 4:
        states = list(hidden_states.unbind(2))
    else:
        states = list(hidden_states)
    for x in states:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"hidden_states are {kind}; expected floating-point tensors.")
    shapes = [tuple(x.shape) for x in states]
    fit = all(len(s) == 3 and s[0] == shapes[0][0] and s[-1] == w for s, w in zip(shapes, hidden_sizes))
    if len(shapes) != len(hidden_sizes) or not fit:
        given = tuple(hidden_states.shape) if isinstance(hidden_states, Tensor) else shapes
        raise ValueError(
            f"hidden_states has shape {given}; expected [batch, tokens, layers, hidden_size], or one [batch, tokens, "
            f"hidden_size] per layer, with {len(hidden_sizes)} layers of size {describe(hidden_sizes)}."
        )
    return states


def token_masks(attention_mask: Tensor | None, hidden_states: Sequence[Tensor]) -> list[Tensor]:
    """Return per layer the mask `[batch, tokens]` of hidden states, 1 for a token and 0 for padding.

    It is in float32 or wider, whatever the dtype of the states. Mixup makes fractions of the mask, which bfloat16 would
    round to two digits.
    """
    dtype = torch.promote_types(hidden_states[0].dtype, torch.float32)
    if attention_mask is None:
        return [torch.ones(x.shape[:2], dtype=dtype, device=x.device) for x in hidden_states]
    check_mask(attention_mask, hidden_states[0].shape[:2])
    return [attention_mask.to(device=hidden_states[0].device, dtype=dtype)] * len(hidden_states)


def call_arguments(
    backbone: PreTrainedModel, stack: str, inputs: Mapping[str, Tensor | bool]
) -> dict[str, Tensor | bool]:
    """Return the arguments of a backbone's call: our inputs by its names, and arguments that follow from them."""
    accepted = inspect.signature(backbone.forward).parameters
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    arguments: dict[str, Tensor | bool] = {}
    for ours, value in inputs.items():
        name = name_in(accepted, ours)
        if name is not None:
            is_inverted = name in INVERTED_MASKS and isinstance(value, Tensor)
            arguments[name] = ~tensors[ours].bool() if is_inverted else value
    mask = arguments.get("attention_mask")
    if "position_ids" in accepted and "position_ids" not in arguments and isinstance(mask, Tensor):
        arguments["position_ids"] = _positions(backbone, mask.long())
    if "merge_sizes" in accepted and "image_grid_thw" in tensors:  # images are not shrunk; clips would be
        arguments["merge_sizes"] = torch.ones_like(tensors["image_grid_thw"][:, 0])
    if "use_cache" in accepted:
        arguments["use_cache"] = False
    if "decoder_input_ids" in accepted and "input_ids" in tensors:
        arguments |= _decoder_inputs(backbone.config, tensors)
    return arguments


def _decoder_inputs(config: PreTrainedConfig, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tokens for the decoder: its start token, and then the input tokens shifted by one to the right."""
    input_ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(input_ids)).long()
    start = next(
        (
            token
            for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id")
            if isinstance(token := getattr(config, name, None), int)
        ),
        0,
    )
    first = (mask.cumsum(-1) == 1) & (mask == 1)
    return {
        "decoder_input_ids": torch.where(first, start, input_ids.roll(1, -1)),
        "decoder_attention_mask": mask,
    }


def _positions(backbone: nn.Module, mask: Tensor) -> Tensor:
    """Return positions `[batch, tokens]`, counted over the tokens only, so padding on the left does not shift them."""
    for name, module in backbone.named_modules():
        padding_idx = getattr(module, "padding_idx", None)
        # RoBERTa and similar models give padding a position of its own, and count tokens from the next one. Modules
        # with an offset (XGLM's) add it themselves.
        if "position" in name and padding_idx is not None and not hasattr(module, "offset"):
            return mask.cumsum(-1) * mask + padding_idx
    # Nystromformer and similar models count from 2, as their own positions say.
    own = (x for name, x in backbone.named_buffers() if name.endswith("position_ids") and x.ndim == 2)
    return (mask.cumsum(-1) - 1).clamp_min(0) + next((x[:, :1] for x in own), 0)
