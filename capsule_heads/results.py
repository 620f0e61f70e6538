"""Results: summaries of runs that scripts/train.py made, and published numbers beside them.

Two files hold them: a YAML file of published numbers, typed by hand, each with its source, and a JSON file of this
project's own, which `summarize_runs` and `write_measured` make from the results of runs and nobody types.
"""

from __future__ import annotations

import datetime
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SPLITS = ("validation", "test")
_NOT_METRICS = ("loss", "runtime", "per_second", "preparation_time")
_PUBLISHED_KEYS = {
    "task": str,
    "method": str,
    "authors": str,
    "year": int,
    "accuracy": (int, float),
    "trained_parameters": (int, type(None)),
    "total_parameters": (int, type(None)),
    "url": str,
    "where": str,
}


@dataclass(frozen=True)
class Result:
    """One result on a task's test split.

    Attributes:
        method: its name, for labels.
        authors: of the paper; "this project" for its own.
        year: of publication, or of the measurement.
        accuracy: in percent; the mean, if there are several runs.
        sd: standard deviation over seeds, in percentage points; None where there is no or only one seed.
        trained_parameters: how many parameters were trained; None if that is not known.
        measured: whether this project measured it.
        source: the paper's address, or commit, date and seeds.
    """

    method: str
    authors: str
    year: int
    accuracy: float
    sd: float | None
    trained_parameters: int | None
    measured: bool
    source: str


def read_runs(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Reads files that scripts/train.py wrote.

    Raises:
        ValueError: if a file is none of these.
    """
    runs = []
    for path in paths:
        try:
            run = json.loads(Path(path).read_text(encoding="utf-8"))
            missing = {"task", "seed", "steps", "trained_parameters", "training_seconds"} - set(run)
            if missing:
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} holds no results of scripts/train.py: {error!r}") from None
        runs.append(run)
    return runs


def summarize_runs(runs: Sequence[dict[str, Any]], backbone: str = "") -> list[dict[str, Any]]:
    """Means and standard deviations over the seeds of equal runs.

    Args:
        runs: results of runs, as `read_runs` returns them.
        backbone: of runs that do not say which they had.

    Returns:
        One record per task, backbone, head and metric: `task`, `backbone`, `freeze_backbone`, `head_type` (of older
        runs: frozen, "token_depth"), `metric`, `seeds`, `validation` and `test` (each
        `{"mean": ..., "sd": ...}`, fractions of 1 for an accuracy; `sd` is None for one seed; None for the split if it
        has no labels), `trained_parameters`, `steps`, `training_seconds` (mean).

    Raises:
        ValueError: if runs of one task and backbone differ in their number of trained parameters or steps, or have the
            same seed: their mean would be that of different experiments.
    """
    groups = defaultdict(list)
    for run in runs:
        name, head_type = run.get("backbone") or backbone, run.get("head_type", "token_depth")
        groups[run["task"], name, run.get("freeze_backbone", True), head_type].append(run)
    records = []
    for (task, name, frozen, head_type), group in groups.items():
        for key in ("trained_parameters", "steps"):
            values = sorted({run[key] for run in group})
            if len(values) > 1:
                raise ValueError(
                    f"Runs of {task} with backbone {name!r} differ in {key}: {values}; summarize them apart."
                )
        seeds = sorted(run["seed"] for run in group)
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"Runs of {task} with backbone {name!r} have seeds {seeds}; expected each seed once.")
        for metric in _metrics(group[0]):
            records.append(
                {
                    "task": task,
                    "backbone": name,
                    "freeze_backbone": frozen,
                    "head_type": head_type,
                    "metric": metric,
                    "seeds": seeds,
                    **{split: _mean_and_sd([run.get(f"{split}_{metric}") for run in group]) for split in SPLITS},
                    "trained_parameters": group[0]["trained_parameters"],
                    "steps": group[0]["steps"],
                    "training_seconds": statistics.mean(run["training_seconds"] for run in group),
                }
            )
    return records


def write_measured(path: str | Path, records: Iterable[dict[str, Any]], commit: str, date: str) -> None:
    """Puts summaries into the file of measured results; those of the same task, backbone, head and metric are replaced.

    Args:
        path: of the JSON file; made if it is not there.
        records: from `summarize_runs`.
        commit: of this project, which the runs were made with.
        date: of the runs, `YYYY-MM-DD`.

    Raises:
        ValueError: if the commit is empty, the date is not of this form, or a record names no backbone.
    """
    path = Path(path)
    if not commit:
        raise ValueError("Expected the commit that the runs were made with; got none.")
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        raise ValueError(f"Expected the date of the runs as YYYY-MM-DD; got {date!r}.") from None
    measured = {}
    for record in (json.loads(path.read_text(encoding="utf-8")) if path.exists() else []) + [
        {**record, "commit": commit, "date": date} for record in records
    ]:
        if not record["backbone"]:
            raise ValueError(f"The runs of {record['task']} do not say which backbone they had; give its name.")
        measured[tuple(record[key] for key in ("task", "backbone", "head_type", "freeze_backbone", "metric"))] = record
    content = [measured[key] for key in sorted(measured)]
    write_json(path, content)


def write_json(path: str | Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, whole or not at all: under another name first."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_published(path: str | Path) -> list[dict[str, Any]]:
    """Reads and checks the file of published numbers.

    Raises:
        ValueError: if a record lacks a key, has one too many or one of the wrong type, has no address as its source,
            or if two have the same task, method and year.
    """
    records = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    seen = set()
    for record in records:
        name = f"{path}: {record.get('task')}, {record.get('method')}, {record.get('year')}"
        if set(record) - {"remark"} != set(_PUBLISHED_KEYS):
            raise ValueError(f"{name}: expected the keys {', '.join(_PUBLISHED_KEYS)}; got {', '.join(record)}.")
        for key, types in _PUBLISHED_KEYS.items():
            if not isinstance(record[key], types):
                raise ValueError(f"{name}: {key} is {record[key]!r}, of the wrong type.")
        if not record["url"].startswith("https://"):
            raise ValueError(f"{name}: url is {record['url']!r}; expected the https address of the source.")
        if not 0 < record["accuracy"] <= 100:
            raise ValueError(f"{name}: accuracy is {record['accuracy']}; expected percent.")
        identity = (record["task"], record["method"], record["year"])
        if identity in seen:
            raise ValueError(f"{name}: stands there twice.")
        seen.add(identity)
    return records


def collect_results(task: str, published: str | Path, measured: str | Path) -> list[Result]:
    """All accuracies on a task's test split, published and measured, in the order of years.

    Args:
        task: such as `sst5`.
        published: path of the YAML file of published numbers.
        measured: path of the JSON file of measured ones.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is not as it should be, or neither has results on the task.
    """
    published_records = read_published(published)
    measured_records = json.loads(Path(measured).read_text(encoding="utf-8"))
    results = [
        Result(
            method=record["method"],
            authors=record["authors"],
            year=record["year"],
            accuracy=float(record["accuracy"]),
            sd=None,
            trained_parameters=record["trained_parameters"],
            measured=False,
            source=record["url"],
        )
        for record in published_records
        if record["task"] == task
    ]
    for record in measured_records:
        if record["task"] == task and record["metric"] == "accuracy" and record["test"] is not None:
            mean, sd = record["test"]["mean"], record["test"]["sd"]
            results.append(
                Result(
                    method=_method(record),
                    authors="this project",
                    year=int(record["date"][:4]),
                    accuracy=100 * mean,
                    sd=None if sd is None else 100 * sd,
                    trained_parameters=record["trained_parameters"],
                    measured=True,
                    source=f"commit {record['commit']}, {record['date']}, seeds {record['seeds']}",
                )
            )
    if not results:
        tasks = sorted({record["task"] for record in [*published_records, *measured_records]})
        raise ValueError(f"No accuracies on {task!r} in {published} and {measured}; they have {', '.join(tasks)}.")
    return sorted(results, key=lambda result: (result.year, result.accuracy))


def _method(record: dict[str, Any]) -> str:
    kind = record["head_type"]
    head = "capsule head" if kind in ("token_depth", "spatial_pose") else f"{kind.replace('_', ' ')} head"
    return f"{head}, {'frozen' if record['freeze_backbone'] else 'trained'} {record['backbone']}"


def is_metric(name: str) -> bool:
    """Whether a key of a run's results, such as "test_accuracy", is a metric, not a loss or a time."""
    return not name.endswith(_NOT_METRICS)


def _metrics(run: dict[str, Any]) -> list[str]:
    names = (name.removeprefix(f"{split}_") for split in SPLITS for name in run if name.startswith(f"{split}_"))
    return [name for name in dict.fromkeys(names) if is_metric(name)]


def _mean_and_sd(values: list[float | None]) -> dict[str, float | None] | None:
    if None in values:
        return None  # no labels
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
