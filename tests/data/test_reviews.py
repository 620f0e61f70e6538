from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import datasets
import pytest

from capsule_heads.data.reviews import load_reviews

SPLITS = ["train", "validation", "test"]


@pytest.fixture(scope="module")
def reviews() -> datasets.DatasetDict:
    return load_reviews()


@pytest.fixture(scope="module")
def texts(reviews: datasets.DatasetDict) -> list[str]:
    return [text for split in SPLITS for text in reviews[split]["text"]]


def words(text: str) -> tuple[str, ...]:
    return tuple(re.sub(r"[^\w\s]", "", text.casefold()).split())


def jaccard(first: set[str], second: set[str]) -> float:
    return len(first & second) / len(first | second)


def test_splits_and_columns(reviews: datasets.DatasetDict) -> None:
    assert list(reviews) == SPLITS
    for split in reviews.values():
        assert split.column_names == ["text", "label"]
        assert split.features["text"] == datasets.Value("string")
        assert split.features["label"] == datasets.ClassLabel(names=["negative", "positive"])


def test_labels_are_read_as_written(reviews: datasets.DatasetDict) -> None:
    labels = dict(zip(reviews["train"]["text"], reviews["train"]["label"], strict=True))
    names = reviews["train"].features["label"]
    assert labels["This keyboard makes me want to write letters again."] == names.str2int("positive")
    assert labels["Overpriced, overcrowded and thoroughly underwhelming."] == names.str2int("negative")


def test_sizes(reviews: datasets.DatasetDict) -> None:
    assert {split: len(reviews[split]) for split in SPLITS} == {"train": 495, "validation": 120, "test": 120}


def test_texts_are_distinct_within_and_across_splits(texts: list[str]) -> None:
    distinct = {words(text) for text in texts}
    assert len(distinct) == len(texts) >= 500


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_balanced(reviews: datasets.DatasetDict, split: str) -> None:
    labels = reviews[split]["label"]
    assert sum(labels) / len(labels) == pytest.approx(0.5, abs=0.05)


def test_each_text_is_one_clean_line(texts: list[str]) -> None:
    for text in texts:
        assert text.isascii() and text.isprintable(), text
        assert text == " ".join(text.split()), text
        assert text.endswith((".", "!", "?")), text
        assert 4 <= len(words(text)) <= 40, text


def test_openings_vary(texts: list[str]) -> None:
    (_, most_common), *_ = Counter(words(text)[:4] for text in texts).most_common(1)
    assert most_common <= 3


def test_few_first_words_do_not_dominate(texts: list[str]) -> None:
    (_, most_common), *_ = Counter(words(text)[0] for text in texts).most_common(1)
    assert most_common <= 0.15 * len(texts)


def test_no_two_texts_share_most_of_their_words(texts: list[str]) -> None:
    pairs = combinations([(text, set(words(text))) for text in texts], 2)
    alike = [(a, b) for (a, a_words), (b, b_words) in pairs if jaccard(a_words, b_words) > 0.7]
    assert alike == []


def test_vocabulary_is_rich(texts: list[str]) -> None:
    # Templates filled with word lists of the same total length stay far below this.
    counts = Counter(word for text in texts for word in words(text))
    assert len(counts) >= 0.25 * counts.total()
