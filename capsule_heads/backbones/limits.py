"""The number of tokens that a backbone takes: the number of its positions, if these are rows of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from ..checks import is_readable
from .parts import ENCODER, Part, Windowing, build_on_meta

if TYPE_CHECKING:
    from typing import TypeGuard

    from transformers.modeling_utils import PreTrainedModel

# Fields of configurations with the length of the table of positions.
SIZES = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")
TABLES_OF_SINES = ("embed_positions", "pos_encoding")  # buffers (GPT-J, CTRL); buffers with other names can grow
MOST_SPARE_ROWS = 3  # rows that a table may have beside those in the configuration


class Positions(NamedTuple):
    """The positions that a backbone has for tokens.

    Attributes:
        n_tokens: number of tokens that have a position; RoBERTa and similar models keep some positions for padding.
        last: the largest of `position_ids`.
    """

    n_tokens: int
    last: int


def find_positions(backbone: PreTrainedModel) -> Positions | None:
    """Return the positions that a backbone has for tokens; None if it computes them for any number of tokens."""
    sizes = _sizes(backbone.config)
    found = []
    for name, module in backbone.named_modules():
        if not ("position" in name or name.endswith("wpe")) or not _is_table(module):
            continue
        rows, padding_idx = len(module.weight), module.padding_idx
        # A model with an offset adds it to positions from 0. Other models begin after the position of padding.
        for_padding = 0 if padding_idx is None or hasattr(module, "offset") else padding_idx + 1
        for size in sizes:
            if size <= rows <= size + MOST_SPARE_ROWS:
                n_tokens = size - for_padding if rows == size else size
                found.append(Positions(n_tokens, rows - 1 - getattr(module, "offset", 0)))
    for name, buffer in backbone.named_buffers():
        if name.rpartition(".")[2] in TABLES_OF_SINES and len(buffer) in sizes:
            found.append(Positions(len(buffer), len(buffer) - 1))
    return min(found, default=None)


def _sizes(config: PreTrainedConfig) -> set[int]:
    """Return the lengths of tables of positions that a configuration names."""
    text_config = config.get_text_config()
    return {size for name in SIZES if isinstance(size := getattr(text_config, name, None), int)}


def _surely_taken(config: PreTrainedConfig) -> int:
    """Return a number of tokens that a backbone surely takes, without a search of its modules in each step."""
    pad_token_id = getattr(config.get_text_config(), "pad_token_id", None)
    for_padding = max(1, pad_token_id if isinstance(pad_token_id, int) else 0) + 1
    return min(_sizes(config), default=0) - for_padding


def _is_table(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Return whether a module is a table of embeddings (also I-BERT's own class) that cannot grow (as FSMT's can)."""
    has_rows = hasattr(module, "padding_idx") and isinstance(getattr(module, "weight", None), Tensor)
    return has_rows and not hasattr(module, "make_weight")


def find_token_limit(config: PreTrainedConfig, part: Part = ENCODER) -> int | None:
    """Return the number of tokens that a backbone takes, from its configuration; None for any number."""
    positions = find_positions(build_on_meta(config, part))
    return None if positions is None else positions.n_tokens


def check_positions(tokens: Tensor, position_ids: Tensor | None, backbone: PreTrainedModel) -> None:
    """Check that a backbone has a position for every token.

    Raises:
        ValueError: If there are more tokens than positions, or larger positions.
    """
    if torch.compiler.is_compiling() or (position_ids is None and tokens.shape[1] <= _surely_taken(backbone.config)):
        return
    positions = find_positions(backbone)
    if positions is None:
        return
    if tokens.shape[1] > positions.n_tokens:
        raise ValueError(
            f"The texts have {tokens.shape[1]} tokens, and the {backbone.config.model_type} backbone has "
            f"positions for {positions.n_tokens}; cut them (tokenizer(..., truncation=True)), or set window_length "
            "(capsule_heads.data.window_fields)."
        )
    if position_ids is not None and is_readable(position_ids) and position_ids.max() > positions.last:
        raise ValueError(
            f"position_ids go up to {position_ids.max()}, and the {backbone.config.model_type} backbone has "
            f"positions 0 to {positions.last}; leave position_ids out to have tokens counted."
        )


def check_windows(windowing: Windowing | None, backbone: PreTrainedModel) -> None:
    """Check that a backbone takes windows of this length.

    Raises:
        ValueError: If windows are too long for the backbone.
    """
    positions = None if windowing is None else find_positions(backbone)
    if windowing is not None and positions is not None and windowing.length > positions.n_tokens:
        raise ValueError(
            f"window_length is {windowing.length}, and the {backbone.config.model_type} backbone takes "
            f"{positions.n_tokens} tokens; set window_length to {positions.n_tokens} or less."
        )


def check_token_types(token_type_ids: Tensor, backbone: PreTrainedModel) -> None:
    """Check, on the host, that a backbone has an embedding of each token's type.

    Raises:
        ValueError: If a type has no embedding.
    """
    if not is_readable(token_type_ids) or token_type_ids.numel() == 0:
        return
    low, high = token_type_ids.min().item(), token_type_ids.max().item()
    if low == high == 0:  # single texts: every table has the first row, so no search is needed
        return
    tables = (x for name, x in backbone.named_modules() if name.rpartition(".")[2] == "token_type_embeddings")
    n_types = next((table.num_embeddings for table in tables if isinstance(table, nn.Embedding)), None)
    if n_types is not None and not 0 <= low <= high < n_types:
        raise ValueError(
            f"token_type_ids go from {low} to {high}, and the {backbone.config.model_type} backbone has types 0 to "
            f"{n_types - 1}; use its own tokenizer, or leave token_type_ids out."
        )
