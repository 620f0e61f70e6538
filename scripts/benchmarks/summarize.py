"""Means and standard deviations over runs: `python scripts/summarize.py runs/sst5_minilm_*/results.json`.

Prints a Markdown table, one row per task, backbone, head and metric, for results that scripts/train.py wrote.
`--measured docs/results/measured.json --commit COMMIT --date YYYY-MM-DD` also puts them there, where
scripts/draw_results.py reads.
"""

import sys
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # has an evaluate.py

import argparse

from capsule_heads.cli.options import OneLineParser, fail
from capsule_heads.hub.results import SPLITS, read_runs
from capsule_heads.results import summarize_runs, write_measured


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", help="files named results.json, of runs")
    parser.add_argument("--backbone", default="", help="of runs that do not say which they had")
    parser.add_argument("--measured", help="JSON file to put the summaries into")
    parser.add_argument("--commit", default="", help="that the runs were made with; for --measured")
    parser.add_argument("--date", default="", help="of the runs, YYYY-MM-DD; for --measured")
    options = parser.parse_args()
    if not options.results:
        fail("expected files: python scripts/summarize.py RESULTS.json ...")
    try:
        records = summarize_runs(read_runs(options.results), options.backbone)
        if options.measured:
            write_measured(options.measured, records, options.commit, options.date)
    except (OSError, ValueError) as error:
        fail(error)
    print(
        "| task | backbone | head | seeds | metric | validation | test | trained parameters | steps | training time |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for record in records:
        head = ", ".join(filter(None, (record["head_type"], record["head_options"])))
        names = " | ".join((record["task"], record["backbone"], head))
        seeds = ", ".join(map(str, record["seeds"]))
        scores = " | ".join(percent(record[split]) for split in SPLITS)
        print(
            f"| {names} | {seeds} | {record['metric']} | {scores} "
            f"| {record['trained_parameters']:,} | {record['steps']:,} | {record['training_seconds'] / 60:.0f} min |"
        )


def percent(score: dict | None) -> str:
    if score is None:
        return "-"  # no labels
    sd = "" if score["sd"] is None else f" ± {100 * score['sd']:.1f}"
    return f"{100 * score['mean']:.1f}{sd}"


if __name__ == "__main__":
    main()
