"""Labels of a user's own data as numbers: what they mean is found from how they look."""

from __future__ import annotations

import ast
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from ..models.configuration_capsule_head import PROBLEM_TYPES

logger = logging.getLogger(__name__)

CLASSES, SEVERAL, NUMBER = PROBLEM_TYPES
MANY = 0.5  # different whole numbers to a row, above which they are no classes
SHOWN = 10  # names of classes


@dataclass(frozen=True)
class Labels:
    """Labels as a model takes them.

    Attributes:
        problem_type: as in a model's configuration.
        names: of classes or labels; None for a regression.
        numbers: by split, a class index, list of 0 and 1, or number for each row; None for a class that training does
            not have.
        unknown: by split, the names of such classes.
        feature: of the column, for `datasets`.
    """

    problem_type: str
    names: list[str] | None
    numbers: dict[str, list]
    unknown: dict[str, list[str]]
    feature: Any


def read_labels(
    splits: Mapping[str, Mapping[str, list]],
    columns: Sequence[str],
    problem_type: str | None = None,
    names: Sequence[str] | None = None,
) -> Labels:
    """Return labels as numbers, and say what they were taken for.

    Args:
        splits: by split, then by column, a value for each row.
        columns: one, or several of 0 and 1.
        problem_type: what they are, where that is not to be found out.
        names: of a model's classes or labels; None for those that the split `train` has.

    Raises:
        ValueError: If labels are of no kind that a model takes, or not of the kind that was asked for.
    """
    if problem_type not in (None, CLASSES, SEVERAL, NUMBER):
        raise ValueError(f"problem_type is {problem_type!r}; expected {CLASSES}, {SEVERAL} or {NUMBER}.")
    if len(columns) > 1:
        if problem_type not in (None, SEVERAL):
            raise ValueError(f"label is {', '.join(columns)}, and problem_type {problem_type}; expected one column.")
        return _from_flags(splits, columns)
    (column,) = columns
    values = {name: [_plain(value) for value in split[column]] for name, split in splits.items()}
    found = problem_type or _kind(values["train"], column)
    if found == NUMBER:
        return _from_numbers(values, column)
    return (_from_classes if found == CLASSES else _from_lists)(values, column, names)


def _plain(value: Any) -> Any:
    """Return a value as Python has it: of NumPy's, or of a list that a table of text has as it is printed."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str):
        value = value.strip()
        if value.startswith("[") and value.endswith("]"):
            try:
                return list(ast.literal_eval(value))
            except (SyntaxError, ValueError):
                return value
    return list(value) if isinstance(value, tuple | set) else value


def _kind(values: Sequence[Any], column: str) -> str:
    if values and all(isinstance(value, list) for value in values):
        return SEVERAL
    numbers = [_number(value) for value in values]
    if any(isinstance(value, bool) for value in values) or None in numbers:
        return CLASSES
    if not all(float(number).is_integer() for number in numbers if number is not None):
        return NUMBER
    n_different = len(set(numbers))
    if len(values) > 20 and n_different > MANY * len(values):
        raise ValueError(
            f"{column} has {n_different} different whole numbers in {len(values)} rows, too many for classes; expected "
            f"another column of labels, or problem_type: {NUMBER}."
        )
    return CLASSES


def _number(value: Any) -> float | None:
    """Return a finite number, of a text too; None for anything else."""
    if isinstance(value, bool | list | dict):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _class_names(values: Iterable[Any]) -> dict[Any, str]:
    """Return the name of each class by its value, in the order that the classes have."""
    different = list(dict.fromkeys(values))
    numbers = {value: _number(value) for value in different}
    if any(isinstance(value, bool) for value in different) or None in numbers.values():
        return {value: str(value) for value in sorted(different, key=str)}
    ordered = sorted(different, key=lambda value: float(value))
    if all(float(value).is_integer() for value in ordered):  # 1.0, as pandas has a 1 beside what is missing
        return {value: str(int(float(value))) for value in ordered}
    return {value: str(value) for value in ordered}


def _from_classes(splits: Mapping[str, list], column: str, names: Sequence[str] | None) -> Labels:
    wrong = next((x for values in splits.values() for x in values if isinstance(x, list | dict)), None)
    if wrong is not None:
        raise ValueError(f"{column} holds {wrong!r}; expected one class in each row.")
    of_values = _class_names(value for values in splits.values() for value in values)
    if names is None:
        trained = {of_values[value] for value in splits["train"]}
        names = [name for name in dict.fromkeys(of_values.values()) if name in trained]
        if len(names) < 2:
            found = f"{names[0]} in every row" if names else "in no row"
            raise ValueError(f"{column} of train is {found}; expected two classes or more.")
        counts = Counter(of_values[value] for value in splits["train"])
        _say("Labels: %d classes, %s.", len(names), [f"{name} ({counts[name]:,})" for name in names])
    index = {name: number for number, name in enumerate(names)}
    return Labels(
        CLASSES,
        list(names),
        {split: [index.get(of_values[value]) for value in values] for split, values in splits.items()},
        {split: [of_values[x] for x in values if of_values[x] not in index] for split, values in splits.items()},
        datasets.ClassLabel(names=list(names)),
    )


def _say(line: str, number: int, names: Sequence[str]) -> None:
    """Log a line with a number and names, of many the first ones."""
    more = f" and {len(names) - SHOWN:,} others" if len(names) > SHOWN else ""
    logger.warning(line, number, ", ".join(names[:SHOWN]) + more)


def _from_numbers(splits: Mapping[str, list], column: str) -> Labels:
    for split, values in splits.items():
        for row, value in enumerate(values):
            if _number(value) is None:
                raise ValueError(
                    f"{column} of {split} holds {value!r} (row {row + 1} of those with a label); expected numbers, for "
                    "a regression."
                )
    numbers = {split: [float(value) for value in values] for split, values in splits.items()}
    if "train" in numbers:
        low, high = min(numbers["train"]), max(numbers["train"])
        if low == high:
            raise ValueError(f"{column} of train is {low:g} in every row; expected different numbers.")
        logger.warning("Labels: numbers from %g to %g, so a regression.", low, high)
    return Labels(NUMBER, None, numbers, {split: [] for split in splits}, datasets.Value("float64"))


def _from_flags(splits: Mapping[str, Mapping[str, list]], columns: Sequence[str]) -> Labels:
    rows: dict[str, list[list[Any]]] = {}
    for split, values in splits.items():
        for name in columns:
            wrong = next((x for x in values[name] if _number(_flag(x)) not in (0, 1)), None)
            if wrong is not None:
                raise ValueError(
                    f"{name} of {split} holds {wrong!r}; expected 0 or 1 in each of several label columns."
                )
        rows[split] = [[float(_flag(x)) for x in row] for row in zip(*(values[name] for name in columns))]
    return _several(rows, list(columns))


def _flag(value: Any) -> Any:
    value = _plain(value)
    words = {"true": 1, "false": 0}
    return words.get(str(value).lower(), value)


def _from_lists(splits: Mapping[str, list], column: str, names: Sequence[str] | None) -> Labels:
    wrong = next((x for values in splits.values() for x in values if not isinstance(x, list)), None)
    if wrong is not None:
        raise ValueError(
            f"{column} holds {wrong!r}; expected a list of labels in each row, or several columns of 0 and 1."
        )
    all_rows = [row for values in splits.values() for row in values]
    width = len(all_rows[0]) if all_rows else 0
    if width > 1 and all(len(row) == width and all(_number(x) in (0, 1) for x in row) for row in all_rows):
        names = names or [f"{column}_{number}" for number in range(width)]
        if len(names) != width:
            raise ValueError(
                f"{column} holds lists of {width}, and the model has {len(names)} labels; expected as many."
            )
        return _several({split: [[float(x) for x in row] for row in rows] for split, rows in splits.items()}, names)
    if names is None:
        names = list(dict.fromkeys(_class_names(x for row in splits["train"] for x in row).values()))
        if len(names) < 2:
            raise ValueError(f"{column} of train has {len(names)} different labels; expected two or more.")
    for split, rows in splits.items():
        unknown = Counter(str(x) for row in rows for x in row if str(x) not in names)
        if unknown:
            _say(f"Not counted in {split}: %d labels that training does not have (%s).", unknown.total(), list(unknown))
    of_rows = {split: [set(map(str, row)) for row in rows] for split, rows in splits.items()}
    flags = {split: [[float(name in row) for name in names] for row in rows] for split, rows in of_rows.items()}
    return _several(flags, names)


def _several(rows: dict[str, list[list[float]]], names: Sequence[str]) -> Labels:
    if "train" in rows:
        fractions = np.mean(rows["train"], axis=0)
        shown = [f"{name} ({fraction:.0%})" for name, fraction in zip(names, fractions)]
        _say("Labels: several to a row, of %d: %s.", len(names), shown)
    feature = datasets.List(datasets.Value("float32"))
    return Labels(SEVERAL, list(names), rows, {split: [] for split in rows}, feature)
