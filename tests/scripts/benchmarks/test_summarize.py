import json

import pytest

HEADER = "| task | backbone | head | seeds | metric | validation | test | trained parameters | steps | training time |"


@pytest.fixture
def results(tmp_path):
    """results(**keys): the path of a results file with these, beside the usual ones."""
    paths = []

    def write(**keys):
        common = {"task": "sst5", "backbone": "b", "seed": 0, "steps": 1000, "trained_parameters": 38464}
        path = tmp_path / f"{len(paths)}.json"
        path.write_text(json.dumps({**common, "training_seconds": 60.0, **keys}))
        paths.append(path)
        return path

    return write


def test_means_and_standard_deviations(call, results):
    paths = [
        results(
            seed=seed,
            training_seconds=seconds,
            validation_accuracy=dev,
            test_accuracy=test,
            test_loss=1.0,
            test_runtime=3.0,
            test_samples_per_second=2.0,
            test_model_preparation_time=0.1,
        )
        for seed, seconds, dev, test in ((2, 660, 0.46, 0.48), (0, 600, 0.47, 0.49), (1, 720, 0.48, 0.53))
    ]
    status, out, _ = call("benchmarks/summarize.py", *paths)
    assert status == 0
    # By hand: mean 0.47, sd 0.01; mean 0.5, sd sqrt((0.02^2 + 0.01^2 + 0.03^2) / 2) = 0.02646
    assert out.splitlines() == [
        HEADER,
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| sst5 | b | token_depth | 0, 1, 2 | accuracy | 47.0 ± 1.0 | 50.0 ± 2.6 | 38,464 | 1,000 | 11 min |",
    ]


def test_a_row_per_task_backbone_and_metric(call, results):
    paths = [
        results(backbone="a", validation_accuracy=0.5, test_accuracy=0.25),
        results(backbone="b", validation_accuracy=0.5, test_accuracy=0.75),
        results(head_type="linear", validation_accuracy=0.5, test_accuracy=1.0),
        results(task="mrpc", validation_accuracy=0.7, validation_f1=0.8, validation_loss=1.0),  # no labels in its test
    ]
    rows = [line.split(" | ") for line in call("benchmarks/summarize.py", *paths)[1].splitlines()[2:]]
    assert [row[:7] for row in rows] == [
        ["| sst5", "a", "token_depth", "0", "accuracy", "50.0", "25.0"],
        ["| sst5", "b", "token_depth", "0", "accuracy", "50.0", "75.0"],
        ["| sst5", "b", "linear", "0", "accuracy", "50.0", "100.0"],
        ["| mrpc", "b", "token_depth", "0", "accuracy", "70.0", "-"],
        ["| mrpc", "b", "token_depth", "0", "f1", "80.0", "-"],
    ]


def test_results_of_before_the_backbone_was_among_them(call, results):
    path = results(validation_accuracy=0.5, test_accuracy=0.5)
    content = json.loads(path.read_text())
    del content["backbone"]
    path.write_text(json.dumps(content))
    assert "| sst5 |  | token_depth | 0 | accuracy | 50.0 | 50.0 |" in call("benchmarks/summarize.py", path)[1]


def test_mistakes(fails, tmp_path):
    assert "expected files" in fails("benchmarks/summarize.py")
    assert f"{tmp_path}/none.json holds no results" in fails("benchmarks/summarize.py", tmp_path / "none.json")
    (tmp_path / "a.json").write_text("[1]")
    (tmp_path / "b.json").write_text("{")
    assert f"{tmp_path}/a.json: expected keys and values, found list" in fails(
        "benchmarks/summarize.py", tmp_path / "a.json"
    )
    assert f"{tmp_path}/b.json" in fails("benchmarks/summarize.py", tmp_path / "b.json")
