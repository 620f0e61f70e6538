"""`capsule-heads demo`: a page to look at a classifier. It needs Gradio: pip install "capsule-heads[demo]"."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .options import Command, OneLineParser, one_line_errors

if TYPE_CHECKING:
    import gradio

DESCRIPTION = (
    "Serve a page that shows the scores of a text, an image or audio, and where they come from. It needs Gradio: "
    'pip install "capsule-heads[demo]".'
)


def make_parser(prog: str) -> OneLineParser:
    """Return the parser of options."""
    parser = OneLineParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("model", help="Directory or Hub name of a classifier.")
    parser.add_argument("--port", type=int, default=7860, help="Port to serve at (default: %(default)s).")
    parser.add_argument("--write_space", metavar="FOLDER", help="Write the files of a Space here, instead of serving.")
    parser.add_argument("--push_space", metavar="NAME", help="Push the page as a Space, instead of serving it.")
    return parser


def run(options: argparse.Namespace) -> None:
    """Serve the page, or write or push it as a Space."""
    from ..hub.space import push_space, write_space

    with one_line_errors():
        if options.write_space:
            write_space(options.model, options.write_space)
            print(options.write_space)
        if options.push_space:
            print(push_space(options.model, options.push_space))
        if options.write_space or options.push_space:
            return
        build_demo(options.model).launch(server_port=options.port, show_error=True)


def build_demo(model: str) -> gradio.Blocks:
    """Build the page: scores of a text, an image or audio, and where they come from.

    Args:
        model: directory or Hub name of a classifier.

    Returns:
        A Gradio app; `launch()` serves it.

    Raises:
        ImportError: If Gradio is not installed.
        OSError: If the model, or its processor, is not found.
        ValueError: If the model is no classifier.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError('The page needs Gradio: pip install "capsule-heads[demo]".') from error
    from ..explain import explain
    from ..explain.pictures import draw_explanation, draw_parts
    from ..explain.report import render_words
    from ..models.processors import modality_of, processor_of
    from ..tasks import MODALITIES, load_classifier

    classifier = load_classifier(model)
    name, processor = modality_of(classifier), processor_of(classifier)

    def explain_input(value: Any) -> tuple[dict[str, float], str, Any, Any]:
        if value is None or (isinstance(value, str) and not value.strip()):
            raise gradio.Error(f"There is nothing to explain yet; expected {MODALITIES[name].noun}.")
        try:
            # An image is one already; a text is read as on the command line, audio comes as a file.
            value = MODALITIES[name].read(value, processor) if isinstance(value, str) else value
            (explanation,) = explain(classifier, [value], processor)
        except (ImportError, OSError, TypeError, ValueError) as error:
            raise gradio.Error(str(error)) from error
        scores = dict(zip(explanation.labels, explanation.probabilities.tolist()))
        return scores, render_words(explanation), draw_explanation(explanation), draw_parts([explanation])

    inputs: dict[str, Any] = {
        "text": lambda: gradio.Textbox(label="Text", lines=3),
        "image": lambda: gradio.Image(type="pil", label="Image"),
        "audio": lambda: gradio.Audio(type="filepath", label="Audio"),
    }
    with gradio.Blocks(title="capsule_heads") as page:
        gradio.Markdown(f"# {model}\nBlue speaks for the predicted class against the others, red against it.")
        given = inputs[name]()
        button = gradio.Button("Explain", variant="primary")
        outputs = [
            gradio.Label(label="Scores"),
            gradio.HTML(visible=name == "text"),
            gradio.Plot(show_label=False),
            gradio.Plot(show_label=False),
        ]
        button.click(explain_input, given, outputs)
        if name == "text":
            given.submit(explain_input, given, outputs)
    return page


COMMAND = Command("Serve a page to look at a classifier.", make_parser, run)
