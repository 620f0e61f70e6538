"""`capsule-heads predict`: classify texts, or files of images or audio."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .options import Command, OneLineParser, at_least, one_line_errors

if TYPE_CHECKING:
    from ..models import CapsuleHeadClassifier

DESCRIPTION = (
    "Classify texts, or files of images or audio, and print one JSON object per input: its label and score. Without "
    "inputs the lines of standard input are read. A tab in a text separates the two texts of a pair. A stereo pair is "
    "one image, the two views side by side."
)


def make_parser(prog: str) -> OneLineParser:
    """Return the parser of options."""
    parser = OneLineParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("model", help="Directory or Hub name of the model.")
    parser.add_argument("inputs", nargs="*", help="Texts, or files of images or audio.")
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="Batch size (default: %(default)s).")
    return parser


def run(options: argparse.Namespace) -> None:
    """Classify the inputs, and print a line for each."""
    from ..backbones.processors import load_processor
    from ..models.processors import modality_of
    from ..tasks import MODALITIES, load_classifier

    with one_line_errors():
        model = load_classifier(options.model)
        name = modality_of(model)
        MODALITIES[name].check_arguments(options.inputs)
        inputs = options.inputs or [line.rstrip("\n") for line in sys.stdin if line.strip()]
        if not inputs:
            raise ValueError("There is nothing to classify; expected texts or files, or lines to read.")
        predictions = _classify(model, name, inputs, load_processor(name, options.model), options.batch_size)
    for value, prediction in zip(inputs, predictions):
        print(json.dumps({name: value, **prediction}, ensure_ascii=False))


def _classify(
    model: CapsuleHeadClassifier, modality: str, inputs: Sequence[str], processor: Any, batch_size: int
) -> list[dict[str, Any]]:
    """Return the label and score of each input."""
    from transformers import ImageClassificationPipeline, TextClassificationPipeline

    from ..tasks import MODALITIES

    if modality == "audio":
        return _classify_audio(model, inputs, processor, batch_size)
    values = (MODALITIES[modality].read(given, processor) for given in inputs)  # one batch after another
    if modality == "image":
        classify_images: Any = ImageClassificationPipeline(model=model, image_processor=processor)
        return [best[0] for best in classify_images(values, batch_size=batch_size, top_k=1)]
    texts = [dict(zip(("text", "text_pair"), (x,) if isinstance(x, str) else x)) for x in values]
    classify_texts = TextClassificationPipeline(model=model, tokenizer=processor)
    return classify_texts(texts, batch_size=batch_size, truncation=model.config.windowing is None)


def _classify_audio(
    model: CapsuleHeadClassifier, files: Sequence[str], processor: Any, batch_size: int
) -> list[dict[str, Any]]:
    """Return the label and score of each file, prepared as in training; transformers' pipeline passes no mask."""
    import torch

    from ..data.audio import AudioCollator, audio_features, open_audio

    collate, names = AudioCollator(processor), dict(model.config.id2label or {})
    predictions = []
    for start in range(0, len(files), batch_size):
        recordings = (open_audio(file, processor.sampling_rate) for file in files[start : start + batch_size])
        batch = collate([audio_features(samples, processor) for samples in recordings])
        with torch.no_grad():
            logits = model(**batch).logits
        if model.config.problem_type == "multi_label_classification":
            scores = logits.sigmoid()
        else:
            scores = logits if model.config.problem_type == "regression" else logits.softmax(-1)
        for score, index in zip(*(x.tolist() for x in scores.max(-1))):
            predictions.append({"label": names[index], "score": score})
    return predictions


COMMAND = Command("Classify texts, images or audio.", make_parser, run)
