"""The tables of docs/reference/configuration.md are those of the code."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

import capsule_heads
from capsule_heads.cli.options.configs import describe_config, named_configs
from capsule_heads.cli.options.training import head_fields
from capsule_heads.heads import registered_heads
from capsule_heads.training import CapsuleTrainingArguments, recipe
from capsule_heads.training.arguments import PAPER_SETTINGS
from capsule_heads.training.run import DataArguments, ModelArguments

PAGE = Path(capsule_heads.__file__).parents[1] / "docs" / "reference" / "configuration.md"
TEXT = PAGE.read_text(encoding="utf-8")


def tables(first):
    """The tables whose first column has this title, as lists of rows, of cells without backticks; the title first."""
    found = re.findall(rf"^\| {first} \|.*\n(?:\|.*\n)*", TEXT, re.MULTILINE)
    cells = [[[x.strip().strip("`") for x in row.strip("|").split("|")] for row in x.splitlines()] for x in found]
    return [[title, *rows] for title, _, *rows in cells]


def shown(value):
    """How the page shows a default."""
    if value is dataclasses.MISSING:
        return "required"
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize(("number", "cls"), [(0, DataArguments), (1, ModelArguments)])
def test_keys_of_data_and_model(number, cls):
    assert [row[:2] for row in tables("key")[number][1:]] == [
        [x.name, shown(x.default)] for x in dataclasses.fields(cls)
    ]


def test_options_of_heads():
    ((title, *rows),) = tables("option")
    heads = title[2:]
    options = head_fields()
    assert heads == [name for name, head in registered_heads().items() if head.made_by is None]
    assert sorted(row[0] for row in rows) == sorted(options)
    for name, _, *cells in rows:
        fields = [options[name].get(head) for head in heads]
        assert cells == ["" if field is None else shown(field.default) for field in fields], name
    said = {name: explains for name, _, explains in tables("head")[0][1:]}
    assert said == {name: " and ".join(registered_heads()[name].explains) or "nothing" for name in heads}


def test_training_arguments_that_differ():
    of_transformers = {x.name: x.default for x in dataclasses.fields(TrainingArguments)}
    differ = {
        x.name: (x.default, of_transformers.get(x.name))
        for x in dataclasses.fields(CapsuleTrainingArguments)
        if x.name not in of_transformers or x.default != of_transformers[x.name]
    }
    ((_, *rows),) = tables("field")
    assert {row[0] for row in rows} == differ.keys()
    for name, here, there, _ in rows:
        value, other = differ[name]
        assert here == ("recipe" if name in PAPER_SETTINGS else shown(value)) and there == shown(other), name


def test_what_the_recipe_chooses():
    ((_, *rows),) = tables("argument")
    found = {name: values for name, *values in rows}
    for name, value in PAPER_SETTINGS.items():
        assert float(found[name][2]) == value
    assert [float(x) for x in found["learning_rate"][:2]] == [recipe.HEAD_RATE, PAPER_SETTINGS["learning_rate"]]
    assert float(found["backbone_learning_rate"][1]) == recipe.BACKBONE_RATE
    for column in (0, 1):
        assert found["num_train_epochs"][column] == f"{recipe.EPOCHS[0]} to {recipe.EPOCHS[1]}"
        assert float(found["warmup_steps"][column]) == recipe.WARMUP
        assert float(found["max_grad_norm"][column]) == recipe.CLIPPING
    for row in tables("training examples")[0][1:]:
        n_examples, epochs, steps = (int(x.replace(",", "")) for x in row)
        least, most = recipe.EPOCHS
        assert epochs == min(max(round(recipe.STEPS * 20 / n_examples), least), most)
        assert steps == epochs * -(-n_examples // 20)


def test_configurations():
    ((_, *rows),) = tables("name")
    assert [row[0] for row in rows] == list(named_configs())
    for (_, about, task, backbone, was_run), path in zip(rows, named_configs().values(), strict=True):
        text = path.read_text(encoding="utf-8")
        keys = yaml.safe_load(text)
        assert (about, task, backbone) == (describe_config(path), keys["task"], keys["backbone"])
        assert (was_run == "no") == ("has not run it" in " ".join(text.replace("#", " ").split())), path
