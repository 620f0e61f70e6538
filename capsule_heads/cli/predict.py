"""`capsule-heads predict`: classify texts, or files of images or audio."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
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
    from transformers import TextClassificationPipeline

    from ..tasks import MODALITIES

    if modality == "audio":
        return _classify_audio(model, inputs, processor, batch_size)
    if modality == "image":
        return _classify_images(model, inputs, processor, batch_size)
    values = (MODALITIES[modality].read(given, processor) for given in inputs)  # one batch after another
    texts = [dict(zip(("text", "text_pair"), (x,) if isinstance(x, str) else x)) for x in values]
    classify_texts = TextClassificationPipeline(model=model, tokenizer=processor)
    return classify_texts(texts, batch_size=batch_size, truncation=model.config.windowing is None)


def _classify_images(
    model: CapsuleHeadClassifier, files: Sequence[str], processor: Any, batch_size: int
) -> list[dict[str, Any]]:
    """Return the label and score of each file."""
    from transformers import ImageClassificationPipeline

    from ..data.images import as_image, is_scaled, resizes, warn_of_scaled

    scaled: list[bool] = []

    def read() -> Iterator[Any]:  # one batch after another
        for file in files:
            image = as_image(file)
            scaled.append(is_scaled(image))
            yield image

    step = batch_size if resizes(processor) else 1
    classify: Any = ImageClassificationPipeline(model=model, image_processor=processor)
    predictions = [best[0] for best in classify(read(), batch_size=step, top_k=1)]
    warn_of_scaled(sum(scaled))
    return predictions


def _classify_audio(
    model: CapsuleHeadClassifier, files: Sequence[str], processor: Any, batch_size: int
) -> list[dict[str, Any]]:
    """Return the label and score of each file, prepared as in training; transformers' pipeline needs ffmpeg."""
    import torch

    from ..data.audio import AudioCollator, as_audio, audio_features, check_length, least_samples

    collate, names = AudioCollator(processor), dict(model.config.id2label or {})
    least = least_samples(processor, model)

    def read() -> Iterator[dict[str, Any]]:
        for file in files:
            samples = as_audio(file, processor.sampling_rate)
            check_length(samples, least, file)
            yield audio_features(samples, processor)

    predictions = []
    for rows in _batches_of_one_shape(read(), batch_size):
        with torch.no_grad():
            logits = model(**collate(rows)).logits
        if model.config.problem_type == "multi_label_classification":
            scores = logits.sigmoid()
        else:
            scores = logits if model.config.problem_type == "regression" else logits.softmax(-1)
        for score, index in zip(*(x.tolist() for x in scores.max(-1))):
            predictions.append({"label": names[index], "score": score})
    return predictions


def _batches_of_one_shape(rows: Iterable[dict[str, Any]], batch_size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield rows in batches without padding, which would change the scores of some backbones."""
    for _, alike in itertools.groupby(rows, key=lambda row: [x.shape for x in row.values()]):
        while batch := list(itertools.islice(alike, batch_size)):
            yield batch


COMMAND = Command("Classify texts, images or audio.", make_parser, run)
