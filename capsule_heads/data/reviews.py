"""A small embedded set of reviews with binary sentiment, for trying things out without a network."""

from __future__ import annotations

import csv
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

_SPLITS = ("train", "validation", "test")
_NAMES = ["negative", "positive"]


def load_reviews() -> datasets.DatasetDict:
    """Load the embedded reviews (495 / 120 / 120 sentences), without a network.

    The reviews were written for this package: one sentence each, about films, books, restaurants, hotels, gadgets,
    services and more, balanced between the labels. About a quarter depend on negation, contrast or irony. The set is
    for quickstarts and tests; it is too small to compare models on.

    Returns:
        The splits `train`, `validation` and `test` with the columns `text` and `label` (a `ClassLabel` with the names
        "negative" and "positive").
    """
    import datasets

    return datasets.DatasetDict({split: _load_split(split) for split in _SPLITS})


def _load_split(split: str) -> datasets.Dataset:
    import datasets

    path = resources.files("capsule_heads") / "data" / "files" / "reviews" / f"{split}.tsv"
    # Quotation marks in a review are part of its text.
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=_NAMES)})
    columns = {name: [row[name] for row in rows] for name in ("text", "label")}
    return datasets.Dataset.from_dict(columns, features=features)
