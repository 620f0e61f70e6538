"""The options of `capsule-heads cache`: those options of `capsule-heads train` on which hidden states depend."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ...training.arguments import CapsuleTrainingArguments
from .parser import actors_of, add_engine_options, at_least, fail
from .training import GivenOptions, TrainParser, head_fields

USED = ("seed", "use_cpu", "disable_tqdm")  # transformers' arguments with an effect: the seed draws validation rows
WITHOUT_EFFECT = {x.name for x in dataclasses.fields(CapsuleTrainingArguments)} - {*USED}
WITHOUT_EFFECT |= {"cache_hidden_states", "cache_on_device", "hidden_states", "early_stopping_patience"}
WITHOUT_EFFECT |= {"mixup_alpha", "class_weights"}


class CacheParser(TrainParser):
    """The parser of `capsule-heads cache`. `parse_args` returns `part` and other options of its own too."""

    about = (
        "Compute a frozen backbone's hidden states of all splits, for capsule-heads train and sweep with the same "
        "options. The same command resumes an interrupted computation. Several processes can share the work: start "
        "accelerate launch -m capsule_heads cache, or one process for each --part, at any time, on machines that share "
        "a disk."
    )

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self.add_argument("--part", type=_part, metavar="K/N", help="Part of the work to begin with, such as 3/16.")
        self.add_argument(
            "--batch_tokens",
            type=at_least(1),
            default=2048,
            metavar="N",
            help="Number of tokens, with padding, in one forward pass of the backbone. Default: 2048.",
        )
        self.add_argument(
            "--import_states",
            metavar="FOLDER",
            help="Folder of hidden states to keep that another program has computed: vLLM's files, or arrays. On some "
            "texts they are compared with the backbone's own.",
        )
        add_engine_options(self)

    def parse_more(
        self, own: argparse.Namespace, parser: GivenOptions, in_file: Mapping[str, Any], overrides: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the part, the number of tokens in a batch, the actors of a cluster, and the folder to import."""
        void = WITHOUT_EFFECT | head_fields().keys()
        for name, value in overrides.items():
            if name in void:
                fail(f"{self.source}: {name} is {value}, which has no effect on hidden states; leave it out")
        try:
            actors = actors_of(own)
        except ValueError as error:
            fail(f"{self.source}: {error}")
        if actors is not None and own.part is not None:
            fail(f"{self.source}: --part is for processes without a cluster, and --engine is ray; leave one out")
        if actors is not None and own.import_states is not None:
            fail(f"{self.source}: --import_states is read by this process, and --engine is ray; leave one out")
        return {
            "part": own.part,
            "batch_tokens": own.batch_tokens,
            "actors": actors,
            "import_states": own.import_states,
        }


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, n_parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= n_parts:
        raise argparse.ArgumentTypeError(f"{text}; expected K/N, with K from 1 to N, such as 3/16")
    return number - 1, n_parts
