"""Checkpoints on disk: written under another name and renamed when they are complete, found again, and deleted."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.state_file import gigabytes

UNFINISHED = "unfinished"  # the folder, in a run's, of what is being written or deleted
FILES = "files.json"  # in a checkpoint: its files, and the bytes of each
LAST = "last"

logger = logging.getLogger(__name__)


def resolve_checkpoint(checkpoint: str | os.PathLike[str] | bool | None, run_dir: str | os.PathLike[str]) -> str | None:
    """Return the checkpoint to resume from.

    Args:
        checkpoint: a checkpoint's folder; "last" for the run's last complete one, if there is one yet; True for the
            same, where there has to be one; None or False to start from the beginning.
        run_dir: the run's output_dir.

    Returns:
        The folder, or None to start from the beginning.

    Raises:
        ValueError: If the folder does not exist, or has lost files; if there is no complete checkpoint for True.
    """
    if not checkpoint:
        return None
    if checkpoint is not True and checkpoint != LAST:
        if not Path(checkpoint).is_dir():
            raise ValueError(
                f"resume_from_checkpoint is {checkpoint}, which is not a directory; expected a checkpoint's, or "
                f'"{LAST}" for the last in output_dir.'
            )
        fault = _fault(Path(checkpoint))
        if fault and Path(checkpoint, FILES).exists():  # the checkpoints of transformers' own Trainer have no list
            raise ValueError(f'{checkpoint} is not complete: {fault}. Resume from another, or from "{LAST}".')
        return str(checkpoint)
    for candidate in reversed(_checkpoints(Path(run_dir))):
        fault = _fault(candidate)
        if fault is None:
            return str(candidate)
        logger.warning("%s is not complete, and passed over: %s.", candidate, fault)
    if checkpoint is True:
        raise ValueError(f'There is no complete checkpoint in {run_dir} to resume from; "{LAST}" starts a new run.')
    return None


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn any failure to write to a folder, whatever a library raises, into an `OSError` that names it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = ""
        with contextlib.suppress(OSError):
            free = f" {gigabytes(shutil.disk_usage(folder.parent).free)} are free there."
        reason = str(error.__cause__ if isinstance(error.__cause__, SafetensorError) else error).strip().rstrip(".")
        raise OSError(
            f"{folder} could not be written: {reason}.{free} Earlier checkpoints are as they "
            f'were: make room, or correct output_dir, and resume from "{LAST}".'
        ) from error


def finish(unfinished: Path, checkpoint: Path) -> None:
    """Give a checkpoint that is written its list of files, and its name."""
    files = [path for path in sorted(unfinished.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(unfinished).as_posix(): path.stat().st_size for path in files}
    (unfinished / FILES).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    for path in (*files, unfinished / FILES):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # some disks say only here that they are full
    delete(checkpoint)  # of another run, at the same step
    unfinished.rename(checkpoint)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint, if it exists; a process that is killed meanwhile leaves no incomplete one."""
    if checkpoint.exists():
        deleted = checkpoint.parent / UNFINISHED / f"deleted-{checkpoint.name}"
        deleted.parent.mkdir(exist_ok=True)
        checkpoint.rename(deleted)
        shutil.rmtree(deleted)


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete a run's earliest checkpoints beyond a number, but not the newest and the best."""
    checkpoints = _checkpoints(newest.parent)
    protected = {newest} if best is None else {newest, Path(best)}
    n_excess = len(checkpoints) - max(limit, len(protected)) if limit else 0
    for checkpoint in [path for path in checkpoints if path not in protected][: max(0, n_excess)]:
        delete(checkpoint)


def _checkpoints(run_dir: Path) -> list[Path]:
    """Return a run's checkpoints, in order of step."""
    steps = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in run_dir.glob("*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def _fault(checkpoint: Path) -> str | None:
    """Return what a checkpoint lacks, as a clause; None if it is complete."""
    try:
        sizes = json.loads((checkpoint / FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"no list of its files ({error})"
    if not isinstance(sizes, dict):
        return f"{FILES} does not say the size of each file"
    for name, size in sizes.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return f"{name} {'is missing' if found is None else f'has {found:,} bytes'}, expected {size:,} bytes"
    return None
