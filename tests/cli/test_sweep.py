"""The options of `capsule-heads sweep`, and a sweep from the command line."""

import json

import pytest

from capsule_heads.cli import main
from capsule_heads.cli.options.sweep import SweepParser

GIVEN = ("--data", "reviews.csv", "--backbone", "some/model", "--use_cpu")


def test_a_grid_is_parsed_as_the_options_would_be():
    grid = (
        "--grid",
        "learning_rate=5e-4,2e-3",
        "n_parts=4,8",
        "--grid",
        "pooling=mean,first",
        "--heads",
        "linear,token_depth",
    )
    options = SweepParser("capsule-heads sweep").parse_args([*GIVEN, *grid, "--seeds", "3", "--d_inp", "8"])
    assert options.plan.grid == {"learning_rate": [5e-4, 2e-3], "n_parts": [4, 8], "pooling": ["mean", "first"]}
    assert (options.plan.heads, options.plan.seeds, options.plan.halving) == (["linear", "token_depth"], 3, False)
    assert (options.head, options.data.data) == ({"d_inp": 8}, "reviews.csv")


def test_a_file_that_is_for_training_too_is_taken(caplog):
    given = ["--config", "sst5_minilm", "--seeds", "10", "--use_cpu"]
    options = SweepParser("capsule-heads sweep").parse_args(given)
    assert options.plan.seeds == 10 and options.data.task == "sst5"
    assert caplog.messages == ["sst5_minilm: a sweep ignores logging_steps, save_strategy."]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--grid", "learning_rate"], "--grid learning_rate; expected a name and its values"),
        (["--grid", "learning_rate=fast"], "invalid float value: 'fast'"),
        (["--grid", "learning_rat=1"], "unknown option --learning_rat; did you mean --learning_rate?"),
        (["--grid", "d_inp=8", "d_inp=16"], "--grid has d_inp twice"),
        (["--grid", "d_inp=8,8"], "grid has d_inp=[8, 8]; expected one value or more, each of them once"),
        (["--grid", "d_inp=8", "--d_inp", "16"], "d_inp is 16, and --grid has it too"),
        (["--heads", "linear", "--head_type", "linear"], "head_type is linear, and --heads has heads too"),
        (["--save_strategy", "no"], "save_strategy is no, which has no effect in a sweep"),
        (["--seeds", "0"], "seeds is 0; expected 1 or more"),
        (["--ensemble", "1"], "ensemble is 1; expected 2 or more"),
    ],
)
def test_mistakes_are_one_line(given, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["sweep", *GIVEN, *given])
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_the_best_head_of_a_sweep_predicts(call, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        "text,label",
        *["the food was good,yes", "a bad film,no", "it was long and bad,no", "good and good,yes"] * 10,
    ]
    (tmp_path / "reviews.csv").write_text("\n".join(rows), encoding="utf-8")
    given = ("--data", tmp_path / "reviews.csv", "--backbone", backbone, "--max_steps", 5, "--use_cpu", "--d_inp", 8)
    plan = ("--heads", "token_depth,linear", "--grid", "learning_rate=1e-3,1e-2", "--seeds", 2)
    status, out, err = call("sweep", *given, *plan, "--output_dir", tmp_path / "run")
    assert status == 0, err
    assert out.count("learning_rate=0.001") == 2
    assert "Traceback" not in err
    found = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert len(found["heads"]) == 8
    status, out, err = call("predict", tmp_path / "run" / "best", "a good film")
    assert status == 0 and ("yes" in out or "no" in out), err
