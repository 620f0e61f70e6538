"""Evaluates a trained model: `python scripts/evaluate.py MODEL --task sst5 --source TREES --split test`.

Prints the task's metrics as JSON.
"""

import sys
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # this file hides evaluate

import argparse
import json
import tempfile

from datasets import DatasetDict

from capsule_heads import CapsuleTrainer, CapsuleTrainingArguments
from capsule_heads.cli.options import OneLineParser, at_least, fail
from capsule_heads.training.experiment import (
    TASKS,
    check_labels_match,
    compute_metrics_of,
    evaluation_splits,
    load_classifier,
    load_processor,
    load_task,
    prepare,
)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or Hub name of the model")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--source", help="where the data is, as in the training configurations")
    parser.add_argument("--split", default="validation", help="validation (default) or test")
    parser.add_argument("--batch_size", type=at_least(1), default=64)
    options = parser.parse_args()
    try:
        datasets = load_task(options.task, options.source, phrases=False)
        splits = evaluation_splits(datasets, options.split)
        if not splits:
            raise ValueError(f"{options.task} has no labelled split {options.split!r}; it has {', '.join(datasets)}.")
        model = load_classifier(options.model)
        check_labels_match(model, next(iter(splits.values())))
        processor = load_processor(options.task, options.model)
        prepared = prepare(DatasetDict(splits), processor, in_windows=model.config.windowing is not None)
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(error)

    with tempfile.TemporaryDirectory() as folder:
        trainer = CapsuleTrainer(
            model=model,
            args=CapsuleTrainingArguments(folder, per_device_eval_batch_size=options.batch_size),
            processing_class=processor,
            compute_metrics=compute_metrics_of(options.task),
        )
        results = {}
        for name, split in prepared.items():
            results |= trainer.evaluate(split, metric_key_prefix=name)
    if trainer.is_world_process_zero():
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
