"""scripts/benchmarks/draw_results.py and summarize.py, as a user runs them."""

import json

import pytest

PNG = b"\x89PNG\r\n\x1a\n"


def test_draw_results(run, tmp_path):
    done = run("benchmarks/draw_results.py", "--task", "sst5", "--output_dir", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    paths = [tmp_path / "new" / f"sst5_{against}.png" for against in ("parameters", "year")]
    assert done.stdout.split() == [str(path) for path in paths]
    for path in paths:
        assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize("task", ["sst2_root", "smallnorb"])
def test_draw_results_of_other_tasks(call, tmp_path, task):
    assert call("benchmarks/draw_results.py", "--task", task, "--output_dir", tmp_path)[0] == 0
    assert len(list(tmp_path.glob(f"{task}_*.png"))) == 2


def test_draw_results_with_files_that_are_not_there(fails, tmp_path):
    assert "none.json" in fails("benchmarks/draw_results.py", "--task", "sst5", "--measured", tmp_path / "none.json")
    assert "--task" in fails("benchmarks/draw_results.py", "--task", "cola")


def test_summaries_go_where_draw_results_reads(call, fails, tmp_path):
    results, measured = tmp_path / "results.json", tmp_path / "measured.json"
    keys = {"task": "sst5", "seed": 0, "steps": 1, "trained_parameters": 1000, "training_seconds": 60.0}
    results.write_text(json.dumps({**keys, "validation_accuracy": 0.5, "test_accuracy": 0.25}))
    options = (results, "--measured", measured, "--commit", "abc", "--date", "2026-01-02")
    assert "do not say which backbone they had" in fails("benchmarks/summarize.py", *options)
    assert call("benchmarks/summarize.py", *options, "--backbone", "b")[0] == 0
    (record,) = json.loads(measured.read_text())
    assert (record["backbone"], record["test"]["mean"], record["commit"]) == ("b", 0.25, "abc")
    options = ("--task", "sst5", "--measured", measured, "--output_dir", tmp_path)
    assert call("benchmarks/draw_results.py", *options)[0] == 0
