"""Pictures of accuracy against trained parameters, and against year: published results and this project's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from capsule_heads.explain.pictures import new_figure

from .labels import label_points
from .results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = {  # by whether this project measured it
    False: {"marker": "o", "color": "#33658a", "label": "published"},
    True: {"marker": "D", "color": "#d1495b", "label": "this project, measured (mean ± sd over seeds)"},
}


def draw_results(results: Sequence[Result], against: Literal["parameters", "year"], title: str) -> Figure:
    """Draw accuracies over the number of trained parameters (a logarithmic axis) or the year.

    The first picture leaves out results whose number of trained parameters is not known, and says how many.

    Args:
        results: results of one task, from `collect_results`.
        against: what the horizontal axis shows.
        title: the task's title.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `against` is neither, or no result has a known number of trained parameters.
    """
    if against not in ("parameters", "year"):
        raise ValueError(f"against is {against!r}; expected 'parameters' or 'year'.")
    position = {"parameters": "trained_parameters", "year": "year"}[against]
    shown = [result for result in results if getattr(result, position) is not None]
    if not shown:
        raise ValueError(f"None of the {len(results)} results has a known number of {against}; draw another picture.")
    figure = new_figure(9, 5.5)
    axes = figure.add_subplot()
    xy = np.array([[getattr(result, position), result.accuracy] for result in shown], dtype=float)
    measured = np.array([result.measured for result in shown])
    sd = np.array([result.sd or 0.0 for result in shown])
    for kind, style in _STYLES.items():
        if (measured == kind).any():
            x, y = xy[measured == kind].T
            errors = {"yerr": sd[measured == kind], "capsize": 3} if kind else {}
            axes.errorbar(x, y, **errors, **style, linestyle="none", markersize=7, zorder=3)
    label = position.replace("_", " ")
    axes.set(title=f"{title}: accuracy against {label}", xlabel=label, ylabel="test accuracy, %")
    if len(shown) < len(results):
        axes.set_xlabel(f"{label}\n(results not shown because theirs are not known: {len(results) - len(shown)})")
    _set_limits(axes, xy, logarithmic=against == "parameters")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    texts = [f"{result.method}\n{result.authors}, {result.year}" for result in shown]
    label_points(axes, xy, sd, texts, fontsize=7.5, linespacing=1.1)
    return figure


def _set_limits(axes: Axes, xy: np.ndarray, logarithmic: bool) -> None:
    """Leave room for labels around the points `[n, 2]`."""
    low, high = xy.min(0), xy.max(0)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(low[0] / 4, high[0] * 4)
    else:
        axes.set_xlim(low[0] - 1.5, high[0] + 1.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
    margin = 0.12 * max(high[1] - low[1], 1.0)
    axes.set_ylim(low[1] - margin, high[1] + margin)
