"""The Trainer of capsule heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import RandomSampler, Sampler
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.training_args import TrainingArguments

from ..data.tokenization import check_pad_token
from ..hub import check_backbone_is_shared, write_model_card
from .arguments import ONE_CYCLE, RADAM, CapsuleTrainingArguments, describe_arguments
from .schedule import OneCycle


class CapsuleTrainer(Trainer):
    """`Trainer` that knows the paper's optimizer and schedule, those `CapsuleTrainingArguments` name by default.

    All else is transformers' own: callbacks, early stopping, best model, resuming, several devices. Mixup happens in
    the model's forward pass.

    Raises:
        ValueError: if the tokenizer given as `processing_class` has no padding token, or with `push_to_hub=True` if the
            model is a head alone whose backbone others cannot have.
    """

    args: CapsuleTrainingArguments

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            check_pad_token(self.processing_class)

    def init_hf_repo(self, *args, **kwargs) -> None:
        """As in transformers; refuses to push a head that others could not load, before it is trained."""
        check_backbone_is_shared(self.model.config)
        super().init_hf_repo(*args, **kwargs)

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

    def create_model_card(
        self,
        model_name: str | None = None,
        results: dict[str, Any] | None = None,
        license: str | None = None,
        language: str | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        """Writes the card of the model that was saved to `output_dir`; `push_to_hub` passes its arguments on.

        Args:
            model_name: its name, where it is not on the Hub.
            results: what is known of the run, as scripts/train.py writes it to results.json. Default: what the Trainer
                knows of it, and the metrics of the last evaluation if that was of this very model.
            license: identifier of the model's licence, such as "mit".
            language: ISO 639 code of the language of its texts.
            tags: more tags.

        Raises:
            OSError: if no model was saved there.
        """
        if not self.is_world_process_zero():
            return
        name = self.hub_model_id or model_name or Path(self.args.output_dir).absolute().name
        tags = [tags] if isinstance(tags, str) else tags or ()
        results = self._results() if results is None else results
        write_model_card(self.args.output_dir, name, results, license=license, language=language, tags=tags)

    def _results(self) -> dict[str, Any]:
        state = self.state
        if not state.global_step:  # trained elsewhere, if at all
            return {}
        step = state.global_step
        if self.args.load_best_model_at_end and state.best_global_step:
            step = state.best_global_step
        return {
            "seed": self.args.seed,
            "steps": step,
            "trained_parameters": self.model.num_parameters(only_trainable=True),
            "training_arguments": describe_arguments(self.args),
            **{k: v for entry in state.log_history if entry["step"] == step for k, v in entry.items()},
        }

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
