"""`capsule-heads evaluate`: measure a trained model on a split of a task."""

from __future__ import annotations

import argparse
import json
import tempfile

from .options import Command, OneLineParser, at_least, one_line_errors
from .options.quiet import without_data_bars


def make_parser(prog: str) -> OneLineParser:
    """Return the parser of options."""
    from ..tasks import registered_tasks, source_help

    parser = OneLineParser(prog=prog, description="Evaluate a trained model, and print the task's metrics as JSON.")
    parser.add_argument("model", help="Directory or Hub name of the model.")
    parser.add_argument(
        "--task", required=True, metavar="TASK", choices=registered_tasks(), help="Task to evaluate on."
    )
    parser.add_argument("--source", help=source_help())
    parser.add_argument("--split", default="validation", help="validation (default) or test.")
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="Batch size (default: %(default)s).")
    return parser


def run(options: argparse.Namespace) -> None:
    """Evaluate a model, and print the metrics."""
    from datasets import DatasetDict

    from ..metrics import compute_metrics_for
    from ..tasks import check_task_fits, get_task, load_classifier
    from ..training import CapsuleTrainer, CapsuleTrainingArguments
    from ..training.run import check_labels_match, evaluation_splits

    with one_line_errors(), without_data_bars():
        task, model = get_task(options.task), load_classifier(options.model)
        check_task_fits(task, model)
        found = task.load(options.source, phrases=False)
        splits = evaluation_splits(found, options.split)
        if not splits:
            raise ValueError(f"{task.name} has no labelled split {options.split!r}; it has {', '.join(found)}.")
        check_labels_match(model, next(iter(splits.values())))
        processor = task.load_processor(options.model)
        task.check_files(splits, processor, model)
        prepared = task.prepare(DatasetDict(splits), processor, in_windows=model.config.windowing is not None)
    with one_line_errors(FloatingPointError, OSError, ValueError), tempfile.TemporaryDirectory() as folder:
        trainer = CapsuleTrainer(
            model=model,
            args=CapsuleTrainingArguments(folder, per_device_eval_batch_size=options.batch_size),
            processing_class=processor,
            data_collator=task.data.collator(processor),
            compute_metrics=compute_metrics_for(task.metric),
        )
        results: dict[str, float] = {}
        for name, split in prepared.items():
            results |= trainer.evaluate(split, metric_key_prefix=name)
    if trainer.is_world_process_zero():
        print(json.dumps(results, indent=2))


COMMAND = Command("Measure a trained model on a task.", make_parser, run)
