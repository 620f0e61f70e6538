"""Parsers that answer a mistake with one line, which suggests what was meant. Nothing here takes long to import."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from ...engines import Actors

# Other programs' names for our options. Close matches, words and initials find the rest.
NAMES_ELSEWHERE = {"model": ("backbone",), "dataset": ("data", "task"), "train_file": ("data",)}
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # in RuntimeErrors of torch
INTERRUPTED, PIPE_CLOSED = 130, 141  # exit statuses of programs that SIGINT and SIGPIPE end


@dataclass(frozen=True)
class Command:
    """A command of `capsule-heads`.

    A module of `capsule_heads.cli` that assigns one to `COMMAND` is a command with the module's name. `capsule-heads
    --help` imports all these modules, so they import slow packages inside their functions.

    Attributes:
        summary: one sentence for `capsule-heads --help`.
        make_parser: returns the parser of its options, given the program's name for the usage.
        run: runs the command, given the parsed options.
    """

    summary: str
    make_parser: Callable[[str], OneLineParser]
    run: Callable[[argparse.Namespace], None]


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    source = "command line"
    common: Sequence[str] = ()  # the likelier options, where a word is part of several names

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """End the program with a message that names the source of the mistake."""
        fail(f"{self.source}: {message}")

    def parse_args(  # type: ignore[override]  # argparse has two overloads, and takes any namespace
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse all arguments; an unknown one ends the program, with a suggestion."""
        options, rest = self.parse_known_args(args, namespace)
        self.refuse(rest)
        return options

    def refuse(self, rest: Sequence[str]) -> None:
        """End the program if arguments are left over."""
        if not rest:
            return
        given = rest[0].partition("=")[0]
        if not given.startswith("-"):
            self.error(f"unexpected value {given}")
        known = [option for action in self._actions for option in action.option_strings]
        self.error(f"unknown option {given}{did_you_mean(given, known, self.common)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # Only here does argparse name the choices.
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(value, action.choices or ())
            raise


def did_you_mean(given: object, known: Iterable[Any], common: Sequence[str] = ()) -> str:
    """Return "; did you mean X?" for a word that resembles a known one, else "".

    X is what other programs call by that name (`model`), else an almost equal word, else a word with all parts of the
    given one (`batch_size`) or their initials (`lr`), else a less similar word.

    Args:
        given: the word, with or without dashes before it.
        known: all known words, with or without dashes before them.
        common: the likelier known words, the likeliest first.
    """
    names: dict[str, str] = {}
    for name in map(str, known):
        names.setdefault(_plain(name), name)  # argparse also has options with inner dashes
    word = _plain(given)
    rank = {name: place for place, name in enumerate(common)}
    meant = [name for name in NAMES_ELSEWHERE.get(word, ()) if name in names]
    meant = meant or difflib.get_close_matches(word, names, n=1, cutoff=0.8)
    meant = meant or sorted((x for x in names if _has(x, word)), key=lambda x: rank.get(x, len(rank)))[:1]
    meant = meant or [x for part in word.split("_") for x in NAMES_ELSEWHERE.get(part, ()) if x in names]
    meant = meant or difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    return f"; did you mean {' or '.join(names[name] for name in meant)}?" if meant else ""


def _plain(word: object) -> str:
    return str(word).lstrip("-").replace("-", "_")


def _has(name: str, given: str) -> bool:
    """Return whether each part of a word begins a part of a name, or is the initials of consecutive parts."""
    parts = name.split("_")
    initials = "".join(part[:1] for part in parts)
    return all(
        any(part.startswith(own) for part in parts) or own in initials if len(own) > 1 else own in parts
        for own in given.split("_")
    )


def at_least(least: int) -> Callable[[str], int]:
    """Return an option's `type` that parses a whole number of at least `least`, which is 0 or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        return int(text)

    return parse


def probability(text: str) -> float:
    """Parse a number from 0 to 1, as the `type` of an option.

    Raises:
        argparse.ArgumentTypeError: If the text is something else.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:  # also for NaN
        raise argparse.ArgumentTypeError(f"{text} is not a probability; expected a number from 0 to 1")
    return value


def file_to_write(text: str) -> Path:
    """Parse the path of a file that the command writes at its end, as the `type` of an option.

    Raises:
        argparse.ArgumentTypeError: If its folder does not exist, or it is a folder itself.
    """
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be written: expected a file in a folder that exists")
    return path


def fail(message: object, status: int = 2) -> NoReturn:
    """End the program with a status, and one line on stderr, below all progress bars."""
    close_bars()
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


def close_bars() -> None:
    """Close the progress bars that are on the screen, so that the next output begins a line."""
    tqdm = sys.modules.get("tqdm")  # not loaded: there are no bars
    bars = list(getattr(tqdm.tqdm, "_instances", ())) if tqdm else []
    for bar in sorted(bars, key=lambda bar: abs(getattr(bar, "pos", 0))):
        bar.leave = True  # else it is wiped out, and the cursor stays behind it
        bar.close()


def _words(error: Exception) -> str:
    """Return an error's message, without the traceback that torch adds in a data loader's worker process."""
    text = str(error)
    return text.strip().rpartition("\n")[2].partition(": ")[2] if "\nOriginal Traceback" in text else text


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """End the program with one line after a user's mistake.

    Args:
        *kinds: the exceptions that mistakes raise. Default: those of reading options, data and models.
        prefix: text before the error's own message.
    """
    kinds = kinds or (ImportError, OSError, TypeError, ValueError)
    try:
        yield
    except BrokenPipeError:  # an OSError; no mistake
        raise
    except kinds as error:
        fail(f"{prefix}{_words(error)}")


@contextlib.contextmanager
def ended_in_one_line() -> Iterator[None]:
    """End the program without a traceback when memory runs out, Ctrl-C is pressed, or the output's reader is gone.

    All other errors that are not a user's mistakes keep their traceback.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        fail("interrupted.", INTERRUPTED)
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # Python would flush again at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE_CLOSED)
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and not any(words in reason for words in OUT_OF_MEMORY):
            raise
        fail(
            f"Out of memory ({reason[:200] or 'no details'}); expected a smaller batch "
            "(per_device_train_batch_size in training, batch_size elsewhere), shorter inputs or a smaller model."
        )


def add_hidden_states(parser: argparse._ActionsContainer) -> None:
    """Add --hidden_states, for commands that can read the hidden states of texts instead of computing them."""
    parser.add_argument(
        "--hidden_states",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="Folders of capsule-heads cache to read the hidden states of all texts from, in any states_dtype.",
    )


def add_engine_options(parser: argparse._ActionsContainer) -> None:
    """Add --engine and the options of its actors, for commands that can run on a cluster."""
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="Where the work is done: in this process, or on the Ray cluster at RAY_ADDRESS (default: local).",
    )
    parser.add_argument(
        "--actors",
        type=_range,
        metavar="N[:M]",
        help="Number of Ray's actors, or the least and the most (default: 1, up to the room that the cluster has).",
    )
    parser.add_argument(
        "--gpus_per_actor",
        type=_not_negative,
        metavar="X",
        help="GPUs of each of Ray's actors, such as 1 or 0.5 (default: 1 if the cluster has any).",
    )


def actors_of(options: argparse.Namespace) -> Actors | None:
    """Return the actors that the options ask for; None for work in this process.

    Raises:
        ValueError: If options of actors are given without a cluster.
    """
    given = {"actors": options.actors, "gpus_per_actor": options.gpus_per_actor}
    if options.engine == "local":
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"--{name} is for --engine ray; leave it out, or name the engine.")
        return None
    from ...engines import Actors

    least, most = options.actors or (1, None)
    return Actors(least, most, options.gpus_per_actor)


def _range(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    numbers = [int(x) if x.isdecimal() else 0 for x in (least, most or least)]
    if not 1 <= numbers[0] <= numbers[1]:
        raise argparse.ArgumentTypeError(f"{text}; expected a number, or the least and the most, such as 2:16")
    return numbers[0], numbers[1]


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}; expected a number, 0 or more")
    return value


def add_import_option(parser: argparse._ActionsContainer) -> None:
    """Add --import, whose modules are imported before the other options are parsed."""
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        action="append",
        default=[],
        help="Module, or file.py, that registers heads or tasks of your own; may be given several times.",
    )


def imports_given(argv: Sequence[str]) -> list[str]:
    """Return the modules that `--import` names in a command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_import_option(parser)
    with contextlib.suppress(argparse.ArgumentError):  # the command's own parser reports it
        return parser.parse_known_args(argv)[0].imports
    return []


def import_modules(names: Sequence[str]) -> None:
    """Import modules by name or file, or end the program with one line."""
    for name in names:
        try:
            if name.endswith(".py"):
                _import_file(Path(name))
            else:
                importlib.import_module(name)
        except (ImportError, OSError, SyntaxError, TypeError, ValueError) as error:
            fail(f"--import {name}: {error}")


def _import_file(path: Path) -> None:
    path, name = path.resolve(), path.stem
    if not path.is_file():
        raise FileNotFoundError(f"there is no such file; expected the name of a module, or a file {path.name}")
    loaded = sys.modules.get(name)
    spec = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
    if spec is not None and spec.origin != str(path):
        raise ImportError(f"another module has the name {name}, from {spec.origin}; rename the file")
    if loaded is not None:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
