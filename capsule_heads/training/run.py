"""A training run: its data and model from options, its training, and its results."""

from __future__ import annotations

import difflib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedTokenizerBase,
    ProgressCallback,
    set_seed,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations import get_reporting_integration_callbacks

from ..backbones.fitting import kinds_of_input
from ..backbones.loading import PACKAGE_PREFIX, load_backbone_config
from ..backbones.processors import MODALITIES
from ..data.encodings import ENCODINGS
from ..data.hidden_states import HiddenStateCache
from ..data.own import OwnData, load_data
from ..data.own_labels import CLASSES
from ..data.state_folder import gigabytes
from ..data.tokenization import window_fields
from ..explain.parts import PARTS_FILE, describe_parts, sample_of
from ..files import write_json
from ..hardware import describe_hardware
from ..heads import DEFAULT_HEAD, get_head
from ..metrics import compute_metrics_for, metric_names
from ..models.configuration_capsule_head import BALANCED, PROBLEM_TYPES, label_fields
from ..models.modeling_capsule_head import CapsuleHeadClassifier
from ..tasks import Task, get_task, own_task
from .adapters import LORA, METHODS, adapt
from .arguments import CapsuleTrainingArguments, describe_arguments
from .calibration import calibrate
from .checkpoints import LAST, resolve_checkpoint
from .metrics import are_uneven
from .trainer import CapsuleTrainer

logger = logging.getLogger(__name__)

NEW_PREFIX = "new:"
OF_CACHE = ("cache_dir", "states_dtype", "hidden_states")  # options that need a cache
MOST_CACHED = 2 * 2**30  # bytes of hidden states that are cached by default


@dataclass
class DataArguments:
    """Options of the data: which texts, images or audio, and how they are prepared."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "Your own data: a table (CSV, TSV, JSON, JSON Lines, Parquet), a folder of tables, of images or of "
            "audio, a folder saved by datasets, or the name of a dataset on the Hub."
        },
    )
    text: str | None = field(
        default=None,
        metadata={"help": "Column of texts, or two with a comma between for pairs. Default: one with a usual name."},
    )
    label: str | None = field(
        default=None,
        metadata={
            "help": "Column of labels, or columns of 0 and 1 with commas between. Default: one with a usual name."
        },
    )
    validation: str | None = field(
        default=None,
        metadata={
            "help": "Validation data, as for data, or the name of a split. Default: the split of that name, or a part "
            "of the training rows."
        },
    )
    test: str | None = field(
        default=None,
        metadata={"help": "Test data, as for data, or the name of a split. Default: the split of that name, if any."},
    )
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    data_split: str | None = field(default=None, metadata={"help": "Split to train on. Default: the one called train."})
    problem_type: str | None = field(
        default=None,
        metadata={
            "help": "Kind of the labels, if they would be taken for another kind.",
            "choices": list(PROBLEM_TYPES),
        },
    )
    task: str | None = field(default=None, metadata={"help": "Task to train on, instead of data of your own."})
    source: str | None = field(default=None, metadata={"help": "Where the task's data is."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Number of tokens to cut texts to. Default: the most that the backbone takes; no cut with "
            "window_overlap."
        },
    )
    phrases: bool = field(
        default=True,
        metadata={"help": "Train on all distinct phrases of the Stanford trees, not on complete sentences only."},
    )
    window_overlap: int | None = field(
        default=None,
        metadata={
            "help": "Number of tokens that neighbouring windows of a long text share. The backbone then runs on "
            "windows, and the tokens of all windows are routed together."
        },
    )
    window_length: int | None = field(
        default=None, metadata={"help": "Number of tokens in a window. Default: the most that the backbone takes."}
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Padding token, for a tokenizer that has none (such as GPT-2's)."}
    )
    cache_hidden_states: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the frozen backbone's hidden states of the training texts once, and keep them on disk, "
            "instead of computing them in every epoch. Default: true if they take 2 GB at most, or an option of the "
            "cache is given."
        },
    )
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for cached hidden states, which is never emptied. Default: capsule_heads in the cache "
            "folder of datasets (HF_DATASETS_CACHE)."
        },
    )
    states_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the cached numbers: float16, bfloat16, or int8 with a scale for each token at each "
            "layer. Default: float16.",
            "choices": list(ENCODINGS),
        },
    )
    hidden_states: list[str] | None = field(
        default=None,
        metadata={
            "help": "Folders that capsule-heads cache has made with this backbone, to read the hidden states of all "
            "texts from instead of computing any."
        },
    )
    cache_on_device: bool = field(
        default=False,
        metadata={
            "help": "Keep the cached hidden states in the GPU's memory, and make batches there. Needs "
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

    def without_cache(self) -> DataArguments:
        """Return the options of a run that computes hidden states when it needs them."""
        return replace(self, cache_hidden_states=False, cache_dir=None, states_dtype=None, hidden_states=None)


@dataclass
class ModelArguments:
    """Options of the backbone, and options that every head has; a head's own options are in the registry."""

    backbone: str = field(
        metadata={
            "help": "A model on the Hub, a directory, package:NAME/FOLDER inside an installed package, or new:TYPE for "
            "a model with random weights (new:stereo_conv)."
        }
    )
    backbone_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the backbone."})
    freeze_backbone: bool = field(default=True, metadata={"help": "Train only the head."})
    adapt: str | None = field(
        default=None,
        metadata={
            "help": f"{LORA} to adapt a frozen backbone that does not know the task. Small matrices are trained in it "
            "before the head, and saved with the head. This takes longer, and helps most with few examples.",
            "choices": METHODS,
        },
    )
    layers: list[int] | None = field(
        default=None, metadata={"help": "Indices of the hidden states to use; 0 is the embedding output. Default: all."}
    )
    head_type: str = field(default=DEFAULT_HEAD, metadata={"help": "Name of the head."})
    mixup_alpha: float = field(
        default=0.0,
        metadata={"help": "Parameter of the distribution of mixup's ratios; 0 for no mixup. The paper has 0.2."},
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
        task: task of data that is loaded already; None for the task that the options name.

    Attributes:
        model: the model.
        trainer: the Trainer.

    Raises:
        ValueError: If an option does not fit the others, the data or the backbone.
        TypeError: If the head has no such option.
        OSError: If the data or the backbone is not found.
        ImportError: If a package that the backbone, the optimizer or `report_to` needs is not installed.
    """

    def __init__(
        self,
        data: DataArguments,
        model: ModelArguments,
        head_options: Mapping[str, Any],
        arguments: CapsuleTrainingArguments,
        task: Task | None = None,
    ) -> None:
        set_seed(arguments.seed)
        self.data, self.model_arguments, self.arguments = data, model, arguments
        self.head_options = describe_head(model, head_options)
        with arguments.main_process_first():
            self.task = task or find_task(data, arguments.seed)
        check_data_options(data, self.task)
        if data.early_stopping_patience and not arguments.load_best_model_at_end:
            raise ValueError(
                f"early_stopping_patience is {data.early_stopping_patience} without load_best_model_at_end; set both, "
                "or neither."
            )
        check_cache_options(data, arguments.dataloader_num_workers)
        check_reporting(list(arguments.report_to or ()))
        self.output_dir = str(arguments.output_dir)  # __post_init__ of TrainingArguments has set it
        self.checkpoint = resolve_checkpoint(arguments.resume_from_checkpoint, self.output_dir)
        check_backbone(model, self.task)
        with arguments.main_process_first():
            splits = self.task.load(data.source, phrases=data.phrases)
            self.own_data, self.own_texts = describe_own_data(splits), splits["train"]
            self.processor = self.task.load_processor(model.backbone, model.backbone_revision, data.pad_token)
            windows = windows_for(data, self.task, self.processor)
            self.model = build_model(self.task, model, head_options, splits, **windows)
            self.task.check_files(splits, self.processor, self.model)
            self.prepared = self.task.prepare(
                splits, self.processor, data.max_length, self.model.config.windowing is not None
            )
            self.train_data = self.prepared["train"]
        say_uneven(splits, self.model.config.class_weights)
        align_special_tokens(self.model.config.get_text_config(), self.processor)
        self.validation: dict[str, Any] = {x: self.prepared[x] for x in evaluation_splits(splits, "validation")}
        self.tests: dict[str, Any] = {x: self.prepared[x] for x in evaluation_splits(splits, "test")}
        check_best_metric(arguments.metric_for_best_model, self.task.metric, self.validation)
        collator: Any = self.task.data.collator(self.processor)
        if model.adapt is not None:
            nn.Module.to(self.model, arguments.device)
            adapt(self.model, self.train_data, collator, seed=arguments.seed, checkpoint=self.checkpoint)
        if data.cache_hidden_states or (data.cache_hidden_states is None and self._pays_to_cache()):
            self._cache_hidden_states()
        self.calibration: dict[str, Any] | None = None
        self.collator: Any = collator
        self.trainer = self._make_trainer()
        try:
            self.trainer.get_optimizer_cls_and_kwargs(arguments, self.model)
        except ImportError as error:
            raise ImportError(f"optim is {arguments.optim}: {error}") from error

    @property
    def compute_metrics(self) -> Callable[[EvalPrediction], dict[str, float]] | None:
        """The task's metrics; None for the trainer's metrics, which know label thresholds and uneven classes."""
        return None if self.task.is_own_data else compute_metrics_for(self.task.metric)

    def _make_trainer(self) -> CapsuleTrainer:
        patience = self.data.early_stopping_patience
        trainer = CapsuleTrainer(
            model=self.model,
            args=self.arguments,
            train_dataset=self.train_data,
            eval_dataset=next(iter(self.validation.values())) if len(self.validation) == 1 else self.validation or None,
            processing_class=self.processor,
            data_collator=self.collator,
            compute_metrics=self.compute_metrics,
            callbacks=[EarlyStoppingCallback(patience)] if patience else None,
        )
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(OneBar)
        return trainer

    def replace_model(self, model: CapsuleHeadClassifier, head_type: str, head_options: str) -> None:
        """Replace the run's model by a model that was trained elsewhere.

        Args:
            model: a classifier for the run's data.
            head_type: name of its head, for results.json.
            head_options: options of its head, for results.json.
        """
        steps = self.trainer.state.global_step
        self.model, self.head_options = model, head_options
        self.model_arguments = replace(self.model_arguments, head_type=head_type)
        self.trainer = self._make_trainer()
        self.trainer.state.global_step = steps

    @property
    def cache_options(self) -> dict[str, Any]:
        """The options of `HiddenStateCache` that were given."""
        data = self.data
        given = {"cache_dir": data.cache_dir, "states_dtype": data.states_dtype, "sources": data.hidden_states}
        return {name: value for name, value in given.items() if value is not None}

    def cached(self, split: Any) -> HiddenStateCache:
        """Return a split as cached hidden states; a split that is cached already is returned as it is."""
        if isinstance(split, HiddenStateCache):
            return split
        return HiddenStateCache(split, self.model, self.processor, **self.cache_options)

    def _pays_to_cache(self) -> bool:
        """Return whether caching is worthwhile: the hidden states are of texts, never change, and take little disk."""
        data, model = self.data, self.model
        if data.cache_on_device or self.cache_options:
            return True
        sizes = {model.config.hidden_sizes[layer] for layer in model.config.layers}
        if self.task.modality != "text" or self.task.preparation is not None or model.backbone_trains or len(sizes) > 1:
            return False
        return HiddenStateCache.estimate(self.train_data, model, self.processor) <= MOST_CACHED

    def _cache_hidden_states(self) -> None:
        """Replace the training texts by their hidden states, and the other splits if an option of the cache was given.

        The processes agree on which one computes. Without an option of the cache, the other splits are evaluated on
        states that are not rounded, as the saved model will be used.
        """
        nn.Module.to(self.model, self.arguments.device)  # PreTrainedModel.to has no type
        try:
            states = self.cached(self.train_data)
            if self.cache_options:
                self.validation = {name: self.cached(split) for name, split in self.validation.items()}
                self.tests = {name: self.cached(split) for name, split in self.tests.items()}
        except (OSError, ValueError) as error:  # a full disk; numbers that exceed half precision
            if self.data.cache_hidden_states is not None or self.data.cache_on_device or self.cache_options:
                raise
            logger.warning("Hidden states are computed in every epoch: %s", error)
            return
        if self.data.cache_hidden_states is None and not self.cache_options:
            logger.warning(
                "Hidden states of the training texts are computed once and kept in %s (%s); cache_hidden_states: false "
                "computes them in every epoch.",
                states.folder,
                gigabytes(states.n_bytes),
            )
        self.train_data = states.to(self.arguments.device) if self.data.cache_on_device else states

    def train(self) -> float:
        """Train, calibrate, save and describe the model, and return the seconds that training took.

        Raises:
            FloatingPointError: If numbers are not finite.
            OSError: If files cannot be written.
            ValueError: If inputs do not fit the model.
        """
        start = time.perf_counter()
        self.trainer.train(resume_from_checkpoint=self.checkpoint)
        seconds = time.perf_counter() - start
        self.finish()
        return seconds

    def finish(self) -> None:
        """Calibrate, save and describe the model after its training.

        Raises:
            OSError: If files cannot be written.
        """
        split = next(iter(self.validation.values()), None)  # the first of several: one model has one temperature
        if split is not None:
            self.calibration = calibrate(self.trainer, split)
        self.trainer.save_model()
        self._describe_parts()

    def _describe_parts(self) -> None:
        """Describe what the head's parts respond to, in words of a user's own texts, for explanations."""
        if self.task.modality != "text" or not self.task.is_own_data or not self.trainer.is_world_process_zero():
            return
        if self.model.config.problem_type == "regression" or "parts" not in self.model.head.explains:
            return
        texts = self.own_texts.select(sample_of(len(self.own_texts)))  # before they become strings in memory
        descriptions = describe_parts(self.model, self.task.data.inputs(texts, self.processor), self.processor)
        descriptions.save(Path(self.output_dir, PARTS_FILE))

    def evaluate(self, seconds: float) -> dict[str, Any]:
        """Evaluate the trained model, write `results.json`, and return its content.

        Args:
            seconds: what `train` returned.

        Raises:
            OSError: If the file cannot be written; the results are then on standard output.
        """
        self.trainer.remove_callback(EarlyStoppingCallback)  # it warns of an evaluation under another name than "eval"
        results = {
            "task": self.task.name,
            "dataset": self.task.dataset,
            **self.own_data,
            "backbone": self.model_arguments.backbone,
            "freeze_backbone": self.model_arguments.freeze_backbone,
            "adapt": self.model_arguments.adapt,
            "head_type": self.model_arguments.head_type,
            "head_options": self.head_options,
            "seed": self.arguments.seed,
            "steps": self.trainer.state.global_step,
            "training_seconds": seconds,
            "hardware": describe_hardware(self.arguments.device, self.arguments.world_size),
            "trained_parameters": self.model.num_parameters(only_trainable=True),
            "training_arguments": describe_arguments(self.arguments),
            **({} if self.calibration is None else {"calibration": self.calibration}),
        }
        for name, split in {**self.validation, **self.tests}.items():
            results |= self.trainer.evaluate(split, metric_key_prefix=name)
        if self.trainer.is_world_process_zero():
            try:
                write_json(Path(self.output_dir, "results.json"), results)
            except OSError:
                print(json.dumps(results, indent=2))  # so that the results are not lost
                raise
        if self.arguments.push_to_hub:  # again: the card now has the results
            self.trainer.push_to_hub(results=results)
        return results

    def close(self) -> None:
        """End the process group."""
        self.trainer.accelerator.end_training()  # NCCL warns of a process group that is left open
        if self.arguments.world_size > 1:
            time.sleep(1)  # else a thread of gloo may need Python after its end, and abort the process


class OneBar(ProgressCallback):
    """Shows one progress bar at a time: during an evaluation, the bar of training stays and says "Evaluating"."""

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Show the progress of an evaluation, unless it is part of training."""
        if self.training_bar is None:
            super().on_prediction_step(*args, **kwargs)
        elif not self.training_bar.desc:
            self.training_bar.set_description("Evaluating")

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Remove the bar of an evaluation."""
        super().on_evaluate(*args, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("")


def what_is_saved(output_dir: str, is_trained: bool) -> str:
    """Return a clause about what an interrupted run has saved, and how to resume it.

    Args:
        output_dir: the run's folder.
        is_trained: whether the trained model is saved already.
    """
    if is_trained:
        return f"the trained model is saved in {output_dir}, and was not evaluated to the end"
    checkpoint = resolve_checkpoint(LAST, output_dir)
    if checkpoint is None:
        return "there is no checkpoint yet, and nothing is saved"
    return f"{checkpoint} is saved, and --resume_from_checkpoint {LAST} continues from there"


def find_task(arguments: DataArguments, seed: int) -> Task:
    """Return the task of a user's own data, which is loaded here, or a registered task.

    Args:
        arguments: options of the data.
        seed: random seed of a validation split that is drawn.

    Raises:
        ValueError: If data and task are both given or both missing, an option is for the other of the two, or the data
            is not as expected.
        FileNotFoundError: If the data is not found.
        OSError: If the data cannot be read.
    """
    if (arguments.data is None) == (arguments.task is None):
        raise ValueError(
            f"data is {arguments.data} and task is {arguments.task}; expected one of them: data of your own (a file, a "
            "folder or the name of a dataset on the Hub), or a task."
        )
    if arguments.data is None:
        own = ("text", "label", "validation", "test", "data_config", "data_split", "problem_type")
        for name in own:
            if getattr(arguments, name) is not None:
                raise ValueError(f"{name} is {getattr(arguments, name)}, which is for data of your own; leave it out.")
        return get_task(str(arguments.task))
    if arguments.source is not None:
        raise ValueError(f"source is {arguments.source}, which is for tasks; leave it out.")
    data = load_data(
        arguments.data,
        arguments.text,
        arguments.label,
        arguments.validation,
        arguments.test,
        config=arguments.data_config,
        split=arguments.data_split,
        problem_type=arguments.problem_type,
        seed=seed,
    )
    return own_task(data)


def describe_own_data(splits: DatasetDict) -> dict[str, Any]:
    """Return what results.json says of a user's own data, the columns that were read; {} for a task's data."""
    if not isinstance(splits, OwnData):
        return {}
    return {"inputs_from": splits.inputs_from, "labels_from": splits.labels_from}


def say_uneven(splits: DatasetDict, class_weights: object) -> None:
    """Log that a user's classes are uneven, if they are, and what helps the rare ones."""
    if not isinstance(splits, OwnData) or splits.problem_type != CLASSES or class_weights is not None:
        return
    labels = splits["train"]["label"][:]
    if are_uneven(labels):
        (most, n_most), *_, (least, n_least) = Counter(labels).most_common()
        names = splits.class_names or []
        logger.warning(
            "Classes are uneven: %d of %s, %d of %s. class_weights: balanced gives rare classes more weight.",
            n_most, names[most], n_least, names[least],
        )  # fmt: skip


def describe_head(arguments: ModelArguments, given: Mapping[str, Any]) -> str:
    """Return the options in which runs differ, such as "n_parts=16, mixup_alpha=0.2".

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
        arguments: options of the data.
        n_workers: number of worker processes of a data loader.

    Raises:
        ValueError: If an option of the cache is given without a cache, or with an option that excludes it; if a cache
            on the device is given with worker processes.
    """
    for name in OF_CACHE:
        value = getattr(arguments, name)
        if value is not None and arguments.cache_hidden_states is False:
            raise ValueError(f"{name} is {value}, and cache_hidden_states is false; expected a cache: leave one out.")
    if arguments.cache_dir is not None and arguments.hidden_states is not None:
        raise ValueError(
            f"cache_dir is {arguments.cache_dir}, and hidden_states names folders, from which all states are read; "
            "leave cache_dir out."
        )
    if arguments.cache_on_device and arguments.cache_hidden_states is False:
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
        ValueError: If an option has no effect.
    """
    if arguments.early_stopping_patience is not None and arguments.early_stopping_patience < 1:
        raise ValueError(
            f"early_stopping_patience is {arguments.early_stopping_patience}; expected 1 or more, or leave it out."
        )
    if not arguments.phrases and "phrases" not in task.loader_options:
        raise ValueError(f"phrases is false, and {task.name} has no phrases to leave out; leave the option out.")
    void = {
        "max_length": task.preparation is not None,  # it prepares its texts itself
        "pad_token": task.processor is not None,
        **dict.fromkeys(("cache_hidden_states", "cache_on_device", *OF_CACHE), False),
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
    """Check that the integrations that `report_to` names are available.

    Raises:
        ImportError: If the package of one is not installed.
        ValueError: If one is not known.
    """
    try:
        for callback in get_reporting_integration_callbacks(report_to):
            callback()
    except ValueError as error:
        raise ValueError(f"report_to is {', '.join(report_to)}: {error}") from error
    except (ImportError, RuntimeError) as error:  # RuntimeError is how transformers says that a package is missing
        raise ImportError(f"report_to is {', '.join(report_to)}: {error}") from error


def check_backbone(arguments: ModelArguments, task: Task) -> None:
    """Check by its configuration that a backbone takes a task's data, before anything else is loaded.

    Raises:
        ValueError: If the backbone takes other data or has no processor for the task, or if its revision has no effect.
        OSError: If the backbone is not found.
    """
    name, revision = arguments.backbone, arguments.backbone_revision
    is_new = name.startswith(NEW_PREFIX)
    if revision is not None and (is_new or name.startswith(PACKAGE_PREFIX) or os.path.isdir(name)):
        raise ValueError(
            f"backbone_revision is {revision}, and the backbone {name} is not from the Hub, so it has no revisions; "
            "leave backbone_revision out."
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
    """Return the default configuration of the model type that `new:TYPE` names.

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
    """Set a backbone's special tokens to those of a tokenizer. The Trainer would do it too, with a warning."""
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        token, known = getattr(processor, name, None), getattr(config, name, None)
        if token is None or token in (known if isinstance(known, list) else [known]):
            continue
        setattr(config, name, [token, *known] if isinstance(known, list) and name == "eos_token_id" else token)


def windows_for(arguments: DataArguments, task: Task, processor: Any) -> dict[str, int | list[int]]:
    """Return the fields of a model's configuration that say how texts are cut into windows; {} if they are not cut.

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
    task: Task, arguments: ModelArguments, head_options: Mapping[str, Any], splits: DatasetDict, **more_fields: Any
) -> CapsuleHeadClassifier:
    """Put a new head for a dataset's labels on a backbone.

    Args:
        task: says whether texts, images or audio are classified.
        arguments: options of the backbone, and options that every head has.
        head_options: the options of the head that were given.
        splits: the data. The `label` column of `train` gives the names of classes or, if it holds numbers, the mean and
            standard deviation of a regression. A user's own data knows its labels.
        **more_fields: more fields of `CapsuleHeadConfig`.
    """
    given = {
        x.name: getattr(arguments, x.name) for x in fields(arguments) if not x.name.startswith(("backbone", "adapt"))
    }
    given |= {**head_options, **more_fields}
    if given["class_weights"] == [BALANCED]:
        given["class_weights"] = BALANCED
    label = splits["train"].features["label"]
    if isinstance(splits, OwnData):
        given |= splits.model_fields
    elif isinstance(label, ClassLabel):
        given |= label_fields(label.names)
    else:
        values = splits["train"].with_format("numpy")["label"][:]
        given |= {"num_labels": 1, "label_mean": float(values.mean()), "label_std": float(values.std())}
    backbone: Any = arguments.backbone
    if backbone.startswith(NEW_PREFIX):
        backbone = new_backbone_config(backbone)
    return task.data.model_class().from_backbone(backbone, revision=arguments.backbone_revision, **given)


def evaluation_splits(splits: DatasetDict, prefix: str) -> dict[str, Dataset]:
    """Return the labelled splits of a name. MNLI has two for validation, validation_matched and _mismatched."""
    return {
        name: split
        for name, split in splits.items()
        if (name == prefix or name.startswith(f"{prefix}_"))
        and not _is_unlabelled(split.with_format("numpy")["label"][:])
    }


def _is_unlabelled(labels: Any) -> bool:
    return bool(((labels == -1) | (labels != labels)).all())  # GLUE: -1, or NaN for numbers


def check_best_metric(name: str | None, metric: str, validation: Collection[str]) -> None:
    """Check before the first evaluation that it has the metric of `metric_for_best_model`.

    Args:
        name: the metric, with or without `eval_` before it; None if no best model is chosen.
        metric: name of the task's metrics.
        validation: names of the splits that are evaluated. With several, each metric's name begins with its split's.

    Raises:
        ValueError: If there is no such metric. The message names the metrics that exist.
    """
    names = ["loss", *metric_names(metric)]
    if len(validation) > 1:
        names = [f"{split}_{name}" for split in validation for name in names]
    if name is not None and name.removeprefix("eval_") not in names:
        raise ValueError(f"metric_for_best_model is {name}; expected one of {', '.join(names)}.")


def check_labels_match(model: CapsuleHeadClassifier, dataset: Dataset) -> None:
    """Check that a model was trained for a dataset's labels.

    Raises:
        ValueError: If it was trained for other labels. The message names both.
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
