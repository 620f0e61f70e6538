"""A Space on the Hub that serves the page of `capsule-heads demo`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from ..files import write_text
from ..version import __version__
from .push import pushing_to

APP = """from capsule_heads.cli.demo import build_demo

build_demo({model!r}).launch(show_error=True)
"""
REQUIREMENTS = """capsule-heads[demo]=={version}
"""
CARD = """---
title: "{title}"
sdk: gradio
app_file: app.py
models: ["{model}"]
---
"""


def write_space(model: str, directory: str | Path) -> None:
    """Write what a Space on the Hub needs to serve the page: `app.py`, `requirements.txt`, and a card.

    Args:
        model: Hub name of the classifier, which the Space loads.
        directory: where to.

    Raises:
        ValueError: If the model is a directory of this machine, which a Space cannot load.
    """
    if Path(model).exists():
        raise ValueError(f"{model} is a directory here, and a Space loads its model from the Hub; push it there first.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "app.py", APP.format(model=model))
    write_text(directory / "requirements.txt", REQUIREMENTS.format(version=__version__))
    write_text(directory / "README.md", CARD.format(title=model.split("/")[-1], model=model))


def push_space(model: str, repo_id: str) -> str:
    """Push the page as a Space, in one commit, and return its address; the Space is created if it does not exist.

    Args:
        model: as in `write_space`.
        repo_id: the Space, "name" or "owner/name".

    Raises:
        ValueError: If a Space cannot load the model, or no repository can have the name.
        OSError: If pushing fails.
    """
    with tempfile.TemporaryDirectory() as folder, pushing_to(repo_id):
        write_space(model, folder)
        api = HfApi()
        space = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", exist_ok=True)
        api.upload_folder(
            repo_id=space.repo_id, repo_type="space", folder_path=folder, commit_message="Upload the page"
        )
    return str(space)
