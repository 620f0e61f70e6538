"""Silence for the libraries that commands use: only our own warnings, and one progress bar at a time, are shown.

docs/reference/command_line.md lists what is silenced here, and why it is harmless. Importing the package
silences nothing.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

BARS_OF_WEIGHTS = ("Loading weights", "Loading checkpoint shards", "Writing model shards")


class _Lines(logging.Handler):
    """Prints messages as plain lines on stderr, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")
        with contextlib.nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(sys.stderr):
            print(self.format(record), file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show the warnings of `capsule_heads` as plain lines."""
    logger, handler = logging.getLogger("capsule_heads"), _Lines(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide transformers' bars for files of weights, which are read and written in seconds."""
    from transformers.utils.logging import set_tqdm_hook

    def make_bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(*args, **(kwargs | {"disable": True} if kwargs.get("desc") in BARS_OF_WEIGHTS else kwargs))

    earlier = set_tqdm_hook(make_bar)
    try:
        yield
    finally:
        set_tqdm_hook(earlier)


@contextlib.contextmanager
def without_data_bars() -> Iterator[None]:
    """Hide the bars of datasets, as a split to evaluate or explain is prepared in seconds."""
    import datasets

    was_shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def without_export_notes() -> Iterator[None]:
    """Hide torch's notes on operators that no model here has, and ONNX Runtime's advice that harms ours."""
    torch_notes, root = logging.getLogger("torch.onnx._internal.exporter._registration"), logging.getLogger()
    level = torch_notes.level

    def is_shown(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Please consider to run pre-processing before quantization")

    torch_notes.setLevel(logging.ERROR)
    root.addFilter(is_shown)
    try:
        yield
    finally:
        torch_notes.setLevel(level)
        root.removeFilter(is_shown)
