"""Compare the accuracy of a capsule head on hidden states that are kept as float16, bfloat16 and int8.

    python scripts/benchmarks/state_encodings.py --set sst5 --trees DIRECTORY --page docs/benchmarks/cache.md

For each encoding the same heads are trained, from several seeds, on the same batches, as compare_heads.py trains them,
and tested on states that are kept in the same way. Differences are paired by seed. What was measured is kept in
`--runs`.
"""

import argparse
import datetime
import statistics
from pathlib import Path
from typing import Any

import datasets
from compare_heads import CAPSULES, HEADS, add_options, combination, draw_texts, make_sweep
from kept_runs import keep_settings
from results_pages.marks import add_page_options, put_between_marks
from results_pages.tables import markdown, percent
from transformers.utils import logging as transformers_logging

from capsule_heads.cli.options import OneLineParser, fail
from capsule_heads.data.encodings import ENCODINGS
from capsule_heads.files import read_json, write_json

SETTINGS = {"learning_rate": 1e-2, "n_parts": 64, "n_iters": 2}


def measure(options: argparse.Namespace, encoding: str) -> dict[str, Any]:
    """Train and test heads on states of an encoding, or read what was found."""
    file = Path(options.runs, options.set, f"{encoding}.json")
    if file.exists():
        return read_json(file)
    task = draw_texts(options)
    combinations = [combination(HEADS[CAPSULES], SETTINGS)]
    sweep = make_sweep(options, task, combinations, range(options.seeds), file.with_suffix(""), encoding)
    sweep.train()
    for member in sweep.members:
        if member.fault is not None:
            raise FloatingPointError(f"{encoding}, seed {member.seed}: {member.fault}.")
    token_bytes = ENCODINGS[encoding].token_bytes(
        (len(sweep.run.model.config.layers), sweep.run.model.config.hidden_sizes[0])
    )
    found = {
        "bytes": token_bytes,
        "texts": {name: len(cache) for name, cache in sweep.caches.items()},
        **{name: [x.found[name]["accuracy"] for x in sweep.members] for name in sweep.caches},
    }
    write_json(file, found)
    return found


def make_table(found: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of the encodings; differences are from the first."""
    first, lines = next(iter(found.values())), []
    for encoding, of_encoding in found.items():
        differences = [x - y for x, y in zip(of_encoding["test"], first["test"], strict=True)]
        spread = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
        difference = "" if of_encoding is first else f"{100 * statistics.mean(differences):+.2f} ± {100 * spread:.2f}"
        cells = [percent(of_encoding[split]) for split in ("validation", "test")]
        lines.append([encoding, f"{of_encoding['bytes']:,}", *cells, difference])
    return markdown(["states", "bytes a token", "validation, %", "test, %", "difference from the first, points"], lines)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, max_texts=8_000)
    parser.add_argument("--runs", default="runs/encodings", help="folder for what is measured")
    add_page_options(parser)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        asked = {name: getattr(options, name) for name in ("backbone", "max_texts", "steps", "seeds")}
        keep_settings(Path(options.runs, options.set), settings=SETTINGS, **asked)
        found = {encoding: measure(options, encoding) for encoding in ENCODINGS}
        table = make_table(found)
        if options.page is not None:
            texts = next(iter(found.values()))["texts"]["test"]
            about = f"{options.set}, {texts:,} test texts, {options.seeds} seeds, {options.steps} steps"
            put_between_marks(
                options.page, "encodings", f"{about}; {options.machine}, {datetime.date.today()}.\n\n{table}"
            )
    except (FloatingPointError, ImportError, OSError, TypeError, ValueError) as error:
        fail(error)
    print(table)


if __name__ == "__main__":
    main()
