"""Write docs/benchmarks/heads.md, and a page for each set, from what compare_heads.py has measured.

    python scripts/benchmarks/write_results.py

Published numbers are from docs/benchmarks/published.yaml, each with its source.
"""

import argparse
from pathlib import Path

from results_pages.comparison import in_order, render_results, render_set
from results_pages.results import read_published

from capsule_heads.cli.options import OneLineParser, fail
from capsule_heads.files import read_json, write_text


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--heads", type=Path, default="docs/benchmarks/heads", help="folder of measured sets, and of pages"
    )
    parser.add_argument("--published", default="docs/benchmarks/published.yaml")
    parser.add_argument("--output", default="docs/benchmarks/heads.md")
    options = parser.parse_args()
    try:
        records = in_order([read_json(file) for file in sorted(options.heads.glob("*.json"))])
        for record in records:
            write_text(options.heads / f"{record['set']}.md", render_set(record))
        write_text(options.output, render_results(records, read_published(options.published)))
    except (KeyError, OSError, TypeError, ValueError) as error:
        fail(error)
    print(options.output)


if __name__ == "__main__":
    main()
