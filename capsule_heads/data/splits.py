"""Splits of a dataset: a validation split where it is missing, and columns that are made when they are read."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

VALIDATION_FRACTION = 0.1  # of the training examples, where a dataset has no validation split
FEW, FRACTION_OF_FEW = 1000, 0.2  # examples, of which a tenth would be too few to measure anything


def check_dataset(name: str, given: object, *kinds: str) -> None:
    """Check that data is in memory or on disk, where it can be read again and its rows are counted.

    Args:
        name: the argument's.
        given: its value.
        *kinds: the classes of `datasets` that are expected.

    Raises:
        TypeError: If it is a stream, or something else.
    """
    import datasets

    if isinstance(given, tuple(getattr(datasets, kind) for kind in kinds)):
        return
    expected, found = " or a ".join(kinds), type(given).__name__
    if isinstance(given, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise TypeError(
            f"{name} is an {found}, whose rows are streamed and not counted; expected a {expected}: load it without "
            "streaming=True, or keep a part of it with Dataset.from_list(list(stream.take(n)))."
        )
    raise TypeError(
        f"{name} is a {found}; expected a {expected} of the package datasets, as Dataset.from_dict, from_list and "
        "from_pandas make it."
    )


def read_columns(dataset: Any, names: Iterable[str]) -> dict[str, list]:
    """Return those of some columns that a dataset has: one of `datasets`, or a `HiddenStateCache`."""
    columns = getattr(dataset, "column_names", None) or ()
    if hasattr(dataset, "with_format"):  # plain numbers, whatever its rows are read as
        dataset = dataset.with_format(None)
    return {name: dataset[name][:] for name in names if name in columns}


def row_of(split: str, row: int) -> str:
    """Return the name of a row for a message; `split` is "" for a dataset without splits."""
    return f"row {row}{f' of {split}' if split else ''} (counted from 0)"


def with_validation(splits: DatasetDict, source: str, kind: str) -> DatasetDict:
    """Return splits with a validation split. Where it is missing, a part of the training split becomes it.

    A tenth of the training examples of each class are split off, always the same ones, and one per class at least.

    Args:
        splits: With `train`, and a column `label` of classes.
        source: Where they are from, for messages.
        kind: A word for one example, for messages: "image".

    Raises:
        ValueError: If there is no training split, or a class has too few examples to split.
    """
    if "train" not in splits:
        raise ValueError(f"{source} has the splits {', '.join(splits)}; expected train.")
    if "validation" in splits:
        return splits
    counts = collections.Counter(splits["train"]["label"][:])
    if min(counts.values()) < 2:
        raise ValueError(
            f"A class of {source} has a single training {kind}, and validation needs one of its own; add another, or a "
            "split named validation."
        )
    n_validation = max(math.ceil(VALIDATION_FRACTION * len(splits["train"])), len(counts))
    parts = splits["train"].train_test_split(n_validation, seed=0, stratify_by_column="label")
    splits["train"], splits["validation"] = _with_all_classes(parts["train"], parts["test"])
    return splits


def hold_out(n_rows: int, classes: Sequence[int] | None, seed: int) -> tuple[list[int], list[int]]:
    """Return the rows to train on and those to validate on: a tenth, or a fifth of fewer than 1,000.

    Args:
        n_rows: number of rows.
        classes: `[n_rows]`, of which each keeps its share where it has two rows or more; None for no classes.
        seed: random seed.

    Returns:
        Two lists of rows, in order. The second is empty if there is nothing that can be spared.
    """
    from sklearn.model_selection import train_test_split

    counts = collections.Counter(classes or [0] * n_rows)
    of_row = [0] * n_rows if classes is None else list(classes)
    rows = [row for row in range(n_rows) if counts[of_row[row]] > 1]
    strata = [of_row[row] for row in rows]
    n_held_out = max(math.ceil((FRACTION_OF_FEW if n_rows < FEW else VALIDATION_FRACTION) * n_rows), len(set(strata)))
    if len(rows) - n_held_out < len(set(strata)) or not rows:
        return list(range(n_rows)), []
    _, held_out = train_test_split(rows, test_size=n_held_out, stratify=strata, random_state=seed)
    held_out.sort()
    return sorted(set(range(n_rows)) - set(held_out)), held_out


def _with_all_classes(train: Dataset, validation: Dataset) -> tuple[Dataset, Dataset]:
    """Move an example of each class that is missing: rounding leaves out the rare ones."""
    import datasets

    labels = train["label"][:]
    moved = [labels.index(label) for label in sorted(set(labels) - set(validation["label"][:]))]
    if not moved:
        return train, validation
    rest = [row for row in range(len(train)) if row not in set(moved)]
    return train.select(rest), datasets.concatenate_datasets([validation, train.select(moved)])


def made_when_read(split: Dataset, column: str, name: str, make: Callable[[list], dict[str, list]]) -> Dataset:
    """Return a split whose columns are a model's input and `labels`; the input is made when it is read.

    The columns have these names at once, so that `remove_unused_columns` may be on or off.

    Args:
        split: With the column, and `label`.
        column: The column that the input is made of.
        name: The name of the input.
        make: Makes the input, and what belongs to it, of a batch of the column; a function that can be pickled.
    """
    split = split.rename_columns({column: name, "label": "labels"})
    return split.with_transform(functools.partial(_make, name, make))  # not a closure: workers pickle it


def _make(name: str, make: Callable[[list], dict[str, list]], batch: dict[str, Any]) -> dict[str, Any]:
    if name not in batch:  # a column read by itself
        return batch
    return {**batch, **make(batch[name])}
