"""What the commands share: parsers whose errors are one line, configurations, and the options of training."""

from .parser import (
    Command,
    OneLineParser,
    actors_of,
    add_engine_options,
    add_hidden_states,
    at_least,
    fail,
    file_to_write,
    one_line_errors,
)

__all__ = [
    "Command",
    "OneLineParser",
    "actors_of",
    "add_engine_options",
    "add_hidden_states",
    "at_least",
    "fail",
    "file_to_write",
    "one_line_errors",
]
