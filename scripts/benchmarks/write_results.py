"""Write docs/results.md from docs/results/heads.json, which compare_heads.py makes.

    python scripts/benchmarks/write_results.py

Published numbers are from docs/results/published.yaml, each with its source.
"""

import argparse

from results_pages.comparison import render_results
from results_pages.results import read_published

from capsule_heads.cli.options import OneLineParser, fail
from capsule_heads.files import read_json, write_text


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="docs/results/heads.json")
    parser.add_argument("--published", default="docs/results/published.yaml")
    parser.add_argument("--output", default="docs/results.md")
    options = parser.parse_args()
    try:
        records = read_json(options.heads, list)
        write_text(options.output, render_results(records, read_published(options.published)))
    except (KeyError, OSError, TypeError, ValueError) as error:
        fail(error)
    print(options.output)


if __name__ == "__main__":
    main()
