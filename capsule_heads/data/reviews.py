"""A small embedded set of reviews with binary sentiment, for trying things out without a network."""

from __future__ import annotations

import csv
from importlib import resources

import datasets

_SPLITS = ("train", "validation", "test")
_NAMES = ["negative", "positive"]


def load_reviews() -> datasets.DatasetDict:
    """Loads the embedded reviews (495 / 120 / 120 sentences), without a network.

    The reviews were written for this package: one sentence each, about films, books, restaurants, hotels, gadgets,
    services and more, balanced between the labels. About a quarter depend on negation, contrast or irony. The set is
    for quickstarts and tests; it is too small to compare models on.

    Returns:
        The splits `train`, `validation` and `test` with the columns `text` and `label` (a `ClassLabel` with the names
        "negative" and "positive").
    """
    return datasets.DatasetDict({split: _load_split(split) for split in _SPLITS})


def _load_split(split: str) -> datasets.Dataset:
    path = resources.files("capsule_heads") / "data" / "files" / "reviews" / f"{split}.tsv"
    with path.open(encoding="utf-8", newline="") as file:
        # Quotation marks in a review are part of its text.
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=_NAMES)})
    columns = {name: [row[name] for row in rows] for name in ("text", "label")}
    return datasets.Dataset.from_dict(columns, features=features)
