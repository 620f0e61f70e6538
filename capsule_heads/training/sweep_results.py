"""The results of a sweep: tables of all heads and of all combinations, as files and as a picture."""

from __future__ import annotations

import csv
import io
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_json, write_text, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .members import Member
    from .sweep import Sweep

logger = logging.getLogger(__name__)

TABLE, RESULTS, PICTURE = "sweep.csv", "sweep.json", "sweep.png"


def describe(sweep: Sweep) -> dict[str, Any]:
    """Return the results of a sweep, for each head, and for each combination over its seeds.

    Returns:
        A dictionary with `metric`, by which the best is chosen, `heads` and `combinations`, the best first. Each of the
        heads has its combination, seed, steps, metrics by split and, if it was stopped, the reason. Each combination
        has the mean, standard deviation and best of the metric on each split, over the seeds that were trained to the
        end.
    """
    ranked = sweep.ranked()
    stopped = [member for member in sweep.members if member.fault is not None]
    by_combination: dict[str, list[Member]] = {str(x): [] for x in sweep.combinations}
    for member in ranked:
        by_combination[str(member.combination)].append(member)
    sign = 1 if sweep.greater_is_better else -1
    combinations: list[dict[str, Any]] = [
        {
            "combination": name,
            "seeds": len(members),
            **{split: _over_seeds([x.found[split][sweep.metric] for x in members], sign) for split in sweep.caches},
        }
        for name, members in by_combination.items()
    ]
    combinations.sort(key=lambda x: -sign * x[sweep.split]["mean"] if x["seeds"] else float("inf"))
    return {
        "task": sweep.run.task.name,
        "backbone": sweep.model_arguments.backbone,
        "metric": sweep.metric,
        "steps": sweep.n_steps,
        "heads": [_row(member) for member in (*ranked, *stopped)],
        "combinations": combinations,
    }


def _row(member: Member) -> dict[str, Any]:
    combination = member.combination
    row = {"head_type": combination.head_type, **combination.options, **combination.settings, "seed": member.seed}
    return {**row, "steps": member.steps, "stopped": member.fault, **member.found}


def _over_seeds(values: Sequence[float], sign: int) -> dict[str, float | None]:
    if not values:
        return {"mean": None, "standard deviation": None, "best": None}
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {
        "mean": statistics.fmean(values),
        "standard deviation": spread,
        "best": sign * max(sign * x for x in values),
    }


def save(sweep: Sweep, folder: Path) -> dict[str, Any]:
    """Write the table, the results and, where matplotlib is installed, the picture, and return what was found.

    Raises:
        OSError: If a file cannot be written.
    """
    found = describe(sweep)
    write_json(folder / RESULTS, found)
    rows = [_flat(row) for row in found["heads"]]
    with io.StringIO(newline="") as text:
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        write_text(folder / TABLE, text.getvalue())
    try:
        figure = draw(found)
    except ImportError:
        logger.warning('No picture was drawn, as matplotlib is not installed: pip install "capsule-heads[pictures]".')
    else:
        with writing(folder / PICTURE, "make room, or choose another output_dir"):
            figure.savefig(folder / PICTURE, dpi=150)
    return found


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a head's row with its metrics as columns, such as `validation_accuracy`."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= {f"{name}_{x}": y for x, y in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def render(found: dict[str, Any]) -> str:
    """Return the combinations as a table of text, the best first, and below it the results of the best head.

    Args:
        found: what `describe` returns, with the results of the best head's own run as `best`.
    """
    splits = [name for name, value in found["combinations"][0].items() if isinstance(value, dict)]
    header = ["combination", "seeds", *(f"{split} {found['metric']}" for split in splits), "best"]
    rows = [header]
    for combination in found["combinations"]:
        cells = [combination["combination"], str(combination["seeds"])]
        cells += [_mean(combination[split]) for split in splits]
        best = combination[splits[0]]["best"]
        rows.append([*cells, "" if best is None else f"{best:.4f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    best, seed = found["best"], found["heads"][0]["seed"]
    measured = [f"{k.replace('_', ' ')} {best[k]:.4f}" for k in best if k.endswith(f"_{found['metric']}")]
    return "\n".join(
        [*lines, "", f"The best head (seed {seed}): {', '.join(measured)}. It is saved in {found['saved']}."]
    )


def _mean(over_seeds: dict[str, float | None]) -> str:
    mean, spread = over_seeds["mean"], over_seeds["standard deviation"]
    if mean is None:
        return "stopped"
    return f"{mean:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def draw(found: dict[str, Any]) -> Figure:
    """Draw the metric on the validation split over the learning rate, with a line for each head and its options.

    A point is the mean over seeds, a bar the standard deviation, and a dot one seed.
    """
    from matplotlib.figure import Figure

    split = next(name for name, value in found["combinations"][0].items() if isinstance(value, dict))
    names = ("learning_rate", "seed", "steps", "stopped")
    lines: dict[str, dict[float, list[float]]] = {}
    for row in found["heads"]:
        if row["stopped"] is not None:
            continue
        options = [f"{k}={v}" for k, v in row.items() if k not in (*names, "head_type") and not isinstance(v, dict)]
        points = lines.setdefault(", ".join([row["head_type"], *options]), {})
        points.setdefault(row.get("learning_rate", 0.0), []).append(row[split][found["metric"]])
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, points) in enumerate(lines.items()):
        rates = sorted(points)
        x = [rate * 1.03 ** (place - len(lines) / 2) for rate in rates]  # moved apart, so that all points are seen
        spreads = [statistics.stdev(points[rate]) if len(points[rate]) > 1 else 0.0 for rate in rates]
        container = axes.errorbar(
            x, [statistics.fmean(points[rate]) for rate in rates], spreads, marker="o", label=name
        )
        color = container.lines[0].get_color()
        for at, rate in zip(x, rates):
            axes.plot([at] * len(points[rate]), points[rate], ".", color=color, alpha=0.35)
    rates = sorted({rate for points in lines.values() for rate in points})
    if len(rates) > 1:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(rates, [f"{rate:g}" if rate else "as chosen" for rate in rates])
    axes.set(xlabel="learning rate", ylabel=f"{split} {found['metric']}".replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="best")
    return figure
