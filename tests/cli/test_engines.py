"""`capsule-heads cache` and `predict` with --engine ray, on this machine."""

import csv

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def test_commands(call, backbone, tmp_path):
    rows = [
        {"text": f"the {('food', 'film')[n % 3 > 0]} was {('bad', 'good')[n % 2]}", "label": n % 2} for n in range(9)
    ]
    with open(tmp_path / "data.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows([*rows, {"text": "", "label": 0}])
    given = ("--data", tmp_path / "data.csv", "--backbone", backbone, "--use_cpu")
    status, out, err = call("cache", *given, "--cache_dir", tmp_path / "states", "--engine", "ray", "--actors", 1)
    assert status == 0, err
    assert out.startswith("train: ") and str(tmp_path / "states") in out
    run = tmp_path / "run"
    status, _, err = call(
        "train", *given, "--max_steps", 3, "--n_parts", 4, "--output_dir", run, "--hidden_states", tmp_path / "states"
    )
    assert status == 0, err
    ways = {"here": (), "ray": ("--engine", "ray", "--actors", "1:2")}
    for name, options in ways.items():
        status, _, err = call(
            "predict", run, "--data", tmp_path / "data.csv", "--output", tmp_path / f"{name}.csv", *options
        )
        assert status == 0, err
        assert "No prediction for 1 of 10 rows" in err
    assert (tmp_path / "here.csv").read_text() == (tmp_path / "ray.csv").read_text()
    status, _, err = call(
        "predict", run, "--data", tmp_path / "data.csv", "--output", tmp_path / "x.csv", "--actors", 2
    )
    assert (status, err) == (2, "error: --actors is for --engine ray; leave it out, or name the engine.\n")
    status, _, err = call("cache", *given, "--engine", "ray", "--part", "1/2")
    assert status == 2 and "--part is for processes without a cluster, and --engine is ray; leave one out" in err
