"""scripts/benchmarks/compare_heads.py and write_results.py on a tiny backbone and a few texts."""

import json

HEADS = ("capsules", "linear, mean", "regression, all layers")


def test_heads_are_tuned_and_written(call, backbone, tiny_set, tmp_path):
    data = ("--set", "cr", "--data", tiny_set, "--backbone", backbone, "--steps", 2, "--commit", "abc1234")
    files = ("--runs", tmp_path / "runs", "--results", tmp_path / "heads")
    status, _, err = call("benchmarks/compare_heads.py", *data, *files, "--seeds", 2, "--heads", *HEADS)
    assert status == 0, err
    record = json.loads((tmp_path / "heads" / "cr.json").read_text())
    runs = {name: [x for x in record["runs"] if x["head"] == name] for name in HEADS}

    trials = [x["settings"] for x in runs["capsules"] if x["seed"] == 0]
    rates = [x["learning_rate"] for x in trials[:4]]
    assert rates == record["space"]["learning_rate"]
    assert [{**x, "learning_rate": 0} for x in trials[:4]] == 4 * [
        {"learning_rate": 0, "weight_decay": 0.0, "mixup_alpha": 0.0, "n_iters": 2, "n_parts": 64}
    ]
    best = {}
    values = {
        name: x["validation"] for name, x in ((str(x["settings"]), x) for x in runs["capsules"] if x["seed"] == 0)
    }
    for axis, of_axis in record["space"].items():  # one after another, what is best is kept
        if axis == "C":
            continue
        tried = [x for x in trials if all(x[name] == value for name, value in best.items())]
        assert {x[axis] for x in tried} == set(of_axis)
        best[axis] = max(tried, key=lambda x: values[str(x)])[axis]
    assert record["best"]["capsules"] == best
    assert len(trials) == len({str(x) for x in trials}) == 9
    assert [x["settings"] for x in runs["capsules"] if x["seed"] == 1] == [best]
    assert set(record["best"]["linear, mean"]) == {"learning_rate", "weight_decay", "mixup_alpha"}

    (regression,) = runs["regression, all layers"]
    assert regression["validation"] == max(regression["tried"].values()) and len(regression["tried"]) == 5
    n_states = 3  # of the backbone: embeddings and two layers, all of which it takes
    assert (regression["parameters"] - 1) % (3 * n_states) == 0

    ledger = tmp_path / "runs" / "cr" / "runs.json"
    before = ledger.stat().st_mtime_ns
    status, _, err = call("benchmarks/compare_heads.py", *data, *files, "--seeds", 2, "--heads", *HEADS)
    assert status == 0, err
    assert ledger.stat().st_mtime_ns == before  # what was measured is not measured again
    status, _, err = call("benchmarks/compare_heads.py", *data, *files, "--seeds", 3, "--heads", *HEADS)
    assert status == 0, err
    status, _, err = call("benchmarks/compare_heads.py", *data, *files, "--steps", 3, "--max_texts", 9)
    assert status == 2
    assert "have steps 2, not 3, max_texts 20000, not 9; expected the same settings, or --runs with another" in err
    runs = [x for x in json.loads(ledger.read_text()) if x["head"] == "capsules"]
    assert [x["seed"] for x in runs if x["settings"] == best] == [0, 1, 2]

    status, _, err = call(
        "benchmarks/write_results.py", "--heads", tmp_path / "heads", "--output", tmp_path / "results.md"
    )
    assert status == 0, err
    assert "[CR](heads/cr.md)" in (tmp_path / "results.md").read_text()
    assert "commit abc1234" in (tmp_path / "heads" / "cr.md").read_text()


def test_mistakes(fails, tmp_path):
    options = ("--set", "sst5", "--runs", tmp_path, "--results", tmp_path)
    assert "nowhere" in fails("benchmarks/compare_heads.py", *options, "--trees", tmp_path / "nowhere")
    assert 'set "sst5" without --trees' in fails("benchmarks/compare_heads.py", *options)
    assert "without --glue" in fails("benchmarks/compare_heads.py", *options[2:], "--set", "glue_sst2")
    assert "no results to write" in fails("benchmarks/write_results.py", "--heads", tmp_path)
