"""The model card: what is known of a checkpoint and the run it is from, put into the template model_card.md."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..backbones.loading import PACKAGE_PREFIX
from ..files import write_text
from ..heads import get_head
from ..version import __version__
from .config import auto_class_of, read_config
from .results import SPLITS, is_metric

TEMPLATE = Path(__file__).with_name("model_card.md")
# A card with this line is written anew whenever the model is pushed.
MARKER = "<!-- Written by capsule_heads, and again at the next push; delete this line to keep your own text. -->"
# Of each auto class: the task on the Hub, and something to try a pipeline on.
TASKS = {
    "AutoModel": ("feature-extraction", None),
    "AutoModelForAudioClassification": ("audio-classification", "sound.wav"),
    "AutoModelForImageClassification": ("image-classification", "picture.png"),
    "AutoModelForSequenceClassification": ("text-classification", "Worth every minute of the queue."),
}
PROCESSOR_FILES = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
METRIC_IDS = {"pearson": "pearsonr"}  # where `evaluate` has another name


class Dataset(NamedTuple):
    """The data that a model was trained on, as `dataset` in results.json has it.

    Attributes:
        name: a noun phrase.
        repository: on the Hub, if it is there.
        config: the configuration there, if there are several.
    """

    name: str
    repository: str | None = None
    config: str | None = None


def write_model_card(directory: str | os.PathLike, repo_id: str, *args, **kwargs) -> None:
    """Writes a checkpoint's README.md, unless there is one that this package did not write.

    Args:
        directory: of the checkpoint.
        repo_id: where it is on the Hub, or will be.
        *args: as in `model_card`.
        **kwargs: as in `model_card`.
    """
    path = Path(directory, "README.md")
    if not path.exists() or MARKER in path.read_text(encoding="utf-8"):
        write_text(path, str(model_card(directory, repo_id, *args, **kwargs)))


def model_card(
    directory: str | os.PathLike,
    repo_id: str,
    results: dict[str, Any] | None = None,
    *,
    license: str | None = None,
    language: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """The card of a checkpoint. It holds what the checkpoint's files and the arguments say, and nothing else.

    Args:
        directory: of the checkpoint; its configuration, and whether it has code and a tokenizer, are read there.
        repo_id: where it is on the Hub, or will be.
        results: of the run it is from, as scripts/train.py writes them; any of its keys may be missing.
        license: identifier of its licence, such as "mit".
        language: ISO 639 code of the language of its texts.
        tags: more tags.

    Raises:
        OSError: if there is no checkpoint in the directory.
        ValueError: if the configuration is none, or the metadata are not what the Hub takes.
    """
    directory, results = Path(directory), results or {}
    config = read_config(directory)
    model_class = config["architectures"][0]
    auto_class = auto_class_of(config)
    pipeline_tag, pipeline_input = TASKS[auto_class]
    name, rows = repo_id.split("/")[-1], list(_metrics(results))
    dataset = Dataset(**results["dataset"]) if results.get("dataset") else None
    has_code, head = "auto_map" in config, get_head(config["head_type"])
    measured = _eval_results(rows, results, dataset, pipeline_tag)
    data = ModelCardData(
        base_model=config["base_model_name_or_path"] if config["base_model_revision"] else None,
        datasets=[dataset.repository] if dataset and dataset.repository else None,
        eval_results=measured or None,
        language=language,
        library_name="transformers" if has_code else "capsule-heads",
        license=license,
        metrics=sorted({METRIC_IDS.get(metric, metric) for _, metric, _ in rows}) or None,
        model_name=name if measured else None,
        pipeline_tag=pipeline_tag,
        tags=["capsule-heads", "capsule-routing", *tags],
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        auto_class=auto_class,
        backbone=_backbone(config),
        config=config,
        dataset=dataset and dataset.name,
        facts=_training_facts(results),
        fields=["layers", *(field.name for field in dataclasses.fields(head.Options) if field.metadata["describes"])],
        has_code=has_code,
        has_processor=any((directory / file).is_file() for file in PROCESSOR_FILES),
        head=head.title,
        labels=_labels(config),
        marker=MARKER,
        model_class=model_class,
        name=name,
        pipeline_input=pipeline_input,
        repo_id=repo_id,
        results=results,
        rows=rows,
        version=__version__,
    )


def _backbone(config: dict[str, Any]) -> str:
    kind, name = config["base_config"]["model_type"], config["base_model_name_or_path"]
    if config["base_model_revision"]:
        return f"[{name}](https://huggingface.co/{name}), commit `{config['base_model_revision']}`"
    if name and name.startswith(PACKAGE_PREFIX):
        package, _, folder = name.removeprefix(PACKAGE_PREFIX).partition("/")
        return f"the {kind} model in `{folder}` of the Python package `{package}`"
    return f"a {kind} model from a local directory" if name else f"a {kind} model that was not pretrained"


def _labels(config: dict[str, Any]) -> list[str]:
    """The names of the classes, if they have any but numbers."""
    names = [name for _, name in sorted(config["id2label"].items(), key=lambda item: int(item[0]))]
    return [] if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def _metrics(results: dict[str, Any]):
    """Yields split, metric and value."""
    for key, value in results.items():
        split = next((split for split in ("eval", *SPLITS) if key.startswith(f"{split}_")), None)
        if split and is_metric(key) and isinstance(value, int | float) and value == value:
            rest = key.removeprefix(f"{split}_")
            kind = next((kind for kind in ("matched", "mismatched") if rest.startswith(f"{kind}_")), None)  # MNLI's
            split = f"{split}_{kind}" if kind else split
            yield split.replace("eval", "evaluation"), key.removeprefix(f"{split}_"), float(value)


def _eval_results(rows, results: dict[str, Any], dataset: Dataset | None, task: str) -> list[EvalResult]:
    if dataset is None:
        return []  # the Hub takes no value without the data that it was measured on
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset.repository or results["task"],
            dataset_name=dataset.name,
            dataset_config=dataset.config,
            dataset_split=split,
            metric_type=METRIC_IDS.get(metric, metric),
            metric_name=metric,
            metric_value=value,
        )
        for split, metric, value in rows
    ]


def _training_facts(results: dict[str, Any]) -> dict[str, str]:
    facts = {}
    for key, name, form in (
        ("trained_parameters", "trained parameters", ",d"),
        ("steps", "steps", ",d"),
        ("training_seconds", "seconds", ",.0f"),
        ("seed", "seed", "d"),
    ):
        if key in results:
            facts[name] = format(results[key], form)
    return facts
