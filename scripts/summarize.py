"""Means and standard deviations over runs: `python scripts/summarize.py runs/sst5_minilm_*/results.json`.

Prints a Markdown table, one row per task, backbone and metric, for results that scripts/train.py wrote.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

SPLITS = ("validation", "test")
NOT_METRICS = ("loss", "runtime", "per_second", "preparation_time")


def main() -> None:
    runs = defaultdict(list)
    for path in sys.argv[1:]:
        try:
            results = json.loads(Path(path).read_text(encoding="utf-8"))
            runs[results["task"], results.get("backbone", "")].append(results)
        except (OSError, ValueError, TypeError, KeyError) as error:
            fail(f"{path} holds no results of scripts/train.py: {error!r}")
    if not runs:
        fail("expected files: python scripts/summarize.py RESULTS.json ...")
    print("| task | backbone | seeds | metric | validation | test | trained parameters | steps | training time |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for (task, backbone), results in runs.items():
        seeds = ", ".join(str(seed) for seed in sorted(r["seed"] for r in results))
        minutes = statistics.mean(r["training_seconds"] for r in results) / 60
        for metric in metrics(results[0]):
            scores = " | ".join(mean_and_sd([r.get(f"{split}_{metric}") for r in results]) for split in SPLITS)
            print(
                f"| {task} | {backbone} | {seeds} | {metric} | {scores} | {results[0]['trained_parameters']:,} "
                f"| {results[0]['steps']:,} | {minutes:.0f} min |"
            )


def metrics(results: dict) -> list[str]:
    names = (name.removeprefix(f"{split}_") for split in SPLITS for name in results if name.startswith(f"{split}_"))
    return [name for name in dict.fromkeys(names) if not name.endswith(NOT_METRICS)]


def mean_and_sd(values: list) -> str:
    if None in values:
        return "-"  # no labels
    sd = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{sd}"


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
