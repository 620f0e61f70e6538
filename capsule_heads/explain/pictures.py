"""Pictures of explanations: tokens by layers, patches over an image, layers, parts; and deletion curves.

Colours have one absolute scale, see `lead_per_credit`: an unsure prediction looks paler than a sure one. No side of a
picture is longer than `MOST_INCHES`: of many tokens, layers or classes some are named.
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
FULL_COLOUR = 1.0  # logits of the lead
SCALE = "share of the lead (logits)"
SCALE_TICKS = (-1.0, -0.3, -0.1, -0.03, 0.03, 0.1, 0.3, 1.0)  # up to a full colour
MOST_INCHES = 16.0  # 2,400 pixels; Agg draws at most 65,535, and few screens have more
INCHES_A_NAME = 0.34  # between the names of tokens, which are slanted
INCHES_WITHOUT_NAMES = 9.0  # of audio
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
    """Return the classes that are predicted, the most probable one first; of a multi-label model there may be several.

    Where no label is above its threshold the most probable one is shown, as that of a model with one class an input.
    """
    shown = explanation.predicted_classes or (explanation.predicted,)
    return sorted(shown, key=lambda k: -float(explanation.probabilities[k]))


def lead_of(explanation: Explanation, target: int) -> float:
    """Return how far a class is from the next one, in logits; of a multi-label model from a probability of 0.5."""
    logits = explanation.logits
    if explanation.is_multi_label or len(logits) == 1:
        return abs(float(logits[target]))
    return abs(float(logits[target] - torch.cat([logits[:target], logits[target + 1 :]]).max()))


def lead_per_credit(explanation: Explanation, target: int) -> float:
    """Return what credits for a class are multiplied by, to be what a page and a picture show.

    They show how the lead of a class is divided among tokens, in logits, in proportion to their credits: without their
    signs these numbers add up to the lead. Credits themselves are no scale of colours: they are often larger where a
    prediction is close, so a guess would look surer than a sure prediction.
    """
    credits = explanation.by_token() if explanation.is_uniform else torch.cat(explanation.credits)
    total = float(explanation.against_others(credits)[:, target].abs().sum())
    return lead_of(explanation, target) / (total or 1.0)


def shade(share: float) -> float:
    """Return how strong the colour of a share of the lead is, from 0 to 1.

    A root, as a text of hundreds of words has shares of hundredths of a logit.
    """
    return min(1.0, math.sqrt(abs(share) / FULL_COLOUR))


def percent(probability: float) -> str:
    """Return a probability in percent, never one of 100% or 0% by rounding."""
    if 0.995 <= probability < 1:
        return ">99%"
    return "<1%" if 0 < probability < 0.005 else f"{probability:.0%}"


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
        explanation: of an image.
        target: the class. Default: the one that is predicted.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no image, or its tokens make no grid.
    """
    k = explanation.predicted if target is None else target
    shares = _shares(explanation, explanation.by_patch(), k)
    figure = new_figure(8.0, 3.8)
    plain, over = figure.subplots(1, 2)
    image = _as_pixels(explanation.image)
    extent = (0, image.shape[1], image.shape[0], 0)  # patches over all of the image, whatever was cropped
    for axes in (plain, over):
        axes.imshow(image, extent=extent, cmap="gray", aspect="equal")
        axes.axis("off")
    drawn = over.imshow(shares, **_colours(), alpha=0.6, extent=extent)
    _add_scale(figure, drawn, [over])
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
    """Return how a heat map of shares of the lead is coloured: as `shade` says."""
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
    """Say for what the credits are, in lines that are no longer than the axes."""
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
    figure = new_figure(9.6, 4.4)
    axes = figure.subplots()
    styles = ("-", "--", "-.", ":")
    for n, (name, curve) in enumerate(curves.items()):
        width = 2.4 if n == 0 else 1.4
        axes.plot([100 * fraction for fraction in DELETED], curve, styles[n % len(styles)], label=name, linewidth=width)
    axes.set_xlabel("tokens removed, those named first before others (%)")
    axes.set_ylabel("mean probability of the predicted class")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)  # beside the curves, which fill the axes
    return figure
