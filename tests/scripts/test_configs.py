"""Every file in configs/ can be used as its header says."""

import re
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

import capsule_heads
from capsule_heads import CapsuleTrainingArguments
from capsule_heads.cli.options import parse_config_and_options
from capsule_heads.data.glue import GLUE_TASKS
from capsule_heads.training.experiment import STEREO_TASKS, DataArguments, ModelArguments, compute_metrics_of

ROOT = Path(capsule_heads.__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
COMMAND = re.compile(r"^#   python scripts/train\.py (configs/\S+)(.*)$", re.MULTILINE)
RECIPES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
LAUNCH = re.compile(r"^#   accelerate launch (.*)$", re.MULTILINE)


def parse(path, *options):
    return parse_config_and_options(
        (DataArguments, ModelArguments, CapsuleTrainingArguments), [str(path), *options], ""
    )


def test_there_are_those_of_the_paper_and_one_per_glue_task():
    expected = {
        "quickstart",
        "sst2",
        "sst5",
        "sst5_roberta",
        "smallnorb",
        "toy_norb",
        "cifar100",
        "imagenet",
        *(f"glue_{task}" for task in GLUE_TASKS),
    }
    assert expected <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_launches_its_own_file(path):
    (command,) = COMMAND.findall(path.read_text(encoding="utf-8"))
    assert command[0] == f"configs/{path.name}"
    parse(path, "--use_cpu", *command[1].split())  # its options are options
    assert re.search(r"should reach|has not run it", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_keys_and_values(path):
    data, model, arguments = parse(path, "--use_cpu")
    assert Path(arguments.output_dir) == Path("runs", path.stem)
    assert model.freeze_backbone == (model.backbone != "new:stereo_conv")
    assert (data.pad_token == "<|endoftext|>") == ("gpt2" in model.backbone)
    if path.stem.startswith("glue_"):
        assert data.task == path.stem.removeprefix("glue_")
        assert arguments.load_best_model_at_end
    n_epochs = {"smallnorb": 50, "toy_norb": 20, **dict.fromkeys(("sst2", "sst5"), 3)}
    if path.stem in n_epochs:  # the paper's regime
        assert (arguments.num_train_epochs, arguments.per_device_train_batch_size) == (n_epochs[path.stem], 20)
        assert (arguments.learning_rate, data.phrases, model.mixup_alpha) == (5e-4, True, 0.2)
    if data.task in STEREO_TASKS:
        assert (model.head_type, model.backbone) == ("spatial_pose", "new:stereo_conv")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_best_model_is_chosen_by_a_metric_of_the_task(path):
    data, _, arguments = parse(path, "--use_cpu")
    name = arguments.metric_for_best_model
    if name is None:
        return
    if data.task == "mnli":
        name = name.removeprefix("validation_matched_")
    metric = compute_metrics_of(data.task).__closure__[0].cell_contents
    values = [0.0, 1.0, 2.0] if data.task == "stsb" else [0, 1, 1]
    assert name in metric.compute(predictions=values, references=values)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_several_processes_starts_what_its_header_says(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = LAUNCH.findall(path.read_text(encoding="utf-8"))
    launch, _, _ = _validate_launch_command(launch_command_parser().parse_args(command.split()))
    config, *options = launch.training_script_args
    assert (launch.config_file, launch.training_script) == (f"configs/accelerate/{path.name}", "scripts/train.py")
    _, model, arguments = parse(config, "--use_cpu", *options)
    assert launch.num_processes * arguments.per_device_train_batch_size == 20  # the paper's batch
    kinds = {"ddp": launch.multi_gpu, "fsdp2": launch.use_fsdp, "deepspeed": launch.use_deepspeed}
    assert [kind for kind, is_on in kinds.items() if is_on] == [path.stem]
    if path.stem == "fsdp2":
        assert (launch.fsdp_version, launch.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")
        assert launch.fsdp_transformer_layer_cls_to_wrap == "GPT2Block"  # of GPT-2, its backbone
    if path.stem == "deepspeed":
        assert launch.zero_stage == 2
    assert model.freeze_backbone == (path.stem == "ddp")
