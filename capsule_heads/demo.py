"""A page to look at a classifier: `capsule-heads demo MODEL`. It needs Gradio: pip install "capsule-heads[demo]"."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from .cli.options import OneLineParser, fail
from .explain.pictures import draw_parts, draw_patches, draw_tokens
from .explain.report import render_words
from .files import write_text
from .hub.push import pushing_to
from .models import CapsuleHeadForImageClassification
from .training.experiment import load_classifier
from .version import __version__

if TYPE_CHECKING:
    import gradio

APP = """from capsule_heads.demo import build_demo

build_demo({model!r}).launch()
"""
REQUIREMENTS = """capsule-heads[demo]=={version}
"""
CARD = """---
title: {title}
sdk: gradio
app_file: app.py
models: [{model}]
---
"""


def build_demo(model: str) -> gradio.Blocks:
    """The page: scores of a text or an image, and where they come from.

    Args:
        model: directory or Hub name of a classifier of texts or images.

    Returns:
        A Gradio app; `launch()` serves it.

    Raises:
        ImportError: if Gradio is not installed.
        OSError: if the model, or its processor, is not found.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError('The page needs Gradio: pip install "capsule-heads[demo]".') from error
    classifier = load_classifier(model)
    is_image = isinstance(classifier, CapsuleHeadForImageClassification)

    def explain(value: Any) -> tuple[dict[str, float], str, Any, Any]:
        if value is None or (isinstance(value, str) and not value.strip()):
            raise gradio.Error("There is nothing to explain yet: give a text or an image.")
        try:
            (explanation,) = explain(classifier, value)
        except (OSError, TypeError, ValueError) as error:
            raise gradio.Error(str(error)) from error
        scores = dict(zip(explanation.labels, explanation.probabilities.tolist()))
        words = "" if is_image else render_words(explanation)
        draw = draw_patches if is_image else draw_tokens
        return scores, words, draw(explanation), draw_parts([explanation])

    with gradio.Blocks(title="capsule_heads") as page:
        gradio.Markdown(f"# {model}\nBlue speaks for the predicted class against the others, red against it.")
        given = gradio.Image(type="pil", label="Image") if is_image else gradio.Textbox(label="Text", lines=3)
        button = gradio.Button("Explain", variant="primary")
        outputs = [
            gradio.Label(label="Scores"),
            gradio.HTML(visible=not is_image),
            gradio.Plot(show_label=False),
            gradio.Plot(show_label=False),
        ]
        button.click(explain, given, outputs)
        if not is_image:
            given.submit(explain, given, outputs)
    return page


def write_space(model: str, directory: str | Path) -> None:
    """Writes what a Space on the Hub needs to serve the page: `app.py`, `requirements.txt`, and a card.

    Args:
        model: Hub name of the classifier, which the Space loads.
        directory: where to.

    Raises:
        ValueError: for a directory of this machine, which a Space cannot load.
    """
    if Path(model).exists():
        raise ValueError(f"{model} is a directory here, and a Space loads its model from the Hub; push it there first.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "app.py", APP.format(model=model))
    write_text(directory / "requirements.txt", REQUIREMENTS.format(version=__version__))
    write_text(directory / "README.md", CARD.format(title=model.split("/")[-1], model=model))


def push_space(model: str, repo_id: str) -> str:
    """Pushes the page as a Space, in one commit; the Space is made if there is none.

    Args:
        model: as in `write_space`.
        repo_id: the Space, "name" or "owner/name".

    Returns:
        Its address.

    Raises:
        ValueError: for a model that a Space cannot load, or a name that no repository can have.
        OSError: if pushing fails.
    """
    with tempfile.TemporaryDirectory() as folder, pushing_to(repo_id):
        write_space(model, folder)
        api = HfApi()
        space = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", exist_ok=True)
        api.upload_folder(
            repo_id=space.repo_id, repo_type="space", folder_path=folder, commit_message="Upload the page"
        )
    return str(space)


def main() -> None:
    """The command `capsule-heads`."""
    parser = OneLineParser(prog="capsule-heads", description=__doc__)
    parser.add_argument("command", choices=["demo"])
    parser.add_argument("model", help="directory or Hub name of a classifier of texts or images")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--write_space", help="write the files of a Space to this directory, in the place of serving")
    parser.add_argument("--push_space", metavar="NAME", help="push it as a Space, in the place of serving")
    options = parser.parse_args()
    try:
        if options.write_space:
            write_space(options.model, options.write_space)
            print(options.write_space)
        if options.push_space:
            print(push_space(options.model, options.push_space))
        if options.write_space or options.push_space:
            return
        build_demo(options.model).launch(server_port=options.port, show_error=True)
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(error)


if __name__ == "__main__":
    sys.exit(main())
