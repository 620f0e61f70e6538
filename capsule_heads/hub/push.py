"""Push a model, or the directory of a run: files, card and code in one commit."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from .card import MARKER, write_model_card
from .code import write_code
from .config import read_config
from .results import read_runs

RUN_LOCK = "_lock"  # the process that trains in a folder holds it; Trainer pushes no name that begins like this
LEFT_OUT = ("training_args.bin", RUN_LOCK)  # of a run; the first is a pickle, which nobody should load


def push_run(directory: str | os.PathLike[str], repo_id: str, **options: Any) -> CommitInfo:
    """Push the directory of a run as `capsule-heads train` leaves it.

    Model, tokenizer or other processor, results.json and a model card go into one commit. The directory itself does
    not change. Checkpoints and other folders in it are not pushed.

    Args:
        directory: the run's.
        repo_id: the repository, "name" or "owner/name"; created if it does not exist.
        **options: `include_code=True` to push the code that runs the model without this package; `license`,
            `language` and `tags` for the card; `private`, `token`, and arguments of `HfApi.upload_folder`: `revision`,
            `commit_message`, `commit_description`, `create_pr`.

    Returns:
        The commit.

    Raises:
        ValueError: If the backbone of a head alone cannot be had by others, or config.json or results.json is not what
            training writes.
        OSError: If the directory holds no model, or pushing fails; the repository is then as it was.
    """
    if not Path(directory).is_dir():
        raise OSError(f"There is no directory {directory}; expected the output_dir of a run.")
    directory = Path(directory).resolve()
    if not (directory / "config.json").is_file():
        raise OSError(f"{directory} holds no model: it has no config.json.")
    config = read_config(directory)
    check_backbone_is_shared(config["base_model_name_or_path"], config["head_only"])
    results = directory / "results.json"
    with tempfile.TemporaryDirectory() as folder:
        for path in directory.iterdir():
            if path.is_file() and path.name not in LEFT_OUT and not path.name.startswith("."):
                Path(folder, path.name).symlink_to(path)
        if results.is_file():
            options["results"] = read_runs([results])[0]
        return push_folder(Path(folder), repo_id, **options)


def check_backbone_is_shared(name: str | None, head_only: bool) -> None:
    """Check that others can load what is pushed.

    Args:
        name: the backbone's name or path in the configuration.
        head_only: whether the head is pushed alone.

    Raises:
        ValueError: If a head alone refers to a backbone in a directory of this machine.
    """
    if head_only and name and (os.path.isabs(name) or name.startswith((".", "~")) or os.path.isdir(name)):
        raise ValueError(
            f"The head refers to its backbone as {name}, a directory that nobody else has; expected a name on the Hub: "
            "put the head on the backbone by that name, or push all weights, with --head_only false (head_only=False "
            "in Python)."
        )


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    results: dict[str, Any] | None = None,
    include_code: bool = False,
    license: str | None = None,
    language: str | None = None,
    tags: Sequence[str] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload model",
    **commit_options: Any,
) -> CommitInfo:
    """Push a folder that holds a model, with a card, in one commit.

    Args:
        folder: with what `save_pretrained` of the model and its processor wrote; card and code are written to it.
        repo_id: the repository, "name" or "owner/name"; created if it does not exist.
        results: the results of the run, for the card.
        include_code: whether to push the code that runs the model without this package.
        license: identifier of the model's licence, such as "mit".
        language: ISO 639 code of the language of its texts.
        tags: more tags for the card.
        private: whether to make the repository a private one, if it is made.
        token: the user's, or whether to use the stored one.
        commit_message: message of the commit.
        **commit_options: other arguments of `HfApi.upload_folder`.

    Returns:
        The commit.

    Raises:
        ValueError: If the configuration is not one that `save_pretrained` wrote, or the head's code cannot go along.
        OSError: If pushing fails; the repository is then as it was.
    """
    if include_code:
        write_code(folder)
    api = HfApi(token=token)
    with pushing_to(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        _keep_own_card(api, repo_id, folder)
        write_model_card(folder, repo_id, results, license=license, language=language, tags=tags or ())
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message, **commit_options)


@contextlib.contextmanager
def pushing_to(repo_id: str) -> Iterator[None]:
    """Turn the many errors of pushing into an OSError that names the repository."""
    try:
        yield
    except (TypeError, ValueError):
        raise  # a wrong option, or a name that no repository can have
    except Exception as error:  # the client's own, those of its HTTP library, and plain RuntimeErrors
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise OSError(
                f"{repo_id} cannot be pushed to: it takes a token with write access, from `hf auth login`, HF_TOKEN in "
                f"the environment, or token=... ({error})"
            ) from error
        causes = " Cause: ".join(str(x) for x in (error, error.__cause__) if x is not None)
        raise OSError(f"Pushing to {repo_id} failed, and left it as it was: {causes}") from error


def _keep_own_card(api: HfApi, repo_id: str, folder: Path) -> None:
    """Take over the card that someone wrote in the repository, which the commit would replace."""
    try:
        card = Path(api.hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return
    if MARKER not in card:
        (folder / "README.md").unlink(missing_ok=True)  # perhaps a link to the run's
        (folder / "README.md").write_text(card, encoding="utf-8")
