"""Model cards: what a checkpoint and the results of its run say, put into the template model_card.md."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..backbones.loading import PACKAGE_PREFIX
from ..files import write_text
from ..heads import Head, get_head
from ..version import __version__
from .config import auto_class_of, members_of, read_config
from .results import SPLITS, is_metric

TEMPLATE = Path(__file__).with_name("model_card.md")
# A card with this line is written anew whenever the model is pushed.
MARKER = "<!-- Written by capsule_heads, and again at the next push; delete this line to keep your own text. -->"
# For each auto class: the task on the Hub, and an input to try a pipeline on.
TASKS: dict[str, tuple[str, str | None]] = {
    "AutoModel": ("feature-extraction", None),
    "AutoModelForAudioClassification": ("audio-classification", "audio.wav"),
    "AutoModelForImageClassification": ("image-classification", "picture.png"),
    "AutoModelForSequenceClassification": ("text-classification", "Worth every minute of the queue."),
}
PROCESSOR_FILES = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
METRIC_IDS = {"pearson": "pearsonr"}  # where `evaluate` has another name


class Dataset(NamedTuple):
    """The data that a model was trained on: the key `dataset` of results.json.

    Attributes:
        name: a noun phrase.
        repository: its repository on the Hub; None if it has none.
        config: its configuration there; None if it has a single one.
        license: its licence; None if that is not known here.
    """

    name: str
    repository: str | None = None
    config: str | None = None
    license: str | None = None

    @property
    def said_of_license(self) -> str:
        """A sentence about its licence."""
        if self.license:
            return f"The licence of the data is {self.license}."
        if self.repository:
            return f"For the licence of the data, see [{self.repository}](https://huggingface.co/datasets/{self.repository})."
        return "The licence of the data is that of its authors."


def write_model_card(
    directory: str | os.PathLike[str], repo_id: str, results: dict[str, Any] | None = None, **metadata: Any
) -> None:
    """Write a checkpoint's README.md, unless there is one that this package did not write.

    Args:
        directory: the checkpoint's.
        repo_id: the checkpoint's repository on the Hub, or the one that it will have.
        results: as in `model_card`.
        **metadata: `license`, `language` and `tags`, as in `model_card`.
    """
    path = Path(directory, "README.md")
    if not path.exists() or MARKER in path.read_text(encoding="utf-8"):
        write_text(path, str(model_card(directory, repo_id, results, **metadata)))


def model_card(
    directory: str | os.PathLike[str],
    repo_id: str,
    results: dict[str, Any] | None = None,
    *,
    license: str | None = None,
    language: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """Return the card of a checkpoint. It holds what the checkpoint's files and the arguments say, and nothing else.

    Args:
        directory: the checkpoint's, with its configuration and, perhaps, its code and its processor.
        repo_id: the checkpoint's repository on the Hub, or the one that it will have.
        results: the results of its run, as `capsule-heads train` writes them; any of the keys may be missing.
        license: identifier of its licence, such as "mit".
        language: ISO 639 code of the language of its texts.
        tags: more tags.

    Raises:
        OSError: If the directory holds no checkpoint.
        ValueError: If the configuration is not one that `save_pretrained` wrote, the head is not registered, or the
            metadata are not what the Hub takes.
    """
    directory, results = Path(directory), results or {}
    config = read_config(directory)
    model_class = config["architectures"][0]
    auto_class = auto_class_of(config)
    pipeline_tag, example = TASKS[auto_class]
    name, rows = repo_id.split("/")[-1], list(_metrics(results))
    known = results.get("dataset")
    dataset = Dataset(**{name: known.get(name) for name in Dataset._fields}) if known else None
    has_code, head = "auto_map" in config, get_head(config["head_type"])
    has_processor = any((directory / file).is_file() for file in PROCESSOR_FILES)
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
        widget=[{"text": example}] if has_processor and pipeline_tag == "text-classification" else None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        auto_class=auto_class,
        backbone=_backbone(config),
        config=config,
        dataset=dataset,
        example=example,
        explains=_explains(head, config) if example else (),
        facts=_training_facts(results),
        fields=dict(_fields(config)),
        has_code=has_code,
        has_processor=has_processor,
        head=_title(config),
        labels=_labels(config),
        marker=MARKER,
        model_class=model_class,
        n_lines=sum(len(path.read_text(encoding="utf-8").splitlines()) for path in directory.glob("*.py")),
        name=name,
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


def _title(config: dict[str, Any]) -> str:
    """Return the head's noun phrase; for an ensemble one that counts its heads by type."""
    members = members_of(config)
    if not members:
        return get_head(config["head_type"]).title
    numbers = Counter(member["head_type"] for member in members)
    *kinds, last = (f"{n} {head_type}" for head_type, n in numbers.items())
    said = " and ".join(filter(None, (", ".join(kinds), last)))
    means = "values" if config["averages"] == "values" else "probabilities"
    return f"An ensemble of {len(members)} heads: {said}, whose {means} are averaged,"


def _fields(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield names and values of what tells the head, or each head of an ensemble, from others."""
    yield "layers", config["layers"]
    for field in dataclasses.fields(get_head(config["head_type"]).Options):
        if field.metadata["describes"]:
            yield field.name, config[field.name]
    for index, member in enumerate(members_of(config)):
        options = get_head(member["head_type"]).make_options(member["options"])
        described = [x.name for x in dataclasses.fields(options) if x.metadata["describes"]]
        values = {"layers": [config["layers"][layer] for layer in member["layers"]]}
        values |= {name: getattr(options, name) for name in described} | {"linear_term": member["linear_term"]}
        said = ", ".join(f"{name}={value}" for name, value in values.items())
        yield f"members[{index}]", f"{member['head_type']}: {said}"


def _explains(head: type[Head], config: dict[str, Any]) -> tuple[str, ...]:
    """Return what class scores can be attributed to: values of a regression have no explanations."""
    return () if config.get("problem_type") == "regression" else head.explains


def _labels(config: dict[str, Any]) -> list[str]:
    """Return the names of the classes; empty if they have only numbers."""
    names = [name for _, name in sorted(config["id2label"].items(), key=lambda item: int(item[0]))]
    return [] if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def _metrics(results: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield split, metric and value."""
    for key, value in results.items():
        split = next((split for split in ("eval", *SPLITS) if key.startswith(f"{split}_")), None)
        if split and is_metric(key) and isinstance(value, int | float) and value == value:
            rest = key.removeprefix(f"{split}_")
            kind = next((kind for kind in ("matched", "mismatched") if rest.startswith(f"{kind}_")), None)  # MNLI's
            split = f"{split}_{kind}" if kind else split
            yield split.replace("eval", "evaluation"), key.removeprefix(f"{split}_"), float(value)


def _eval_results(
    rows: Sequence[tuple[str, str, float]], results: dict[str, Any], dataset: Dataset | None, task: str
) -> list[EvalResult]:
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
    facts = {"hardware": results["hardware"]} if "hardware" in results else {}
    for key, name, form in (
        ("trained_parameters", "trainable parameters", ",d"),
        ("steps", "steps", ",d"),
        ("training_seconds", "wall-clock time in seconds", ",.0f"),
        ("seed", "random seed", "d"),
    ):
        if key in results:
            facts[name] = format(results[key], form)
    return facts | {"energy and carbon emissions": "not measured"} if facts else {}
