"""Check which of transformers' backbones work under a head.

    python scripts/benchmarks/check_backbones.py
    python scripts/benchmarks/check_backbones.py --types bert,t5

The script builds a tiny random model of every type, each in its own process with a time limit, trains a head on it for
a step, saves and loads it. It writes the table as Markdown and JSON, and renews both after every type. It runs offline,
also where a configuration names weights on the Hub.
"""

import argparse
import datetime
import json
import os
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported

import torch
import transformers
from backbone_check import check_apart
from results_pages.backbones import render
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from capsule_heads.cli.options import OneLineParser, at_least


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="comma-separated; by default all. Rows of other types are kept.")
    parser.add_argument(
        "--output", default="docs/reference/backbones", help="path without .md and .json (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=at_least(1), default=60, help="CPU time limit for each type (default: %(default)s)"
    )
    options = parser.parse_args()
    names = options.types.split(",") if options.types else list(MODEL_MAPPING_NAMES)
    unknown = sorted(set(names) - set(MODEL_MAPPING_NAMES))
    if unknown:
        parser.error(f"transformers {transformers.__version__} has no model of type {', '.join(unknown)}")
    output = Path(options.output)
    table, markdown = output.with_name(output.name + ".json"), output.with_name(output.name + ".md")
    types = json.loads(table.read_text(encoding="utf-8"))["types"] if options.types and table.is_file() else {}

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # a forked process has no threads to share
    for name, found in check_apart(names, options.seconds):
        types[name] = found
        print(name, "works" if found["works"] else found["reason"], flush=True)
        report = {
            "date": datetime.date.today().isoformat(),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "types": dict(sorted(types.items())),
        }
        table.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        markdown.write_text(render(report), encoding="utf-8")
    works = sum(found["works"] for found in types.values())
    print(f"{works} of {len(types)} types work; see {markdown}")


if __name__ == "__main__":
    main()
