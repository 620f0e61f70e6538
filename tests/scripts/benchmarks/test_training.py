"""scripts/benchmarks/training.py on a few phrases."""

import json
import sys

import pytest

pytestmark = pytest.mark.slow

TREE = "(3 (2 it) (4 (2 was) (3 good)))\n(1 (2 the) (1 (2 food) (0 bad)))\n(2 (2 a) (2 film))\n"
SMALL = ("--epochs", 1, "--batch_size", 4, "--seeds", 0, 1, "--memory_sizes", 2, 16, 3, 64)


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees_of_benchmark")
    for name in ("train", "dev", "test"):
        (folder / f"{name}.txt").write_text(TREE)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_it_times_both_ways_and_writes_everything(run, backbone, trees, tmp_path):
    options = ("--backbone", backbone, "--max_phrases", 8, "--scratch", tmp_path, "--json", tmp_path / "times.json")
    done = run("benchmarks/training.py", "--source", trees, *SMALL, *options)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "times.json").read_text())
    kinds = [(row["kind"], row["seed"]) for row in written["runs"]]
    assert kinds == [("straightforward", 0), ("ours", 0), ("ours", 1), ("straightforward", 1)]
    for row in written["runs"]:
        assert row["steps"] == 2
        assert 0 <= row["seconds_of_cache"] < row["seconds"]
        assert 0 <= row["validation_accuracy"] <= 1 and 0 <= row["test_accuracy"] <= 1
    assert [row["kind"] for row in written["memory"]] == ["straightforward", "ours", "ours, from the cache"]
    assert [row["states"] for row in written["memory"]] == [2 * 16 * 3 * 64 * size for size in (4, 4, 2)]
    assert "x less time (" in done.stdout
    assert "Measured on 8 of 13 phrases, drawn at random." in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["times.json"]  # the caches are gone


def test_without_a_source(call):
    status, _, err = call("benchmarks/training.py")
    assert status == 2
    assert "--source is missing: the directory of the trees" in err
