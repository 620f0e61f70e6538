"""Measure how faithful explanations of texts are, beside other methods, and what they cost.

    python scripts/benchmarks/explanations.py MODEL ... --set trec --data DIRECTORY --json trec.json
    python scripts/benchmarks/explanations.py --table trec.json sst2.json --page docs/concepts/credits.md

For texts of the test split, drawn at random, the script measures each method on each model, such as the seeds of one
head: comprehensiveness, sufficiency and log-odds where tokens are masked and where they are replaced by the mask token,
normalised AOPC, rank correlation with a head of shuffled weights (see `capsule_heads.explain.faithfulness`), and the
time of an explanation, one text at a time. The second command prints tables of such files, and one that compares their
heads. The other methods are in `capsule_heads.explain.methods`.
"""

import argparse
import datetime
import math
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from results_pages.marks import put_between_marks
from text_sets import OF_CSV, OF_TREES, load_text_set
from transformers import AutoTokenizer

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.cli.options import OneLineParser, at_least, fail, file_to_write
from capsule_heads.explain.faithfulness import DELETED, compare_methods
from capsule_heads.explain.methods import CREDITS, LEAVE_ONE_OUT, THROUGH_BACKBONE
from capsule_heads.explain.pictures import draw_deletion
from capsule_heads.files import read_json, write_json

TEXTS = 20
# Heading, value of a measurement, digits.
COLUMNS = {
    "comprehensiveness": (lambda x: x["masked"]["comprehensiveness"], 3),
    "sufficiency": (lambda x: x["masked"]["sufficiency"], 3),
    "log-odds": (lambda x: x["masked"]["log_odds"], 2),
    "comprehensiveness, [MASK]": (lambda x: x["replaced"]["comprehensiveness"] if x["replaced"] else math.nan, 3),
    "sufficiency, [MASK]": (lambda x: x["replaced"]["sufficiency"] if x["replaced"] else math.nan, 3),
    "NAOPC": (lambda x: x["naopc"], 3),
    "sanity": (lambda x: x["sanity"], 2),
}


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="directories or Hub names of classifiers of texts with one head")
    parser.add_argument("--set", choices=(*OF_CSV, *OF_TREES), help="set whose test split is explained")
    parser.add_argument("--data", help="folder with a folder for each set of CSV files")
    parser.add_argument("--trees", help="folder of the Stanford Sentiment Treebank")
    parser.add_argument("--max_texts", type=at_least(1), help=f"the same for all models (default: {TEXTS})")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the choice of texts")
    parser.add_argument("--json", type=file_to_write, help="file for all numbers")
    parser.add_argument("--picture", type=file_to_write, help="file for the deletion curves of the first model")
    parser.add_argument("--table", nargs="+", metavar="JSON", help="files of earlier runs to print tables of, instead")
    parser.add_argument("--page", type=Path, help="page to write tables to, between its marks")
    options = parser.parse_args()
    if options.page and not options.table:
        fail("--page without --table; expected files of earlier runs.")
    if bool(options.table) == bool(options.models):
        fail("Expected models to measure, or --table with files of earlier runs: one of them.")
    if options.models and options.set is None:
        fail("models without --set; expected the set whose test split is explained.")
    unused = [name for name in ("set", "data", "trees", "max_texts", "json", "picture") if getattr(options, name)]
    if options.table and unused:
        fail(f"--{unused[0]} with --table, which measures nothing; leave it out.")
    datasets.disable_progress_bars()
    try:
        runs = [read_json(path) for path in options.table] if options.table else [measure(options)]
        tables = ([compare_heads(runs)] if len(runs) > 1 else []) + [make_table(run) for run in runs]
        if options.page:
            put_between_marks(options.page, "measured", "\n\n".join(tables))
        else:
            print("\n\n".join(tables))
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(error)
    if options.json:
        write_json(options.json, runs[0])
    if options.picture:
        of_methods = runs[0]["models"][0]["methods"]
        curves = {name: mean_curve([x["masked"]["deletion"] for x in rows]) for name, rows in of_methods.items()}
        draw_deletion(curves).savefig(options.picture)


def measure(options: argparse.Namespace) -> dict:
    """Measure all methods on all models, and return all numbers."""
    split = load_text_set(options.set, options.data, options.trees)["test"].shuffle(seed=options.seed)
    texts = list(split.select(range(min(options.max_texts or TEXTS, len(split))))["text"])
    models = []
    for name in options.models:
        torch.manual_seed(options.seed)
        model = CapsuleHeadForSequenceClassification.from_pretrained(name, freeze_backbone=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        found = compare_methods(model, tokenizer, texts)
        rows = {method: [as_dict(x) for x in of_texts] for method, of_texts in found.items()}
        about = {"name": Path(name).name, "head": model.config.head_type, "accuracy": accuracy_of(name)}
        models.append({**about, "methods": rows})
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    about = {"set": options.set, "seed": options.seed, "machine": machine, "date": str(datetime.date.today())}
    return {**about, "texts": texts, "models": models}


def as_dict(found: object) -> object:
    """Return a tuple with names as a dictionary, and NaN, which JSON has not, as None."""
    if hasattr(found, "_asdict"):
        return {name: as_dict(value) for name, value in found._asdict().items()}
    return None if isinstance(found, float) and math.isnan(found) else found


def make_table(run: dict) -> str:
    """Return the means of a run, with their standard errors over texts, each the mean of its models."""
    heads = ", ".join(sorted({model["head"] for model in run["models"]}))
    n_texts, n_models = len(run["texts"]), len(run["models"])
    title = f"**{run['set']}, {heads}**: {n_texts} texts, {n_models} models; {run['machine']}, {run['date']}"
    lines = [title, "", f"| method | {' | '.join(COLUMNS)} | ms, median |", "|" + " --- |" * (len(COLUMNS) + 2)]
    for method in run["models"][0]["methods"]:
        rows = [model["methods"][method] for model in run["models"]]
        cells = [mean_and_error(rows, value, digits) for value, digits in COLUMNS.values()]
        lines.append(f"| {method} | {' | '.join(cells)} | {milliseconds(rows)} |")
    return "\n".join(lines)


def milliseconds(rows: list[list[dict]]) -> str:
    """Return the median time of an explanation."""
    return f"{1e3 * statistics.median(x['seconds'] for of_model in rows for x in of_model):.0f}"


def mean_and_error(rows: list[list], value: Callable[[Any], float], digits: int) -> str:
    """Return the mean over texts of the means over models, and its standard error."""
    of_texts = []
    for of_models in zip(*rows, strict=True):
        known = [x for x in map(value, of_models) if x is not None and not math.isnan(x)]
        if known:
            of_texts.append(statistics.fmean(known))
    if not of_texts:
        return "-"
    mean = f"{statistics.fmean(of_texts):.{digits}f}"
    if len(of_texts) == 1:
        return f"{mean} (one text)"
    return f"{mean} ± {statistics.stdev(of_texts) / len(of_texts) ** 0.5:.{digits}f}"


def compare_heads(runs: list[dict]) -> str:
    """Return a table of the accuracy, faithfulness and time of the heads of several runs, of credits of both kinds."""
    of_credits = ("NAOPC", "comprehensiveness less that of leave one out", "ms")
    heading = [*of_credits, *(f"{name}, through the backbone" for name in of_credits), "ms, leave one out"]
    lines = [f"| set | head | accuracy, % | {' | '.join(heading)} |", "|" + " --- |" * 10]
    comprehensiveness, naopc = COLUMNS["comprehensiveness"][0], COLUMNS["NAOPC"][0]
    for run in runs:
        models = run["models"]
        accuracies = [100 * x["accuracy"] for x in models if x["accuracy"] is not None]
        cells = [run["set"], models[0]["head"], f"{statistics.fmean(accuracies):.1f}" if accuracies else "-"]
        for method in (CREDITS, THROUGH_BACKBONE):
            rows, reference = ([x["methods"][name] for x in models] for name in (method, LEAVE_ONE_OUT))
            pairs = [list(zip(*of_model, strict=True)) for of_model in zip(rows, reference, strict=True)]
            cells += [
                mean_and_error(rows, naopc, 3),
                mean_and_error(pairs, lambda pair: comprehensiveness(pair[0]) - comprehensiveness(pair[1]), 3),
                milliseconds(rows),
            ]
        cells.append(milliseconds([x["methods"][LEAVE_ONE_OUT] for x in models]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def accuracy_of(name: str) -> float | None:
    """Return the accuracy on the test split that the run has found which made a model; None where it is not known."""
    file = Path(name, "results.json")
    return read_json(file).get("test_accuracy") if file.is_file() else None


def mean_curve(curves: list[list[float]]) -> list[float]:
    return [statistics.fmean(curve[n] for curve in curves) for n in range(len(DELETED))]


if __name__ == "__main__":
    main()
