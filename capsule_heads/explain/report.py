"""Explanations as one page of HTML, which needs no network and no other files."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from .attributions import Explanation
from .pictures import draw_patches, draw_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, RED = (33, 102, 172), (178, 24, 43)


def render_report(
    explanations: Sequence[Explanation], labels: Sequence[int | None] | None = None, title: str = "Explanations"
) -> str:
    """Return a page with coloured texts, patches over images, or positions by layers of audio, of each explanation.

    Args:
        explanations: of texts, images or audio.
        labels: the true class of each, if known: wrong predictions then come first, the most confident one at the top,
            and right ones after them, the least confident one first. Without labels the order is as given.
        title: the page's title.

    Raises:
        ValueError: If there are not as many labels as explanations.
        ImportError: If something else than texts is explained, and matplotlib is not installed.
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
    """Return a text as HTML, its words coloured by their credits for the predicted class; empty without words."""
    spans = [
        f'{html.escape(before)}<span style="background:{colour}" title="{credit:+.3f}">{html.escape(word)}</span>'
        for before, word, credit, colour in _coloured_words(explanation)
    ]
    return f'<p style="font-size:1.15rem;line-height:2">{"".join(spans)}</p>' if spans else ""


def _confidence(pair: tuple[Explanation, int | None]) -> float:
    return float(pair[0].probabilities[pair[0].predicted])


def _entry(explanation: Explanation, label: int | None) -> dict[str, Any]:
    """Return what the template shows of one explanation."""
    k = explanation.predicted
    probabilities = explanation.probabilities.tolist()
    entry: dict[str, Any] = {
        "scores": [(name, p, n == k) for n, (name, p) in enumerate(zip(explanation.labels, probabilities))],
        "truth": None if label is None else explanation.labels[label],
    }
    if explanation.image is not None:
        entry["picture"], entry["alt"] = _as_png(draw_patches(explanation)), "the image, and the credits of its patches"
    elif explanation.text is None and explanation.is_uniform:
        entry["picture"], entry["alt"] = _as_png(draw_tokens(explanation)), "credits of positions by layers"
    if explanation.spans and explanation.text is not None:
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


def _as_png(figure: Figure) -> str:
    """Return a picture in base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _coloured_words(explanation: Explanation) -> list[tuple[str, str, float, str]]:
    """Return for each word of a text what stands before it, itself, its credit for the predicted class, its colour."""
    text = explanation.text or ""
    words = explanation.by_word() if explanation.spans else []
    credits = [float(explanation.against_others(word.credit)[explanation.predicted]) for word in words]
    most = max(map(abs, credits), default=0.0)
    ends = [0, *(word.end for word in words)]
    return [
        (text[end : word.start], word.text, credit, _colour(credit, most))
        for end, word, credit in zip(ends, words, credits)
    ]


def _colour(credit: float, most: float) -> str:
    red, green, blue = BLUE if credit > 0 else RED
    return f"rgba({red},{green},{blue},{0.7 * abs(credit) / (most or 1.0):.3f})"  # pale enough to read what is on it
