import ast
import dataclasses
import json
import math
import re

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from capsule_heads import CapsuleTrainingArguments
from capsule_heads.training.arguments import describe_arguments

TABLE = {
    match[1]: match.groups()[1:]
    for match in re.finditer(r"\| `(\w+)`[^|]*\| (\S+)[^|]*\| (\S+)[^|]*\|", CapsuleTrainingArguments.__doc__)
}
OURS, THEIRS = ({f.name: f for f in dataclasses.fields(cls)} for cls in (CapsuleTrainingArguments, TrainingArguments))


def test_the_table_lists_every_field_that_the_class_declares_and_no_other():
    assert set(TABLE) == set(CapsuleTrainingArguments.__annotations__)


@pytest.mark.parametrize("name", TABLE)
def test_the_table_tells_the_defaults_of_both_classes(name):
    here, there = TABLE[name]
    assert OURS[name].default == ast.literal_eval(here)
    if there == "(none)":
        assert name not in THEIRS
    elif name in THEIRS:  # before transformers 5.2 there is no train_sampling_strategy
        assert THEIRS[name].default == ast.literal_eval(there)


def test_all_other_defaults_are_those_of_transformers():
    others = OURS.keys() - TABLE.keys()
    assert len(others) > 50
    assert all(OURS[name].default == THEIRS[name].default for name in others)


def test_instances_hold_the_defaults(tmp_path):
    arguments = CapsuleTrainingArguments(str(tmp_path), use_cpu=True)
    for name, (here, _) in TABLE.items():
        assert getattr(arguments, name) == ast.literal_eval(here)


def test_the_papers_recipe_sets_the_papers_constants(tmp_path):
    arguments = CapsuleTrainingArguments(str(tmp_path), use_cpu=True, recipe="paper")
    assert (arguments.learning_rate, arguments.num_train_epochs) == (5e-4, 3)
    assert (arguments.get_warmup_steps(1000), arguments.max_grad_norm) == (100, 0)
    assert CapsuleTrainingArguments(str(tmp_path), recipe="paper", learning_rate=1e-3).learning_rate == 1e-3
    with pytest.raises(ValueError, match="recipe is 'best'; expected"):
        CapsuleTrainingArguments(str(tmp_path), recipe="best")


def test_optimizers_and_schedules_of_transformers_can_be_named(tmp_path):
    arguments = CapsuleTrainingArguments(str(tmp_path), use_cpu=True, optim="adamw_torch", lr_scheduler_type="cosine")
    assert arguments.optim is OptimizerNames.ADAMW_TORCH
    assert arguments.lr_scheduler_type is SchedulerType.COSINE


@pytest.mark.parametrize("wrong", [{"optim": "nadam"}, {"lr_scheduler_type": "two_cycle"}, {"save_strategy": "daily"}])
def test_wrong_names_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        CapsuleTrainingArguments(str(tmp_path), use_cpu=True, **wrong)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"learning_rate": -1e-4}, "learning_rate is -0.0001; expected a number, 0 or more."),
        ({"learning_rate": math.inf}, "learning_rate is inf; expected a number, 0 or more."),
        ({"backbone_learning_rate": -1.0}, "backbone_learning_rate is -1.0; expected a number, 0 or more."),
        ({"adam_beta1": 3.0}, "adam_beta1 is 3.0; expected a number, 0 or more, and less than 1."),
        ({"min_adam_beta1": 1.0}, "min_adam_beta1 is 1.0; expected a number, 0 or more, and less than 1."),
        ({"adam_beta2": -0.5}, "adam_beta2 is -0.5; expected a number, 0 or more, and less than 1."),
        ({"seed": -1}, "seed is -1; expected a number, 0 or more, and less than 4294967296."),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1; expected a number, 0 or more."),
        ({"save_total_limit": 0}, "save_total_limit is 0; expected a number, 1 or more."),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0; expected a number, 1 or more."),
    ],
)
def test_numbers_beyond_their_limits_are_refused(tmp_path, field, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        CapsuleTrainingArguments(str(tmp_path), **field)


def test_to_dict_and_json(tmp_path):
    arguments = CapsuleTrainingArguments(str(tmp_path), use_cpu=True)
    for content in (arguments.to_dict(), json.loads(arguments.to_json_string())):
        assert content["optim"] == "radam"
        assert content["lr_scheduler_type"] == "one_cycle"
        assert content["min_adam_beta1"] == 0.81
    again = CapsuleTrainingArguments(**{name: arguments.to_dict()[name] for name in TABLE}, use_cpu=True)
    assert all(getattr(again, name) == getattr(arguments, name) for name in TABLE)


def test_the_command_line_parser_of_transformers_takes_the_class(tmp_path):
    parser = HfArgumentParser(CapsuleTrainingArguments)
    options = ["--output_dir", str(tmp_path), "--use_cpu", "--min_learning_rate", "2e-5", "--optim", "adafactor"]
    (arguments,) = parser.parse_args_into_dataclasses(options)
    assert arguments.min_learning_rate == 2e-5
    assert arguments.optim is OptimizerNames.ADAFACTOR
    assert arguments.lr_scheduler_type == "one_cycle"
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--train_sampling_strategy", "by_colour"])


def test_what_a_model_card_says_of_them(tmp_path):
    described = describe_arguments(CapsuleTrainingArguments(str(tmp_path), num_train_epochs=4))
    assert described["optim"] == "radam" and described["lr_scheduler_type"] == "one_cycle"
    assert (described["num_train_epochs"], described["min_adam_beta1"]) == (4, 0.81)
    assert not {"max_steps", "weight_decay", "max_grad_norm", "bf16"} & described.keys()
    described = describe_arguments(CapsuleTrainingArguments(str(tmp_path), lr_scheduler_type="linear", max_steps=7))
    assert (described["max_steps"], described["lr_scheduler_type"]) == (7, "linear")
    assert not {"num_train_epochs", "min_learning_rate", "min_adam_beta1"} & described.keys()
    assert describe_arguments(TrainingArguments(str(tmp_path)))["optim"] == "adamw_torch_fused"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"accelerator_config": {"split_batches": False}}, True),
        ({"accelerator_config": {"non_blocking": False}}, False),
        ({"dataloader_pin_memory": False}, False),
    ],
    ids=str,
)
def test_copies_to_a_gpu_are_asynchronous_unless_the_user_says_otherwise(tmp_path, monkeypatch, fields, expected):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    arguments = CapsuleTrainingArguments(str(tmp_path), **fields)
    assert arguments.accelerator_config.non_blocking is expected
    assert arguments.dataloader_pin_memory is fields.get("dataloader_pin_memory", True)


def test_nothing_is_pinned_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    arguments = CapsuleTrainingArguments(str(tmp_path))
    assert not arguments.dataloader_pin_memory and not arguments.accelerator_config.non_blocking
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not CapsuleTrainingArguments(str(tmp_path), use_cpu=True).dataloader_pin_memory
