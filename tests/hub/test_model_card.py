"""The model card: what it says, and what it does not."""

import json
import re
from dataclasses import dataclass

import pytest
import torch
from configurations import make_config
from huggingface_hub import ModelCard
from torch import nn
from transformers import BertConfig, ViTConfig

from capsule_heads import (
    CapsuleHeadForImageClassification,
    CapsuleHeadForSequenceClassification,
    CapsuleTrainer,
    CapsuleTrainingArguments,
)
from capsule_heads.heads import Head, HeadOptions, HeadOutput, base, option, register
from capsule_heads.hub import model_card, push_run, write_code, write_model_card
from capsule_heads.models.configuration_capsule_head import label_fields

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
GLUE = {"name": "GLUE mnli", "repository": "nyu-mll/glue", "config": "mnli"}
MNLI = {"task": "mnli", "dataset": GLUE, "validation_matched_accuracy": 0.5, "validation_mismatched_accuracy": 0.25}


@pytest.fixture
def make_checkpoint(tmp_path):
    """make_checkpoint(**fields): the directory of a tiny checkpoint."""

    def make(base_config=None, cls=CapsuleHeadForSequenceClassification, **fields):
        options = {} if "head_type" in fields else {"d_inp": 4, "n_parts": 2}
        config = make_config(base_config or BertConfig(vocab_size=8, **SIZES), **options, **fields)
        cls(config).save_pretrained(tmp_path / "checkpoint")
        return tmp_path / "checkpoint"

    return make


def test_of_a_checkpoint_alone(make_checkpoint):
    card = str(model_card(make_checkpoint(), "me/x"))
    data = ModelCard(card).data
    assert data.to_dict() == {
        "library_name": "capsule-heads",
        "pipeline_tag": "text-classification",
        "tags": ["capsule-heads", "capsule-routing"],
    }
    assert "on the hidden states of a bert model that was not pretrained, frozen in training." in card
    assert "No results were given" in card and "No licence was given" in card
    assert "It needs the Python package capsule_heads, version" in card
    for unknown in ("## Results", "## Training", "Its classes", "None", "nan", "{{", "holds the head alone"):
        assert unknown not in card
    assert 'CapsuleHeadForSequenceClassification.from_pretrained("me/x")' in card


def test_the_calibration_of_a_run(make_checkpoint):
    found = {name: {"expected_calibration_error": error} for name, error in (("before", 0.125), ("after", 0.03125))}
    card = str(model_card(make_checkpoint(), "me/x", {"calibration": {"rows": 539, "temperature": 2.0, **found}}))
    assert "fitted on 539 validation examples. It took their expected calibration\nerror from 0.125 to\n0.031." in card
    assert "was not measured" not in card
    assert "was not measured" in str(model_card(make_checkpoint(), "me/x"))
    number = str(model_card(make_checkpoint(num_labels=1), "me/x"))
    assert "was not measured" not in number and "logits" not in number.partition("## Limits")[2]


@pytest.mark.parametrize(
    "fields, said",
    [
        (label_fields(["poor", "fine"]), "Its classes: poor, fine."),
        ({"num_labels": 1}, "Its output is a number, in the unit of the labels"),
        ({"freeze_backbone": False}, ", trained with it."),
        ({"head_type": "linear"}, "A linear control head, without capsules, on the hidden states of"),
        ({"layers": [0]}, "| `layers` | [0] |"),
        ({"base_model_name_or_path": "package:a/b"}, "the bert model in `b` of the Python package `a`"),
        ({"base_model_name_or_path": "/home/me/bert"}, "a bert model from a local directory"),
        (
            {"base_model_name_or_path": "org/bert", "base_model_revision": "0a1b"},
            "[org/bert](https://huggingface.co/org/bert), commit `0a1b`",
        ),
    ],
)
def test_what_a_configuration_says(make_checkpoint, fields, said):
    card = str(model_card(make_checkpoint(**fields), "me/x"))
    assert said in card and "/home/me" not in card


def test_results_are_metadata_that_the_hub_takes(make_checkpoint):
    results = {**MNLI, "validation_matched_loss": 1.0, "validation_matched_runtime": 2.0, "test_pearson": float("nan")}
    card = model_card(make_checkpoint(), "me/x", results, license="mit", language="en", tags=["extra"])
    data = ModelCard(str(card)).data
    assert (data.license, data.language, data.datasets, data.metrics) == ("mit", "en", ["nyu-mll/glue"], ["accuracy"])
    assert data.tags[-1] == "extra" and data.model_name == "x"
    assert [(r.dataset_name, r.dataset_config, r.dataset_split, r.metric_value) for r in data.eval_results] == [
        ("GLUE mnli", "mnli", "validation_matched", 0.5),
        ("GLUE mnli", "mnli", "validation_mismatched", 0.25),
    ]
    assert "| validation_mismatched | accuracy | 0.2500 |" in str(card)
    assert "loss" not in str(card) and "pearson" not in str(card)


def test_results_on_data_that_is_not_on_the_hub(make_checkpoint):
    card = str(model_card(make_checkpoint(), "me/x", {"task": "sst5", "dataset": {"name": "SST-5"}, "test_f1": 0.5}))
    (result,) = ModelCard(card).data.eval_results
    assert (result.dataset_type, result.dataset_name, result.dataset_config) == ("sst5", "SST-5", None)
    assert ModelCard(card).data.datasets is None and "Data: SST-5. One run." in card
    assert "The licence of the data is that of its authors." in card


def test_the_licence_of_data_that_is_known_here(make_checkpoint):
    results = {"task": "reviews", "dataset": {"name": "the reviews", "license": "MIT"}, "test_accuracy": 0.5}
    assert "The licence of the data is MIT." in str(model_card(make_checkpoint(), "me/x", results))
    assert "see [nyu-mll/glue](https://huggingface.co/datasets/nyu-mll/glue)" in str(
        model_card(make_checkpoint(), "me/x", MNLI)
    )


def test_what_it_was_trained_on(make_checkpoint):
    card = str(model_card(make_checkpoint(), "me/x", {"hardware": "a GPU", "training_seconds": 12.3}))
    assert "- hardware: a GPU\n- wall-clock time in seconds: 12\n- energy and carbon emissions: not measured" in card
    assert "energy" not in str(model_card(make_checkpoint(), "me/x"))


def test_results_on_unknown_data_have_no_metadata(make_checkpoint):
    card = str(model_card(make_checkpoint(), "me/x", {"eval_f1": 0.5, "task": "image_folder"}))
    assert ModelCard(card).data.eval_results is None
    assert "| evaluation | f1 | 0.5000 |" in card


def test_a_text_to_try_on_the_hub(make_checkpoint):
    directory = make_checkpoint()
    (directory / "tokenizer_config.json").write_text("{}")
    card = str(model_card(directory, "me/x"))
    (widget,) = ModelCard(card).data.to_dict()["widget"]
    assert f'print(classify("{widget["text"]}"))' in card


def test_of_images(make_checkpoint):
    directory = make_checkpoint(ViTConfig(image_size=8, patch_size=4, **SIZES), CapsuleHeadForImageClassification)
    (directory / "preprocessor_config.json").write_text("{}")
    card = str(model_card(directory, "me/x"))
    assert ModelCard(card).data.pipeline_tag == "image-classification"
    assert 'classify = pipeline("image-classification", model="me/x")\nprint(classify("picture.png"))' in card
    assert '(explanation,) = explain(model, Image.open("picture.png"))' in card


@pytest.mark.parametrize(
    "fields, explained, n_parts",
    [
        ({}, "parts and to tokens", 2),
        ({"head_type": "linear"}, "tokens", 0),
        ({"head_type": "vector_routing"}, None, 0),
        ({"num_labels": 1}, None, 0),
    ],
    ids=["capsules", "sum", "neither", "regression"],
)
def test_it_says_what_can_be_explained(make_checkpoint, fields, explained, n_parts):
    directory = make_checkpoint(**fields)
    card = str(model_card(directory, "me/x"))
    assert ("## Explanations" in card) == (explained is not None)
    if explained is not None:
        assert f"attributes the score of each class to {explained}." in card
        snippet = re.findall("```python\n(.*?)```", card, re.DOTALL)[1].replace('"me/x"', repr(str(directory)))
        inputs = {"input_ids": torch.arange(4)[None]}
        names = {}
        exec(snippet.replace('"Worth every minute of the queue."', "inputs"), {"inputs": inputs}, names)
        assert names["explanation"].parts.shape == (n_parts, 2)


def test_code_is_announced_with_its_length(make_checkpoint):
    directory = make_checkpoint()
    write_code(directory)
    card = str(model_card(directory, "me/x"))
    n_lines = sum(len(path.read_text().splitlines()) for path in directory.glob("*.py"))
    assert f"runs the {n_lines} lines of Python in this repository" in card
    assert "the\nfast strategies need the package" in card
    assert ModelCard(card).data.library_name == "transformers"


@dataclass(frozen=True)
class MedianOptions(HeadOptions):
    scale: int = option(3, "Something that tells two heads apart.")
    way: str = option("quick", "Something that does not.", describes=False)


class MedianHead(Head):
    title = "A head of medians"
    Options = MedianOptions

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.affine = nn.Linear(self.hidden_sizes[-1], self.n_out)

    def score(self, hidden_states, masks, return_routing_probabilities, mix):
        return HeadOutput(self.affine(hidden_states[-1].median(1).values))


def test_of_a_head_that_is_registered_here_alone(make_checkpoint, monkeypatch):
    heads = dict(base._HEADS)
    monkeypatch.setattr(base, "_HEADS", heads)
    register("median_of_a_test")(MedianHead)
    directory = make_checkpoint(head_type="median_of_a_test", scale=5)
    card = str(model_card(directory, "me/x"))
    assert "A head of medians on the hidden states of a bert model" in card
    assert "| `scale` | 5 |" in card and "`way`" not in card and "## Explanations" not in card
    del heads["median_of_a_test"]
    for call in (model_card, push_run):
        with pytest.raises(ValueError, match=r"^head_type is 'median_of_a_test'; expected one of token_depth, .*\.$"):
            call(directory, "me/x")


def test_a_card_that_someone_wrote_is_kept(make_checkpoint):
    directory = make_checkpoint()
    write_model_card(directory, "me/x")
    first = (directory / "README.md").read_text()
    write_model_card(directory, "me/x", MNLI)
    assert (directory / "README.md").read_text() == str(model_card(directory, "me/x", MNLI)) != first
    (directory / "README.md").write_text("# Mine")
    write_model_card(directory, "me/x", MNLI)
    assert (directory / "README.md").read_text() == "# Mine"


def test_of_what_is_no_checkpoint(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path} holds no config.json; expected a directory that save_pretrained"):
        model_card(tmp_path, "me/x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([1], r"config\.json: expected keys and values, found list"),
        ({"architectures": None}, "architectures is None in .*; expected what save_pretrained writes"),
        ({"architectures": ["BertModel"]}, r"architectures is \['BertModel'\] in "),
        ({"head_type": ["linear"]}, r"head_type is \['linear'\] in "),
        ({"base_config": [1]}, r"base_config is \[1\] in "),
        ({"id2label": ["good"]}, r"id2label is \['good'\] in "),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3 in "),
        ({"model_type": "bert"}, "is of a bert model, not of a capsule-head model"),
    ],
)
def test_of_a_configuration_that_is_none(make_checkpoint, changes, message):
    directory = make_checkpoint()
    file = directory / "config.json"
    content = {**json.loads(file.read_text()), **changes} if isinstance(changes, dict) else changes
    file.write_text(json.dumps(content))
    for call in (model_card, push_run):
        with pytest.raises(ValueError, match=message):
            call(directory, "me/x")
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"architectures is missing in .*config\.json"):
        model_card(directory, "me/x")


def test_the_trainers_card_has_the_metrics_of_the_weights_it_is_of(tmp_path):
    model = CapsuleHeadForSequenceClassification(make_config(BertConfig(vocab_size=8, **SIZES), d_inp=4))
    arguments = CapsuleTrainingArguments(str(tmp_path / "run"), recipe="paper", report_to=[], use_cpu=True)
    trainer = CapsuleTrainer(model, arguments)
    with pytest.raises(OSError, match=r"holds no config\.json"):
        trainer.create_model_card()
    trainer.save_model()
    trainer.state.log_history = [{"eval_accuracy": 0.75, "step": 4}, {"eval_accuracy": 0.5, "step": 8}]

    def card():
        trainer.create_model_card(tags="extra")
        return (tmp_path / "run" / "README.md").read_text()

    assert "accuracy" not in card() and "## Training" not in card()  # it has not trained
    trainer.state.global_step, trainer.state.best_global_step = 8, 4
    assert "| evaluation | accuracy | 0.5000 |" in card() and "0.7500" not in card()
    trainer.args.load_best_model_at_end = True
    assert "| evaluation | accuracy | 0.7500 |" in card() and "- steps: 4\n" in card()
    trainer.state.global_step, trainer.args.load_best_model_at_end = 9, False
    assert "accuracy" not in card()
    assert "| `num_train_epochs` | 3.0 |" in card() and "max_steps" not in card() and "| `optim` | radam |" in card()
    assert ModelCard(card()).data.tags[-1] == "extra"
