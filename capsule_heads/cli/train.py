"""`capsule-heads train`: train a capsule head, alone or under `accelerate launch -m capsule_heads train`."""

from __future__ import annotations

import argparse
import json

from .options import Command, OneLineParser, one_line_errors


def make_parser(prog: str) -> OneLineParser:
    """Return the parser of options."""
    from .options.training import TrainParser  # imports transformers

    return TrainParser(prog)


def run(options: argparse.Namespace) -> None:
    """Train, evaluate and save a model, and print the results."""
    from ..training.run import TrainingRun

    with one_line_errors():
        this = TrainingRun(options.data, options.model, options.head, options.arguments)
    with one_line_errors(FloatingPointError, OSError, ValueError):  # not finite, no place to write, inputs
        seconds = this.train()
    results = this.evaluate(seconds)
    if this.trainer.is_world_process_zero():
        print(json.dumps(results, indent=2))
    this.close()


COMMAND = Command("Train a head on a backbone, evaluate it and save it.", make_parser, run)
