"""Training arguments with the paper's regime as defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from transformers import TrainingArguments

from ..checks import plain

# Names of ours for two of transformers' fields, which only admit the names it knows.
RADAM = "radam"
ONE_CYCLE = "one_cycle"

# The least value of a number, and the value that it is below. A field that is None is not set.
LIMITS: dict[str, tuple[float, float]] = {
    "learning_rate": (0, math.inf),
    "min_learning_rate": (0, math.inf),
    "backbone_learning_rate": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "num_train_epochs": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "adam_beta1": (0, 1),
    "min_adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "label_smoothing_factor": (0, 1),
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "save_total_limit": (1, math.inf),
    "seed": (0, 2**32),  # NumPy's limit
    "data_seed": (0, 2**32),
}

# The arguments that a model card shows, where they are set.
DESCRIBED = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "min_learning_rate",
    "adam_beta1",
    "min_adam_beta1",
    "adam_beta2",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
)


@dataclass
class CapsuleTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the regime of Heinsen (2019): RAdam, one cycle, batches of 20.

    Defaults that differ from those of `TrainingArguments`:

    | argument                      | here              | there               |
    | ----------------------------- | ----------------- | ------------------- |
    | `optim`                       | "radam"           | "adamw_torch_fused" |
    | `lr_scheduler_type`           | "one_cycle"       | "linear"            |
    | `learning_rate` (the peak)    | 5e-4              | 5e-5                |
    | `min_learning_rate`           | 1e-5              | (none)              |
    | `backbone_learning_rate`      | None (the same)   | (none)              |
    | `min_adam_beta1`              | 0.81              | (none)              |
    | `warmup_steps`                | 0.1 (of all)      | 0                   |
    | `per_device_train_batch_size` | 20                | 8                   |
    | `per_device_eval_batch_size`  | 64                | 8                   |
    | `max_grad_norm`               | 0 (no clipping)   | 1.0                 |
    | `train_sampling_strategy`     | "group_by_length" | "random"            |
    | `on_nonfinite`                | "stop"            | (none)              |

    Batches are copied to a GPU while it computes: there `accelerator_config` has `non_blocking=True`, unless it says
    otherwise or `dataloader_pin_memory` is False. Without a GPU no memory is pinned.

    Any optimizer and schedule of transformers may be named instead. The paper has a batch of 20 on one device: with N
    devices, or when accumulating over N steps, divide `per_device_train_batch_size` by N. The paper's mixup is a
    field of the model's configuration, `mixup_alpha=0.2`, and off by default.
    """

    optim: str = field(default=RADAM, metadata={"help": f'"{RADAM}", or the name of an optimizer of transformers.'})
    lr_scheduler_type: str = field(
        default=ONE_CYCLE, metadata={"help": f'"{ONE_CYCLE}", or the name of a schedule of transformers.'}
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate."})
    min_learning_rate: float = field(
        default=1e-5, metadata={"help": "Learning rate at the beginning and the end of the cycle."}
    )
    backbone_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of the trainable parameters in the backbone (all with freeze_backbone: false, "
            "or adapters); the ends of its cycle are in proportion to the head's. Default: the head's."
        },
    )
    min_adam_beta1: float = field(
        default=0.81,
        metadata={"help": "Adam's beta1 at the peak of the learning rate; at the ends it is adam_beta1."},
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps until the peak; a number below 1 is a fraction of all steps."}
    )
    per_device_train_batch_size: int = field(default=20, metadata={"help": "Training batch size per device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Evaluation batch size per device."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Norm to clip gradients to; 0 for no clipping."})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": 'Order of examples: "group_by_length" for batches of texts of like length (images and audio in '
            "random order), or a strategy of transformers.",
            "choices": ["group_by_length", "random", "sequential", "batch_rebalance"],
        },
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": 'Reaction to a loss or gradients that are not finite: "stop" with an error that names them, or '
            '"skip" the step with a warning. Neither lets them into the weights.',
            "choices": ["stop", "skip"],
        },
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            setattr(self, name, plain(value))
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f'on_nonfinite is {self.on_nonfinite!r}; expected "stop" or "skip".')
        for name, value in vars(self).items():  # max_grad_norm, for one, would carry it into the weights
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{name} is NaN; expected a number.")
        if self.use_cpu or not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to copy to: torch would warn of it
        elif self.accelerator_config is None or isinstance(self.accelerator_config, dict):
            self.accelerator_config = {"non_blocking": self.dataloader_pin_memory, **(self.accelerator_config or {})}
        # transformers checks these two against its own names: show it names it knows, and put ours back.
        ours = {}
        for name, own_value, stand_in in (("optim", RADAM, "adamw_torch"), ("lr_scheduler_type", ONE_CYCLE, "linear")):
            if getattr(self, name) == own_value:
                ours[name] = own_value
                setattr(self, name, stand_in)
        super().__post_init__()
        for name, own_value in ours.items():
            setattr(self, name, own_value)
        for name, (least, below) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not least <= value < below:
                expected = f"{least} or more" if below == math.inf else f"{least} or more, and less than {below}"
                raise ValueError(f"{name} is {value}; expected a number, {expected}.")
        if self.max_steps == 0:  # transformers would make one step
            raise ValueError("max_steps is 0; expected 1 or more, or -1 for num_train_epochs.")
        self._check_effects()

    def _check_effects(self) -> None:
        """Refuse what would have no effect, or turn the cycle upside down."""
        schedule = word_of(self.lr_scheduler_type)
        void: dict[str, tuple[str, Any]] = {}
        if self.optim == RADAM and self.optim_args:
            void["optim_args"] = ("optim", RADAM)
        if schedule == ONE_CYCLE and self.lr_scheduler_kwargs:
            void["lr_scheduler_kwargs"] = ("lr_scheduler_type", schedule)
        elif schedule != ONE_CYCLE:
            own = ("min_learning_rate", "min_adam_beta1")
            changed = [name for name in own if getattr(self, name) != type(self).__dataclass_fields__[name].default]
            void |= {name: ("lr_scheduler_type", schedule) for name in changed}
        for name, (other, setting) in void.items():
            raise ValueError(
                f"{name} is {getattr(self, name)}, without effect where {other} is {setting}; change {other}, or leave "
                f"{name} out."
            )
        if schedule == ONE_CYCLE and 0 < self.learning_rate < self.min_learning_rate:
            raise ValueError(
                f"learning_rate is {self.learning_rate}, the peak of the cycle, and min_learning_rate, its ends, is "
                f"{self.min_learning_rate}; expected a lower one."
            )


def word_of(value: Any) -> Any:
    """Return an option's value as a word, where transformers made an Enum of it."""
    return value.value if isinstance(value, Enum) else value


def describe_arguments(arguments: TrainingArguments) -> dict[str, int | float | str | bool]:
    """Return the training arguments that a model card shows, those that are set."""
    values: dict[str, Any] = {name: getattr(arguments, name, None) for name in DESCRIBED}
    # An argument that another one makes void is not set.
    del values["num_train_epochs" if values["max_steps"] > 0 else "max_steps"]
    if values["lr_scheduler_type"] != ONE_CYCLE:
        del values["min_learning_rate"], values["min_adam_beta1"]
    values = {name: word_of(value) for name, value in values.items()}
    return {name: value for name, value in values.items() if value}
