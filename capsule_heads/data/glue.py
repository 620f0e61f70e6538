"""The nine GLUE tasks, from the Hub or from local TSV files, all with the same columns."""

from __future__ import annotations

import codecs
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

HUB_REPOSITORY = "nyu-mll/glue"  # the Parquet version: datasets >= 4 runs no dataset scripts

_UNLABELLED = -1


@dataclass(frozen=True)
class GlueTask:
    """What one GLUE task looks like on the Hub and in its TSV files.

    Attributes:
        label_names: The classes in the order of the Hub; `None` for regression.
        hub_columns: The Hub's text column, or its two text columns.
        file_columns: For each text column the names that the header row of a TSV file may have for it.
        file_label: The name of the label column in the header row.
        file_labels: How the TSV files write each class of `label_names`; `None` for regression.
        headerless: The columns of the training and validation files where these have no header row, else `None`.
        evaluation_sets: The endings of the evaluation splits: MNLI has two of each, the other tasks one.
    """

    label_names: tuple[str, ...] | None
    hub_columns: tuple[str, ...]
    file_columns: tuple[tuple[str, ...], ...]
    file_label: str
    file_labels: tuple[str, ...] | None
    headerless: tuple[str, ...] | None = None
    evaluation_sets: tuple[str, ...] = ("",)

    @property
    def is_pair(self) -> bool:
        """True for a task on pairs of texts."""
        return len(self.hub_columns) == 2

    @property
    def files(self) -> dict[str, str]:
        """The name of each split's TSV file. Only the test files may be absent."""
        files = {"train": "train.tsv"}
        for split, file in (("validation", "dev"), ("test", "test")):
            files |= {split + ending: f"{file}{ending}.tsv" for ending in self.evaluation_sets}
        return files

    @property
    def features(self) -> datasets.Features:
        """The columns that `load_glue` returns."""
        import datasets

        texts = {name: datasets.Value("string") for name in ("text", "text_pair")[: len(self.hub_columns)]}
        if self.label_names is None:
            return datasets.Features({**texts, "label": datasets.Value("float32")})
        return datasets.Features({**texts, "label": datasets.ClassLabel(names=list(self.label_names))})


_SENTENCES = ("sentence1", "sentence2")
_QUESTIONS = ("question1", "question2")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE_TASKS: Mapping[str, GlueTask] = {
    "cola": GlueTask(
        label_names=("unacceptable", "acceptable"),
        hub_columns=("sentence",),
        file_columns=(("sentence",),),
        file_label="label",
        file_labels=("0", "1"),
        headerless=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask(
        label_names=("negative", "positive"),
        hub_columns=("sentence",),
        file_columns=(("sentence", "content"),),
        file_label="label",
        file_labels=("0", "1"),
    ),
    "mrpc": GlueTask(
        label_names=("not_equivalent", "equivalent"),
        hub_columns=_SENTENCES,
        file_columns=(("#1 String",), ("#2 String",)),
        file_label="Quality",
        file_labels=("0", "1"),
    ),
    "qqp": GlueTask(
        label_names=("not_duplicate", "duplicate"),
        hub_columns=_QUESTIONS,
        file_columns=(("question1",), ("question2",)),
        file_label="is_duplicate",
        file_labels=("0", "1"),
    ),
    "stsb": GlueTask(
        label_names=None,
        hub_columns=_SENTENCES,
        file_columns=(("sentence1",), ("sentence2",)),
        file_label="score",
        file_labels=None,
    ),
    "mnli": GlueTask(
        label_names=("entailment", "neutral", "contradiction"),
        hub_columns=("premise", "hypothesis"),
        file_columns=(("sentence1",), ("sentence2",)),
        file_label="gold_label",
        file_labels=("entailment", "neutral", "contradiction"),
        evaluation_sets=("_matched", "_mismatched"),
    ),
    "qnli": GlueTask(
        label_names=_ENTAILMENT,
        hub_columns=("question", "sentence"),
        file_columns=(("question",), ("sentence",)),
        file_label="label",
        file_labels=_ENTAILMENT,
    ),
    "rte": GlueTask(
        label_names=_ENTAILMENT,
        hub_columns=_SENTENCES,
        file_columns=(("sentence1",), ("sentence2",)),
        file_label="label",
        file_labels=_ENTAILMENT,
    ),
    "wnli": GlueTask(
        label_names=("not_entailment", "entailment"),
        hub_columns=_SENTENCES,
        file_columns=(("sentence1",), ("sentence2",)),
        file_label="label",
        file_labels=("0", "1"),
    ),
}


def load_glue(task: str, source: str | os.PathLike[str] | None = None) -> datasets.DatasetDict:
    """Load one GLUE task.

    The columns are `text`, `text_pair` (for tasks with two texts) and `label`: a `ClassLabel` with the names and the
    order of the Hub, or a float32 score for STS-B. The label is -1 (NaN for STS-B) where a test split is unlabelled.

    Warning: The validation split of GLUE's SST-2 is not the test set of root sentences of the Stanford Sentiment
    Treebank. An accuracy on it is not an SST-2/R accuracy: its 872 sentences are the root sentences of the Treebank's
    dev set. `capsule_heads.data.sst.load_sst(fine_grained=False)` has the 1,821 of SST-2/R.

    Args:
        task: One of `GLUE_TASKS`.
        source: A directory with the task's TSV files as they come in the official zip file: `train.tsv`, `dev.tsv`
            and, if wanted, `test.tsv` (for MNLI `dev_matched.tsv`, `dev_mismatched.tsv` and so on). Columns are found
            by the names in the header row, and quotation marks mean nothing. `None` loads from the Hub.

    Returns:
        The splits `train`, `validation` and, where present, `test`. MNLI has `validation_matched`,
        `validation_mismatched`, `test_matched` and `test_mismatched` instead of the last two.

    Raises:
        ValueError: If the task is unknown, a column is missing or a row is malformed (QQP's training file has a few
            such rows in circulation; none is skipped silently).
        FileNotFoundError: If the directory or one of its files does not exist.
        ConnectionError: If the Hub cannot be reached.
    """
    if task not in GLUE_TASKS:
        raise ValueError(f"Unknown GLUE task {task!r}; expected one of {', '.join(GLUE_TASKS)}.")
    if source is None:
        return _load_hub(task, GLUE_TASKS[task])
    return _load_directory(task, GLUE_TASKS[task], Path(source).expanduser())


def _load_hub(name: str, task: GlueTask) -> datasets.DatasetDict:
    import datasets

    try:
        loaded = datasets.load_dataset(HUB_REPOSITORY, name)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ConnectionError(
            f"Could not load {name} of {HUB_REPOSITORY} from the Hugging Face Hub ({error}); without the Hub, give "
            f"source= a local directory with GLUE's TSV files ({', '.join(task.files.values())})."
        ) from error
    expected = [*task.hub_columns, "label"]
    splits = {}
    for split, dataset in loaded.items():
        names = getattr(dataset.features.get("label"), "names", None)
        if not set(expected) <= set(dataset.column_names) or names != (task.label_names and list(task.label_names)):
            raise ValueError(
                f"{HUB_REPOSITORY} has columns {dataset.column_names} and label names {names} in {name}/{split}; "
                f"expected {expected} and {task.label_names}: load the task from local TSV files with source=."
            )
        texts = dict(zip(task.hub_columns, task.features, strict=False))
        dataset = dataset.select_columns(expected).rename_columns(texts)
        if task.label_names is None:
            dataset = dataset.map(_unlabelled_score_to_nan)
        splits[split] = dataset.cast(task.features)
    return datasets.DatasetDict(splits)


def _unlabelled_score_to_nan(example: dict) -> dict:
    return {"label": math.nan if example["label"] == _UNLABELLED else example["label"]}


def _load_directory(name: str, task: GlueTask, directory: Path) -> datasets.DatasetDict:
    import datasets

    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a directory; give the directory with {name}'s TSV files "
            f"({', '.join(task.files.values())})."
        )
    present = {split: file for split, file in task.files.items() if (directory / file).is_file()}
    missing = [file for split, file in task.files.items() if split not in present and not split.startswith("test")]
    if missing:
        raise FileNotFoundError(
            f"{directory} has no {', '.join(missing)}; {name} needs its training and validation files "
            f"({', '.join(task.files.values())}, of which a test file may be absent)."
        )
    return datasets.DatasetDict(
        {split: _read_file(directory / file, task, split.startswith("test")) for split, file in present.items()}
    )


def _read_file(path: Path, task: GlueTask, is_test: bool) -> datasets.Dataset:
    import datasets

    rows = _read_rows(path)
    header = next(rows)[1] if task.headerless is None or is_test else task.headerless
    text_columns = [_find_column(header, names, path) for names in task.file_columns]
    is_labelled = not is_test or task.file_label in header
    label_column = _find_column(header, (task.file_label,), path) if is_labelled else None
    columns: dict[str, list] = {name: [] for name in task.features}
    for where, fields in rows:
        if len(fields) != len(header):
            raise ValueError(f"{where}: {len(fields)} tab-separated fields, expected {len(header)}: {list(header)}.")
        for name, column in zip(columns, text_columns, strict=False):  # the last name is the label
            if not fields[column].strip():
                raise ValueError(f"{where}: the text in column {header[column]!r} is empty.")
            columns[name].append(fields[column])
        columns["label"].append(_parse_label(None if label_column is None else fields[label_column], task, where))
    if not columns["label"]:
        raise ValueError(f"{path} holds a header row only; expected one example a line below it.")
    return datasets.Dataset.from_dict(columns, features=task.features)


def _read_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield where a line is, for error messages, and its fields.

    Splitting by hand is csv.QUOTE_NONE without its limit on a field's size, and keeps one row to a line.
    """
    payload = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not payload.strip():
        raise ValueError(f"{path} is empty; expected one example a line.")
    for number, line in enumerate(payload.removesuffix(b"\n").split(b"\n"), start=1):
        where = f"{path}, line {number}"
        if b"\0" in line:
            raise ValueError(f"{where}: a NUL byte, as in UTF-16 or a damaged file; save the file as UTF-8.")
        try:
            yield where, line.decode("utf-8").removesuffix("\r").split("\t")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 text ({error}); save the file as UTF-8.") from error


def _find_column(header: Sequence[str], names: tuple[str, ...], path: Path) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    raise ValueError(f"{path} has no column {' or '.join(map(repr, names))}; its header row is {list(header)}.")


def _parse_label(label: str | None, task: GlueTask, where: str) -> int | float:
    if label is None:
        return math.nan if task.file_labels is None else _UNLABELLED
    if task.file_labels is not None:
        if label not in task.file_labels:
            raise ValueError(f"{where}: label {label!r} is not one of {', '.join(task.file_labels)}.")
        return task.file_labels.index(label)
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{where}: the score {label!r} is not a finite number.")
    return score
