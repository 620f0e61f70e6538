"""Pictures of explanations: tokens by layers, patches over an image, layers, parts; and deletion curves.

The colours of one explanation are in proportion to its credits, and `colour_strength` says how strong they are: an
unsure prediction looks paler than a sure one. No side of a picture is longer than `MOST_INCHES`: of many tokens, layers
or classes some are named.
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

PALETTE = "RdBu"  # red is against the class, blue is for it: told apart by those who see no green
BLUE, RED = "#2166ac", "#b2182b"
# Logits by which a prediction in full colours is ahead of the next class: a probability of 0.95 against 0.05. It is an
# absolute scale of predictions, not of credits, which are small (0.01 to 0.3 logits a word), smaller in longer texts,
# and often larger where the prediction is close: by credits alone a guess would look surer.
FULL_COLOUR = 3.0
PALEST = 0.15  # of a full colour, where two classes are equal: pale, and not gone
MOST_INCHES = 16.0  # 2,400 pixels; Agg draws at most 65,535, and few screens have more
INCHES_A_NAME = 0.34  # between the names of tokens, which are slanted
INCHES_A_ROW = 0.24  # of a layer or class
MOST_CHARACTERS = 24  # of a name in a picture
GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # of Pillow: one number a pixel, its brightness


def new_figure(width: float, height: float, dpi: int = 150) -> Figure:
    """Return an empty figure of a width and height in inches, at most `MOST_INCHES` each; none of pyplot's.

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
    """Return the classes that are predicted: of a multi-label model all above 0.5, the most probable one first.

    Where no label is above 0.5 the most probable one is shown, as that of a model with one class an input.
    """
    shown = explanation.predicted_classes or (explanation.predicted,)
    return sorted(shown, key=lambda k: -float(explanation.probabilities[k]))


def colour_strength(explanation: Explanation, target: int) -> float:
    """Return how strong the colours for a class are, from `PALEST` to 1 for a full colour.

    It is the distance in logits from the next class, or of a multi-label model from 0.5, as a fraction of
    `FULL_COLOUR`: 0.15 at a probability of 0.54 against 0.46, 0.37 at 0.75, 1 from 0.95.
    """
    logits = explanation.logits
    others = logits.new_zeros(1) if explanation.is_multi_label else torch.cat([logits[:target], logits[target + 1 :]])
    if not len(others):
        return 1.0  # one class alone
    return min(1.0, max(PALEST, abs(float(logits[target] - others.max())) / FULL_COLOUR))


def has_patches(explanation: Explanation) -> bool:
    """Return whether the credits of an image make a grid of patches."""
    try:
        explanation.by_patch()
    except ValueError:
        return False
    return True


def draw_explanation(explanation: Explanation, target: int | None = None) -> Figure:
    """Draw an explanation: patches over an image, tokens by layers, or layers where tokens make no such picture.

    Args:
        explanation: of a text, image or audio.
        target: the class. Default: the one that is predicted.

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

    All tokens are drawn. Where there is no room for all names, every second one has its name, or every third, and so
    on, and the picture says how many.

    Args:
        explanation: of a text, or of anything whose hidden states have the same tokens, such as audio.
        target: the class. Default: the one that is predicted.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If hidden states differ in tokens.
    """
    k = explanation.predicted if target is None else target
    credits = explanation.against_others(explanation.by_token_and_layer())[..., k].numpy()
    n_tokens, n_layers = credits.shape
    figure = new_figure(max(5.0, 2.2 + INCHES_A_NAME * n_tokens), 2.8 + INCHES_A_ROW * n_layers)
    sums, heat = figure.subplots(2, 1, sharex=True, height_ratios=(1.1, INCHES_A_ROW * n_layers + 0.4))
    totals, edges = credits.sum(1), np.arange(n_tokens + 1) - 0.5
    for part, colour in ((totals.clip(min=0), BLUE), (totals.clip(max=0), RED)):
        sums.stairs(part, edges, fill=True, color=colour, alpha=colour_strength(explanation, k))
    sums.axhline(0, color="black", linewidth=0.8)
    sums.set_ylabel("all layers")
    image = heat.imshow(credits.T, **_colours(credits, explanation, k), aspect="auto", origin="lower")
    if explanation.tokens:
        _name_tokens(heat, explanation.tokens, int((figure.get_size_inches()[0] - 2.2) / INCHES_A_NAME))
    else:
        heat.set_xlabel("position")
    _name_rows(heat, explanation.layers)
    heat.set_ylabel("layer")
    figure.colorbar(image, ax=[sums, heat], label="credit (logits)")
    _set_title(sums, explanation, k)
    return figure


def draw_patches(explanation: Explanation, target: int | None = None) -> Figure:
    """Draw an image, and the credits of its patches over it.

    Args:
        explanation: of an image.
        target: the class. Default: the one that is predicted.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no image, or its tokens make no grid.
    """
    k = explanation.predicted if target is None else target
    credits = explanation.against_others(explanation.by_patch())[..., k].numpy()
    figure = new_figure(8.0, 3.8)
    plain, over = figure.subplots(1, 2)
    image = _as_pixels(explanation.image)
    extent = (0, credits.shape[1], credits.shape[0], 0)  # image and patches in one unit, whatever was cropped
    for axes in (plain, over):
        axes.imshow(image, extent=extent, cmap="gray", aspect="equal")
        axes.axis("off")
    drawn = over.imshow(credits, **_colours(credits, explanation, k), alpha=0.6, extent=extent)
    figure.colorbar(drawn, ax=over, label="credit (logits)")
    plain.set_title("image")
    _set_title(over, explanation, k)
    return figure


def draw_layers(explanation: Explanation, target: int | None = None) -> Figure:
    """Draw the credits of layers, all tokens together, beside the image if there is one.

    It serves backbones whose tokens differ from layer to layer, or make no grid.

    Args:
        explanation: of a text, image or audio.
        target: the class. Default: the one that is predicted.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    k = explanation.predicted if target is None else target
    credits = explanation.against_others(explanation.by_layer())[..., k].numpy()
    figure = new_figure(8.0, max(3.8, 1.4 + INCHES_A_ROW * len(credits)))
    *plain, axes = figure.subplots(1, 1 if explanation.image is None else 2, squeeze=False)[0]
    for beside in plain:
        beside.imshow(_as_pixels(explanation.image), cmap="gray")
        beside.axis("off")
        beside.set_title("image")
    colours = [BLUE if credit > 0 else RED for credit in credits]
    axes.barh(range(len(credits)), credits, color=colours, alpha=colour_strength(explanation, k))
    axes.axvline(0, color="black", linewidth=0.8)
    _name_rows(axes, explanation.layers)
    axes.set_ylabel("layer")
    axes.set_xlabel("credit (logits)")
    _set_title(axes, explanation, k)
    return figure


def _colours(credits: NDArray, explanation: Explanation, target: int) -> dict[str, Any]:
    """Return how a heat map of credits for a class is coloured."""
    most = (float(np.abs(credits).max(initial=0.0)) or 1.0) / colour_strength(explanation, target)
    return {"cmap": PALETTE, "vmin": -most, "vmax": most}


def _set_title(axes: Axes, explanation: Explanation, target: int) -> None:
    """Say for what the credits are, in lines that are no longer than the axes."""
    names, style = _drawable(explanation.labels, "class ", [target])
    against = "" if explanation.is_multi_label or len(explanation.labels) == 1 else ", against the others"
    title = f"For {names[0]}{against}; probability {float(explanation.probabilities[target]):.2f}"
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
    """Name the rows of a picture, as many as there is room for."""
    ticks = range(0, len(names), math.ceil(len(names) * INCHES_A_ROW / MOST_INCHES))
    shown, style = _drawable([str(name) for name in names], "class ", ticks)
    axes.set_yticks(ticks, shown, **style)


def _drawable(names: Sequence[str], prefix: str, numbers: Sequence[int]) -> tuple[list[str], dict[str, Any]]:
    """Return some names as they can be drawn, and how to draw them.

    Args:
        names: names of tokens or classes.
        prefix: what stands before the number of a name that no installed font can draw.
        numbers: the indices of the names that are wanted.
    """
    shown = ["".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in names[n]) for n in numbers]
    shown = [name if len(name) <= MOST_CHARACTERS else f"{name[: MOST_CHARACTERS - 1]}…" for name in shown]
    families, missing = _fonts(frozenset("".join(shown)))
    drawn = [f"{prefix}{n}" if missing.intersection(name) else name for n, name in zip(numbers, shown)]
    return drawn, {"fontfamily": list(families), "parse_math": False}  # a dollar sign is one


@functools.lru_cache(maxsize=64)
def _fonts(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return families of installed fonts that have the characters, matplotlib's own first, and those that none has."""
    from matplotlib import font_manager

    own = font_manager.FontProperties()
    missing = characters - _characters(font_manager.findfont(own))
    families = list(own.get_family())
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: font.name):
        # The font of last resort has a box for each character.
        if missing and font.style == "normal" and font.weight == 400 and not font.name.startswith("Last Resort"):
            found = missing & _characters(font.fname)
            missing -= found
            families += [font.name] if found else []
    return tuple(families), missing


def _characters(font: str) -> frozenset[str]:
    """Return the characters of the font in a file; none of one that is gone since matplotlib listed it."""
    from matplotlib import font_manager

    try:
        return frozenset(map(chr, font_manager.get_font(font).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()


def _as_pixels(image: Any) -> NDArray:
    """Return an image of any kind as `[rows, columns]` or `[rows, columns, colours]`."""
    mode = getattr(image, "mode", None)  # of Pillow, whose palettes and inks are no colours yet
    if isinstance(mode, str) and mode not in GREY_MODES:
        image = image.convert("RGB")
    pixels = np.asarray(image)
    pixels = np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 and pixels.shape[0] in COLOUR_CHANNELS else pixels
    if pixels.dtype == np.uint8 or pixels.ndim < 3 or (pixels.min() >= 0 and pixels.max() <= 1):
        return pixels
    least, most = float(pixels.min()), float(pixels.max())
    return (pixels - least) / (most - least or 1.0)  # such as 16 bits: matplotlib would clip them


def draw_parts(explanations: Sequence[Explanation]) -> Figure:
    """Draw what each part is used for: its mean credit for each class, over some explanations of one model.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no explanation.
    """
    if not explanations:
        raise ValueError("There is nothing to draw; expected at least one explanation.")
    credits = np.mean([explanation.parts.numpy() for explanation in explanations], axis=0)  # [parts, classes]
    labels = explanations[0].labels
    credits = credits[np.argsort(credits[:, -1] - credits[:, 0])]
    most = float(np.abs(credits).max()) or 1.0
    figure = new_figure(10.0, 1.4 + INCHES_A_ROW * len(labels))
    axes = figure.subplots()
    image = axes.imshow(credits.T, cmap=PALETTE, vmin=-most, vmax=most, aspect="auto")
    _name_rows(axes, labels)
    (last, first), style = _drawable(labels, "class ", [len(labels) - 1, 0])
    axes.set_xlabel(f"parts, in order of what they say of {last} less {first}", **style)
    of = "Credit of parts" if len(explanations) == 1 else f"Mean credit of parts over {len(explanations)} inputs"
    axes.set_title(f"{of}; those of a class add up to its score")
    figure.colorbar(image, ax=axes, label="credit (logits)")
    return figure


def draw_deletion(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Draw deletion curves: the mean probability of what was predicted, as more and more tokens are removed.

    Args:
        curves: by method, `[len(DELETED)]`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = new_figure(7.0, 4.4)
    axes = figure.subplots()
    styles = ("-", "--", "-.", ":")
    for n, (name, curve) in enumerate(curves.items()):
        width = 2.4 if n == 0 else 1.4
        axes.plot([100 * fraction for fraction in DELETED], curve, styles[n % len(styles)], label=name, linewidth=width)
    axes.set_xlabel("tokens removed, those named first before others (%)")
    axes.set_ylabel("mean probability of the predicted class")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    return figure
