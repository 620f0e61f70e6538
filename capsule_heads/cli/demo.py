"""`capsule-heads demo`: a page that explains scores. It needs Gradio: pip install "capsule-heads[demo]"."""

from __future__ import annotations

import argparse
import html
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import Command, OneLineParser, at_least, one_line_errors

if TYPE_CHECKING:
    import gradio

    from ..models import CapsuleHeadClassifier

DESCRIPTION = (
    "Serve a page that shows the scores of a text, an image or audio, and where they come from. It needs Gradio: "
    'pip install "capsule-heads[demo]".'
)
PORT = 7860
NOUNS = {"text": "a text", "image": "an image", "audio": "audio"}
MOST_CLASSES, MOST_CHARACTERS = 4, 60  # the most that the title shows
# An error's sentence, shown instead of a result. gradio.Error would cover it with a badge.
ALERT = '<p role="alert" style="border-left: 4px solid #b2182b; padding-left: 0.7rem; overflow-wrap: anywhere">{}</p>'
EXAMPLES = (
    ("Better than I had expected, though the ending is slow.", ""),
    ("The staff were rude, and the soup was cold.", ""),
    ("A man is playing a guitar.", "Somebody is making music."),
)


def make_parser(prog: str) -> OneLineParser:
    """Return the parser of options."""
    parser = OneLineParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("model", help="Directory or Hub name of a classifier.")
    parser.add_argument("--port", type=at_least(1), help=f"Port to serve at (default: {PORT}).")
    parser.add_argument("--write_space", metavar="FOLDER", help="Folder to write the Space to, instead of serving.")
    parser.add_argument("--push_space", metavar="NAME", help="Name of a Space to push the page to, instead of serving.")
    return parser


def run(options: argparse.Namespace) -> None:
    """Serve the page, or write or push it as a Space."""
    from ..hub.space import push_space, write_space

    with one_line_errors():
        is_space = bool(options.write_space or options.push_space)
        if is_space and options.port is not None:
            raise ValueError(f"--port is {options.port}, but a Space has a port of its own; leave --port out.")
        if options.port is not None and options.port > 65535:
            raise ValueError(f"--port is {options.port}; expected a number from 1 to 65535.")
        if options.write_space:
            write_space(options.model, options.write_space)
            print(options.write_space)
        if options.push_space:
            print(push_space(options.model, options.push_space))
        if not is_space:
            build_demo(options.model).launch(server_port=options.port or PORT, show_error=True)


def build_demo(model: str) -> gradio.Blocks:
    """Build the page: scores of a text, an image or audio, and where they come from.

    If the scores have no credits, as for a regression or a linear head, the page shows only the scores, and why.

    Args:
        model: directory or Hub name of a classifier.

    Returns:
        A Gradio app; `launch()` serves it.

    Raises:
        ImportError: If Gradio or matplotlib is not installed.
        OSError: If the model, or its processor, is not found.
        ValueError: If the model is not a classifier.
    """
    try:
        import gradio
        import matplotlib  # noqa: F401  # else each click would report that it is missing
    except ImportError as error:
        raise ImportError('The page needs Gradio and matplotlib: pip install "capsule-heads[demo]".') from error
    from ..models.processors import modality_of
    from ..tasks import load_classifier

    classifier = load_classifier(model)
    name, show = modality_of(classifier), _make_show(classifier)

    def explain_input(*given: str | None) -> Iterator[str]:
        yield ""  # clears the result of the previous input first
        try:
            yield show(*given)
        except (ImportError, OSError, TypeError, ValueError) as error:
            sentence = str(error)
            if name != "text" and given[0]:  # the path is that of Gradio's copy
                sentence = sentence.replace(given[0], Path(given[0]).name)
            yield ALERT.format(html.escape(sentence))

    title = title_of(classifier)
    with gradio.Blocks(title=title) as page:
        gradio.HTML(f"<h1>{html.escape(title)}</h1>")
        inputs = _inputs(name)
        button = gradio.Button("Explain", variant="primary")
        result = gradio.HTML()
        gradio.Examples(_examples(name), inputs, label="Examples" if name == "text" else "Example")
        boxes = inputs if name == "text" else []
        gradio.on([button.click, *(box.submit for box in boxes)], explain_input, inputs, result, api_name="explain")
        gradio.on([given.change for given in inputs], None, None, result, js="() => ''")  # clears it in the browser
    return page


def _make_show(model: CapsuleHeadClassifier) -> Callable[..., str]:
    """Return a function that turns the values of the input components into HTML."""
    from ..explain import explain
    from ..explain.credits import check_explained
    from ..explain.parts import load_parts
    from ..explain.report import render_explanation, render_scores
    from ..models.processors import modality_of, processor_of
    from ..predicting import score_inputs
    from ..tasks import MODALITIES

    name, processor, parts = modality_of(model), processor_of(model), load_parts(str(model.config.name_or_path))
    try:
        check_explained(model.config)
        why_not = ""
    except ValueError as error:
        why_not = str(error)

    def show(first: str | None, second: str | None = None) -> str:
        if first is None or not first.strip():
            raise ValueError(f"There is nothing to explain yet; expected {NOUNS[name]}.")
        if name == "text":
            value: Any = (first, second) if second and second.strip() else first
        else:
            value = MODALITIES[name].read(first, processor)  # a file, as on the command line
        if why_not:
            (scores,) = score_inputs(model, [value], processor).tolist()
            config = model.config
            return render_scores(config.class_names, scores, config.problem_type, why_not, config.label_thresholds)
        (explanation,) = explain(model, [value], processor)
        return render_explanation(explanation, parts)

    return show


def title_of(model: CapsuleHeadClassifier) -> str:
    """Return a question, such as "negative or positive?", that names as many classes as fit."""
    names = model.config.class_names
    if model.config.problem_type == "regression":
        return f"{', '.join(names)}: how much?"
    is_multi_label = model.config.problem_type == "multi_label_classification"
    join, end = (" and ", ": which of them?") if is_multi_label else (" or ", "?")
    for n in range(len(names) if len(names) <= MOST_CLASSES else MOST_CLASSES - 1, 0, -1):
        shown = names[:n] + [f"{len(names) - n:,} others"] * (n < len(names))
        if len(", ".join(shown)) <= MOST_CHARACTERS:
            break
    *others, last = shown
    return f"{', '.join(others)}{join}{last}{end}" if others else f"{last}?"


def _inputs(name: str) -> list[Any]:
    """Return the input components. They pass files on unchanged, with their size, colours and sampling rate."""
    import gradio

    if name == "image":
        image: Any = gradio.Image(type="filepath", image_mode=None, label="Image")
        # Gradio would open the file, without a clear error for a text. A subclass would make it write a .pyi file here.
        image.preprocess = lambda given: given and given.path
        return [image]
    if name == "audio":
        return [gradio.Audio(type="filepath", label="Audio")]
    return [
        gradio.Textbox(label="Text", lines=3, max_lines=12, placeholder="A text to classify."),
        gradio.Textbox(
            label="Second text, of a pair", max_lines=12, placeholder="Only for a model that was trained on pairs."
        ),
    ]


def _examples(name: str) -> list[list[str]]:
    """Return examples for the components that suit any model: texts and a pair of texts, an image, or a tone."""
    if name == "text":
        return [[*texts] for texts in EXAMPLES]
    path = Path(tempfile.mkdtemp(prefix="capsule-heads-")) / ("discs.png" if name == "image" else "tone.wav")
    (_draw_discs if name == "image" else _play_tone)(path)
    return [[str(path)]]


def _draw_discs(path: Path) -> None:
    """Write an image of two discs, which can also be read as a stereo pair."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (448, 224), (70, 90, 110))
    drawing = ImageDraw.Draw(image)
    for left in (60, 276):
        drawing.ellipse((left, 60, left + 104, 164), fill=(230, 170, 60))
    image.save(path)


def _play_tone(path: Path, rate: int = 16000) -> None:
    """Write one second of a 440 Hz tone."""
    import array
    import wave

    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(array.array("h", (int(8000 * math.sin(2 * math.pi * 440 * n / rate)) for n in range(rate))))


COMMAND = Command("Serve a page that explains a classifier's scores.", make_parser, run)
