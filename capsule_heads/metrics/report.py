"""What `measure` found, as text and in pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .scores import N_BINS, OF_CLASSES, OF_LABELS, OF_VALUES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {
    "accuracy": "accuracy",
    "f1_macro": "macro F1",
    "f1_micro": "micro F1",
    "subset_accuracy": "all labels right",
    "mean_squared_error": "mean squared error",
    "mean_absolute_error": "mean absolute error",
    "r2": "R2",
    "pearson": "Pearson correlation",
    "spearmanr": "Spearman correlation",
    "negative_log_likelihood": "negative log-likelihood",
    "expected_calibration_error": f"expected calibration error ({N_BINS} bins)",
}
OF_CLASS = ("precision", "recall", "f1", "support", "threshold")
MOST_ROWS = 30  # of a table on a terminal
MOST_COLUMNS = 12
MOST_NAMES = 40  # beside a picture


def render_text(found: Mapping[str, Any]) -> str:
    """Return tables of what was measured, to read on a terminal."""
    names = [x for x in dict.fromkeys((*OF_CLASSES, *OF_LABELS, *OF_VALUES, *NAMES)) if x in found]
    width = max(len(NAMES[name]) for name in names)
    lines = [f"{'examples':{width}}  {found['n']:,}"]
    lines += [f"{NAMES[name]:{width}}  {_number(found[name])}" for name in names]
    by_class = found.get("classes", {})
    if by_class:
        lines += ["", *_class_table(by_class)]
    if "confusion" in found and len(by_class) <= MOST_COLUMNS:
        lines += ["", "labels in rows, predictions in columns", *_confusion_table(found["confusion"], list(by_class))]
    for name, of_value in found.get("values", {}).items():
        lines += ["", name, *(f"{NAMES[score]:{width}}  {_number(x)}" for score, x in of_value.items())]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _class_table(by_class: Mapping[str, Mapping[str, float]]) -> list[str]:
    keys = [key for key in OF_CLASS if key in next(iter(by_class.values()))]
    shown = list(by_class)
    if len(shown) > MOST_ROWS:
        shown = sorted(shown, key=lambda name: by_class[name]["f1"])[:MOST_ROWS]
    rows = [
        [name, *(f"{by_class[name][key]:,}" if key == "support" else f"{by_class[name][key]:.3f}" for key in keys)]
        for name in shown
    ]
    table = _align([["class", *(key.replace("f1", "F1") for key in keys)], *rows])
    n_left = len(by_class) - len(shown)
    return [*table, f"{n_left} classes with a higher F1 are not shown."] if n_left else table


def _confusion_table(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> list[str]:
    return _align([["", *names], *([name, *map(str, row)] for name, row in zip(names, confusion))])


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines, the first column to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([f"{row[0]:{widths[0]}}", *(f"{x:>{width}}" for x, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


def draw_confusion(found: Mapping[str, Any]) -> Figure:
    """Draw the confusion matrix of classes: colours are fractions of a row, numbers are counts.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    names, counts = list(found["classes"]), found["confusion"]
    size = min(12.0, 3 + 0.45 * len(names))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot()
    fractions = [[x / max(sum(row), 1) for x in row] for row in counts]
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="fraction of the label's examples")
    if len(names) <= MOST_NAMES:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
    for row, of_row in enumerate(counts if len(names) <= MOST_COLUMNS else ()):
        for column, count in enumerate(of_row):
            colour = "white" if fractions[row][column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour)
    axes.set(xlabel="predicted", ylabel="label")
    return figure


def draw_reliability(found: Mapping[str, Any]) -> Figure:
    """Draw the reliability diagram: how often what has a probability is right, by bins of the probability.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    bins, error = found["reliability"], found["expected_calibration_error"]
    figure = Figure(figsize=(5, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    middles = [(x["from"] + x["to"]) / 2 for x in bins]
    upper.bar(middles, [x["accuracy"] for x in bins], 1 / N_BINS, color="tab:blue", edgecolor="white")
    upper.plot([x["confidence"] for x in bins], [x["accuracy"] for x in bins], "o", color="black", markersize=3)
    upper.plot([0, 1], [0, 1], "--", color="grey")
    upper.set(ylabel="fraction right", xlim=(0, 1), ylim=(0, 1), title=f"Expected calibration error {error:.3f}")
    lower.bar(middles, [x["n"] for x in bins], 1 / N_BINS, color="tab:grey", edgecolor="white")
    lower.set(xlabel="probability", ylabel="number")
    return figure
