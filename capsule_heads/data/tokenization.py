"""From texts to what a model takes."""

from __future__ import annotations

from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase


def check_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a tokenizer can pad a batch.

    Raises:
        ValueError: if it has no padding token; says how to set one.
    """
    if tokenizer.pad_token is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no padding token, so texts of different lengths cannot share a batch. Set "
            "one: tokenizer.pad_token = tokenizer.eos_token (padding is masked: any token will do)."
        )


def tokenize(datasets: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> DatasetDict:
    """Tokenizes the columns `text` and, if there is one, `text_pair`.

    Args:
        datasets: splits with `text`, perhaps `text_pair`, and `label`.
        tokenizer: the backbone's.
        max_length: tokens to cut texts to; None for as many as the backbone takes.

    Returns:
        Splits with the model's inputs, `labels`, and `length`, in tokens, by which batches are grouped.

    Raises:
        ValueError: if there is no `text`, or the tokenizer has no padding token.
    """
    check_pad_token(tokenizer)
    columns = next(iter(datasets.values())).column_names
    if "text" not in columns:
        raise ValueError(f"The dataset has the columns {', '.join(columns)}; expected text (and text_pair for pairs).")

    def tokenize_batch(batch: dict) -> dict:
        encoding = tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length)
        encoding["length"] = [len(ids) for ids in encoding["input_ids"]]
        return encoding

    to_remove = [name for name in ("text", "text_pair") if name in columns]
    tokenized = datasets.map(tokenize_batch, batched=True, remove_columns=to_remove, desc="Tokenizing")
    return tokenized.rename_column("label", "labels") if "label" in columns else tokenized
