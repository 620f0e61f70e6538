"""scripts/benchmarks/sweep.py on a few phrases, on the CPU."""

import re

import pytest

pytestmark = pytest.mark.slow

TREE = "(3 (2 it) (4 (2 was) (3 good)))\n(1 (2 the) (1 (2 food) (0 bad)))\n(2 (2 a) (2 film))\n"


def test_it_times_all_heads_at_once_and_one_by_one(call, backbone, tmp_path):
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.txt").write_text(TREE)
    options = ("--backbone", backbone, "--heads", "linear", "--rates", 1e-3, 2e-3, "--seeds", 2, "--steps", 2)
    status, out, err = call("benchmarks/sweep.py", "--source", tmp_path, *options, "--repeats", 1)
    assert status == 0, err
    assert out.startswith("linear ")
    assert re.search(r"\| linear \| 4 \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ to [\d.]+ \|\n$", out)


def test_a_rate_given_twice(call):
    status, _, err = call("benchmarks/sweep.py", "--source", "trees", "--rates", "1e-3", "1e-3")
    assert status == 2
    assert "expected each rate once" in err
