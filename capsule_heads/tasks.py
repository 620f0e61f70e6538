"""Tasks: data to train and evaluate on by name, one record each, and the handling of texts, images and audio.

Data, models and the paper's code are imported when a task is used, so that names and help texts are there at once.
"""

from __future__ import annotations

import abc
import difflib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .data.glue import GLUE_TASKS, HUB_REPOSITORY

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from .data import OwnData
    from .models import CapsuleHeadClassifier

# Suffixes of files of texts. An input that looks like such a file's name was not meant as a text.
DATA_SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".xlsx", ".gz", ".zip")


logger = logging.getLogger(__name__)

OWN_DATA = "own_data"  # in results.json, where a registered task has its name
LONG_CHECK = 10  # seconds after which a check of files is logged


class Modality(abc.ABC):
    """The handling of texts, of images or of audio.

    Attributes:
        noun: noun for the inputs, in the plural.
        columns: the columns of a task's splits that hold an input.
    """

    noun: str
    columns: tuple[str, ...]

    @abc.abstractmethod
    def model_class(self) -> type[CapsuleHeadClassifier]:
        """Return the class of classifiers."""

    @abc.abstractmethod
    def prepare(
        self, splits: DatasetDict, processor: Any, max_length: int | None = None, in_windows: bool = False
    ) -> DatasetDict:
        """Return splits with the model's inputs and `labels`; see `Task.prepare`."""

    def check_files(self, splits: Mapping[str, Dataset], processor: Any, model: CapsuleHeadClassifier) -> None:
        """Read all files of a user's own data; see `Task.check_files`."""
        return  # texts are read already

    def collator(self, processor: Any) -> Callable[[list], Mapping[str, Any]] | None:
        """Return a function that makes batches of prepared rows; None for a Trainer's default."""
        return None

    def check_arguments(self, given: Sequence[str]) -> None:
        """Check the inputs of a command line.

        Raises:
            ValueError: If an input is not of this modality.
        """
        return  # `read` says what is wrong with a file

    @abc.abstractmethod
    def read(self, given: str, processor: Any) -> Any:
        """Return an input of `explain` from a text or the name of a file.

        Raises:
            OSError: If there is no such file.
            ValueError: If it cannot be read.
        """

    @abc.abstractmethod
    def inputs(self, split: Dataset, processor: Any) -> list[Any]:
        """Return the inputs of `explain` that a task's split holds."""


class _Texts(Modality):
    noun = "texts"
    columns = ("text", "text_pair")

    def model_class(self) -> type[CapsuleHeadClassifier]:
        from .models import CapsuleHeadForSequenceClassification

        return CapsuleHeadForSequenceClassification

    def prepare(
        self, splits: DatasetDict, processor: Any, max_length: int | None = None, in_windows: bool = False
    ) -> DatasetDict:
        from .data import tokenize

        return tokenize(splits, processor, max_length, in_windows)

    def collator(self, processor: Any) -> Callable[[list], Mapping[str, Any]]:
        from .data import CapsuleCollator

        return CapsuleCollator(processor)

    def check_arguments(self, given: Sequence[str]) -> None:
        for text in given:
            is_file = os.path.isfile(text)
            if is_file or (len(text.split()) == 1 and text.lower().endswith(DATA_SUFFIXES)):
                found = "is a file" if is_file else "is the name of a file that does not exist"
                raise ValueError(
                    f"{text} {found}, and the model classifies texts; expected a text: pass the lines of a file by "
                    f"standard input, with < {text}, and the rows of a table with --data."
                )

    def read(self, given: str, processor: Any) -> str | tuple[str, str]:
        first, tab, second = given.partition("\t")
        return (first, second) if tab else given

    def inputs(self, split: Dataset, processor: Any) -> list[Any]:
        columns = [split[name][:] for name in self.columns if name in split.column_names]
        return columns[0] if len(columns) == 1 else list(zip(*columns))


class _Images(Modality):
    noun = "images"
    columns = ("image",)

    def model_class(self) -> type[CapsuleHeadClassifier]:
        from .models import CapsuleHeadForImageClassification

        return CapsuleHeadForImageClassification

    def prepare(
        self, splits: DatasetDict, processor: Any, max_length: int | None = None, in_windows: bool = False
    ) -> DatasetDict:
        from .data.images import prepare_images

        return prepare_images(splits, processor)

    def check_files(self, splits: Mapping[str, Dataset], processor: Any, model: CapsuleHeadClassifier) -> None:
        from .data.images import check_images

        check_images(splits)

    def read(self, given: str, processor: Any) -> Any:
        from .data.images import as_image

        return as_image(given)

    def inputs(self, split: Dataset, processor: Any) -> list[Any]:
        import datasets

        from .data.images import read_images

        if isinstance(split.features["image"], datasets.Image):
            return list(read_images(split))
        return list(split.with_format("numpy")["image"][:])  # pixels, such as stereo pairs: not lists of numbers


class _Audio(Modality):
    noun = "audio"
    columns = ("audio",)

    def model_class(self) -> type[CapsuleHeadClassifier]:
        from .models import CapsuleHeadForAudioClassification

        return CapsuleHeadForAudioClassification

    def prepare(
        self, splits: DatasetDict, processor: Any, max_length: int | None = None, in_windows: bool = False
    ) -> DatasetDict:
        from .data.audio import prepare_audio

        return prepare_audio(splits, processor)

    def check_files(self, splits: Mapping[str, Dataset], processor: Any, model: CapsuleHeadClassifier) -> None:
        from .data.audio import check_audio

        check_audio(splits, processor, model)

    def collator(self, processor: Any) -> Callable[[list], Mapping[str, Any]]:
        from .data.audio import AudioCollator

        return AudioCollator(processor)

    def read(self, given: str, processor: Any) -> Any:
        from .data.audio import as_audio

        return as_audio(given, processor.sampling_rate)

    def inputs(self, split: Dataset, processor: Any) -> list[Any]:
        return [self.read(name, processor) for name in split["audio"][:]]


MODALITIES: Mapping[str, Modality] = MappingProxyType({"text": _Texts(), "image": _Images(), "audio": _Audio()})


@dataclass(frozen=True)
class Task:
    """A task: its data, how the data is prepared, and how predictions are measured.

    Attributes:
        name: the name on the command line and in results.json.
        title: a noun phrase for the data, for model cards.
        modality: one of `MODALITIES`.
        loader: returns the splits `train`, `validation` and perhaps `test`, with the columns of the modality and
            `label`. It takes a source, or None if no source was given, and the options named in `loader_options`.
        source_help: what `source` is, for `--help`; None for data that comes with the package.
        needs_source: whether the task needs a source.
        loader_options: options of the data that the loader takes besides the source: `phrases`.
        metric: name of the metrics, as `capsule_heads.metrics.compute_metrics_for` takes it.
        repository: repository of the data on the Hub, if it is there.
        config: configuration of the data on the Hub, if there are several.
        license: licence of the data, if it comes with the package.
        is_own_data: whether the data is the user's own, so that a model card cannot name it.
        processor: returns the processor, if it is not the backbone's own.
        preparation: returns prepared splits, if the modality's own preparation is not used.
    """

    name: str
    title: str
    modality: str
    loader: Callable[..., DatasetDict]
    source_help: str | None = None
    needs_source: bool = False
    loader_options: tuple[str, ...] = ()
    metric: str = "classification"
    repository: str | None = None
    config: str | None = None
    license: str | None = None
    is_own_data: bool = False
    processor: Callable[[], Any] | None = None
    preparation: Callable[[DatasetDict], DatasetDict] | None = None

    @property
    def data(self) -> Modality:
        """The handling of the task's texts, images or audio."""
        return MODALITIES[self.modality]

    @property
    def dataset(self) -> dict[str, str | None] | None:
        """The data as results.json and the model card name it; None for the user's own."""
        if self.is_own_data:
            return None
        fields = {"repository": self.repository, "config": self.config, "license": self.license}
        return {"name": self.title, **fields}

    def load(self, source: str | None = None, **options: Any) -> DatasetDict:
        """Load the splits, with the columns of the modality and `label`.

        Args:
            source: where the data is; None for the task's default.
            **options: `phrases`, for the tasks that have them; False to train on complete sentences only.

        Raises:
            ValueError: If a source is given to a task that takes none, or missing for a task that needs it.
            OSError: If the data is not found.
        """
        if source is not None and self.source_help is None:
            raise ValueError(f"source is {source}, but {self.name} comes with the package; leave it out.")
        if source is None and self.needs_source:
            raise ValueError(f"{self.name} needs a source: {self.source_help}.")
        return self.loader(source, **{name: options[name] for name in self.loader_options if name in options})

    def load_processor(self, backbone: str, revision: str | None = None, pad_token: str | None = None) -> Any:
        """Load the tokenizer, image processor or feature extractor that prepares the data for a backbone.

        Args:
            backbone: name or path of the backbone, or of a model that was saved with its processor.
            revision: branch, tag or commit.
            pad_token: the padding token, for a tokenizer that has none.

        Raises:
            OSError: If the processor is not found, or cannot be read.
            ValueError: If the padding token is not in the vocabulary, or there is no tokenizer.
        """
        if self.processor is not None:
            return self.processor()
        from .backbones.processors import load_processor

        return load_processor(backbone, self.modality, revision, pad_token)

    def check_files(self, splits: Mapping[str, Dataset], processor: Any, model: CapsuleHeadClassifier) -> None:
        """Read each file of the user's own data once, so that a damaged file is found before training begins.

        Args:
            splits: as `load` returns them.
            processor: as `load_processor` returns it.
            model: the classifier.

        Raises:
            ValueError: If an image or audio file cannot be read, or is shorter than a frame of the backbone.
        """
        if not self.is_own_data or self.preparation is not None:
            return
        start = time.perf_counter()
        self.data.check_files(splits, processor, model)
        seconds = time.perf_counter() - start
        if seconds > LONG_CHECK:
            logger.warning("Read %d files in %.0f s: none is damaged.", sum(map(len, splits.values())), seconds)

    def prepare(
        self, splits: DatasetDict, processor: Any, max_length: int | None = None, in_windows: bool = False
    ) -> DatasetDict:
        """Return the splits with a model's inputs, and `labels`.

        Args:
            splits: as `load` returns them.
            processor: as `load_processor` returns it.
            max_length: number of tokens to cut texts to; None for the most that the backbone takes.
            in_windows: whether the model takes texts of any length.

        Raises:
            ValueError: If the splits do not have the columns, or `max_length` leaves nothing of a text.
        """
        if self.preparation is not None:
            return self.preparation(splits)
        return self.data.prepare(splits, processor, max_length, in_windows)


_TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Put a task into the registry, and return it.

    `capsule-heads train`, `evaluate` and `explain` then know it by its name; they import the module that registers it
    with `--import`.

    Raises:
        ValueError: If the modality is unknown, or another task has the name.

    Example:
        >>> register_task(Task("tickets", "support tickets of 2024", "text", loader=load_tickets, is_own_data=True))
    """
    if task.modality not in MODALITIES:
        raise ValueError(f"modality is {task.modality!r}; expected one of {', '.join(MODALITIES)}.")
    known = _TASKS.get(task.name)
    # A notebook cell that is run again defines its task again.
    if known is not None and _origin(known) != _origin(task):
        raise ValueError(f"task {task.name!r} is registered already, loaded by {_origin(known)}; choose another name.")
    _TASKS[task.name] = task
    return task


def _origin(task: Task) -> str:
    return f"{task.loader.__module__}.{task.loader.__qualname__}"


def registered_tasks() -> Mapping[str, Task]:
    """Return all tasks by name, the package's own first."""
    return MappingProxyType(_TASKS)


def get_task(name: str) -> Task:
    """Return the task that is registered under a name.

    Raises:
        ValueError: If no task has the name.
    """
    if name not in _TASKS:
        close = difflib.get_close_matches(str(name), _TASKS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"task is {name!r}; expected one of {', '.join(_TASKS)}.{hint}")
    return _TASKS[name]


def own_task(data: OwnData) -> Task:
    """Return the task of a user's own data, which is in no registry.

    Args:
        data: from `load_data` or `load_examples`.
    """
    metric = {"multi_label_classification": "multilabel", "regression": "stsb"}.get(data.problem_type, "classification")
    return Task(OWN_DATA, "your own data", data.modality, lambda source: data, metric=metric, is_own_data=True)


def check_task_fits(task: Task, model: CapsuleHeadClassifier) -> None:
    """Check that a model classifies a task's kind of data.

    Raises:
        ValueError: If, for example, the task is of texts and the model classifies images.
    """
    from .models.processors import modality_of

    modality = MODALITIES[modality_of(model)]
    if modality is not task.data:
        raise ValueError(
            f"{task.name} is of {task.data.noun}, and the model classifies {modality.noun}; expected a task of "
            f"{modality.noun}."
        )


def source_help() -> str:
    """Return what `source` is for each task, for `--help`."""
    names: dict[str, list[str]] = {}
    for task in _TASKS.values():
        names.setdefault(task.source_help or "nothing, it comes with the package", []).append(task.name)
    return "Where the data is. " + "; ".join(f"{', '.join(of)}: {text}" for text, of in names.items()) + "."


def load_classifier(name_or_path: str) -> CapsuleHeadClassifier:
    """Load a saved classifier of texts, images or audio, by the class that its configuration names.

    Raises:
        ValueError: If it is a model of another class, or its weights do not fit its configuration.
        OSError: If the model is not found.
    """
    from .models import CapsuleHeadConfig
    from .models.checkpoint import MismatchedShapes

    config = CapsuleHeadConfig.from_pretrained(name_or_path)
    classes = [modality.model_class() for modality in MODALITIES.values()]
    for model_class in classes:
        if config.architectures == [model_class.__name__]:
            try:
                return model_class.from_pretrained(name_or_path)
            except MismatchedShapes as error:
                raise ValueError(str(error)) from error
    raise ValueError(
        f"{name_or_path} has the architecture {config.architectures}; expected "
        f"{' or '.join(cls.__name__ for cls in classes)}."
    )


def _load_reviews(source: None) -> DatasetDict:
    from .data import load_reviews

    return load_reviews()


def _sst_loader(fine_grained: bool) -> Callable[..., DatasetDict]:
    def load(source: str | None, phrases: bool = True) -> DatasetDict:
        from .data.sst import STANFORD_URL, load_sst

        return load_sst(source or STANFORD_URL, fine_grained=fine_grained, phrases=phrases)

    return load


def _glue_loader(name: str) -> Callable[..., DatasetDict]:
    def load(source: str | None) -> DatasetDict:
        from .data import load_glue

        return load_glue(name, source)

    return load


def _image_loader(name: str) -> Callable[..., DatasetDict]:
    def load(source: str | None) -> DatasetDict:
        from .data.images import load_images

        return load_images(name, source)

    return load


def _load_audio_folder(source: str) -> DatasetDict:
    from .data.audio import load_audio_folder

    return load_audio_folder(source)


def _load_toy_norb(source: None) -> DatasetDict:
    from .paper.toy_norb import load_toy_norb

    return load_toy_norb()


def _load_smallnorb(source: str) -> DatasetDict:
    from .paper.smallnorb import load_smallnorb

    return load_smallnorb(source)


def _stereo_processor() -> Any:
    from .paper.image_processing_stereo import StereoImageProcessor

    return StereoImageProcessor()


def _prepare_stereo(splits: DatasetDict) -> DatasetDict:
    from .paper.stereo import prepare_stereo

    return prepare_stereo(splits)


def _register_own_tasks() -> None:
    register_task(Task("reviews", "the 735 reviews in capsule_heads", "text", _load_reviews, license="MIT"))
    for name, title, fine_grained in (
        ("sst5", "SST-5: complete sentences of the Stanford Sentiment Treebank, five classes", True),
        ("sst2_root", "SST-2: complete sentences of the Stanford Sentiment Treebank, two classes", False),
    ):
        register_task(
            Task(
                name,
                title,
                "text",
                _sst_loader(fine_grained),
                source_help="a directory, zip file or address of the trees (default: Stanford's address)",
                loader_options=("phrases",),
                metric=name,
            )
        )
    for name in GLUE_TASKS:
        register_task(
            Task(
                name,
                f"GLUE {name}",
                "text",
                _glue_loader(name),
                source_help="a directory of GLUE's TSV files (default: the Hub)",
                metric=name,
                repository=HUB_REPOSITORY,
                config=name,
            )
        )
    register_task(
        Task(
            "toy_norb",
            "toys that capsule_heads renders, in the form of smallNORB",
            "image",
            _load_toy_norb,
            license="MIT",
            processor=_stereo_processor,
            preparation=_prepare_stereo,
        )
    )
    register_task(
        Task(
            "smallnorb",
            "smallNORB",
            "image",
            _load_smallnorb,
            source_help="the directory with its files",
            needs_source=True,
            processor=_stereo_processor,
            preparation=_prepare_stereo,
        )
    )
    for name, repository in (("cifar100", "uoft-cs/cifar100"), ("imagenet", "ILSVRC/imagenet-1k")):
        register_task(
            Task(
                name,
                name,
                "image",
                _image_loader(name),
                source_help="a directory of the dataset's files (default: the Hub)",
                repository=repository,
            )
        )
    register_task(
        Task(
            "image_folder",
            "images in a folder per class",
            "image",
            _image_loader("image_folder"),
            source_help="a directory with train/CLASS/*.png and the like",
            needs_source=True,
            is_own_data=True,
        )
    )
    register_task(
        Task(
            "audio_folder",
            "audio files in a folder per class",
            "audio",
            _load_audio_folder,
            source_help="a directory with train/CLASS/*.wav and the like",
            needs_source=True,
            is_own_data=True,
        )
    )


_register_own_tasks()
