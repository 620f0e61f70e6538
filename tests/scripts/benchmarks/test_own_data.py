"""scripts/benchmarks/own_data.py on a tiny backbone and a few texts."""

import json

METHODS = ("regression, last layer, C=1", "capsule head, before training")


def test_methods_are_run_once_and_their_accuracy_is_in_the_table(call, backbone, tiny_set, tmp_path):
    table, runs = tmp_path / "table.md", tmp_path / "runs"
    data = ("--data", tiny_set, "--sets", "cr", "--backbone", backbone, "--rows", 4, "--seeds", 0)
    options = (*data, "--methods", *METHODS, "--runs", runs, "--table", table, "--json", tmp_path / "all.json")
    status, _, err = call("benchmarks/own_data.py", *options)
    assert status == 0, err
    results = [json.loads(path.read_text()) for path in runs.glob("cr_*.json")]
    assert {(x["set"], x["n_rows"], x["seed"], x["method"]) for x in results} == {("cr", 8, 0, x) for x in METHODS}
    lines = table.read_text().splitlines()
    for result in results:
        right = [x == n % 2 for n, x in enumerate(result["predictions"])]  # as `tiny_set` has them
        assert result["accuracy"] == sum(right) / len(right)
        (line,) = [line for line in lines if line.startswith(f"| cr | 8 | {result['method']} |")]
        assert line.endswith(f"| {result['steps']} | {result['seconds']:.1f} | {100 * result['accuracy']:.1f} |")
    assert {x["method"]: x["accuracy"] for x in json.loads((tmp_path / "all.json").read_text())["runs"]} == {
        x["method"]: x["accuracy"] for x in results
    }

    before = {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert call("benchmarks/own_data.py", *options)[:2] == (0, "")  # what is there is not run again
    assert {path: path.stat().st_mtime_ns for path in runs.iterdir()} == before
    assert table.read_text().splitlines() == lines

    status, _, err = call("benchmarks/own_data.py", *options, "--backbone", tmp_path)
    assert status == 2
    assert f'have backbone "{backbone}", not "{tmp_path}"; expected the same settings' in err


def test_mistakes(fails, tmp_path):
    assert "nowhere" in fails("benchmarks/own_data.py", "--data", tmp_path / "nowhere", "--runs", tmp_path / "runs")
