"""Compare a model in torch, exported to ONNX, and exported with weights of 8 bits: size, accuracy and speed.

    capsule-heads train --config quickstart
    python scripts/benchmarks/onnx_serving.py runs/quickstart --task reviews --split test --page docs/how_to/export.md

Each takes the same texts, one at a time and 32 at a time, in rounds, one after another; figures are medians. Texts are
tokenized before. Size is that of all weights, of backbone and head.
"""

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime
import torch
from results_pages.marks import add_page_options, put_between_marks
from results_pages.tables import markdown
from torch import Tensor

from capsule_heads.cli.evaluate import add_data_options, check_data_options, load_splits
from capsule_heads.cli.options import OneLineParser, at_least, fail
from capsule_heads.data.hidden_states import CapsuleCollator
from capsule_heads.exporting import export_onnx
from capsule_heads.exporting.onnx import MODEL
from capsule_heads.predicting.scoring import in_batches
from capsule_heads.tasks import load_classifier

BATCHES = (1, 32)
Inputs = Mapping[str, Tensor]


def session_of(path: Path, threads: int) -> Callable[[Inputs], object]:
    """Return what runs an exported model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options)
    names = [x.name for x in session.get_inputs()]
    return lambda inputs: session.run(None, {name: inputs[name].numpy() for name in names})


def measure(options: argparse.Namespace) -> str:
    """Export a model twice, time all three in rounds, and return a table."""
    torch.set_num_threads(options.threads)
    model = load_classifier(options.model)
    tokenizer, splits = load_splits(options, model)
    (rows,) = splits.values()
    collate = CapsuleCollator(tokenizer)
    with tempfile.TemporaryDirectory() as name:
        checks, sizes, runs = {}, {}, {}
        for label, quantize in (("ONNX", None), ("ONNX, 8 bits", "int8")):
            folder = Path(name, label)
            checks[label] = export_onnx(model, tokenizer, rows, folder, collate, quantize)
            sizes[label] = sum(path.stat().st_size for path in folder.glob(f"{MODEL}*"))
            runs[label] = session_of(folder / MODEL, options.threads)
        sizes["torch"] = model.get_memory_footprint()

        @torch.inference_mode()
        def run(inputs: Inputs) -> object:
            return model(**inputs)

        all_runs = {"torch": run, **runs}
        names = [x for x in tokenizer.model_input_names if x in rows.column_names]
        taken = rows.select_columns(names)
        batches = {n: [dict(collate(batch)) for batch in in_batches(taken, n)] for n in BATCHES}
        rates: dict[tuple[str, int], list[float]] = {}
        for _ in range(options.rounds):
            for label, run_one in all_runs.items():
                for n in BATCHES:
                    start = time.perf_counter()
                    for inputs in batches[n]:
                        run_one(inputs)
                    rates.setdefault((label, n), []).append(len(rows) / (time.perf_counter() - start))
    labels = rows.with_format("numpy")["labels"][:]
    lines = []
    for label in all_runs:
        check = checks.get(label)
        logits = next(iter(checks.values())).expected if check is None else check.found
        cells = [f"{100 * (logits.argmax(-1) == labels).mean():.1f}", f"{sizes[label] / 1e6:.0f}"]
        cells += ["", ""] if check is None else [f"{check.n_equal} of {len(rows)}", f"{check.largest:.1e}"]
        lines.append([label, *cells, *(f"{statistics.median(rates[label, n]):,.0f}" for n in BATCHES)])
    heads = ["", "accuracy, %", "MB", "labels as torch", "largest difference of a logit"]
    return markdown([*heads, *(f"texts a second, batches of {n}" for n in BATCHES)], lines)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a classifier of texts")
    add_data_options(parser)
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--threads", type=at_least(1), default=1)
    add_page_options(parser)
    options = parser.parse_args()
    options.output_dir = None
    try:
        check_data_options(options)
        table = measure(options)
        if options.page is not None:
            about = (
                f"{options.threads} thread{'s' * (options.threads > 1)}; {options.machine}, {datetime.date.today()}."
            )
            put_between_marks(options.page, "serving", f"{about}\n\n{table}")
    except (ImportError, OSError, ValueError) as error:
        fail(error)
    print(table)


if __name__ == "__main__":
    main()
