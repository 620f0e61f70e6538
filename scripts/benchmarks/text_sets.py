"""The sets of texts that benchmarks train on: CSV files of a folder, and the Stanford Sentiment Treebank."""

import dataclasses
from pathlib import Path

from datasets import ClassLabel, DatasetDict, load_dataset

from capsule_heads.data import load_glue, load_sst
from capsule_heads.tasks import Task, get_task

OF_CSV, OF_TREES, OF_GLUE = ("cr", "trec", "subj", "mr"), ("sst2", "sst5"), ("glue_sst2",)


def load_text_set(name: str, data: str | None, trees: str | None, glue: str | None = None) -> DatasetDict:
    """Load train, validation and test, of the columns `text` and `label` (a `ClassLabel`).

    Args:
        name: "sst2" or "sst5", whose train split holds all distinct phrases, or that of a folder in `data`.
        data: folder with a folder for each set, with train.csv, validation.csv and test.csv.
        trees: folder of the treebank.
        glue: folder of GLUE's SST-2 (TSV files), for "glue_sst2".

    Raises:
        ValueError: If the folder that the set is in was not given.
    """
    if name in OF_TREES:
        if trees is None:
            raise ValueError(f'set "{name}" without --trees; expected the folder of the Stanford Sentiment Treebank.')
        return load_sst(trees, fine_grained=name == "sst5")
    if name in OF_GLUE:
        if glue is None:
            raise ValueError(f'set "{name}" without --glue; expected the folder of GLUE\'s SST-2.')
        return load_glue("sst2", glue)
    if data is None:
        raise ValueError(f'set "{name}" without --data; expected a folder with a folder "{name}".')
    files = {split: str(Path(data, name, f"{split}.csv")) for split in ("train", "validation", "test")}
    splits = load_dataset("csv", data_files=files, keep_default_na=False)
    return splits.cast_column("label", ClassLabel(names=sorted(set(splits["train"]["label"]))))


def task_of(splits: DatasetDict) -> Task:
    """Return a task with splits that are loaded already."""
    return dataclasses.replace(get_task("sst2_root"), loader=lambda source: splits, loader_options=())
