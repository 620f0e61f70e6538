"""What a training run is made of: its data and its model, from the fields of a YAML file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, fields

from datasets import ClassLabel, Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from ..backbones.loading import resolve_backbone
from ..data.glue import GLUE_TASKS, load_glue
from ..data.images import IMAGE_DATASETS, load_images, prepare_images
from ..data.reviews import load_reviews
from ..data.sst import STANFORD_URL, load_sst
from ..data.tokenization import tokenize, window_fields
from ..heads import registered_heads
from ..metrics import compute_metrics_for, metric_names
from ..models import CapsuleHeadConfig, CapsuleHeadForImageClassification, CapsuleHeadForSequenceClassification
from ..models.configuration_capsule_head import label_fields
from ..models.modeling_capsule_head import CapsuleHeadClassifier
from ..paper.image_processing_stereo import StereoImageProcessor
from ..paper.smallnorb import load_smallnorb
from ..paper.stereo import prepare_stereo
from ..paper.toy_norb import load_toy_norb

SST_TASKS = ("sst5", "sst2_root")
STEREO_TASKS = ("toy_norb", "smallnorb")
TASKS = ("reviews", *SST_TASKS, *GLUE_TASKS, *STEREO_TASKS, *IMAGE_DATASETS)
EMBEDDED_TASKS = {"reviews": load_reviews, "toy_norb": load_toy_norb}
NEW_PREFIX = "new:"


@dataclass
class DataArguments:
    """Which texts or images, and how they are prepared."""

    task: str = field(metadata={"help": "What to classify.", "choices": TASKS})
    source: str | None = field(
        default=None,
        metadata={
            "help": "Where the data is: for sst5 and sst2_root a directory, zip or URL of the trees (default: "
            "Stanford's address); for a GLUE task a directory of TSV files, for cifar100 and imagenet of a dataset "
            "(default: the Hub); for smallnorb the directory of its files; for image_folder a directory with "
            "train/CLASS/*.png and the like. reviews and toy_norb come with the package."
        },
    )
    phrases: bool = field(
        default=True, metadata={"help": "Train on all distinct phrases of the trees, not on whole sentences only."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens to cut texts to. Default: as many as the backbone takes; all with window_overlap."},
    )
    window_overlap: int | None = field(
        default=None,
        metadata={
            "help": "Run the backbone on windows of longer texts, which share so many tokens, and route the tokens of "
            "all windows together."
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
            "precision, rather than in every epoch. They are in capsule_heads in the cache folder of datasets "
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
            "help": "Stop after so many evaluations without a better metric_for_best_model. Needs "
            "load_best_model_at_end."
        },
    )


@dataclass
class ModelArguments:
    """Which backbone, and the head's sizes."""

    backbone: str = field(
        metadata={
            "help": "A model on the Hub, a directory, package:NAME/FOLDER inside an installed package, or new:TYPE for "
            "one with random weights (new:stereo_conv)."
        }
    )
    backbone_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit."})
    freeze_backbone: bool = field(default=True, metadata={"help": "Train the head alone."})
    layers: list[int] | None = field(
        default=None, metadata={"help": "Indices of the hidden states to use; 0 is the embedding output. Default: all."}
    )
    head_type: str = field(
        default="token_depth", metadata={"help": "The kind of head.", "choices": tuple(registered_heads())}
    )
    pooling: str = field(
        default="mean", metadata={"help": "How a linear head pools tokens.", "choices": ("mean", "first", "last")}
    )
    d_inp: int = field(default=64, metadata={"help": "Width of the capsules that hidden states become."})
    n_parts: int = field(default=64, metadata={"help": "Number of part capsules."})
    d_cov: int | None = field(default=None, metadata={"help": "Rows of a capsule. Default: the paper's, 1 or 4."})
    d_cap: int | None = field(default=None, metadata={"help": "Columns of a capsule. Default: the paper's, 2 or 4."})
    n_iters: int | None = field(default=None, metadata={"help": "Iterations of each routing. Default: the paper's, 3."})
    p_model: str = field(default="gaussian", metadata={"help": "gaussian or skm (soft k-means)."})
    single_beta: bool = field(default=False, metadata={"help": "Use one beta for use and ignorance of data."})
    eps: float = field(default=1e-5, metadata={"help": "Added to counts of data and to variances in routing."})
    strategy: str = field(default="auto", metadata={"help": "How the routing to the parts is computed."})
    mixup_alpha: float = field(
        default=0.0, metadata={"help": "Of the distribution of mixup's ratios; 0 for none. The paper's: 0.2."}
    )
    class_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each class in the loss."})

    @property
    def head_options(self) -> str:
        """The options of the head that are not default, such as "n_iters=2, mixup_alpha=0.2"; they tell runs apart."""
        elsewhere = ("backbone", "backbone_revision", "freeze_backbone", "head_type", "strategy")
        values = {x.name: getattr(self, x.name) for x in fields(self) if getattr(self, x.name) != x.default}
        return ", ".join(f"{name}={value}" for name, value in values.items() if name not in elsewhere)


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


def load_task(task: str, source: str | None = None, phrases: bool = True) -> DatasetDict:
    """Loads a task's splits, with `text` (and perhaps `text_pair`) or `image`, and `label`.

    Args:
        task: one of `TASKS`.
        source: as in `load_sst`, `load_glue`, `load_smallnorb` and `load_images`.
        phrases: as in `load_sst`.

    Raises:
        ValueError: for an unknown task, a source for a task that has none, or none for one that needs it.
    """
    if task in EMBEDDED_TASKS:
        if source is not None:
            raise ValueError(f"source is {source}, but {task} comes with the package; leave it out.")
        return EMBEDDED_TASKS[task]()
    if task in SST_TASKS:
        return load_sst(source or STANFORD_URL, fine_grained=task == "sst5", phrases=phrases)
    if task == "smallnorb":
        if source is None:
            raise ValueError("smallnorb needs a source: the directory with its files.")
        return load_smallnorb(source)
    if task in IMAGE_DATASETS:
        return load_images(task, source)
    return load_glue(task, source)


def compute_metrics_of(task: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """The `compute_metrics` of one of `TASKS`, for a Trainer."""
    return compute_metrics_for(metrics_task(task))


def metrics_task(task: str) -> str:
    """What the metrics of one of `TASKS` go by; see `load_metric`."""
    return task if task in (*SST_TASKS, *GLUE_TASKS) else "classification"


def load_processor(
    task: str, backbone: str, revision: str | None = None, pad_token: str | None = None
) -> PreTrainedTokenizerBase | BaseImageProcessor:
    """Loads what prepares a task's texts or images for a backbone: a tokenizer, or an image processor.

    Raises:
        ValueError: for a padding token that the tokenizer does not have.
    """
    if task in STEREO_TASKS:
        return StereoImageProcessor()
    if task in IMAGE_DATASETS:
        return load_image_processor(backbone, revision)
    return load_tokenizer(backbone, revision, pad_token)


def windows_for(
    arguments: DataArguments, processor: PreTrainedTokenizerBase | BaseImageProcessor
) -> dict[str, int | list[int]]:
    """The fields of a model's configuration that say how texts are cut into windows; none if they are not.

    Raises:
        ValueError: for a length without an overlap, or windows of images.
    """
    if arguments.window_overlap is None:
        if arguments.window_length is not None:
            raise ValueError("window_length needs window_overlap: the tokens that neighbouring windows share.")
        return {}
    if not isinstance(processor, PreTrainedTokenizerBase):
        raise ValueError(f"window_overlap is for texts, and {arguments.task} is of images; leave it out.")
    return window_fields(processor, arguments.window_overlap, arguments.window_length)


def prepare(
    datasets: DatasetDict,
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    max_length: int | None = None,
    in_windows: bool = False,
) -> DatasetDict:
    """Texts as tokens, images as pixel values: what the model takes, and `labels`. Arguments as in `tokenize`."""
    if isinstance(processor, StereoImageProcessor):
        return prepare_stereo(datasets)
    if isinstance(processor, BaseImageProcessor):
        return prepare_images(datasets, processor)
    return tokenize(datasets, processor, max_length, in_windows)


def load_image_processor(backbone: str, revision: str | None = None) -> BaseImageProcessor:
    """Loads a backbone's image processor.

    Raises:
        OSError: if it is not found, or cannot be read.
    """
    with _reading("image processor", backbone):
        return AutoImageProcessor.from_pretrained(resolve_backbone(backbone), revision=revision)


@contextlib.contextmanager
def _reading(what: str, backbone: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OSError(
            f"The {what} of {backbone} cannot be read: one of its JSON files is damaged, or holds something else "
            f"({error}). Fetch or save it again."
        ) from error


def load_tokenizer(backbone: str, revision: str | None = None, pad_token: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a backbone's tokenizer, and gives it a padding token where one is named.

    Raises:
        ValueError: for a padding token that it does not have.
        OSError: if it is not found, or cannot be read.
    """
    with _reading("tokenizer", backbone):
        tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(backbone), revision=revision)
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ValueError(f"pad_token is {pad_token!r}, which is not in the vocabulary of {backbone}'s tokenizer.")
        tokenizer.pad_token = pad_token
    return tokenizer


def build_model(arguments: ModelArguments, train: Dataset, **more_fields) -> CapsuleHeadClassifier:
    """Puts a new head for a dataset's labels on a backbone.

    Args:
        arguments: backbone and sizes.
        train: its columns say whether texts or images are classified; its `label` column gives the classes' names or,
            where it holds numbers, mean and unit of a regression.
        **more_fields: of `CapsuleHeadConfig`.
    """
    head = {f.name: getattr(arguments, f.name) for f in fields(arguments) if not f.name.startswith("backbone")}
    head |= more_fields
    label = train.features["label"]
    if isinstance(label, ClassLabel):
        head |= label_fields(label.names)
    else:
        values = train.with_format("numpy")["label"][:]
        head |= {"num_labels": 1, "label_mean": float(values.mean()), "label_std": float(values.std())}
    model_class = (
        CapsuleHeadForImageClassification if "image" in train.features else CapsuleHeadForSequenceClassification
    )
    backbone = arguments.backbone
    if backbone.startswith(NEW_PREFIX):
        backbone = AutoConfig.for_model(backbone.removeprefix(NEW_PREFIX))
    return model_class.from_backbone(backbone, revision=arguments.backbone_revision, **head)


def load_classifier(name_or_path: str) -> CapsuleHeadClassifier:
    """Loads a saved classifier of texts or images, whichever it is.

    Raises:
        ValueError: if it is neither.
        OSError: if it is not found.
    """
    config = CapsuleHeadConfig.from_pretrained(name_or_path)
    classes = (CapsuleHeadForSequenceClassification, CapsuleHeadForImageClassification)
    for model_class in classes:
        if config.architectures == [model_class.__name__]:
            return model_class.from_pretrained(name_or_path)
    raise ValueError(
        f"{name_or_path} is of {config.architectures}; expected {' or '.join(cls.__name__ for cls in classes)}."
    )


def evaluation_splits(datasets: DatasetDict, prefix: str) -> dict[str, Dataset]:
    """The splits of a name that have labels; MNLI has two of validation, validation_matched and _mismatched."""
    return {
        name: split
        for name, split in datasets.items()
        if (name == prefix or name.startswith(f"{prefix}_"))
        and not _is_unlabelled(split.with_format("numpy")["label"][:])
    }


def _is_unlabelled(labels) -> bool:
    return bool(((labels == -1) | (labels != labels)).all())  # GLUE: -1, or NaN for numbers


def check_best_metric(name: str | None, task: str, validation: Collection[str]) -> None:
    """Checks `metric_for_best_model` before there is a first evaluation, whose metrics it would be looked for among.

    Args:
        name: the metric, perhaps beginning with `eval_`; None if the best model is not looked for.
        task: one of `TASKS`.
        validation: names of the splits that are evaluated: of several, each metric has the name before its own.

    Raises:
        ValueError: naming the metrics there are.
    """
    names = ["loss", *metric_names(metrics_task(task))]
    if len(validation) > 1:
        names = [f"{split}_{name}" for split in validation for name in names]
    if name is not None and name.removeprefix("eval_") not in names:
        raise ValueError(f"metric_for_best_model is {name}; expected one of {', '.join(names)}.")


def check_labels_match(model: CapsuleHeadClassifier, dataset: Dataset) -> None:
    """Checks that a model was trained for a dataset's labels.

    Raises:
        ValueError: naming both.
    """
    label = dataset.features["label"]
    expected = list(label.names) if isinstance(label, ClassLabel) else None
    regression = model.config.problem_type == "regression"
    found = None if regression else [model.config.id2label[index] for index in range(model.config.num_labels)]
    if found != expected:
        raise ValueError(
            f"The model was trained for {found or 'numbers'}, and the dataset has {expected or 'numbers'}; expected "
            "the same labels in the same order."
        )
