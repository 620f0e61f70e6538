"""Says where scores come from: `python scripts/explain.py MODEL "a text" ...` or `explain.py MODEL image.png ...`.

    python scripts/explain.py MODEL --task sst2_root --max_inputs 50 --output_dir explanations

Writes `report.html`, one page that needs no network, `parts.png`, and a picture of each input: tokens by layers, or
patches over the image. Without inputs it explains a sample of a task's test split: wrong predictions come first.
"""

import sys
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # has an evaluate.py

import argparse

from capsule_heads import CapsuleHeadForImageClassification
from capsule_heads.cli.options import OneLineParser, at_least, fail
from capsule_heads.data.images import open_image
from capsule_heads.explain import explain
from capsule_heads.files import write_text
from capsule_heads.pictures import draw_parts, draw_patches, draw_tokens, render_report
from capsule_heads.training.experiment import STEREO_TASKS, load_classifier, load_task


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or Hub name of the model")
    parser.add_argument("inputs", nargs="*", help="texts (a tab separates those of a pair), or files of images")
    parser.add_argument("--task", help="without inputs: whose test split to explain")
    parser.add_argument("--source", help="where the task's data is")
    parser.add_argument(
        "--max_inputs", type=at_least(0), default=50, help="of the task, drawn at random (default 50); 0 for all"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the sample")
    parser.add_argument("--output_dir", default="explanations", help="where to write (default explanations)")
    options = parser.parse_args()
    try:
        if bool(options.inputs) == bool(options.task):
            raise ValueError("Expected either texts or images, or --task with a test split to explain.")
        model = load_classifier(options.model)
        is_image = isinstance(model, CapsuleHeadForImageClassification)
        labels = None
        if options.task:
            split = load_task(options.task, options.source, phrases=False)["test"].shuffle(seed=options.seed)
            split = split.select(range(min(options.max_inputs or len(split), len(split))))
            labels = split["label"][:]
            if options.task in STEREO_TASKS:
                split = split.with_format("numpy")  # pairs are arrays, not lists of numbers
            columns = [name for name in ("image", "text", "text_pair") if name in split.column_names]
            inputs = list(zip(*(split[name][:] for name in columns)))
            inputs = [values if len(values) > 1 else values[0] for values in inputs]
        elif is_image:
            inputs = [open_image(name) for name in options.inputs]
        else:
            inputs = [tuple(text.split("\t", 1)) if "\t" in text else text for text in options.inputs]
        explanations = explain(model, inputs)
        folder = Path(options.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "report.html", render_report(explanations, labels, f"Explanations of {options.model}"))
        draw_parts(explanations).savefig(folder / "parts.png")
        for n, explanation in enumerate(explanations, 1):
            draw = draw_patches if is_image else draw_tokens
            draw(explanation).savefig(folder / f"{n:03}.png")
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(error)
    print(folder / "report.html")


if __name__ == "__main__":
    main()
