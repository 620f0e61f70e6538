"""Compare heads where examples are few, labels are wrong, texts are long, or of no class, and by their calibration.

    python scripts/benchmarks/conditions.py --set trec --of_no_class subj --data DIRECTORY

Heads have the settings that compare_heads.py found best on the set (`--results`). Training texts are drawn once for
each condition, and heads are trained on them from several seeds, as compare_heads.py trains them. All are measured on
the test split: accuracy; expected calibration error, with 15 bins; and how well the largest probability tells the test
split from that of another set (`--of_no_class`), as the area under the ROC curve. "Short" are the texts of the train
split that are no longer than its median. What is trained on these, or on as many of all lengths, is measured on longer
test texts.

What was measured is kept in `--runs`, and is not measured again.
"""

import argparse
import datetime
import platform
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from compare_heads import BACKBONE, CAPSULES, HEADS, REGRESSION, combination, make_sweep
from datasets import Dataset, DatasetDict
from kept_runs import keep_settings
from regressions import choose_regression, pool_states
from results_pages.tables import markdown, percent
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from text_sets import OF_CSV, load_text_set, task_of
from transformers.utils import logging as transformers_logging

from capsule_heads.cli.options import OneLineParser, at_least, fail
from capsule_heads.data import HiddenStateCache, tokenize
from capsule_heads.files import read_json, write_json
from capsule_heads.metrics.scores import measure_calibration
from capsule_heads.training import Sweep
from capsule_heads.training.members import Member

MEASURED = (CAPSULES, "gated routing", "attentive pooling", REGRESSION)


def all_rows(train: Dataset) -> Dataset:
    """Return the train split as it is."""
    return train


def of_each_class(n: int) -> Callable[[Dataset], Dataset]:
    """Return a condition: `n` rows of each class, or all of a class that has fewer."""

    def draw(train: Dataset) -> Dataset:
        labels, rows = np.asarray(train["label"][:]), []
        for label in range(train.features["label"].num_classes):
            rows += np.flatnonzero(labels == label)[:n].tolist()  # the split was shuffled
        return train.select(sorted(rows))

    return draw


def wrong(part: float) -> Callable[[Dataset], Dataset]:
    """Return a condition: a part of the labels is replaced by another class, drawn at random."""

    def draw(train: Dataset) -> Dataset:
        rng, labels, n = random.Random(0), train["label"][:], train.features["label"].num_classes
        for row in rng.sample(range(len(labels)), round(part * len(labels))):
            labels[row] = (labels[row] + rng.randrange(1, n)) % n
        features = train.features
        return train.remove_columns("label").add_column("label", labels).cast(features)

    return draw


def lengths(split: Dataset) -> np.ndarray:
    """Return the number of words of each text."""
    return np.asarray([len(text.split()) for text in split["text"][:]])


def short(train: Dataset) -> Dataset:
    """Return the texts that are no longer than the median."""
    words = lengths(train)
    return train.select(np.flatnonzero(words <= np.median(words)))


def as_many(train: Dataset) -> Dataset:
    """Return as many texts as are short, of all lengths."""
    return train.select(range(len(short(train))))


CONDITIONS: dict[str, Callable[[Dataset], Dataset]] = {
    "all rows": all_rows,
    "8 of each class": of_each_class(8),
    "16 of each class": of_each_class(16),
    "64 of each class": of_each_class(64),
    "20% of labels wrong": wrong(0.2),
    "40% of labels wrong": wrong(0.4),
    "short texts": short,
    "as many, of all lengths": as_many,
}
ON_LONG = ("short texts", "as many, of all lengths")  # measured on long test texts


@torch.no_grad()
def probabilities(member: Member, sweep: Sweep, cache: HiddenStateCache) -> np.ndarray:
    """Return the probability of each class for each text of a cache, `[n, classes]`."""
    model, found = member.model.eval(), []
    for start in range(0, len(cache), 64):
        batch = sweep.run.collator([cache[row] for row in range(start, min(start + 64, len(cache)))])
        found.append(model(**member.select(batch)).logits.softmax(-1))
    return torch.cat(found).double().numpy()


def measure(of_test: np.ndarray, of_none: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return what is measured of a model, from its probabilities for the test split and for texts of no class."""
    is_right = of_test.argmax(1) == labels
    confidence = [x.max(1) for x in (of_test, of_none)]
    is_of_a_class = np.repeat([1, 0], [len(of_test), len(of_none)])
    return {
        "accuracy": float(is_right.mean()),
        "ece": measure_calibration(confidence[0], is_right)["expected_calibration_error"],
        "auroc": float(roc_auc_score(is_of_a_class, np.concatenate(confidence))),
    }


def run_condition(
    options: argparse.Namespace, condition: str, splits: DatasetDict, others: Dataset, best: dict[str, Any]
) -> list[dict[str, Any]]:
    """Train all heads under a condition, and return a record for each head and seed."""
    drawn = DatasetDict({**splits, "train": CONDITIONS[condition](splits["train"])})
    if condition in ON_LONG:
        limit = np.median(lengths(splits["train"]))
        longer = np.flatnonzero(lengths(splits["test"]) > limit)
        if not len(longer):
            raise ValueError(f"No test text has more than {limit:g} words, the median; leave out {condition!r}.")
        drawn["test"] = splits["test"].select(longer)
    task = task_of(drawn)
    names = [name for name in MEASURED if name != REGRESSION]
    folder = Path(options.runs, options.set, condition.replace(" ", "_").replace("%", "").replace(",", ""))
    combinations = [combination(HEADS[name], best[name]) for name in names]
    sweep = make_sweep(options, task, combinations, range(options.seeds), folder)
    sweep.train()
    caches = {"train": sweep.run.train_data, **sweep.caches}
    tokenized = tokenize(others, sweep.run.processor)
    of_none = HiddenStateCache(tokenized, sweep.run.model, sweep.run.processor)
    labels = np.asarray(caches["test"]["labels"][:])
    records = []
    for name, member in zip([name for name in names for _ in range(options.seeds)], sweep.members, strict=True):
        if member.fault is not None:
            raise FloatingPointError(f"{condition}, {name}, seed {member.seed}: {member.fault}.")
        found = measure(*(probabilities(member, sweep, cache) for cache in (caches["test"], of_none)), labels)
        records.append({"condition": condition, "head": name, "seed": member.seed, **found})
    pooled = {x: pool_states(cache).reshape(len(cache), -1) for x, cache in {**caches, "none": of_none}.items()}
    data = {x: (pooled[x], caches[x]["labels"][:]) for x in ("train", "validation")}
    model, _ = choose_regression(StandardScaler(), (best[REGRESSION]["C"],), **data, max_iter=300)
    found = measure(model.predict_proba(pooled["test"]), model.predict_proba(pooled["none"]), labels)
    return [*records, {"condition": condition, "head": REGRESSION, "seed": None, **found}]


def make_table(records: Sequence[dict[str, Any]], rows: dict[str, int]) -> str:
    """Return a Markdown table: a line for each condition and head.

    Args:
        records: of all runs.
        rows: number of training texts by condition.
    """
    lines = []
    for condition, n_rows in rows.items():
        for name in MEASURED:
            runs = [x for x in records if (x["condition"], x["head"]) == (condition, name)]
            cells = [percent([x[key] for x in runs]) for key in ("accuracy", "ece", "auroc")]
            lines.append([condition, f"{n_rows:,}", name, *cells])
    heading = ["condition", "texts", "head", "accuracy, %", "calibration error, %", "AUROC of no class, %"]
    return markdown(heading, lines)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", required=True, choices=OF_CSV)
    parser.add_argument("--of_no_class", required=True, choices=OF_CSV, help="set whose test texts are of no class")
    parser.add_argument("--data", required=True, help="folder with a folder for each set of CSV files")
    parser.add_argument("--backbone", default=BACKBONE)
    parser.add_argument("--steps", type=at_least(1), default=600)
    parser.add_argument("--seeds", type=at_least(1), default=3, help="number of seeds, from 0 on")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS), help="default: all")
    parser.add_argument("--results", default="docs/benchmarks/heads", help="folder of what compare_heads.py found")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", default="runs/conditions", help="folder for what is measured")
    options = parser.parse_args()
    if options.set == options.of_no_class:
        fail(f"--of_no_class {options.of_no_class} is the set itself; expected another.")
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    file = Path(options.runs, options.set, "runs.json")
    try:
        best = read_json(Path(options.results, f"{options.set}.json"))["best"]
        best = {name: best[name] for name in MEASURED}
        settings = {"settings": best, "of_no_class": options.of_no_class, "backbone": options.backbone}
        keep_settings(file.parent, **settings, steps=options.steps, seeds=options.seeds)
        splits = load_text_set(options.set, options.data, None)
        splits["train"] = splits["train"].shuffle(seed=0)
        others = load_text_set(options.of_no_class, options.data, None)["test"]
        records: list[dict[str, Any]] = read_json(file, list) if file.exists() else []
        for condition in options.conditions:
            if not any(x["condition"] == condition for x in records):
                records += run_condition(options, condition, splits, others, best)
                write_json(file, records)
        rows = {condition: len(CONDITIONS[condition](splits["train"])) for condition in options.conditions}
    except (FloatingPointError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
        fail(error)
    print(f"{options.set}; of no class: {options.of_no_class}; {platform.machine()}, {datetime.date.today()}\n")
    print(make_table(records, rows))


if __name__ == "__main__":
    main()
