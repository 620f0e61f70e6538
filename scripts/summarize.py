"""Means and standard deviations over runs: `python scripts/summarize.py runs/sst5_minilm_*/results.json`.

Prints a Markdown table, one row per task, for results that scripts/train.py wrote.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path


def main() -> None:
    runs = defaultdict(list)
    for path in sys.argv[1:]:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        runs[results["task"]].append(results)
    if not runs:
        sys.exit("usage: python scripts/summarize.py RESULTS.json ...")
    print("| task | seeds | metric | validation | test | trained parameters | steps | training time |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for task, results in runs.items():
        metrics = [name.removeprefix("test_") for name in results[0] if name.startswith("test_")]
        for metric in (m for m in metrics if not m.endswith(("loss", "runtime", "per_second"))):
            validation, test = (
                mean_and_sd([r[f"{split}_{metric}"] for r in results]) for split in ("validation", "test")
            )
            seeds = ", ".join(str(r["seed"]) for r in sorted(results, key=lambda r: r["seed"]))
            minutes = statistics.mean(r["training_seconds"] for r in results) / 60
            print(
                f"| {task} | {seeds} | {metric} | {validation} | {test} | {results[0]['trained_parameters']:,} "
                f"| {results[0]['steps']:,} | {minutes:.0f} min |"
            )


def mean_and_sd(values: list[float]) -> str:
    sd = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{sd}"


if __name__ == "__main__":
    main()
