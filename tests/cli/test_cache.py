"""`capsule-heads cache`, and the commands that read what it makes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from processes import run_program
from transformers import AutoModel, AutoTokenizer, BertModel

from capsule_heads.cli import main
from capsule_heads.data import computing_states, state_folder

WORDS = ("the food was good", "a bad film", "it was long and bad", "good and good", "the film", "long food")


@pytest.fixture
def given(backbone, tmp_path, monkeypatch):
    """The options of some data: 40 texts to train on, of which each is another."""
    monkeypatch.setattr(state_folder, "SHARD_BYTES", 4000)
    rows = ["text,label"]
    rows += [f"{WORDS[n % 6]} {' '.join(['good', 'bad'][n >> k & 1] for k in range(6))},{'yes' if n % 2 else 'no'}"
             for n in range(50)]  # fmt: skip
    (tmp_path / "reviews.csv").write_text("\n".join(rows), encoding="utf-8")
    return ("--data", tmp_path / "reviews.csv", "--backbone", backbone, "--use_cpu", "--cache_dir", tmp_path / "cache")


@pytest.fixture
def computed(monkeypatch):
    """A list of the shards that are computed."""
    shards = []
    compute = computing_states.ShardComputer.compute

    def counted(self, shard, *others):
        shards.append((Path(self.folder.place).name, shard))
        return compute(self, shard, *others)

    monkeypatch.setattr(computing_states.ShardComputer, "compute", counted)
    return shards


@pytest.fixture
def backbone_rows(monkeypatch):
    """A list of the numbers of texts that a backbone gets."""
    rows, forward = [], BertModel.forward

    def counted(self, input_ids, *others, **inputs):
        rows.append(len(input_ids))
        return forward(self, input_ids, *others, **inputs)

    monkeypatch.setattr(BertModel, "forward", counted)
    return rows


def test_training_finds_what_was_cached(call, given, computed, tmp_path):
    status, out, err = call("cache", *given)
    assert status == 0, err
    names = [line.partition(":")[0] for line in out.splitlines()]
    assert names == ["train", "validation"] and "texts, 0.0 MB, " in out
    assert len(computed) == len(set(computed)) > 4
    done = list(computed)
    assert call("cache", *given)[:2] == (0, out)
    train = (*given, "--max_steps", 2, "--n_parts", 4, "--output_dir", tmp_path / "run")
    status, _, err = call("train", *train)
    assert status == 0, err
    assert computed == done

    # Or by the names of the folders, of which one alone has not all texts.
    folders = [line.rpartition(", ")[2] for line in out.splitlines()]
    train = (*given[:-2], "--max_steps", 2, "--output_dir", tmp_path / "run")
    status, _, err = call("train", *train, "--hidden_states", *folders)
    assert status == 0 and computed == done, err
    status, _, err = call("train", *train, "--hidden_states", tmp_path / "cache")  # or of the folder they are in
    assert status == 0 and computed == done, err
    status, _, err = call("train", *train, "--hidden_states", folders[1])
    assert (status, computed) == (2, done)
    assert f"texts have no hidden states in {folders[1]}; expected all: compute them with capsule-heads cache" in err
    sweep = (
        "sweep",
        *given[:-2],
        "--max_steps",
        2,
        "--grid",
        "learning_rate=1e-3,1e-2",
        "--output_dir",
        tmp_path / "s",
    )
    status, _, err = call(*sweep, "--hidden_states", *folders)
    assert status == 0 and computed == done, err


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_model_is_used_on_what_was_cached(call, given, computed, backbone_rows, tmp_path, dtype):
    run, data = tmp_path / "run", tmp_path / "reviews.csv"
    kept = ("--states_dtype", dtype)
    status, _, err = call("train", *given, *kept, "--max_steps", 20, "--n_parts", 4, "--output_dir", run)
    assert status == 0, err
    seen = json.loads((run / "results.json").read_text())
    done = list(computed)

    def evaluate(*more):
        status, _, err = call("evaluate", run, "--data", data, "--output_dir", tmp_path / "e", *more)
        assert status == 0, err
        return json.loads((tmp_path / "e" / "evaluation.json").read_text())

    def predict(*more):
        status, _, err = call("predict", run, "--data", data, "--output", tmp_path / "out.jsonl", *more)
        assert status == 0, err
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    usual, answers = evaluate(), predict()
    assert sum(backbone_rows) > 2 * 50
    backbone_rows.clear()
    cached = evaluate("--hidden_states", tmp_path / "cache")
    assert cached.keys() == usual.keys()
    assert cached["negative_log_likelihood"] == pytest.approx(usual["negative_log_likelihood"], abs=5e-3)
    assert seen["validation_loss"] > 0 and computed == done
    for found, expected in zip(predict("--hidden_states", tmp_path / "cache"), answers, strict=True):
        assert found["text"] == expected["text"]
        assert found["probability_yes"] == pytest.approx(expected["probability_yes"], abs=2e-2)
    assert sum(backbone_rows) <= 2  # a model that is loaded tries its backbone


def test_parts(call, given, computed, monkeypatch):
    """Two calls, of which the second finds nothing left: the first took over what nobody had begun."""
    status, out, err = call("cache", *given, "--part", "2/2", "--states_dtype", "int8")
    assert status == 0 and "missing" not in out, err
    of_train = [shard for name, shard in computed if name == computed[0][0]]
    own = [shard for shard in range(len(of_train)) if shard % 2 == 1]
    assert of_train[: len(own)] == own and sorted(of_train) == list(range(len(of_train)))
    done = list(computed)
    status, again, err = call("cache", *given, "--part", "1/2", "--states_dtype", "int8")
    assert (status, again, computed) == (0, out, done), err


def test_what_other_processes_hold_is_said(call, given, monkeypatch):
    import contextlib

    def claim(self, shard, wait):
        assert not wait
        return contextlib.nullcontext(shard > 0 and shard in self.missing())

    monkeypatch.setattr(state_folder.StateFolder, "claim", claim)
    status, out, err = call("cache", *given, "--part", "2/2")
    assert status == 0, err
    assert all("; 1 of " in line and line.endswith("missing, left to other parts") for line in out.splitlines())


PROGRAM = """
import sys
from capsule_heads.cli import main
from capsule_heads.data import state_folder
from fsspec.implementations.memory import MemoryFileSystem
from processes import fork_processes

state_folder.SHARD_BYTES = 4000
assert fork_processes(2, lambda rank: main(["cache", *sys.argv[1:]])) == [0, 0]
"""


@pytest.mark.slow
def test_processes_launched_together(given, call, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    run_program(tmp_path / "program.py", *given[:-1], tmp_path / "together")
    status, _, err = call("cache", *given)
    assert status == 0, err
    for folder in (tmp_path / "cache").iterdir():
        other = tmp_path / "together" / folder.name
        for path in folder.glob("shard-*"):
            assert path.read_bytes() == (other / path.name).read_bytes()
        assert json.loads((folder / "manifest.json").read_text()) == json.loads((other / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "0/4"], "argument --part: 0/4; expected K/N, with K from 1 to N, such as 3/16"),
        (["--part", "5/4"], "5/4; expected K/N"),
        (["--part", "3"], "3; expected K/N"),
        (["--learning_rate", "1e-3"], "learning_rate is 0.001, which has no effect on hidden states; leave it out"),
        (["--n_parts", "4"], "n_parts is 4, which has no effect on hidden states"),
        (["--states_dtype", "float8"], "invalid choice: 'float8'"),
        (
            ["--adapt", "lora"],
            "adapt is lora, which trains the backbone, so that each run has its own states; leave it out",
        ),
    ],
)
def test_mistakes(options, message, given, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["cache", *map(str, given), *options])
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert message in error and error.count("error: ") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache_hidden_states", "false"], "and cache_hidden_states is false; expected a cache: leave one out"),
        (
            ["--hidden_states", "x"],
            "and hidden_states names folders, from which all states are read; leave cache_dir out",
        ),
    ],
)
def test_options_of_training_that_exclude_each_other(call, given, options, message):
    status, _, err = call("train", *given, *options)
    assert status == 2 and message in err


def test_states_that_something_else_has_computed(call, given, backbone, backbone_rows, tmp_path):
    tokenizer, of_states = AutoTokenizer.from_pretrained(backbone), AutoModel.from_pretrained(backbone)
    rows = (tmp_path / "reviews.csv").read_text().splitlines()[1:]
    ids = [tokenizer(row.rpartition(",")[0])["input_ids"] for row in rows]
    with torch.no_grad():
        states = [of_states(torch.tensor([x]), output_hidden_states=True).hidden_states for x in ids]
    folder = tmp_path / "arrays"
    folder.mkdir()
    np.save(folder / "states.npy", torch.cat([torch.stack(x, dim=2)[0] for x in states]).numpy())
    np.save(folder / "tokens.npy", np.concatenate(ids))
    np.save(folder / "lengths.npy", [len(x) for x in ids])
    names = {name: f"{name}.npy" for name in ("states", "tokens", "lengths")}
    (folder / "arrays.json").write_text(json.dumps(names))
    backbone_rows.clear()
    status, _, err = call("cache", *given, "--import_states", folder)
    assert status == 0, err
    assert sum(backbone_rows) == 1 + 16 + 10  # tried; and texts that are compared: of 40 to train on, and 10 others
    status, _, err = call("train", *given, "--max_steps", 2, "--n_parts", 4, "--output_dir", tmp_path / "run")
    assert status == 0, err
    assert sum(backbone_rows) == 27 + 1 + 40  # tried again; and its parts are described by texts

    states = np.load(folder / "states.npy")
    np.save(folder / "states.npy", states[::-1])
    other = (*given[:-1], tmp_path / "other")
    status, _, err = call("cache", *other, "--import_states", folder)
    assert status == 2 and "differ from the backbone's own at layer 0, by " in err
    status, _, err = call("cache", *other, "--import_states", folder, "--engine", "ray")
    assert status == 2 and "--import_states is read by this process, and --engine is ray; leave one out" in err


def test_data_and_states_in_an_object_store(call, given, tmp_path):
    bucket = MemoryFileSystem()
    bucket.pipe_file("/bucket/reviews.csv", (tmp_path / "reviews.csv").read_bytes())
    there = ("--data", "memory://bucket/reviews.csv", *given[2:-1])
    status, out, err = call("cache", *there, "memory://bucket/states")
    assert status == 0, err
    places = [line.rpartition(", ")[2] for line in out.splitlines()]
    assert all(place.startswith("memory://bucket/states/hidden_states_") for place in places)
    few = ("--max_steps", 2, "--n_parts", 4, "--output_dir", tmp_path / "run")
    status, _, err = call("train", *there[:-1], *few, "--hidden_states", "memory://bucket/states")
    assert status == 0, err
    answers = ("--output", tmp_path / "answers.csv")
    status, _, err = call("predict", tmp_path / "run", "--data", "memory://bucket/reviews.csv", *answers)
    assert status == 0, err
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 51

    changed = (tmp_path / "reviews.csv").read_text().replace("film", "food")
    bucket.pipe_file("/bucket/reviews.csv", changed.encode())
    assert call("predict", tmp_path / "run", "--data", "memory://bucket/reviews.csv", *answers)[0] == 0
    assert "film" not in (tmp_path / "answers.csv").read_text()
    status, _, err = call("train", "--data", "memory://bucket/none.csv", *given[2:])
    assert (status, err) == (2, "error: There is no file memory://bucket/none.csv.\n")
    bucket.store.clear()
    bucket.pseudo_dirs[:] = [""]
