"""Explanations as one page of HTML, which needs no network and nothing beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from .attributions import Explanation
from .pictures import draw_patches

BLUE, RED = (33, 102, 172), (178, 24, 43)


def render_report(
    explanations: Sequence[Explanation], labels: Sequence[int | None] | None = None, title: str = "Explanations"
) -> str:
    """A page with coloured texts, or patches over images, of each explanation.

    Args:
        explanations: of texts or images.
        labels: the true class of each, if known: wrong predictions then come first, the most confident one at the top,
            and right ones after them, the least confident one first. Without labels the order is as given.
        title: of the page.

    Raises:
        ValueError: if there are not as many labels as explanations.
        ImportError: for images, if matplotlib is not installed.
    """
    labels = [None] * len(explanations) if labels is None else list(labels)
    if len(labels) != len(explanations):
        raise ValueError(f"There are {len(labels)} labels of {len(explanations)} explanations; expected one for each.")
    pairs = list(zip(explanations, labels))
    unknown = [pair for pair in pairs if pair[1] is None]
    known = sorted((pair for pair in pairs if pair[1] is not None), key=_confidence)
    wrong = [pair for pair in known if pair[0].predicted != pair[1]]
    right = [pair for pair in known if pair[0].predicted == pair[1]]
    sections = [
        ("", unknown),
        ("Wrong, the most confident first", wrong[::-1]),
        ("Right, the least confident first", right),
    ]
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title, sections=[(heading, [_entry(*pair) for pair in members]) for heading, members in sections]
    )


def render_words(explanation: Explanation) -> str:
    """A text as HTML, its words in the colours of what they say for the predicted class; empty without words."""
    spans = [
        f'{html.escape(before)}<span style="background:{colour}" title="{credit:+.3f}">{html.escape(word)}</span>'
        for before, word, credit, colour in _coloured_words(explanation)
    ]
    return f'<p style="font-size:1.15rem;line-height:2">{"".join(spans)}</p>' if spans else ""


def _confidence(pair: tuple[Explanation, int | None]) -> float:
    return float(pair[0].probabilities[pair[0].predicted])


def _entry(explanation: Explanation, label: int | None) -> dict[str, Any]:
    """What the template says of one explanation."""
    k = explanation.predicted
    probabilities = explanation.probabilities.tolist()
    entry: dict[str, Any] = {
        "scores": [(name, p, n == k) for n, (name, p) in enumerate(zip(explanation.labels, probabilities))],
        "truth": None if label is None else explanation.labels[label],
    }
    if explanation.image is not None:
        buffer = io.BytesIO()
        draw_patches(explanation).savefig(buffer, format="png")
        entry["image"] = base64.b64encode(buffer.getvalue()).decode()
    if explanation.spans:
        entry["words"] = _coloured_words(explanation)
        entry["rest"] = explanation.text[explanation.spans[-1][1] :]
    if explanation.tokens is not None:
        credits = explanation.against_others(explanation.by_token_and_layer())[..., k]
        most = float(credits.abs().max())
        entry["tokens"] = explanation.tokens
        entry["rows"] = [
            (layer, [(credit, _colour(credit, most)) for credit in column])
            for layer, column in zip(explanation.layers, credits.T.tolist())
        ]
    return entry


def _coloured_words(explanation: Explanation) -> list[tuple[str, str, float, str]]:
    """Per word of a text what stands before it, itself, its credit for the predicted class, and the colour of that."""
    words = explanation.by_word() if explanation.spans else []
    credits = [float(explanation.against_others(word.credit)[explanation.predicted]) for word in words]
    most = max(map(abs, credits), default=0.0)
    ends = [0, *(word.end for word in words)]
    return [
        (explanation.text[end : word.start], word.text, credit, _colour(credit, most))
        for end, word, credit in zip(ends, words, credits)
    ]


def _colour(credit: float, most: float) -> str:
    red, green, blue = BLUE if credit > 0 else RED
    return f"rgba({red},{green},{blue},{0.7 * abs(credit) / (most or 1.0):.3f})"  # pale enough to read what is on it
