"""The options of `capsule-heads train`, of a YAML file and the command line, and the parser of all commands."""

import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from capsule_heads.cli import main
from capsule_heads.cli.options import OneLineParser, at_least, file_to_write
from capsule_heads.cli.options.training import GivenOptions, TrainParser, _parse_config

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
            main(["train", *argv])
        out, err = capsys.readouterr()
        assert exit_info.value.code == 2
        assert out == ""
        assert err.count("\n") == 1 and err.endswith("\n")
        assert err.startswith("error: ")
        return err

    return parse


def parse(*argv):
    return TrainParser("capsule-heads train").parse_args(argv)


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
lr_scheduler_type: one_cycle
accelerator_config: {split_batches: true}
"""
    given = parse("--config", config(text))
    data, model, arguments = given.data, given.model, given.arguments
    assert (data.task, data.cache_hidden_states, data.max_length) == ("reviews", True, None)
    assert data.pad_token == "<|endoftext|>"
    assert (model.backbone, model.freeze_backbone, given.head) == ("some/model", False, {"n_parts": 32})
    assert model.layers == [0, -1]
    assert model.class_weights == [1.0, 2.5]
    assert (arguments.learning_rate, arguments.min_learning_rate) == (5e-4, 2e-5)
    assert arguments.accelerator_config.split_batches
    assert arguments.save_strategy == "no"
    # and all else is as the classes have it
    assert (data.phrases, arguments.optim, arguments.per_device_train_batch_size) == (True, "radam", 20)


@dataclass
class WithKeys:
    keys: dict[str, Any] | str | None = field(default=None)


def test_keys_of_its_own_are_handed_on_as_json():
    # transformers' dataclasses read them from there
    assert _parse_config(GivenOptions([WithKeys]), {"keys": {"a": [1, 2]}}, "") == {"keys": '{"a": [1, 2]}'}


def test_the_command_line_overrides_the_file(config):
    path = config("learning_rate: 1e-3\nn_parts: 32\nlayers: [0, -1]\nphrases: true\nmax_length: 9\n")
    options = ["--learning_rate", "2e-3", "--layers", "-2", "1", "--no_phrases", "--max-length=7", "--single_beta"]
    given = parse("--config", path, *options)
    assert given.arguments.learning_rate == 2e-3
    assert given.head == {"n_parts": 32, "single_beta": True}
    assert given.model.layers == [-2, 1]
    assert (given.data.phrases, given.data.max_length) == (False, 7)


def test_an_option_at_its_default_overrides_the_file_too(config):
    given = parse("--config", config("n_parts: 32\nfreeze_backbone: false\n"), "--n_parts", "64", "--freeze_backbone")
    assert (given.head, given.model.freeze_backbone) == ({"n_parts": 64}, True)


def test_required_keys_may_be_on_the_command_line(config):
    options = ("--use_cpu", "--task=sst5", "--backbone", "other/model")
    given = parse("--config", config("seed: 3\n", required=""), *options)
    assert (given.data.task, given.model.backbone, given.arguments.seed) == ("sst5", "other/model", 3)


def test_all_options_may_be_on_the_command_line():
    given = parse(
        "--task", "sst5", "--backbone", "some/model", "--head_type", "linear", "--pooling", "last", "--use_cpu"
    )
    assert (given.data.task, given.model.backbone) == ("sst5", "some/model")
    assert (given.model.head_type, given.head) == ("linear", {"pooling": "last"})
    assert given.arguments.output_dir == "runs/sst5"


def test_a_run_is_named_by_its_configuration(config):
    path = Path(config(required="task: reviews\nbackbone: some/model\n"))
    path.write_text(re.sub("output_dir.*\n", "", path.read_text()))
    assert parse("--config", str(path), "--use_cpu").arguments.output_dir == "runs/run"


def test_a_mistake_of_the_file_is_one_although_the_command_line_overrides_it(config, mistake):
    assert "n_parts" in mistake("--config", config("n_parts: many\n"), "--n_parts", "3")


@pytest.mark.parametrize(
    "text, said",
    [
        ("n_prats: 3\n", r"unknown key n_prats; did you mean n_parts\?"),
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
        (
            "head_type: ensemble_of_heads\n",
            r"--head_type.*cannot be trained: capsule_heads\.make_ensemble\(models\) makes it",
        ),
        ("head_type: linaer\n", r"--head_type.*invalid choice: 'linaer'.*did you mean linear\?"),
        ("save_strategy: no\n", "--save_strategy.*invalid choice: 'False'"),  # YAML's no: it has to be quoted
        ("optim: radom\n", "radom is not a valid OptimizerNames"),
        ("a: b: c\n", "not YAML"),
        ("seed: 1\nseed: 2\n", "not YAML: seed is given twice .*, line [0-9]+"),
        ("? [a]\n: 1\n", "not YAML"),
    ],
)
def test_mistakes_of_the_file_name_it(config, mistake, text, said):
    path = config(text)
    error = mistake("--config", path)
    assert error.startswith(f"error: {path}: ")
    assert re.search(said, error)


@pytest.mark.parametrize(
    "content, said",
    [(b"- a\n- b\n", "found list"), (b"", "found NoneType"), (b"text", "found str"), (b"\xff\xfe\x00", "codec can't")],
)
def test_files_that_hold_no_keys(tmp_path, mistake, content, said):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert re.search(f"error: {path}: .*{said}", mistake("--config", str(path)))


def test_configurations_that_are_not_there(tmp_path, mistake):
    assert mistake("--config", f"{tmp_path}/none.yaml") == f"error: {tmp_path}/none.yaml: No such file or directory\n"
    assert mistake("--config", str(tmp_path)) == f"error: {tmp_path}: Is a directory\n"
    said = "error: command line: there is no configuration "
    assert mistake("--config", "sst5_minlm") == f"{said}sst5_minlm; did you mean sst5_minilm?\n"
    assert mistake("--config", "dinner") == f"{said}dinner; capsule-heads train --list-configs shows all\n"
    assert mistake("quickstart").endswith("unexpected value quickstart; did you mean --config quickstart?\n")
    assert mistake("a/b.yaml", "--use_cpu").endswith("unexpected value a/b.yaml; did you mean --config a/b.yaml?\n")


def test_missing_keys(config, mistake):
    path = config("use_cpu: true\nbackbone: some/model\n", required="")
    said = "backbone is missing; give the option --backbone, or the key in a YAML file\n"
    path = config("use_cpu: true\ntask: reviews\n", required="")
    assert mistake("--config", path) == f"error: {path}: {said}"
    assert mistake("--config", path, "--seed", "3") == f"error: {path} with the command line: {said}"
    assert mistake("--seed", "3") == f"error: command line: {said}"


@pytest.mark.parametrize(
    "options, said",
    [
        (["--n_prats", "3"], r"unknown option --n_prats; did you mean --n_parts\?$"),
        (["--n_prats=3"], r"unknown option --n_prats; did you mean --n_parts\?$"),
        (["--n_part", "3"], r"unknown option --n_part; did you mean --n_parts\?$"),  # no abbreviations
        (["--zebra", "3"], "unknown option --zebra$"),
        (["other.yaml"], "unexpected value other.yaml$"),
        (["--n_parts", "3", "4"], "unexpected value 4$"),
        (["--n_parts", "many"], "argument --n_parts.*invalid int value: 'many'$"),
        (["--n_parts"], "argument --n_parts.*expected one argument$"),
        (["--task", "sst3"], r"argument --task.*invalid choice: 'sst3'.*; did you mean sst5\?"),
    ],
)
def test_mistakes_of_the_command_line_do_not_blame_the_file(config, mistake, options, said):
    error = mistake("--config", config(), *options)
    assert error.startswith("error: command line: ")
    assert "run.yaml" not in error
    assert re.search(said, error.rstrip("\n"))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("epochs", "num_train_epochs"),
        ("epoch", "num_train_epochs"),
        ("batch_size", "per_device_train_batch_size"),
        ("eval_batch_size", "per_device_eval_batch_size"),
        ("bs", "per_device_train_batch_size"),
        ("lr", "learning_rate"),
        ("min_lr", "min_learning_rate"),
        ("wd", "weight_decay"),
        ("head", "head_type"),
        ("steps", "max_steps"),
        ("scheduler", "lr_scheduler_type"),
        ("optimizer", "optim"),
        ("model", "backbone"),
        ("model_name_or_path", "backbone"),
    ],
)
def test_names_that_others_have_for_an_option(config, mistake, given, meant):
    path = config()
    assert mistake("--config", path, f"--{given}", "3").endswith(f"unknown option --{given}; did you mean --{meant}?\n")
    path = config(f"{given}: 3\n")
    assert mistake("--config", path) == f"error: {path}: unknown key {given}; did you mean {meant}?\n"


def test_a_name_that_may_mean_two_options(config, mistake):
    assert mistake("--config", config("dataset: x\n")).endswith("unknown key dataset; did you mean data or task?\n")


VOID = [
    ("save_steps: 3\nsave_strategy: epoch", "save_steps is 3.0, without effect where save_strategy is epoch"),
    ("save_total_limit: 3\nsave_strategy: 'no'", "save_total_limit is 3, without effect where save_strategy is no"),
    ("load_best_model_at_end: true\nsave_strategy: 'no'", "load_best_model_at_end is True, without effect"),
    ("logging_steps: 3\nlogging_strategy: epoch", "logging_steps is 3.0, without effect where logging_strategy"),
    ("eval_steps: 3", "eval_steps is 3.0, without effect where eval_strategy is no"),
    ("eval_delay: 3", "eval_delay is 3.0, without effect where eval_strategy is no"),
    ("num_train_epochs: 3\nmax_steps: 4", "num_train_epochs is 3.0, without effect where max_steps is 4"),
    ("min_learning_rate: 2e-5\nlr_scheduler_type: linear", "min_learning_rate is 2e-05, without effect where"),
    ("min_adam_beta1: 0.8\nlr_scheduler_type: linear", "min_adam_beta1 is 0.8, without effect where"),
    ("lr_scheduler_kwargs: {a: 1}", "without effect where lr_scheduler_type is one_cycle"),
    ("optim_args: a=1", "optim_args is a=1, without effect where optim is radam"),
    ("hub_model_id: a/b", "hub_model_id is a/b, without effect where push_to_hub is False"),
    ("hub_private_repo: true", "hub_private_repo is True, without effect where push_to_hub is False"),
    ("do_train: false", "do_train is False, which has no effect: the command trains and evaluates"),
    ("do_predict: true", "do_predict is True, which has no effect"),
]


@pytest.mark.parametrize(("text", "said"), VOID, ids=[said.partition(" ")[0] for _, said in VOID])
def test_options_that_others_make_void(config, mistake, text, said):
    path = config(text + "\n")
    error = mistake("--config", path)
    assert (
        error.startswith(f"error: {path}: ")
        and said in error
        and error.rstrip(".\n").endswith("out" if "do_" not in text else "it out")
    )


def test_options_that_the_command_line_makes_void_are_no_mistake_of_the_file(config, mistake):
    path = config("save_strategy: epoch\nsave_total_limit: 2\nnum_train_epochs: 3\nlr_scheduler_type: one_cycle\n")
    given = parse("--config", path, "--save_strategy", "no", "--max_steps", "4")
    assert (given.arguments.max_steps, given.arguments.save_total_limit) == (4, 2)
    assert "eval_steps is 3.0" in mistake("--config", path, "--eval_steps", "3")
    assert parse("--config", path, "--eval_strategy", "steps", "--logging_steps", "7").arguments.eval_steps == 7
    assert parse("--config", path, "--hub_model_id", "a/b", "--push_to_hub").arguments.hub_model_id == "a/b"


def test_files_of_arguments_that_are_not_there(config, mistake):
    error = mistake("--config", config(), "--accelerator_config", "/none.json")
    assert "No such file or directory: '/none.json'" in error


def test_what_the_classes_check_names_both_sources(config, mistake):
    path = config()
    error = mistake("--config", path, "--optim", "nadam")
    assert error.startswith(f"error: {path} with the command line: ")
    assert "nadam" in error


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as exit_info:
        main(["train", *argv])
    assert exit_info.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def options_in(text):
    """The options that a help text shows, by group."""
    groups = re.split(r"^(\w+):$", text, flags=re.MULTILINE)[1:]
    return {title: re.findall(r"^  --(\w+) ", body, re.MULTILINE) for title, body in zip(groups[::2], groups[1::2])}


def test_help(config, capsys):
    for argv in (["--help"], ["--config", config(), "-h"]):
        out = help_of(capsys, *argv)
        assert "capsule-heads train [--config NAME_OR_PATH] [--option value ...]" in out
        assert "Default: chosen by the recipe." in " ".join(out.split())
    shown = options_in(out)
    assert list(shown)[1:] == ["data", "model", "training", "output"]
    assert shown["data"] == [
        *("data", "text", "label", "validation", "test", "task", "source", "max_length", "cache_hidden_states")
    ]
    assert {"backbone", "head_type", "n_parts", "pooling"} <= set(shown["model"])
    assert "adam_beta1" not in out and "window_overlap" not in shown["data"]
    text = " ".join(out.split())
    assert "Number of part capsules. For token_depth (default: 64), spatial_pose (default: 64)." in text
    assert "Default: runs/ and the name of the configuration, task or data." in text


def test_help_of_all_options(capsys):
    common, shown = options_in(help_of(capsys, "--help")), options_in(help_of(capsys, "--help-all"))
    for title in ("data", "model", "training", "output"):
        assert shown[title][: len(common[title])] == common[title]  # the common ones come first
    assert {"adam_beta1", "min_adam_beta1", "on_nonfinite"} <= set(shown["training"])
    assert {"logging_steps", "hub_model_id", "save_total_limit"} <= set(shown["output"])
    assert sum(map(len, shown.values())) > 120


def test_nothing_at_all_is_answered_with_the_help(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["train"])
    assert exit_info.value.code == 2
    assert "--config NAME_OR_PATH" in capsys.readouterr().err


def test_one_line_parser(capsys):
    parser = OneLineParser()
    parser.add_argument("--size", type=int)
    parser.add_argument("--kind", choices=("round", "square"))
    for argv, said in (
        (["--size", "much"], "argument --size: invalid int value: 'much'"),
        (["--siez", "3"], "unknown option --siez; did you mean --size?"),
        (["3"], "unexpected value 3"),
        (
            ["--kind", "sqare"],
            "argument --kind: invalid choice: 'sqare' (choose from 'round', 'square'); did you mean square?",
        ),
    ):
        with pytest.raises(SystemExit) as exit_info:
            parser.parse_args(argv)
        assert exit_info.value.code == 2
        error = capsys.readouterr().err.replace("(choose from round, square)", "(choose from 'round', 'square')")
        assert error == f"error: command line: {said}\n"


HEAD = """
    from capsule_heads.heads import Head, HeadOptions, HeadOutput, option, register
    from dataclasses import dataclass
    from torch import nn

    @dataclass(frozen=True)
    class Options(HeadOptions):
        width_of_beam: {kind} = option({default}, "Width of the beam.")
        pooling: str = option("max", "Pooling of tokens.", choices=("max", "sum"))

    @register("{name}")
    class BeamHead(Head):
        Options = Options

        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.affine = nn.Linear(self.hidden_sizes[-1], self.n_out)

        def score(self, hidden_states, masks, return_routing_probabilities, mix):
            return HeadOutput(self.affine(hidden_states[-1].mean(1)))
"""


@pytest.fixture
def head_file(tmp_path, monkeypatch):
    """head_file(name): a file that registers a head; it is forgotten after the test."""
    from capsule_heads.heads import base

    monkeypatch.setattr(base, "_HEADS", dict(base._HEADS))

    def write(name, kind="int", default=3):
        path = tmp_path / f"{name}_module.py"
        path.write_text(textwrap.dedent(HEAD.format(name=name, kind=kind, default=default)))
        return str(path)

    return write


def test_options_of_a_head_of_ones_own(config, capsys, head_file, mistake):
    path = head_file("beam")
    assert "unknown option --width_of_beam" in mistake("--config", config(), "--width_of_beam", "4")
    text = " ".join(help_of(capsys, "--import", path, "--help").split())
    assert "Width of the beam. For beam (default: 3)." in text and "vector_routing, beam." in text
    given = parse("--config", config(f"import: {path}\nhead_type: beam\nwidth_of_beam: 4\n"), "--pooling", "sum")
    assert (given.model.head_type, given.head) == ("beam", {"width_of_beam": 4, "pooling": "sum"})


def test_heads_that_have_an_option_of_different_types(config, mistake, head_file):
    first, second = head_file("beam_of_int"), head_file("beam_of_float", "float", 0.5)
    error = mistake("--import", first, "--import", second, "--config", config())
    assert "The option width_of_beam is <class 'float'> for beam_of_float heads and <class 'int'> for" in error


def test_imports_that_fail(tmp_path, mistake, head_file):
    assert "--import none_such: No module named 'none_such'" in mistake("--import", "none_such")
    assert f"--import {tmp_path}/none.py: there is no such file" in mistake("--import", f"{tmp_path}/none.py")
    (tmp_path / "json.py").write_text("")
    error = mistake("--import", f"{tmp_path}/json.py")
    assert "another module has the name json, from " in error and error.endswith("; rename the file\n")
    (tmp_path / "broken_module.py").write_text("a b")
    assert "broken_module.py: invalid syntax" in mistake("--import", f"{tmp_path}/broken_module.py")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--count=0", "argument --count: 0 is not a whole number of at least 1"),
        ("--count=-1", "argument --count: -1 is not a whole number of at least 1"),
        ("--count=1.5", "argument --count: 1.5 is not a whole number of at least 1"),
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
