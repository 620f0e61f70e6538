"""The options of `capsule-heads train`: a YAML file sets defaults, and the command line overrides them.

Options of heads are those that the registered heads declare, so a user's own head has its options here too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ...heads import Head, check_trainable, registered_heads
from ...tasks import registered_tasks, source_help
from ...training.arguments import CapsuleTrainingArguments, word_of
from ...training.run import DataArguments, ModelArguments
from .configs import SUFFIXES, config_folder, describe_config, named_configs, read_config
from .parser import OneLineParser, add_import_option, did_you_mean, fail, import_modules
from .void import find_void

DESCRIPTION = (
    "Train a capsule head on a backbone, evaluate it, and write the model, its processor and results.json to "
    "output_dir. Options may also be keys of a YAML file; the command line overrides it."
)
USAGE = "%(prog)s [--config NAME_OR_PATH] [--option value ...]"
CLASSES = (DataArguments, ModelArguments, CapsuleTrainingArguments)
# What --help shows, beside the options of heads; --help-all shows these first.
COMMON = (
    *("data", "text", "label", "validation", "test", "task", "source", "max_length", "cache_hidden_states"),
    *("backbone", "freeze_backbone", "layers", "head_type", "mixup_alpha"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate", "backbone_learning_rate"),
    *("eval_strategy", "bf16", "seed"),
    *("output_dir", "save_strategy", "push_to_hub"),
)
# First parts of the names of transformers' arguments about a run's output.
OUTPUT = (
    "output_dir",
    "save_",
    "logging_",
    "log_",
    "push_",
    "hub_",
    "report_to",
    "run_name",
    "disable_tqdm",
    "project",
)


class TrainParser(OneLineParser):
    """The parser of `capsule-heads train`.

    `parse_args` returns `data`, `model` and `arguments`, one instance of each of `CLASSES`, and `head`, the head's
    options that were given, by name.
    """

    about = DESCRIPTION

    def __init__(self, prog: str) -> None:
        super().__init__(prog=prog, usage=USAGE, description=self.about, add_help=False)
        self.add_argument(
            "--config", metavar="NAME_OR_PATH", help="Name of a configuration in the package, or a YAML file."
        )
        self.add_argument("--list-configs", action="store_true", help="Show the configurations of the package.")
        self.add_argument("-h", "--help", action="store_true", help="Show the common options.")
        self.add_argument("--help-all", action="store_true", help="Show all options.")

    def parse_args(  # type: ignore[override]  # argparse has two overloads, and takes any namespace
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse the command line and its YAML file; after a mistake, or help, the program ends."""
        args = sys.argv[1:] if args is None else args
        own, rest = self.parse_known_args(args, namespace)
        if own.list_configs:
            _print_configs()
        name, config = read_config(own.config) if own.config else ("", {})
        modules = config.pop("import", [])
        import_modules([str(x) for x in (modules if isinstance(modules, list) else [modules])])
        if own.help or own.help_all or not args:
            self._print_options(own.help_all, sys.stdout if args else sys.stderr)
            sys.exit(0 if args else 2)
        head_class = _head_class()
        parser = GivenOptions((DataArguments, ModelArguments, head_class, CapsuleTrainingArguments))
        in_file = _parse_config(parser, config, own.config)
        overrides, unknown = parser.parse(rest, self.source)
        if unknown and not own.config and (unknown[0] in named_configs() or Path(unknown[0]).suffix in SUFFIXES):
            self.error(f"unexpected value {unknown[0]}; did you mean --config {unknown[0]}?")
        parser.refuse(unknown)
        values = in_file | overrides
        values.setdefault("output_dir", f"runs/{name or values.get('task') or Path(str(values.get('data'))).stem}")
        source = " with the ".join(filter(None, (own.config, self.source if overrides or not own.config else None)))
        data, model, arguments = (_make(cls, values, source) for cls in CLASSES)
        for where, given, later in ((own.config, in_file, overrides), (self.source, overrides, {})):
            void = find_void(given, arguments, later)
            if void is not None:
                fail(f"{where}: {void}")
        head = {name: value for name, value in values.items() if name in _fields(head_class)}
        more = self.parse_more(own, parser, in_file, overrides)
        return argparse.Namespace(data=data, model=model, head=head, arguments=arguments, **more)

    def parse_more(
        self, own: argparse.Namespace, parser: GivenOptions, in_file: Mapping[str, Any], overrides: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return what a command needs besides the options of training.

        Args:
            own: the parsed options of this parser itself.
            parser: the parser of the options of training.
            in_file: values of the YAML file.
            overrides: values of the command line.
        """
        return {}

    def _print_options(self, show_all: bool, file: Any) -> None:
        shown = type(self)(self.prog)
        add_import_option(shown)
        always = {*COMMON, *head_fields()}
        for title, options in _groups().items():
            group = shown.add_argument_group(title)
            common = [name for name in (*COMMON, *options) if name in options and name in always]
            others = [name for name in options if name not in always] if show_all else []
            for name in dict.fromkeys([*common, *others]):
                kind, words = options[name]
                words = words.replace("%%", "%").replace("%", "%%")  # argparse formats it; some are escaped already
                group.add_argument(f"--{name}", metavar=_metavar(kind, name), help=words)
        shown.print_help(file)


class GivenOptions(OneLineParser, HfArgumentParser):
    """Parses only what is given: no option is required, and no option has a default."""

    common = COMMON

    def __init__(self, dataclass_types: Sequence[type]) -> None:
        super().__init__(dataclass_types, add_help=False)

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        """Add an option as in argparse, without a default."""
        choices = _choices().get(names[0].removeprefix("--"))
        if choices is not None:
            kwargs["choices"] = choices
            kwargs["type"] = _one_to_train if names[0] == "--head_type" else kwargs.get("type")
        if kwargs.get("type") is string_to_bool:  # also for an option that may be None
            kwargs |= {"nargs": "?", "const": True}
        return super().add_argument(*names, **{**kwargs, "default": argparse.SUPPRESS, "required": False})

    def parse(self, options: Sequence[str], source: str) -> tuple[dict[str, Any], list[str]]:
        """Return the values of options, and the arguments that are no options."""
        self.source = source
        namespace, rest = self.parse_known_args(options)
        return vars(namespace), rest


def _choices() -> dict[str, tuple[str, ...]]:
    return {"task": tuple(registered_tasks()), "head_type": tuple(_heads_to_train())}


def _heads_to_train() -> dict[str, type[Head]]:
    return {name: head for name, head in registered_heads().items() if head.made_by is None}


def _one_to_train(head_type: str) -> str:
    """Return the name of a head; refuse a head that is made of trained models."""
    if head_type in registered_heads():
        try:
            check_trainable(registered_heads()[head_type])
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return head_type


def head_fields() -> dict[str, dict[str, dataclasses.Field]]:
    """Return the options of all heads to train: for each option's name, the field of each head that has it."""
    found: dict[str, dict[str, dataclasses.Field]] = {}
    for head_type, head in _heads_to_train().items():
        hints = get_type_hints(head.Options)
        for field in dataclasses.fields(head.Options):
            field.type = hints[field.name]
            found.setdefault(field.name, {})[head_type] = field
    return found


def _head_class() -> type:
    """Return a dataclass with the options of all heads; an option of several heads is in it once."""
    merged = []
    for name, by_head in head_fields().items():
        (head_type, first), *others = by_head.items()
        for other, field in others:
            if _without_none(field.type) != _without_none(first.type):
                fail(
                    f"The option {name} is {field.type} for {other} heads and {first.type} for {head_type} heads; "
                    "expected one type: rename the option."
                )
        choices = tuple(dict.fromkeys(x for field in by_head.values() for x in field.metadata.get("choices", ())))
        metadata = {"choices": choices} if choices else {}
        merged.append((name, first.type, dataclasses.field(default=first.default, metadata=metadata)))
    return dataclasses.make_dataclass("HeadArguments", merged)


def _without_none(kind: Any) -> frozenset:
    return frozenset(get_args(kind) or [kind]) - {type(None)}


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def _make(cls: type, values: Mapping[str, Any], source: str) -> Any:
    """Return an instance of a dataclass, from the values that are its fields."""
    fields = _fields(cls)
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            fail(f"{source}: {name} is missing; give the option --{name}, or the key in a YAML file")
    try:
        return cls(**{name: value for name, value in values.items() if name in fields})
    except (
        ImportError,
        OSError,
        TypeError,
        ValueError,
    ) as error:  # what the dataclass itself checks, and files it reads
        fail(f"{source}: {error}")


def _parse_config(parser: GivenOptions, config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the values of a YAML file's keys.

    Each value is parsed as if it were given on the command line, so that both follow the same rules. This also makes a
    number of 5e-4, which YAML takes for a string.
    """
    hints: dict[str, Any] = {}
    for cls in parser.dataclass_types:
        types = get_type_hints(cls)
        hints |= {name: types[name] for name in _fields(cls)}
    values: dict[str, Any] = {}
    for name, value in config.items():
        if name not in hints:
            fail(f"{source}: unknown key {name}{did_you_mean(name, hints, COMMON)}")
        kinds = get_args(hints[name])
        if value is None:
            if type(None) not in kinds:
                fail(f"{source}: {name} is null; expected a value, or leave the key out")
            values[name] = None
            continue
        if isinstance(value, dict):
            if dict not in {get_origin(kind) or kind for kind in kinds}:
                fail(f"{source}: {name} holds keys of its own; expected one value")
            value = json.dumps(value)
        options = [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
        parsed, rest = parser.parse(options, source)
        if rest:
            fail(f"{source}: {name} is a list; expected one value")
        values |= parsed
    return values


def _print_configs() -> NoReturn:
    configs = named_configs()
    width = max(map(len, configs))
    for name, path in configs.items():
        print(f"{name:{width}}  {describe_config(path)}")
    print(f"Files: {config_folder()}")
    sys.exit(0)


def _groups() -> dict[str, dict[str, tuple[Any, str]]]:
    """Return the type and help text of each option, by the title of its group and its name."""
    of_heads = {name: (next(iter(x.values())).type, _head_help(x)) for name, x in head_fields().items()}
    data, model, training = (
        {name: (kind, _help(_fields(cls)[name])) for name, kind in get_type_hints(cls).items() if name in _fields(cls)}
        for cls in CLASSES
    )
    output = {name: training.pop(name) for name in list(training) if name.startswith(OUTPUT)}
    return {"data": data, "model": {**model, **of_heads}, "training": training, "output": output}


def _help(field: dataclasses.Field) -> str:
    own = {
        "source": source_help(),
        "output_dir": "Folder of the run. Default: runs/ and the name of the configuration, task or data.",
    }
    words = own.get(field.name, field.metadata.get("help", ""))
    choices = _choices().get(field.name) or field.metadata.get("choices") or ()
    if isinstance(field.type, type) and issubclass(field.type, Enum):
        choices = [x.value for x in field.type]
    default = word_of(field.default)
    if choices:
        words += f" One of {', '.join(map(str, choices))}."
    if field.default is field.default_factory is dataclasses.MISSING:
        words += " Required."
    elif default not in (None, "", dataclasses.MISSING) and "efault" not in words:
        words += f" Default: {default}."
    return words


def _head_help(by_head: Mapping[str, dataclasses.Field]) -> str:
    """Return the help text of an option of heads: each different text, and the heads that it is for."""
    texts: dict[str, list[str]] = {}
    for head_type, field in by_head.items():
        words = field.metadata["help"]
        if "choices" in field.metadata:
            words += f" One of {', '.join(map(str, field.metadata['choices']))}."
        texts.setdefault(words, []).append(f"{head_type} (default: {field.default})")
    return " ".join(f"{words} For {', '.join(heads)}." for words, heads in texts.items())


def _metavar(kind: Any, name: str) -> str:
    kinds = _without_none(kind)
    if kinds == {bool}:
        return "true|false"
    if any(get_origin(x) is list or x is list for x in kinds | {kind}):
        return "X [X ...]"
    return name.upper()
