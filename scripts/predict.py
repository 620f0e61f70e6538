"""Classifies texts or images: `python scripts/predict.py MODEL "a text" ...` or `predict.py MODEL image.png ...`.

Prints one JSON object per input: its label and score. Texts may also come as lines of standard input; a tab in a text
separates the two texts of a pair. A stereo pair is one image, the two views side by side.
"""

import sys
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # has an evaluate.py

import argparse
import json

from transformers import ImageClassificationPipeline, TextClassificationPipeline

from capsule_heads import CapsuleHeadForImageClassification
from capsule_heads.cli.options import OneLineParser, at_least, fail
from capsule_heads.data.images import open_image
from capsule_heads.training.experiment import load_classifier, load_image_processor, load_tokenizer


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or Hub name of the model")
    parser.add_argument("inputs", nargs="*", help="texts, or files of images; none: lines of standard input")
    parser.add_argument("--batch_size", type=at_least(1), default=32)
    options = parser.parse_args()
    try:
        model = load_classifier(options.model)
        inputs = options.inputs or [line.rstrip("\n") for line in sys.stdin if line.strip()]
        if not inputs:
            raise ValueError("There is nothing to classify; expected texts or files of images, or lines to read.")
        if isinstance(model, CapsuleHeadForImageClassification):
            processor = load_image_processor(options.model)
            images = (open_image(name) for name in inputs)  # one batch after another
            classify = ImageClassificationPipeline(model=model, image_processor=processor)
            predictions = [best[0] for best in classify(images, batch_size=options.batch_size, top_k=1)]
        else:
            classify = TextClassificationPipeline(model=model, tokenizer=load_tokenizer(options.model))
            predictions = classify(
                [split_pair(text) for text in inputs],
                batch_size=options.batch_size,
                truncation=model.config.windowing is None,
            )
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(error)

    name = "image" if isinstance(model, CapsuleHeadForImageClassification) else "text"
    for value, prediction in zip(inputs, predictions):
        print(json.dumps({name: value, **prediction}, ensure_ascii=False))


def split_pair(text: str) -> dict[str, str]:
    first, _, second = text.partition("\t")
    return {"text": first, "text_pair": second} if second else {"text": first}


if __name__ == "__main__":
    main()
