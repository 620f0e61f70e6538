"""Options of training that other options make void, so that they would have no effect.

`CapsuleTrainingArguments` checks its own options. Here are those of transformers, which matter only if they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...training.arguments import RADAM, CapsuleTrainingArguments, word_of

_SAVES: tuple[str, Callable[[Any], bool]] = ("save_strategy", lambda x: x != "no")
_PUSHES: tuple[str, Callable[[Any], bool]] = ("push_to_hub", bool)
# An option, the option that it depends on, and the values of the latter with which the former has an effect.
NEEDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "save_steps": ("save_strategy", lambda x: x == "steps"),
    "save_total_limit": _SAVES,
    "save_only_model": _SAVES,
    "load_best_model_at_end": _SAVES,
    "logging_steps": ("logging_strategy", lambda x: x == "steps"),
    "eval_steps": ("eval_strategy", lambda x: x == "steps"),
    "eval_delay": ("eval_strategy", lambda x: x != "no"),
    "num_train_epochs": ("max_steps", lambda x: x <= 0),
    "optim_target_modules": ("optim", lambda x: x != RADAM),
    **dict.fromkeys(("hub_model_id", "hub_token", "hub_private_repo", "hub_revision", "hub_always_push"), _PUSHES),
}
# What the command always does. transformers' own scripts read these options.
ALWAYS = {"do_train": True, "do_eval": True, "do_predict": False}


def find_void(given: Mapping[str, Any], arguments: CapsuleTrainingArguments, later: Mapping[str, Any]) -> str | None:
    """Return a sentence about an option that has no effect, or None.

    Args:
        given: options that were given in one place, and their values.
        arguments: the arguments that all places make together.
        later: options that override those of this place. An option that they make void is not a mistake.
    """
    for name, value in given.items():
        if name in ALWAYS and value != ALWAYS[name]:
            return f"{name} is {value}, which has no effect: the command trains and evaluates; leave it out"
        if name not in NEEDS or value is None or value is False or name in later:
            continue
        other, has_effect = NEEDS[name]
        setting = word_of(getattr(arguments, other))
        if other not in later and not has_effect(setting):
            if name == "logging_steps" and arguments.eval_strategy == "steps" and "eval_steps" not in given:
                continue  # it also sets when to evaluate
            return f"{name} is {value}, without effect where {other} is {setting}; change {other}, or leave {name} out"
    return None
