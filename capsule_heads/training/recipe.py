"""Recipes: settings for the arguments of a run that are not set, chosen by the number of training examples."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import CONFIG_NAME

from ..files import read_json
from ..models.modeling_capsule_head import CapsuleHeadClassifier
from .arguments import AUTO, PAPER_SETTINGS, RADAM, CapsuleTrainingArguments, word_of
from .regression import Solutions, can_have_linear_term, fit_linear_term, lacks_linear_term

if TYPE_CHECKING:
    from ..models.base import CapsuleHeadPreTrainedModel
    from .trainer import CapsuleTrainer

# Measured on sentences with a frozen all-MiniLM-L6-v2: scripts/benchmarks/own_data.py.
HEAD_RATE = 8e-3  # peak learning rate of a head on a frozen backbone
BACKBONE_RATE = 2e-5  # peak learning rate of a pretrained backbone that trains, or of its adapters
STEPS = 600  # number of steps that a head takes to learn
EPOCHS = (3, 10)  # the least and the most: with more, a head learns few examples by heart
WARMUP = 0.1
CLIPPING = 1.0

logger = logging.getLogger(__name__)


def apply_recipe(
    trainer: CapsuleTrainer,
    model: CapsuleHeadPreTrainedModel,
    checkpoint: str | None = None,
    solutions: Solutions | None = None,
) -> None:
    """Give a model a linear term, and set the arguments of its run that are not set.

    The recipe "auto" gives a linear term to every classifier that can have one. With another recipe, the model's
    configuration has to ask for it.

    Args:
        trainer: the run's trainer.
        model: the model that it trains.
        checkpoint: folder of a checkpoint that is about to be loaded, which may hold the weights of a linear term.
        solutions: linear terms of other models on the same data; see `fit_linear_term`.

    Raises:
        ValueError: If a linear term was asked for and cannot be solved for, or a chosen setting does not fit the
            arguments that are set.
    """
    args = trainer.args
    is_auto = isinstance(args, CapsuleTrainingArguments) and args.recipe == AUTO
    if isinstance(model, CapsuleHeadClassifier) and (is_auto or model.config.linear_term):
        if checkpoint is not None:
            if model.config.linear_term is not False and _has_linear_term(checkpoint):
                model.add_linear_term()
        elif lacks_linear_term(model):
            said = fit_linear_term(trainer, model, solutions) if can_have_linear_term(trainer, model) else ""
            if said:
                logger.warning("Recipe: %s.", said)
            elif model.config.linear_term:
                raise ValueError(
                    "linear_term is True, and it cannot be solved for; expected a frozen backbone, a head that is not "
                    "trained yet, and labels that differ: leave linear_term out."
                )
    settle_arguments(trainer, model)


def _has_linear_term(checkpoint: str) -> bool:
    file = Path(checkpoint, CONFIG_NAME)
    return file.is_file() and bool(read_json(file).get("linear_term"))


def settle_arguments(trainer: CapsuleTrainer, model: CapsuleHeadPreTrainedModel) -> None:
    """Set the arguments of a run that are not set, and log in one line what was chosen and why.

    Raises:
        ValueError: If a chosen setting does not fit the arguments that are set.
    """
    args = trainer.args
    if not isinstance(args, CapsuleTrainingArguments) or not args.unset():
        return
    settings, why = choose_settings(trainer, model)
    if args.learning_rate is not None:  # by default it is the backbone's too
        settings = {name: value for name, value in settings.items() if name != "backbone_learning_rate"}
    chosen = ", ".join(f"{name} {value:g}" for name, value in settings.items() if getattr(args, name) is None)
    args.fill(settings)
    args.check_effects()
    logger.warning("Recipe: %s, for %s.", chosen, why)


def choose_settings(trainer: CapsuleTrainer, model: CapsuleHeadPreTrainedModel) -> tuple[dict[str, float], str]:
    """Return the settings of a run by name, and the reason for them in words.

    A head on a frozen backbone trains at a learning rate of 8e-3 for some 600 steps, in 3 epochs at least and 10 at
    most. If a pretrained backbone or its adapters train, the head gets the paper's learning rate, and the backbone gets
    2e-5 unless its learning rate is set. A backbone with random weights, or an optimizer other than "radam", gets the
    paper's settings, as no others were measured.
    """
    args = trainer.args
    if word_of(args.optim) != RADAM:
        return PAPER_SETTINGS, f"the optimizer {word_of(args.optim)}"
    if model.backbone is not None and model.config.base_model_name_or_path is None:
        return PAPER_SETTINGS, "a backbone without pretrained weights"
    size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    epochs, found = EPOCHS[0], "a stream of examples"
    dataset: Any = trainer.train_dataset
    if hasattr(dataset, "__len__"):
        n_examples = len(dataset)
        epochs = min(max(round(STEPS * size / max(n_examples, 1)), EPOCHS[0]), EPOCHS[1])
        found = f"{n_examples:,} examples in batches of {size}"
    settings = {
        "learning_rate": HEAD_RATE,
        "num_train_epochs": float(epochs),
        "warmup_steps": WARMUP,
        "max_grad_norm": CLIPPING,
    }
    if model.backbone_trains:
        own_rate = {"learning_rate": PAPER_SETTINGS["learning_rate"], "backbone_learning_rate": BACKBONE_RATE}
        return settings | own_rate, f"{found} and a backbone that trains"
    return settings, f"{found} and a frozen backbone"
