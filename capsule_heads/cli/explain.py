"""`capsule-heads explain`: show where scores come from, on a page and in pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demo import title_of
from .options import Command, OneLineParser, at_least, one_line_errors
from .options.quiet import without_data_bars

if TYPE_CHECKING:
    from datasets import Dataset

    from ..models import CapsuleHeadClassifier

DESCRIPTION = (
    "Write report.html (one page that works offline), a picture of each input (tokens by layers, or patches over the "
    "image) and explanations.json (all numbers). Without inputs, a sample of labelled data is explained, and its wrong "
    "predictions come first."
)
MAX_INPUTS = 50
OF_SAMPLES = ("max_inputs", "seed")  # options without effect on inputs that are given
OF_DATA = ("text", "label", "split")


def make_parser(prog: str) -> OneLineParser:
    """Return the parser of options."""
    from ..tasks import registered_tasks, source_help

    parser = OneLineParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("model", help="Directory or Hub name of the model.")
    parser.add_argument(
        "inputs", nargs="*", help="Texts (a tab separates those of a pair), or files of images or audio."
    )
    parser.add_argument(
        "--data", help="Labelled data of your own to draw a sample from, in any form that train --data takes."
    )
    parser.add_argument("--text", metavar="COLUMN[,COLUMN]", help="Column of texts, or two for pairs.")
    parser.add_argument("--label", metavar="COLUMN[,COLUMN]", help="Column of labels, or columns of 0 and 1.")
    parser.add_argument("--split", help="Split of the data (default: the only one).")
    parser.add_argument(
        "--task", metavar="TASK", choices=registered_tasks(), help="Task whose test split the sample is drawn from."
    )
    parser.add_argument("--source", help=source_help())
    parser.add_argument(
        "--max_inputs",
        type=at_least(0),
        help=f"Number of inputs in the random sample; 0 for all (default: {MAX_INPUTS}).",
    )
    parser.add_argument("--seed", type=at_least(0), help="Random seed of the sample (default: 0).")
    parser.add_argument(
        "--through_backbone",
        action="store_true",
        help="Trace credits through the backbone to the embeddings of tokens: more faithful, and slower.",
    )
    parser.add_argument("--output_dir", default="explanations", help="Folder to write to (default: %(default)s).")
    return parser


def run(options: argparse.Namespace) -> None:
    """Explain the inputs, and print the path of the page."""
    from ..explain import explain
    from ..explain.export import save_explanations
    from ..explain.parts import load_parts
    from ..explain.pictures import draw_explanation
    from ..explain.report import render_report
    from ..files import write_text
    from ..models.processors import modality_of, processor_of
    from ..tasks import MODALITIES, load_classifier

    with one_line_errors(), without_data_bars():
        _check_options(options)
        model = load_classifier(options.model)
        modality, processor = MODALITIES[modality_of(model)], processor_of(model)
        labels = None
        if options.task or options.data:
            split = _load_sample(model, options)
            labels, inputs = split["label"][:], modality.inputs(split, processor)
        else:
            modality.check_arguments(options.inputs)
            inputs = [modality.read(given, processor) for given in options.inputs]
        explanations = explain(model, inputs, processor, through_backbone=options.through_backbone)
        folder = Path(options.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        title = f"{title_of(model)} {len(explanations):,} explained"
        page = render_report(explanations, labels, title, load_parts(options.model))
        write_text(folder / "report.html", page)
        save_explanations(folder / "explanations.json", explanations)
        n_digits = max(3, len(str(len(explanations))))  # so that names sort
        for n, explanation in enumerate(explanations, 1):
            draw_explanation(explanation).savefig(folder / f"{n:0{n_digits}}.png")
    print(folder / "report.html")


def _check_options(options: argparse.Namespace) -> None:
    """Check the options, before anything is loaded or written.

    Raises:
        ValueError: If there is nothing to explain, an option has no effect, or the model's scores have no credits.
        OSError: If there is no such model, or the folder to write to is a file.
    """
    from ..explain.credits import check_explained
    from ..models import CapsuleHeadConfig

    if sum(map(bool, (options.inputs, options.task, options.data))) != 1:
        raise ValueError("Expected texts or files to explain, --data with labelled data, or --task: one of them.")
    for names, needed, has_effect in (
        (OF_SAMPLES, "--data or --task", options.task or options.data),
        (OF_DATA, "--data", options.data),
        (("source",), "--task", options.task),
    ):
        for name in names:
            value = getattr(options, name)
            if value is not None and not has_effect:
                raise ValueError(f"--{name} is {value}, which has no effect without {needed}; leave it out.")
    folder = Path(options.output_dir)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output_dir is {folder}, which is a file; expected a folder.")
    check_explained(CapsuleHeadConfig.from_pretrained(options.model))


def _load_sample(model: CapsuleHeadClassifier, options: argparse.Namespace) -> Dataset:
    """Load a sample of labelled data, from a user's own data or from a task's test split.

    Raises:
        ValueError: If the data does not fit the model, or the task has no test split.
    """
    from ..tasks import check_task_fits, get_task, own_task
    from ..training.run import check_labels_match
    from .evaluate import load_own

    if options.data:
        own = load_own(options, model)
        check_task_fits(own_task(own), model)
        (split,) = own.values()
    else:
        task = get_task(options.task)
        check_task_fits(task, model)
        splits: Any = task.load(options.source, phrases=False)
        if "test" not in splits:
            raise ValueError(
                f"{task.name} has {', '.join(splits)} and no test split to explain; expected texts or files instead of "
                "--task."
            )
        split = splits["test"]
        check_labels_match(model, split)
    split = split.shuffle(seed=options.seed or 0)
    most = MAX_INPUTS if options.max_inputs is None else options.max_inputs
    return split.select(range(min(most or len(split), len(split))))


COMMAND = Command("Show where the scores of a model come from.", make_parser, run)
