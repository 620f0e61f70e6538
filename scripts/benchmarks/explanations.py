"""Measures how faithful explanations of texts are, against other methods, and what they cost.

    python scripts/benchmark_explanations.py MODEL --task sst2_root --json explanations.json --picture deletion.png

For sentences of the test split, drawn at random: comprehensiveness and sufficiency (see `capsule_heads.explain.faithfulness`),
with standard errors over sentences, deletion curves, and time per explanation, one sentence at a time. Captum's
integrated gradients and gradient x input, attention rollout, leave-one-out and a random order are the others.
"""

import sys
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # has an evaluate.py

import argparse
import datetime
import statistics

import torch
from transformers import AutoTokenizer

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.cli.options import OneLineParser, at_least, fail, file_to_write
from capsule_heads.explain.faithfulness import compare_methods
from capsule_heads.files import write_json
from capsule_heads.pictures import draw_deletion
from capsule_heads.training.experiment import load_task


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or Hub name of a classifier of texts")
    parser.add_argument("--task", default="sst2_root", help="whose test split to explain")
    parser.add_argument("--source", help="where the task's data is")
    parser.add_argument("--max_texts", type=at_least(0), default=500, help="drawn at random; 0 for all")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--json", type=file_to_write, help="file for all numbers")
    parser.add_argument("--picture", type=file_to_write, help="file for the deletion curves")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    try:
        split = load_task(options.task, options.source, phrases=False)["test"]
        if "text" not in split.column_names:
            raise ValueError(f"{options.task} is of images; expected a task of texts.")
        texts = split.shuffle(seed=options.seed).select(range(min(options.max_texts or len(split), len(split))))["text"]
        model = CapsuleHeadForSequenceClassification.from_pretrained(options.model, freeze_backbone=False)
        found = compare_methods(model, AutoTokenizer.from_pretrained(options.model), list(texts))
        if options.picture:
            curves = {name: torch.tensor([x.deletion for x in all_texts]).mean(0) for name, all_texts in found.items()}
            draw_deletion(curves).savefig(options.picture)
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(error)
    print(
        f"{len(texts)} texts, {torch.get_num_threads()} threads, torch {torch.__version__}, {datetime.date.today()}\n"
    )
    print("| method | comprehensiveness | sufficiency | ms an explanation, median |\n| --- | --- | --- | --- |")
    for name, of_texts in found.items():
        cells = [mean_and_error([getattr(x, key) for x in of_texts]) for key in ("comprehensiveness", "sufficiency")]
        print(f"| {name} | {cells[0]} | {cells[1]} | {1e3 * statistics.median(x.seconds for x in of_texts):.1f} |")
    if options.json:
        rows = {name: [x._asdict() for x in of_texts] for name, of_texts in found.items()}
        measured_with = {name: value for name, value in vars(options).items() if name not in ("json", "picture")}
        write_json(options.json, {"options": measured_with, "texts": list(texts), "methods": rows})


def mean_and_error(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
