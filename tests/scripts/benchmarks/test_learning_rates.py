"""scripts/benchmarks/learning_rates.py on a few texts, on the CPU."""

import re

import pytest

pytestmark = pytest.mark.slow


def test_the_rule_is_compared_with_what_a_sweep_chooses(call, backbone, tiny_set):
    options = ("--set", "cr", "--data", tiny_set, "--backbone", backbone, "--rows", 20, "--draws", 2)
    status, out, err = call("benchmarks/learning_rates.py", *options)
    assert status == 0, err
    table = re.search(r"\n\| 20 \| \d+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([+-][\d.]+) \| \d of 2 \|\n", out)
    rule, chosen, best, gain = map(float, table.groups())
    assert max(rule, chosen) <= best
    assert gain == pytest.approx(chosen - rule, abs=0.11)


def test_more_rows_than_there_are(call, tiny_set):
    status, _, err = call("benchmarks/learning_rates.py", "--set", "cr", "--data", tiny_set, "--rows", 99)
    assert status == 2
    assert "--rows has 99; expected at most 24" in err
