"""Texts as the tokens that a model takes."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase


def check_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer can pad a batch.

    Raises:
        ValueError: If it has no padding token.
    """
    if tokenizer.pad_token is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no padding token, so texts of different lengths cannot share a batch. Set "
            "one: tokenizer.pad_token = tokenizer.eos_token (padding is masked: any token will do)."
        )


def window_fields(
    tokenizer: PreTrainedTokenizerBase, overlap: int, length: int | None = None
) -> dict[str, int | list[int]]:
    """Return the fields of a model's configuration that cut texts longer than its backbone takes into windows.

    Args:
        tokenizer: the backbone's; it says which special tokens every window needs.
        overlap: tokens that neighbouring windows share.
        length: tokens of a window, special ones included; None for as many as the backbone takes.

    Raises:
        ValueError: If the length is not given, and the tokenizer does not say how many tokens the backbone takes.

    Example:
        >>> fields = window_fields(tokenizer, overlap=128)
        >>> model = CapsuleHeadForSequenceClassification.from_backbone(name, **fields)
        >>> data = tokenize(load_reviews(), tokenizer, in_windows=True)
    """
    if length is None:
        from transformers.tokenization_utils_base import LARGE_INTEGER

        length = tokenizer.model_max_length
        if length >= LARGE_INTEGER:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say how many tokens its backbone takes, so give the length of a "
                "window: window_fields(tokenizer, overlap, length=...), or window_length in a YAML file."
            )
    is_special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    n_special = [len(list(takewhile(bool, side))) for side in (is_special, reversed(is_special))]
    return {"window_length": length, "window_overlap": overlap, "window_special_tokens": n_special}


def tokenize(
    datasets: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    in_windows: bool = False,
) -> DatasetDict:
    """Tokenize the columns `text` and, if there is one, `text_pair`.

    Args:
        datasets: splits with `text`, perhaps `text_pair`, and `label`.
        tokenizer: the backbone's.
        max_length: tokens to cut texts to; None for as many as the backbone takes.
        in_windows: whether the model takes texts of any length (see `window_fields`): `max_length=None` then cuts none.

    Returns:
        Splits with the model's inputs, `labels`, and `length`, in tokens, by which batches are grouped.

    Raises:
        ValueError: If there is no `text`, the tokenizer has no padding token, or `max_length` leaves nothing of a text.
    """
    check_pad_token(tokenizer)
    columns = next(iter(datasets.values())).column_names
    if "text" not in columns:
        raise ValueError(f"The dataset has the columns {', '.join(columns)}; expected text (and text_pair for pairs).")

    n_special = tokenizer.num_special_tokens_to_add(pair="text_pair" in columns)
    if max_length is not None and max_length <= n_special:
        raise ValueError(
            f"max_length is {max_length}; expected more: the tokenizer adds {n_special} special tokens to each input."
        )
    is_cut = max_length is not None or not in_windows

    def tokenize_batch(batch: dict) -> dict:
        # verbose: it would warn of texts that are longer than the backbone takes.
        texts = batch["text"], batch.get("text_pair")
        encoding = tokenizer(*texts, truncation=is_cut, max_length=max_length, verbose=is_cut)
        encoding["length"] = [len(ids) for ids in encoding["input_ids"]]
        return encoding

    to_remove = [name for name in ("text", "text_pair") if name in columns]
    tokenized = datasets.map(tokenize_batch, batched=True, remove_columns=to_remove, desc="Tokenizing")
    return tokenized.rename_column("label", "labels") if "label" in columns else tokenized
