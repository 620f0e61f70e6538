"""Classifies texts: `python scripts/predict.py MODEL "a text" ...`, or one text a line on standard input.

Prints one JSON object a text: its label and score. A tab in a text separates the two texts of a pair.
"""

import sys
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # has an evaluate.py

import argparse
import json

from transformers import AutoTokenizer, TextClassificationPipeline

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.training.command_line import OneLineParser, fail


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or Hub name of the model")
    parser.add_argument("texts", nargs="*", help="texts; none: lines of standard input")
    parser.add_argument("--batch_size", type=int, default=32)
    options = parser.parse_args()
    try:
        model = CapsuleHeadForSequenceClassification.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(error)

    texts = options.texts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    classify = TextClassificationPipeline(model=model, tokenizer=tokenizer)
    inputs = [{"text": first, "text_pair": second} for first, _, second in (text.partition("\t") for text in texts)]
    inputs = [pair if pair["text_pair"] else {"text": pair["text"]} for pair in inputs]
    for text, prediction in zip(texts, classify(inputs, batch_size=options.batch_size, truncation=True)):
        print(json.dumps({"text": text, **prediction}, ensure_ascii=False))


if __name__ == "__main__":
    main()
