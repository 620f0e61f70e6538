"""Every file in configs/ can be used as its header says."""

import re
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

import capsule_heads
from capsule_heads.cli import main
from capsule_heads.cli.options.configs import config_folder, describe_config, named_configs, read_config
from capsule_heads.cli.options.training import TrainParser
from capsule_heads.data.glue import GLUE_TASKS
from capsule_heads.metrics import metric_names
from capsule_heads.tasks import get_task

ROOT = Path(capsule_heads.__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
COMMAND = re.compile(r"^#   capsule-heads train --config (\S+)(.*)$", re.MULTILINE)
RECIPES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
LAUNCH = re.compile(r"^#   accelerate launch (.*)$", re.MULTILINE)


def parse(config, *options):
    return TrainParser("capsule-heads train").parse_args(["--config", config, *options])


def test_they_are_found_by_name(capsys):
    assert config_folder() == ROOT / "configs"
    assert list(named_configs().values()) == CONFIGS
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "--list-configs"])
    assert exit_info.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [path.stem for path in CONFIGS]
    assert "sst5          SST-5, the paper's own experiment: a head on a frozen GPT-2-large." in lines
    assert lines[-1] == f"Files: {ROOT / 'configs'}"


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


BOMB = "a: &a [1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi"))


@pytest.mark.parametrize(
    "content, expected",
    [
        ("task: &a [*a]", "an alias of a list or of keys; write it out"),
        ("task: &a {b: *a}", "an alias of a list or of keys; write it out"),
        (BOMB, "an alias of a list or of keys; write it out"),
        ("a: " + "[" * 3000 + "]" * 3000, "not YAML: maximum recursion depth exceeded"),
        ("a: " + "{a: " * 3000 + "}" * 3000, "not YAML: maximum recursion depth exceeded"),
        ("a: !!timestamp 2026-01-01", "timestamp is not a plain value"),
        ("a: !!binary aGk=", "binary is not a plain value"),
        ("a: !!set {b}", "set is not a plain value"),
        ("a: !!python/object/apply:os.system [exit]", "apply:os.system is not a plain value"),
        ('a: !!int ""', "not YAML: string index out of range"),
        ("a: !!bool b", "not YAML: 'b'"),
        ("a: !!int b", "not YAML: invalid literal for int"),
        ("a: " + "9" * 5000, "not YAML: Exceeds the limit"),
        ("a: 1\na: 2", "a is given twice"),
        ("\ta: 1", "cannot start any token"),
        ("a: b\0", "special characters are not allowed"),
        ("", "expected keys and values, one pair a line, found NoneType"),
        (b"a: \xff", "codec can't decode byte 0xff"),
    ],
)
def test_a_file_that_is_no_configuration_ends_in_one_line(tmp_path, capsys, content, expected):
    path = tmp_path / "own.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as exit_info:
        read_config(str(path))
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2
    assert line.startswith(f"error: {path}: ") and expected in line


def test_a_directory_is_no_configuration(tmp_path, capsys):
    with pytest.raises(SystemExit):
        read_config(str(tmp_path))
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory\n"


def test_dates_are_words_and_scalars_may_have_aliases(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("run_name: 2026-01-01\nlr_scheduler_kwargs: {a: 2026-01-01}\nseed: &a 7\ndata_seed: *a\n")
    expected = {"run_name": "2026-01-01", "lr_scheduler_kwargs": {"a": "2026-01-01"}, "seed": 7, "data_seed": 7}
    assert read_config(str(path)) == ("own", expected)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_launches_its_own_file(path):
    (command,) = COMMAND.findall(path.read_text(encoding="utf-8"))
    assert command[0] == path.stem
    assert describe_config(path).endswith(".")  # its first line is a sentence
    parse(path.stem, "--use_cpu", *command[1].split())  # its options are options
    assert re.search(r"should reach|has not run it", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_keys_and_values(path):
    given = parse(path.stem, "--use_cpu")
    data, model, arguments = given.data, given.model, given.arguments
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
    if get_task(data.task).processor is not None:  # of stereo pairs
        assert (model.head_type, model.backbone) == ("spatial_pose", "new:stereo_conv")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_best_model_is_chosen_by_a_metric_of_the_task(path):
    given = parse(path.stem, "--use_cpu")
    name, task = given.arguments.metric_for_best_model, get_task(given.data.task)
    if name is not None:
        assert name.removeprefix("validation_matched_") in metric_names(task.metric)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_several_processes_starts_what_its_header_says(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = LAUNCH.findall(path.read_text(encoding="utf-8"))
    launch, _, _ = _validate_launch_command(launch_command_parser().parse_args(command.split()))
    option, config, *options = launch.training_script_args
    assert option == "--config"
    assert (launch.config_file, launch.training_script) == (f"configs/accelerate/{path.name}", "scripts/train.py")
    given = parse(config, "--use_cpu", *options)
    model, arguments = given.model, given.arguments
    assert launch.num_processes * arguments.per_device_train_batch_size == 20  # the paper's batch
    kinds = {"ddp": launch.multi_gpu, "fsdp2": launch.use_fsdp, "deepspeed": launch.use_deepspeed}
    assert [kind for kind, is_on in kinds.items() if is_on] == [path.stem]
    if path.stem == "fsdp2":
        assert (launch.fsdp_version, launch.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")
        assert launch.fsdp_transformer_layer_cls_to_wrap == "GPT2Block"  # of GPT-2, its backbone
    if path.stem == "deepspeed":
        assert launch.zero_stage == 2
    assert model.freeze_backbone == (path.stem == "ddp")
