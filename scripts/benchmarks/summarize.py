"""Print means and standard deviations over runs, as a Markdown table.

    python scripts/benchmarks/summarize.py runs/sst5_minilm_*/results.json

The table has one row per task, backbone, head and metric, of results that `capsule-heads train` wrote. With
`--measured docs/benchmarks/measured.json --commit COMMIT --date YYYY-MM-DD` the script also writes them to the file
that draw_results.py reads.
"""

import argparse

from results_pages.results import summarize_runs, write_measured

from capsule_heads.cli.options import OneLineParser, fail
from capsule_heads.hub.results import SPLITS, read_runs


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", help="files named results.json, of runs")
    parser.add_argument("--backbone", default="", help="backbone of runs whose results name none")
    parser.add_argument("--measured", help="JSON file to put the summaries into")
    parser.add_argument("--commit", default="", help="commit that the runs were made with; for --measured")
    parser.add_argument("--date", default="", help="date of the runs, YYYY-MM-DD; for --measured")
    options = parser.parse_args()
    if not options.results:
        fail("There are no results; expected files: python scripts/benchmarks/summarize.py RESULTS.json ...")
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
