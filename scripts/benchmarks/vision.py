"""Train the paper's vision network and its controls on toyNORB, and measure them on the way and from new viewpoints.

    python scripts/benchmarks/vision.py --steps 15000 --seeds 3
    python scripts/benchmarks/vision.py --steps 60750 --seeds 3 --device cuda          # the paper's number of steps
    python scripts/benchmarks/vision.py --steps 8000 --seeds 3 --viewpoints azimuth    # or elevation
    python scripts/benchmarks/vision.py --steps 15000 --seeds 3 --estimate             # how long it would take

The set has 24,300 pairs of 50 toys to train on, 486 views of each, and 9,720 pairs of 20 other toys for the test. All
networks have the same backbone, trained from random weights in the paper's regime: batches of 20 random crops, RAdam,
one cycle. With `--viewpoints`, a network is trained on a third of the azimuths, or of the elevations. The test split is
then two: familiar viewpoints and novel ones. A control is measured where its accuracy on familiar viewpoints came
nearest to that of the capsule network at its end, as Hinton et al. (2018) do.

A run is a folder in `--runs`. One that was stopped resumes from its last checkpoint.
"""

import argparse
import dataclasses
import datetime
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import DatasetDict
from kept_runs import keep_settings
from results_pages.tables import markdown, percent
from transformers import PrinterCallback, TrainerCallback
from variants import register_variants

from capsule_heads.cli.options import OneLineParser, at_least, fail
from capsule_heads.files import read_json, write_json
from capsule_heads.paper import PAPER
from capsule_heads.paper.toy_norb import load_toy_norb
from capsule_heads.tasks import Task, get_task
from capsule_heads.training import CapsuleTrainingArguments
from capsule_heads.training.run import DataArguments, ModelArguments, TrainingRun

CAPSULES = "spatial pose"
NETWORKS: dict[str, dict[str, Any]] = {
    CAPSULES: {"head_type": "spatial_pose"},
    "spatial pose, no mixup": {"head_type": "spatial_pose", "mixup_alpha": 0.0},
    "spatial pose, learning rate 0.002": {"head_type": "spatial_pose", "learning_rate": 2e-3},
    "spatial pose, betas at 0.07": {"head_type": "spatial_betas"},
    "spatial pose, votes alike": {"head_type": "spatial_alike"},
    "spatial pose, both": {"head_type": "spatial_both"},
    "attentive pooling": {"head_type": "attentive_pooling", "layers": [-1]},
    "linear": {"head_type": "linear"},
}
FAMILIAR = {"azimuth": range(0, 12, 2), "elevation": range(3)}  # of 18 azimuths, numbered 0 to 34, and 9 elevations
FAMILIAR_TEST, NOVEL_TEST = "test_familiar", "test_novel"
SIZES = {"n_train_instances": 10, "n_validation_instances": 2, "n_test_instances": 4, "n_views": 486}
TIMED = 10  # steps of an estimate
RESULTS = "marks.json"


class Marks(TrainerCallback):
    """Asks for an evaluation after some steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = set(steps)

    def on_step_end(self, args, state, control, **others):
        control.should_evaluate = state.global_step in self.steps
        return control


def load(options: argparse.Namespace) -> Task:
    """Return a task with toyNORB's pairs, or those of some viewpoints."""
    splits = load_toy_norb(**SIZES)
    factor = options.viewpoints
    if factor is not None:
        chosen = list(FAMILIAR[factor])
        is_familiar = {name: [x in chosen for x in split[factor][:]] for name, split in splits.items()}
        familiar = {name: [row for row, yes in enumerate(of_split) if yes] for name, of_split in is_familiar.items()}
        novel = [row for row, yes in enumerate(is_familiar["test"]) if not yes]
        splits = DatasetDict(
            {
                "train": splits["train"].select(familiar["train"]),
                "validation": splits["validation"].select(familiar["validation"]),
                FAMILIAR_TEST: splits["test"].select(familiar["test"]),
                NOVEL_TEST: splits["test"].select(novel),
            }
        )
    return dataclasses.replace(get_task("toy_norb"), loader=lambda source: splits)


def make_run(options: argparse.Namespace, task: Task, name: str, seed: int, steps: int, folder: Path) -> TrainingRun:
    """Return a run of a network that is ready to train."""
    fields = {**PAPER, **NETWORKS[name]}
    rate = {"learning_rate": fields.pop("learning_rate")} if "learning_rate" in fields else {}
    last = "last" if any(folder.glob("checkpoint-*")) else None
    arguments = CapsuleTrainingArguments(
        str(folder),
        recipe="paper",
        max_steps=steps,
        seed=seed,
        save_strategy="steps",
        save_steps=500,
        save_total_limit=1,
        logging_steps=500,
        use_cpu=options.device == "cpu",
        per_device_eval_batch_size=64,
        dataloader_num_workers=options.workers,
        disable_tqdm=True,
        resume_from_checkpoint=last,
        **rate,
    )
    model = ModelArguments("new:stereo_conv", freeze_backbone=False, **fields)
    return TrainingRun(DataArguments(task=task.name), model, {}, arguments, task=task)


def train(options: argparse.Namespace, task: Task, name: str, seed: int) -> dict[str, Any]:
    """Train a network, or read what was found of it: its accuracies by step and split."""
    words = "_".join([options.viewpoints or "all", str(options.steps), name, str(seed)])
    folder = Path(options.runs, words.replace(" ", "_").replace(",", ""))
    file = folder / RESULTS
    if file.exists():
        return read_json(file)
    run = make_run(options, task, name, seed, options.steps, folder)
    run.trainer.eval_dataset = run.tests
    run.trainer.remove_callback(PrinterCallback)
    run.trainer.add_callback(Marks(options.marks))
    run.trainer.train(resume_from_checkpoint=run.checkpoint)
    marks: dict[str, dict[str, float]] = {}
    for entry in run.trainer.state.log_history:
        of_split = {key[5 : -len("_accuracy")]: x for key, x in entry.items() if key.endswith("_accuracy")}
        marks.setdefault(str(entry["step"]), {}).update(of_split)
    found = {
        "network": name,
        "seed": seed,
        "parameters": run.model.num_parameters(),
        "marks": {step: of_step for step, of_step in marks.items() if of_step},
    }
    write_json(file, found)
    print(f"{name}, seed {seed}: {marks[str(options.steps)]}", file=sys.stderr, flush=True)
    return found


def estimate(options: argparse.Namespace, task: Task) -> None:
    """Print how long the runs would take, by some steps of each network; without evaluations."""
    total = 0.0
    for name in options.networks:
        run = make_run(options, task, name, 0, TIMED, Path(options.runs, "estimate"))
        run.trainer.args.save_strategy = "no"
        start = time.perf_counter()
        run.trainer.train()
        seconds = (time.perf_counter() - start) / TIMED
        hours = seconds * options.steps * options.seeds / 3600
        total += hours
        print(f"{name}: {seconds:.2f} s a step, {hours:.1f} h for {options.seeds} runs of {options.steps:,} steps")
    print(f"Together {total:.1f} h; {platform.machine()}, {torch.get_num_threads()} threads, {options.device}.")


def make_table(options: argparse.Namespace, found: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of test accuracies by step, or of familiar and novel viewpoints."""
    by_network = {name: [x for x in found if x["network"] == name] for name in options.networks}
    if options.viewpoints is None:
        rows = [
            [
                name,
                *(percent([x["marks"][str(mark)]["test"] for x in runs]) for mark in options.marks),
                f"{runs[0]['parameters']:,}",
            ]
            for name, runs in by_network.items()
        ]
        return markdown(["network", *(f"{mark:,}" for mark in options.marks), "trainable parameters"], rows)
    rows, last = [], str(options.marks[-1])
    aims = {x["seed"]: x["marks"][last][FAMILIAR_TEST] for x in by_network.get(CAPSULES, [])}
    for name, runs in by_network.items():
        cells = [percent([x["marks"][last][split] for x in runs]) for split in (FAMILIAR_TEST, NOVEL_TEST)]
        if name != CAPSULES and aims:
            nearest = [match(x["marks"], aims[x["seed"]]) for x in runs]
            cells.append(", ".join(f"{int(step):,}" for step in nearest))
            for split in (FAMILIAR_TEST, NOVEL_TEST):
                cells.append(percent([x["marks"][step][split] for x, step in zip(runs, nearest, strict=True)]))
        rows.append([name, *cells, *[""] * (5 - len(cells))])
    return markdown(["network", "familiar", "novel", "step", "familiar, matched", "novel, matched"], rows)


def match(marks: dict[str, dict[str, float]], aim: float) -> str:
    """Return the first step at which accuracy on familiar viewpoints is nearest to one that is aimed at."""
    return min(marks, key=lambda step: (abs(marks[step][FAMILIAR_TEST] - aim), int(step)))


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: all")
    parser.add_argument("--steps", type=at_least(1), default=15_000)
    parser.add_argument("--seeds", type=at_least(1), default=3, help="number of seeds, from 0 on")
    parser.add_argument("--marks", type=at_least(1), nargs="+", help="steps to evaluate after (default: 8 of them)")
    parser.add_argument("--viewpoints", choices=FAMILIAR, help="train on a third of these; default: on all")
    parser.add_argument("--workers", type=at_least(0), default=0, help="processes that read images")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--estimate", action="store_true", help="print how long it would take, and train nothing")
    parser.add_argument("--runs", default="runs/vision", help="folder for runs")
    options = parser.parse_args()
    options.marks = sorted({*(options.marks or (options.steps * part // 8 for part in range(1, 9))), options.steps})
    if options.marks[-1] > options.steps:
        fail(f"--marks has {options.marks[-1]:,}, and --steps is {options.steps:,}; expected none beyond.")
    options.marks = [mark for mark in options.marks if mark]
    datasets.disable_progress_bars()
    register_variants()
    try:
        task = load(options)
        if options.estimate:
            estimate(options, task)
            return
        keep_settings(options.runs, marks=options.marks)
        found = [train(options, task, name, seed) for seed in range(options.seeds) for name in options.networks]
    except (FloatingPointError, ImportError, OSError, TypeError, ValueError) as error:
        fail(error)
    print(f"{options.viewpoints or 'all'} viewpoints, {options.steps:,} steps, {options.seeds} seeds; ", end="")
    print(f"{platform.machine()}, {options.device}, {datetime.date.today()}\n")
    print(make_table(options, found))


if __name__ == "__main__":
    main()
