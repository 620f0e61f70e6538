"""Draw accuracy against trained parameters, and against year.

    python scripts/benchmarks/draw_results.py --task sst5

Writes docs/pictures/TASK_parameters.png and TASK_year.png, from docs/benchmarks/published.yaml (published numbers and
their sources) and docs/benchmarks/measured.json (this project's; summarize.py --measured writes it).
"""

import argparse
from pathlib import Path

from results_pages.accuracy import draw_results
from results_pages.results import collect_results

from capsule_heads.cli.options import OneLineParser, fail

DOCS = Path(__file__).resolve().parents[2] / "docs"
TITLES = {
    "sst5": "SST-5, complete sentences",
    "sst2_root": "SST-2, complete sentences",
    "smallnorb": "smallNORB",
}


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=TITLES)
    parser.add_argument("--published", default=DOCS / "benchmarks" / "published.yaml", help="YAML file")
    parser.add_argument("--measured", default=DOCS / "benchmarks" / "measured.json", help="JSON file")
    parser.add_argument("--output_dir", type=Path, default=DOCS / "pictures", help="directory for the two pictures")
    options = parser.parse_args()
    try:
        results = collect_results(options.task, options.published, options.measured)
        options.output_dir.mkdir(parents=True, exist_ok=True)
        for against in ("parameters", "year"):
            path = options.output_dir / f"{options.task}_{against}.png"
            draw_results(results, against, TITLES[options.task]).savefig(path)
            print(path)
    except (ImportError, OSError, ValueError) as error:
        fail(error)


if __name__ == "__main__":
    main()
