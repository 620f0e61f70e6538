"""`capsule-heads export`: write a trained model as one file for ONNX Runtime."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from .evaluate import add_data_options, check_data_options, folder_of, load_splits
from .options import Command, OneLineParser, at_least, one_line_errors
from .options.quiet import without_data_bars, without_export_notes

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Export a trained model to ONNX, with its processor and labels, and compare it with the model on labelled data: "
    "labels have to be equal. For a model of texts, write a script too that serves the model without torch."
)


def make_parser(prog: str) -> OneLineParser:
    """Return the parser of options."""
    from ..exporting import QUANTIZATIONS

    parser = OneLineParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("model", help="Directory or Hub name of the model.")
    parser.add_argument("--format", choices=("onnx",), default="onnx", help="Format to write (default: %(default)s).")
    parser.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="Format to quantize weights to: 8-bit integers, a quarter of the size.",
    )
    add_data_options(parser)
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="Batch size (default: %(default)s).")
    parser.add_argument(
        "--output_dir",
        help="Folder to write to (default: onnx in the model's folder; here if the model is on the Hub).",
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Export a model, and print its size, the result of the comparison, and its path."""
    import numpy as np
    from datasets import concatenate_datasets

    from ..exporting import export_onnx
    from ..exporting.onnx import MODEL, SERVE
    from ..metrics import measure
    from ..models.processors import modality_of
    from ..tasks import MODALITIES, load_classifier

    with one_line_errors(), without_data_bars(), without_export_notes():
        check_data_options(options)
        model = load_classifier(options.model)
        processor, splits = load_splits(options, model)
        examples = concatenate_datasets(list(splits.values()))  # some tasks have two validation splits
        folder = Path(options.output_dir or folder_of(options.model) / "onnx")
        collator = MODALITIES[modality_of(model)].collator(processor)
        check = export_onnx(model, processor, examples, folder, collator, options.quantize, options.batch_size)
    n_bytes = sum(path.stat().st_size for path in folder.glob(f"{MODEL}*"))
    print(f"Size: {n_bytes / 1e6:,.1f} MB.")
    what = "values" if model.config.problem_type == "regression" else "labels"
    print(
        f"Compared with torch: {what} are equal for {check.n_equal:,} of {len(examples):,} examples; logits differ by "
        f"{check.largest:.1e} at most."
    )
    labels = np.asarray(examples.with_format("numpy")["labels"][:])
    scores = [measure(model.config, labels, logits) for logits in (check.found, check.expected)]
    name = next(name for name in ("accuracy", "f1_micro", "mean_absolute_error") if name in scores[0])
    print(f"{name}: {scores[0][name]:.4f} exported, {scores[1][name]:.4f} in torch.")
    if not (folder / SERVE).exists():
        logger.warning("There is no %s: only tokenizers with a tokenizer.json run without transformers.", SERVE)
    print(folder / MODEL)


COMMAND = Command("Export a trained model to ONNX.", make_parser, run)
