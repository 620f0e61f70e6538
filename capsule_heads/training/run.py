"""A training run: its data and model from options, its training, and its results."""

from __future__ import annotations

import difflib
import json
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict
from torch import nn
from transformers import CONFIG_MAPPING, EarlyStoppingCallback, PreTrainedTokenizerBase, ProgressCallback, set_seed
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations import get_reporting_integration_callbacks

from ..backbones.fitting import kinds_of_input
from ..backbones.loading import PACKAGE_PREFIX, load_backbone_config
from ..backbones.processors import MODALITIES
from ..data.hidden_states import HiddenStateCache
from ..data.tokenization import window_fields
from ..files import write_json
from ..heads import DEFAULT_HEAD, get_head
from ..metrics import compute_metrics_for, metric_names
from ..models.configuration_capsule_head import BALANCED, label_fields
from ..models.modeling_capsule_head import CapsuleHeadClassifier
from ..tasks import Task, get_task
from .arguments import CapsuleTrainingArguments, describe_arguments
from .checkpoints import LAST, resolve_checkpoint
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
    class_weights: list[str] | None = field(
        default=None,
        metadata={
            "help": 'Weight of each class in the loss; "balanced" for weights in inverse proportion to the numbers of '
            "training examples."
        },
    )

    def __post_init__(self) -> None:
        if self.class_weights is None or self.class_weights == [BALANCED]:
            return
        try:
            self.class_weights = [float(weight) for weight in self.class_weights]  # type: ignore[misc]  # as they are used
        except ValueError:
            raise ValueError(
                f'class_weights is {" ".join(self.class_weights)}; expected a number for each class, or "{BALANCED}".'
            ) from None


class TrainingRun:
    """A run that is ready to train: data loaded and prepared, the model built.

    Args:
        data: options of the data.
        model: options of the model.
        head_options: the options of the head that were given.
        arguments: transformers' training arguments.

    Attributes:
        model: the model.
        trainer: the Trainer.

    Raises:
        ValueError: If an option does not fit the others, the data or the backbone.
        TypeError: If the head has no such option.
        OSError: If the data or the backbone is not found.
        ImportError: If a package is not installed that the backbone, the optimizer or `report_to` needs.
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
        check_data_options(data, self.task)
        if data.early_stopping_patience and not arguments.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end.")
        check_cache_options(data, arguments.dataloader_num_workers)
        check_reporting(list(arguments.report_to or ()))
        self.output_dir = str(arguments.output_dir)  # __post_init__ of TrainingArguments has set it
        self.checkpoint = resolve_checkpoint(arguments.resume_from_checkpoint, self.output_dir)
        check_backbone(model, self.task)
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
        align_special_tokens(self.model.config.get_text_config(), self.processor)
        self.validation = {name: self.prepared[name] for name in evaluation_splits(splits, "validation")}
        self.tests = {name: self.prepared[name] for name in evaluation_splits(splits, "test")}
        check_best_metric(arguments.metric_for_best_model, self.task.metric, self.validation)
        if data.cache_hidden_states:  # the processes agree among themselves on which one computes
            nn.Module.to(self.model, arguments.device)  # PreTrainedModel.to has no type
            self.train_data = HiddenStateCache(self.train_data, self.model, self.processor)
            if data.cache_on_device:
                self.train_data.to(arguments.device)
        patience = data.early_stopping_patience
        self.trainer = CapsuleTrainer(
            model=self.model,
            args=arguments,
            train_dataset=self.train_data,
            eval_dataset=next(iter(self.validation.values())) if len(self.validation) == 1 else self.validation or None,
            processing_class=self.processor,
            data_collator=self.task.data.collator(self.processor),
            compute_metrics=compute_metrics_for(self.task.metric),
            callbacks=[EarlyStoppingCallback(patience)] if patience else None,
        )
        if self.trainer.pop_callback(ProgressCallback) is not None:
            self.trainer.add_callback(OneBar)
        try:
            self.trainer.get_optimizer_cls_and_kwargs(arguments, self.model)
        except ImportError as error:
            raise ImportError(f"optim is {arguments.optim}: {error}") from error

    def train(self) -> float:
        """Train and save the model, and return the seconds that training took.

        Raises:
            FloatingPointError: If numbers are not finite.
            OSError: If there is no place to write to.
            ValueError: If inputs do not fit the model.
        """
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


class OneBar(ProgressCallback):
    """Shows one progress bar at a time: that of training stands, and says so, while a split is evaluated."""

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Show the progress of an evaluation, where nothing is trained meanwhile."""
        if self.training_bar is None:
            super().on_prediction_step(*args, **kwargs)
        elif not self.training_bar.desc:
            self.training_bar.set_description("Evaluating")

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Take the bar of an evaluation away."""
        super().on_evaluate(*args, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("")


def what_is_saved(output_dir: str, is_trained: bool) -> str:
    """Return a clause about what a run that was interrupted has left, and how to go on.

    Args:
        output_dir: the run's folder.
        is_trained: whether the trained model is saved already.
    """
    if is_trained:
        return f"the trained model is saved in {output_dir}, and was not evaluated to the end"
    checkpoint = resolve_checkpoint(LAST, output_dir)
    if checkpoint is None:
        return "there is no checkpoint yet, and nothing is saved"
    return f"{checkpoint} is saved: --resume_from_checkpoint {LAST} goes on from there"


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


def check_data_options(arguments: DataArguments, task: Task) -> None:
    """Check that the options of the data have an effect on a task.

    Raises:
        ValueError: If one has none.
    """
    if arguments.early_stopping_patience is not None and arguments.early_stopping_patience < 1:
        raise ValueError(
            f"early_stopping_patience is {arguments.early_stopping_patience}; expected 1 or more, or none."
        )
    if not arguments.phrases and "phrases" not in task.loader_options:
        raise ValueError(f"phrases is false, and {task.name} has no phrases to leave out; leave the option out.")
    void = {
        "max_length": task.preparation is not None,  # its own
        "pad_token": task.processor is not None,
        "cache_hidden_states": False,
        "cache_on_device": False,
    }
    for name, is_void in void.items():
        value = getattr(arguments, name)
        if value in (None, False):
            continue
        if task.modality != "text":
            raise ValueError(
                f"{name} is {value}, which is for texts, and {task.name} is of {task.data.noun}; leave it out."
            )
        if is_void:
            raise ValueError(f"{name} is {value}, and {task.name} prepares its texts itself; leave it out.")


def check_reporting(report_to: list[str]) -> None:
    """Check that what `report_to` names can be reported to.

    Raises:
        ImportError: If its package is not installed.
        ValueError: If it is not known.
    """
    try:
        for callback in get_reporting_integration_callbacks(report_to):
            callback()
    except ValueError as error:
        raise ValueError(f"report_to is {', '.join(report_to)}: {error}") from error
    except (ImportError, RuntimeError) as error:  # RuntimeError is how transformers says that a package is missing
        raise ImportError(f"report_to is {', '.join(report_to)}: {error}") from error


def check_backbone(arguments: ModelArguments, task: Task) -> None:
    """Check that a backbone takes what a task holds, by its configuration, before anything else is loaded.

    Raises:
        ValueError: If it takes something else, has no processor for the task, or its revision means nothing.
        OSError: If it is not found.
    """
    name, revision = arguments.backbone, arguments.backbone_revision
    is_new = name.startswith(NEW_PREFIX)
    if revision is not None and (is_new or name.startswith(PACKAGE_PREFIX) or os.path.isdir(name)):
        raise ValueError(
            f"backbone_revision is {revision}, and the backbone {name} is not from the Hub, which alone has revisions; "
            "leave it out."
        )
    config = new_backbone_config(name) if is_new else load_backbone_config(name, revision)[0]
    kinds, noun = kinds_of_input(config), task.data.noun
    if kinds and noun not in kinds:
        found = " or ".join(sorted(kinds))
        raise ValueError(
            f"{task.name} is of {noun}, and the backbone {name}, a {config.model_type} model, takes {found}; expected "
            f"a backbone that takes {noun}, or a task of {found}."
        )
    if is_new and task.processor is None:
        raise ValueError(
            f"The backbone {name} has random weights and no {MODALITIES[task.modality]}, which {task.name} needs; "
            "expected a pretrained backbone, or a task with a processor of its own."
        )


def new_backbone_config(name: str) -> PreTrainedConfig:
    """Return the default configuration of the type of model that `new:TYPE` names.

    Raises:
        ValueError: If transformers has no such type.
    """
    model_type = name.removeprefix(NEW_PREFIX)
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, CONFIG_MAPPING, n=1)
        hint = f"; did you mean {NEW_PREFIX}{close[0]}?" if close else ", such as new:stereo_conv or new:bert."
        raise ValueError(f"The backbone is {name}; expected {NEW_PREFIX} and a model type of transformers{hint}")
    return CONFIG_MAPPING[model_type]()


def align_special_tokens(config: PreTrainedConfig, processor: Any) -> None:
    """Give a backbone's configuration the special tokens of a tokenizer, as the Trainer would, which warns of it."""
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        token, known = getattr(processor, name, None), getattr(config, name, None)
        if token is None or token in (known if isinstance(known, list) else [known]):
            continue
        setattr(config, name, [token, *known] if isinstance(known, list) and name == "eos_token_id" else token)


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
    if given["class_weights"] == [BALANCED]:
        given["class_weights"] = BALANCED
    label = train.features["label"]
    if isinstance(label, ClassLabel):
        given |= label_fields(label.names)
    else:
        values = train.with_format("numpy")["label"][:]
        given |= {"num_labels": 1, "label_mean": float(values.mean()), "label_std": float(values.std())}
    backbone: Any = arguments.backbone
    if backbone.startswith(NEW_PREFIX):
        backbone = new_backbone_config(backbone)
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
    found = None if regression else model.config.class_names
    if found != expected:
        raise ValueError(
            f"The model was trained for {found or 'numbers'}, and the dataset has {expected or 'numbers'}; expected "
            "the same labels in the same order."
        )
