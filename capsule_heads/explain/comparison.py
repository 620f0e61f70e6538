"""Two models on one text: which words they score differently."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .attributions import Explanation, Word


@dataclass(frozen=True)
class Comparison:
    """What a second model's logits have more than a first one's, and where that comes from, in logits.

    Attributes:
        labels: names of the classes.
        logits: `[classes]`, the difference.
        words: of the text, between spaces, each with the difference of its credits, `[classes]`.
        rest: `[classes]`, that of special tokens and baselines: with all words it adds up to `logits`.
    """

    labels: tuple[str, ...]
    logits: Tensor
    words: list[Word]
    rest: Tensor


def compare(first: Explanation, second: Explanation) -> Comparison:
    """Compare what two models say of one text; they may have different backbones and tokenizers.

    Args:
        first: of the text, by the one model.
        second: of it, by the other one.

    Raises:
        ValueError: If the texts or classes differ, or it is not known which tokens make a word.
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
    """Yield what is between spaces: tokenizers divide that into words differently."""
    parts = explanation.by_word()
    for found in re.finditer(r"\S+", explanation.text or ""):
        start, end = found.span()
        credit = sum((x.credit for x in parts if start <= x.start < end), start=explanation.logits * 0)
        yield Word(found[0], start, end, credit)
