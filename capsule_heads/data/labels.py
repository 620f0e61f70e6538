"""Labels as numbers: words become classes, and what is missing is found before training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .splits import row_of

if TYPE_CHECKING:
    from datasets import Dataset

LABELS = "labels"


def number_labels(splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Return splits whose column `labels` holds what a model takes: class indices, numbers, or lists of them.

    Words, and true and false, become a `ClassLabel` with those of all splits, sorted. Numbers that are all whole become
    integers. A split without any label (all None or NaN, or -1 for classes) stays as it is; of all None, the column is
    left out.

    Args:
        splits: by name, each with `label`, `labels` or neither.

    Raises:
        ValueError: If a label is missing, or labels are of several kinds, or of none that a model takes.
    """
    numbered, labels = {}, {}
    for name, split in splits.items():
        numbered[name] = split = split.rename_column("label", LABELS) if "label" in split.column_names else split
        values = split.with_format(None)[LABELS][:] if LABELS in split.column_names else []
        missing = _find_missing(values, is_class=hasattr(split.features.get(LABELS), "names"))
        if len(missing) < len(values):
            labels[name] = values
        elif values and all(value is None for value in values):
            numbered[name] = split.remove_columns(LABELS)
        if 0 < len(missing) < len(values):
            raise ValueError(
                f"label of {row_of(name, missing[0])} is {values[missing[0]]}; expected a label in every row, or in no "
                f"row of a split: leave such rows out, of which there are {len(missing)}, with dataset.filter."
            )
    kinds = {name: _kind(numbered[name], name) for name in labels}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{kind} in {name}" for name, kind in kinds.items())
        raise ValueError(f"label holds {found}; expected the same in all splits.")
    of_kind = {
        "classes": _check_classes,
        "words": _classify_words,
        "numbers": _make_whole,
        "lists": _check_lists,
    }
    for kind in set(kinds.values()):
        numbered |= of_kind[kind]({name: numbered[name] for name in labels}, labels)
    return numbered


def _find_missing(labels: list, is_class: bool) -> list[int]:
    """Return the rows whose label is None, not a finite number, or the -1 of a class."""

    def is_missing(label: Any) -> bool:
        if isinstance(label, list):
            return any(map(is_missing, label))
        return label is None or (isinstance(label, float) and not math.isfinite(label)) or (is_class and label == -1)

    return [row for row, label in enumerate(labels) if is_missing(label)]


def _kind(split: Dataset, name: str) -> str:
    import datasets

    feature = split.features[LABELS]
    if isinstance(feature, datasets.ClassLabel):
        return "classes"
    item = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    dtype = item.dtype if isinstance(item, datasets.Value) else type(item).__name__
    is_number = dtype.startswith(("int", "uint", "float"))
    if item is not feature and (is_number or dtype == "bool"):
        return "lists"
    if item is feature and (is_number or dtype in ("string", "large_string", "bool")):
        return "numbers" if is_number else "words"
    raise ValueError(
        f"label{f' of {name}' if name else ''} holds {'' if item is feature else 'lists of '}{dtype}; expected words, "
        "whole numbers or a ClassLabel for classes, numbers for a regression, or lists of 0 and 1 for several labels."
    )


def _check_lists(splits: dict[str, Dataset], labels: dict[str, list]) -> dict[str, Dataset]:
    length = len(next(iter(labels.values()))[0])
    for name, values in labels.items():
        for row, value in enumerate(values):
            if len(value) != length:
                raise ValueError(
                    f"label of {row_of(name, row)} is a list of {len(value)}; expected {length}, as in the first row: "
                    "0 or 1 for each label there is."
                )
    return splits


def _check_classes(splits: dict[str, Dataset], labels: dict[str, list]) -> dict[str, Dataset]:
    names = {name: split.features[LABELS].names for name, split in splits.items()}
    first = next(iter(names))
    for name in names:
        if names[name] != names[first]:
            raise ValueError(
                f"label has the classes {names[first]} in {first} and {names[name]} in {name}; expected the same in "
                'the same order: dataset.cast_column("label", ClassLabel(names=...)) sets them.'
            )
    return splits


def _classify_words(splits: dict[str, Dataset], labels: dict[str, list]) -> dict[str, Dataset]:
    import datasets

    words = sorted({str(word) for values in labels.values() for word in values})
    numbers, feature = {word: number for number, word in enumerate(words)}, datasets.ClassLabel(names=words)
    return {
        name: _with_labels(split, [numbers[str(word)] for word in labels[name]], feature)
        for name, split in splits.items()
    }


def _make_whole(splits: dict[str, Dataset], labels: dict[str, list]) -> dict[str, Dataset]:
    import datasets

    are_whole = all(float(number).is_integer() for values in labels.values() for number in values)
    kind, dtype = (int, "int64") if are_whole else (float, "float64")
    return {
        name: split
        if all(isinstance(number, kind) for number in labels[name])
        else _with_labels(split, list(map(kind, labels[name])), datasets.Value(dtype))
        for name, split in splits.items()
    }


def _with_labels(split: Dataset, labels: list, feature: Any) -> Dataset:
    return split.remove_columns(LABELS).add_column(LABELS, labels, feature=feature)
