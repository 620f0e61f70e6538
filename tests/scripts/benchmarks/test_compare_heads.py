"""scripts/benchmarks/compare_heads.py and write_results.py on a tiny backbone and a few trees."""

import json

TREE = "(3 (2 (2 the) (2 film)) (3 (2 was) (4 good)))\n(1 (2 (2 the) (2 food)) (1 (2 was) (0 bad)))\n"


def test_every_head_is_trained_and_written(run, backbone, tmp_path):
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.txt").write_text(TREE)
    data = ("--task", "sst5", "--source", tmp_path, "--backbone", backbone, "--max_phrases", 10, "--epochs", 1)
    sizes = ("--seeds", 2, "--ablation_seeds", 1, "--heads", "capsules", "linear, last", "vector routing")
    files = ("--runs", tmp_path / "runs", "--json", tmp_path / "heads.json", "--commit", "abc1234")
    done = run("benchmarks/compare_heads.py", *data, *sizes, *files)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((tmp_path / "heads.json").read_text())
    assert {(x["head"], x["rate"]) for x in record["tried"]} == {
        (head, rate) for head in ("capsules", "linear, last", "vector routing") for rate in (5e-4, 2e-3, 8e-3)
    }
    assert sorted((x["head"], x["seed"]) for x in record["runs"]) == [
        (head, seed) for head in ("capsules", "linear, last", "vector routing") for seed in (0, 1)
    ]
    for head in ("capsules", "linear, last", "vector routing"):
        tried = [x for x in record["tried"] if x["head"] == head]
        best = max(tried, key=lambda x: x["validation"])
        assert {x["rate"] for x in record["runs"] if x["head"] == head} == {best["rate"]}
    assert len(record["ablations"]) == 11
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("results.json")}
    assert {path.parent.name for path in before} == {"rates", "seeds", "ablations"}

    again = run("benchmarks/compare_heads.py", *data, *sizes, *files)  # what is there is not run again
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("results.json")} == before

    options = ("--heads", tmp_path / "heads.json", "--output", tmp_path / "results.md")
    done = run("benchmarks/write_results.py", *options)
    assert done.returncode == 0, done.stderr
    assert "commit abc1234" in (tmp_path / "results.md").read_text()


def test_mistakes(fails, tmp_path):
    assert "nowhere" in fails("benchmarks/compare_heads.py", "--task", "sst5", "--source", tmp_path / "nowhere")
    assert "heads.json" in fails("benchmarks/write_results.py", "--heads", tmp_path / "heads.json")
