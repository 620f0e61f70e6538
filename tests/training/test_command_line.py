import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from capsule_heads import CapsuleTrainingArguments
from capsule_heads.cli.options import OneLineParser, at_least, file_to_write, parse_config_and_options
from capsule_heads.training.experiment import DataArguments, ModelArguments

CLASSES = (DataArguments, ModelArguments, CapsuleTrainingArguments)
REQUIRED = "task: reviews\nbackbone: some/model\nuse_cpu: true\n"


@pytest.fixture
def config(tmp_path):
    """config(text): the path of a YAML file with the required keys and this."""

    def write(text="", required=REQUIRED):
        path = tmp_path / "run.yaml"
        path.write_text(required + f"output_dir: {tmp_path}/run\n" * bool(required) + text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def mistake(capsys):
    """mistake(*argv): the one line that the parser ends with."""

    def parse(*argv):
        with pytest.raises(SystemExit) as exit_info:
            parse_config_and_options(CLASSES, argv, "Trains.")
        out, err = capsys.readouterr()
        assert exit_info.value.code == 2
        assert out == ""
        assert err.count("\n") == 1 and err.endswith("\n")
        assert err.startswith("error: ")
        return err

    return parse


def parse(*argv):
    return parse_config_and_options(CLASSES, argv, "Trains.")


def test_the_file_sets_defaults(config):
    text = """
learning_rate: 5e-4  # which YAML takes for a string
min_learning_rate: 0.00002
layers: [0, -1]
class_weights: [1, 2.5]
n_parts: 32
freeze_backbone: false
cache_hidden_states: yes
max_length: null
save_strategy: "no"
pad_token: <|endoftext|>
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 0.1}
"""
    data, model, arguments = parse(config(text))
    assert (data.task, data.cache_hidden_states, data.max_length) == ("reviews", True, None)
    assert data.pad_token == "<|endoftext|>"
    assert (model.backbone, model.n_parts, model.freeze_backbone) == ("some/model", 32, False)
    assert model.layers == [0, -1]
    assert model.class_weights == [1.0, 2.5]
    assert (arguments.learning_rate, arguments.min_learning_rate) == (5e-4, 2e-5)
    assert arguments.lr_scheduler_kwargs == {"min_lr": 0.1}
    assert arguments.save_strategy == "no"
    # and all else is as the classes have it
    assert (data.phrases, model.d_inp, arguments.optim, arguments.per_device_train_batch_size) == (
        True,
        64,
        "radam",
        20,
    )


@dataclass
class WithKeys:
    keys: dict[str, Any] | str | None = field(default=None)


def test_keys_of_its_own_are_handed_on_as_json(config):
    # transformers' dataclasses read them from there
    (instance,) = parse_config_and_options((WithKeys,), [config("keys: {a: [1, 2]}\n", required="")], "")
    assert instance.keys == '{"a": [1, 2]}'


def test_the_command_line_overrides_the_file(config):
    path = config("learning_rate: 1e-3\nn_parts: 32\ndepths: [0, -1]\nphrases: true\nmax_length: 9\n")
    options = ["--learning_rate", "2e-3", "--layers", "-2", "1", "--no_phrases", "--max-length=7", "--single_beta"]
    data, model, arguments = parse(path, *options)
    assert arguments.learning_rate == 2e-3
    assert model.n_parts == 32
    assert model.layers == [-2, 1]
    assert model.single_beta is True
    assert (data.phrases, data.max_length) == (False, 7)


def test_an_option_at_its_classs_default_overrides_the_file_too(config):
    _, model, _ = parse(config("n_parts: 32\nfreeze_backbone: false\n"), "--n_parts", "64", "--freeze_backbone")
    assert (model.n_parts, model.freeze_backbone) == (64, True)


def test_required_keys_may_be_on_the_command_line(config):
    data, model, _ = parse(config("seed: 3\n", required=""), "--use_cpu", "--task=sst5", "--backbone", "other/model")
    assert (data.task, model.backbone) == ("sst5", "other/model")


def test_a_mistake_of_the_file_is_one_although_the_command_line_overrides_it(config, mistake):
    assert "n_parts" in mistake(config("n_parts: many\n"), "--n_parts", "3")


@pytest.mark.parametrize(
    "text, said",
    [
        ("n_prats: 3\n", "unknown key n_prats"),
        ("n-parts: 3\n", "unknown key n-parts"),
        ("no_phrases: true\n", "unknown key no_phrases"),
        ("3: 3\n", "unknown key 3"),
        ("n_parts: many\n", "--n_parts.*invalid int value: 'many'"),
        ("n_parts: 2.5\n", "--n_parts.*invalid int value: '2.5'"),
        ("n_parts: [1, 2]\n", "n_parts is a list; expected one value"),
        ("n_parts: {a: 1}\n", "n_parts holds keys of its own; expected one value"),
        ("n_parts: null\n", "n_parts is null; expected a value, or leave the key out"),
        ("layers: [0, last]\n", "--layers.*invalid int value: 'last'"),
        ("layers: []\n", "--layers.*expected at least one argument"),
        ("learning_rate: fast\n", "--learning_rate.*invalid float value: 'fast'"),
        ("freeze_backbone: perhaps\n", "--freeze_backbone.*expected.*got perhaps"),
        ("head_type: cube\n", "--head_type.*invalid choice: 'cube'.*token_depth"),
        ("save_strategy: no\n", "--save_strategy.*invalid choice: 'False'"),  # YAML's no: it has to be quoted
        ("optim: radom\n", "radom is not a valid OptimizerNames"),
        ("a: b: c\n", "not YAML"),
        ("seed: 1\nseed: 2\n", "not YAML: seed is given twice .*, line [0-9]+"),
        ("? [a]\n: 1\n", "not YAML"),
    ],
)
def test_mistakes_of_the_file_name_it(config, mistake, text, said):
    path = config(text)
    error = mistake(path)
    assert error.startswith(f"error: {path}: ")
    assert re.search(said, error)


@pytest.mark.parametrize(
    "content, said",
    [(b"- a\n- b\n", "found list"), (b"", "found NoneType"), (b"text", "found str"), (b"\xff\xfe\x00", "codec can't")],
)
def test_files_that_hold_no_keys(tmp_path, mistake, content, said):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert re.search(f"error: {path}: .*{said}", mistake(str(path)))


def test_missing_files_and_directories(tmp_path, mistake):
    assert mistake(f"{tmp_path}/none.yaml") == f"error: {tmp_path}/none.yaml: No such file or directory\n"
    assert mistake(str(tmp_path)) == f"error: {tmp_path}: Is a directory\n"
    assert mistake("--seed", "1") == "error: command line: expected a YAML file before the options, found --seed\n"


def test_missing_keys(config, mistake):
    path = config("use_cpu: true\nbackbone: some/model\n", required="")
    assert mistake(path) == f"error: {path}: the key task is missing (or the option --task)\n"
    assert "the key task is missing" in mistake(path, "--seed", "3")


@pytest.mark.parametrize(
    "options, said",
    [
        (["--n_prats", "3"], "unknown option --n_prats$"),
        (["--n_prats=3"], "unknown option --n_prats$"),
        (["--n_part", "3"], "unknown option --n_part$"),  # no abbreviations
        (["other.yaml"], "unexpected value other.yaml$"),
        (["--n_parts", "3", "4"], "unexpected value 4$"),
        (["--n_parts", "many"], "argument --n_parts.*invalid int value: 'many'$"),
        (["--n_parts"], "argument --n_parts.*expected one argument$"),
        (["--task", "sst3"], "argument --task.*invalid choice: 'sst3'"),
    ],
)
def test_mistakes_of_the_command_line_do_not_blame_the_file(config, mistake, options, said):
    error = mistake(config(), *options)
    assert error.startswith("error: command line: ")
    assert "run.yaml" not in error
    assert re.search(said, error.rstrip("\n"))


def test_what_the_classes_check_names_both_sources(config, mistake):
    path = config()
    error = mistake(path, "--optim", "nadam")
    assert error.startswith(f"error: {path} with the command line: ")
    assert "nadam" in error


def test_help(config, capsys):
    for argv in (["--help"], [config(), "-h"]):
        with pytest.raises(SystemExit) as exit_info:
            parse(*argv)
        assert exit_info.value.code == 0
        out, err = capsys.readouterr()
        assert "CONFIG.yaml [--option value ...]" in out
        assert "Trains." in out
        assert "(default: 0.0005)" in out
        assert err == ""


def test_nothing_at_all_is_answered_with_the_help(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse()
    assert exit_info.value.code == 2
    assert "CONFIG.yaml" in capsys.readouterr().err


def test_one_line_parser(capsys):
    @dataclass
    class Options:
        size: int = field(default=1)

    parser = OneLineParser(Options)
    assert isinstance(parser, HfArgumentParser)
    with pytest.raises(SystemExit) as exit_info:
        parser.parse_args(["--size", "much"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: command line: argument --size: invalid int value: 'much'\n"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--count=0", "argument --count: 0 is no whole number, 1 or more"),
        ("--count=-1", "argument --count: -1 is no whole number, 1 or more"),
        ("--count=1.5", "argument --count: 1.5 is no whole number, 1 or more"),
        (
            "--file=none/x.json",
            "argument --file: none/x.json cannot be written: expected a file in a folder that exists",
        ),
        ("--file=folder", "argument --file: folder cannot be written: expected a file in a folder that exists"),
    ],
)
def test_types_of_options(tmp_path, monkeypatch, capsys, option, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    parser = OneLineParser()
    parser.add_argument("--count", type=at_least(1))
    parser.add_argument("--file", type=file_to_write)
    given = parser.parse_args(["--count", "3", "--file", "folder/x.json"])
    assert (given.count, given.file) == (3, Path("folder/x.json"))
    with pytest.raises(SystemExit):
        parser.parse_args([option])
    assert capsys.readouterr().err == f"error: command line: {said}\n"
