"""`capsule-heads evaluate`: evaluate a trained model on labelled data."""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import Command, OneLineParser, add_hidden_states, at_least, one_line_errors
from .options.quiet import without_data_bars

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data import OwnData
    from ..models import CapsuleHeadClassifier

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Evaluate a trained model on labelled data of your own, or on a task's split. It prints tables, and writes "
    "evaluation.json with all figures, and pictures of the confusion matrix and of the reliability of probabilities."
)
FIGURES = "evaluation.json"
OF_DATA = ("text", "label")  # options without effect on a task


def make_parser(prog: str) -> OneLineParser:
    """Return the parser of options."""
    parser = OneLineParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("model", help="Directory or Hub name of the model.")
    add_data_options(parser)
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="Batch size (default: %(default)s).")
    add_hidden_states(parser)
    parser.add_argument(
        "--output_dir",
        help="Folder to write to (default: evaluation-NAME in the model's folder; here if the model is on the Hub).",
    )
    return parser


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `load_splits`."""
    from ..tasks import registered_tasks, source_help

    parser.add_argument("--data", help="Labelled data of your own, in any form that train --data takes.")
    parser.add_argument("--text", metavar="COLUMN[,COLUMN]", help="Column of texts, or two for pairs.")
    parser.add_argument("--label", metavar="COLUMN[,COLUMN]", help="Column of labels, or columns of 0 and 1.")
    parser.add_argument("--task", metavar="TASK", choices=registered_tasks(), help="Task whose data to use.")
    parser.add_argument("--source", help=source_help())
    parser.add_argument(
        "--split", help="Split, such as test (default: validation for a task, the only split for your own data)."
    )


def run(options: argparse.Namespace) -> None:
    """Evaluate a model, and print and write the results."""
    from ..tasks import get_task, load_classifier

    with one_line_errors(), without_data_bars():
        check_data_options(options)
        model = load_classifier(options.model)
        processor, splits = load_splits(options, model)
    metric = get_task(options.task).metric if options.task else None
    with one_line_errors(FloatingPointError, OSError, ValueError):
        for name, split in splits.items():
            found = _measure(model, processor, split, options, metric)
            _write(found, _folder(options, name, len(splits)), f"{options.task or options.data}, {name}")


def check_data_options(options: argparse.Namespace) -> None:
    """Check the options of data and of the folder to write to, before anything is loaded.

    Raises:
        ValueError: If there is no data, or an option has no effect.
        OSError: If the folder is a file.
    """
    if (options.data is None) is (options.task is None):
        raise ValueError("Expected either --data, with labelled data of your own, or --task.")
    if options.data is not None and options.source is not None:
        raise ValueError(f"--source is {options.source}, which is for a task; leave it out.")
    for name in OF_DATA:
        value = getattr(options, name)
        if value is not None and options.data is None:
            raise ValueError(f"--{name} is {value}, which is for --data; leave it out.")
    folder = Path(options.output_dir or ".")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output_dir is {folder}, which is a file; expected a folder.")


def load_splits(options: argparse.Namespace, model: CapsuleHeadClassifier) -> tuple[Any, dict[str, Dataset]]:
    """Return the model's processor, and labelled splits that are prepared for the model.

    Raises:
        ValueError: If the data does not fit the model, or has no such split.
        OSError: If the data is not found.
    """
    from datasets import DatasetDict

    from ..models.processors import processor_of
    from ..tasks import check_task_fits, get_task, own_task
    from ..training.run import check_labels_match, evaluation_splits

    if options.data is not None:
        own = load_own(options, model)
        task, splits = own_task(own), dict(own)
        check_task_fits(task, model)
        processor = processor_of(model)
    else:
        task, split = get_task(options.task), "validation" if options.split is None else options.split
        check_task_fits(task, model)
        found = task.load(options.source, phrases=False)
        splits = evaluation_splits(found, split)
        if not splits:
            raise ValueError(f"{task.name} has no labelled split {split!r}; it has {', '.join(found)}.")
        check_labels_match(model, next(iter(splits.values())))
        processor = task.load_processor(options.model)
    task.check_files(splits, processor, model)
    prepared = task.prepare(DatasetDict(splits), processor, in_windows=model.config.windowing is not None)
    return processor, dict(prepared)


def load_own(options: argparse.Namespace, model: CapsuleHeadClassifier) -> OwnData:
    """Return a user's own examples, from the columns that are named, those of training, or those with usual names."""
    from ..data import load_examples
    from ..hub.results import columns_of_training
    from ..models.processors import modality_of

    inputs, labels = columns_of_training(options.model)
    text = options.text or (inputs if modality_of(model) == "text" else None)
    return load_examples(options.data, model.config, text, options.label or labels, options.split)


def _measure(
    model: CapsuleHeadClassifier, processor: Any, split: Any, options: argparse.Namespace, metric: str | None
) -> dict[str, Any]:
    """Return the measures of a model on a split, with a task's own metrics."""
    import numpy as np
    from transformers import EvalPrediction

    from ..data import HiddenStateCache
    from ..metrics import compute_metrics_for, measure
    from ..models.processors import modality_of
    from ..tasks import MODALITIES
    from ..training import CapsuleTrainer, CapsuleTrainingArguments

    modality = modality_of(model)
    if options.hidden_states and modality != "text":
        raise ValueError(
            f"--hidden_states is {' '.join(options.hidden_states)}, and the model classifies {modality}; leave it out."
        )
    if options.hidden_states:
        split = HiddenStateCache(split, model, processor, sources=options.hidden_states)
    with tempfile.TemporaryDirectory() as folder:
        trainer = CapsuleTrainer(
            model=model,
            args=CapsuleTrainingArguments(folder, per_device_eval_batch_size=options.batch_size, report_to="none"),
            processing_class=processor,
            data_collator=MODALITIES[modality].collator(processor),
        )
        output = trainer.predict(split)
    predictions = output.predictions
    logits = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
    labels = np.asarray(output.label_ids)
    found = measure(model.config, labels, logits)
    own = {} if metric is None else compute_metrics_for(metric)(EvalPrediction(logits, labels))
    return {**own, **found}


def _folder(options: argparse.Namespace, split: str, n_splits: int) -> Path:
    """Return the folder to write to."""
    name = Path(options.data).stem if options.task is None else f"{options.task}-{split}"
    if options.output_dir is not None:
        return Path(options.output_dir, split) if n_splits > 1 else Path(options.output_dir)
    return folder_of(options.model) / f"evaluation-{name}"


def folder_of(model: str) -> Path:
    """Return the directory of a model; the working directory for one of the Hub."""
    return Path(model) if Path(model).is_dir() else Path()


def _write(found: Mapping[str, Any], folder: Path, title: str) -> None:
    from ..files import write_json
    from ..metrics.report import draw_confusion, draw_reliability, render_text

    print(f"{title}\n{render_text(found)}\n")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FIGURES, found)
    pictures = {"confusion": draw_confusion, "reliability": draw_reliability}
    try:
        for name, draw in pictures.items():
            if name in found:
                draw(found).savefig(folder / f"{name}.png")
    except ImportError:
        logger.warning('There are no pictures, which need matplotlib: pip install "capsule-heads[pictures]".')
    print(folder / FIGURES)


COMMAND = Command("Evaluate a trained model on labelled data.", make_parser, run)
