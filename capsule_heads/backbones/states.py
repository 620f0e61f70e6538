"""The hidden states that a backbone returned, as one `[batch, tokens, hidden_size]` and one mask per layer.

This module knows all layouts of hidden states.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

# If shapes leave a choice, feature maps are [batch, channels, rows, columns], except for these types.
CHANNELS_LAST = frozenset({"sam_vision_model", "sam_hq_vision_model"})
# These types return [streams, batch, tokens, hidden_size], not [batch, tokens, streams, hidden_size].
STREAMS_FIRST = frozenset({"gemma3n", "gemma3n_text"})
# Outputs with the hidden states of each stack, and with its last state after the final norm. The first found counts.
STATES_OF_STACK = {
    "encoder": (("encoder_hidden_states", "encoder_last_hidden_state"), ("hidden_states", "last_hidden_state")),
    "decoder": (("decoder_hidden_states", "last_hidden_state"), ("hidden_states", "last_hidden_state")),
}


class Layout(NamedTuple):
    """The layout of a batch.

    Attributes:
        n_samples: number of samples.
        mask: `[batch, inputs]`, 1 for a token (or sample, frame, patch) and 0 for padding; None if there is no padding.
        grids: `[batch, 3]`, frames, rows and columns of patches, if all samples' patches are packed in one sequence.
        hidden_sizes: size of each hidden state, if known.
        n_tokens: tokens of a text, padding included; None for other inputs.
    """

    n_samples: int
    mask: Tensor | None = None
    grids: Tensor | None = None
    hidden_sizes: Sequence[int] | None = None
    n_tokens: int | None = None


def hidden_states_of(outputs: ModelOutput, stack: str, model_type: str, with_last: bool = True) -> list[Tensor]:
    """Return all hidden states of one stack, in the backbone's own shapes, the last one after the final norm.

    In some models, the tuple of hidden states ends before that norm. Its last state is replaced here.

    Args:
        outputs: the outputs of the backbone.
        stack: "encoder" or "decoder", for an encoder-decoder.
        model_type: model type for the message.
        with_last: whether the last hidden state is among them.

    Raises:
        ValueError: If there are no hidden states.
    """
    for states_name, last_name in STATES_OF_STACK[stack]:
        states = _flat(outputs.get(states_name))
        if states:
            last = outputs.get(last_name)
            if with_last and isinstance(last, Tensor) and last.shape == states[-1].shape:
                states[-1] = last
            return states
    raise ValueError(
        f"The {model_type} backbone returned no hidden_states, only {', '.join(outputs.keys())}; "
        "expected a model that yields one tensor per layer."
    )


def attentions_of(outputs: ModelOutput, stack: str) -> tuple[Tensor, ...] | None:
    """Return the attentions of all layers of one stack, as the backbone returns them; None if it has no attentions.

    With an implementation of attention other than "eager" the tuple may be empty, and transformers warns about that.

    Args:
        outputs: the outputs of the backbone.
        stack: "encoder" or "decoder", for an encoder-decoder.
    """
    attentions = outputs.get(f"{stack}_attentions")
    return outputs.get("attentions") if attentions is None else attentions


def arrange(states: Sequence[Tensor], layout: Layout, backbone: PreTrainedModel) -> tuple[list[Tensor], list[Tensor]]:
    """Bring every hidden state of a batch into one form, with its mask.

    Args:
        states: hidden states in the backbone's own shapes: sequences, several streams of each token, feature maps with
            channels first or last, the windows or frames of each sample one after another, or the tokens of all
            samples packed in one sequence.
        layout: the layout of the batch.
        backbone: the backbone; a speech model has methods that count frames.

    Returns:
        Per layer the hidden state `[batch, tokens, hidden_size]`, where the positions of feature maps are tokens, row
        by row. And per layer the mask `[batch, tokens]`, 1 for a token and 0 for padding, in float32 or wider.

    Raises:
        ValueError: If a hidden state has another shape.
    """
    arranged: list[Tensor] = []
    masks: list[Tensor] = []
    given: Tensor | None = None
    for layer, x in enumerate(states):
        size = None
        if layout.hidden_sizes is not None and layer < len(layout.hidden_sizes):
            size = layout.hidden_sizes[layer]
        x, mask = _arrange_one(x, size, layout, backbone)
        arranged.append(x)
        dtype = torch.promote_types(x.dtype, torch.float32)  # mixup makes fractions, which bfloat16 would round
        # Layers mostly share one mask object. It is converted once, and later work on it is done once.
        same = mask is given and (masks[-1].device, masks[-1].dtype) == (x.device, dtype)
        masks.append(masks[-1] if same else mask.to(device=x.device, dtype=dtype))
        given = mask
    return arranged, masks


def _flat(states: Any) -> list[Tensor]:
    """Return the tensors of a tuple, and of the tuples in it."""
    if isinstance(states, Tensor):
        return [states]
    return [x for item in states or () for x in _flat(item)]


def _arrange_one(x: Tensor, size: int | None, layout: Layout, backbone: PreTrainedModel) -> tuple[Tensor, Tensor]:
    n_samples, model_type = layout.n_samples, backbone.config.model_type
    given = tuple(x.shape)
    if layout.grids is not None and (x.ndim == 2 or (x.ndim == 3 and len(x) == 1)):
        return unpack(x.reshape(-1, x.shape[-1]), layout.grids)
    mask = layout.mask
    if x.ndim == 4 and model_type in STREAMS_FIRST:
        x = x.movedim(0, 2)
    if x.ndim == 4 and x.shape[1] == layout.n_tokens:  # several streams for each token
        mask = None if mask is None else mask.repeat_interleave(x.shape[2], dim=1)
        x = x.flatten(1, 2)
    elif x.ndim == 4:
        x = x.flatten(1, 2) if _channels_last(x, size, model_type) else x.flatten(2).mT
    elif x.ndim > 4:
        x = x.flatten(1, -2)
    elif x.ndim == 2 and x.shape[0] == n_samples:
        x = x[:, None]
    if (
        x.ndim == 3
        and x.shape[0] != n_samples
        and (x.shape[0] % n_samples == 0 or (x.shape[0] == 1 and not x.shape[1] % n_samples))
    ):
        # Windows, crops or frames of a sample, or tokens of images of equal size, stand one after another.
        x = x.reshape(n_samples, -1, x.shape[-1])
    if x.ndim != 3 or x.shape[0] != n_samples:
        raise ValueError(
            f"A hidden state of {model_type} for a batch of {n_samples} has shape {given}; expected "
            "[batch, tokens, hidden_size], or feature maps [batch, channels, rows, columns]."
        )
    return x, _mask_of(x, mask, backbone)


def _channels_last(x: Tensor, size: int | None, model_type: str) -> bool:
    first, last = x.shape[1], x.shape[3]
    if size is not None and bool(first == size) != bool(last == size):
        return bool(last == size)
    if size is None and (x.shape[1] == x.shape[2]) != (x.shape[2] == x.shape[3]):
        return x.shape[1] == x.shape[2]  # maps are square when a backbone is probed
    return model_type in CHANNELS_LAST


def unpack(x: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
    """Split the packed tokens of several images by their grids.

    Args:
        x: `[tokens of all images, hidden_size]`.
        grids: `[images, 3]`, frames, rows and columns of patches. If there are fewer tokens than patches, each token
            stands for the same number of patches.

    Returns:
        `[images, most tokens, hidden_size]`, zero after an image's own tokens, and the mask `[images, most tokens]`.

    Raises:
        ValueError: If the tokens cannot stand for the number of patches in the grids.
    """
    n_patches = grids.prod(-1).tolist()
    merged, rest = divmod(sum(n_patches), len(x)) if len(x) else (1, 1)
    if rest or any(n % merged for n in n_patches):
        raise ValueError(
            f"A hidden state has {len(x)} packed tokens, and image_grid_thw says {n_patches} patches; expected one "
            "token per patch, or a whole number of patches per token."
        )
    parts = x.split([n // merged for n in n_patches])
    mask = nn.utils.rnn.pad_sequence([x.new_ones(len(part)) for part in parts], batch_first=True)
    return nn.utils.rnn.pad_sequence(list(parts), batch_first=True), mask


def _mask_of(x: Tensor, mask: Tensor | None, backbone: PreTrainedModel) -> Tensor:
    """Return the mask `[batch, tokens]` of hidden states `[batch, tokens, hidden_size]`, from the inputs' mask."""
    n_tokens = x.shape[1]
    if mask is None:
        return torch.ones(x.shape[:2], device=x.device)
    if mask.shape[1] == n_tokens:
        return mask
    if n_tokens > mask.shape[1]:
        # The backbone adds tokens of its own before those of the input.
        return F.pad(mask, (n_tokens - mask.shape[1], 0), value=1)
    # A token that stands for several inputs is no padding as soon as one of them is no padding.
    pooled = F.adaptive_max_pool1d(mask[:, None].float(), n_tokens)[:, 0]
    if frame_counts(backbone, torch.full((1,), mask.shape[1])) != n_tokens:
        return pooled
    counts = frame_counts(backbone, mask.sum(-1).long())
    assert counts is not None  # as above
    counted = torch.arange(n_tokens, device=mask.device) < counts[:, None]
    # The decision is made on the mask's own device, as reading the mask would wait for the device.
    is_padded_right = (mask.long().diff(dim=-1) <= 0).all()
    return torch.where(is_padded_right, counted.to(pooled.dtype), pooled)


def frame_counts(backbone: PreTrainedModel, lengths: Tensor) -> Tensor | None:
    """Return the number of frames that a speech model makes of an input, by its own method; None without a method.

    Args:
        backbone: the model.
        lengths: `[batch]`, number of samples, or of spectra.
    """
    for name in ("_get_feat_extract_output_lengths", "_get_subsampling_output_length"):
        method = getattr(backbone, name, None)
        if method is not None:
            # An adapter comes after the layers with the hidden states.
            options = {"add_adapter": False} if "add_adapter" in inspect.signature(method).parameters else {}
            counts = method(lengths, **options)
            return counts[-1] if isinstance(counts, tuple) else counts
    return None
