"""Checkpoints on disk: writing them under another name until they are complete, finding them, and deleting them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.state_folder import gigabytes
from ..files import holding, read_json
from ..hub.push import RUN_LOCK

UNFINISHED = "unfinished"  # folder in a run's folder, for checkpoints that are being written or deleted
FILES = "files.json"  # in a checkpoint: its files, and the size and SHA-256 of each
LAST = "last"
SECONDS_TO_LOCK = 10  # worker processes of a killed run's data loader hold its lock for some more seconds

logger = logging.getLogger(__name__)


def resolve_checkpoint(checkpoint: str | os.PathLike[str] | bool | None, run_dir: str | os.PathLike[str]) -> str | None:
    """Return the checkpoint to resume from.

    Args:
        checkpoint: a checkpoint's folder; "last" for the run's last complete checkpoint, if it has one; True for the
            last complete checkpoint, which must exist; None or False to start from the beginning.
        run_dir: the run's output_dir.

    Returns:
        The folder, or None to start from the beginning.

    Raises:
        ValueError: If the folder does not exist, or its files differ from those that were written; if `checkpoint` is
            True and there is no complete checkpoint.
    """
    if not checkpoint:
        return None
    if checkpoint is not True and checkpoint != LAST:
        if not Path(checkpoint).is_dir():
            raise ValueError(
                f"resume_from_checkpoint is {checkpoint}, which is not a directory; expected the directory of a "
                f'checkpoint, or "{LAST}" for the last in output_dir.'
            )
        fault = _fault(Path(checkpoint))
        if fault and Path(checkpoint, FILES).exists():  # checkpoints of transformers' own Trainer have no list of files
            raise ValueError(f'{checkpoint} is not complete: {fault}. Resume from another, or from "{LAST}".')
        return str(checkpoint)
    for candidate in reversed(_checkpoints(Path(run_dir))):
        fault = _fault(candidate)
        if fault is None:
            return str(candidate)
        logger.warning("%s is not complete, and is skipped: %s.", candidate, fault)
    if checkpoint is True:
        raise ValueError(f'There is no complete checkpoint in {run_dir} to resume from; "{LAST}" starts a new run.')
    return None


@contextlib.contextmanager
def locked(run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes from training in a run's folder, until this process releases the lock or ends.

    Raises:
        OSError: If another process trains in the folder, or it cannot be written to.
    """
    otherwise = (
        f"output_dir is {run_dir}, in which another process is training; expected one run at a time: wait until it has "
        "ended, or choose another output_dir."
    )
    with holding(Path(run_dir, RUN_LOCK), SECONDS_TO_LOCK, otherwise):
        yield


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn any failure to write to a folder, whatever a library raises, into an `OSError` that names the folder."""
    try:
        yield
    except Exception as error:
        # The tokenizers library raises a bare Exception.
        if type(error) is not Exception and not isinstance(error, OSError | RuntimeError | SafetensorError):
            raise
        free = ""
        with contextlib.suppress(OSError):
            free = f" {gigabytes(shutil.disk_usage(folder.parent).free)} are free there."
        cause = error.__cause__ if isinstance(error.__cause__, SafetensorError) else error
        reason = " ".join(str(cause).split()).rstrip(".")  # torch's message has several lines
        raise OSError(
            f"{folder} could not be written: {reason}.{free} Earlier checkpoints are as they "
            f'were: make room, or correct output_dir, and resume from "{LAST}".'
        ) from error


def finish(unfinished: Path, checkpoint: Path) -> None:
    """Add the list of files to a checkpoint that is written, and give it its final name."""
    files = [path for path in sorted(unfinished.rglob("*")) if path.is_file()]
    records = {path.relative_to(unfinished).as_posix(): _record(path) for path in files}
    (unfinished / FILES).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    for path in (*files, unfinished / FILES):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # some disks report only here that they are full
    delete(checkpoint)  # one of another run, at the same step
    unfinished.rename(checkpoint)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint, if it exists. A process that is killed meanwhile leaves no incomplete checkpoint."""
    if checkpoint.exists():
        deleted = checkpoint.parent / UNFINISHED / f"deleted-{checkpoint.name}"
        deleted.parent.mkdir(exist_ok=True)
        checkpoint.rename(deleted)
        shutil.rmtree(deleted)


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete a run's earliest checkpoints beyond a limit, but never the newest and the best."""
    checkpoints = _checkpoints(newest.parent)
    protected = {newest} if best is None else {newest, Path(best)}
    n_excess = len(checkpoints) - max(limit, len(protected)) if limit else 0
    for checkpoint in [path for path in checkpoints if path not in protected][: max(0, n_excess)]:
        delete(checkpoint)


def _checkpoints(run_dir: Path) -> list[Path]:
    """Return a run's checkpoints, in order of step."""
    steps = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in run_dir.glob("*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def _record(file: Path) -> dict[str, int | str]:
    with open(file, "rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _fault(checkpoint: Path) -> str | None:
    """Return how a checkpoint's files differ from those that were written, as a clause; None if they do not."""
    try:
        records = read_json(checkpoint / FILES)
    except (OSError, ValueError) as error:
        return f"no list of its files ({str(error).rstrip('.')})"
    for name, record in records.items():
        if not isinstance(record, dict) or not isinstance(record.get("bytes"), int) or "sha256" not in record:
            return f"{FILES} does not say the size and SHA-256 of {name}"
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        found = file.stat().st_size
        if found != record["bytes"]:
            return f"{name} has {found:,} bytes, expected {record['bytes']:,} bytes"
        if _record(file) != record:
            return f"{name} has changed since it was written (its SHA-256 differs from the one in {FILES})"
    return None
