"""Explanations as one page of HTML that needs no network and no other files, and one prediction as a part of a page.

A page stays small whatever it shows. Of many classes, words or tokens it shows those that matter most, and says how
many.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch

from ..data.tables import count_of
from ..models.configuration_capsule_head import DEFAULT_THRESHOLD
from .attributions import Explanation
from .parts import PartDescriptions, summarize_parts
from .pictures import (
    BLUE,
    RED,
    SCALE_TICKS,
    draw_explanation,
    lead_of,
    lead_per_credit,
    percent,
    shade,
    shown_classes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLASSES = 10  # most classes with a probability, or, for a multi-label model, with a coloured text
MOST_WORDS = 1000  # most words that are coloured
MOST_TOKENS = 100  # most columns of a table
MOST_CHARACTERS = 40  # of a token in a table
SURE, UNSURE = 0.9, 0.6  # a prediction is sure from the first probability on, and unsure below the second

Truth = frozenset[int] | None  # the true classes of an input; None if they are unknown


def render_report(
    explanations: Sequence[Explanation],
    labels: Sequence[Any] | None = None,
    title: str = "Explanations",
    parts: PartDescriptions | None = None,
) -> str:
    """Return a page that shows coloured texts, patches over images, or positions by layers of audio.

    Colours have one scale for all pages, see `pictures.lead_per_credit`.

    Args:
        explanations: explanations of texts, images or audio.
        labels: the true class of each input, as a number of Python, NumPy, torch or pandas. A multi-label model takes a
            0 or 1 for each class. None, NaN or -1 means unknown. With labels, wrong predictions come first, the most
            confident one at the top. Right predictions follow, the least confident one first. Without labels the order
            is as given.
        title: the page's title.
        parts: descriptions of the head's parts, as `describe_parts` found them over other inputs; by default they are
            found over these explanations.

    Raises:
        ValueError: If there are not as many labels as explanations, or a label is not a class.
        ImportError: If images or audio are explained, and matplotlib is not installed.
    """
    truths = _read_labels(labels, explanations)
    pairs = list(zip(explanations, truths))
    unknown = [pair for pair in pairs if pair[1] is None]
    known = sorted((pair for pair in pairs if pair[1] is not None), key=lambda pair: _confidence(pair[0]))
    wrong = [pair for pair in known if frozenset(pair[0].predicted_classes) != pair[1]]
    right = [pair for pair in known if frozenset(pair[0].predicted_classes) == pair[1]]
    sections = [
        ("Not labelled" if known else "", unknown),
        ("Wrong, the most confident first", wrong[::-1]),
        ("Right, the least confident first", right),
    ]
    parts = summarize_parts(explanations) if parts is None else parts
    entries = [(heading, [_entry(*pair, parts) for pair in members]) for heading, members in sections]
    page = _environment().get_template("report.html")
    return page.render(title=title, sections=entries, parts=_with_words(parts)).lstrip()


def render_explanation(explanation: Explanation, parts: PartDescriptions | None = None) -> str:
    """Return one prediction as HTML to put into a page: probabilities, text in colours, parts, a picture, and a legend.

    Args:
        explanation: explanation of a text, an image or audio.
        parts: descriptions of the head's parts; by default no parts are shown.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    entry = _entry(explanation, None, parts)
    for k, view in zip(shown_classes(explanation), entry["views"]):
        if "picture" not in view:
            view["picture"] = _as_base64(draw_explanation(explanation, k))
    return _render_part(entry, with_legend=True)


def render_scores(
    labels: Sequence[str],
    scores: Sequence[float],
    problem_type: str | None,
    note: str,
    thresholds: Sequence[float] | None = None,
) -> str:
    """Return a prediction without credits as HTML to put into a page.

    Args:
        labels: names of the classes, or of the values of a regression.
        scores: probabilities of the classes, or the values.
        problem_type: problem type as in the model's configuration.
        note: a sentence below the scores.
        thresholds: for each class, the probability above which a multi-label model predicts it; None for 0.5.
    """
    if problem_type == "regression":
        verdict = [(name, f"{value:.4g}", "", "") for name, value in zip(labels, scores)]
        return _render_part({"verdict": verdict, "truth": None, "notes": [note]})
    order = sorted(range(len(labels)), key=lambda k: -scores[k])
    predicted = order[:1]
    if problem_type == "multi_label_classification":
        thresholds = thresholds or [DEFAULT_THRESHOLD] * len(labels)
        predicted = [k for k in order if scores[k] > thresholds[k]]
    entry = _probabilities(labels, scores, predicted, None)
    return _render_part({**entry, "notes": [*entry["notes"], note]})


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["scale"] = [(_colour(share), f"{share:+g}") for share in SCALE_TICKS]
    return environment


def _render_part(entry: dict[str, Any], with_legend: bool = False) -> str:
    parts: Any = _environment().get_template("explanation.html").module
    return str(parts.style() + parts.show(entry) + (parts.legend() if with_legend else ""))


# True classes


def _read_labels(labels: Any, explanations: Sequence[Explanation]) -> list[Truth]:
    """Return the true classes of each explanation."""
    if labels is None:
        return [None] * len(explanations)
    labels = labels.to_numpy() if hasattr(labels, "to_numpy") else labels  # from pandas
    labels = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if len(labels) != len(explanations):
        n_labels, n_explanations = count_of(len(labels), "label"), count_of(len(explanations), "explanation")
        raise ValueError(f"labels has {n_labels} for {n_explanations}; expected one label for each explanation.")
    return [_read_label(n, *pair) for n, pair in enumerate(zip(labels, explanations))]


def _read_label(n: int, label: Any, explanation: Explanation) -> Truth:
    import pandas

    label = label.tolist() if hasattr(label, "tolist") else label
    n_classes = len(explanation.labels)
    if explanation.is_multi_label and isinstance(label, list | tuple):
        if all(_is_unknown(x, pandas.isna) for x in label):
            return None
        if len(label) == n_classes and all(x in (0, 1) for x in label):
            return frozenset(k for k, x in enumerate(label) if x)
    elif not isinstance(label, list | tuple | str):
        if _is_unknown(label, pandas.isna):
            return None
        if not explanation.is_multi_label and label in range(n_classes):
            return frozenset([int(label)])
    expected = f"{n_classes} numbers, 0 or 1" if explanation.is_multi_label else f"a class from 0 to {n_classes - 1}"
    raise ValueError(f"labels[{n}] is {label!r}; expected {expected}, or None if the class is unknown.")


def _is_unknown(label: Any, isna: Any) -> bool:
    return bool(isna(label)) or label == -1


def _confidence(explanation: Explanation) -> float:
    """Return the probability of the prediction; for a multi-label model, of its least sure decision."""
    p = explanation.probabilities
    return float(torch.maximum(p, 1 - p).min() if explanation.is_multi_label else p[explanation.predicted])


# Contents of the template


def _entry(explanation: Explanation, truth: Truth, parts: PartDescriptions | None = None) -> dict[str, Any]:
    """Return the template's contents for one explanation."""
    predicted, shown = explanation.predicted_classes, shown_classes(explanation)
    entry = _probabilities(
        explanation.labels, explanation.probabilities.tolist(), [k for k in shown if k in predicted], truth
    )
    if explanation.n_cut:
        more = "1 more token was" if explanation.n_cut == 1 else f"{explanation.n_cut:,} more tokens were"
        entry["notes"].append(f"{more} cut off: the text is longer than the model takes, and the rest was not read.")
    if len(shown) > MOST_CLASSES:
        entry["notes"].append(f"Credits are shown for {MOST_CLASSES} of {len(shown)} labels, the most probable ones.")
    entry["views"] = [_view(explanation, k, parts) for k in shown[:MOST_CLASSES]]
    return entry


def _probabilities(
    labels: Sequence[str], probabilities: Sequence[float], predicted: Sequence[int], truth: Truth
) -> dict[str, Any]:
    """Return the template's contents for probabilities: the prediction, whether it is true, and the highest ones."""
    marks = {k: "" if truth is None else "✓ right" if k in truth else "✗ wrong" for k in predicted}
    verdict = [(labels[k], percent(probabilities[k]), mark, _sureness(probabilities[k])) for k, mark in marks.items()]
    order: Sequence[int] = range(len(labels))
    if len(labels) > MOST_CLASSES:
        order = sorted(order, key=lambda k: -probabilities[k])[: max(MOST_CLASSES, len(predicted))]
    rest = len(labels) - len(order)
    return {
        "verdict": verdict or [("no label", "above its threshold", "", "")],
        "truth": None if truth is None else ", ".join(labels[k] for k in sorted(truth)) or "no label",
        "scores": [(labels[k], probabilities[k], k in marks) for k in order],
        "notes": [f"{rest:,} more classes are less probable."] if rest else [],
    }


def _sureness(probability: float) -> str:
    return "sure" if probability >= SURE else "unsure" if probability < UNSURE else "likely"


def _view(explanation: Explanation, target: int, parts: PartDescriptions | None) -> dict[str, Any]:
    """Return the template's contents for the credits of a class."""
    view: dict[str, Any] = {
        "heading": explanation.labels[target] if explanation.is_multi_label else "",
        "lead": _describe_lead(explanation, target),
        "notes": [],
        "alt": "picture of the credits",
        "is_wide": explanation.image is None,
        "parts": [] if parts is None else list(_parts(explanation, target, parts)),
    }
    if view["parts"] and explanation.linear is not None:
        view["linear_credit"] = float(explanation.against_others(explanation.linear)[target])
    if view["parts"] and parts is not None:
        view["n_inputs"], view["n_parts"] = parts.n_inputs, len(explanation.parts)
    if explanation.text is not None:
        view["text"] = list(_segments(explanation, target))
    n_words = len(explanation.spans)
    if n_words > MOST_WORDS:
        view["notes"].append(f"{MOST_WORDS:,} of {n_words:,} words are coloured, those with the largest shares.")
    if explanation.tokens is None or not explanation.is_uniform:
        view["picture"] = _as_base64(draw_explanation(explanation, target))
        return view
    shares = explanation.against_others(explanation.by_token_and_layer())[..., target]  # [tokens, layers]
    shares = shares * lead_per_credit(explanation, target)
    columns = shares.abs().amax(1).topk(min(MOST_TOKENS, len(shares))).indices.sort().values
    names = ((n, explanation.tokens[n]) for n in columns.tolist())
    view["tokens"] = [(n, x if len(x) <= MOST_CHARACTERS else f"{x[: MOST_CHARACTERS - 1]}…") for n, x in names]
    view["table"] = "Tokens by layer"
    if len(columns) < len(shares):
        view["table"] += f": {len(columns)} of {len(shares):,}, those with the largest shares"
    view["rows"] = [
        (layer, [(share, _colour(share)) for share in row])
        for layer, row in zip(explanation.layers, shares[columns].T.tolist())
    ]
    return view


def _describe_lead(explanation: Explanation, target: int) -> str:
    """Return a sentence about the lead of a class."""
    lead, name = lead_of(explanation, target), explanation.labels[target]
    if explanation.is_multi_label or len(explanation.labels) == 1:
        side = "above" if explanation.logits[target] >= 0 else "below"
        return f"The probability of {name} is {side} 0.5, with a lead of {lead:.2f} logits."
    rest = explanation.logits.clone()
    rest[target] = -torch.inf
    return f"The lead of {name} over {explanation.labels[int(rest.argmax())]} is {lead:.2f} logits."


def _parts(explanation: Explanation, target: int, parts: PartDescriptions) -> Iterator[dict[str, Any]]:
    """Yield the parts of a class that have words: these words, whether the text has them, and the part's credit."""
    own = {word.text.casefold() for word in explanation.by_word()} if explanation.spans else set()
    credits = explanation.against_others(explanation.parts)[:, target].tolist()
    for part in parts.classes.get(explanation.labels[target], ()):
        if part.words and part.number < len(credits):
            words = [(word.text, word.n_inputs, word.text in own) for word in part.words]
            yield {"words": words, "credit": credits[part.number], "number": part.number}


def _with_words(parts: PartDescriptions) -> PartDescriptions:
    """Return the classes and parts that have words."""
    found = {label: tuple(part for part in of_class if part.words) for label, of_class in parts.classes.items()}
    return PartDescriptions(parts.n_inputs, {label: of_class for label, of_class in found.items() if of_class})


def _as_base64(figure: Figure) -> str:
    """Encode a picture for the page as WebP; with a photograph it has a tenth of the size of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", pil_kwargs={"quality": 85})
    return base64.b64encode(buffer.getvalue()).decode()


def _segments(explanation: Explanation, target: int) -> Iterator[tuple[str, str, float, str]]:
    """Yield segments of a text: kind ("word", "plain", "cut" or "pair"), text, and a word's share and colour."""
    text, end = explanation.text or "", 0
    words = explanation.by_word() if explanation.spans else []
    is_cut = explanation.n_cut > 0 and bool(words)  # without words the place of the cut is unknown
    shares = torch.zeros(0)
    if words:
        shares = explanation.against_others(torch.stack([word.credit for word in words]))[:, target]
        shares = shares * lead_per_credit(explanation, target)
    coloured = set(shares.abs().topk(min(MOST_WORDS, len(words))).indices.tolist())
    for n, (word, share) in enumerate(zip(words, shares.tolist())):
        yield from _between(text[end : word.start], is_cut)
        yield ("word", word.text, share, _colour(share)) if n in coloured else ("plain", word.text, 0.0, "")
        end = word.end
    yield from _between(text[end:], is_cut)


def _between(gap: str, is_cut: bool) -> Iterator[tuple[str, str, float, str]]:
    """Yield the segments between words: plain text, the tab between the texts of a pair, and text that was cut off."""
    for n, piece in enumerate(gap.split("\t")):
        if n:
            yield "pair", "", 0.0, ""
        if piece:
            yield "cut" if is_cut and piece.strip() else "plain", piece, 0.0, ""


def _colour(share: float) -> str:
    red, green, blue = bytes.fromhex((BLUE if share > 0 else RED).removeprefix("#"))
    return f"rgba({red},{green},{blue},{0.7 * shade(share):.3f})"  # pale enough to read the text on it
