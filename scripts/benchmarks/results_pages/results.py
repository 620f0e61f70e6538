"""Results: summaries of runs of `capsule-heads train`, and published numbers beside them.

Two files hold them: a YAML file of published numbers, typed by hand, each with its source, and a JSON file of this
project's own, which `summarize_runs` and `write_measured` make from the results of runs.
"""

from __future__ import annotations

import datetime
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from capsule_heads.files import read_json, write_json
from capsule_heads.hub.results import NUMBER, SPLITS, check_record, metrics_of

_MEASURED_KEYS = {
    "task": str,
    "backbone": str,
    "freeze_backbone": bool,
    "head_type": str,
    "head_options": str,
    "metric": str,
    "seeds": list,
    "test": (dict, type(None)),
    "trained_parameters": int,
    "commit": str,
    "date": str,
}
_IDENTITY = ("task", "backbone", "head_type", "head_options", "freeze_backbone", "metric")
_PUBLISHED_KEYS: dict[str, Any] = {
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
        method: name of the method, for labels.
        authors: authors of the paper; "this project" for its own.
        year: year of publication, or of the measurement.
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


def summarize_runs(runs: Sequence[dict[str, Any]], backbone: str = "") -> list[dict[str, Any]]:
    """Compute means and standard deviations over the seeds of equal runs.

    Args:
        runs: results of runs, as `read_runs` returns them.
        backbone: the backbone of runs whose results name none.

    Returns:
        One record per task, backbone, head and metric: `task`, `backbone`, `freeze_backbone`, `head_type` (of older
        runs: frozen, "token_depth"), `head_options` (those that are not default), `metric`, `seeds`, `validation` and
        `test` (each `{"mean": ..., "sd": ...}`, fractions of 1 for an accuracy; `sd` is None for one seed; None for the
        split if it has no labels), `trained_parameters`, `steps`, `training_seconds` (mean).

    Raises:
        ValueError: If runs of one task and backbone differ in their number of trained parameters or steps, or have the
            same seed: their mean would be that of different experiments.
    """
    groups = defaultdict(list)
    for run in runs:
        name, frozen = run.get("backbone") or backbone, run.get("freeze_backbone", True)
        head_type, head_options = run.get("head_type", "token_depth"), run.get("head_options", "")
        groups[run["task"], name, frozen, head_type, head_options].append(run)
    records = []
    for (task, name, frozen, head_type, head_options), group in groups.items():
        for key in ("trained_parameters", "steps"):
            values = sorted({run[key] for run in group})
            if len(values) > 1:
                raise ValueError(
                    f"Runs of {task} with backbone {name!r} differ in {key}: {values}; summarize them apart."
                )
        seeds = sorted(run["seed"] for run in group)
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"Runs of {task} with backbone {name!r} have seeds {seeds}; expected each seed once.")
        for metric in metrics_of(group[0]):
            records.append(
                {
                    "task": task,
                    "backbone": name,
                    "freeze_backbone": frozen,
                    "head_type": head_type,
                    "head_options": head_options,
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
    """Write summaries to the file of measured results. They replace those of the same task, backbone, head and metric.

    Args:
        path: the JSON file; made if it is not there.
        records: summaries from `summarize_runs`.
        commit: this project's commit that the runs were made with.
        date: date of the runs, `YYYY-MM-DD`.

    Raises:
        ValueError: If the commit is empty, the date is not of this form, a record names no backbone, or the file holds
            something else.
    """
    path = Path(path)
    if not commit:
        raise ValueError("Expected the commit that the runs were made with; got none.")
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        raise ValueError(f"Expected the date of the runs as YYYY-MM-DD; got {date!r}.") from None
    measured = {}
    for record in (_read_measured(path) if path.exists() else []) + [
        {**record, "commit": commit, "date": date} for record in records
    ]:
        if not record["backbone"]:
            raise ValueError(f"The runs of {record['task']} do not say which backbone they had; give its name.")
        measured[tuple(record[key] for key in _IDENTITY)] = record
    content = [measured[key] for key in sorted(measured)]
    write_json(path, content)


def _read_measured(path: str | Path) -> list[dict[str, Any]]:
    records, name = read_json(path, list), f"{path} holds no results that scripts/benchmarks/summarize.py put there"
    for record in records:
        check_record(record, _MEASURED_KEYS, name)
        if record["test"] is not None:
            check_record(record["test"], {"mean": NUMBER, "sd": (*NUMBER, type(None))}, name)
    return records


def read_published(path: str | Path) -> list[dict[str, Any]]:
    """Read and check the file of published numbers.

    Raises:
        ValueError: If it holds no records, a record lacks a key, has one too many or one of the wrong type, or has no
            address as its source; or if two have the same task, method and year.
    """
    try:
        records = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not YAML: {error}.") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} holds no records; expected a list of keys and values.")
    seen = set()
    for record in records:
        name = f"{path}: {record.get('task')}, {record.get('method')}, {record.get('year')}"
        if set(record) - {"remark"} != set(_PUBLISHED_KEYS):
            raise ValueError(
                f"{name}: expected the keys {', '.join(_PUBLISHED_KEYS)}; got {', '.join(map(str, record))}."
            )
        for key, types in _PUBLISHED_KEYS.items():
            if not isinstance(record[key], types):
                raise ValueError(f"{name}: {key} is {record[key]!r}, of the wrong type.")
        if not record["url"].startswith("https://"):
            raise ValueError(f"{name}: url is {record['url']!r}; expected the https address of the source.")
        if not 0 < record["accuracy"] <= 100:
            raise ValueError(f"{name}: accuracy is {record['accuracy']}; expected percent.")
        identity = (record["task"], record["method"], record["year"])
        if identity in seen:
            raise ValueError(f"{name}: stands there twice; expected one record for each task, method and year.")
        seen.add(identity)
    return records


def collect_results(task: str, published: str | Path, measured: str | Path) -> list[Result]:
    """Return all accuracies on a task's test split, published and measured, in the order of years.

    Args:
        task: name of the task, such as `sst5`.
        published: path of the YAML file of published numbers.
        measured: path of the JSON file of measured ones.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is not as it should be, or neither has results on the task.
    """
    published_records = read_published(published)
    measured_records = _read_measured(measured)
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
    head = f"{head} ({record['head_options']})" if record["head_options"] else head
    return f"{head}, {'frozen' if record['freeze_backbone'] else 'trained'} {record['backbone']}"


def _mean_and_sd(values: list[float | None]) -> dict[str, float | None] | None:
    if None in values:
        return None  # no labels
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
