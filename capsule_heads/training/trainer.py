"""The Trainer of capsule heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import RandomSampler, Sampler
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.training_args import TrainingArguments

from ..data.tokenization import check_pad_token
from .arguments import ONE_CYCLE, RADAM, CapsuleTrainingArguments
from .nonfinite import StepCheck
from .schedule import OneCycle


class CapsuleTrainer(Trainer):
    """`Trainer` that knows the paper's optimizer and schedule, those `CapsuleTrainingArguments` name by default.

    And whose weights never become NaN: a loss or gradients that are not finite end the training, or leave the step out,
    as `on_nonfinite` says. All else is transformers' own: callbacks, early stopping, best model, resuming, several
    devices. Mixup happens in the model's forward pass.

    Raises:
        ValueError: if the tokenizer given as `processing_class` has no padding token.
    """

    args: CapsuleTrainingArguments

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            check_pad_token(self.processing_class)
        self._step_check = StepCheck(self)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        """Forward and backward pass, as in transformers, and a check of what the optimizer is about to get.

        Raises:
            FloatingPointError: for a loss or gradients that are not finite, unless `on_nonfinite` is "skip"; names what
                is not finite, at which depth, in which samples.
        """
        self._step_check.before_batch()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_check.after_batch(loss, inputs)
        if self.accelerator.sync_gradients:
            self._step_check.after_last_batch(model)
        return loss

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: nn.Module | None = None
    ) -> tuple[type[Optimizer], dict[str, Any]]:
        """The optimizer's class and arguments; as in transformers, but for "radam"."""
        if args.optim != RADAM:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        betas = (args.adam_beta1, args.adam_beta2)
        return torch.optim.RAdam, {
            "lr": args.learning_rate,
            "betas": betas,
            "eps": args.adam_epsilon,
            "decoupled_weight_decay": True,
        }

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None):
        """The schedule; as in transformers, but for "one_cycle"."""
        if self.lr_scheduler is None and self.args.lr_scheduler_type == ONE_CYCLE:
            self.lr_scheduler = OneCycle(
                self.optimizer if optimizer is None else optimizer,
                n_steps=num_training_steps,
                n_warmup_steps=self.args.get_warmup_steps(num_training_steps),
                min_lr=self.args.min_learning_rate,
                min_beta1=self.args.min_adam_beta1,
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        # transformers drops the column of lengths, which the model does not take, before it looks for it.
        dataset, args = self.train_dataset, self.args
        columns = getattr(dataset, "column_names", ())
        if getattr(args, "train_sampling_strategy", None) != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        if args.length_column_name not in columns:  # images have none; nor do texts tokenized elsewhere
            return super()._get_train_sampler(train_dataset) if "input_ids" in columns else RandomSampler(dataset)
        if isinstance(dataset, datasets.Dataset):  # else a HiddenStateCache
            dataset = dataset.with_format(None)
        lengths = dataset[args.length_column_name][:]
        batch_size = args.train_batch_size * args.gradient_accumulation_steps
        return _SeededSampler(batch_size, lengths, args.seed if args.data_seed is None else args.data_seed)

    def _get_eval_sampler(self, eval_dataset) -> Sampler | None:
        # transformers would group these by length too: predictions would come in another order than their texts.
        return None


class _SeededSampler(LengthGroupedSampler):
    """Groups by length in an order that follows from seed and epoch alone.

    transformers' own draws it from torch's global generator, which is in another state when training resumes, and may
    be in one process of several; accelerate calls `set_epoch`.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yields the epoch's indices."""
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()
