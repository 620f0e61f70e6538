"""Some trials of each fault: each ends right or in a sentence."""

import re

import pytest

pytestmark = pytest.mark.slow

FEW = {"kills": 3, "full_disks": 3, "flips_of_checkpoints": 20, "flips_of_caches": 20, "mutated_files": 60}


def test_every_fault_ends_right_or_in_one_sentence(run):
    trials = (x for name, n in FEW.items() for x in (f"--{name}", n))
    done = run(
        "benchmarks/faults.py", "--seed", 1, *trials, timeout=1800
    )  # a minute, on a machine with nothing else to do
    assert (done.returncode, done.stdout.strip().splitlines()[-1][-5:]) == (0, "| 0 |"), done.stdout + done.stderr
    rows = {
        name: list(map(int, row))
        for name, *row in re.findall(r"\| (.+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| 0 \|", done.stdout)
    }
    assert {name.replace(" ", "_") for name in rows} >= FEW.keys() - {"mutated_files"}
    assert sum(n for n, *_ in rows.values()) == sum(FEW.values())
    assert all(n == sum(ends) for n, *ends in rows.values())
    assert rows["kills"][1] == FEW["kills"]  # nothing is refused there


def test_the_number_of_trials_is_a_number(fails):
    error = fails("benchmarks/faults.py", "--kills", "some")
    assert error == "error: command line: argument --kills: some is not a whole number of at least 0"
