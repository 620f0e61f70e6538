"""The program: which commands there are, how one is added, and how fast help is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from capsule_heads import cli

COMMANDS = ["cache", "convert", "demo", "evaluate", "explain", "export", "predict", "push", "sweep", "train"]


def test_commands():
    assert sorted(cli.find_commands()) == COMMANDS
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    assert files == {"__init__", *COMMANDS}  # one file per command


def test_help(call):
    status, out, err = call("--help")
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == COMMANDS
    status, out, err = call()
    assert (status, out) == (2, "") and "usage: capsule-heads COMMAND" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(call, command):
    status, out, err = call(command, "--help")
    assert (status, err) == (0, "")
    assert f"usage: capsule-heads {command}" in out and "--import MODULE" in out


LIGHT = """
import json, sys
from capsule_heads.cli import main
try:
    main(["--help"])
except SystemExit:
    print()
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_help_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", LIGHT], env=os.environ, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "capsule_heads" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "datasets", "numpy", "huggingface_hub", "gradio", "yaml"})


NEW = '''
"""`capsule-heads greet`: a command of the test's own."""

from capsule_heads.cli.options import Command, OneLineParser


def make_parser(prog):
    parser = OneLineParser(prog=prog)
    parser.add_argument("name")
    return parser


def run(options):
    print(f"Hello {options.name}")


COMMAND = Command("Greet someone.", make_parser, run)
'''


def test_a_command_is_a_file(call, fails, tmp_path, monkeypatch):
    (tmp_path / "greet.py").write_text(NEW)
    (tmp_path / "helper.py").write_text("COMMAND = None\n")  # declares no command
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    assert sorted(cli.find_commands()) == sorted([*COMMANDS, "greet"])
    assert call("greet", "Ada")[:2] == (0, "Hello Ada\n")
    assert "Greet someone." in call("--help")[1]
    assert fails("gret") == "error: command line: unknown command gret; did you mean greet?"
    for name in ("greet", "helper"):
        del sys.modules[f"capsule_heads.cli.{name}"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "unknown command trian; did you mean train?"),
        (["dance"], f"unknown command dance; expected one of {', '.join(COMMANDS)}"),
        (["evaluate", "x", "--tsk", "sst5"], "unknown option --tsk; did you mean --task?"),
        (["evaluate", "x", "--tas", "sst5"], "unknown option --tas; did you mean --task?"),  # no abbreviations
        (["predict", "x", "--zebra"], "unknown option --zebra"),
    ],
)
def test_what_was_meant(fails, arguments, said):
    if arguments[0] == "evaluate":
        arguments = [*arguments, "--task", "reviews"]
    assert fails(*arguments) == f"error: command line: {said}"


@pytest.mark.parametrize("command", ["evaluate", "explain"])
def test_a_task_that_was_meant(fails, command):
    assert fails(command, "x", "--task", "sst3").endswith("; did you mean sst5?")


TASK = """
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from capsule_heads.tasks import Task, register_task


def load(source):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    rows = Dataset.from_dict({"text": ["bad food", "a good film"] * 4, "label": [0, 1] * 4}, features=features)
    return DatasetDict(train=rows, validation=rows, test=rows)


register_task(Task("tickets_of_the_test", "support tickets", "text", load))
"""


@pytest.fixture
def task_file(tmp_path, monkeypatch):
    from capsule_heads import tasks

    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    path = tmp_path / "tickets_module.py"
    path.write_text(TASK)
    yield path
    sys.modules.pop(path.stem, None)


@pytest.mark.slow
def test_a_task_of_ones_own(call, backbone, task_file, tmp_path):
    own = ("--import", task_file, "--task", "tickets_of_the_test")
    options = ("--backbone", backbone, "--d_inp", 8, "--n_parts", 4, "--max_steps", 2, "--output_dir", tmp_path / "run")
    status, _, err = call("train", *own, *options, "--use_cpu", "--save_strategy", "no")
    assert status == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["dataset"]["name"] == "support tickets" and 0 <= results["test_accuracy"] <= 1
    status, out, err = call("evaluate", tmp_path / "run", *own, "--split", "test")
    assert status == 0, err
    assert json.loads(Path(out.splitlines()[-1]).read_text())["accuracy"] == results["test_accuracy"]


ENDS = r"""
from capsule_heads.cli.options import Command, OneLineParser, one_line_errors


def make_parser(prog):
    parser = OneLineParser(prog=prog)
    parser.add_argument("how")
    return parser


def run(options):
    import logging, warnings

    import torch
    from tqdm.auto import tqdm

    outer, inner = tqdm(total=3), tqdm(total=3, leave=False)
    outer.update(), inner.update()
    if options.how == "warning":
        logging.getLogger("capsule_heads.of_the_test").warning("ours")
        warnings.warn("theirs")
        outer.close(), inner.close()
        return
    errors = {
        "mistake": ValueError("a\nmistake"),
        "fault": KeyError("a fault"),
        "runtime": RuntimeError("shapes differ"),
        "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB."),
        "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to take 9."),
        "memory": MemoryError(),
        "interrupt": KeyboardInterrupt(),
    }
    with one_line_errors():
        raise errors[options.how]


COMMAND = Command("End somehow.", make_parser, run)
"""


@pytest.fixture
def ends(call, tmp_path, monkeypatch):
    """ends(how): status and lines of stderr of a command that shows two bars and ends in that way."""
    (tmp_path / "finish.py").write_text(ENDS)
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])

    def end(how):
        status, out, err = call("finish", how)
        assert out == ""
        return status, err.split("\n")  # not at carriage returns, as tools that search lines

    yield end
    del sys.modules["capsule_heads.cli.finish"]


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("mistake", 2, "error: a mistake"),
        ("cuda", 2, "error: Out of memory (CUDA out of memory. Tried to allocate 3 GiB.); expected a smaller batch"),
        ("cpu", 2, "error: Out of memory ([enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        ("memory", 2, "error: Out of memory (no details); expected a smaller batch"),
        ("interrupt", 130, "error: interrupted."),
    ],
)
def test_the_line_of_an_error_begins_a_line_below_the_bars(ends, how, status, said):
    found, lines = ends(how)
    assert found == status
    *bars, line, end = lines
    assert line.startswith(said) and end == ""
    assert bars and all("/3 [" in bar for bar in bars)


@pytest.mark.parametrize(("how", "kind"), [("fault", KeyError), ("runtime", RuntimeError)])
def test_faults_of_the_program_keep_their_traceback(ends, how, kind):
    with pytest.raises(kind):
        ends(how)


@pytest.mark.filterwarnings("always:theirs")
def test_warnings_are_shown(ends):
    with pytest.warns(UserWarning, match="theirs"):
        status, lines = ends("warning")
    assert status == 0
    assert sum(line.endswith("ours") for line in lines) == 1


def test_a_reader_that_goes_away_is_no_mistake(environment):
    read, write = os.pipe()
    os.close(read)
    program = """
from capsule_heads.cli.options.parser import ended_in_one_line
with ended_in_one_line():
    print("a prediction")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
