"""The kinds of input that a backbone takes, found in its configuration before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from transformers.configuration_utils import PreTrainedConfig

from .parts import AUDIO_INPUTS, IMAGE_INPUTS, TEXT_INPUTS, TOWERS, main_input_name, tower_config

INPUTS = {"texts": TEXT_INPUTS, "images": IMAGE_INPUTS, "audio": AUDIO_INPUTS}


def kinds_of_input(config: PreTrainedConfig) -> set[str]:
    """Return the kinds of input of a model and its towers, "texts", "images" or "audio"; empty if they are unknown."""
    names = set(_main_inputs(config))
    if names - {name for of_kind in INPUTS.values() for name in of_kind}:
        return set()
    return {kind for kind, of_kind in INPUTS.items() if names & set(of_kind)}


def _main_inputs(config: PreTrainedConfig) -> Iterator[str]:
    from transformers import MODEL_MAPPING  # here: see Backbone.candidates

    towers = (tower_config(config, tower) for tower in TOWERS)
    for part in (config, *(tower for tower in towers if tower is not None)):
        if type(part) not in MODEL_MAPPING:
            yield "unknown"
            continue
        classes = MODEL_MAPPING[type(part)]
        for model_class in classes if isinstance(classes, tuple) else (classes,):
            yield main_input_name(model_class)  # type: ignore[arg-type]  # a class says as much as a model
