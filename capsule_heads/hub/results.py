"""The results of a run, `results.json`, as `capsule-heads train` writes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import read_json

SPLITS = ("validation", "test")
_NOT_METRICS = ("loss", "runtime", "per_second", "preparation_time")
NUMBER = (int, float)
LARGEST = 1e15  # beyond it there is no count, no time and no metric
_RUN_KEYS = {"task": str, "seed": int, "steps": int, "trained_parameters": int, "training_seconds": NUMBER}


def read_runs(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Read files that `capsule-heads train` wrote.

    Raises:
        ValueError: If a file holds something else.
    """
    runs = []
    for path in paths:
        name = f"{path} holds no results of capsule-heads train"
        try:
            run = read_json(path)
        except OSError as error:
            raise ValueError(f"{name}: {error.strerror}.") from None
        metrics = {f"{split}_{name}" for split in SPLITS for name in metrics_of(run)} & run.keys()
        optional = {
            "backbone": (str, type(None)),
            "freeze_backbone": bool,
            "head_type": str,
            "head_options": str,
            "training_arguments": dict,
            "dataset": (dict, type(None)),
            **dict.fromkeys(metrics, (*NUMBER, type(None))),
        }
        keys = _RUN_KEYS | {key: types for key, types in optional.items() if key in run}
        check_record(run, keys, name)
        if run.get("dataset"):
            check_record(run["dataset"], {"name": str}, f"{name}: dataset")
        runs.append(run)
    return runs


def columns_of_training(run_dir: str | Path) -> tuple[list[str] | None, list[str] | None]:
    """Return the columns of inputs and of labels that a run on a user's own data was trained on.

    None for those that are not known: of another task, or of a model without `results.json` beside it.
    """
    try:
        run = read_json(Path(run_dir, "results.json"))
    except (OSError, ValueError):
        return None, None
    inputs, labels = (run.get(name) for name in ("inputs_from", "labels_from"))
    return (inputs if isinstance(inputs, list) else None), (labels if isinstance(labels, list) else None)


def check_record(record: Any, keys: dict[str, Any], name: str) -> None:
    """Check what was read from JSON.

    Args:
        record: what was read.
        keys: the type of each key that it has to have, or several types.
        name: what to call it in a message.

    Raises:
        ValueError: If it is no dictionary, lacks a key, or a value is of another type.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{name}: {record!r} stands where keys and values are expected.")
    missing = keys.keys() - record.keys()
    if missing:
        raise ValueError(f"{name}: {', '.join(sorted(missing))} missing.")
    for key, types in keys.items():
        value = record[key]
        if not (types is bool if isinstance(value, bool) else isinstance(value, types)):
            raise ValueError(f"{name}: {key} is {value!r}, of the wrong type.")
        if isinstance(value, NUMBER) and not abs(value) < LARGEST:  # nor is NaN
            raise ValueError(f"{name}: {key} is {str(value)[:20]}; expected a finite number below {LARGEST:g}.")


def is_metric(name: str) -> bool:
    """Return whether a key of a run's results, such as "test_accuracy", is a metric, not a loss or a time."""
    return not name.endswith(_NOT_METRICS)


def metrics_of(run: dict[str, Any]) -> list[str]:
    """Return the names of a run's metrics, such as "accuracy", without the split."""
    names = (name.removeprefix(f"{split}_") for split in SPLITS for name in run if name.startswith(f"{split}_"))
    return [name for name in dict.fromkeys(names) if is_metric(name)]
