"""Positions of labels beside the points of a picture, so that none hides another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DIRECTIONS = 16  # in which a label can lie of its point
_RINGS = 8  # distances at which it can lie
_GAP = 2.0  # pixels around a label
_ROUNDS = 4  # of placing every label again, beside all others


def place_labels(
    points: np.ndarray, sizes: np.ndarray, obstacles: np.ndarray, bounds: tuple[float, float, float, float], gap: float
) -> np.ndarray:
    """Find a position beside each point for its label, where it hides nothing and is nearer to it than to other points.

    Labels are placed one after the other, each where its cost is least given those that have a position, for some
    rounds. The cost is mainly what a label or the line to its point would hide.

    Args:
        points: `[n, 2]`, in pixels.
        sizes: `[n, 2]`, width and height of the labels, in pixels.
        obstacles: `[m, 4]`, boxes that no label may hide, such as markers: left, bottom, right and top, in pixels.
        bounds: the box that labels have to stay in.
        gap: between a point and a label beside it, in pixels.

    Returns:
        `[n, 2]`: the centres of the labels, in pixels.
    """
    angles = 2 * np.pi * np.arange(_DIRECTIONS) / _DIRECTIONS
    directions = np.stack([np.cos(angles), np.sin(angles)], -1).round(12)  # from the right of the point, anticlockwise
    rings = np.arange(1, _RINGS + 1)
    steps = (rings[:, None, None] * gap * directions).reshape(-1, 2)
    sides = np.tile(np.sign(directions), (_RINGS, 1))
    boxes = np.full((len(points), 4), np.nan)  # of the labels that have a position
    for _ in range(_ROUNDS):
        for i, (point, size) in enumerate(zip(points, sizes)):
            centres = point + steps + sides * size / 2  # a side of the box is on the ring, or a corner
            candidates = np.concatenate([centres - size / 2 - _GAP, centres + size / 2 + _GAP], -1)
            others = np.delete(boxes, i, 0)
            others = np.concatenate([obstacles, others[~np.isnan(others[:, 0])]])
            outside = np.maximum(bounds[:2] - candidates[:, :2], candidates[:, 2:] - bounds[2:]).max(-1)
            hidden = _overlaps(candidates, others).sum(-1) + np.maximum(outside, 0) * size.max()
            crossed = [_crossings(point, centre, others) for centre in centres]
            away = np.linalg.norm(steps, axis=-1)
            rivals = np.delete(points, i, 0)
            ambiguous = [np.maximum(2 * a - _distances(box, rivals), 0).sum() for a, box in zip(away, candidates)]
            cost = hidden * 1e3 + np.array(crossed) * 1e3 + away + np.array(ambiguous)
            boxes[i] = candidates[cost.argmin()]
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def label_points(
    axes: Axes, xy: np.ndarray, heights: np.ndarray, texts: list[str], radius: float = 4.5, **style: Any
) -> None:
    """Write a label beside each point, with a line to it where the label had to go far.

    The figure's layout is computed here and kept: labels are placed for it.

    Args:
        axes: axes with everything else drawn and the limits set.
        xy: `[n, 2]`, in data coordinates.
        heights: `[n]`, half the heights of the points' error bars, in data coordinates.
        texts: one label per point.
        radius: radius of the markers, in points (1/72 inch).
        **style: options of `matplotlib.text.Text`, such as `fontsize`.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    scale = figure.dpi / 72  # pixels in a point
    renderer = figure.canvas.get_renderer()
    pixels = axes.transData.transform(xy)
    bars = [axes.transData.transform(xy + sign * np.stack([0 * heights, heights], -1)) for sign in (-1, 1)]
    obstacles = np.concatenate([bars[0] - radius * scale, bars[1] + radius * scale], -1)
    drafts = [axes.text(0, 0, text, **style) for text in texts]
    extents = [draft.get_window_extent(renderer) for draft in drafts]
    for draft in drafts:
        draft.remove()
    sizes = np.array([[extent.width, extent.height] for extent in extents])
    gap = 1.4 * radius * scale
    centres = place_labels(pixels, sizes, obstacles, axes.get_window_extent(renderer).extents, gap)
    for point, pixel, centre, size, text in zip(xy, pixels, centres, sizes, texts):
        distance = np.linalg.norm(np.maximum(np.abs(centre - pixel) - size / 2, 0))
        side = centre[0] - pixel[0]
        axes.annotate(
            text,
            xy=point,
            xytext=(centre - pixel) / scale,
            textcoords="offset points",
            ha="center",
            va="center",
            multialignment="center" if abs(side) < size[0] / 2 else "left" if side > 0 else "right",
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6} if distance > 2.1 * gap else None,
            **style,
        )


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the areas that boxes `[n, 4]` share with boxes `[m, 4]`, `[n, m]`."""
    boxes = boxes[:, None]
    sides = np.minimum(boxes[..., 2:], others[:, 2:]) - np.maximum(boxes[..., :2], others[:, :2])
    return np.prod(np.maximum(sides, 0), -1)


def _crossings(start: np.ndarray, end: np.ndarray, boxes: np.ndarray) -> int:
    """Count dots on the line between two points that lie in boxes `[m, 4]`, apart from boxes around the start."""
    boxes = boxes[~_contain(boxes, start[None])[:, 0]]
    return int(_contain(boxes, np.linspace(start, end, 30)).sum())


def _contain(boxes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return whether boxes `[m, 4]` contain points `[n, 2]`, `[m, n]`."""
    boxes = boxes[:, None]
    return ((points >= boxes[..., :2]) & (points <= boxes[..., 2:])).all(-1)


def _distances(box: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the distances from a box `[4]` to points `[n, 2]`, `[n]`."""
    return np.linalg.norm(np.maximum(np.maximum(box[:2] - points, points - box[2:]), 0), axis=-1)
