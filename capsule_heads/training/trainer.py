"""The Trainer of capsule heads."""

from __future__ import annotations

import contextlib
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput
from transformers.training_args import TrainingArguments

from ..data.own_labels import CLASSES
from ..data.splits import read_columns
from ..data.tokenization import check_pad_token
from ..files import write_json
from ..hub import check_backbone_is_shared, write_model_card
from ..models.base import CapsuleHeadPreTrainedModel
from ..models.checkpoint import replacing
from ..models.configuration_capsule_head import BALANCED
from ..models.losses import balanced_weights
from ..models.modeling_capsule_head import CapsuleHeadClassifier
from .arguments import ONE_CYCLE, RADAM, CapsuleTrainingArguments, describe_arguments
from .capsule_model import check_trains, find_capsule_model, settle_problem_type
from .checkpoints import UNFINISHED, finish, locked, resolve_checkpoint, rotate, writing
from .host_checks import CheckedCollator
from .metrics import are_uneven, default_metrics
from .nonfinite import StepCheck
from .recipe import apply_recipe, settle_arguments
from .regression import Solutions
from .resume import RUN, apply_arguments, check_resumable, describe_run
from .schedule import OneCycle

logger = logging.getLogger(__name__)

# Inputs of shape `[batch, tokens, ...]`. Other inputs differ only in batch size.
OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "hidden_states")


class CapsuleTrainer(Trainer):
    """`Trainer` with the paper's optimizer and schedule, which `CapsuleTrainingArguments` name by default.

    Its checkpoints are complete, whenever the run is killed; `resolve_checkpoint` finds the one to resume from. Its
    weights never become NaN: a loss or gradients that are not finite end the training, or skip the step, as
    `on_nonfinite` says. If the model's configuration has no problem type, the dtype of the first labels sets it, for
    the rest of the run and for the saved model. Without `compute_metrics`, a classifier is evaluated by the metrics of
    its problem type. A resumed run may have other epochs, learning rates and the like, and its schedule covers the new
    number of steps; see `check_resumable` for what must not change. Everything else is transformers' own: callbacks,
    early stopping, best model, several devices. Mixup and label smoothing happen in the model's forward pass.

    The arguments may be plain `TrainingArguments`; what `CapsuleTrainingArguments` add to these is then off.

    Raises:
        TypeError: If the model neither is nor wraps a capsule-head model.
        ValueError: If the tokenizer given as `processing_class` has no padding token; or if `push_to_hub=True` and the
            model is saved without its backbone, which others cannot load.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Label smoothing is not compatible")  # here it works: see compute_loss
            super().__init__(*args, **kwargs)
        model = find_capsule_model(self.model)  # refuses others
        self.label_smoother = None  # transformers' own would bypass the model's loss, with its weights and mixup
        is_classifier = isinstance(model, CapsuleHeadClassifier)
        self._has_own_metrics = self.compute_metrics is not None
        if self.compute_metrics is None and is_classifier and not self.args.batch_eval_metrics:
            self.compute_metrics = partial(default_metrics, model.config)
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            check_pad_token(self.processing_class)
        self.add_callback(_Resuming)
        self._checkpoint: Path | None = None  # the one that is being written
        self._description: dict[str, Any] = {}  # of the run, saved in each checkpoint
        self._step_check = StepCheck(self)
        self._filters_losses = False

    @property
    def capsule_model(self) -> CapsuleHeadPreTrainedModel:
        """The capsule-head model that is trained, without its wrappers."""
        return find_capsule_model(self.model)

    @property
    def run_dir(self) -> str:
        """The folder of the run, `output_dir`."""
        assert self.args.output_dir is not None  # TrainingArguments have a default
        return self.args.output_dir

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as in transformers; `resolve_checkpoint` finds the checkpoint to resume from.

        Raises:
            ValueError: If the checkpoint is missing, not complete, or of another run; if the head does not train; or if
                a setting would have no effect.
            OSError: If a checkpoint cannot be written (earlier checkpoints stay as they are), or if another process
                trains in the same output_dir.
        """
        is_saved = self.args.save_strategy != SaveStrategy.NO
        with locked(self.run_dir) if is_saved and self.is_world_process_zero() else contextlib.nullcontext():
            return self._train(resolve_checkpoint(resume_from_checkpoint, self.run_dir), *args, **kwargs)

    def settle(self, checkpoint: str | None = None, solutions: Solutions | None = None) -> None:
        """Set what depends on the training data: class weights, the metric, the recipe's choices, a linear term.

        `train` calls this first.

        Args:
            checkpoint: as in `apply_recipe`.
            solutions: as in `apply_recipe`.

        Raises:
            ValueError: If a setting does not fit the data, or would have no effect.
        """
        check_trains(self.capsule_model, self.args, self.compute_loss_func)
        self._forget_calibration()
        self._balance_classes()
        self._pick_metric()
        apply_recipe(self, self.capsule_model, checkpoint, solutions)

    def _train(self, resume_from_checkpoint: str | None, *args: Any, **kwargs: Any) -> TrainOutput:
        self.settle(resume_from_checkpoint)
        self._description = describe_run(self, self.capsule_model)  # once: it reads all labels
        if resume_from_checkpoint is not None:
            check_resumable(resume_from_checkpoint, self._description, self.args)
        if isinstance(self.model, CapsuleHeadPreTrainedModel):
            # Every process has loaded the same backbone. DDP would send its buffers at each step.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                self.model, self.model.names_of_frozen_backbone()
            )
        self._step_check.before_training()
        # This filter of transformers reads two numbers from the device per batch; ours reads none.
        self._filters_losses, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = self._filters_losses

    def _forget_calibration(self) -> None:
        """Reset a temperature and thresholds that were fitted to the weights before this training."""
        config = self.capsule_model.config
        if config.calibration_temperature == 1 and config.thresholds is None:
            return
        config.calibration_temperature, config.thresholds = 1.0, None
        if self.is_world_process_zero():
            logger.warning(
                "calibration_temperature is set to 1, and thresholds to None: they were fitted to the model before "
                "this training; fit them again with capsule_heads.training.calibrate."
            )

    def _training_labels(self) -> list | None:
        """Return the labels of the training data; None if there is no column to read them from."""
        return next(iter(read_columns(self.train_dataset, (*self.label_names, "label")).values()), None)

    def _balance_classes(self) -> None:
        """Replace "balanced" by class weights that are computed from the labels of the training data."""
        config = self.capsule_model.config
        if config.class_weights != BALANCED:
            return
        labels = self._training_labels()
        if labels is None:
            raise ValueError(
                f'class_weights is "{BALANCED}", and the training data has no column of labels to count; expected one '
                "number for each class."
            )
        config.class_weights = balanced_weights(labels, config.num_labels or 2)

    def _pick_metric(self) -> None:
        """Choose the best model by macro F1 if classes are uneven and no metric was named."""
        args, config = self.args, self.capsule_model.config
        if not getattr(args, "metric_is_open", False) or self._has_own_metrics or isinstance(self.eval_dataset, dict):
            return
        labels = self._training_labels()
        if config.problem_type in (None, CLASSES) and labels and isinstance(labels[0], int) and are_uneven(labels):
            args.metric_for_best_model, args.greater_is_better = "f1_macro", True
            logger.warning("The best model is the one with the highest macro F1, as the classes are uneven.")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        before = [{**group} for group in self.optimizer.param_groups] if self.optimizer is not None else []
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and not self.is_deepspeed_enabled:
            apply_arguments(self, before)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute the loss as in transformers, but smooth labels in the model's loss, which knows weights and mixup."""
        classifier: Any = self.capsule_model
        classifier.label_smoothing = self.args.label_smoothing_factor
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            classifier.label_smoothing = 0.0

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return run_dir if self._checkpoint is None else str(Path(run_dir, UNFINISHED))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # transformers writes files to the checkpoint's final place: a run that is killed meanwhile leaves a part of it.
        args, state = self.args, self.state
        checkpoint = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        unfinished = checkpoint.parent / UNFINISHED / checkpoint.name
        is_first = args.local_process_index == 0  # first of the processes that may share a disk
        if is_first:
            shutil.rmtree(unfinished.parent, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        self._checkpoint = checkpoint
        try:
            with writing(checkpoint):
                super()._save_checkpoint(model, trial)
                if args.should_save:
                    write_json(unfinished / RUN, self._description)
                if state.best_model_checkpoint == str(unfinished):
                    state.best_model_checkpoint = str(checkpoint)
                    if args.should_save:
                        state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()  # until all parts are written
            with args.main_process_first(local=False), writing(checkpoint):
                if is_first and unfinished.exists():
                    finish(unfinished, checkpoint)
        except BaseException:  # also Ctrl-C
            shutil.rmtree(unfinished.parent, ignore_errors=True)
            raise
        finally:
            self._checkpoint = None
        if args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if args.should_save:
            rotate(checkpoint, args.save_total_limit, state.best_model_checkpoint)
            shutil.rmtree(unfinished.parent, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self._checkpoint or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.run_dir)
        with writing(folder), replacing(folder) as unfinished:
            super()._save(str(unfinished), state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._checkpoint is None:  # else the folder is about to be renamed
            super()._push_from_checkpoint(checkpoint_folder)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository as in transformers, but refuse to push a head that others could not load."""
        config = self.capsule_model.config
        check_backbone_is_shared(config.base_model_name_or_path, config.head_only)
        super().init_hf_repo(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Training, evaluation and prediction call this before each forward pass, so before torch.compile compiles it.
        inputs = super()._prepare_inputs(inputs)
        settle_problem_type(self.capsule_model, inputs.get("labels"))
        return inputs

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run the forward and backward pass, as in transformers, and check the gradients before the optimizer's step.

        Raises:
            FloatingPointError: If the loss or gradients are not finite, unless `on_nonfinite` is "skip". The message
                names what is not finite, at which layer, and in which samples.
        """
        self._step_check.before_batch()
        if self.args.torch_compile:
            _mark_dynamic_sizes(self._prepare_inputs(inputs))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_check.after_batch(loss, inputs)
        if self.accelerator.sync_gradients:
            self._step_check.after_last_batch(model)
        return self._step_check.filter_loss(loss) if self._filters_losses else loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = self._step_check.norm  # transformers would compute it once more
        if norm is None:
            return super()._clip_grad_norm(model)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor | float | None:
        # Without clipping, transformers would compute the norm by clipping to infinity, which multiplies all gradients.
        return super()._get_grad_norm(model, self._step_check.norm if grad_norm is None else grad_norm)

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: PreTrainedModel | None = None
    ) -> tuple[type[Optimizer], dict[str, Any]]:
        """Return the optimizer's class and arguments, for transformers' optimizers and for "radam"."""
        if args.optim != RADAM:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        betas = (args.adam_beta1, args.adam_beta2)
        return torch.optim.RAdam, {
            "lr": args.learning_rate,
            "betas": betas,
            "eps": args.adam_epsilon,
            "decoupled_weight_decay": True,
        }

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Return the optimizer; with `backbone_learning_rate`, the backbone has its own parameter groups.

        Raises:
            ValueError: If `backbone_learning_rate` is set, and the optimizer has no parameters of the backbone.
        """
        is_given = self.optimizer is not None
        settle_arguments(self, self.capsule_model)
        optimizer = super().create_optimizer(model)
        lr = self.args.backbone_learning_rate if isinstance(self.args, CapsuleTrainingArguments) else None
        if lr is not None and not is_given:
            named = (self.capsule_model if model is None else model).named_parameters()
            backbone = {id(x) for name, x in named if "backbone" in name.split(".")}
            groups: dict[bool, list[dict[str, Any]]] = {True: [], False: []}  # by whether they are of the backbone
            for group in optimizer.param_groups:
                for is_backbone, of_part in groups.items():
                    parameters = [x for x in group["params"] if (id(x) in backbone) == is_backbone]
                    if parameters:
                        of_part.append({**group, "params": parameters} | ({"lr": lr} if is_backbone else {}))
            if not groups[True]:
                raise ValueError(
                    f"backbone_learning_rate is {lr}, but the optimizer ({self.args.optim}) has no parameters of the "
                    "backbone; train it (freeze_backbone=False, or adapters), or leave backbone_learning_rate out."
                )
            optimizer.param_groups[:] = groups[False] + groups[True]  # the log has the first group's learning rate
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Return the schedule: one of transformers, or "one_cycle"."""
        args, optimizer = self.args, self.optimizer if optimizer is None else optimizer
        is_one_cycle = args.lr_scheduler_type == ONE_CYCLE and self.lr_scheduler is None
        if is_one_cycle and isinstance(args, CapsuleTrainingArguments) and optimizer is not None:
            schedule = _one_cycle(args, optimizer, num_training_steps)
            self.lr_scheduler = schedule  # type: ignore[assignment]  # declared as a LambdaLR, but any schedule will do
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def create_model_card(  # type: ignore[override]  # the model knows what transformers' card has to be told
        self,
        model_name: str | None = None,
        results: dict[str, Any] | None = None,
        license: str | None = None,
        language: str | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        """Write the card of the model that was saved to `output_dir`; `push_to_hub` passes its arguments on.

        Args:
            model_name: the model's name, if it is not on the Hub.
            results: facts about the run, as in results.json. Default: those that the Trainer knows, with the metrics of
                the last evaluation if it was of this very model.
            license: identifier of the model's licence, such as "mit".
            language: ISO 639 code of the language of the model's texts.
            tags: more tags.

        Raises:
            OSError: If no model was saved to `output_dir`.
        """
        if not self.is_world_process_zero():
            return
        name = self.hub_model_id or model_name or Path(self.run_dir).absolute().name
        tags = [tags] if isinstance(tags, str) else tags or ()
        results = self._results() if results is None else results
        write_model_card(self.run_dir, name, results, license=license, language=language, tags=tags)

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
            "trained_parameters": self.capsule_model.num_parameters(only_trainable=True),
            "training_arguments": describe_arguments(self.args),
            **{k: v for entry in state.log_history if entry["step"] == step for k, v in entry.items()},
        }

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        # The data loader moves batches to the device, so their values are checked as they are made.
        collator = self.data_collator
        self.data_collator = CheckedCollator.for_model(collator, self.capsule_model)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        # transformers looks for the column of lengths after it has dropped it, as the model does not take it.
        dataset: Any = self.train_dataset
        args = self.args
        columns = getattr(dataset, "column_names", ())
        if getattr(args, "train_sampling_strategy", None) != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        if args.length_column_name not in columns:  # images have none; nor do texts tokenized elsewhere
            return super()._get_train_sampler(train_dataset) if "input_ids" in columns else RandomSampler(dataset)
        lengths = read_columns(dataset, [args.length_column_name])[args.length_column_name]
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return _SeededSampler(batch_size, lengths, args.seed if args.data_seed is None else args.data_seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        # transformers would group evaluation by length too, so that predictions would not be in the order of texts.
        return None


def _one_cycle(args: CapsuleTrainingArguments, optimizer: Optimizer, n_steps: int) -> OneCycle:
    peak = args.learning_rate  # for groups without their own learning rate; other groups' ends are in proportion
    return OneCycle(
        optimizer,
        n_steps=n_steps,
        n_warmup_steps=args.get_warmup_steps(n_steps),
        min_lr=[args.min_learning_rate * (x["lr"] / peak if peak else 1.0) for x in optimizer.param_groups],
        min_beta1=args.min_adam_beta1,
    )


def _mark_dynamic_sizes(inputs: Mapping[str, Any]) -> None:
    """Tell torch.compile which sizes differ by batch. Otherwise it would compile for the sizes of the first batch."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            for dimension in range(min(value.ndim, 2 if name in OF_TOKENS else 1)):
                torch._dynamo.maybe_mark_dynamic(value, dimension)


def set_epoch(train_dataloader: DataLoader | None, epoch: int) -> None:
    """Tell a data loader's sampler its epoch, however deep accelerate has wrapped it."""
    sampler: Any = getattr(train_dataloader, "batch_sampler", None)
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    sampler = getattr(sampler, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


class _Resuming(TrainerCallback):
    """Corrects two things that transformers and accelerate get wrong in a resumed run.

    The steps between logs, evaluations and checkpoints are those of this run's arguments, not of the checkpoint's. And
    the sampler is told its epoch. accelerate fails to do so if several processes resume within an epoch, because it
    looks for the sampler inside two wrappers, and there are three. The run would continue in the order of its first
    epoch.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        set_epoch(train_dataloader, int(state.epoch or 0))


class _SeededSampler(LengthGroupedSampler):
    """Groups by length, in an order that depends only on seed and epoch.

    transformers' own sampler draws the order from torch's global generator. Its state is another one when training
    resumes, and may differ between processes. accelerate calls `set_epoch`.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield the epoch's indices."""
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()
