"""Two models on one text: which words they score differently."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .attributions import Explanation, Word


@dataclass(frozen=True)
class Comparison:
    """The logits of a second model less those of a first one, and the attributions of the difference, in logits.

    Attributes:
        labels: names of the classes.
        logits: `[classes]`, the difference of the logits.
        words: words of the text, between spaces, each with the difference of its credits, `[classes]`.
        rest: `[classes]`, the difference for special tokens and baselines. With all words it adds up to `logits`.
    """

    labels: tuple[str, ...]
    logits: Tensor
    words: list[Word]
    rest: Tensor


def compare(first: Explanation, second: Explanation) -> Comparison:
    """Compare the explanations of one text by two models, which may have different backbones and tokenizers.

    Args:
        first: explanation by the first model.
        second: explanation by the second model.

    Raises:
        ValueError: If the texts or classes differ, or the tokens of words are not known.
    """
    if first.text != second.text:
        raise ValueError(f"The explanations are of {first.text!r:.100} and {second.text!r:.100}; expected one text.")
    if sorted(first.labels) != sorted(second.labels):
        raise ValueError(
            f"The models have the classes {', '.join(first.labels)} and {', '.join(second.labels)}; expected the same."
        )
    order = [second.labels.index(label) for label in first.labels]
    pairs = zip(_words(first), _words(second))
    words = [Word(x.text, x.start, x.end, y.credit[order] - x.credit) for x, y in pairs]
    logits = second.logits[order] - first.logits
    return Comparison(first.labels, logits, words, logits - sum(word.credit for word in words))


def _words(explanation: Explanation) -> Iterator[Word]:
    """Yield words as divided by spaces, since tokenizers divide texts into words differently."""
    parts = explanation.by_word()
    for found in re.finditer(r"\S+", explanation.text or ""):
        start, end = found.span()
        credit = sum((x.credit for x in parts if start <= x.start < end), start=explanation.logits * 0)
        yield Word(found[0], start, end, credit)
