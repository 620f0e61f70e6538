"""A training run: its data and model from options, its training, and its results."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict
from torch import nn
from transformers import AutoConfig, EarlyStoppingCallback, PreTrainedTokenizerBase, set_seed

from ..data.hidden_states import HiddenStateCache
from ..data.tokenization import window_fields
from ..files import write_json
from ..heads import DEFAULT_HEAD, get_head
from ..metrics import compute_metrics_for, metric_names
from ..models.configuration_capsule_head import label_fields
from ..models.modeling_capsule_head import CapsuleHeadClassifier
from ..tasks import Task, get_task
from .arguments import CapsuleTrainingArguments, describe_arguments
from .checkpoints import resolve_checkpoint
from .trainer import CapsuleTrainer

NEW_PREFIX = "new:"


@dataclass
class DataArguments:
    """Which texts, images or audio, and how they are prepared."""

    task: str = field(metadata={"help": "Task to train on."})
    source: str | None = field(default=None, metadata={"help": "Where the data is."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens to cut texts to. Default: as many as the backbone takes; all with window_overlap."},
    )
    phrases: bool = field(
        default=True,
        metadata={"help": "Train on all distinct phrases of the Stanford trees, not on whole sentences only."},
    )
    window_overlap: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that neighbouring windows of a long text share. The backbone then runs on windows, and the "
            "tokens of all windows are routed together."
        },
    )
    window_length: int | None = field(
        default=None, metadata={"help": "Tokens of a window. Default: as many as the backbone takes."}
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Padding token, for a tokenizer that has none (such as GPT-2's)."}
    )
    cache_hidden_states: bool = field(
        default=False,
        metadata={
            "help": "Compute the frozen backbone's hidden states of the training texts once, on disk in half "
            "precision, instead of in every epoch. They are in capsule_heads in the cache folder of datasets "
            "(HF_DATASETS_CACHE), which nothing empties."
        },
    )
    cache_on_device: bool = field(
        default=False,
        metadata={
            "help": "Keep the cached hidden states in the memory of the GPU, and make batches there. Needs "
            "cache_hidden_states, and dataloader_num_workers: 0."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Number of evaluations without a better metric_for_best_model after which training stops. Needs "
            "load_best_model_at_end."
        },
    )


@dataclass
class ModelArguments:
    """Which backbone, and what every head has; the options of the head itself are those of the registry."""

    backbone: str = field(
        metadata={
            "help": "A model on the Hub, a directory, package:NAME/FOLDER inside an installed package, or new:TYPE for "
            "one with random weights (new:stereo_conv)."
        }
    )
    backbone_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the backbone."})
    freeze_backbone: bool = field(default=True, metadata={"help": "Train the head alone."})
    layers: list[int] | None = field(
        default=None, metadata={"help": "Indices of the hidden states to use; 0 is the embedding output. Default: all."}
    )
    head_type: str = field(default=DEFAULT_HEAD, metadata={"help": "Name of the head."})
    mixup_alpha: float = field(
        default=0.0,
        metadata={"help": "Parameter of the distribution of mixup's ratios; 0 for no mixup. The paper's: 0.2."},
    )
    class_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each class in the loss."})


class TrainingRun:
    """A run that is ready to train: data loaded and prepared, the model built.

    Args:
        data: options of the data.
        model: options of the model.
        head_options: the options of the head that were given.
        arguments: transformers' training arguments.

    Attributes:
        model: the model.
        trainer: the Trainer, once `train` was called.

    Raises:
        ValueError: If an option does not fit the others, the data or the backbone.
        TypeError: If the head has no such option.
        OSError: If the data or the backbone is not found.
        ImportError: If a package with the backbone is not installed.
    """

    def __init__(
        self,
        data: DataArguments,
        model: ModelArguments,
        head_options: Mapping[str, Any],
        arguments: CapsuleTrainingArguments,
    ) -> None:
        set_seed(arguments.seed)
        self.data, self.model_arguments, self.arguments = data, model, arguments
        self.task = get_task(data.task)
        self.head_options = describe_head(model, head_options)
        if data.early_stopping_patience and not arguments.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end.")
        check_cache_options(data, arguments.dataloader_num_workers)
        self.output_dir = str(arguments.output_dir)  # __post_init__ of TrainingArguments has set it
        self.checkpoint = resolve_checkpoint(arguments.resume_from_checkpoint, self.output_dir)
        with arguments.main_process_first():
            splits = self.task.load(data.source, phrases=data.phrases)
            self.processor = self.task.load_processor(model.backbone, model.backbone_revision, data.pad_token)
            windows = windows_for(data, self.task, self.processor)
            self.model = build_model(self.task, model, head_options, splits["train"], **windows)
            self.task.check_files(splits, self.processor, self.model)
            self.prepared = self.task.prepare(
                splits, self.processor, data.max_length, self.model.config.windowing is not None
            )
            self.train_data = self.prepared["train"]
        self.validation = {name: self.prepared[name] for name in evaluation_splits(splits, "validation")}
        self.tests = {name: self.prepared[name] for name in evaluation_splits(splits, "test")}
        check_best_metric(arguments.metric_for_best_model, self.task.metric, self.validation)
        if data.cache_hidden_states:  # the processes agree among themselves on which one computes
            nn.Module.to(self.model, arguments.device)  # PreTrainedModel.to has no type
            self.train_data = HiddenStateCache(self.train_data, self.model, self.processor)
            if data.cache_on_device:
                self.train_data.to(arguments.device)

    def train(self) -> float:
        """Train and save the model, and return the seconds that training took.

        Raises:
            FloatingPointError: If numbers are not finite.
            OSError: If there is no place to write to.
            ValueError: If inputs do not fit the model.
        """
        patience = self.data.early_stopping_patience
        self.trainer = CapsuleTrainer(
            model=self.model,
            args=self.arguments,
            train_dataset=self.train_data,
            eval_dataset=self.validation if len(self.validation) > 1 else next(iter(self.validation.values())),
            processing_class=self.processor,
            data_collator=self.task.data.collator(self.processor),
            compute_metrics=compute_metrics_for(self.task.metric),
            callbacks=[EarlyStoppingCallback(patience)] if patience else None,
        )
        start = time.perf_counter()
        self.trainer.train(resume_from_checkpoint=self.checkpoint)
        seconds = time.perf_counter() - start
        self.trainer.save_model()
        return seconds

    def evaluate(self, seconds: float) -> dict[str, Any]:
        """Evaluate the trained model, write `results.json`, and return what is in it.

        Args:
            seconds: what `train` returned.

        Raises:
            OSError: If the file cannot be written; the results are then on standard output.
        """
        self.trainer.remove_callback(EarlyStoppingCallback)  # it warns of an evaluation under another name than "eval"
        results = {
            "task": self.task.name,
            "dataset": self.task.dataset,
            "backbone": self.model_arguments.backbone,
            "freeze_backbone": self.model_arguments.freeze_backbone,
            "head_type": self.model_arguments.head_type,
            "head_options": self.head_options,
            "seed": self.arguments.seed,
            "steps": self.trainer.state.global_step,
            "training_seconds": seconds,
            "trained_parameters": self.model.num_parameters(only_trainable=True),
            "training_arguments": describe_arguments(self.arguments),
        }
        for name, split in {**self.validation, **self.tests}.items():
            results |= self.trainer.evaluate(split, metric_key_prefix=name)
        if self.trainer.is_world_process_zero():
            try:
                write_json(Path(self.output_dir, "results.json"), results)
            except OSError:
                print(json.dumps(results, indent=2))  # they took a training to find out
                raise
        if self.arguments.push_to_hub:  # again: the card now has the results
            self.trainer.push_to_hub(results=results)
        return results

    def close(self) -> None:
        """End the process group."""
        self.trainer.accelerator.end_training()  # NCCL warns of a process group that is left open
        if self.arguments.world_size > 1:
            time.sleep(1)  # a thread of gloo's may need Python when it is gone, and would abort the process


def describe_head(arguments: ModelArguments, given: Mapping[str, Any]) -> str:
    """Return the options that tell runs apart, such as "n_parts=16, mixup_alpha=0.2".

    Args:
        arguments: options that every head has.
        given: options of the head that were given.

    Raises:
        ValueError: If the head is not registered, or a value is not what its option expects.
        TypeError: If the head has no such option.
    """
    head = get_head(arguments.head_type)
    own, default = head.make_options(given).as_dict(), head.make_options({}).as_dict()
    names = [x.name for x in fields(head.Options) if x.metadata["describes"] and own[x.name] != default[x.name]]
    common = {x.name: getattr(arguments, x.name) for x in fields(arguments) if getattr(arguments, x.name) != x.default}
    values = {name: common[name] for name in ("layers",) if name in common}
    values |= {name: own[name] for name in names}
    values |= {name: common[name] for name in ("mixup_alpha", "class_weights") if name in common}
    return ", ".join(f"{name}={value}" for name, value in values.items())


def check_cache_options(arguments: DataArguments, n_workers: int) -> None:
    """Check the options of the cache of hidden states.

    Args:
        arguments: which options.
        n_workers: number of worker processes of a data loader.

    Raises:
        ValueError: If a cache is to be kept on the device without a cache, or with worker processes.
    """
    if arguments.cache_on_device and not arguments.cache_hidden_states:
        raise ValueError(
            "cache_on_device is true and cache_hidden_states is false; expected a cache to keep on the device: set "
            "cache_hidden_states to true."
        )
    if arguments.cache_on_device and n_workers:
        raise ValueError(
            f"dataloader_num_workers is {n_workers}; cache_on_device expects 0, as worker processes cannot share a "
            "device: leave dataloader_num_workers out."
        )


def windows_for(arguments: DataArguments, task: Task, processor: Any) -> dict[str, int | list[int]]:
    """Return the fields of a model's configuration that say how texts are cut into windows; none if they are not.

    Raises:
        ValueError: If there is a length without an overlap, or the task is not of texts.
    """
    if arguments.window_overlap is None:
        if arguments.window_length is not None:
            raise ValueError("window_length needs window_overlap: the tokens that neighbouring windows share.")
        return {}
    if not isinstance(processor, PreTrainedTokenizerBase):
        raise ValueError(f"window_overlap is for texts, and {task.name} is of {task.data.noun}; leave it out.")
    return window_fields(processor, arguments.window_overlap, arguments.window_length)


def build_model(
    task: Task, arguments: ModelArguments, head_options: Mapping[str, Any], train: Dataset, **more_fields: Any
) -> CapsuleHeadClassifier:
    """Put a new head for a dataset's labels on a backbone.

    Args:
        task: says whether texts, images or audio are classified.
        arguments: the backbone, and what every head has.
        head_options: the options of the head that were given.
        train: its `label` column gives the classes' names or, where it holds numbers, mean and unit of a regression.
        **more_fields: of `CapsuleHeadConfig`.
    """
    given = {x.name: getattr(arguments, x.name) for x in fields(arguments) if not x.name.startswith("backbone")}
    given |= {**head_options, **more_fields}
    label = train.features["label"]
    if isinstance(label, ClassLabel):
        given |= label_fields(label.names)
    else:
        values = train.with_format("numpy")["label"][:]
        given |= {"num_labels": 1, "label_mean": float(values.mean()), "label_std": float(values.std())}
    backbone: Any = arguments.backbone
    if backbone.startswith(NEW_PREFIX):
        backbone = AutoConfig.for_model(backbone.removeprefix(NEW_PREFIX))
    return task.data.model_class().from_backbone(backbone, revision=arguments.backbone_revision, **given)


def evaluation_splits(splits: DatasetDict, prefix: str) -> dict[str, Dataset]:
    """Return the splits of a name that have labels; MNLI has two of validation, validation_matched and _mismatched."""
    return {
        name: split
        for name, split in splits.items()
        if (name == prefix or name.startswith(f"{prefix}_"))
        and not _is_unlabelled(split.with_format("numpy")["label"][:])
    }


def _is_unlabelled(labels: Any) -> bool:
    return bool(((labels == -1) | (labels != labels)).all())  # GLUE: -1, or NaN for numbers


def check_best_metric(name: str | None, metric: str, validation: Collection[str]) -> None:
    """Check `metric_for_best_model` before the first evaluation, among whose metrics it is looked for.

    Args:
        name: the metric, perhaps beginning with `eval_`; None if the best model is not looked for.
        metric: what the task is measured by.
        validation: names of the splits that are evaluated: of several, each metric has the name before its own.

    Raises:
        ValueError: If there is no such metric; names those there are.
    """
    names = ["loss", *metric_names(metric)]
    if len(validation) > 1:
        names = [f"{split}_{name}" for split in validation for name in names]
    if name is not None and name.removeprefix("eval_") not in names:
        raise ValueError(f"metric_for_best_model is {name}; expected one of {', '.join(names)}.")


def check_labels_match(model: CapsuleHeadClassifier, dataset: Dataset) -> None:
    """Check that a model was trained for a dataset's labels.

    Raises:
        ValueError: If it was trained for others; names both.
    """
    label = dataset.features["label"]
    expected = list(label.names) if isinstance(label, ClassLabel) else None
    regression = model.config.problem_type == "regression"
    found = None if regression else [name for _, name in sorted(dict(model.config.id2label or {}).items())]
    if found != expected:
        raise ValueError(
            f"The model was trained for {found or 'numbers'}, and the dataset has {expected or 'numbers'}; expected "
            "the same labels in the same order."
        )
