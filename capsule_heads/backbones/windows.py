"""Texts that are too long for a backbone: it runs on overlapping windows, and a token's states come from one window."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .parts import Inputs, Windowing
from .running import BackboneOutput, check_mask, token_masks


class Windows(NamedTuple):
    """The windows of a batch of texts.

    Attributes:
        texts: `[windows]`, the index of each window's text.
        tokens: `[windows, length]`, the positions of the window's tokens in its text.
        mask: `[windows, length]`, True for a token, False for padding.
        is_kept: `[windows, length]`, True for the tokens whose states are taken from this window.
    """

    texts: Tensor
    tokens: Tensor
    mask: Tensor
    is_kept: Tensor


def cut(mask: Tensor, windowing: Windowing) -> Windows:
    """Cut a batch of texts into windows, text after text.

    A text that fits is one window. All windows of a longer text are full. Each begins at least `overlap` tokens before
    the end of the one before it, and the last one ends with the text. If two windows share tokens, each keeps those
    nearer to its middle. The special tokens are kept once, from the first and the last window.

    Args:
        mask: `[batch, tokens]`, 1 for a token and 0 for padding, on either side.
        windowing: length and overlap of windows.
    """
    found = []
    for text, row in enumerate(mask.bool().cpu()):
        positions = row.nonzero()[:, 0]
        found += [(text, positions[tokens], is_kept) for tokens, is_kept in _windows_of(len(positions), windowing)]
    shape = len(found), windowing.length
    windows = Windows(
        texts=torch.tensor([text for text, *_ in found]),
        tokens=torch.zeros(shape, dtype=torch.long),
        mask=torch.zeros(shape, dtype=torch.bool),
        is_kept=torch.zeros(shape, dtype=torch.bool),
    )
    for window, (_, positions, is_kept) in enumerate(found):
        windows.tokens[window, : len(positions)] = positions
        windows.mask[window, : len(positions)] = True
        windows.is_kept[window, : len(positions)] = is_kept
    return Windows(*(x.to(mask.device) for x in windows))


def _windows_of(n_tokens: int, windowing: Windowing) -> list[tuple[Tensor, Tensor]]:
    """Return the tokens of each window of a text, and which of them it keeps."""
    length, overlap, n_before, n_after = windowing
    if n_tokens <= length:
        return [(torch.arange(n_tokens), torch.ones(n_tokens, dtype=torch.bool))]
    size = length - n_before - n_after
    last = n_tokens - n_after - size
    starts = [*range(n_before, last, size - overlap), last]
    middles = [(start + size + following) // 2 for start, following in pairwise(starts)]
    before, after = torch.arange(n_before), torch.arange(n_tokens - n_after, n_tokens)
    windows = []
    for start, first, end in zip(starts, [0, *middles], [*middles, n_tokens]):
        tokens = torch.cat([before, torch.arange(start, start + size), after])
        windows.append((tokens, (first <= tokens) & (tokens < end)))
    return windows


def run_in_windows(run: Callable[..., BackboneOutput], windowing: Windowing | None, inputs: Inputs) -> BackboneOutput:
    """Run a backbone on a batch, or on windows of its texts if the batch is longer than one window.

    The backbone runs on no more windows at a time than the batch has texts.

    Args:
        run: computes hidden states and their masks from a backbone's inputs, as `run_backbone` does.
        windowing: length and overlap of windows; None to run on the complete batch, however long.
        inputs: inputs of the backbone; those of texts are `[batch, tokens, ...]`.

    Returns:
        The output of `run` if no text is cut. Otherwise per layer `[batch, tokens, hidden_size]`, zero where a text has
        padding, the masks `[batch, tokens]`, and no attentions.

    Raises:
        ValueError: If inputs cannot be cut, or the backbone does not return one state per token.
    """
    given = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    first = given.get("input_ids", given.get("inputs_embeds"))
    if windowing is None or first is None or first.shape[1] <= windowing.length:
        return run(**inputs)
    shape = first.shape[:2]
    mask = given.pop("attention_mask", torch.ones(shape, dtype=torch.long, device=first.device))
    check_mask(mask, shape)
    if "position_ids" in given:
        raise ValueError(
            f"position_ids were given for texts of {shape[1]} tokens, which are cut into windows of "
            f"{windowing.length}, each with positions of its own; leave position_ids out."
        )
    windows = cut(mask, windowing)
    states: list[Tensor] = []
    for part in map(Windows._make, zip(*(x.split(len(mask)) for x in windows))):
        pieces = {name: value[part.texts[:, None], part.tokens] for name, value in given.items()}
        of_part = run(**pieces, attention_mask=part.mask.long()).states
        if any(x.shape[:2] != part.mask.shape for x in of_part):
            raise ValueError(
                f"The backbone made hidden states of {', '.join(str(x.shape[1]) for x in of_part)} tokens, by layer, "
                f"from windows of {windowing.length} tokens; expected one state per token: leave window_length out, "
                "and truncate texts to the length that the backbone takes."
            )
        states = states or [x.new_zeros(*shape, x.shape[-1]) for x in of_part]
        texts = part.texts[:, None].expand_as(part.tokens)
        for complete, x in zip(states, of_part):
            kept = part.is_kept.to(x.device)
            complete[texts.to(x.device)[kept], part.tokens.to(x.device)[kept]] = x[kept]
    return BackboneOutput(states, token_masks(mask, states))
