"""`capsule-heads predict`: classify texts, or files of images or audio."""

from __future__ import annotations

import argparse
import codecs
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .options import Command, OneLineParser, at_least, one_line_errors

if TYPE_CHECKING:
    from ..models import CapsuleHeadClassifier

DESCRIPTION = (
    "Classify texts, or files of images or audio, and print one JSON object per input: its label and score; the labels "
    "whose score is above 0.5, and the scores of all, where a model gives several; the value of a regression. Without "
    "inputs, standard input is read: UTF-8, one input a line, of which a blank one is an empty text. A tab in a text "
    "separates the two texts of a pair. A stereo pair is one image, the two views side by side."
)
Scores = Sequence[Mapping[str, Any]]  # label and score of each class
# A first line of nothing but names, one of them known, is the header of a table.
HEADER = re.compile(r"""["']?\w+["']?([,;\t]["']?\w+["']?)+""")
NAMES_IN_HEADERS = {"text", "sentence", "sentence1", "label", "labels"}


def make_parser(prog: str) -> OneLineParser:
    """Return the parser of options."""
    parser = OneLineParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("model", help="Directory or Hub name of the model.")
    parser.add_argument("inputs", nargs="*", help="Texts, or files of images or audio.")
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="Batch size (default: %(default)s).")
    return parser


def run(options: argparse.Namespace) -> None:
    """Classify the inputs, and print a line for each."""
    from ..models.processors import modality_of, processor_of
    from ..tasks import MODALITIES, load_classifier

    with one_line_errors():
        _check_arguments(options.inputs)
        model = load_classifier(options.model)
        name = modality_of(model)
        MODALITIES[name].check_arguments(options.inputs)
        inputs = options.inputs or read_lines(sys.stdin.buffer.read(), is_text=name == "text")
        if not inputs:
            raise ValueError("There is nothing to classify; expected texts or files, or lines to read.")
        where = "input" if options.inputs else "standard input, line"
        predictions = _classify(model, name, inputs, processor_of(model), options.batch_size, where)
    for value, prediction in zip(inputs, predictions):
        print(json.dumps({name: value, **prediction}, ensure_ascii=False))


def _check_arguments(inputs: Sequence[str]) -> None:
    for number, given in enumerate(inputs, start=1):
        try:
            given.encode("utf-8")
        except UnicodeEncodeError:  # Python keeps other bytes as surrogates
            raise ValueError(
                f"Input {number} is not UTF-8 text: {given!r}; expected UTF-8, which iconv -t UTF-8 makes of others."
            ) from None


def read_lines(content: bytes, is_text: bool) -> list[str]:
    """Return the lines of standard input, without their ends.

    Args:
        content: all of it.
        is_text: whether a line is a text, and not the name of a file.

    Raises:
        ValueError: If a line is not UTF-8, or blank where a file is expected, or the first is that of a table.
    """
    lines = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).removesuffix(b"\n").split(b"\n"), start=1):
        try:
            lines.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"Standard input, line {number}, is not UTF-8 text ({error}); expected UTF-8, which iconv -t UTF-8 "
                "makes of others."
            ) from None
        if not is_text and not lines[-1].strip():
            raise ValueError(f"Standard input, line {number}, is blank; expected the name of a file.")
    if not content:
        return []
    if is_text:
        _check_first_line(lines[0].strip())
    return lines


def _check_first_line(line: str) -> None:
    if _is_json(line):
        raise ValueError("Standard input begins with JSON; expected one text a line, and nothing else in the line.")
    if HEADER.fullmatch(line) and NAMES_IN_HEADERS & set(re.findall(r"\w+", line.lower())):
        raise ValueError(
            f"Standard input begins with the header of a table, {line!r}; expected one text a line, without a header "
            "and other columns."
        )


def _is_json(line: str) -> bool:
    """Return whether a line is an object or a list of JSON, or begins one."""
    try:
        return line in ("{", "[") or isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def _classify(
    model: CapsuleHeadClassifier, modality: str, inputs: Sequence[str], processor: Any, batch_size: int, where: str
) -> list[dict[str, Any]]:
    """Return what is printed of each input."""
    from ..tasks import MODALITIES

    is_text = modality == "text"
    values = [MODALITIES[modality].read(given, processor) for given in inputs] if is_text else inputs
    return [_describe(model, scores) for scores in score(model, modality, values, processor, batch_size, where)]


def score(
    model: CapsuleHeadClassifier,
    modality: str,
    inputs: Sequence[Any],
    processor: Any,
    batch_size: int = 1,
    where: str = "input",
) -> list[Scores]:
    """Return the label and score of each class, of each input: those that transformers' pipelines give.

    Args:
        model: the classifier.
        modality: what it classifies: "text", "image" or "audio".
        inputs: texts, and tuples of two; or what `as_image` or `as_audio` reads.
        processor: the model's.
        batch_size: number of inputs that are scored at once.
        where: what a message calls an input, before its number.

    Raises:
        ValueError: If an input cannot be read, or nothing is left of it.
    """
    if modality == "audio":
        return _score_audio(model, inputs, processor, batch_size)
    if modality == "image":
        return _score_images(model, inputs, processor, batch_size)
    return _score_texts(model, inputs, processor, batch_size, where)


def _score_texts(
    model: CapsuleHeadClassifier, texts: Sequence[Any], tokenizer: Any, batch_size: int, where: str
) -> list[Scores]:
    """Score texts, or pairs of texts; say how many were cut."""
    from transformers import TextClassificationPipeline

    from ..data.tokenization import describe_cuts, token_limit

    given = [dict(zip(("text", "text_pair"), (x,) if isinstance(x, str) else x)) for x in texts]
    lengths = [len(tokenizer(**x, verbose=False)["input_ids"]) for x in given]
    if 0 in lengths:
        raise ValueError(
            f"The text of {where} {lengths.index(0) + 1} is {texts[lengths.index(0)]!r}, of which the tokenizer makes "
            "no token; leave it out."
        )
    most = token_limit(tokenizer) if model.config.windowing is None else None
    cut = describe_cuts({"": lengths}, most)
    if cut:
        print(cut, file=sys.stderr)
    classify = TextClassificationPipeline(model=model, tokenizer=tokenizer)
    # verbose: it would warn of texts that run in windows.
    found: Any = classify(given, batch_size=batch_size, truncation=most is not None, verbose=False, top_k=None)
    return found


def _score_images(model: CapsuleHeadClassifier, images: Sequence[Any], processor: Any, batch_size: int) -> list[Scores]:
    """Score images; say how many were scaled to 8 bits."""
    from transformers import ImageClassificationPipeline

    from ..data.images import as_image, is_scaled, resizes, warn_of_scaled

    scaled: list[bool] = []

    def read() -> Iterator[Any]:  # one batch after another
        for given in images:
            image = as_image(given)
            scaled.append(is_scaled(image))
            yield image

    step = batch_size if resizes(processor) else 1
    classify: Any = ImageClassificationPipeline(model=model, image_processor=processor)
    found = list(classify(read(), batch_size=step, top_k=model.config.num_labels))
    warn_of_scaled(sum(scaled))
    return found


def _score_audio(
    model: CapsuleHeadClassifier, recordings: Sequence[Any], processor: Any, batch_size: int
) -> list[Scores]:
    """Score audio, prepared as in training; transformers' pipeline needs ffmpeg for files."""
    import torch

    from ..data.audio import AudioCollator, as_audio, audio_features, check_length, least_samples

    collate = AudioCollator(processor)
    names = model.config.class_names
    least = least_samples(processor, model)

    def read() -> Iterator[dict[str, Any]]:
        for given in recordings:
            samples = as_audio(given, processor.sampling_rate)
            check_length(samples, least, given if isinstance(given, str) else "The audio")
            yield audio_features(samples, processor)

    found: list[Scores] = []
    for rows in _batches_of_one_shape(read(), batch_size):
        with torch.no_grad():
            logits = model(**collate(rows)).logits
        if model.config.problem_type == "multi_label_classification":
            scores = logits.sigmoid()
        else:
            scores = logits if model.config.problem_type == "regression" else logits.softmax(-1)
        found += ([{"label": name, "score": x} for name, x in zip(names, row)] for row in scores.tolist())
    return found


def _describe(model: CapsuleHeadClassifier, scores: Scores) -> dict[str, Any]:
    """Return what is printed of an input, from the label and score of each class."""
    by_label = {x["label"]: x["score"] for x in sorted(scores, key=lambda x: x["score"], reverse=True)}
    if model.config.problem_type == "regression":
        return {"value": scores[0]["score"]} if len(scores) == 1 else {"values": by_label}
    if model.config.problem_type == "multi_label_classification":
        return {"labels": [label for label, score in by_label.items() if score > 0.5], "scores": by_label}
    label, score = next(iter(by_label.items()))
    return {"label": label, "score": score}


def _batches_of_one_shape(rows: Iterable[dict[str, Any]], batch_size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield rows in batches without padding, which would change the scores of some backbones."""
    for _, alike in itertools.groupby(rows, key=lambda row: [x.shape for x in row.values()]):
        while batch := list(itertools.islice(alike, batch_size)):
            yield batch


COMMAND = Command("Classify texts, images or audio.", make_parser, run)
