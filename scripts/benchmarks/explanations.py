"""Measure how faithful explanations of texts are, against other methods, and what they cost.

    python scripts/benchmarks/explanations.py MODEL --task sst2_root --json explanations.json --picture deletion.png

For sentences of the test split, drawn at random, the script prints comprehensiveness and sufficiency (see
`capsule_heads.explain.faithfulness`) with standard errors over sentences, and the time of an explanation, one sentence
at a time. It draws deletion curves. The other methods are Captum's integrated gradients and gradient x input, attention
rollout, leave-one-out and a random order.
"""

import argparse
import datetime
import statistics

import torch
from transformers import AutoTokenizer

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.cli.options import OneLineParser, at_least, fail, file_to_write
from capsule_heads.explain.faithfulness import compare_methods
from capsule_heads.explain.pictures import draw_deletion
from capsule_heads.files import write_json
from capsule_heads.tasks import get_task


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or Hub name of a classifier of texts")
    parser.add_argument("--task", default="sst2_root", help="task whose test split is explained")
    parser.add_argument("--source", help="where the task's data is")
    parser.add_argument("--max_texts", type=at_least(0), default=500, help="drawn at random; 0 for all")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--json", type=file_to_write, help="file for all numbers")
    parser.add_argument("--picture", type=file_to_write, help="file for the deletion curves")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    try:
        task = get_task(options.task)
        split = task.load(options.source, phrases=False)["test"]
        if task.modality != "text" or "text_pair" in split.column_names:
            raise ValueError(f"task is {task.name}; expected a task of single texts, such as sst2_root.")
        texts = split.shuffle(seed=options.seed).select(range(min(options.max_texts or len(split), len(split))))["text"]
        model = CapsuleHeadForSequenceClassification.from_pretrained(options.model, freeze_backbone=False)
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
        found = compare_methods(model, tokenizer, list(texts))
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
