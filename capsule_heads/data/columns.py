"""The usual names of columns."""

from __future__ import annotations

from collections.abc import Iterable

TEXTS = ("text", "text_pair")  # of a prepared split: single texts, or pairs
# The likeliest first.
TEXT_NAMES = ("text", "sentence", "review", "content", "body", "comment", "message", "document", "tweet", "title")
LABEL_NAMES = ("label", "labels", "class", "category", "stars", "rating", "sentiment", "target", "score", "tags")
# Two columns that belong together are a pair of texts.
PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)


def usual_texts(names: Iterable[str]) -> list[str] | None:
    """Return the columns of texts by their names, one or two of a pair; None if none has a usual name."""
    return _find(names, (*PAIRS, *((name,) for name in TEXT_NAMES)))


def usual_label(names: Iterable[str]) -> str | None:
    """Return the column of labels by its name; None if none has a usual one."""
    found = _find(names, ((name,) for name in LABEL_NAMES))
    return None if found is None else found[0]


def _find(names: Iterable[str], usual: Iterable[tuple[str, ...]]) -> list[str] | None:
    by_name = {name.lower(): name for name in names}
    found = next((group for group in usual if all(name in by_name for name in group)), None)
    return None if found is None else [by_name[name] for name in found]
