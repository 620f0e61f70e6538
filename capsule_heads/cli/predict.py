"""`capsule-heads predict`: classify texts, files of images or audio, or all rows of a file."""

from __future__ import annotations

import argparse
import codecs
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options import (
    Command,
    OneLineParser,
    actors_of,
    add_engine_options,
    add_hidden_states,
    at_least,
    fail,
    one_line_errors,
)
from .options.parser import INTERRUPTED, probability

if TYPE_CHECKING:
    from ..predicting import Prediction

DESCRIPTION = (
    "With --data and --output, classify the rows of a file, or a folder of images or audio: all rows and columns stay "
    "as they are, and the answers are new columns. Without --data, classify texts, or files of images or audio, and "
    "print one JSON object per input. It holds the label and its score; from a model that gives several labels, those "
    "above their thresholds and all scores; from a regression, the value. Without inputs, standard input is read as "
    "UTF-8, one input a line, where a blank line is an empty text. A tab separates the two texts of a pair."
)
# A first line that has only names, one of them known, is the header of a table.
HEADER = re.compile(r"""["']?\w+["']?([,;\t]["']?\w+["']?)+""")
NAMES_IN_HEADERS = {"text", "sentence", "sentence1", "label", "labels"}


def make_parser(prog: str) -> OneLineParser:
    """Return the parser of options."""
    parser = OneLineParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("model", help="Directory or Hub name of the model.")
    parser.add_argument("inputs", nargs="*", help="Texts, or files of images or audio.")
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="CSV, TSV, JSON, JSON Lines or Parquet file of texts; or a folder of images or audio.",
    )
    parser.add_argument("--output", metavar="FILE", help="File to write for --data: .csv, .jsonl or .parquet.")
    parser.add_argument(
        "--text",
        metavar="COLUMN[,COLUMN]",
        help="Column of texts, or two for pairs (default: the columns of training, or those with usual names).",
    )
    parser.add_argument("--top_k", type=at_least(1), help="Number of the most probable classes to give (default: all).")
    parser.add_argument(
        "--abstain_below", type=probability, metavar="P", help="Give no label where the best probability is below P."
    )
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="Batch size (default: %(default)s).")
    add_hidden_states(parser)
    add_engine_options(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Classify the rows of a file; or classify the inputs, and print a line for each."""
    if options.data is not None:
        _predict_file(options)
        return
    from ..models.processors import modality_of, processor_of
    from ..predicting import Answers, score_inputs
    from ..tasks import MODALITIES, load_classifier

    with one_line_errors():
        _check_options(options)
        _check_arguments(options.inputs)
        model = load_classifier(options.model)
        name = modality_of(model)
        answers = Answers(model.config, options.top_k, options.abstain_below)
        MODALITIES[name].check_arguments(options.inputs)
        inputs = options.inputs or read_lines(sys.stdin.buffer.read(), is_text=name == "text")
        if not inputs:
            raise ValueError("There is nothing to classify; expected texts or files, or lines on standard input.")
        where, processor = "input" if options.inputs else "standard input, line", processor_of(model)
        values = [MODALITIES[name].read(x, processor) for x in inputs] if name == "text" else inputs
        scores = score_inputs(model, values, processor, options.batch_size, where)
    for given, of_input in zip(inputs, scores):
        print(json.dumps({name: given, **answers.line(answers.answer(of_input))}, ensure_ascii=False))


def _predict_file(options: argparse.Namespace) -> None:
    """Write the rows of a file with their answers, and print the name of the new file."""
    from ..data.downloads import local_copy
    from ..predicting import Prediction, predict_file
    from ..tasks import load_classifier

    prediction = None
    try:
        with one_line_errors():
            _check_options(options)
            prediction = Prediction(
                local_copy(options.data),
                Path(options.output),
                None if options.text is None else options.text.split(","),
                options.top_k,
                options.abstain_below,
                options.batch_size,
                options.hidden_states,
                actors_of(options),
            )
            prediction.check()
            predict_file(load_classifier(options.model), prediction)
    except KeyboardInterrupt:
        fail(f"interrupted; {_what_is_kept(prediction)}.", INTERRUPTED)
    print(prediction.output)


def _what_is_kept(prediction: Prediction | None) -> str:
    """Return a clause about what an interrupted prediction has kept."""
    from ..predicting import unfinished_rows

    n_rows = 0 if prediction is None else unfinished_rows(prediction)
    if not n_rows or prediction is None:
        return "no rows are done yet"
    return f"{n_rows} rows are done and kept in {prediction.unfinished}, where the same command resumes"


def _check_options(options: argparse.Namespace) -> None:
    if options.data is not None and options.output is None:
        raise ValueError(f"--data is {options.data}, and there is no --output; expected a file to write.")
    if options.data is not None and options.inputs:
        raise ValueError(f"Expected either --data or inputs, not both: --data {options.data}, and {options.inputs[0]}.")
    actors_of(options)
    if options.engine != "local" and options.data is None:
        raise ValueError(f"--engine is {options.engine}, which is for a file of rows; expected --data FILE beside it.")
    for name in ("output", "text", "hidden_states"):
        value = getattr(options, name)
        if value and options.data is None:
            raise ValueError(f"--{name} is {value}, which is for a file of rows; expected --data FILE beside it.")


def _check_arguments(inputs: Sequence[str]) -> None:
    for number, given in enumerate(inputs, start=1):
        try:
            given.encode("utf-8")
        except UnicodeEncodeError:  # Python keeps other bytes as surrogates
            raise ValueError(
                f"Input {number} is not UTF-8 text: {given!r}; expected UTF-8, to which iconv -t UTF-8 converts."
            ) from None


def read_lines(content: bytes, is_text: bool) -> list[str]:
    """Return the lines of standard input, without their ends.

    Args:
        content: all bytes of standard input.
        is_text: whether a line is a text, rather than the name of a file.

    Raises:
        ValueError: If a line is not UTF-8, or is blank where a file is expected, or if the first is JSON or a header.
    """
    lines = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).removesuffix(b"\n").split(b"\n"), start=1):
        try:
            lines.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"Standard input, line {number}, is not UTF-8 text ({error}); expected UTF-8, to which iconv -t UTF-8 "
                "converts."
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
        raise ValueError(
            "Standard input begins with JSON; expected one text a line and nothing else, or the file with --data."
        )
    if HEADER.fullmatch(line) and NAMES_IN_HEADERS & set(re.findall(r"\w+", line.lower())):
        raise ValueError(
            f"Standard input begins with the header of a table, {line!r}; expected one text a line, without a header "
            "or other columns, or the file with --data."
        )


def _is_json(line: str) -> bool:
    """Return whether a line is a JSON object or list, or begins one."""
    try:
        return line in ("{", "[") or isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


COMMAND = Command("Classify texts, images or audio, or all rows of a file.", make_parser, run)
