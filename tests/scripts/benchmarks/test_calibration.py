"""scripts/benchmarks/calibration.py on a tiny backbone and a few texts."""

import numpy as np


def test_a_run_is_measured_and_its_tables_are_put_between_the_marks(call, backbone, tiny_set, tmp_path):
    runs, page = tmp_path / "runs", tmp_path / "page.md"
    data = ("--data", tiny_set, "--sets", "cr", "--backbone", backbone, "--seeds", 0, "--runs", runs)
    status, tables, err = call("benchmarks/calibration.py", *data)
    assert status == 0, err
    (file,) = runs.glob("*.npz")
    found, written = np.load(file), file.stat().st_mtime_ns
    losses = -np.log(np.exp(found["test_logits"]) / np.exp(found["test_logits"]).sum(-1, keepdims=True))
    before = losses[np.arange(len(losses)), found["test_labels"]].mean()
    accuracy = (found["test_logits"].argmax(-1) == found["test_labels"]).mean()
    measured, fewer = (line.split(" | ") for line in tables.splitlines() if line.startswith("| cr |"))
    assert measured[1:3] == ["12", f"{accuracy:.3f}"] and measured[6] == f"{before:.3f}"
    assert "| data | 10 rows |" in tables and len(fewer) == 2

    page.write_text("Above.\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nBelow.\n")
    options = ("--runs", runs, "--page", page, "--machine", "1 core")
    assert call("benchmarks/calibration.py", *options)[:2] == (0, tables)
    above, rest = page.read_text().split("<!-- measured: begin -->\n")
    inside, below = rest.split("<!-- measured: end -->")
    assert (above, below) == ("Above.\n", "\nBelow.\n")
    assert "with seeds 0, on 1 core" in inside and inside.endswith(f"\n\n{tables}") and "old" not in inside
    assert call("benchmarks/calibration.py", *data)[:2] == (0, tables)
    assert file.stat().st_mtime_ns == written  # what is there is not run again


def test_mistakes(fails, backbone, tmp_path):
    options = ("--backbone", backbone, "--runs", tmp_path / "runs")
    assert "nowhere" in fails("benchmarks/calibration.py", "--data", tmp_path / "nowhere", *options)
