"""Ensembles: one model of several trained ones, which share a backbone and differ in their heads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, TypeVar

import torch

from ..checks import shown
from ..heads import EnsembleHead, get_head
from ..weights import same_weights, sample_weights
from .configuration_capsule_head import CALIBRATION, CapsuleHeadConfig, option_names
from .modeling_capsule_head import CapsuleHeadClassifier

# What the mean is of, by problem type.
AVERAGES = {
    "single_label_classification": "classes",
    "multi_label_classification": "labels",
    "regression": "values",
}
# The fields that the models have in common.
COMMON = (
    *("base_model_name_or_path", "base_model_revision", "stack", "tower", "hidden_sizes"),
    *("window_length", "window_overlap", "window_special_tokens"),
    *("id2label", "label_mean", "label_std"),
)
# Fields of one head alone, or of training, beside the options of heads.
OF_ONE_HEAD = {"linear_term", "mixup_alpha", *CALIBRATION}

Classifier = TypeVar("Classifier", bound=CapsuleHeadClassifier)


def make_ensemble(models: Sequence[Classifier]) -> Classifier:
    """Return one model of several, whose probabilities are the means of theirs, or whose values are those of theirs.

    It is a model like any other: it is evaluated, calibrated, saved, loaded, exported and pushed as they are. It cannot
    be trained, and its scores have no explanations. Each head counts as it does alone, with its linear term and its
    calibration temperature; the ensemble's own temperature is 1, and its thresholds are 0.5, until it is calibrated.

    Args:
        models: two trained classifiers or more, of one class, on one frozen backbone, with the same labels and problem
            type. Heads, options, layers and seeds may differ. A model may have no backbone, as one that was loaded with
            `load_backbone=False`.

    Returns:
        The ensemble, in evaluation mode, on the device of the first model's head. It has copies of the heads, in the
        widest of their dtypes. Its backbone is that of the first model that has one, which is shared and not copied;
        without one it takes hidden states at all layers that some head takes.

    Raises:
        TypeError: If the models are not classifiers of one class.
        ValueError: If there are fewer than two, one is an ensemble itself or has a backbone that trained with its head,
            or they differ in more than their heads.
    """
    check_models(models)
    source = next((model for model in models if model.backbone is not None), models[0])
    layers = sorted({layer for model in models for layer in model.config.layers})
    left_out = OF_ONE_HEAD | option_names()
    fields = {name: value for name, value in source.config.to_dict().items() if name not in left_out}
    problem_type = problem_type_of(source.config)
    config = CapsuleHeadConfig.from_dict(
        fields
        | {
            "base_config": source.config.base_config,
            "problem_type": problem_type,
            "layers": layers,
            "head_type": EnsembleHead.name,
            "members": [describe_member(model.config, layers) for model in models],
            "averages": AVERAGES[problem_type],
        }
    )
    ensemble = type(source)(config, source.backbone, build=False)
    assert isinstance(ensemble.head, EnsembleHead)
    for member, model in zip(ensemble.head.members, models, strict=True):
        member.load_state_dict({k: x for k, x in model.state_dict().items() if not k.startswith("backbone.")})
    weights = [next(model.head.parameters()) for model in models]
    ensemble.head.to(weights[0].device, reduce(torch.promote_types, (x.dtype for x in weights)))
    if source.backbone is not None:
        ensemble._weights_as_loaded = source._weights_as_loaded
    ensemble._refer_to_backbone(source.config.head_only)
    return ensemble.eval()


def problem_type_of(config: CapsuleHeadConfig) -> str:
    """Return the problem type of a trained model: one without any has classes."""
    return config.problem_type or "single_label_classification"


def describe_member(config: CapsuleHeadConfig, layers: Sequence[int]) -> dict[str, Any]:
    """Return what an ensemble's configuration says of one model: arguments of `heads.ensemble.Member`.

    Args:
        config: the model's.
        layers: those of the ensemble.
    """
    return {
        "head_type": config.head_type,
        "options": config.head_options.as_dict(),
        "layers": [list(layers).index(layer) for layer in config.layers],
        "linear_term": bool(config.linear_term),
        "calibration_temperature": config.calibration_temperature,
    }


def check_models(models: Sequence[CapsuleHeadClassifier]) -> None:
    """Check that models can be an ensemble.

    Raises:
        TypeError: If the models are not classifiers of one class.
        ValueError: If there are fewer than two, one is an ensemble itself or has a backbone that trained with its head,
            or they differ in more than their heads.
    """
    if not isinstance(models, Sequence) or len(models) < 2:
        given = f"a list of {len(models)}" if isinstance(models, Sequence) else shown(models)
        raise ValueError(f"models is {given}; expected a list of two classifiers or more.")
    first = models[0]
    for index, model in enumerate(models):
        name = f"models[{index}]"
        if not isinstance(model, CapsuleHeadClassifier) or type(model) is not type(first):
            raise TypeError(
                f"{name} is of class {type(model).__name__} and models[0] of {type(first).__name__}; expected "
                "classifiers of one class, such as CapsuleHeadForSequenceClassification."
            )
        if get_head(model.config.head_type).made_by is not None:
            raise ValueError(f"{name} is an ensemble itself; pass the models that it was made of.")
        if not model.config.freeze_backbone or model.adapters is not None or model.has_adapters:
            raise ValueError(
                f"{name} has a backbone that trained with its head, or adapters in it; expected a frozen backbone that "
                "is the same for all models."
            )
        for field, own, others in differences(model, first):
            raise ValueError(
                f"{name} has {field} {shown(own)}, and models[0] has {shown(others)}; expected models that differ in "
                "their heads alone."
            )
    backbones = {id(model.backbone): model.backbone for model in models if model.backbone is not None}
    sample = sample_weights(next(iter(backbones.values()))) if len(backbones) > 1 else {}
    if not all(same_weights(backbone, sample) for backbone in backbones.values()):
        raise ValueError("The backbones of the models have different weights; expected one frozen backbone for all.")


def differences(model: CapsuleHeadClassifier, other: CapsuleHeadClassifier) -> list[tuple[str, Any, Any]]:
    """Return what differs between two models beside their heads: the name of a field, and both values."""
    configs = [model.config, other.config]
    compared = {name: [getattr(config, name) for config in configs] for name in COMMON}
    compared["problem_type"] = [problem_type_of(config) for config in configs]
    compared["a backbone of type"] = [config.base_config.model_type for config in configs]
    return [(name, own, others) for name, (own, others) in compared.items() if own != others]
