"""Texts as the tokens that a model takes."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeVar

from ..backbones.processors import limit_tokens
from .columns import TEXTS
from .labels import number_labels
from .splits import check_dataset, row_of

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

    Data = TypeVar("Data", Dataset, DatasetDict)

logger = logging.getLogger(__name__)

UNCUT = "tokens_before_cutting"  # a column, while a dataset is tokenized


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
        ValueError: If the length is more than the backbone takes, or is not given and the tokenizer does not say how
            many tokens that is.

    Example:
        >>> fields = window_fields(tokenizer, overlap=128)
        >>> model = CapsuleHeadForSequenceClassification.from_backbone(name, **fields)
        >>> data = tokenize(load_reviews(), tokenizer, in_windows=True)
    """
    most = _limit_of_backbone(tokenizer)
    if length is None:
        length = token_limit(tokenizer)
        if length is None:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say how many tokens its backbone takes, so give the length of a "
                "window: window_fields(tokenizer, overlap, length=...), or window_length in a YAML file."
            )
    elif most is not None and length > most:
        raise ValueError(
            f"The length of a window is {length}, and the backbone takes {most} tokens; expected {most} or less, or "
            "None for as many as it takes."
        )
    is_special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    n_special = [len(list(takewhile(bool, side))) for side in (is_special, reversed(is_special))]
    return {"window_length": length, "window_overlap": overlap, "window_special_tokens": n_special}


def token_limit(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the number of tokens that a tokenizer cuts texts to; None if it says nothing."""
    from transformers.tokenization_utils_base import LARGE_INTEGER

    return tokenizer.model_max_length if tokenizer.model_max_length < LARGE_INTEGER else None


def _limit_of_backbone(tokenizer: PreTrainedTokenizerBase) -> float | None:
    """Return the number of tokens that a tokenizer's backbone takes, which the tokenizer then knows too.

    Infinity for any number; None if the backbone's configuration is not on this machine.
    """
    if tokenizer.name_or_path:
        with contextlib.suppress(OSError, ValueError):
            return limit_tokens(tokenizer, tokenizer.name_or_path, local_files_only=True) or math.inf
    return None


def tokenize(
    datasets: Data, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, in_windows: bool = False
) -> Data:
    """Tokenize the columns `text` and, if there is one, `text_pair`. Where that is empty, `text` is a single text.

    Labels that are words, or true and false, become classes: those of all splits, sorted, as `class_encode_column` of
    `datasets` has them. The model's `id2label` is for you to set, to the names in the order of
    `tokenized["train"].features["labels"].names`. Labels that are numbers and all whole, such as the 0.0 and 1.0 of
    pandas, become integers, which a regression takes too. A split may be without labels (all None or NaN, or -1 for
    classes); where all are None, it has no `labels` then.

    One line says how many texts were cut. If the tokenizer does not say how many tokens the backbone takes, or says
    more, its `model_max_length` is set to what the backbone's configuration says, if that is on this machine; so
    predictions with this tokenizer cut texts alike.

    Args:
        datasets: a `Dataset`, or a `DatasetDict` of splits, with `text`, perhaps `text_pair`, and `label` (or
            `labels`).
        tokenizer: the backbone's.
        max_length: tokens to cut texts to; None for as many as the backbone takes.
        in_windows: whether the model takes texts of any length (see `window_fields`): `max_length=None` then cuts none.

    Returns:
        The same kind, with the model's inputs, `labels`, and `length`, in tokens, by which batches are grouped.

    Raises:
        TypeError: If the data is a stream, or something else.
        ValueError: If there is no `text`, a text or a label is missing, texts are not strings, a text has no token,
            labels are of several kinds, the tokenizer has no padding token, or `max_length` leaves nothing of a text.
    """
    from datasets import Dataset, DatasetDict

    check_dataset("datasets", datasets, "Dataset", "DatasetDict")
    check_pad_token(tokenizer)
    splits: dict[str, Any] = {"": datasets} if isinstance(datasets, Dataset) else dict(datasets)
    columns = _text_columns(splits)
    splits = number_labels(splits)
    n_special = tokenizer.num_special_tokens_to_add(pair="text_pair" in columns)
    if max_length is not None and max_length <= n_special:
        raise ValueError(
            f"max_length is {max_length}; expected more: the tokenizer adds {n_special} special tokens to each input."
        )
    most = max_length
    if most is None and not in_windows:
        of_backbone = _limit_of_backbone(tokenizer)
        most = token_limit(tokenizer)
        if most is None and of_backbone is None:
            logger.warning(
                "No text is cut: %s does not say how many tokens its backbone takes, and the backbone's configuration "
                "is not on this machine; max_length cuts texts.",
                type(tokenizer).__name__,
            )
    lengths, tokenized = {}, {}
    for name, split in splits.items():
        encode = _encoder_of(name, columns, tokenizer, most)
        split = split.map(encode, batched=True, with_indices=True, remove_columns=columns, desc="Tokenizing")
        if UNCUT in split.column_names:  # a split without rows has none
            lengths[name] = split.with_format(None)[UNCUT][:]
            split = split.remove_columns(UNCUT)
        tokenized[name] = split
    cut = describe_cuts(lengths, most)
    if cut:
        logger.warning("%s", cut)
    return tokenized[""] if isinstance(datasets, Dataset) else DatasetDict(tokenized)


def describe_cuts(lengths: Mapping[str, Sequence[int]], most: int | None) -> str | None:
    """Return one line on how many texts are cut; None if none is.

    Args:
        lengths: tokens of each text before it is cut, by split; "" for texts that are in none.
        most: tokens that texts are cut to; None if they are not.
    """
    found = []
    for name, of_split in lengths.items():
        n_cut = 0 if most is None else sum(length > most for length in of_split)
        if n_cut:
            split = f" of {name}" if name else ""
            found.append(f"{n_cut} of {len(of_split)} texts{split}, the longest of which has {max(of_split)} tokens")
    return f"Cut to {most} tokens: {'; '.join(found)}." if found else None


def _text_columns(splits: Mapping[str, Dataset]) -> list[str]:
    """Return the columns of texts, which all splits have, as strings."""
    expected: list[str] | None = None
    for name, split in splits.items():
        of_split, columns = f" of {name}" if name else "", split.column_names
        found = [column for column in TEXTS if column in columns]
        if "text" not in found or found != (expected or found):
            raise ValueError(
                f"The dataset{of_split} has the columns {', '.join(columns)}; expected text (and text_pair for pairs), "
                "and the same in all splits."
            )
        expected = found
        if {"label", "labels"} <= set(columns):
            raise ValueError(f"The dataset{of_split} has the columns label and labels; expected one of them.")
        for column in found:
            dtype = getattr(split.features[column], "dtype", "list")
            if dtype not in ("string", "large_string", "null"):
                raise ValueError(
                    f"{column}{of_split} is {dtype}; expected strings: dataset.cast_column({column!r}, "
                    'Value("string")) makes them, or choose another column with rename_column.'
                )
    if expected is None:
        raise ValueError("datasets is a DatasetDict without splits; expected one split or more.")
    return expected


def _encoder_of(
    split: str, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, most: int | None
) -> Callable[[dict[str, list], list[int]], dict[str, list]]:
    """Return the function that tokenizes a batch of a split's rows."""

    def encode(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        for column in columns:
            for text, row in zip(batch[column], rows):
                if text is None:
                    raise ValueError(
                        f"{column} of {row_of(split, row)} is None; expected a text in every row: leave such rows out, "
                        f"with dataset.filter(lambda row: row[{column!r}] is not None)."
                    )
        texts = list(zip(*(batch[column] for column in columns)))
        encodings, uncut = encode_texts(tokenizer, texts, most)
        if 0 in uncut:
            row = uncut.index(0)
            raise ValueError(
                f"text of {row_of(split, rows[row])} is {texts[row][0]!r}, of which {type(tokenizer).__name__} makes "
                "no token; expected a token at least: leave such rows out with dataset.filter(lambda row: ...)."
            )
        encoding = {name: [row[name] for row in encodings] for name in encodings[0]}
        return {**encoding, "length": list(map(len, encoding["input_ids"])), UNCUT: uncut}

    return encode


def without_empty_pair(texts: Sequence[str]) -> tuple[str, ...]:
    """Return a text, or the two of a pair; one if the second is empty, as transformers' pipelines have it."""
    return tuple(texts[:1]) if len(texts) == 2 and not texts[1] else tuple(texts)


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[Sequence[str]], most: int | None
) -> tuple[list[dict[str, Any]], list[int]]:
    """Tokenize single texts and pairs: what training, evaluation and prediction see of them.

    Args:
        tokenizer: the backbone's.
        texts: tuples of one text, or of the two of a pair.
        most: tokens to cut to; None to cut nothing.

    Returns:
        What a model takes of each text, and its number of tokens before it is cut.
    """
    texts = list(map(without_empty_pair, texts))
    encodings: list[dict[str, Any]] = [{}] * len(texts)

    def encode(rows: Sequence[int], **options: Any) -> None:
        for n_texts in (1, 2):  # a tokenizer takes texts or pairs, and not both
            alike = [row for row in rows if len(texts[row]) == n_texts]
            if alike:
                columns = map(list, zip(*(texts[row] for row in alike)))
                # verbose: it would warn of texts that are longer than the backbone takes.
                encoded = dict(tokenizer(*columns, verbose=False, **options))
                for n, row in enumerate(alike):
                    encodings[row] = {name: values[n] for name, values in encoded.items()}

    encode(range(len(texts)))
    lengths = [len(encoding["input_ids"]) for encoding in encodings]
    if most is not None:
        encode([row for row, length in enumerate(lengths) if length > most], truncation=True, max_length=most)
    return encodings, lengths
