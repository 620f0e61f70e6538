"""Pictures of explanations: tokens by layers, patches over an image, parts; and deletion curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .attributions import COLOUR_CHANNELS, Explanation
from .faithfulness import DELETED

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

PALETTE = "RdBu"  # red is against the class, blue is for it: told apart by those who see no green
MOST_INCHES = 16.0  # of tokens without names, such as the hundreds of frames of audio


def new_figure(width: float, height: float, dpi: int = 150) -> Figure:
    """Return an empty figure of a width and height in inches; none of pyplot's.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Drawing needs matplotlib: pip install "capsule-heads[pictures]".') from error
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_explanation(explanation: Explanation) -> Figure:
    """Draw an explanation of the predicted class: patches over an image, or tokens by layers; errors as in both."""
    return draw_tokens(explanation) if explanation.image is None else draw_patches(explanation)


def draw_tokens(explanation: Explanation, target: int | None = None) -> Figure:
    """Draw a heat map of tokens at all layers, with the sums over layers above it.

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
    width = max(5.0, 2.2 + 0.34 * n_tokens)
    figure = new_figure(width if explanation.tokens else min(width, MOST_INCHES), 2.8 + 0.24 * n_layers)
    sums, heat = figure.subplots(2, 1, sharex=True, height_ratios=(1.1, 0.24 * n_layers + 0.4))
    most = float(np.abs(credits).max()) or 1.0
    totals = credits.sum(1)
    sums.bar(range(n_tokens), totals, color=["#2166ac" if total > 0 else "#b2182b" for total in totals])
    sums.axhline(0, color="black", linewidth=0.8)
    sums.set_ylabel("all layers")
    image = heat.imshow(credits.T, cmap=PALETTE, vmin=-most, vmax=most, aspect="auto", origin="lower")
    if explanation.tokens:
        heat.set_xticks(range(n_tokens), explanation.tokens, rotation=60, ha="right", rotation_mode="anchor")
    else:
        heat.set_xlabel("position")
    heat.set_yticks(range(n_layers), [str(layer) for layer in explanation.layers])
    heat.set_ylabel("layer")
    figure.colorbar(image, ax=[sums, heat], label="credit (logits)")
    probability = float(explanation.probabilities[k])
    sums.set_title(f"For {explanation.labels[k]}, against the others; probability {probability:.2f}")
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
    most = float(np.abs(credits).max()) or 1.0
    figure = new_figure(8.0, 3.8)
    plain, over = figure.subplots(1, 2)
    image = _as_pixels(explanation.image)
    extent = (0, credits.shape[1], credits.shape[0], 0)  # image and patches in one unit, whatever was cropped
    for axes in (plain, over):
        axes.imshow(image, extent=extent, cmap="gray", aspect="equal")
        axes.axis("off")
    drawn = over.imshow(credits, cmap=PALETTE, vmin=-most, vmax=most, alpha=0.6, extent=extent)
    figure.colorbar(drawn, ax=over, label="credit (logits)")
    plain.set_title("image")
    over.set_title(f"for {explanation.labels[k]}, probability {float(explanation.probabilities[k]):.2f}")
    return figure


def _as_pixels(image: object) -> NDArray:
    """Return an image of any kind as `[rows, columns]` or `[rows, columns, colours]`."""
    pixels = np.asarray(image)
    return np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 and pixels.shape[0] in COLOUR_CHANNELS else pixels


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
    figure = new_figure(10.0, 1.4 + 0.3 * len(labels))
    axes = figure.subplots()
    image = axes.imshow(credits.T, cmap=PALETTE, vmin=-most, vmax=most, aspect="auto")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel(f"parts, in order of what they say of {labels[-1]} less {labels[0]}")
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
