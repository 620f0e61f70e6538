"""`capsule-heads explain`: show where scores come from, on a page and in pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Command, OneLineParser, at_least, one_line_errors

DESCRIPTION = (
    "Write report.html, one page that needs no network, parts.png, and a picture of each input: tokens by layers, or "
    "patches over the image. Without inputs a sample of a task's test split is explained, and wrong predictions come "
    "first."
)


def make_parser(prog: str) -> OneLineParser:
    """Return the parser of options."""
    from ..tasks import registered_tasks, source_help

    parser = OneLineParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("model", help="Directory or Hub name of the model.")
    parser.add_argument(
        "inputs", nargs="*", help="Texts (a tab separates those of a pair), or files of images or audio."
    )
    parser.add_argument(
        "--task", metavar="TASK", choices=registered_tasks(), help="Task whose test split is explained, without inputs."
    )
    parser.add_argument("--source", help=source_help())
    parser.add_argument(
        "--max_inputs",
        type=at_least(0),
        default=50,
        help="Number of the task's inputs, drawn at random; 0 for all (default: %(default)s).",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="Random seed of the sample (default: %(default)s).")
    parser.add_argument("--output_dir", default="explanations", help="Folder to write to (default: %(default)s).")
    return parser


def run(options: argparse.Namespace) -> None:
    """Explain the inputs, and print the path of the page."""
    from ..explain import explain
    from ..explain.pictures import draw_explanation, draw_parts
    from ..explain.report import render_report
    from ..files import write_text
    from ..models.processors import modality_of, processor_of
    from ..tasks import MODALITIES, check_task_fits, get_task, load_classifier

    with one_line_errors():
        if bool(options.inputs) == bool(options.task):
            raise ValueError("Expected either texts or files, or --task with a test split to explain.")
        model = load_classifier(options.model)
        modality, processor = MODALITIES[modality_of(model)], processor_of(model)
        labels = None
        if options.task:
            task = get_task(options.task)
            check_task_fits(task, model)
            split = task.load(options.source, phrases=False)["test"].shuffle(seed=options.seed)
            split = split.select(range(min(options.max_inputs or len(split), len(split))))
            labels, inputs = split["label"][:], modality.inputs(split, processor)
        else:
            modality.check_arguments(options.inputs)
            inputs = [modality.read(given, processor) for given in options.inputs]
        explanations = explain(model, inputs, processor)
        folder = Path(options.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "report.html", render_report(explanations, labels, f"Explanations of {options.model}"))
        draw_parts(explanations).savefig(folder / "parts.png")
        for n, explanation in enumerate(explanations, 1):
            draw_explanation(explanation).savefig(folder / f"{n:03}.png")
    print(folder / "report.html")


COMMAND = Command("Show where the scores of a model come from.", make_parser, run)
