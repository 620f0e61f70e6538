"""Some trials of killed processes that compute hidden states."""

import pytest

pytestmark = pytest.mark.slow


def test_killed_processes_lose_the_shard_in_hand_at_most(run):
    done = run("benchmarks/cache_faults.py", "--seed", 1, "--trials", 2, "--without_ray")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| 1 process killed", "| 2 processes killed", "| 4 processes killed"]
    assert all(row[1] == "2" and row[3] == "2 |" for row in rows)
