"""Options of training that others make void: given together, one of them would have no effect.

`CapsuleTrainingArguments` refuses those of its own; here are transformers', which matter where they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...training.arguments import RADAM, CapsuleTrainingArguments, word_of

_SAVES: tuple[str, Callable[[Any], bool]] = ("save_strategy", lambda x: x != "no")
_PUSHES: tuple[str, Callable[[Any], bool]] = ("push_to_hub", bool)
# An option, the option that it depends on, and the values of that one with which it has an effect.
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
# What the command does, whatever transformers' own scripts would make of these.
ALWAYS = {"do_train": True, "do_eval": True, "do_predict": False}


def find_void(given: Mapping[str, Any], arguments: CapsuleTrainingArguments, later: Mapping[str, Any]) -> str | None:
    """Return a sentence about an option that has no effect, or None.

    Args:
        given: options that were given in one place, and their values.
        arguments: the arguments that all places make together.
        later: options that were given elsewhere and override this place: what they make void is no mistake of it.
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
                continue  # it then says when to evaluate too
            return f"{name} is {value}, without effect where {other} is {setting}; change {other}, or leave {name} out"
    return None
