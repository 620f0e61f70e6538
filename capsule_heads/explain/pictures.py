"""Pictures of explanations: tokens by layers, patches over an image, layers, parts, and deletion curves.

Colours have one absolute scale (see `lead_per_credit`), so an unsure prediction looks paler than a sure one. No side of
a picture is longer than `MOST_INCHES`. If there are many tokens, layers or classes, only some have their names.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .attributions import COLOUR_CHANNELS, Explanation
from .faithfulness import DELETED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

PALETTE = "RdBu"  # red is against the class, blue is for it; people who cannot see green can tell them apart
BLUE, RED = "#2166ac", "#b2182b"
FULL_COLOUR = 1.0  # share of the lead with the strongest colour, in logits
SCALE = "share of the lead (logits)"
SCALE_TICKS = (-1.0, -0.3, -0.1, -0.03, 0.03, 0.1, 0.3, 1.0)  # up to a full colour
MOST_INCHES = 16.0  # 2,400 pixels; few screens have more, and Agg draws at most 65,535
INCHES_A_NAME = 0.34  # between the names of tokens, which are slanted
INCHES_WITHOUT_NAMES = 9.0  # width of a picture of audio
INCHES_A_ROW = 0.24  # height of a layer or class
MOST_CHARACTERS = 24  # of a name in a picture
GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes with one number per pixel


def new_figure(width: float, height: float, dpi: int = 150) -> Figure:
    """Return an empty figure of a width and height in inches, at most `MOST_INCHES` each, without pyplot.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Drawing needs matplotlib: pip install "capsule-heads[pictures]".') from error
    figure = Figure(figsize=(min(width, MOST_INCHES), min(height, MOST_INCHES)), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def shown_classes(explanation: Explanation) -> list[int]:
    """Return the predicted classes, the most probable one first; a multi-label model may predict several.

    If no label is above its threshold, the most probable one is shown.
    """
    shown = explanation.predicted_classes or (explanation.predicted,)
    return sorted(shown, key=lambda k: -float(explanation.probabilities[k]))


def lead_of(explanation: Explanation, target: int) -> float:
    """Return the distance of a class to the next one, in logits; to a probability of 0.5 for a multi-label model."""
    logits = explanation.logits
    if explanation.is_multi_label or len(logits) == 1:
        return abs(float(logits[target]))
    return abs(float(logits[target] - torch.cat([logits[:target], logits[target + 1 :]]).max()))


def lead_per_credit(explanation: Explanation, target: int) -> float:
    """Return the factor from credits for a class to the numbers that a page and a picture show.

    These numbers divide the lead of a class among tokens, in logits, in proportion to their credits. Their absolute
    values add up to the lead. Credits themselves do not suit as a scale of colours. They are often larger where a
    prediction is close, so a guess would look surer than a sure prediction.
    """
    credits = explanation.by_token() if explanation.is_uniform else torch.cat(explanation.credits)
    total = float(explanation.against_others(credits)[:, target].abs().sum())
    return lead_of(explanation, target) / (total or 1.0)


def shade(share: float) -> float:
    """Return the strength of the colour for a share of the lead, from 0 to 1.

    It is a square root, as the words of a long text have shares of hundredths of a logit.
    """
    return min(1.0, math.sqrt(abs(share) / FULL_COLOUR))


def percent(probability: float) -> str:
    """Return a probability in percent, never rounded to 100% or 0%."""
    if 0.995 <= probability < 1:
        return ">99%"
    return "<1%" if 0 < probability < 0.005 else f"{probability:.0%}"


def has_patches(explanation: Explanation) -> bool:
    """Return whether the credits of an image form a grid of patches."""
    try:
        explanation.by_patch()
    except ValueError:
        return False
    return True


def draw_explanation(explanation: Explanation, target: int | None = None) -> Figure:
    """Draw an explanation: patches over an image, tokens by layers, or only layers if tokens do not fit.

    Args:
        explanation: explanation of a text, image or audio.
        target: the class; by default the predicted one.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if explanation.image is not None:
        draw = draw_patches if has_patches(explanation) else draw_layers
    else:
        draw = draw_tokens if explanation.is_uniform else draw_layers
    return draw(explanation, target)


def draw_tokens(explanation: Explanation, target: int | None = None) -> Figure:
    """Draw a heat map of tokens at all layers, with the sums over layers above it.

    All tokens are drawn. If there is no room for all names, every second token has its name, or every third, and so
    on. The picture says how many tokens are named.

    Args:
        explanation: explanation of a text, or of another input with the same tokens at all layers, such as audio.
        target: the class; by default the predicted one.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If hidden states differ in tokens.
    """
    k = explanation.predicted if target is None else target
    shares = _shares(explanation, explanation.by_token_and_layer(), k)
    n_tokens, n_layers = shares.shape
    width = max(5.0, 2.2 + INCHES_A_NAME * n_tokens) if explanation.tokens else INCHES_WITHOUT_NAMES
    figure = new_figure(width, 2.8 + INCHES_A_ROW * n_layers)
    sums, heat = figure.subplots(2, 1, sharex=True, height_ratios=(1.1, INCHES_A_ROW * n_layers + 0.4))
    seconds = explanation.seconds or 1.0
    totals, edges = shares.sum(1), (np.arange(n_tokens + 1) - 0.5 * (explanation.seconds is None)) * seconds
    for part, colour in ((totals.clip(min=0), BLUE), (totals.clip(max=0), RED)):
        sums.stairs(part, edges, fill=True, color=colour, alpha=shade(float(np.abs(totals).max(initial=0.0))))
    sums.axhline(0, color="black", linewidth=0.8)
    sums.set_ylabel("all layers")
    extent = (edges[0], edges[-1], -0.5, n_layers - 0.5)
    image = heat.imshow(shares.T, **_colours(), aspect="auto", origin="lower", extent=extent)
    if explanation.tokens:
        _name_tokens(heat, explanation.tokens, round((figure.get_size_inches()[0] - 2.2) / INCHES_A_NAME))
    else:
        heat.set_xlabel("position" if explanation.seconds is None else "seconds")
    _name_rows(heat, explanation.layers)
    heat.set_ylabel("layer")
    _add_scale(figure, image, [sums, heat])
    _set_title(sums, explanation, k)
    return figure


def draw_patches(explanation: Explanation, target: int | None = None) -> Figure:
    """Draw an image, and the credits of its patches over it.

    Args:
        explanation: explanation of an image.
        target: the class; by default the predicted one.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no image, or its tokens form no grid.
    """
    k = explanation.predicted if target is None else target
    shares = _shares(explanation, explanation.by_patch(), k)
    figure = new_figure(8.0, 3.8)
    plain, over = figure.subplots(1, 2)
    image = _as_pixels(explanation.image)
    extent = (0, image.shape[1], image.shape[0], 0)  # patches over the complete image, even if it was cropped
    for axes in (plain, over):
        axes.imshow(image, extent=extent, cmap="gray", aspect="equal")
        axes.axis("off")
    drawn = over.imshow(shares, **_colours(), alpha=0.6, extent=extent)
    _add_scale(figure, drawn, [over])
    plain.set_title("image")
    _set_title(over, explanation, k)
    return figure


def draw_layers(explanation: Explanation, target: int | None = None) -> Figure:
    """Draw the credits of layers, summed over tokens, beside the image if there is one.

    This is for backbones whose tokens differ from layer to layer, or form no grid.

    Args:
        explanation: explanation of a text, image or audio.
        target: the class; by default the predicted one.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    k = explanation.predicted if target is None else target
    shares = _shares(explanation, explanation.by_layer(), k)
    figure = new_figure(8.0, max(3.8, 1.4 + INCHES_A_ROW * len(shares)))
    *plain, axes = figure.subplots(1, 1 if explanation.image is None else 2, squeeze=False)[0]
    for beside in plain:
        beside.imshow(_as_pixels(explanation.image), cmap="gray")
        beside.axis("off")
        beside.set_title("image")
    colours = [(BLUE if share > 0 else RED, shade(share)) for share in shares]
    axes.barh(range(len(shares)), shares, color=colours)
    axes.axvline(0, color="black", linewidth=0.8)
    _name_rows(axes, explanation.layers)
    axes.set_ylabel("layer")
    axes.set_xlabel(SCALE)
    _set_title(axes, explanation, k)
    return figure


def _shares(explanation: Explanation, credits: torch.Tensor, target: int) -> NDArray:
    """Return credits `[..., classes]` as shares of the lead of a class, `[...]`."""
    shares: NDArray = explanation.against_others(credits)[..., target].numpy() * lead_per_credit(explanation, target)
    return shares


def _colours() -> dict[str, Any]:
    """Return the colours of a heat map of shares of the lead, which follow `shade`."""
    from matplotlib.colors import FuncNorm

    def root(x: NDArray) -> NDArray:
        return np.sign(x) * np.sqrt(np.abs(x))

    def square(x: NDArray) -> NDArray:
        return np.sign(x) * np.square(x)

    return {"cmap": PALETTE, "norm": FuncNorm((root, square), -FULL_COLOUR, FULL_COLOUR, clip=True)}


def _add_scale(figure: Figure, drawn: Any, axes: list[Axes]) -> None:
    """Add the scale of colours, the same in all pictures."""
    figure.colorbar(drawn, ax=axes, label=SCALE, ticks=SCALE_TICKS, format="%+g", extend="both")


def _set_title(axes: Axes, explanation: Explanation, target: int) -> None:
    """Write the class of the credits and its probability, in lines that are no longer than the axes."""
    names, style = _drawable(explanation.labels, "class ", [target])
    against = "" if explanation.is_multi_label or len(explanation.labels) == 1 else ", against the others"
    title = f"For {names[0]}{against}; probability {percent(float(explanation.probabilities[target]))}"
    size = axes.get_figure().get_size_inches()  # type: ignore[union-attr]  # these axes are in a figure
    inches = axes.get_position().width * size[0]
    axes.set_title("\n".join(textwrap.wrap(title, max(24, int(11 * inches)))), **style)


def _name_tokens(axes: Axes, tokens: Sequence[str], most: int) -> None:
    """Name at most `most` tokens below the columns of a heat map, evenly spaced."""
    ticks = range(0, len(tokens), math.ceil(len(tokens) / most))
    names, style = _drawable(tokens, "#", ticks)
    axes.set_xticks(ticks, names, rotation=60, ha="right", rotation_mode="anchor", **style)
    notes = [f"{len(ticks)} of {len(tokens):,} tokens are named"] if len(ticks) < len(tokens) else []
    if any(name == f"#{n}" != tokens[n] for n, name in zip(ticks, names)):
        notes.append("# is the number of a token that no installed font can draw")
    axes.set_xlabel("; ".join(notes))


def _name_rows(axes: Axes, names: Sequence[object]) -> None:
    """Name the rows of a picture, or only as many as there is room for."""
    ticks = range(0, len(names), math.ceil(len(names) * INCHES_A_ROW / MOST_INCHES))
    shown, style = _drawable([str(name) for name in names], "class ", ticks)
    axes.set_yticks(ticks, shown, **style)


def _drawable(names: Sequence[str], prefix: str, numbers: Sequence[int]) -> tuple[list[str], dict[str, Any]]:
    """Return some names in a form that can be drawn, and the options to draw them with.

    Args:
        names: names of tokens or classes.
        prefix: text before the number of a name that no installed font can draw.
        numbers: the indices of the names to return.
    """
    shown = ["".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in names[n]) for n in numbers]
    shown = [name if len(name) <= MOST_CHARACTERS else f"{name[: MOST_CHARACTERS - 1]}…" for name in shown]
    families, missing = _fonts(frozenset("".join(shown)))
    drawn = [f"{prefix}{n}" if missing.intersection(name) else name for n, name in zip(numbers, shown)]
    return drawn, {"fontfamily": list(families), "parse_math": False}  # dollar signs do not mark formulas


@functools.lru_cache(maxsize=64)
def _fonts(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return installed fonts that have the characters, matplotlib's own first, and characters that no font has."""
    from matplotlib import font_manager

    own = font_manager.FontProperties()
    missing = characters - _characters(font_manager.findfont(own))
    families = list(own.get_family())
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: font.name):
        # The font "Last Resort" has a box for each character.
        if missing and font.style == "normal" and font.weight == 400 and not font.name.startswith("Last Resort"):
            found = missing & _characters(font.fname)
            missing -= found
            families += [font.name] if found else []
    return tuple(families), missing


def _characters(font: str) -> frozenset[str]:
    """Return the characters of the font in a file; empty if the file is gone since matplotlib listed it."""
    from matplotlib import font_manager

    try:
        return frozenset(map(chr, font_manager.get_font(font).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()


def _as_pixels(image: Any) -> NDArray:
    """Return an image of any kind as `[rows, columns]` or `[rows, columns, colours]`."""
    mode = getattr(image, "mode", None)  # an image of Pillow, whose palettes and inks are not colours yet
    if isinstance(mode, str) and mode not in GREY_MODES:
        image = image.convert("RGB")
    pixels = np.asarray(image)
    pixels = np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 and pixels.shape[0] in COLOUR_CHANNELS else pixels
    if pixels.dtype == np.uint8 or pixels.ndim < 3 or (pixels.min() >= 0 and pixels.max() <= 1):
        return pixels
    least, most = float(pixels.min()), float(pixels.max())
    return (pixels - least) / (most - least or 1.0)  # matplotlib would clip images of 16 bits, for example


def draw_parts(explanations: Sequence[Explanation]) -> Figure:
    """Draw the mean credit of each part for each class, over some explanations of one model.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no explanation, or the model has no parts.
    """
    if not explanations:
        raise ValueError("There is nothing to draw; expected at least one explanation.")
    if not len(explanations[0].parts):
        raise ValueError("There are no parts to draw; expected explanations of a model whose head has capsules.")
    credits = np.mean([explanation.parts.numpy() for explanation in explanations], axis=0)  # [parts, classes]
    labels = explanations[0].labels
    credits = credits[np.argsort(credits[:, -1] - credits[:, 0])]
    most = float(np.abs(credits).max()) or 1.0
    figure = new_figure(10.0, 1.4 + INCHES_A_ROW * len(labels))
    axes = figure.subplots()
    image = axes.imshow(credits.T, cmap=PALETTE, vmin=-most, vmax=most, aspect="auto")
    _name_rows(axes, labels)
    (last, first), style = _drawable(labels, "class ", [len(labels) - 1, 0])
    axes.set_xlabel(f"parts, ordered by their credit for {last} less {first}", **style)
    of = "Credit of parts" if len(explanations) == 1 else f"Mean credit of parts over {len(explanations)} inputs"
    axes.set_title(f"{of}; the credits for a class add up to its score")
    figure.colorbar(image, ax=axes, label="credit (logits)")
    return figure


def draw_deletion(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Draw deletion curves: the mean probability of the predicted class, as more and more tokens are removed.

    Args:
        curves: by method, `[len(DELETED)]`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = new_figure(9.6, 4.4)
    axes = figure.subplots()
    styles = ("-", "--", "-.", ":")
    for n, (name, curve) in enumerate(curves.items()):
        width = 2.4 if n == 0 else 1.4
        axes.plot([100 * fraction for fraction in DELETED], curve, styles[n % len(styles)], label=name, linewidth=width)
    axes.set_xlabel("tokens removed, the highest-ranked first (%)")
    axes.set_ylabel("mean probability of the predicted class")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)  # beside the curves, which fill the axes
    return figure
