"""A user's own data: a file, a folder or a dataset of the Hub becomes splits with inputs and labels.

What is guessed, left out or odd is said in one line each.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
from datasets import Dataset, DatasetDict

from ..models.configuration_capsule_head import label_fields
from . import folders
from .columns import LABEL_NAMES, TEXTS, usual_label, usual_texts
from .folders import SPLIT_NAMES
from .own_labels import CLASSES, Labels, read_labels
from .own_sources import (
    Frame,
    Source,
    column_names,
    column_values,
    name_of,
    name_splits,
    pick_split,
    read_source,
)
from .splits import hold_out
from .tables import count_of

if TYPE_CHECKING:
    from ..models import CapsuleHeadConfig

logger = logging.getLogger(__name__)


class OwnData(DatasetDict):
    """Splits of a user's own data, with what was found out about them.

    Attributes:
        modality: "text", "image" or "audio".
        problem_type: as in a model's configuration.
        class_names: names of classes or labels, in the order of their numbers; None for a regression.
        inputs_from: the source's columns of texts or files.
        labels_from: the source's columns of labels.
    """

    modality: str
    problem_type: str
    class_names: list[str] | None
    inputs_from: list[str]
    labels_from: list[str]

    @property
    def model_fields(self) -> dict[str, Any]:
        """The fields of a configuration that the data settles: names of classes, or mean and unit of numbers."""
        found: dict[str, Any] = {"problem_type": self.problem_type}
        if self.class_names is not None:
            return {**found, **label_fields(self.class_names)}
        values = self["train"].with_format("numpy")["label"][:]
        return {**found, "num_labels": 1, "label_mean": float(values.mean()), "label_std": float(values.std()) or 1.0}


def load_data(
    source: Source,
    text: str | Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    validation: Source | None = None,
    test: Source | None = None,
    *,
    config: str | None = None,
    split: str | None = None,
    problem_type: str | None = None,
    seed: int = 0,
) -> OwnData:
    """Load your own texts, images or audio, with their labels.

    Columns are guessed where their names are usual. Words and whole numbers are classes, whose names are kept; lists,
    or several columns of 0 and 1, are labels of which an input may have several; other numbers are a regression. Rows
    without an input or a label are left out. Without a validation split a part of the training rows becomes it: a
    tenth, or a fifth of less than 1,000, with every class's share. One line says each thing that was guessed, left out
    or is odd: duplicates across splits, classes with one example, labels that training does not have.

    Args:
        source: a table (CSV, TSV, JSON, JSON Lines, Parquet); a folder with train.csv and the like, of images or audio
            (CLASS/FILE, train/CLASS/FILE, or a metadata.csv with file_name and label), or saved by `datasets`; the name
            of a dataset on the Hub; or a `Dataset`, `DatasetDict`, pandas DataFrame, or a dict of columns.
        text: column of texts, or two for pairs.
        label: column of labels, or several with 0 and 1.
        validation: a source of the validation split, or its name where the source has splits.
        test: the same for the test split.
        config: configuration of a dataset on the Hub.
        split: name of the training split, where it is another than train.
        problem_type: "single_label_classification", "multi_label_classification" or "regression", where the labels
            would be taken for another.
        seed: random seed of the validation split.

    Returns:
        The splits `train`, `validation` and perhaps `test`. Columns are `text` (and `text_pair`), `image` or `audio`,
        and `label`: a `ClassLabel`, lists of 0 and 1, or numbers.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        OSError: If a file cannot be read.
        ValueError: If columns or labels are not what is expected; names those there are.

    Example:
        >>> data = load_data("reviews.csv")
        >>> model = CapsuleHeadForSequenceClassification.from_backbone(name, **data.model_fields)
        >>> rows = tokenize(data, load_processor(name))
        >>> CapsuleTrainer(model, train_dataset=rows["train"], eval_dataset=rows["validation"]).train()
    """
    frames = read_source(source, config)
    frames = name_splits(frames, source, split, {"validation": validation, "test": test}, config)
    columns = _choose_columns(frames, _as_list(text), _as_list(label), source)
    inputs, raw_labels = {}, {}
    for name in list(frames):  # of a million rows, lists and tables do not stay in memory together
        inputs[name], raw_labels[name] = _complete_rows(frames.pop(name), columns, name)
    if not len(inputs["train"]):
        raise ValueError(f"{name_of(source)} has no complete row to train on; expected inputs with labels.")
    labels = read_labels(raw_labels, columns.labels, problem_type)
    splits = {name: _with_labels(inputs[name], labels, name) for name in inputs}
    splits = {name: rows for name, rows in splits.items() if len(rows)}
    if "validation" not in splits:
        splits["train"], splits["validation"] = _split_off(splits["train"], seed)
    _say_duplicates(splits, columns.modality)
    return _own_data({name: splits[name] for name in SPLIT_NAMES if name in splits}, columns, labels)


def load_examples(
    source: Source,
    model_config: CapsuleHeadConfig,
    text: str | Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    split: str | None = None,
    *,
    config: str | None = None,
) -> OwnData:
    """Load labelled examples for a model that is trained: one split, with the model's classes.

    Args:
        source: as for `load_data`.
        model_config: the model's configuration.
        text: column of texts, or two for pairs.
        label: column of labels, or several with 0 and 1.
        split: which of a source's splits, by its name there or as train, validation or test; None for its only one.
        config: configuration of a dataset on the Hub.

    Returns:
        One split, under its name, or "test" where the source has no splits.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        OSError: If a file cannot be read.
        ValueError: If columns or labels are not what is expected; names those there are.
    """
    frames = read_source(source, config)
    name, frame = pick_split(frames, source, split)
    names, problem_type = model_config.class_names, model_config.problem_type or CLASSES
    labels_given = _as_list(label)
    if problem_type == "multi_label_classification" and not labels_given and set(names) <= {*column_names(frame)}:
        labels_given = names
    columns = _choose_columns({name: frame}, _as_list(text), labels_given, source)
    inputs, raw_labels = _complete_rows(frame, columns, name)
    labels = read_labels({name: raw_labels}, columns.labels, problem_type, names)
    rows = _with_labels(inputs, labels, name)
    if not len(rows):
        raise ValueError(f"{name_of(source)} has no complete row with a label of the model; it has {', '.join(names)}.")
    return _own_data({name: rows}, columns, labels)


def _own_data(splits: Mapping[str, Dataset], columns: _Columns, labels: Labels) -> OwnData:
    data = OwnData(splits)
    data.modality, data.problem_type, data.class_names = columns.modality, labels.problem_type, labels.names
    data.inputs_from, data.labels_from = columns.inputs, columns.labels
    return data


@dataclass(frozen=True)
class _Columns:
    """The columns that are read.

    Attributes:
        modality: "text", "image" or "audio".
        inputs: one of files, or one or two of texts.
        labels: one or several.
    """

    modality: str
    inputs: list[str]
    labels: list[str]


def _as_list(names: str | Sequence[str] | None) -> list[str]:
    if names is None:
        return []
    return [x.strip() for x in names.split(",")] if isinstance(names, str) else list(names)


def _choose_columns(frames: Mapping[str, Frame], text: list[str], label: list[str], source: Source) -> _Columns:
    """Return the columns to read, those that were asked for or those of the usual names; say which were guessed."""
    first = next(iter(frames))  # train, where there are several
    frame, names = frames[first], column_names(frames[first])
    modality, file = ("text", None) if text else _find_media(frame)
    if file is not None:
        inputs = [file]
    else:
        inputs = text or _guess_texts(frame, label, source)
        if len(inputs) > 2:
            raise ValueError(f"text is {', '.join(inputs)}; expected one column, or two for pairs of texts.")
    labels = label or _guess_labels(frame, [x for x in names if x not in inputs], source)
    for split, of_split in frames.items():
        for name in (*inputs, *labels):
            if name not in column_names(of_split):
                where = name_of(source) if split == first else f"The {split} split"
                raise ValueError(
                    f"{where} has the columns {', '.join(column_names(of_split))}, and not {name}; expected --text and "
                    "--label (text and label in Python) to name columns."
                )
    both = [name for name in inputs if name in labels]
    if both:
        raise ValueError(f"{both[0]} is among the columns of inputs and of labels; expected different ones.")
    if not (text and label) and len(names) > (file is None):
        guessed = " and ".join(inputs)
        logger.warning("Columns: %s from %s, label from %s.", modality, guessed, ", ".join(labels))
    return _Columns(modality, inputs, labels)


def _find_media(frame: Frame) -> tuple[str, str | None]:
    """Return the modality of a frame, and its column of images or audio; None of texts."""
    if isinstance(frame, Dataset):
        for name, feature in frame.features.items():
            if isinstance(feature, datasets.Image | datasets.Audio):
                return ("image" if isinstance(feature, datasets.Image) else "audio"), name
        return "text", None
    kind = next((kind for kind in ("image", "audio") if kind in frame), None)
    is_file = kind is not None and folders.file_column({kind: frame[kind]}, kind) is not None
    return (str(kind), kind) if is_file else ("text", None)


def _guess_texts(frame: Frame, labels: list[str], source: Source) -> list[str]:
    names = [name for name in column_names(frame) if name not in labels]
    usual = usual_texts(names)
    if usual is not None:
        return usual
    # Else the only one with texts, where labels have a usual name or one column is left for them.
    texts = [x for x in names if x.lower() not in LABEL_NAMES and _is_text(column_values(frame, x))]
    if len(texts) == 1:
        return texts
    raise ValueError(
        f"{name_of(source)} has the columns {', '.join(column_names(frame))}, none with a usual name for texts; "
        "expected --text COLUMN (text in Python)."
    )


def _is_text(values: Iterable[Any]) -> bool:
    """Return whether values are texts, some of several words, and not labels."""
    given = [x for x in values if x is not None]
    return all(isinstance(x, str) for x in given) and any(len(x.split()) > 1 for x in given)


def _guess_labels(frame: Frame, names: list[str], source: Source) -> list[str]:
    usual = usual_label(names)
    if usual is not None:
        return [usual]
    if len(names) == 1:
        return names
    flags = [name for name in names if {str(x) for x in column_values(frame, name)} <= {"0", "1", "0.0", "1.0"}]
    if len(flags) > 1:
        return flags
    raise ValueError(
        f"{name_of(source)} has the columns {', '.join(column_names(frame))}, none with a usual name for labels; "
        "expected --label COLUMN (label in Python)."
    )


def _complete_rows(frame: Frame, columns: _Columns, split: str) -> tuple[Dataset, dict[str, list]]:
    """Return the inputs and labels of rows that have both, and say how many have not."""
    labels = {name: _label_values(frame, name) for name in columns.labels}
    if columns.modality == "text":
        texts = {name: column_values(frame, column) for name, column in zip(TEXTS, columns.inputs)}
        for name, values in zip(columns.inputs, texts.values()):
            wrong = next((x for x in values if not isinstance(x, str) and not _is_missing(x)), None)
            if wrong is not None:
                raise ValueError(
                    f"{name} of {split} holds {wrong!r}, which is no text; expected strings, or another column: "
                    "--text COLUMN (text in Python)."
                )
        has_input = [any(not _is_missing(x) for x in row) for row in zip(*texts.values())]
    else:
        (column,) = columns.inputs
        has_input = [True] * (len(frame) if isinstance(frame, Dataset) else len(frame[column]))
    has_label = [not any(map(_is_missing, row)) for row in zip(*labels.values())]
    kept = [row for row, both in enumerate(zip(has_input, has_label)) if all(both)]
    for are_there, what in ((has_input, columns.modality), (has_label, "label")):
        if not all(are_there):
            n_missing = are_there.count(False)
            logger.warning("Left out of %s: %s without a %s.", split, count_of(n_missing, "row"), what)
    if columns.modality == "text":
        given = {name: [values[row] for row in kept] for name, values in texts.items()}
        rows = {name: [x if isinstance(x, str) else "" for x in values] for name, values in given.items()}
        features = datasets.Features(dict.fromkeys(rows, datasets.Value("string")))
        inputs = Dataset.from_dict(rows, features=features)
    else:
        inputs = _media(frame, columns).select(kept)
    return inputs, {name: [values[row] for row in kept] for name, values in labels.items()}


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _label_values(frame: Frame, name: str) -> list:
    """Return the labels of a column, with the names of classes where `datasets` knows them."""
    values = column_values(frame, name)
    feature = frame.features[name] if isinstance(frame, Dataset) else None
    item = getattr(feature, "feature", feature)
    if not isinstance(item, datasets.ClassLabel):
        return values
    names = item.names
    if item is not feature:
        return [None if row is None else [names[x] for x in row] for row in values]
    return [None if x in (None, -1) else names[x] for x in values]


def _media(frame: Frame, columns: _Columns) -> Dataset:
    """Return files of images or audio, or their bytes, in one column; none is opened."""
    (column,) = columns.inputs
    if isinstance(frame, Dataset):
        rows = frame.with_format(None).select_columns([column])
        rows = rows if column == columns.modality else rows.rename_column(column, columns.modality)
        kind = datasets.Image if columns.modality == "image" else datasets.Audio
        return rows.cast_column(columns.modality, kind(decode=False))
    rows = Dataset.from_dict({columns.modality: frame[column]})
    return rows.cast_column("image", datasets.Image(decode=False)) if columns.modality == "image" else rows


def _with_labels(inputs: Dataset, labels: Labels, split: str) -> Dataset:
    """Return inputs with the column `label`, without rows whose labels training does not have."""
    numbers = labels.numbers[split]
    unknown = [row for row, number in enumerate(numbers) if number is None]
    if unknown:
        names = Counter(labels.unknown[split])
        logger.warning(
            "Left out of %s: %s with labels that train does not have (%s); a model of these classes has them wrong.",
            split, count_of(len(unknown), "row"), ", ".join(list(names)[:5]),
        )  # fmt: skip
        kept = [row for row, number in enumerate(numbers) if number is not None]
        inputs, numbers = inputs.select(kept), [numbers[row] for row in kept]
    return inputs.add_column("label", numbers, feature=labels.feature)


def _split_off(train: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    classes = train.with_format(None)["label"][:] if isinstance(train.features["label"], datasets.ClassLabel) else None
    if classes is not None:
        names, counts = train.features["label"].names, Counter(classes)
        single = [names[label] for label, count in counts.items() if count == 1]
        if single:
            logger.warning(
                "There is no validation example of %s, whose only example is trained on: %s.",
                f"{len(single)} class{'' if len(single) == 1 else 'es'}", ", ".join(single[:5]),
            )  # fmt: skip
    rest, held_out = hold_out(len(train), classes, seed)
    if not held_out:
        raise ValueError(
            f"There {'is' if len(train) == 1 else 'are'} {count_of(len(train), 'example')}, too few to keep some for "
            "validation; expected 2 or more of a class, or a validation split."
        )
    how = "" if classes is None else ", with every class's share"
    logger.warning(
        "Validation: %d of %d training rows, drawn at random%s (seed %d).", len(held_out), len(train), how, seed
    )
    return train.select(rest), train.select(held_out)


def _say_duplicates(splits: Mapping[str, Dataset], modality: str) -> None:
    if modality != "text":
        return
    for name, rows in splits.items():
        if name == "train":
            continue
        texts = Counter(_texts(rows))  # in memory; those of train, of which there are more, pass by
        in_train = {text for text in _texts(splits["train"]) if text in texts}
        n_seen = sum(texts[text] for text in in_train)
        if n_seen:
            logger.warning("%d of %d texts of %s are in train too.", n_seen, len(rows), name)


def _texts(rows: Dataset) -> Iterator[tuple[str, ...]]:
    columns = [x for x in TEXTS if x in rows.column_names]
    for batch in rows.with_format(None).select_columns(columns).iter(10_000):
        yield from zip(*(batch[name] for name in columns))
