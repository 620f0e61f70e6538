"""Descriptions of a head's parts by words. Parts are learned, and their numbers mean nothing to a reader.

A part's credit for a class is exact. A word describes a part if inputs with the word get more of this credit than the
mean over all inputs. This is a statement about inputs, and not about the word alone.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..files import write_json
from .attributions import Explanation, explain

if TYPE_CHECKING:
    from ..models import CapsuleHeadClassifier

logger = logging.getLogger(__name__)

PARTS_FILE = "parts.json"  # beside a model
MOST_INPUTS = 1000  # most inputs that are read for a description
MOST_PARTS = 5  # most parts of a class, those with the largest credits for it
MOST_WORDS = 6  # most words of a part
LEAST_COUNT = 3  # least number of inputs that have a word
LEAST_ERRORS = 2.0  # standard errors by which the mean over these inputs has to exceed the mean over all
PRIOR_COUNT = 2  # inputs without effect that are added to each mean, as rare words would else come first by chance


class PartWord(NamedTuple):
    """A word, what its inputs have above a part's mean credit, in logits, and the number of inputs that have it."""

    text: str
    credit: float
    n_inputs: int


class Part(NamedTuple):
    """A part of a class: its number, its mean credit where the class is predicted, in logits, and its words."""

    number: int
    credit: float
    words: tuple[PartWord, ...]


@dataclass(frozen=True)
class PartDescriptions:
    """The parts that carry the scores of classes, and the words that they respond to.

    Attributes:
        n_inputs: number of inputs that the descriptions are based on.
        classes: for each class's name its parts, the largest mean credit first. A class that is never predicted is
            left out.
    """

    n_inputs: int
    classes: dict[str, tuple[Part, ...]]

    def save(self, path: str | Path) -> None:
        """Write the descriptions as JSON.

        Raises:
            OSError: If the file cannot be written.
        """
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> PartDescriptions:
        """Read descriptions that `save` wrote.

        Raises:
            OSError: If there is no such file.
            ValueError: If the file holds something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            classes = {
                str(label): tuple(
                    Part(n, credit, tuple(PartWord(*word) for word in words)) for n, credit, words in parts
                )
                for label, parts in content["classes"].items()
            }
            return cls(content["n_inputs"], classes)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} holds no descriptions of parts ({error}); expected a file that PartDescriptions.save wrote."
            ) from None


def describe_parts(model: CapsuleHeadClassifier, inputs: Any, processor: Any | None = None) -> PartDescriptions:
    """Describe the parts of a classifier of texts by the words that they respond to.

    This costs a forward pass for each input. Of more than `MOST_INPUTS` inputs, an evenly spaced sample is used.

    Args:
        model: a classifier whose head has parts.
        inputs: texts as `explain` takes them, such as the training split.
        processor: the tokenizer; by default the one that is saved with the model.

    Raises:
        ValueError: If the model is a regression, its head has no parts, or it takes images or audio.
    """
    from ..models.processors import modality_of

    if "parts" not in model.head.explains:
        raise ValueError(f"A {type(model.head).__name__} has no parts to describe; expected a head with capsules.")
    if modality_of(model) != "text":
        raise ValueError(
            f"The model takes {modality_of(model)}, and parts are described by words; expected a model of texts."
        )
    rows = sample_of(len(inputs))
    return summarize_parts(explain(model, [inputs[row] for row in rows], processor, parts_only=True))


def sample_of(n_inputs: int) -> range:
    """Return the indices of the inputs that `describe_parts` explains: at most `MOST_INPUTS`, evenly spaced."""
    return range(0, n_inputs, max(1, -(-n_inputs // MOST_INPUTS)))


def summarize_parts(explanations: Sequence[Explanation]) -> PartDescriptions:
    """Describe parts by the words of inputs that are explained already.

    Args:
        explanations: explanations by one model. Explanations without words, as of images, are left out.
    """
    known = [(x, _words(x)) for x in explanations if x.spans]
    if not known:
        return PartDescriptions(0, {})
    credits = torch.stack([x.against_others(x.parts) for x, _ in known])  # [inputs, parts, classes]
    rows_of: dict[str, list[int]] = {}
    for row, (_, words_of_row) in enumerate(known):
        for word in sorted(words_of_row):
            rows_of.setdefault(word, []).append(row)
    rows_of = {word: rows for word, rows in rows_of.items() if len(rows) >= LEAST_COUNT}
    classes = {}
    for k, label in enumerate(known[0][0].labels):
        rows = [row for row, (x, _) in enumerate(known) if k in x.predicted_classes]
        if rows:
            means = credits[rows, :, k].mean(0)
            strongest = means.topk(min(MOST_PARTS, len(means))).indices
            words_of = _strongest_words(credits[:, strongest, k], rows_of)
            parts = zip(strongest.tolist(), means[strongest].tolist(), words_of)
            classes[label] = tuple(Part(n, round(credit, 4), of_part) for n, credit, of_part in parts)
    return PartDescriptions(len(known), classes)


def load_parts(name_or_path: str) -> PartDescriptions | None:
    """Return the descriptions that are saved with a model; None without such descriptions.

    Args:
        name_or_path: a directory, or a name on the Hub.
    """
    from transformers.utils import cached_file

    try:
        path = cached_file(name_or_path, PARTS_FILE, _raise_exceptions_for_missing_entries=False)
        return None if path is None else PartDescriptions.load(path)
    except (OSError, ValueError) as error:
        logger.warning("The parts of %s cannot be described by words: %s", name_or_path, error)
        return None


def _words(explanation: Explanation) -> set[str]:
    """Return the words of a text in lower case, without punctuation."""
    text = explanation.text or ""
    words = {text[start:end].casefold() for start, end, _ in explanation.spans}
    return {word for word in words if re.search(r"\w", word)}


def _strongest_words(credits: torch.Tensor, rows_of: dict[str, list[int]]) -> Iterable[tuple[PartWord, ...]]:
    """Yield the words of each part, the strongest first.

    Args:
        credits: `[inputs, parts]`, for one class.
        rows_of: the inputs that have a word.
    """
    above, spread = credits - credits.mean(0), credits.std(0, correction=0)
    words = list(rows_of)
    sums = torch.stack([above[rows].sum(0) for rows in rows_of.values()]) if words else above[:0]  # [words, parts]
    counts = torch.tensor([len(rows) for rows in rows_of.values()])
    is_above_chance = sums > LEAST_ERRORS * spread * counts.sqrt().unsqueeze(-1)
    effects = (sums / (counts + PRIOR_COUNT).unsqueeze(-1)).where(is_above_chance, 0.0)
    for of_part in effects.T:
        best = of_part.topk(min(MOST_WORDS, len(words))).indices.tolist()
        yield tuple(PartWord(words[n], round(float(of_part[n]), 4), int(counts[n])) for n in best if of_part[n] > 0)
