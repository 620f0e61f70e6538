"""`capsule-heads train`: train a capsule head, alone or under `accelerate launch -m capsule_heads train`."""

from __future__ import annotations

import argparse
import json

from .options import Command, OneLineParser, fail, one_line_errors
from .options.parser import INTERRUPTED


def make_parser(prog: str) -> OneLineParser:
    """Return the parser of options."""
    from .options.training import TrainParser  # imports transformers

    return TrainParser(prog)


def run(options: argparse.Namespace) -> None:
    """Train, evaluate and save a model, and print the results."""
    from ..training.run import TrainingRun, what_is_saved

    folder, is_trained = options.arguments.output_dir, False
    try:
        with one_line_errors():
            this = TrainingRun(options.data, options.model, options.head, options.arguments)
        with one_line_errors(FloatingPointError, ImportError, OSError, ValueError):  # NaN, a full disk, bad inputs
            seconds = this.train()
        is_trained = True
        prefix = f"The trained model is saved in {folder}, but its evaluation failed: "
        with one_line_errors(FloatingPointError, OSError, ValueError, prefix=prefix):
            results = this.evaluate(seconds)
    except KeyboardInterrupt:
        fail(f"interrupted; {what_is_saved(folder, is_trained)}.", INTERRUPTED)
    if this.trainer.is_world_process_zero():
        print(json.dumps(results, indent=2))
    this.close()


COMMAND = Command("Train a head on a backbone, evaluate it and save it.", make_parser, run)
