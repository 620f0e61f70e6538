"""Resuming a run: the settings that must be as in the run that wrote the checkpoint, and those that may change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME

from ..checks import shown
from ..data.splits import read_columns
from ..files import read_json
from ..models.base import CapsuleHeadPreTrainedModel
from ..weights import digest_weights
from .arguments import word_of
from .schedule import OneCycle

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

RUN = "run.json"  # in a checkpoint: what `describe_run` returned
ADAPTIVE = "of a schedule that goes by results"


def describe_run(trainer: Trainer, model: CapsuleHeadPreTrainedModel) -> dict[str, Any]:
    """Return the settings that a run shares with every run that resumes it, by the names that a user knows."""
    config, args = model.config, trainer.args
    options = config.head_options
    assert trainer.model is not None  # CapsuleTrainer refuses to be made without one
    trained = [(name, list(x.shape)) for name, x in trainer.model.named_parameters() if x.requires_grad]
    described = {
        "head_type": config.head_type,
        **{x.name: getattr(options, x.name) for x in fields(options) if x.metadata["describes"]},
        "layers": list(config.layers),
        "classes": config.class_names,
        "windows": None if config.windowing is None else list(config.windowing),
        "backbone": _digest_of_backbone(model),
        "linear_term": config.linear_term or None,  # None also in checkpoints of versions without linear terms
        "trainable parameters": f"{len(trained)} tensors, {_digest(trained)}",
        "training data": _describe_data(trainer.train_dataset, args.length_column_name),
        "examples in a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "seed": args.seed,
        "data_seed": args.data_seed,
        "train_sampling_strategy": args.train_sampling_strategy,
        "optim": word_of(args.optim),
        "lr_scheduler_type": word_of(args.lr_scheduler_type),
    }
    return {**described, **({} if _has_closed_form(args) else {f"learning_rate {ADAPTIVE}": args.learning_rate})}


def check_resumable(checkpoint: str, described: Mapping[str, Any], args: TrainingArguments) -> None:
    """Check that a run can resume from a checkpoint.

    Epochs, learning rates and the like may differ from before. The schedule then covers the new number of steps.

    Args:
        checkpoint: its folder. A checkpoint of transformers' own Trainer has no description, and is not checked.
        described: what `describe_run` returns for this run.
        args: training arguments of this run.

    Raises:
        ValueError: If the checkpoint was written with other settings, has no optimizer state, or is beyond the end of
            this run.
    """
    folder = Path(checkpoint)
    if not (folder / RUN).is_file():
        return
    before = read_json(folder / RUN)
    for name in (name for name in {**before, **described} if before.get(name) != described.get(name)):
        raise ValueError(
            f"{checkpoint} was written with other settings: its {name} is {shown(before.get(name))}, and this run has "
            f"{shown(described.get(name))}; resume with the settings of the checkpoint, or start a new run in another "
            "output_dir."
        )
    if not any(folder.glob(f"{Path(OPTIMIZER_NAME).stem}*")) and not any(folder.glob("global_step*")):  # DeepSpeed's
        raise ValueError(
            f"{checkpoint} has no optimizer state, as it was saved with save_only_model; expected a checkpoint to "
            "resume from: load its model instead, and start a new run."
        )
    state = read_json(folder / TRAINER_STATE_NAME)
    name, field = ("max_steps", "global_step") if args.max_steps > 0 else ("num_train_epochs", "epoch")
    done, end = state[field], getattr(args, name)
    if done > end:
        raise ValueError(
            f"{name} is {end}, and {checkpoint} is at {done:g} already; expected at least that number, or an earlier "
            "checkpoint."
        )


def apply_arguments(trainer: Trainer, before: Iterable[Mapping[str, Any]]) -> None:
    """Set an optimizer and its schedule to this run's arguments, after a checkpoint has restored their states.

    Args:
        trainer: the trainer with both.
        before: the options of each parameter group before the checkpoint was loaded.
    """
    optimizer, schedule = trainer.optimizer, trainer.lr_scheduler
    if optimizer is None or not _has_closed_form(trainer.args):
        return
    for group, own in zip(optimizer.param_groups, before, strict=True):
        group.update({name: value for name, value in own.items() if name not in ("params", "lr")})
    peaks = [group["initial_lr"] for group in optimizer.param_groups]
    if isinstance(schedule, OneCycle):
        schedule.base_lrs = list(peaks)
        schedule.apply()
    elif isinstance(schedule, LambdaLR):
        schedule.base_lrs = list(peaks)
        lrs = [peak * factor(schedule.last_epoch) for peak, factor in zip(peaks, schedule.lr_lambdas, strict=True)]
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        schedule._last_lr = list(lrs)


def _has_closed_form(args: TrainingArguments) -> bool:
    """Return whether a schedule is a function of the step alone."""
    return word_of(args.lr_scheduler_type) not in ("reduce_lr_on_plateau", "greedy")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _digest_of_backbone(model: CapsuleHeadPreTrainedModel) -> str | None:
    """Return a digest of some of a frozen backbone's weights, which a head-only checkpoint does not hold."""
    if model.backbone is None or not model.config.head_only or model.backbone_trains:
        return None
    return digest_weights(model.backbone, torch.bfloat16)[:16]


def _describe_data(dataset: Any, length_column: str) -> str | None:
    """Return the number of training examples, and a digest of their labels and lengths where these can be read."""
    if not hasattr(dataset, "__len__"):
        return None
    columns = read_columns(dataset, ("label", "labels", length_column))
    return f"{len(dataset):,} examples, {_digest(list(columns.values()))}"
