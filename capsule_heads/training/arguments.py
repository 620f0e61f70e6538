"""Training arguments: the paper's optimizer and schedule, and settings that a recipe chooses by the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from transformers import TrainingArguments

from ..checks import plain

# Our own names in two fields of transformers, which accept only the names that it knows.
RADAM = "radam"
ONE_CYCLE = "one_cycle"

AUTO, PAPER = "auto", "paper"  # recipes
# The paper's recipe sets these arguments where a user did not. By default, `training.recipe` chooses them.
PAPER_SETTINGS = {"learning_rate": 5e-4, "num_train_epochs": 3.0, "warmup_steps": 0.1, "max_grad_norm": 0.0}

# The least value of an argument, and the value that it must be below. None means that the argument is not set.
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
    """`TrainingArguments` with optimizer and schedule of Heinsen (2019): RAdam, one cycle, batches of 20.

    Four arguments are None by default, which means "not set". With `recipe="auto"`, `CapsuleTrainer` chooses them when
    training begins, by the number of examples and steps, and logs its choice in one line (see
    `capsule_heads.training.recipe`). With `recipe="paper"` they get the paper's values at once: `learning_rate=5e-4`,
    `num_train_epochs=3`, `warmup_steps=0.1`, `max_grad_norm=0`. Arguments that are set keep their values.

    Defaults that differ from those of `TrainingArguments`:

    | argument                      | here              | there               |
    | ----------------------------- | ----------------- | ------------------- |
    | `recipe`                      | "auto"            | (none)              |
    | `optim`                       | "radam"           | "adamw_torch_fused" |
    | `lr_scheduler_type`           | "one_cycle"       | "linear"            |
    | `learning_rate` (the peak)    | None              | 5e-5                |
    | `num_train_epochs`            | None              | 3.0                 |
    | `min_learning_rate`           | 1e-5              | (none)              |
    | `backbone_learning_rate`      | None (the same)   | (none)              |
    | `min_adam_beta1`              | 0.81              | (none)              |
    | `warmup_steps`                | None              | 0                   |
    | `per_device_train_batch_size` | 20                | 8                   |
    | `per_device_eval_batch_size`  | 64                | 8                   |
    | `max_grad_norm`               | None              | 1.0                 |
    | `train_sampling_strategy`     | "group_by_length" | "random"            |
    | `on_nonfinite`                | "stop"            | (none)              |

    Batches are copied to a GPU while it computes: `accelerator_config` gets `non_blocking=True` there, unless it has
    another value or `dataloader_pin_memory` is False. Without a GPU no memory is pinned.

    If `load_best_model_at_end` is set and `metric_for_best_model` is not, the best model is the one with the lowest
    loss. If the numbers of examples per class differ by a factor of 5 or more, it is the one with the highest macro F1.

    Any optimizer and schedule of transformers may be named instead. The paper has a batch of 20 on one device: with N
    devices, or when accumulating over N steps, divide `per_device_train_batch_size` by N. The paper's mixup is a
    field of the model's configuration, `mixup_alpha=0.2`, and off by default.
    """

    recipe: str = field(
        default=AUTO,
        metadata={
            "help": "Source of learning rate, epochs, warm-up and clipping that are not given. "
            '"auto" fits them to the number of examples, and solves for a linear term before training. '
            '"paper" takes those of Heinsen (2019).',
            "choices": [AUTO, PAPER],
        },
    )
    optim: str = field(default=RADAM, metadata={"help": f'"{RADAM}", or the name of an optimizer of transformers.'})
    lr_scheduler_type: str = field(
        default=ONE_CYCLE, metadata={"help": f'"{ONE_CYCLE}", or the name of a schedule of transformers.'}
    )
    learning_rate: float | None = field(  # type: ignore[assignment]  # None until the recipe chooses
        default=None, metadata={"help": "Peak learning rate. Default: chosen by the recipe."}
    )
    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Number of training epochs. Default: chosen by the recipe."}
    )
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
    warmup_steps: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Steps until the peak; a number below 1 is a fraction of all steps. Default: chosen by the recipe."
        },
    )
    per_device_train_batch_size: int = field(default=20, metadata={"help": "Training batch size per device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Evaluation batch size per device."})
    max_grad_norm: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Norm to clip gradients to; 0 for no clipping. Default: chosen by the recipe."},
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": 'Order of examples: "group_by_length" for batches of texts of similar length (images and audio in '
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
        if self.recipe not in (AUTO, PAPER):
            raise ValueError(f'recipe is {self.recipe!r}; expected "{AUTO}" or "{PAPER}".')
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f'on_nonfinite is {self.on_nonfinite!r}; expected "stop" or "skip".')
        for name, value in vars(self).items():  # max_grad_norm, for example, would carry NaN into the weights
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{name} is NaN; expected a number.")
        if self.use_cpu or not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is no device to copy to, and torch would warn
        elif self.accelerator_config is None or isinstance(self.accelerator_config, dict):
            self.accelerator_config = {"non_blocking": self.dataloader_pin_memory, **(self.accelerator_config or {})}
        # transformers checks these two against its own names. It gets names it knows, and ours are put back afterwards.
        ours = {}
        for name, own_value, stand_in in (("optim", RADAM, "adamw_torch"), ("lr_scheduler_type", ONE_CYCLE, "linear")):
            if getattr(self, name) == own_value:
                ours[name] = own_value
                setattr(self, name, stand_in)
        if self.recipe == PAPER or self.max_steps > 0:  # max_steps overrides epochs
            own_settings = PAPER_SETTINGS if self.recipe == PAPER else {"num_train_epochs": 3.0}
            self.fill(own_settings)
        # transformers would set a metric that is not set to "loss".
        self.metric_is_open = self.load_best_model_at_end and self.metric_for_best_model is None
        unset = self.unset()
        self.fill(PAPER_SETTINGS)  # transformers compares them with numbers
        super().__post_init__()
        for name, own_value in ours.items():
            setattr(self, name, own_value)
        for name in unset:
            setattr(self, name, None)
        for name, (least, below) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not least <= value < below:
                expected = f"{least} or more" if below == math.inf else f"{least} or more, and less than {below}"
                raise ValueError(f"{name} is {value}; expected a number, {expected}.")
        if self.max_steps == 0:  # transformers would make one step
            raise ValueError("max_steps is 0; expected 1 or more, or -1 for num_train_epochs.")
        self.check_effects()

    def unset(self) -> list[str]:
        """Return the names of arguments that are not set and that a recipe chooses."""
        return [name for name in PAPER_SETTINGS if getattr(self, name) is None]

    def fill(self, settings: Mapping[str, float]) -> None:
        """Set the given arguments, except those that are set already."""
        for name, value in settings.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def check_effects(self) -> None:
        """Refuse arguments without effect, and a peak learning rate below the ends of its cycle."""
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
        peak = self.learning_rate or 0
        if schedule == ONE_CYCLE and 0 < peak < self.min_learning_rate:
            raise ValueError(
                f"learning_rate is {self.learning_rate}, the peak of the cycle, and min_learning_rate, its ends, is "
                f"{self.min_learning_rate}; expected a lower min_learning_rate."
            )


def word_of(value: Any) -> Any:
    """Return an option's value, as a word if transformers made it an Enum."""
    return value.value if isinstance(value, Enum) else value


def describe_arguments(arguments: TrainingArguments) -> dict[str, int | float | str | bool]:
    """Return the training arguments that are set and that a model card shows."""
    values: dict[str, Any] = {name: getattr(arguments, name, None) for name in DESCRIBED}
    # Arguments that others make void are not shown.
    del values["num_train_epochs" if values["max_steps"] > 0 else "max_steps"]
    if values["lr_scheduler_type"] != ONE_CYCLE:
        del values["min_learning_rate"], values["min_adam_beta1"]
    values = {name: word_of(value) for name, value in values.items()}
    return {name: value for name, value in values.items() if value}
